"""Weights in blocks by GPTQ (arXiv 2210.17323): each column's rounding error is spread over the columns
that are yet to be rounded, so that the product's output on calibration texts changes least."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.calibration import Calibration
from lifecycle.graph.rewrite import GraphRewrite, Linear
from lifecycle.graph.rounding import best_scales, pack

_Floats = NDArray[np.float32]

_DAMPING = 0.01
"""Part of the mean of the diagonal that is added to it, so that it can be inverted."""
_COLUMNS = 128
"""Columns whose errors are collected before those behind them are changed."""


class Gptq(Blockwise):
    """`Blockwise` with the products of the layers rounded by what they read; the embedding, a head that
    is the same matrix, and mixtures are rounded as `Blockwise` does."""

    def __init__(self, block_size: int, calibration: Calibration, bits: Literal[4, 8] = 4) -> None:
        super().__init__(block_size, bits)
        self._calibration = calibration

    def linear(self, rewrite: GraphRewrite, linear: Linear) -> None:
        """Replace one product."""
        weights = np.concatenate(list(rewrite.blocks(linear.weight)))
        moments = self._calibration.second_moments(linear.name)
        integers, scales = quantize(weights, moments, self.block_size, self.bits)
        values = scales[:, :, None] * integers.reshape(*scales.shape, -1)
        rounded = values.reshape(len(weights), -1)[:, : weights.shape[1]]
        self._calibration.replace(linear.name, np.ascontiguousarray(rounded, np.float32))
        packed = pack(integers, self.bits).reshape(*scales.shape, -1)
        self.product(
            rewrite,
            linear,
            rewrite.add(f"{linear.name}.weight.int{self.bits}", packed, weights.size),
            rewrite.add(f"{linear.name}.weight.scales", scales),
        )


def quantize(
    weights: _Floats, moments: _Floats, block_size: int, bits: int = 4
) -> tuple[NDArray[np.int8], _Floats]:
    """Weights [rows, in] as signed integers [rows, in padded to whole blocks], and the
    scale of each block, [rows, blocks]. `moments` [in, in] are those of the inputs.

    Columns are rounded in the order of how much their inputs weigh; the scales are fixed before.
    """
    rows, width = weights.shape
    padded = np.pad(weights, ((0, 0), (0, -width % block_size)))
    weights_of = np.pad(np.diag(moments), (0, -width % block_size)).reshape(1, -1)
    importance = np.repeat(weights_of, rows, axis=0).reshape(-1, block_size)
    scales = best_scales(padded.reshape(-1, block_size), bits, importance).reshape(rows, -1)
    order = np.argsort(-np.diag(moments), kind="stable")
    left = weights[:, order].copy()
    upper = _inverse_factor(moments[np.ix_(order, order)])
    rounded, half = np.zeros_like(padded), 2 ** (bits - 1)
    for start in range(0, width, _COLUMNS):
        stop = min(start + _COLUMNS, width)
        errors = np.empty((rows, stop - start), np.float32)
        for column in range(start, stop):
            place = order[column]
            scale = scales[:, place // block_size]
            integers = np.clip(np.rint(left[:, column] / scale), -half, half - 1)
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
