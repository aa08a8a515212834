"""A backend that checks what an engine asks of it, for tests and measurements that run long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.backend import Block, CacheBackend, Row
from lifecycle.engines.base import AdapterWeights
from lifecycle.engines.ort import OnnxEngine


class SoakError(Exception):
    """The engine did what it must not do."""


def expect(holds: bool, what: str) -> None:
    """Raise unless something holds.

    Raises:
        SoakError: it does not.
    """
    if not holds:
        raise SoakError(what)


class Watched:
    """A backend behind one that knows how much each slot holds: every row of a step has a slot of its own
    and goes on where that ends, or earlier; what is copied is there."""

    def __init__(self, backend: CacheBackend) -> None:
        self._backend = backend
        self.held = Counter[int]()
        """Tokens by slot."""

    def forward(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """As `Backend.forward`."""
        slots = [row.slot for row in rows]
        expect(len(set(slots)) == len(slots), f"a slot is in two hands: {slots}")
        for row in rows:
            self._expect_held(row.slot, row.start)
            self.held[row.slot] = row.start + len(row.tokens)
        return self._backend.forward(rows)

    def read_cache(self, slot: int, start: int, stop: int) -> Block:
        """As `CacheBackend.read_cache`."""
        self._expect_held(slot, stop)
        return self._backend.read_cache(slot, start, stop)

    def write_cache(self, slot: int, start: int, block: Block, count: int | None = None) -> None:
        """As `CacheBackend.write_cache`."""
        self._expect_held(slot, start)
        num_tokens = block.nbytes // self._backend.bytes_per_token if count is None else count
        self.held[slot] = start + num_tokens
        self._backend.write_cache(slot, start, block, count)

    def copy_cache(self, source: int, target: int, stop: int, start: int = 0) -> None:
        """As `CacheBackend.copy_cache`."""
        self._expect_held(source, stop)
        if start:
            self._expect_held(target, start)
        self.held[target] = stop
        self._backend.copy_cache(source, target, stop, start)

    def forget(self, slot: int, start: int = 0) -> None:
        """As `CacheBackend.forget`."""
        self.held[slot] = min(start, self.held[slot])
        self._backend.forget(slot, start)

    def forget_passed(self, slot: int, count: int, before: int = 0) -> None:
        """As `CacheBackend.forget_passed`."""
        self._expect_held(slot, count)
        self._backend.forget_passed(slot, count, before)

    @property
    def can_roll_back(self) -> bool:
        """As `Backend.can_roll_back`."""
        return self._backend.can_roll_back

    @property
    def bytes_per_token(self) -> int:
        """As `CacheBackend.bytes_per_token`."""
        return self._backend.bytes_per_token

    @property
    def adapter_slots(self) -> int:
        """As `Backend.adapter_slots`."""
        return self._backend.adapter_slots

    def read_adapter(self, folder: Path) -> AdapterWeights:
        """As `Backend.read_adapter`."""
        return self._backend.read_adapter(folder)

    def load_adapter(self, weights: AdapterWeights, instead_of: int = 0) -> int:
        """As `Backend.load_adapter`."""
        return self._backend.load_adapter(weights, instead_of)

    def unload_adapter(self, number: int) -> None:
        """As `Backend.unload_adapter`."""
        self._backend.unload_adapter(number)

    def close(self) -> None:
        """As `Backend.close`."""
        self._backend.close()

    def _expect_held(self, slot: int, count: int) -> None:
        held = self.held[slot]
        expect(count <= held, f"slot {slot} holds {held} tokens, {count} are taken to be there")


class WatchedEngine(OnnxEngine):
    """The engine over a watched backend."""

    watched: Watched

    def __init__(self, backend: CacheBackend, **arguments: Any) -> None:
        watched = self.watch(backend)
        super().__init__(watched, **arguments)
        self.watched = watched

    def watch(self, backend: CacheBackend) -> Watched:
        """What stands before the backend."""
        return Watched(backend)
