"""Typed reads from the JSON of a checkpoint: a wrong value is one error that names it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

from lifecycle.errors import CheckpointError
from lifecycle.pipeline.suggest import did_you_mean

LARGEST = 2**31 - 1
"""Most that a size may be: the graph counts in int32."""
LARGEST_FLOAT = 3.4e38
"""Just below the largest float32."""


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of a JSON object. Every method raises `CheckpointError` for a value that is
    missing, without a default, or of another type than it returns."""

    values: Mapping[str, Any]
    where: str = "config.json"
    """What errors begin with: the file, and the field that holds the object."""

    def or_else(self, **defaults: Any) -> Fields:
        """The same fields, with values for those that are not there."""
        return Fields(defaults | dict(self.values), self.where)

    def integer(self, name: str, least: int = 1) -> int:
        """A whole number from `least` to `LARGEST`."""
        value = self.values.get(name)
        if type(value) is not int or not least <= value <= LARGEST:
            raise self.wrong(name, f"an integer from {least} to {LARGEST}")
        return value

    def optional_integer(self, name: str, least: int = 1) -> int | None:
        """The same; None for null and for a field that is not there."""
        return None if self.values.get(name) is None else self.integer(name, least)

    def number(self, name: str) -> float:
        """A number above 0 that a float32 can hold."""
        value = self.values.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.wrong(name, "a number")
        if not 0 < value <= LARGEST_FLOAT:
            raise self.wrong(name, f"a number above 0, at most {LARGEST_FLOAT}")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false; false for a field that is not there."""
        value = self.values.get(name, False)
        if type(value) is not bool:
            raise self.wrong(name, "true or false")
        return value

    def choice(self, name: str, known: Collection[str]) -> str:
        """One of `known`."""
        value = self.values.get(name)
        if not isinstance(value, str) or value not in known:
            raise self.wrong(name, f"one of {', '.join(known)}", did_you_mean(str(value), known))
        return value

    def choices(self, name: str, known: Collection[str], count: int) -> list[str] | None:
        """A list of `count` of `known`; None for null and for a field that is not there."""
        value = self.values.get(name)
        if value is None:
            return None
        if (
            not isinstance(value, list)
            or len(items := cast("list[object]", value)) != count
            or not all(item in known for item in items)
        ):
            raise self.wrong(name, f"a list of {count}, each one of {', '.join(known)}")
        return cast("list[str]", items)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id or a list of ids; none for null and for a field that is not there."""
        value = self.values.get(name)
        ids = cast("list[object]", value if isinstance(value, list) else [value])
        if value is None:
            return ()
        if not all(type(id) is int and 0 <= id <= LARGEST for id in ids):
            raise self.wrong(name, "a token id or a list of token ids")
        return tuple(cast("list[int]", ids))

    def section(self, name: str) -> Fields:
        """The fields of an object that holds no other; none for null and a field not there."""
        value = self.values.get(name)
        section = cast("dict[str, Any]", {} if value is None else value)
        if not isinstance(section, dict) or any(isinstance(v, dict) for v in section.values()):
            raise self.wrong(name, "one object of plain values, the same for all layers")
        return Fields(section, f"{self.where}: {name}")

    def wrong(self, name: str, expected: str, hint: str = "") -> CheckpointError:
        """The error for a field that is not as `expected`."""
        if name not in self.values:
            return CheckpointError(f"{self.where}: '{name}' is missing; expected {expected}")
        return CheckpointError(
            f"{self.where}: {name}: expected {expected}, got {self.values[name]!r}{hint}"
        )
