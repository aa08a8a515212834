"""Time to the first token of requests that share a system prompt, with the prefix cache and without.

    python -m benchmarks.prefix_cache [--slots 32] [--turns 3] [--json]

A random Llama of 135M parameters in row-wise int8; 32 requests arrive at once, each with 400 shared
tokens, 30 of its own and 16 to generate. Both engines take turns in one process. `cold`
begins with an empty cache, `warm` with one that knows the prompt, as any later moment does.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.arguments import parser_of
from benchmarks.models import in_int8
from benchmarks.random_llama import SMOLLM2_135M, kept_llama
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import Request, SamplingParams

REQUESTS, SHARED, OWN, OUTPUT = 32, 400, 30, 16


def first_tokens(engine: OnnxEngine, seed: int) -> list[float]:
    """Seconds until the first token of each request; `seed` gives all but the shared tokens."""
    rng = np.random.default_rng(seed)
    shared = np.random.default_rng(0).integers(3, 40_000, SHARED).tolist()
    params = SamplingParams(max_tokens=OUTPUT, ignore_eos=True)
    for n in range(REQUESTS):
        own = rng.integers(3, 40_000, OWN).tolist()
        engine.submit(Request(str(n), [*shared, *own], params))
    begin = time.perf_counter()
    found: dict[str, float] = {}
    while engine.num_running or engine.num_waiting:
        for event in engine.step():
            found.setdefault(event.request_id, time.perf_counter() - begin)
    return list(found.values())


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--slots", type=int, default=REQUESTS, help="requests that run together")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        int8 = in_int8(kept_llama(Path(root), SMOLLM2_135M), Path(root, "int8"))
        without, cached = (
            OnnxEngine.open(int8, EngineOptions(args.slots, 512, prefix_cache_bytes=budget))
            for budget in (0, 256 << 20)
        )
        times: dict[str, list[float]] = {"without": [], "cold": [], "warm": []}
        first_tokens(without, 1000)
        for turn in range(args.turns):
            assert cached.prefix_cache is not None
            cached.prefix_cache.clear()
            for name, engine in (("without", without), ("cold", cached), ("warm", cached)):
                seconds = first_tokens(engine, 2 * turn + (name == "warm"))
                times[name].append(statistics.mean(seconds))
    found = {f"{name}_mean_ttft_s": round(statistics.median(v), 3) for name, v in times.items()}
    for name in ("cold", "warm"):
        pairs = zip(times["without"], times[name], strict=True)
        found[f"{name}_times_better"] = round(statistics.median(a / b for a, b in pairs), 2)
    print(json.dumps(found) if args.json else "\n".join(f"{k:22} {v}" for k, v in found.items()))


if __name__ == "__main__":
    main()
