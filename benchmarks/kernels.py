"""This project's kernels beside ONNX Runtime's, and of those the two ways of attention beside each other.

    python -m benchmarks.kernels [--rounds 16] [--rows 1 8 16] [--context 100 300 900]
        [--scheme int8-rowwise int4] [--json]

Random weights of the 135M shape in row-wise int8 and int4, each with a cache in float32, int8 and int4. Three engines take
turns of 6 steps: ours, ONNX Runtime's with all scores of a layer at once, and with scores in blocks. Figures are median
ratios of their times in a round: `ours` is above 1 where our kernels are faster than ONNX Runtime's with all scores at
once, `whole` where those are faster than blocks. A prompt is one of 1,920 tokens, a chunk 128 of it behind 128 others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import parser_of
from benchmarks.batch import decoding
from benchmarks.models import ROWWISE
from benchmarks.random_llama import SMOLLM2_135M, kept_llama
from lifecycle.engines.backend import Row
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.decoder import DecoderInfo
from lifecycle.engines.native import Kernels
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import SamplingParams
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.cache import KvType, calibrate_cache
from lifecycle.graph.calibration import Calibration
from lifecycle.graph.export import export_decoder
from lifecycle.graph.quantize import quantize_graph
from lifecycle.graph.targets import Cpu

SCHEMES = {"int8-rowwise": ROWWISE, "int4": Blockwise(64)}
WAYS: tuple[tuple[Kernels, str], ...] = (
    ("native", "1"),
    ("onnxruntime", "1"),
    ("onnxruntime", "0"),
)
STEPS, PROMPT, CHUNK = 6, 1920, 128


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--context", type=int, nargs="+", default=[100, 300, 900])
    parser.add_argument("--scheme", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for name, folder in make_models(Path(root), args.scheme):
            for found in measure(folder, args):
                found = {"model": name, **found}
                print(json.dumps(found) if args.json else describe(found), flush=True)


def describe(found: dict[str, Any]) -> str:
    """A line of the report."""
    ways = f"x {found['ours']:.2f}, whole x {found['whole']:.2f}"
    return f"{found['model']:28} {found['what']:16} {found['ours_ms']:7.1f} ms, {ways}"


def make_models(root: Path, schemes: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """Each scheme with each cache."""
    full = root / "full"
    full.mkdir()
    export_decoder(kept_llama(root, SMOLLM2_135M), full, Cpu())
    texts = np.random.default_rng(1).integers(3, 1000, (2, 128)).tolist()
    kinds: tuple[KvType, ...] = ("int8", "int4")
    caches = {
        kind: calibrate_cache(Calibration(full, texts), DecoderInfo.load(full), kind)
        for kind in kinds
    }
    for scheme in schemes:
        for kind, cache in (("float32", None), *caches.items()):
            folder = root / f"{scheme}-{kind}"
            folder.mkdir()
            quantize_graph(full, folder, scheme, SCHEMES[scheme], cache=cache)
            yield f"{scheme}, {kind} cache", folder


def measure(folder: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows for a prompt and a chunk of it, then one for each number of rows and length of their texts."""
    options = EngineOptions(max(args.rows), 2048, max_stall=None)
    with ExitStack() as stack:
        engines = [stack.enter_context(closing(opened(folder, options, *way))) for way in WAYS]
        prompt = np.random.default_rng(0).integers(3, 1000, PROMPT).tolist()

        def prefill(engine: OnnxEngine) -> float:
            return seconds(lambda: engine.generate([prompt], SamplingParams(max_tokens=1)))

        def chunk(engine: OnnxEngine) -> float:
            return seconds(lambda: engine.forward([Row(0, CHUNK, prompt[:CHUNK], 1)]))

        yield row("a prompt", [list(map(prefill, engines)) for _ in range(args.rounds // 4 or 1)])
        yield row("a chunk", [list(map(chunk, engines)) for _ in range(args.rounds)])
        for rows in args.rows:
            for context in args.context:
                with ExitStack() as running:
                    for engine in engines:
                        running.enter_context(decoding(engine, rows, context))
                    times = [list(map(decode, engines)) for _ in range(args.rounds)]
                yield row(f"{rows} rows at {context}", times)


def seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def opened(folder: Path, options: EngineOptions, kernels: Kernels, in_blocks: str) -> OnnxEngine:
    """An engine with some kernels; ONNX Runtime's attention does without blocks ("1") or not ("0")."""
    os.environ["ORT_GQA_DISABLE_FLASH_ATTENTION"] = in_blocks
    return OnnxEngine.open(folder, replace(options, kernels=kernels))


def decode(engine: OnnxEngine) -> float:
    """Seconds of a step, by the median; the first one finds the processor's caches full of the other engine."""
    return statistics.median([seconds(engine.step) for _ in range(STEPS + 1)][1:])


def row(what: str, times: list[list[float]]) -> dict[str, Any]:
    """What rounds of all ways gave."""
    ours, whole, blocks = zip(*times, strict=True)
    return {
        "what": what,
        "ours_ms": 1000 * statistics.median(ours),
        "ours": statistics.median(b / a for a, b in zip(ours, whole, strict=True)),
        "whole": statistics.median(b / a for a, b in zip(whole, blocks, strict=True)),
    }


if __name__ == "__main__":
    main()
