"""4-bit weights by GPTQ (arXiv 2210.17323): each column's rounding error is spread over the columns
that are yet to be rounded, so that the product's output on calibration texts changes least."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lifecycle.graph.calibration import Calibration
from lifecycle.graph.int4 import Int4, best_scales, pack_nibbles
from lifecycle.graph.rewrite import GraphRewrite, Linear

_Floats = NDArray[np.float32]

_DAMPING = 0.01
"""Part of the mean of the diagonal that is added to it, so that it can be inverted."""
_COLUMNS = 128
"""Columns whose errors are collected before those behind them are changed."""


class Gptq(Int4):
    """`Int4` with the products of the layers rounded by what they read; the embedding, a head that
    is the same matrix, and mixtures are rounded as `Int4` does."""

    def __init__(self, block_size: int, calibration: Calibration) -> None:
        super().__init__(block_size)
        self._calibration = calibration

    def linear(self, rewrite: GraphRewrite, linear: Linear) -> None:
        """Replace one product."""
        weights = np.concatenate(list(rewrite.blocks(linear.weight)))
        moments = self._calibration.second_moments(linear.name)
        integers, scales = quantize(weights, moments, self.block_size)
        values = scales[:, :, None] * integers.reshape(*scales.shape, -1)
        rounded = values.reshape(len(weights), -1)[:, : weights.shape[1]]
        self._calibration.replace(linear.name, np.ascontiguousarray(rounded, np.float32))
        packed = pack_nibbles(integers).reshape(*scales.shape, self.block_size // 2)
        self.product(
            rewrite,
            linear,
            rewrite.add(f"{linear.name}.weight.int4", packed, weights.size),
            rewrite.add(f"{linear.name}.weight.scales", scales),
        )


def quantize(
    weights: _Floats, moments: _Floats, block_size: int
) -> tuple[NDArray[np.int8], _Floats]:
    """Weights [rows, in] as integers from -8 to 7, [rows, in padded to whole blocks], and the
    scale of each block, [rows, blocks]. `moments` [in, in] are those of the inputs.

    Columns are rounded in the order of how much their inputs weigh; the scales are fixed before.
    """
    rows, width = weights.shape
    padded = np.pad(weights, ((0, 0), (0, -width % block_size)))
    weights_of = np.pad(np.diag(moments), (0, -width % block_size)).reshape(1, -1)
    importance = np.repeat(weights_of, rows, axis=0).reshape(-1, block_size)
    scales = best_scales(padded.reshape(-1, block_size), importance).reshape(rows, -1)
    order = np.argsort(-np.diag(moments), kind="stable")
    left = weights[:, order].copy()
    upper = _inverse_factor(moments[np.ix_(order, order)])
    rounded = np.zeros_like(padded)
    for start in range(0, width, _COLUMNS):
        stop = min(start + _COLUMNS, width)
        errors = np.empty((rows, stop - start), np.float32)
        for column in range(start, stop):
            place = order[column]
            scale = scales[:, place // block_size]
            integers = np.clip(np.rint(left[:, column] / scale), -8, 7)
            rounded[:, place] = integers
            error = (left[:, column] - integers * scale) / upper[column, column]
            left[:, column:stop] -= error[:, None] * upper[column, column:stop]
            errors[:, column - start] = error
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return rounded.astype(np.int8), scales


def _inverse_factor(moments: _Floats) -> _Floats:
    """The upper factor U of the damped inverse, UᵀU = (moments + damping)⁻¹."""
    damped = moments.astype(np.float64)
    diagonal = np.diag(damped).copy()
    mean = diagonal.mean() or 1.0
    # What is never read may be rounded at will.
    diagonal[diagonal == 0] = mean
    np.fill_diagonal(damped, diagonal + _DAMPING * mean)
    inverse = np.linalg.inv(damped)
    return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)
