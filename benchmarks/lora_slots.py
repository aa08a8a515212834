"""What LoRA slots cost: steps with one adapter, with eight, and without, in one process.

    python -m benchmarks.lora_slots [--rounds 25] [--rank 16] [--json]

A random Llama of 135M parameters in row-wise int8 with adapters of random numbers on every linear
layer. All ways take turns in random order; ratios are medians over the rounds. Speeds are tokens per second as parts
of the speed without adapters, or of serving eight adapters one after another.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.arguments import parser_of
from benchmarks.models import in_int8
from benchmarks.random_llama import SMOLLM2_135M, kept_llama
from lifecycle.engines.adapters import AdapterLayout
from lifecycle.engines.backend import Row
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.ort import OnnxEngine
from lifecycle.evaluation.random_adapter import write_random_adapter

SLOTS, CONTEXT, CHUNK = 8, 128, 128
Step = Callable[[], object]


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where the model is written")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        plain, engine = make_engines(Path(root), args.rank)
        found = measure(plain, engine, args.rounds)
    if args.json:
        print(json.dumps(found))
        return
    print(
        f"decoding 8 rows without adapters {found['plain_ms']:.1f} ms\n"
        f"speed with slots and no adapter {found['none']:.3f}, all rows on one {found['one']:.2f}, "
        f"on eight {found['eight']:.2f}\n"
        f"eight together against one after another {found['together']:.2f}\n"
        f"time of a prefill of {CHUNK} tokens with one {found['prefill']:.2f}"
    )


def make_engines(root: Path, rank: int) -> tuple[OnnxEngine, OnnxEngine]:
    """One without slots, and one with eight loaded adapters."""
    checkpoint = kept_llama(root, SMOLLM2_135M)
    options = EngineOptions(SLOTS, CONTEXT + 2 * CHUNK, prefill_chunk=CHUNK)
    opened: list[OnnxEngine] = []
    for name, slots in (("plain", None), ("slots", (SLOTS, rank))):
        opened.append(OnnxEngine.open(in_int8(checkpoint, root / name, slots), options))
    layout = AdapterLayout.load(root / "slots")
    assert layout is not None
    for n in range(SLOTS):
        # Even seeds have the whole rank.
        write_random_adapter(root / f"adapter-{n}", layout, seed=2 * n)
        opened[1].load_adapter(str(n), root / f"adapter-{n}")
    return opened[0], opened[1]


def measure(plain: OnnxEngine, engine: OnnxEngine, rounds: int) -> dict[str, float]:
    """Medians of the ratios between steps that take turns."""

    def decode(which: OnnxEngine, slots: list[int]) -> Step:
        rows = [Row(b, CONTEXT, [5 + b], 1, adapter=slot) for b, slot in enumerate(slots)]
        return lambda: which.forward(rows)

    def alone(slot: int) -> Step:
        row = Row(0, CONTEXT, [5], 1, adapter=slot)
        return lambda: engine.forward([row])

    def prefill(which: OnnxEngine, slot: int) -> Step:
        row = Row(0, 0, list(range(CHUNK)), 1, adapter=slot)
        return lambda: which.forward([row])

    steps: dict[str, Step] = {
        "plain": decode(plain, [0] * SLOTS),
        "none": decode(engine, [0] * SLOTS),
        "one": decode(engine, [1] * SLOTS),
        "eight": decode(engine, list(range(1, SLOTS + 1))),
        "plain prefill": prefill(plain, 0),
        "prefill": prefill(engine, 1),
        **{f"alone {slot}": alone(slot) for slot in range(1, SLOTS + 1)},
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for _ in range(rounds):
        # What a step finds in the caches is what another has left: not always the same one.
        for name, step in order.sample(list(steps.items()), len(steps)):
            # Binds what is new and warms the caches of the processor alike for all.
            for _ in range(1 if "prefill" in name else 2):
                step()
            start, count = time.perf_counter(), 1 if "prefill" in name else 3
            for _ in range(count):
                step()
            times[name].append((time.perf_counter() - start) / count)
    turns = [dict(zip(times, column, strict=True)) for column in zip(*times.values(), strict=True)]

    def median(of: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(of(turn) for turn in turns)

    return {
        "plain_ms": 1000 * median(lambda t: t["plain"]),
        "none": median(lambda t: t["plain"] / t["none"]),
        "one": median(lambda t: t["plain"] / t["one"]),
        "eight": median(lambda t: t["plain"] / t["eight"]),
        "together": median(
            lambda t: sum(t[f"alone {slot}"] for slot in range(1, SLOTS + 1)) / t["eight"]
        ),
        "prefill": median(lambda t: t["prefill"] / t["plain prefill"]),
    }


if __name__ == "__main__":
    main()
