"""What weights that are kept in the kernels' form save: opening time, memory, and whether steps stay as fast.

    python -m benchmarks.packed_weights [--rounds 15] [--json]

Random weights of the 135M shape, with adapter slots, in row-wise int8 and in int4. Opening and memory are those
of fresh processes (Linux: proportional set size, after the engine was opened and after its first adapter
was loaded); steps of both engines take turns in one process, and ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.arguments import parser_of
from benchmarks.models import ROWWISE
from benchmarks.random_llama import SMOLLM2_135M, write_llama
from lifecycle.engines import adapters
from lifecycle.engines.adapters import AdapterLayout
from lifecycle.engines.backend import Row
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.ort import OnnxEngine
from lifecycle.evaluation.random_adapter import write_random_adapter
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.export import export_decoder
from lifecycle.graph.quantize import quantize_graph
from lifecycle.graph.targets import Cpu

SCHEMES = {"int8-rowwise": ROWWISE, "int4": Blockwise(64)}
CONTEXT, CHUNK, SLOTS, RANK = 128, 128, 8, 16


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="where the model is written")
    parser.add_argument("--open", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        print(json.dumps(open_once(*args.open)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        make_models(Path(root))
        for scheme in SCHEMES:
            found = {"scheme": scheme, **measure(Path(root), scheme, args.rounds)}
            print(json.dumps(found) if args.json else describe(found), flush=True)


def describe(found: dict[str, Any]) -> str:
    plain, packed = found["plain"], found["packed"]
    speeds = ", ".join(f"{name} {ratio:.3f}" for name, ratio in found["speed"].items())
    return (
        f"{found['scheme']:13} opens in {packed['open_s']:.2f} s instead of {plain['open_s']:.2f} "
        f"(first time {found['first']['open_s']:.2f}); memory {packed['mib']:.0f} MiB instead of "
        f"{plain['mib']:.0f}, with an adapter {packed['adapted_mib']:.0f} instead of "
        f"{plain['adapted_mib']:.0f}, shared with others {packed['shared_mib']:.0f} instead of "
        f"{plain['shared_mib']:.0f}; speed {speeds}"
    )


def make_models(root: Path) -> None:
    write_llama(root / "hf", SMOLLM2_135M)
    full = root / "full"
    full.mkdir()
    export_decoder(root / "hf", full, Cpu(), slots=(SLOTS, RANK))
    layout = AdapterLayout.load(full)
    assert layout is not None
    write_random_adapter(root / "adapter", layout, seed=2)
    for name, scheme in SCHEMES.items():
        (root / name).mkdir()
        quantize_graph(full, root / name, name, scheme)
        (root / name / adapters.FILE).write_bytes((full / adapters.FILE).read_bytes())


def measure(root: Path, scheme: str, rounds: int) -> dict[str, Any]:
    packed = root / f"{scheme}-packed"
    command = [sys.executable, "-m", "benchmarks.packed_weights", "--open"]
    model = [str(root / scheme), str(root / "adapter")]

    def opened(*more: str) -> dict[str, float]:
        return json.loads(subprocess.check_output([*command, *model, *more]))

    first = opened(str(packed))
    turns = [(opened(), opened(str(packed))) for _ in range(5)]
    plain, mapped = (
        {key: statistics.median(turn[n][key] for turn in turns) for key in first} for n in (0, 1)
    )
    return {
        "first": first,
        "plain": plain,
        "packed": mapped,
        "speed": speeds(root / scheme, packed, rounds),
    }


def open_once(model: str, adapter: str, packed: str | None = None) -> dict[str, float]:
    """Open an engine in this process: seconds, and MiB that are its own."""
    before, _ = _memory()
    begun = time.perf_counter()
    options = EngineOptions(packed_weights=Path(packed) if packed else None)
    engine = OnnxEngine.open(Path(model), options)
    # The first step reads all weights.
    engine.forward([Row(0, 0, [1, 2, 3], 1)])
    seconds = time.perf_counter() - begun
    plain, _ = _memory()
    engine.load_adapter("a", Path(adapter))
    engine.forward([Row(0, 0, [1, 2, 3], 1, adapter=1)])
    adapted, shared = _memory()
    return {
        "open_s": seconds,
        "mib": plain - before,
        "adapted_mib": adapted - before,
        "shared_mib": shared,
    }


def _memory() -> tuple[float, float]:
    """MiB of the process: what it takes by itself, and of that what is mapped from files."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8")
    pss, anonymous = (
        int(re.search(rf"^{key}:\s+(\d+)", text, re.M)[1]) / 1024  # type: ignore[index]
        for key in ("Pss", "Pss_Anon")
    )
    return pss, pss - anonymous


def speeds(model: Path, packed: Path, rounds: int) -> dict[str, float]:
    """Speed with packed weights by that without, of steps that take turns."""
    sets: list[dict[str, Callable[[], object]]] = []
    for folder in (None, packed):
        options = EngineOptions(
            SLOTS, CONTEXT + 2 * CHUNK, prefill_chunk=CHUNK, packed_weights=folder
        )
        sets.append(_steps(OnnxEngine.open(model, options)))
    ratios: dict[str, list[float]] = {name: [] for name in sets[0]}
    for turn in range(rounds):
        for name, found in ratios.items():
            times = [0.0, 0.0]
            for which in (0, 1) if turn % 2 else (1, 0):
                sets[which][name]()
                begun = time.perf_counter()
                for _ in range(1 if name == "prefill" else 4):
                    sets[which][name]()
                times[which] = time.perf_counter() - begun
            found.append(times[0] / times[1])
    return {name: statistics.median(found) for name, found in ratios.items()}


def _steps(engine: OnnxEngine) -> dict[str, Callable[[], object]]:
    prompt = Row(0, 0, list(range(CHUNK)), 1)
    rows = [Row(slot, CONTEXT, [5 + slot], 1) for slot in range(SLOTS)]
    return {
        "prefill": lambda: engine.forward([prompt]),
        "batch 1": lambda: engine.forward(rows[:1]),
        "batch 8": lambda: engine.forward(rows),
    }


if __name__ == "__main__":
    main()
