"""GPTQ (arXiv 2210.17323): each column's rounding error is spread over the columns that are yet to be
rounded, so that the product's output on calibration texts changes least. What is rounded makes up
for the errors of the products before it, too (QEP, arXiv 2504.09629; GPTAQ, arXiv 2504.02692)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.heap import trim_heap
from lifecycle.graph import rounding
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.calibration import Calibration, Inputs, require_finite
from lifecycle.graph.descent import refine
from lifecycle.graph.experts import common_grid, store_experts
from lifecycle.graph.rewrite import GraphRewrite, Linear, Mixture
from lifecycle.graph.rounding import Blocks, Fit, Floats, Grid, Packed
from lifecycle.graph.routing import gated

_DAMPING = 0.01
"""Part of the mean of the diagonal that is added to it, so that it can be inverted."""
_COMPENSATED = 0.5
"""Part of earlier errors that is made up for: all would fit the calibration texts too closely."""
_DOUBT = 2.0
"""Tokens for each input of an expert with which the products of two of its inputs count half."""
_COLUMNS = 128
"""Columns whose errors are collected before those behind them are changed."""


@dataclass(frozen=True, kw_only=True)
class Gptq(Blockwise):
    """`Blockwise` with the products of the layers, and the experts of mixtures, rounded by what they read; the
    embedding, and a head that is the same matrix, are rounded as `Blockwise` does."""

    calibration: Calibration

    def linear(self, rewrite: GraphRewrite, linear: Linear) -> None:
        """Replace one product."""
        blocks = self.settled(rewrite, linear)
        self.product(rewrite, linear, self._add(rewrite, linear.name, blocks.pack(), linear.shape))

    def settled(self, rewrite: GraphRewrite, linear: Linear) -> Blocks:
        """The weights of a product as they will be stored, made up for by those behind it."""
        blocks = self.rounded_product(rewrite, linear)
        self.calibration.replace(linear.name, blocks.floats(linear.shape[1]))
        return blocks

    def rounded_product(self, rewrite: GraphRewrite, linear: Linear) -> Blocks:
        """The weights of a product as they will be stored; in the order of the graph."""
        weights = np.concatenate(list(rewrite.blocks(linear.weight)))
        inputs = self.calibration.inputs(linear.name)
        if inputs is None:
            moments = self.calibration.second_moments(linear.name)
        else:
            weights, moments = compensating(weights, inputs), inputs.moments
        # What was missed is as large as the moments, and not needed any more.
        del inputs
        trim_heap()
        grid = self.grid.fitting([self.grid.largest(weights)])
        return quantize(weights, moments, grid, self.fit)

    def experts(self, rewrite: GraphRewrite, mixture: Mixture) -> None:
        """Replace a mixture, each of its experts rounded for the tokens that visit it, and plainly if none does."""
        grid = common_grid(mixture, self.grid)
        grids = [rewrite.fitted(grid, weight) for weight in (mixture.gate_up, mixture.down)]
        routed = self.calibration.routed(mixture.name)

        def rounded(expert: int) -> list[Packed]:
            visits = routed.visits(expert)
            gate_up, down = (rewrite.expert(w, expert) for w in (mixture.gate_up, mixture.down))
            read = (visits.rows, gated(visits.rows, gate_up))
            require_finite(dict(enumerate(read)), f"what expert {expert} of {mixture.name} reads")
            matrices = zip((gate_up, down), read, grids, strict=True)
            return [self._visited(w, x, visits.shares, own).pack() for w, x, own in matrices]

        # One after the other: moments of all would take more memory than their weights.
        made = map(rounded, range(mixture.num_experts))
        gate_up, down = map(Packed.joined, zip(*made, strict=True))
        store_experts(rewrite, mixture, grid, gate_up, down)

    def _visited(self, weights: Floats, rows: Floats, shares: Floats, grid: Grid) -> Blocks:
        """Weights of an expert, rounded for what they read."""
        if not len(rows):
            return rounding.quantize(weights, grid, self.fit)
        return quantize(weights, expert_moments(rows, shares), grid, self.fit)


def expert_moments(rows: Floats, shares: Floats) -> Floats:
    """The second moments [in, in] of what an expert reads, [tokens, in], each token by what the expert's output for
    it is multiplied by, [tokens, 1]. What few tokens say of two channels together counts less than what they say of
    each by itself, or weights would be rounded for these tokens alone."""
    weighed: Floats = rows * shares
    count, width = rows.shape
    moments = weighed.T @ weighed / np.float32(count)
    diagonal = np.diag(moments).copy()
    moments *= np.float32(count / (count + _DOUBT * width))
    np.fill_diagonal(moments, diagonal)
    return moments


def compensating(weights: Floats, inputs: Inputs) -> Floats:
    """Weights [out, in] that give, from inputs with errors, more of what `weights` give from those without,
    and of what is missing in what their output is added to."""
    missed = weights @ inputs.missed
    if inputs.missed_beside is not None:
        missed += inputs.missed_beside
    wanted = np.linalg.solve(_damped(inputs.moments), missed.T).T
    return (weights + _COMPENSATED * wanted).astype(np.float32)


def quantize(weights: Floats, moments: Floats, grid: Grid, fit: Fit) -> Blocks:
    """Weights [rows, in] rounded for inputs with the second moments `moments` [in, in].

    Columns are rounded in the order of how much their inputs weigh; scales and zeros are fixed
    before, for errors that are weighed likewise.
    """
    rows, width = weights.shape
    importance = np.tile(grid.split(np.diag(moments)[None]), (rows, 1))
    found = (a.reshape(rows, -1) for a in fit(grid.split(weights), grid, importance))
    scales, zeros = found
    scales = grid.storable(scales)
    order = np.argsort(-np.diag(moments), kind="stable")
    left = weights[:, order].copy()
    damped = _damped(moments)
    sorted_moments, damped = damped[np.ix_(order, order)], damped.astype(np.float32)
    upper = _inverse_factor(sorted_moments)
    del sorted_moments
    rounded = np.repeat(zeros, grid.block_size, axis=1)
    for start in range(0, width, _COLUMNS):
        stop = min(start + _COLUMNS, width)
        errors = np.empty((rows, stop - start), np.float32)
        for column in range(start, stop):
            place = order[column]
            scale, zero = (a[:, place // grid.block_size] for a in (scales, zeros))
            integers = grid.round(left[:, column], scale, zero)
            rounded[:, place] = integers
            error = (left[:, column] - (integers - zero) * scale) / upper[column, column]
            left[:, column:stop] -= error[:, None] * upper[column, column:stop]
            errors[:, column - start] = error
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    blocks = Blocks.of(grid, rows, rounded, scales, zeros)
    return refine(weights, blocks, damped)


def _damped(moments: Floats) -> NDArray[np.float64]:
    """Moments that can be inverted."""
    damped = moments.astype(np.float64)
    diagonal = np.diag(damped).copy()
    mean = diagonal.mean() or 1.0
    # What is never read may be rounded at will.
    diagonal[diagonal == 0] = mean
    np.fill_diagonal(damped, diagonal + _DAMPING * mean)
    return damped


def _inverse_factor(damped: NDArray[np.float64]) -> Floats:
    """The upper factor U of the inverse, UᵀU = damped⁻¹."""
    inverse = np.linalg.inv(damped)
    # In place: for a wide product each of these is as large as its layer.
    inverse += inverse.T
    inverse /= 2
    return np.linalg.cholesky(inverse).T.astype(np.float32)
