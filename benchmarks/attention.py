"""What it gives that attention holds all its scores at once instead of block by block.

    python -m benchmarks.attention [--rounds 16] [--rows 1 8 16] [--context 100 300 1000] [--json]

Random weights of the 135M shape in row-wise int8 and int4, each with a cache in float32 and in int8. Two engines take
turns of 6 steps; a figure is the median ratio of their times in a round, above 1 where all scores at once are
faster. A prompt is one of 1,920 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import parser_of
from benchmarks.batch import decoding
from benchmarks.random_llama import SMOLLM2_135M, kept_llama
from lifecycle.engines.base import EngineOptions, SamplingParams
from lifecycle.engines.decoder import DecoderInfo
from lifecycle.engines.ort import OnnxEngine
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.cache import calibrate_cache
from lifecycle.graph.calibration import Calibration
from lifecycle.graph.export import export_decoder
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import quantize_graph
from lifecycle.graph.targets import Cpu

SCHEMES = {"int8-rowwise": Int8Rowwise(8), "int4": Blockwise(64)}
STEPS, PROMPT = 6, 1920


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--context", type=int, nargs="+", default=[100, 300, 1000])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for name, folder in make_models(Path(root)):
            for found in measure(folder, args):
                found = {"model": name, **found}
                print(json.dumps(found) if args.json else describe(found), flush=True)


def describe(found: dict[str, Any]) -> str:
    what = f"{found['rows']} rows at {found['context']}" if found["rows"] else "a prompt"
    return f"{found['model']:28} {what:16} {found['whole_ms']:7.1f} ms, x {found['ratio']:.2f}"


def make_models(root: Path) -> Iterator[tuple[str, Path]]:
    """Each scheme with each cache."""
    full = root / "full"
    full.mkdir()
    export_decoder(kept_llama(root, SMOLLM2_135M), full, Cpu())
    texts = np.random.default_rng(1).integers(3, 1000, (2, 128)).tolist()
    int8 = calibrate_cache(Calibration(full, texts), DecoderInfo.load(full), "int8")
    for scheme, how in SCHEMES.items():
        for kind, cache in (("float32", None), ("int8", int8)):
            folder = root / f"{scheme}-{kind}"
            folder.mkdir()
            quantize_graph(full, folder, scheme, how, cache=cache)
            yield f"{scheme}, {kind} cache", folder


def measure(folder: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for a prompt, then one for each number of rows and length of their texts."""
    options = EngineOptions(max(args.rows), 2048, max_stall=None)
    whole, blocks = (opened(folder, options, flag) for flag in ("1", "0"))
    prompt = np.random.default_rng(0).integers(3, 1000, PROMPT).tolist()

    def prefill(engine: OnnxEngine) -> float:
        begun = time.perf_counter()
        engine.generate([prompt], SamplingParams(max_tokens=1))
        return time.perf_counter() - begun

    times = [(prefill(whole), prefill(blocks)) for _ in range(max(args.rounds // 4, 1))]
    yield row(0, PROMPT, times)
    for rows in args.rows:
        for context in args.context:
            with ExitStack() as stack:
                for engine in (whole, blocks):
                    stack.enter_context(decoding(engine, rows, context))
                times = [(decode(whole), decode(blocks)) for _ in range(args.rounds)]
            yield row(rows, context, times)
    whole.close()
    blocks.close()


def opened(folder: Path, options: EngineOptions, flag: str) -> OnnxEngine:
    """An engine whose attention does without blocks ("1") or not ("0")."""
    os.environ["ORT_GQA_DISABLE_FLASH_ATTENTION"] = flag
    return OnnxEngine.open(folder, options)


def decode(engine: OnnxEngine) -> float:
    """Seconds of a step, by the median; the first one finds the processor's caches full of the other engine."""
    times: list[float] = []
    for _ in range(STEPS + 1):
        begun = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def row(rows: int, context: int, times: list[tuple[float, float]]) -> dict[str, Any]:
    return {
        "rows": rows,
        "context": context,
        "whole_ms": 1000 * statistics.median(whole for whole, _ in times),
        "ratio": statistics.median(blocks / whole for whole, blocks in times),
    }


if __name__ == "__main__":
    main()
