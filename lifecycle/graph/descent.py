"""Rounded weights made better one column and one scale at a time (QuantEase, arXiv 2309.01885, and least
squares of the scales): no step makes what the product gives on calibration texts worse."""

from __future__ import annotations

import numpy as np

from lifecycle.graph.rounding import Blocks, Floats

_PASSES = 4
_COLUMNS = 128
"""Columns whose changes are collected before those behind them hear of them."""


def refine(weights: Floats, blocks: Blocks, moments: Floats, passes: int = _PASSES) -> Blocks:
    """`blocks` for `weights` [rows, in] with integers and scales for which the squared error of the
    product, tr(E·moments·Eᵀ) with E the error of the weights, is less or equal. `moments` [in, in]
    have no zero on the diagonal."""
    state = _State(weights, blocks, moments)
    for _ in range(passes):
        state.round_columns()
        state.fit_scales()
    return state.blocks()


class _State:
    def __init__(self, weights: Floats, blocks: Blocks, moments: Floats) -> None:
        self._grid, self._moments = blocks.grid, moments
        self._rows, self._width = weights.shape
        self._scales, self._zeros = blocks.scales.copy(), blocks.zeros.astype(np.float32)
        integers = blocks.integers.astype(np.float32)
        self._centred = (integers - self._zeros[:, :, None]).reshape(self._rows, -1)
        self._gradient = (weights - blocks.floats(self._width)) @ moments
        """How much less error there is, by how much more of each weight."""

    def blocks(self) -> Blocks:
        grid, zeros = self._grid, self._zeros
        integers = self._centred + np.repeat(zeros, grid.block_size, axis=1)
        return Blocks.of(grid, self._rows, integers, self._scales, zeros)

    def round_columns(self) -> None:
        """Round each column anew to where the others as they are want it."""
        size, gradient, moments = self._grid.block_size, self._gradient, self._moments
        for start in range(0, self._width, _COLUMNS):
            stop = min(start + _COLUMNS, self._width)
            changes = np.empty((self._rows, stop - start), np.float32)
            for column in range(start, stop):
                block = column // size
                scale, zero = self._scales[:, block], self._zeros[:, block]
                old = self._centred[:, column]
                wanted = old * scale + gradient[:, column] / moments[column, column]
                new = self._grid.round(wanted, scale, zero) - zero
                change = (new - old) * scale
                self._centred[:, column] = new
                gradient[:, start:stop] -= change[:, None] * moments[column, start:stop]
                changes[:, column - start] = change
            gradient[:, :start] -= changes @ moments[start:stop, :start]
            gradient[:, stop:] -= changes @ moments[start:stop, stop:]

    def fit_scales(self) -> None:
        """Give each scale its least squares, the others as they are."""
        size = self._grid.block_size
        for block in range(self._scales.shape[1]):
            part = slice(block * size, min((block + 1) * size, self._width))
            centred = self._centred[:, part]
            curve = np.einsum("ij,ij->i", centred @ self._moments[part, part], centred)
            slope = np.einsum("ij,ij->i", centred, self._gradient[:, part])
            step = np.divide(slope, curve, out=np.zeros_like(slope), where=curve > 0)
            # A scale of zero would make of a block what no later step can change.
            old = self._scales[:, block]
            new = self._grid.storable(old + step)
            new = np.where(new == 0, old, new)
            step = new - old
            self._scales[:, block] = new
            self._gradient -= (step[:, None] * centred) @ self._moments[part]
