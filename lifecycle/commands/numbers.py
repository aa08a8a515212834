"""Numbers among the arguments of a command: each reader says what it takes."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable


def count(text: str) -> int:
    """An integer of 1 or more."""
    return _integer(text, 1)


def natural(text: str) -> int:
    """An integer of 0 or more."""
    return _integer(text, 0)


def quantity(text: str) -> float:
    """A finite number of 0 or more."""
    value = number(text)
    if value is None or value < 0:
        raise ArgumentTypeError(f"{text!r}: give a number, 0 or more")
    return value


def positive(what: str) -> Callable[[str], float]:
    """A reader of finite numbers above 0, which are `what`."""

    def read(text: str) -> float:
        value = number(text)
        if value is None or value <= 0:
            raise ArgumentTypeError(f"{text!r}: give {what}, a number above 0")
        return value

    return read


def number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise ArgumentTypeError(f"{text!r}: give an integer, {least} or more")
    return value
