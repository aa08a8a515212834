"""Memory of the cache against what the live tokens need, while requests come and go (Linux).

    python -m benchmarks.kv_memory [--requests 40] [--slots 8] [--context 2048] [--json]

A random Llama with the cache of the 135M shape, its layers cut to four, in each type of cache. Resident bytes of the
cache's own memory, as the system counts them, by the bytes of the tokens that running requests have in it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import parser_of
from benchmarks.random_llama import SMOLLM2_135M, write_llama
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.decoder import DecoderInfo
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.ort_backend import CopyingOrtBackend
from lifecycle.engines.requests import Request, SamplingParams
from lifecycle.engines.slot_cache import SlotCache
from lifecycle.graph.cache import KvType, calibrate_cache
from lifecycle.graph.calibration import Calibration
from lifecycle.graph.export import export_decoder
from lifecycle.graph.quantize import quantize_graph
from lifecycle.graph.targets import Cpu


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        shape = {**SMOLLM2_135M, "num_hidden_layers": 4, "vocab_size": 1024}
        write_llama(Path(root, "hf"), shape)
        graph = Path(root, "graph")
        graph.mkdir()
        export_decoder(Path(root, "hf"), graph, Cpu())
        kinds: tuple[KvType | None, ...] = (None, "int8", "int4")
        for kv_dtype in kinds:
            folder = in_type(graph, Path(root, str(kv_dtype)), kv_dtype)
            engine = OnnxEngine.open(folder, EngineOptions(args.slots, args.context))
            found = {"kv_dtype": kv_dtype or "float32", **measure(engine, args.requests)}
            print(json.dumps(found) if args.json else describe(found), flush=True)
            engine.close()


def in_type(graph: Path, folder: Path, kv_dtype: KvType | None) -> Path:
    """The graph with its cache in another type than float32."""
    if kv_dtype is None:
        return graph
    texts = np.random.default_rng(1).integers(3, 1000, (2, 128)).tolist()
    cache = calibrate_cache(Calibration(graph, texts), DecoderInfo.load(graph), kv_dtype)
    folder.mkdir()
    quantize_graph(graph, folder, "fp32", None, cache=cache)
    return folder


def describe(found: Mapping[str, Any]) -> str:
    return (
        f"{found['kv_dtype']:7} resident by needed while full: median {found['median']:.3f}, highest "
        f"{found['highest']:.3f}; of the whole slots {found['of_capacity']:.2f}; when all have ended {found['left']:.0f} "
        "bytes"
    )


def measure(engine: OnnxEngine, count: int) -> dict[str, float]:
    """Ratios over the steps in which at least half of the slots hold a text."""
    rng = np.random.default_rng(0)
    for n in range(count):
        prompt = rng.integers(3, 1000, int(rng.integers(32, 513))).tolist()
        params = SamplingParams(max_tokens=int(rng.integers(16, 257)), ignore_eos=True)
        engine.submit(Request(str(n), prompt, params))
    ratios: list[float] = []
    most = 0
    while engine.num_running or engine.num_waiting:
        engine.step()
        stats = engine.stats
        if stats.num_running * 2 >= engine.max_num_seqs and stats.steps % 5 == 0:
            used = resident(engine)
            most = max(most, used)
            ratios.append(used / stats.cache_bytes)
    return {
        "median": float(np.median(ratios)),
        "highest": max(ratios),
        "of_capacity": most / engine.stats.cache_capacity_bytes,
        "left": resident(engine),
    }


def resident(engine: OnnxEngine) -> int:
    """Resident bytes of the cache, from `/proc/self/smaps`."""
    backend = engine._backend  # pyright: ignore[reportPrivateUsage]
    assert isinstance(backend, CopyingOrtBackend) and isinstance(backend.cache, SlotCache)
    arrays = backend.cache.rows(engine.max_num_seqs).values()
    spans = sorted((array.ctypes.data, array.ctypes.data + array.nbytes) for array in arrays)
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split()[0]
        if "-" in name and not name.endswith(":"):
            start, end = (int(part, 16) for part in name.split("-"))
            # Neighbouring mappings are shown as one.
            inside = any(start < stop and begin < end for begin, stop in spans)
        elif inside and name == "Rss:":
            total += int(line.split()[1]) * 1024
    return total


if __name__ == "__main__":
    main()
