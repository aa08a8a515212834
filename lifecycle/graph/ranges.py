"""From the values that a tensor takes to the range that 8 bits should cover."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lifecycle.errors import StageError

Calibrate = Literal["minmax", "entropy", "percentile"]

BINS = 4096
_LEVELS = 256
_STEP = 16
"""Bins by which the ranges that `entropy` tries differ, on either side of zero."""


@dataclass(frozen=True, slots=True)
class Range:
    """A tensor in uint8: value = (integer - zero) * scale."""

    scale: np.float32
    zero: np.uint8

    @classmethod
    def covering(cls, low: float, high: float) -> Range:
        """The range from `low` to `high` and 0, which must be exact: padding is zeros."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = np.float32((high - low) / (_LEVELS - 1)) or np.float32(1)
        return cls(scale, np.uint8(np.clip(np.rint(-low / scale), 0, _LEVELS - 1)))


class Histogram:
    """How often a tensor's values occur, in memory that does not grow with them.

    Bins are of equal width around zero; a value outside doubles the width, each two bins
    becoming one.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.low, self.high = np.inf, -np.inf
        self.reach = 0.0
        """Bins cover -reach to reach."""
        self.counts = np.zeros(BINS, np.int64)

    def add(self, values: NDArray[Any]) -> None:
        """Count the values of one more sample.

        Raises:
            StageError: one is not finite.
        """
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if not np.isfinite([low, high]).all():
            raise StageError(
                f"the tensor '{self.name}' takes values that are not finite on the calibration "
                "data: look for samples that the float32 model cannot compute"
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(-low, high)
        if not self.reach:
            self.reach = largest
            if not largest:
                return
        while self.reach < largest:
            self.reach *= 2
            quarter = BINS // 4
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.pad(pairs, quarter)
        half = BINS // 2
        places = values.ravel() * np.float32(half / self.reach)
        places += np.float32(half)
        bins = np.clip(places.astype(np.int32), 0, BINS - 1)
        self.counts += np.bincount(bins, minlength=BINS)

    def range(self, calibrate: Calibrate, percentile: float) -> Range:
        """What 8 bits cover: all values, all but the outermost, or what keeps the distribution."""
        if calibrate == "minmax" or not self.reach:
            low, high = (self.low, self.high) if self.high >= self.low else (0.0, 0.0)
        elif calibrate == "percentile":
            low, high = self._percentile(percentile)
        else:
            low, high = self._entropy()
        return Range.covering(low, high)

    def _edge(self, place: float) -> float:
        return (2 * place / BINS - 1) * self.reach

    def _percentile(self, percentile: float) -> tuple[float, float]:
        """Half of what is left out lies on either side."""
        below = np.cumsum(self.counts)
        outside = below[-1] * (100 - percentile) / 200
        first = int(np.searchsorted(below, outside, side="right"))
        last = int(np.searchsorted(below, below[-1] - outside, side="left"))
        return max(self.low, self._edge(first)), min(self.high, self._edge(last + 1))

    def _entropy(self) -> tuple[float, float]:
        """The clipped range whose 256 levels lose least information, by the divergence of the
        two distributions (Migacz, 8-bit Inference with TensorRT, GTC 2017)."""
        first, last = np.flatnonzero(self.counts)[[0, -1]]
        best, least = (self.low, self.high), np.inf
        for half in range(BINS // 2, 0, -_STEP):
            start, stop = max(first, BINS // 2 - half), min(last + 1, BINS // 2 + half)
            if stop - start < _LEVELS:
                break
            loss = _divergence(self.counts, start, stop)
            if loss < least:
                bounds = (max(self.low, self._edge(start)), min(self.high, self._edge(stop)))
                best, least = bounds, loss
        return best


def _divergence(counts: NDArray[np.int64], start: int, stop: int) -> float:
    """KL divergence of the values clipped to some bins from what 256 levels make of them."""
    inside = counts[start:stop].astype(np.float64)
    clipped = inside.copy()
    clipped[0] += counts[:start].sum()
    clipped[-1] += counts[stop:].sum()
    level = np.arange(len(inside)) * _LEVELS // len(inside)
    # A level stands for those of its bins that occur at all.
    filled = inside > 0
    share = np.bincount(level, inside) / np.maximum(np.bincount(level, filled), 1)
    rounded = np.where(filled, share[level], 0)
    total = rounded.sum()
    if not total:
        return np.inf
    p, q = clipped / clipped.sum(), np.maximum(rounded / total, 1e-12)
    used = p > 0
    return float((p[used] * np.log(p[used] / q[used])).sum())
