"""How long requests that decode wait while a long prompt is computed: the gaps between their tokens.

    python -m benchmarks.stall [--running 1 4 8] [--prompt 1500] [--rounds 3] [--json]

Random weights of the 135M shape in row-wise int8 and in int4. A gap is counted as normal before the prompt
comes and after it is done; beside each other stand the bound of the engine's default (max_stall) and none.
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
from benchmarks.random_llama import SMOLLM2_135M, kept_llama
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import Request, SamplingParams
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.export import export_decoder
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import quantize_graph
from lifecycle.graph.targets import Cpu

CHUNK, BEFORE = 128, 60
SCHEMES = {"int8-rowwise": Int8Rowwise(8), "int4": Blockwise(64)}


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--prompt", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scheme", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--folder", type=Path, help="where the model is kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for found in measure(args.folder or Path(root), args):
            print(json.dumps(found) if args.json else describe(found), flush=True)


def describe(found: dict[str, Any]) -> str:
    return (
        f"{found['scheme']:13} {found['running']} running, max_stall {found['max_stall']!s:4} "
        f"normal {found['normal_ms']:5.1f} ms, p99 beside the prompt {found['p99_ms']:6.1f} ms: "
        f"{found['p99_by_normal']:5.2f} times; prompt after {found['prompt_s']:.2f} s"
    )


def measure(root: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per scheme, number of running requests, and bound."""
    for scheme in args.scheme:
        folder = make_model(root, scheme)
        for max_stall in (EngineOptions().max_stall, None):
            options = EngineOptions(max(args.running) + 1, 2048, max_stall=max_stall)
            engine = OnnxEngine.open(folder, options)
            for running in args.running:
                parts = [one_round(engine, running, args.prompt) for _ in range(args.rounds)]
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


def one_round(engine: OnnxEngine, running: int, length: int) -> tuple[Any, Any, float]:
    """Gaps between steps in seconds, without and with the prompt, and the time to its first token."""
    rng = np.random.default_rng(0)
    free = SamplingParams(max_tokens=2000, ignore_eos=True)
    for n in range(running):
        engine.submit(Request(f"runs {n}", rng.integers(3, 1000, 40).tolist(), free))
    while len(engine.step()) < running:
        pass
    normal: list[float] = []
    beside: list[float] = []
    last = time.perf_counter()

    def step(gaps: list[float]) -> set[str]:
        nonlocal last
        told = {event.request_id for event in engine.step()}
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
        return told

    for _ in range(BEFORE):
        step(normal)
    prompt = rng.integers(3, 1000, length).tolist()
    begun = time.perf_counter()
    engine.submit(Request("prompt", prompt, SamplingParams(max_tokens=1, ignore_eos=True)))
    while "prompt" not in step(beside):
        pass
    taken = time.perf_counter() - begun
    for _ in range(BEFORE):
        step(normal)
    for n in range(running):
        engine.cancel(f"runs {n}")
    engine.step()
    return normal, beside, taken


if __name__ == "__main__":
    main()
