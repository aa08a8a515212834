"""Rotated keys moved to other positions of a text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Rotation:
    """The tables that a layer rotates with, [positions, pairs] each, maybe by a factor too large."""

    cos: _Floats
    sin: _Floats
    interleaved: bool
    """Whether neighbours are rotated together, or else the halves of a head's first channels."""

    def moved(self, keys: _Floats, positions: NDArray[np.int64], by: int) -> _Floats:
        """`keys` [heads, tokens, size] that stand at `positions` [tokens], as if they stood `by`
        tokens further on; from the end of the tables it goes on at their beginning."""
        at = (positions + by) % len(self.cos)
        cos, sin = self.cos[positions], self.sin[positions]
        factor = cos * cos + sin * sin
        turn_cos = (self.cos[at] * cos + self.sin[at] * sin) / factor
        turn_sin = (self.sin[at] * cos - self.cos[at] * sin) / factor
        first, second = self._pairs()
        found = keys.copy()
        found[..., first] = keys[..., first] * turn_cos - keys[..., second] * turn_sin
        found[..., second] = keys[..., second] * turn_cos + keys[..., first] * turn_sin
        return found

    def _pairs(self) -> tuple[slice, slice]:
        count = self.cos.shape[1]
        if self.interleaved:
            return slice(0, 2 * count, 2), slice(1, 2 * count, 2)
        return slice(0, count), slice(count, 2 * count)
