"""What the answer to a request must be, from all the fields that can say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from lifecycle.engines.grammar.spec import GrammarSpec
from serving.errors import bad_request
from serving.schemas import GenerationBody


class Asked(NamedTuple):
    """A grammar that a request asks for."""

    param: str
    """The field that says so."""
    make: Callable[[], GrammarSpec]
    """What it comes to; it takes long where it is long."""


def asked_grammar(body: GenerationBody) -> Asked | None:
    """The grammar that a request asks for, if it asks for one.

    Raises:
        ApiError: it asks for two.
    """
    asked = list(_asked(body))
    if len(asked) > 1:
        first, second = asked[0].param, asked[1].param
        raise bad_request(f"{second}: not together with {first}", param=second)
    return asked[0] if asked else None


def _asked(body: GenerationBody) -> Iterator[Asked]:
    form = body.response_format
    if form is not None and form.type == "json_object":
        yield Asked("response_format", lambda: GrammarSpec("json_object"))
    if form is not None and form.json_schema is not None:
        yield _schema("response_format.json_schema.schema", form.json_schema.schema_)
    outputs = body.structured_outputs
    if outputs is not None:
        given = (outputs.json_, outputs.regex, outputs.choice, outputs.grammar)
        yield from _of_vllm("structured_outputs.", *given)
    given = (body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar)
    yield from _of_vllm("guided_", *given)


def _of_vllm(
    prefix: str, schema: Any, regex: str | None, choice: Sequence[str] | None, grammar: str | None
) -> Iterator[Asked]:
    if schema is not None:
        yield _schema(f"{prefix}json", schema)
    if regex is not None:
        yield Asked(f"{prefix}regex", lambda: GrammarSpec("regex", regex))
    if choice is not None:
        yield Asked(f"{prefix}choice", lambda: GrammarSpec("choice", tuple(choice)))
    if grammar is not None:
        yield Asked(f"{prefix}grammar", lambda: GrammarSpec("lark", grammar))


def _schema(param: str, schema: Any) -> Asked:
    return Asked(param, lambda: GrammarSpec.of_schema(schema))
