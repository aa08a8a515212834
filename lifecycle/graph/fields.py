"""Typed reads from the JSON of a checkpoint: a wrong value is one error that names it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
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
    stored: Mapping[str, str] = field(default_factory=dict[str, str])
    """The names in the file of fields that are called otherwise here."""

    def or_else(self, **defaults: Any) -> Fields:
        """The same fields, with values for those that are not there."""
        return replace(self, values=defaults | dict(self.values))

    def called(self, **stored: str) -> Fields:
        """The same fields under our names; `hidden_size="n_embd"` reads the second as the first."""
        found = {ours: self.values[name] for ours, name in stored.items() if name in self.values}
        return Fields(dict(self.values) | found, self.where, {**self.stored, **stored})

    def without(self, *names: str) -> Fields:
        """The same fields less some."""
        kept = {name: value for name, value in self.values.items() if name not in names}
        return replace(self, values=kept)

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

    def optional_number(self, name: str) -> float | None:
        """The same; None for null and for a field that is not there."""
        return None if self.values.get(name) is None else self.number(name)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` numbers above 0."""
        value = self.values.get(name)
        if not isinstance(value, list) or len(items := cast("list[object]", value)) != count:
            raise self.wrong(name, f"a list of {count} numbers")
        return tuple(Fields({name: item}, self.where, self.stored).number(name) for item in items)

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

    def bits(self, name: str, count: int) -> list[bool] | None:
        """A list of `count` of 0 and 1, or a longer one of which the first count; None for null
        and for a field that is not there."""
        value = self.values.get(name)
        if value is None:
            return None
        items = cast("list[object]", value) if isinstance(value, list) else []
        if len(items) < count or not all(type(item) is int and item in (0, 1) for item in items):
            raise self.wrong(name, f"a list of {count}, each 0 or 1")
        return [item == 1 for item in items[:count]]

    def indices(self, name: str, count: int) -> frozenset[int]:
        """A list of numbers below `count`; none for null and for a field that is not there."""
        value = self.values.get(name)
        items = cast("list[object]", [] if value is None else value)
        if not isinstance(items, list) or not all(
            type(item) is int and 0 <= item < count for item in items
        ):
            raise self.wrong(name, f"a list of numbers below {count}")
        return frozenset(cast("list[int]", items))

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

    def require(self, name: str, only: object) -> None:
        """Refuse a field that is there, and not null, with another value than `only`."""
        if self.values.get(name) not in (None, only):
            raise self.wrong(name, f"{only!r}: nothing else can be exported")

    def wrong(self, name: str, expected: str, hint: str = "") -> CheckpointError:
        """The error for a field that is not as `expected`."""
        stored = self.stored.get(name, name)
        if name not in self.values:
            return CheckpointError(f"{self.where}: '{stored}' is missing; expected {expected}")
        return CheckpointError(
            f"{self.where}: {stored}: expected {expected}, got {self.values[name]!r}{hint}"
        )
