"""What a step takes besides the runtime: scheduling, binding, choosing tokens, telling of them.

    python -m benchmarks.overhead [--batch 1 8] [--tokens 200] [--json]

Random weights of the 135M shape in row-wise int8 and in int4, greedy and sampled (temperature 0.8, top-p
0.95, top-k 40). The share is that of the median step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.arguments import parser_of
from benchmarks.batch import decoding
from benchmarks.llama_cpp import our_models
from benchmarks.peers import cache_dir
from benchmarks.random_llama import SMOLLM2_135M, kept_llama
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import SamplingParams

PROMPT = 64
SAMPLING = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(temperature=0.8, top_p=0.95, top_k=40, seed=1),
}


class Stopwatch:
    """Adds up the time in ONNX Runtime."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._run = onnxruntime.InferenceSession.run_with_iobinding

    def __enter__(self) -> Stopwatch:
        watch = self

        def timed(self: Any, iobinding: Any, run_options: Any = None) -> None:
            start = time.perf_counter()
            watch._run(self, iobinding, run_options)
            watch.seconds += time.perf_counter() - start

        onnxruntime.InferenceSession.run_with_iobinding = timed
        return self

    def __exit__(self, *error: object) -> None:
        onnxruntime.InferenceSession.run_with_iobinding = self._run


def measure(folder: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per number of requests and way to choose."""
    engine = OnnxEngine.open(folder, EngineOptions(max(args.batch), 1024))
    for batch in args.batch:
        for name, params in SAMPLING.items():
            whole, inside = [], []
            with decoding(engine, batch, PROMPT, params), Stopwatch() as watch:
                for _ in range(args.tokens):
                    start, before = time.perf_counter(), watch.seconds
                    engine.step()
                    whole.append(time.perf_counter() - start)
                    inside.append(watch.seconds - before)
            steps, outside = np.array(whole), np.array(whole) - np.array(inside)
            yield {
                "batch": batch,
                "sampling": name,
                "step_ms": 1000 * float(np.median(steps)),
                "outside_ms": 1000 * float(np.median(outside)),
                "share_percent": 100 * float(np.median(outside / steps)),
            }
    engine.close()


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    folder = cache_dir() / "llama-135m"
    models = our_models(folder / "overhead", kept_llama(folder, SMOLLM2_135M))
    for scheme, path in models.items():
        for found in measure(path, args):
            row = {"scheme": scheme, **found}
            print(json.dumps(row) if args.json else describe(row), flush=True)


def describe(row: dict[str, Any]) -> str:
    return (
        f"{row['scheme']:13} batch {row['batch']} {row['sampling']:8} step {row['step_ms']:6.2f} ms, "
        f"outside the runtime {row['outside_ms']:.2f} ms: {row['share_percent']:.1f} %"
    )


if __name__ == "__main__":
    main()
