"""Execution providers of ONNX Runtime, as a caller names them."""

from __future__ import annotations

from collections.abc import Sequence

Provider = str | tuple[str, dict[str, str]]
"""An execution provider by name, or with its options."""

PROVIDER_ENDING = "ExecutionProvider"
"""What every name ends with."""


def is_provider(given: object) -> bool:
    """Whether something has the form of one."""
    match given:
        case str():
            return True
        case (str(), dict()):
            return True
        case _:
            return False


def provider_names(providers: Sequence[Provider]) -> tuple[str, ...]:
    """Those of providers with and without options."""
    return tuple(each if isinstance(each, str) else each[0] for each in providers)


def parse_provider(text: str) -> Provider:
    """What `NAME` or `NAME:KEY=VALUE,KEY=VALUE` says. A value may hold commas: what has no `=` behind one belongs to it.

    Raises:
        ValueError: it has another form, or an option twice.
    """
    name, colon, rest = text.partition(":")
    options = dict[str, str]()
    key = ""
    for part in rest.split(",") if colon else ():
        before, equals, value = part.partition("=")
        if equals and before in options:
            raise ValueError(f"{text!r}: {before!r} is given twice")
        if equals:
            key = before
        if not key or not part:
            name = ""
            break
        options[key] = value if equals else f"{options[key]},{part}"
    if not name:
        raise ValueError(f"{text!r}: give NAME or NAME:KEY=VALUE,..., as in cuda:device_id=0")
    return (name, options) if options else name
