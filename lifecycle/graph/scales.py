"""How the scales of blocks are stored: in 8 bits as multiples of a unit, in 16, or as they are.

A scale in 8 bits is a signed code c that stands for c·|c| units: squares reach from the largest scale of a
matrix down to one of 16,129, and are finest, by size, where scales are largest. Blocks of 32 take 4.25 bits a
weight then, as those of 64 do with 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_MOST = 127
"""The largest code."""
_ROOM = np.float32(1.2)
"""The largest scale, as a part of the largest step: blocks with zeros of their own and fitted scales have some that are
larger than a largest weight by the middle integer."""
_FINE, _LEAST = 24, 8
"""The codes that half of the scales, and all but a hundredth, have to reach: theirs are stored to 4 %, and to 12 %. A
matrix whose scales are small beside a few others keeps 16 bits."""
_LOST = np.float32(0.01)
"""Part of a scale that storing it in 16 bits may change. Integers are chosen for what is stored, and
scales that are tried lie further apart."""


@dataclass(frozen=True, slots=True)
class Scales:
    """Scales as they are stored."""

    values: NDArray[np.int8 | np.float16 | np.float32]
    """[rows, blocks]; codes, or scales: in float32 only if 16 bits would change one."""
    unit: np.float32 | None = None
    """Of codes."""

    @classmethod
    def of(cls, scales: Floats, unit: np.float32 | None) -> Self:
        """Scales that `storable` gave."""
        if unit is not None:
            return cls(_codes(scales, unit), unit)
        halves = _halved(scales)
        return cls(halves if np.array_equal(halves, scales) else scales)

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """All rows, in order."""
        parts = list(parts)
        return cls(np.concatenate([part.values for part in parts]), parts[0].unit)

    @property
    def nbytes(self) -> int:
        """What they take."""
        return self.values.nbytes + (0 if self.unit is None else self.unit.nbytes)

    def floats(self) -> Floats:
        """What they stand for."""
        found = self.values.astype(np.float32)
        return found if self.unit is None else _decoded(found, self.unit)


def unit_of(steps: Floats) -> np.float32 | None:
    """The unit for scales of about these sizes, one for each block; None where 8 bits are too coarse."""
    used = steps[steps > 0]
    if not used.size:
        return np.float32(1)
    unit = np.float32(_ROOM * used.max() / _MOST**2)
    is_fine = np.isfinite(unit) and unit >= np.finfo(np.float32).tiny
    if not is_fine:
        return None
    # Counted, for to sort them takes as long as to find them.
    num_fine = np.count_nonzero(used >= unit * _FINE**2)
    num_coarse = np.count_nonzero(used < unit * _LEAST**2)
    return unit if 2 * num_fine >= used.size and 100 * num_coarse <= used.size else None


def storable(scales: Floats, unit: np.float32 | None) -> Floats:
    """Scales as they will be stored: multiples of the unit, or in 16 bits but for those too large or too small for
    that."""
    if unit is not None:
        return _decoded(_codes(scales, unit).astype(np.float32), unit)
    halves = _halved(scales).astype(np.float32)
    is_close = np.abs(halves - scales) <= _LOST * np.abs(scales)
    # Each by itself: what comes together depends on how a matrix is cut.
    return np.where(is_close, halves, scales)


def _codes(scales: Floats, unit: np.float32) -> NDArray[np.int8]:
    units = np.abs(scales) / unit
    low = np.floor(np.sqrt(units))
    # The nearer of two squares, not of two roots.
    roots = low + (units > low * (low + 1) + 0.5)
    return np.copysign(np.clip(roots, 1, _MOST), scales).astype(np.int8)


def _decoded(codes: Floats, unit: np.float32) -> Floats:
    return codes * np.abs(codes) * unit


def _halved(scales: Floats) -> NDArray[Any]:
    with np.errstate(over="ignore", under="ignore"):
        return scales.astype(np.float16)
