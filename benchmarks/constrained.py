"""What a JSON schema costs decoding, on a random Llama of 135M parameters in row-wise int8.

    python -m benchmarks.constrained --tokenizer tokenizer.json [--turns 7] [--tokens 96] [--json]

Requests with a schema and requests without take turns in one process, on one engine, with the same prompt.
Two ratios of tokens per second, above 1 the constrained ones are faster: `masked` takes a token from the
model each step, so it is what masks cost; `forced` is as served, where tokens without a choice take no step.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.arguments import parser_of
from benchmarks.models import in_int8
from benchmarks.peers import cache_dir
from benchmarks.random_llama import SMOLLM2_135M, kept_llama
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.grammar.compiler import Grammar, GrammarCompiler
from lifecycle.engines.grammar.constraint import GrammarConstraint
from lifecycle.engines.grammar.spec import GrammarSpec
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import Request, SamplingParams

PROMPT, END = 128, 2
ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "kind": {"enum": ["fruit", "vegetable", "other"]},
        "price": {"type": "number", "minimum": 0, "maximum": 1000},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
        "in_stock": {"type": "boolean"},
    },
    "required": ["name", "kind", "price", "tags", "in_stock"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ITEM, "minItems": 100}
Make = Callable[[], GrammarConstraint | None]


class Unforced(GrammarConstraint):
    """The same without forced tokens."""

    def forced(self) -> Sequence[int]:
        return ()


def decode(engine: OnnxEngine, batch: int, tokens: int, temperature: float, make: Make) -> float:
    """Tokens per second of `batch` requests, once all decode."""
    rng = np.random.default_rng(0)
    for index in range(batch):
        params = SamplingParams(10**6, temperature, seed=index, ignore_eos=True)
        prompt = rng.integers(3, 1000, PROMPT).tolist()
        engine.submit(Request(str(index), prompt, params, constraint=make()))
    begun: set[str] = set()
    while len(begun) < batch:
        begun.update(event.request_id for event in engine.step())
    start, count = time.perf_counter(), 0
    while count < batch * tokens:
        events = engine.step()
        assert not any(event.finish_reason for event in events)
        count += len(events)
    seconds = time.perf_counter() - start
    for index in range(batch):
        engine.cancel(str(index))
    engine.step()
    return count / seconds


def unforced(grammar: Grammar) -> Unforced:
    """A constraint that leaves forced tokens to the model."""
    made = grammar.constraint(frozenset({END}))
    made.__class__ = Unforced
    assert isinstance(made, Unforced)
    return made


def int8_model(folder: Path, vocab_size: int) -> Path:
    """The model, made on the first call."""
    int8 = folder / "int8-rowwise"
    if (int8 / "decoder.json").is_file():
        return int8
    return in_int8(kept_llama(folder, SMOLLM2_135M | {"vocab_size": vocab_size}), int8)


def measure(
    engine: OnnxEngine, grammar: Grammar, batch: int, turns: int, tokens: int, temperature: float
) -> dict[str, float]:
    """Medians of tokens per second and of the ratios at one batch size."""
    ways: dict[str, Make] = {
        "free": lambda: None,
        "masked": lambda: unforced(grammar),
        "forced": lambda: grammar.constraint(frozenset({END})),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    # The first turn warms all up.
    for _ in range(turns + 1):
        for name, make in ways.items():
            speeds[name].append(decode(engine, batch, tokens, temperature, make))
    found = {name: round(statistics.median(each[1:]), 1) for name, each in speeds.items()}
    for name in ("masked", "forced"):
        ratios = [a / b for a, b in zip(speeds[name][1:], speeds["free"][1:], strict=True)]
        found[f"{name}/free"] = round(statistics.median(ratios), 3)
        found[f"{name}/free lowest"] = round(min(ratios), 3)
        found[f"{name}/free highest"] = round(max(ratios), 3)
    return found


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    options = EngineOptions(max(args.batch), 1024, threads=args.threads)
    text = args.tokenizer.read_text(encoding="utf-8")
    # Models have at least as many tokens as their tokenisers.
    vocab_size = max(Tokenizer.from_str(text).get_vocab_size(), SMOLLM2_135M["vocab_size"])
    engine = OnnxEngine.open(
        int8_model(cache_dir() / f"llama-135m-{vocab_size}", vocab_size), options
    )
    compiler = GrammarCompiler(text, engine.vocab_size, frozenset({END}))
    grammar = compiler.compile(GrammarSpec.of_schema(SCHEMA))
    found = {
        batch: measure(engine, grammar, batch, args.turns, args.tokens, args.temperature)
        for batch in args.batch
    }
    compiler.close()
    engine.close()
    print(
        json.dumps(found) if args.json else "\n".join(f"batch {b}: {f}" for b, f in found.items())
    )


if __name__ == "__main__":
    main()
