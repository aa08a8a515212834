"""Zero points by Half-Quadratic Quantization (Badri and Shaji, 2023,
https://mobiusml.github.io/hqq_blog/): without calibration, to an error in which few large weights
count less than in a squared one."""

from __future__ import annotations

import numpy as np

from lifecycle.graph.rounding import Floats, Grid

_NORM = 0.7
"""The power of the errors that are added up."""
_BETA = 10.0
"""How much the auxiliary errors are held to the true ones at first, with errors in steps."""
_GROWTH = 1.01
_STEPS = 20


def fit(blocks: Floats, grid: Grid, importance: Floats | None = None) -> tuple[Floats, Floats]:
    """The scale of each block from its span, and the zero that the solver finds, rounded, for the
    fast operators take no others; [blocks] each. Weights of zero importance count as none."""
    low, high = blocks.min(axis=1), blocks.max(axis=1)
    scales = (high - low) / np.float32(grid.levels)
    scales[scales == 0] = 1
    steps = blocks / scales[:, None]
    zeros = -low / scales
    beta = _BETA
    for _ in range(_STEPS):
        integers = np.clip(np.rint(steps + zeros[:, None]), 0, grid.levels)
        error = steps - (integers - zeros[:, None])
        large = np.abs(error)
        shrunk = np.sign(error) * np.maximum(large - (large + 1e-8) ** (_NORM - 1) / beta, 0)
        zeros = (integers - (steps - shrunk)).mean(axis=1)
        beta *= _GROWTH
    return scales, np.clip(np.rint(zeros), 0, grid.levels)
