"""Slots for work that goes past scheduler and sampling, in an engine that is idle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lifecycle.engines.backend import Backend, CacheBackend


@dataclass(frozen=True, slots=True)
class SlotRoom:
    """Slots that nothing else uses, and how they are filled."""

    backend: Backend
    num_slots: int
    max_tokens: int
    """Most tokens that they may hold together."""
    chunk: int
    """Most new tokens of a row."""
    is_long: Callable[[int], bool]
    """What `Row.is_long` must be for a text of so many tokens."""
    adapter: int = 0
    """As in `Row`."""

    @property
    def cache(self) -> CacheBackend | None:
        """The backend, if it can copy what slots hold."""
        return self.backend if isinstance(self.backend, CacheBackend) else None

    def forget_passed(self, slot: int, count: int) -> None:
        """Give back the memory of what no layer looks back on after so many tokens of a slot."""
        if self.cache is not None:
            self.cache.forget_passed(slot, count)

    def forget(self, slot: int) -> None:
        """Give back the memory of what a slot holds."""
        if self.cache is not None:
            self.cache.forget(slot)
