"""Weights of blocks as small integers with a scale, and maybe a zero point, for each block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lifecycle.graph import scales as stored
from lifecycle.graph.scales import Scales

_SHRINK = np.array([1.05, 1.0, 0.95, 0.9, 0.85], np.float32)
"""Scales tried per block, as parts of the one that just reaches the largest weight. On normal
weights in blocks of 32 the error falls from 9.7 % (largest / 7) over 8.6 % (largest / -8) to
8.15 %; nineteen trials give 8.09 %."""

_PART = 1 << 18
"""Weights in each of the parts of blocks."""

Integers = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that weights can take: (integer - zero) * scale, of each block by itself."""

    block_size: int = 64
    """Weights along the input that share a scale: 16, 32, 64 or 128. ONNX Runtime's packed matrices
    hold a scale and a sum of 4 bytes each per block, so a weight of 4 bits takes 6 at 32, 5 at 64
    and 4.5 at 128, and reading them is what a decoding step of one row waits for."""
    bits: Literal[4, 8] = 4
    symmetric: bool = True
    """Whether the zero is the middle integer of every block, instead of a point of its own."""
    unit: np.float32 | None = None
    """Where scales are stored in 8 bits, what they are multiples of (see `scales`); None stores them in 16."""

    def fitting(self, largest: Iterable[Floats]) -> Self:
        """This grid for a matrix, whose largest weight of each block comes in parts. Scales of weights in 8
        bits, where a scale that is 1 % too small clips more than rounding loses, stay in 16."""
        if self.bits == 8:
            return self
        steps = np.concatenate(list(largest)) / np.float32(self.middle)
        return replace(self, unit=stored.unit_of(steps))

    def largest(self, rows: Floats) -> Floats:
        """The largest weight of each block of rows [rows, in], without its sign."""
        columns = as_columns(self.split(rows))
        return np.maximum(columns.max(axis=0), -columns.min(axis=0))

    @property
    def levels(self) -> int:
        """The highest integer."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero of symmetric blocks."""
        return 2 ** (self.bits - 1)

    def bytes(self, shape: tuple[int, int]) -> int:
        """What a matrix [rows, in] takes: integers, scales, and zeros if there are any; more where scales of 8
        bits are too coarse for it."""
        rows, width = shape
        blocks = -(-width // self.block_size)
        zeros = 0 if self.symmetric else -(-blocks * self.bits // 8)
        scale, unit = (1, 4) if self.bits == 4 else (2, 0)
        return rows * (blocks * (self.block_size * self.bits // 8 + scale) + zeros) + unit

    def storable(self, scales: Floats) -> Floats:
        """Scales as they will be stored."""
        return stored.storable(scales, self.unit)

    def split(self, rows: Floats) -> Floats:
        """[rows, in] as [rows * blocks, block_size], the last block of a row filled with zeros."""
        if missing := -rows.shape[1] % self.block_size:
            rows = np.pad(rows, ((0, 0), (0, missing)))
        return rows.reshape(-1, self.block_size)

    def round(self, weights: Floats, scales: Floats, zeros: Floats) -> Floats:
        """The nearest integers to weights, whose scales and zeros are of shapes that broadcast."""
        return self.centred(weights, scales, zeros) + zeros

    def centred(
        self,
        weights: Floats,
        scales: Floats,
        zeros: Floats | np.float32,
        out: Floats | None = None,
    ) -> Floats:
        """The same less their zeros, in `out` if that is given."""
        found = np.divide(weights, scales, out=out)
        np.rint(found, out=found)
        if not isinstance(zeros, np.ndarray):
            return np.clip(found, -zeros, self.levels - zeros, out=found)
        # Takes half of the time of a clip between arrays.
        np.maximum(found, -zeros, out=found)
        return np.minimum(found, self.levels - zeros, out=found)


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows of a matrix as they are stored."""

    values: Integers
    """[rows, blocks, block_size * bits / 8]."""
    scales: Scales
    """[rows, blocks]."""
    zeros: Integers | None
    """[rows, blocks * bits / 8 rounded up]; None if symmetric."""

    @property
    def bytes(self) -> int:
        """What they take."""
        zeros = 0 if self.zeros is None else self.zeros.nbytes
        return self.values.nbytes + self.scales.nbytes + zeros

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """The rows of all parts, in order."""
        parts = list(parts)
        zeros = [part.zeros for part in parts if part.zeros is not None]
        return cls(
            np.concatenate([part.values for part in parts]),
            Scales.joined([part.scales for part in parts]),
            np.concatenate(zeros) if zeros else None,
        )


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows of a matrix as integers: a weight is (integer - zero) * scale."""

    grid: Grid
    integers: Integers
    """[rows, blocks, block_size]."""
    scales: Floats
    """[rows, blocks]."""
    zeros: Integers
    """[rows, blocks]."""

    @classmethod
    def of(cls, grid: Grid, rows: int, integers: Floats, scales: Floats, zeros: Floats) -> Self:
        """From arrays in any shape whose values come in the order of rows and blocks."""
        whole = integers.astype(np.uint8).reshape(rows, -1, grid.block_size)
        shape = whole.shape[:2]
        return cls(grid, whole, scales.reshape(shape), zeros.astype(np.uint8).reshape(shape))

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """The rows of all parts, in order."""
        parts = list(parts)
        integers = np.concatenate([part.integers for part in parts])
        scales = np.concatenate([part.scales for part in parts])
        zeros = np.concatenate([part.zeros for part in parts])
        return cls(parts[0].grid, integers, scales, zeros)

    def parts(self) -> Iterator[Self]:
        """Some rows at a time, in order."""
        step = max(1, _PART // self.integers[0].size)
        for start in range(0, len(self.integers), step):
            rows = slice(start, start + step)
            integers, zeros = self.integers[rows], self.zeros[rows]
            yield replace(self, integers=integers, scales=self.scales[rows], zeros=zeros)

    def packed(self) -> Integers:
        """The integers as bytes, [rows, blocks, block_size * bits / 8]."""
        return _pack(self.integers, self.grid.bits)

    def packed_zeros(self) -> Integers | None:
        """The zeros as bytes, [rows, blocks * bits / 8 rounded up]; nothing if symmetric."""
        if self.grid.symmetric:
            return None
        odd = self.grid.bits == 4 and self.zeros.shape[1] % 2
        return _pack(np.pad(self.zeros, ((0, 0), (0, int(odd)))), self.grid.bits)

    def pack(self) -> Packed:
        """As they are stored."""
        scales = Scales.of(self.scales, self.grid.unit)
        return Packed(self.packed(), scales, self.packed_zeros())

    def floats(self, width: int) -> Floats:
        """The weights that the integers stand for, [rows, width]."""
        centred = self.integers.astype(np.float32) - self.zeros[:, :, None]
        whole = (centred * self.scales[:, :, None]).reshape(len(self.integers), -1)
        return np.ascontiguousarray(whole[:, :width])


def _pack(integers: Integers, bits: int) -> Integers:
    """Of two integers of 4 bits in a byte, the first is in its lower half."""
    if bits == 8:
        return integers
    return integers[..., 0::2] | (integers[..., 1::2] << np.uint8(4))


Fit: TypeAlias = Callable[[Floats, Grid, Floats | None], tuple[Floats, Floats]]
"""A way to find the scale and the zero of each block, [blocks] each, for blocks [blocks, size] and
how much the error of each weight counts, of the same shape."""


def quantize(weights: Floats, grid: Grid, fit: Fit) -> Blocks:
    """Rows of weights [rows, in], each block by itself."""
    blocks = grid.split(weights)
    scales, zeros = fit(blocks, grid, None)
    scales = grid.storable(scales)
    zero = np.float32(grid.middle) if grid.symmetric else zeros[:, None]
    integers = grid.centred(blocks, scales[:, None], zero)
    integers += zero
    return Blocks.of(grid, len(weights), integers, scales, zeros)


def as_columns(blocks: Floats) -> Floats:
    """[blocks, size] as [size, blocks]: passes then run along memory, with one scale for each place in it."""
    return np.ascontiguousarray(blocks.T)


def least_squares(
    blocks: Floats, grid: Grid, importance: Floats | None = None
) -> tuple[Floats, Floats]:
    """Of a few scales and zeros that are tried, those that leave the least squared error.

    Blocks with zeros of their own try the middle too, which is best for some.
    """
    columns = as_columns(blocks)
    best = _Best(columns, grid, None if importance is None else as_columns(importance))
    low, high = columns.min(axis=0), columns.max(axis=0)
    # Negative where the largest weight is positive: it falls on 0, the finer step is used.
    widest = np.where(high >= -low, high, low) / np.float32(-grid.middle)
    for part in _SHRINK:
        best.offer(widest * part, None)
    if not grid.symmetric:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        span = (high - low) / np.float32(grid.levels)
        span[span == 0] = 1
        for part in _SHRINK:
            best.offer(span * part, np.clip(np.rint(-low / span), 0, grid.levels))
    return best.scales, best.zeros


class _Best:
    """The best scale and zero of each block so far, for blocks as columns."""

    def __init__(self, columns: Floats, grid: Grid, importance: Floats | None) -> None:
        self._columns, self._grid, self._importance = columns, grid, importance
        self._weighed = columns if importance is None else columns * importance
        # New memory comes with pages to clear, which takes as long as the arithmetic.
        self._room = np.empty_like(columns)
        count = columns.shape[1]
        self._least = np.full(count, np.inf, np.float32)
        self.scales = np.ones(count, np.float32)
        self.zeros = np.full(count, grid.middle, np.float32)

    def offer(self, scales: Floats, zeros: Floats | None) -> None:
        """Try scales, refined for the integers that they lead to; no zeros are the middle."""
        scales = np.where(scales == 0, np.float32(1), scales)
        middle = np.float32(self._grid.middle)
        zero = middle if zeros is None else zeros
        centred = self._grid.centred(self._columns, scales, zero, self._room)
        # For given integers the best scale is <w, q> / <q, q>, and the squared error that it
        # leaves is |w|² - <w, q>² / <q, q>.
        dot = _dots(self._weighed, centred)
        weighed = centred if self._importance is None else centred * self._importance
        norm = _dots(weighed, centred)
        norm[norm == 0] = 1
        error = -dot * dot / norm
        better = (error < self._least) & (dot != 0)
        np.copyto(self._least, error, where=better)
        np.copyto(self.scales, dot / norm, where=better)
        np.copyto(self.zeros, zero, where=better)


def _dots(left: Floats, right: Floats) -> Floats:
    """The dot products of columns."""
    return np.einsum("ij,ij->j", left, right)
