"""Grammars for tests, and answers drawn from them without a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from lifecycle.engines.grammar.compiler import Grammar, GrammarCompiler, GrammarLimits
from lifecycle.engines.requests import Constraint

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3},
        "kind": {"enum": ["cat", "dog", None]},
    },
    "required": ["name", "age", "tags", "kind"],
    "additionalProperties": False,
}

HOSTILE: dict[str, tuple[str, Any]] = {
    "a megabyte of schema": ("json_schema", {"enum": [f"value {n}" for n in range(100_000)]}),
    "deep": ("json_schema", "[" * 20_000),
    "deep schema": ("json_schema", '{"items":' * 500 + "{}" + "}" * 500),
    "deep references": (
        "json_schema",
        {
            "$ref": "#/$defs/0",
            "$defs": {"3000": {}} | {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(3000)},
        },
    ),
    "a loop of references": (
        "json_schema",
        {
            "$ref": "#/$defs/a",
            "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}, {}]}, "b": {"$ref": "#/$defs/a"}},
        },
    ),
    "a product of alternatives": (
        "json_schema",
        {
            "allOf": [
                {"anyOf": [{"properties": {f"{n}{m}": {}}} for m in range(4)]} for n in range(12)
            ]
        },
    ),
    "a common multiple": (
        "json_schema",
        {"allOf": [{"type": "integer", "multipleOf": n} for n in (97, 101, 103, 107)]},
    ),
    "repetition of repetition": ("regex", "(((a{100}){100}){100}){100}"),
    "many optional letters": ("regex", "a?" * 60_000),
    "nested groups": ("regex", "(" * 50_000 + "a" + ")" * 50_000),
    "rules in a row": (
        "lark",
        "start: r0\n" + "\n".join(f"r{n}: r{n + 1} r{n + 1}" for n in range(4000)) + '\nr4000: "a"',
    ),
    "a doubled terminal": (
        "lark",
        "start: T0\n" + "\n".join(f"T{n}: T{n + 1} T{n + 1}" for n in range(40)) + '\nT40: "a"',
    ),
    "an intersection": (
        "lark",
        "start: A\nA: " + " & ".join(f"/(a|b)*a(a|b){{{n}}}/" for n in range(2, 14)),
    ),
}
"""Each is refused, and none may take long."""


@contextmanager
def compiler_of(
    tokenizer_json: Path, *, vocab_size: int | None = None, **limits: Any
) -> Iterator[tuple[Tokenizer, GrammarCompiler]]:
    """The tokeniser in a file, with its grammars."""
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    size = vocab_size or tokenizer.get_vocab_size()
    text = tokenizer_json.read_text(encoding="utf-8")
    compiler = GrammarCompiler(text, size, frozenset({2}), GrammarLimits(**limits))
    try:
        yield tokenizer, compiler
    finally:
        compiler.close()


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text that goes on: without the space that SentencePiece begins a text with."""
    before = tokenizer.encode("\n", add_special_tokens=False).ids
    ids = tokenizer.encode("\n" + text, add_special_tokens=False).ids
    assert ids[: len(before)] == before
    return ids[len(before) :]


def accepts(tokenizer: Tokenizer, grammar: Grammar, text: str, end: int = 2) -> bool:
    """Whether a text can be the whole answer."""
    constraint = grammar.constraint(frozenset({end}))
    for token in [*encode(tokenizer, text), end]:
        if not constraint.mask()[token]:
            return False
        constraint.accept(token)
    return constraint.is_complete


def draw(constraint: Constraint, end: int, seed: int, most: int = 2000) -> list[int]:
    """An answer by no model: each token is any that may come."""
    rng, tokens = np.random.default_rng(seed), list[int]()
    while not constraint.is_complete:
        token = int(rng.choice(np.flatnonzero(constraint.mask())))
        constraint.accept(token)
        if token == end:
            break
        tokens.append(token)
        for forced in constraint.forced():
            assert constraint.mask()[forced]
            constraint.accept(forced)
            tokens.append(forced)
        assert len(tokens) < most
    return tokens
