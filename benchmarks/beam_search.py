"""Tokens per second of beam search, beside as many requests that know nothing of each other.

    python -m benchmarks.beam_search [--beams 4] [--turns 5] [--context 128] [--json]

A random Llama of 135M parameters in row-wise int8. Both compute one token of so many texts per step; what
beams add is choosing over the whole vocabulary and copying caches. Both take turns in one process.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.arguments import parser_of
from benchmarks.models import in_int8
from benchmarks.random_llama import SMOLLM2_135M, kept_llama
from lifecycle.engines.backend import Backend, Row
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.beams import BeamParams
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import SamplingParams

OUTPUT = 64


class Clock:
    """Notes when each step of a backend begins and how long it takes."""

    def __init__(self, backend: Backend) -> None:
        self._forward, self.begins, self.inside = backend.forward, list[float](), list[float]()
        backend.forward = self.forward

    def forward(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """A step, timed."""
        self.begins.append(time.perf_counter())
        logits = self._forward(rows)
        self.inside.append(time.perf_counter() - self.begins[-1])
        return logits

    def medians(self, run: Callable[[], object]) -> tuple[float, float]:
        """Seconds from one of the last `OUTPUT` steps of a run to the next, and within them: medians, which
        do not see the moments when the machine does something else."""
        self.begins.clear()
        self.inside.clear()
        run()
        apart = np.diff(self.begins[-OUTPUT:])
        return float(np.median(apart)), float(np.median(self.inside[-OUTPUT:]))


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--context", type=int, default=128, help="tokens of the prompt")
    args = parser.parse_args()
    beams = BeamParams(args.beams)
    prompt = np.random.default_rng(0).integers(3, 40_000, args.context).tolist()
    others = [[token + n for token in prompt] for n in range(args.beams)]
    params = SamplingParams(max_tokens=OUTPUT + 1, ignore_eos=True)
    whole: dict[str, list[float]] = {"requests": [], "beams": []}
    inside: dict[str, list[float]] = {"requests": [], "beams": []}
    with tempfile.TemporaryDirectory() as root:
        int8 = in_int8(kept_llama(Path(root), SMOLLM2_135M), Path(root, "int8"))
        engine = OnnxEngine.open(int8, EngineOptions(args.beams, args.context + OUTPUT + 1))
        clock = Clock(engine._backend)  # pyright: ignore[reportPrivateUsage]
        runs = {
            "requests": lambda: engine.generate(others, params),
            "beams": lambda: engine.beam_search([prompt], params, beams),
        }
        # The first turn warms up.
        for turn in range(args.turns + 1):
            for name, run in runs.items():
                found = clock.medians(run)
                if turn:
                    whole[name].append(found[0])
                    inside[name].append(found[1])
    ratios = [a / b for a, b in zip(whole["requests"], whole["beams"], strict=True)]
    result: dict[str, object] = {}
    for name in runs:
        step, within = statistics.median(whole[name]), statistics.median(inside[name])
        result[f"{name}_tokens_per_s"] = round(args.beams / step, 1)
        result[f"{name}_ms_between_steps"] = round(1000 * (step - within), 2)
    result["ratio"] = round(statistics.median(ratios), 3)
    result["ratio_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    print(json.dumps(result) if args.json else "\n".join(f"{k:22} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
