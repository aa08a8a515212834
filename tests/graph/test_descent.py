"""No step of the refinement makes the output worse."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from lifecycle.graph.descent import refine
from lifecycle.graph.rounding import Blocks, Grid, least_squares, quantize

Floats = NDArray[np.float32]


def problem(width: int, seed: int) -> tuple[Floats, Floats]:
    """Weights, and moments of inputs that go together."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((width, width)) * np.geomspace(1, 0.05, width)
    inputs = random.standard_normal((4 * width, width)) @ mixing
    moments = inputs.T @ inputs / len(inputs) + 0.01 * np.eye(width)
    return random.standard_normal((6, width)).astype(np.float32), moments.astype(np.float32)


def output_error(weights: Floats, blocks: Blocks, moments: Floats) -> NDArray[np.float64]:
    """Of each row."""
    error = (weights - blocks.floats(weights.shape[1])).astype(np.float64)
    return np.einsum("ij,jk,ik->i", error, moments, error)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [40, 64, 300])
def test_every_pass_is_better_for_every_row(
    bits: Literal[4, 8], symmetric: bool, width: int
) -> None:
    weights, moments = problem(width, width)
    blocks = quantize(weights, Grid(32, bits, symmetric), least_squares)
    errors = [output_error(weights, blocks, moments)]
    for passes in (1, 2, 4):
        refined = refine(weights, blocks, moments, passes)
        assert refined.integers.max() < 2**bits
        assert (refined.integers.reshape(6, -1)[:, width:] == refined.zeros[:, -1:]).all()
        errors.append(output_error(weights, refined, moments))
    for before, after in zip(errors, errors[1:], strict=False):
        assert (after <= before * (1 + 1e-4)).all()
    assert errors[1].sum() < 0.7 * errors[0].sum()


def test_nothing_is_changed_where_nothing_is_wrong() -> None:
    _, moments = problem(64, 1)
    blocks = quantize(problem(64, 2)[0], Grid(32), least_squares)
    refined = refine(blocks.floats(64), blocks, moments)
    np.testing.assert_array_equal(refined.integers, blocks.integers)
    np.testing.assert_allclose(refined.scales, blocks.scales, rtol=1e-6)


def test_rows_of_zeros_stay_finite() -> None:
    _, moments = problem(64, 3)
    weights = np.zeros((2, 64), np.float32)
    refined = refine(weights, quantize(weights, Grid(32), least_squares), moments)
    assert not refined.floats(64).any()
    assert refined.scales.all()
