"""How long requests that decode wait while a long prompt is computed: the gaps between their tokens.

    python -m benchmarks.stall [--running 1 4 8] [--prompt 1500] [--rounds 3] [--parked] [--json]

Random weights of the 135M shape in row-wise int8 and in int4. A gap is counted as normal before the prompt
comes and after it is done; beside each other stand the bound of the engine's default (max_stall) and none. With
`--parked` the prompt is computed already, and its text is put aside for an urgent request and written back.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import parser_of
from benchmarks.models import ROWWISE
from benchmarks.random_llama import SMOLLM2_135M, kept_llama
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import Request, SamplingParams
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.export import export_decoder
from lifecycle.graph.quantize import quantize_graph
from lifecycle.graph.targets import Cpu

CHUNK, BEFORE = 128, 60
SCHEMES = {"int8-rowwise": ROWWISE, "int4": Blockwise(64)}


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--prompt", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parked", action="store_true", help="put the text aside and back")
    parser.add_argument("--scheme", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--folder", type=Path, help="where the model is kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for found in measure(args.folder or Path(root), args):
            print(json.dumps(found) if args.json else describe(found), flush=True)


def describe(found: dict[str, Any]) -> str:
    return (
        f"{found['scheme']:13} {found['running']} running, max_stall {found['max_stall']!s:4} "
        f"normal {found['normal_ms']:5.1f} ms, p99 beside the text {found['p99_ms']:6.1f} ms: "
        f"{found['p99_by_normal']:5.2f} times; text after {found['prompt_s']:.2f} s"
    )


def measure(root: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per scheme, number of running requests, and bound."""
    for scheme in args.scheme:
        folder = make_model(root, scheme)
        for max_stall in (EngineOptions().max_stall, None):
            options = EngineOptions(max(args.running) + 1, 2048, max_stall=max_stall)
            engine = OnnxEngine.open(folder, options)
            for running in args.running:
                parts = [
                    one_round(engine, running, args.prompt, args.parked) for _ in range(args.rounds)
                ]
                normal = float(np.median(np.concatenate([part[0] for part in parts])))
                p99 = float(np.percentile(np.concatenate([part[1] for part in parts]), 99))
                yield {
                    "scheme": scheme,
                    "running": running,
                    "max_stall": max_stall,
                    "normal_ms": 1000 * normal,
                    "p99_ms": 1000 * p99,
                    "p99_by_normal": p99 / normal,
                    "prompt_s": float(np.median([part[2] for part in parts])),
                }
            engine.close()


def make_model(root: Path, scheme: str) -> Path:
    """A model folder of random weights, made once per `root`."""
    full, made = root / "stall-fp32", root / f"stall-{scheme}"
    if not full.exists():
        full.mkdir(parents=True)
        export_decoder(kept_llama(root, SMOLLM2_135M), full, Cpu())
    if not made.exists():
        made.mkdir()
        quantize_graph(full, made, scheme, SCHEMES[scheme])
    return made


class Watch:
    """The gaps between the steps of an engine, in seconds."""

    def __init__(self, engine: OnnxEngine) -> None:
        self._engine = engine
        self._last = time.perf_counter()

    def step(self, gaps: list[float]) -> set[str]:
        """Make one, and whom it told something."""
        told = {event.request_id for event in self._engine.step()}
        now = time.perf_counter()
        gaps.append(now - self._last)
        self._last = now
        return told

    def until(self, gaps: list[float], request_id: str) -> float:
        """Steps until it tells one request something; how long that took."""
        begun = time.perf_counter()
        while request_id not in self.step(gaps):
            pass
        return time.perf_counter() - begun


def one_round(
    engine: OnnxEngine, running: int, length: int, is_parked: bool
) -> tuple[Any, Any, float]:
    """Gaps between steps in seconds, without and with what is done with the long text, and how long that took."""
    rng = np.random.default_rng(0)
    text = rng.integers(3, 1000, length).tolist()
    free = SamplingParams(max_tokens=2000, ignore_eos=True)
    for n in range(running):
        engine.submit(Request(f"runs {n}", rng.integers(3, 1000, 40).tolist(), free))
    while len(engine.step()) < running:
        pass
    normal: list[float] = []
    beside: list[float] = []
    watch = Watch(engine)
    if is_parked:
        engine.submit(Request("text", text, free, priority=2))
        watch.until([], "text")
        # With its text the steps are longer.
        for _ in range(BEFORE):
            watch.step(normal)
        for n in range(engine.max_num_seqs - engine.num_running + 1):
            short = SamplingParams(max_tokens=4, ignore_eos=True)
            engine.submit(Request(f"urgent {n}", [5, 6, 7], short, priority=1))
        taken = watch.until(beside, "urgent 0") + watch.until(beside, "text")
    else:
        for _ in range(BEFORE):
            watch.step(normal)
        engine.submit(Request("text", text, SamplingParams(max_tokens=1, ignore_eos=True)))
        taken = watch.until(beside, "text")
    for _ in range(BEFORE):
        watch.step(normal)
    for n in range(running):
        engine.cancel(f"runs {n}")
    engine.cancel("text")
    engine.step()
    return normal, beside, taken


if __name__ == "__main__":
    main()
