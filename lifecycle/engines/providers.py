"""Execution providers of ONNX Runtime, as a caller names them."""

from __future__ import annotations

from collections.abc import Sequence

Provider = str | tuple[str, dict[str, str]]
"""An execution provider by name, or with its options."""

PROVIDER_ENDING = "ExecutionProvider"
"""What every name ends with."""


def provider_names(providers: Sequence[Provider]) -> tuple[str, ...]:
    """Those of providers with and without options."""
    return tuple(each if isinstance(each, str) else each[0] for each in providers)


def parse_provider(text: str) -> Provider:
    """What `NAME` or `NAME:KEY=VALUE,KEY=VALUE` says.

    Raises:
        ValueError: it has another form.
    """
    name, colon, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",")] if colon else []
    if not name or not all(key and equals for key, equals, _ in pairs):
        raise ValueError(f"{text!r}: give NAME or NAME:KEY=VALUE,..., as in cuda:device_id=0")
    return (name, {key: value for key, _, value in pairs}) if pairs else name
