"""What llguidance reads more widely than JSON Schema means it, made as narrow: formats, patterns, names that are free.

Its own formats stay: what is added must hold too. Where no pattern can say what is meant, a little less is allowed,
or the schema is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from lifecycle.engines.grammar.schema import LISTS, MAPS, SINGLE
from lifecycle.errors import RequestError

_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = (
    "(?:[0-9]{4}-(?:0[13-9]|1[0-2])-[0-9]{2}|[0-9]{4}-02-(?:[01][0-9]|2[0-8])|"
    + _LEAP_YEAR
    + "-02-29)"
)
_FRACTION = r"(?:\.[0-9]+)?"
# A leap second ends a day in UTC; of other zones none is written.
_TIME = (
    f"(?:[0-9]{{2}}:[0-9]{{2}}:[0-5][0-9]{_FRACTION}(?:[Zz]|[+-][0-9]{{2}}:[0-9]{{2}})"
    f"|23:59:60{_FRACTION}(?:[Zz]|[+-]00:00))"
)
# Two hyphens begin what is Punycode, whose rules no pattern says.
_LABEL = "(?:[A-Za-z0-9]{1,63}|[A-Za-z0-9](?:-?[A-Za-z0-9]){0,31})"
FORMATS: Mapping[str, Mapping[str, Any]] = {
    "date": {"pattern": f"^{_DATE}$"},
    "time": {"pattern": f"^{_TIME}$"},
    "date-time": {"pattern": f"^{_DATE}[Tt]{_TIME}$"},
    "hostname": {"pattern": rf"^{_LABEL}(?:\.{_LABEL})*$", "maxLength": 253},
}
"""What a text of a format has to be besides."""
_WHITE = r"\t\n\x0b\f\r\x20\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
"""What ECMAScript takes for white space."""
_ANY = r"[^\n\r\u2028\u2029]"
"""What a point is in ECMAScript."""
ESCAPES = r'(?s:[^\\]|\\["\\nrtbf]|\\u00(?:[01][0-9A-Fa-f]|7[Ff]))*'
r"""What all answers by a schema match: of the characters in strings only those are escaped that llguidance would
escape itself. In a name that is not declared it allows any, and a declared one could come again as `"\u0061"`."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PARTS = re.compile(r"\\.|\[|\]|.", re.DOTALL)


def exact(schema: object) -> object:
    """A schema that was checked by `check_schema`, with what makes llguidance follow it to the letter.

    Raises:
        RequestError: nothing does; it names the keyword.
    """
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    fields = cast("Mapping[str, Any]", schema)
    _check_free_names(fields)
    for keyword, value in fields.items():
        if keyword in SINGLE:
            value = exact(value)
        elif keyword in LISTS:
            value = [exact(each) for each in value]
        elif keyword in MAPS:
            is_pattern = keyword == "patternProperties"
            value = {(exact_pattern(n) if is_pattern else n): exact(v) for n, v in value.items()}
        elif keyword == "pattern" and isinstance(value, str):
            value = exact_pattern(value)
        found[keyword] = value
    name = found.get("format")
    if isinstance(name, str) and name in FORMATS:
        found["allOf"] = [*found.get("allOf", ()), FORMATS[name]]
    return found


def _check_free_names(schema: Mapping[str, Any]) -> None:
    """Names that are free may come twice, which is one property, and are spelled in more than one way."""
    is_open = schema.get("additionalProperties", True) is not False
    least: object = schema.get("minProperties")
    required: object = schema.get("required")
    needed = set[str]()
    if isinstance(required, list):
        needed = {name for name in cast("list[object]", required) if isinstance(name, str)}
    names = [*schema.get("properties", ()), *needed]
    is_free = is_open or bool(schema.get("patternProperties"))
    # One that is free is none of those that are required.
    if is_free and isinstance(least, int | float) and least > len(needed) + 1:
        raise RequestError(
            f"the JSON schema has a 'minProperties' of {least}, which cannot be followed where names are free, for "
            "one could come twice; name more of them in 'required', or set 'additionalProperties' to false"
        )
    if is_free and (strange := next(filter(_CONTROL.search, names), None)) is not None:
        raise RequestError(
            f"the JSON schema has a property {strange!r}: names with control characters are followed only where "
            "'additionalProperties' is false and there are no 'patternProperties'"
        )


def exact_pattern(pattern: str) -> str:
    r"""A regular expression in which `.`, `\s`, `\S` and classes are what they are in ECMAScript.

    Raises:
        RequestError: it has a class that means something else to the library.
    """
    found: list[str] = []
    is_class = False
    parts = ["", "", *_PARTS.findall(pattern), "", ""]
    for at, part in enumerate(parts):
        if part == r"\s" and is_class and _is_in_range(parts, at):
            # No range ends with it, which the library says.
            return pattern
        if part == r"\s":
            found.append(_WHITE if is_class else f"[{_WHITE}]")
        elif part == r"\S":
            # Classes may stand in classes.
            found.append(f"[^{_WHITE}]")
        elif is_class and part in ("[", "&", "~"):
            # The library knows classes in classes, and what two of them have in common.
            found.append("\\" + part)
        elif part == "." and not is_class:
            found.append(_ANY)
        else:
            _check_class(parts, at, is_class)
            is_class = part == "[" or (is_class and part != "]")
            found.append(part)
    return "".join(found)


def _check_class(parts: list[str], at: int, is_class: bool) -> None:
    is_empty = parts[at] == "[" and "]" in (parts[at + 1], parts[at + 1] == "^" and parts[at + 2])
    if (not is_class and is_empty) or (is_class and parts[at] == "-" and parts[at + 1] == "-"):
        raise RequestError(
            "the JSON schema has a pattern with an empty class or with '--' in a class, which cannot be followed: "
            "write what is meant, such as [\\s\\S] for [^]"
        )


def _is_in_range(parts: list[str], at: int) -> bool:
    """Whether a part of a class is written as one end of a range."""
    begins = parts[at + 1] == "-" and parts[at + 2] != "]"
    return begins or (parts[at - 1] == "-" and parts[at - 2] not in ("[", "^"))
