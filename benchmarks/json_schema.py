"""How much of the official JSON Schema test suite constrained decoding follows, and how truly.

    python -m benchmarks.json_schema SUITE TOKENIZER_JSON [--draws N] [--json]

SUITE is a folder of the suite (`draft2020-12`). Each schema compiles or is refused. For those that compile
each instance, in canonical form (RFC 8785 but for the order of keys, which is that of the schema), is
walked token by token: valid ones must be allowed to their end, invalid ones must not. Then outputs are drawn
by no model, half of them from the beginning of an instance; each that ends must be valid. The status is 1 if one is not.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.arguments import parser_of
from benchmarks.schema_outputs import Drawer, why_invalid
from lifecycle.engines.grammar.compiler import Grammar, GrammarCompiler
from lifecycle.engines.grammar.spec import GrammarSpec
from lifecycle.errors import RequestError


@dataclass
class Report:
    """What came of a suite."""

    schemas: int = 0
    compiled: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Why schemas were refused."""
    valid: int = 0
    """Valid instances of the schemas that compile."""
    invalid: int = 0
    not_accepted: list[str] = field(default_factory=list)
    """Valid ones that could not be written."""
    wrongly_accepted: list[str] = field(default_factory=list)
    """Invalid ones that could be."""
    drawn: int = 0
    """Outputs that were begun."""
    complete: int = 0
    """Those of them that ended."""
    incomplete: list[str] = field(default_factory=list)
    """Schemas of which none did."""
    invalid_outputs: list[str] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether what can be written is valid, by all that was tried."""
        return not (self.wrongly_accepted or self.incomplete or self.invalid_outputs)


def names_in_order(schema: Any) -> Iterator[str]:
    """All names of properties, as the schema mentions them."""
    if isinstance(schema, dict):
        for keyword, value in schema.items():
            if keyword == "properties" and isinstance(value, dict):
                yield from value
            elif keyword in ("const", "enum"):
                yield from _keys(value)
            elif keyword == "required" and isinstance(value, list):
                yield from (name for name in value if isinstance(name, str))
            yield from names_in_order(value)
    elif isinstance(schema, list):
        for each in schema:
            yield from names_in_order(each)


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _keys(each)


def canonical(value: Any, places: dict[str, int]) -> Any:
    """A value with its keys in the order of `places`, and numbers that are integers as such."""
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: places.get(key, len(places)))
        return {key: canonical(value[key], places) for key in keys}
    if isinstance(value, list):
        return [canonical(each, places) for each in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e21:
        return int(value)
    return value


def allows(grammar: Grammar, tokens: list[int], end: int) -> bool:
    """Whether an answer can be these tokens and no more."""
    constraint = grammar.constraint(frozenset({end}))
    for token in [*tokens, end]:
        if not constraint.mask()[token]:
            return False
        constraint.accept(token)
    return True


def run(suite: Path, tokenizer: Tokenizer, compiler: GrammarCompiler, draws: int) -> Report:
    """Go through all files of a suite, and draw so many outputs for each schema."""
    report, end = Report(), min(compiler.ends)
    drawer = Drawer(tokenizer, compiler.vocab_size, end)
    for path in sorted(suite.rglob("*.json")):
        for case in json.loads(path.read_text(encoding="utf-8")):
            report.schemas += 1
            where = f"{path.relative_to(suite).with_suffix('')}: {case['description']}"
            try:
                grammar = compiler.compile(GrammarSpec.of_schema(case["schema"]))
            except RequestError as error:
                report.reasons[_reason(str(error))] += 1
                continue
            report.compiled += 1
            places: dict[str, int] = {}
            for name in names_in_order(case["schema"]):
                places.setdefault(name, len(places))
            instances = list[list[int]]()
            for test in case["tests"]:
                text = json.dumps(
                    canonical(test["data"], places), ensure_ascii=False, separators=(",", ":")
                )
                tokens = tokenizer.encode(text, add_special_tokens=False).ids
                instances.append(tokens)
                _count(report, f"{where}: {text[:80]}", test["valid"], allows(grammar, tokens, end))
            outputs = _outputs(drawer, grammar, instances, end, draws)
            _judge(report, where, case["schema"], draws, [tokenizer.decode(o) for o in outputs])
    return report


def _outputs(
    drawer: Drawer, grammar: Grammar, instances: list[list[int]], end: int, draws: int
) -> Iterator[list[int]]:
    """Those that end; every second one goes on from a part of an instance, be that valid or not."""
    for seed in range(draws):
        rng, begin = np.random.default_rng(seed), list[int]()
        if seed % 2:
            begin = instances[rng.integers(len(instances))]
            begin = begin[: rng.integers(len(begin) + 1)]
        tokens = drawer.draw(grammar.constraint(frozenset({end})), rng, begin)
        if tokens is not None:
            yield tokens


def _judge(report: Report, where: str, schema: object, draws: int, outputs: list[str]) -> None:
    report.drawn += draws
    report.complete += len(outputs)
    if not outputs:
        report.incomplete.append(where)
    for text in outputs:
        if (why := why_invalid(text, schema)) is not None:
            report.invalid_outputs.append(f"{where}: {text[:80]}: {why[:120]}")


def _count(report: Report, what: str, is_valid: bool, is_allowed: bool) -> None:
    if is_valid:
        report.valid += 1
        if not is_allowed:
            report.not_accepted.append(what)
    else:
        report.invalid += 1
        if is_allowed:
            report.wrongly_accepted.append(what)


def _reason(error: str) -> str:
    """The keyword that a schema was refused for, or the library's words."""
    found = re.search(r"has '([^']*)' at", error)
    return found[1] if found else error.removeprefix("the grammar cannot be used: ")[:60]


def main() -> None:
    """Run and print."""
    parser = parser_of(__doc__)
    parser.add_argument("suite", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--draws", type=int, default=100, help="outputs for each schema")
    args = parser.parse_args()
    text = args.tokenizer.read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_str(text)
    compiler = GrammarCompiler(text, tokenizer.get_vocab_size(), frozenset())
    report = run(args.suite, tokenizer, compiler, args.draws)
    compiler.close()
    if args.json:
        print(json.dumps(asdict(report)))
    else:
        _print(report)
    sys.exit(0 if report.is_sound else 1)


def _print(report: Report) -> None:
    print(f"{report.compiled} of {report.schemas} schemas compile; refused are")
    for reason, count in report.reasons.most_common():
        print(f"  {count:4} for {reason}")
    accepted = report.valid - len(report.not_accepted)
    print(f"{accepted} of {report.valid} valid instances can be written; not")
    print("\n".join(f"  {what}" for what in report.not_accepted))
    print(f"{len(report.wrongly_accepted)} of {report.invalid} invalid instances can be written")
    print("\n".join(f"  {what}" for what in report.wrongly_accepted))
    valid = report.complete - len(report.invalid_outputs)
    print(f"{report.drawn} outputs drawn, {report.complete} complete, {valid} of these valid; not")
    print("\n".join(f"  {what}" for what in report.invalid_outputs))
    print(f"{len(report.incomplete)} schemas without a complete output")
    print("\n".join(f"  {what}" for what in report.incomplete))


if __name__ == "__main__":
    main()
