"""What llguidance reads more widely than JSON Schema means it, made as narrow: formats, and white space in patterns.

Its own formats stay: what is added must hold too. Where no pattern can say what is meant, a little less is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from lifecycle.engines.grammar.schema import LISTS, MAPS, SINGLE

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
_PARTS = re.compile(r"\\.|\[|\]|.", re.DOTALL)


def exact(schema: object) -> object:
    """A schema that was checked by `check_schema`, with what makes llguidance follow it to the letter."""
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for keyword, value in cast("Mapping[str, Any]", schema).items():
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


def exact_pattern(pattern: str) -> str:
    r"""A regular expression in which `\s` and `\S` are what they are in ECMAScript."""
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
        else:
            is_class = part == "[" or (is_class and part != "]")
            found.append(part)
    return "".join(found)


def _is_in_range(parts: list[str], at: int) -> bool:
    """Whether a part of a class is written as one end of a range."""
    begins = parts[at + 1] == "-" and parts[at + 2] != "]"
    return begins or (parts[at - 1] == "-" and parts[at - 2] not in ("[", "^"))
