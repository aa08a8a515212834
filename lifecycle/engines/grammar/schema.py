"""Which JSON schemas can be followed: what llguidance does not know or would pass over is refused.

It follows what can be decided from left to right. Its own check names the keywords that it lacks, but says
nothing about some that it passes over; an answer would then look right and not be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from lifecycle.errors import RequestError

MAX_DEPTH = 64
"""Schemas inside schemas; further ones can be reached by `$ref`."""
MAX_DIVISOR = 10_000
"""Of `multipleOf`; an automaton with as many states is made of it."""

_KNOWN = frozenset(
    {
        *("type", "const", "enum", "anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions"),
        *("properties", "required", "additionalProperties", "patternProperties"),
        *("minProperties", "maxProperties"),
        *("items", "prefixItems", "minItems", "maxItems"),
        *("minLength", "maxLength", "pattern", "format"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        # They say nothing about what is valid.
        *("title", "description", "default", "examples", "example", "deprecated", "readOnly"),
        *("writeOnly", "$comment", "$schema", "$id", "nullable", "discriminator"),
    }
)
LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
SINGLE = frozenset({"items", "additionalProperties"})

Schema = Mapping[str, Any]
Way = tuple["Way", str] | None
"""Where a schema is in another one: the way to what holds it, and its place there. Written out for each of many that
have a long name above them, ways would take gigabytes."""
_LONGEST_PART = 60
"""Characters of a part of a way that are told."""


def _told(way: Way) -> str:
    """A way as a JSON pointer, its long names cut."""
    parts: list[str] = []
    while way is not None:
        way, part = way
        parts.append(part if len(part) <= _LONGEST_PART else f"{part[:_LONGEST_PART]}…")
    return "/" + "/".join(reversed(parts))


def check_schema(schema: object) -> None:
    """Refuse a schema that cannot be followed to the letter.

    Raises:
        RequestError: it names the keyword and its place.
    """
    if schema is False:
        raise RequestError("the JSON schema is false, which nothing is valid by")
    pending: list[tuple[Way, object, int]] = [(None, schema, 0)]
    while pending:
        way, found, depth = pending.pop()
        if isinstance(found, bool):
            continue
        if not isinstance(found, Mapping):
            raise RequestError(f"the JSON schema at '{_told(way)}' is no object: schemas are")
        if depth > MAX_DEPTH:
            raise RequestError(
                f"the JSON schema has more than {MAX_DEPTH} schemas inside each other; name parts of it "
                "in $defs and refer to them"
            )
        fields = cast("Schema", found)
        _check_keywords(fields, way)
        pending += [((way, key), inner, depth + 1) for key, inner in _inside(fields, way)]


def _check_keywords(schema: Schema, way: Way) -> None:
    for keyword, value in schema.items():
        if keyword not in _KNOWN:
            raise RequestError(
                f"the JSON schema has {_place(keyword, way)}, which cannot be followed while an answer is written; "
                "leave it out, and check it when the answer is there"
            )
        match keyword, value:
            case "$ref", str(target) if not target.startswith("#"):
                raise RequestError(
                    f"the JSON schema has {_place(keyword, way)}, which is somewhere else: nothing is fetched; put it "
                    "into $defs"
                )
            case "multipleOf", int() | float() if not isinstance(value, bool):
                _check_divisor(value, way)
            case _:
                pass


def _place(keyword: str, way: Way) -> str:
    return f"'{keyword[:_LONGEST_PART]}' at '{_told(way)}'"


def _check_divisor(value: float, way: Way) -> None:
    digits = str(value).replace(".", "").lstrip("0")
    if not digits.isdecimal() or int(digits) > MAX_DIVISOR:
        raise RequestError(
            f"the JSON schema has {_place('multipleOf', way)}, which is {value}: at most {MAX_DIVISOR} is taken, and as few "
            "digits behind the point"
        )


def _inside(schema: Schema, way: Way) -> Iterator[tuple[str, object]]:
    """The schemas that stand in a schema, with the way to each."""
    for keyword, value in schema.items():
        if keyword in SINGLE:
            yield keyword, value
        elif keyword in LISTS and isinstance(value, list):
            for index, each in enumerate(cast("list[object]", value)):
                yield f"{keyword}/{index}", each
        elif keyword in MAPS and isinstance(value, Mapping):
            for name, each in cast("Mapping[str, object]", value).items():
                yield f"{keyword}/{name}", each
        elif keyword in LISTS | MAPS:
            raise RequestError(f"the JSON schema has a {_place(keyword, way)} of a wrong type")
