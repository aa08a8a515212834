"""Factors that a constant of a graph is multiplied by when it is read."""

from __future__ import annotations

import numpy as np

from lifecycle.graph.rounding import Floats


class Factors:
    """Those of the rows and columns of a matrix [rows, columns], of the values of a vector, or of the rows of all
    experts of a mixture [experts, rows, columns] and of the columns of each; 1 at first."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        *outer, width = shape
        self._is_vector = not outer
        experts = outer[0] if len(outer) == 2 else 1
        self._rows = np.ones(np.prod(outer, dtype=int), np.float32)
        self._columns = np.ones((experts, width), np.float32)

    def multiply(self, rows: Floats | None, columns: Floats | None) -> None:
        """Factors of the rows, one expert's after the other's, or of a vector's values; and of the columns, [columns]
        or [experts, columns]."""
        if self._is_vector:
            rows, columns = None, rows
        if rows is not None:
            self._rows = self._rows * rows
        if columns is not None:
            self._columns = self._columns * columns

    def applied(self, block: Floats, row: int) -> Floats:
        """Rows of the constant from `row` on with their factors; a vector is one row."""
        places = np.arange(row, row + len(block))
        columns = self._columns
        if len(columns) > 1:
            columns = columns[places // (len(self._rows) // len(columns))]
        return block * self._rows[places, None] * columns
