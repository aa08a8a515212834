"""Adapters in bytes, as our kernels multiply them.

Products of integers have rounded their input already, so x · A is one of integers too, over the same rows; x · A is then
rounded for each token, and multiplied with B. Weights of an adapter rounded to 8 bits are farther from what was trained
by some hundredths of what it adds; the weights that it is added to were rounded as well, and are many times as large.

A and B of a product are one row of bytes, 128 standing for 0; see `AdapterShape` of the kernels for how they lie.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_TILE = 16
"""Columns of a tile; values of k lie four by four in it."""
_MOST = 127
_ZERO = 128


def packed_bytes(depth: int, rank: int, columns: Sequence[int]) -> int:
    """Of one adapter, for parts of a product that have so many columns, each a multiple of 16."""
    inner = _up(len(columns) * rank, _TILE) * _up(depth, 4)
    return inner + sum(columns) // _TILE * (_up(rank, 4) * _TILE + _TILE * 4)


def pack_adapter(a: NDArray[np.float32], parts: Sequence[NDArray[np.float32]]) -> NDArray[np.uint8]:
    """A [depth, parts * rank] and B of each part [rank, columns] as bytes [packed_bytes].

    The scale of a column of A goes into the rows of B, so that x · A is rounded in proportion to what becomes of it.

    Raises:
        OverflowError: the weights are too large for that.
    """
    if not np.isfinite(a).all():
        raise OverflowError
    first, of_columns = _rounded(a)
    found = [_tiles(first).ravel()]
    for b, sizes in zip(parts, of_columns.reshape(len(parts), -1, 1), strict=True):
        with np.errstate(over="ignore"):
            scaled = b * sizes
        if not np.isfinite(scaled).all():
            raise OverflowError
        second, scales = _rounded(scaled)
        tiles = _tiles(second)
        of_tiles = scales.reshape(len(tiles), _TILE).view(np.uint8)
        found.append(np.concatenate([tiles, of_tiles], axis=1).ravel())
    return np.concatenate(found)


def _rounded(matrix: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A matrix by columns in 8 bits, and their scales."""
    scales = np.abs(matrix).max(axis=0) / np.float32(_MOST)
    steps = np.divide(matrix, scales, out=np.zeros_like(matrix), where=scales > 0)
    # Where numbers are so small that a scale has few digits, it may be too small for the largest of them.
    whole = np.clip(np.rint(steps), -_MOST, _MOST)
    return (whole + _ZERO).astype(np.uint8), scales


def _tiles(matrix: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[k, columns] as [columns / 16, k / 4 * 16 * 4], filled up with what stands for 0."""
    depth, columns = matrix.shape
    whole = np.full((_up(depth, 4), _up(columns, _TILE)), _ZERO, np.uint8)
    whole[:depth, :columns] = matrix
    fours = whole.reshape(len(whole) // 4, 4, -1, _TILE)
    return fours.transpose(2, 0, 3, 1).reshape(whole.shape[1] // _TILE, -1)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
