"""Passes over logits by the kernels' library, where engines have it: in a fraction of the time."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.requests import SamplingParams
from lifecycle.engines.sampling import Passes, Place, Scan, draw_token

Floats = NDArray[np.float32]

Columns = tuple[Floats, Place]
"""The columns of logits (see `Scan`), and where both are."""

_COLUMN = 64
"""Logits of a column, as in columns.h."""
_SIZE, _POINTER = ctypes.c_size_t, ctypes.c_void_p


def num_columns(size: int) -> int:
    """How many columns so many logits have."""
    return -(-size // _COLUMN)


def native_passes(
    library: Path, columns_of: Callable[[Floats], Columns | None] = lambda logits: None
) -> Passes:
    """What `sampling` does by numpy, computed by a library that is loaded already. `columns_of` are those of logits
    (see `Scan`), if a graph has told them.

    Weights differ in their last bits, and with them a token in some millions of draws.
    """
    functions = ctypes.CDLL(str(library))
    scan_rows, draw_row = functions.lifecycle_scan, functions.lifecycle_draw
    mask_row = functions.lifecycle_mask
    mask_row.argtypes, mask_row.restype = [_POINTER, _POINTER, _SIZE, _POINTER], ctypes.c_int64
    scan_rows.argtypes = [_POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER, ctypes.c_int]
    scan_rows.restype = None
    doubles = [ctypes.c_double] * 3
    draw_row.argtypes = [_POINTER, _SIZE, _POINTER, ctypes.c_float, _SIZE, *doubles]
    draw_row.restype = ctypes.c_int64

    best, tops = np.empty(0, np.int64), np.empty(0, np.float32)
    places = 0, 0
    allowed, allowed_place = np.empty(0, np.float32), 0

    def scan(logits: Floats) -> Scan:
        nonlocal best, tops, places
        count, size = logits.shape
        if (known := columns_of(logits)) is not None:
            columns, first = known
        else:
            logits = np.ascontiguousarray(logits, np.float32)
            columns = np.empty((count, num_columns(size)), np.float32)
            first = _at(logits), _at(columns)
        if count > len(best):
            best, tops = np.empty(count, np.int64), np.empty(count, np.float32)
            places = _at(best), _at(tops)
        scan_rows(first[0], count, size, *places, first[1], known is not None)
        return Scan(logits, best[:count].tolist(), tops[:count].tolist(), columns, first)

    def draw(
        logits: Floats, params: SamplingParams, uniform: float, place: Place | None = None
    ) -> int:
        if params.typical_p < 1.0:
            return draw_token(logits, params, uniform)
        size = len(logits)
        if place is None:
            logits = np.ascontiguousarray(logits, np.float32)
        at, columns = place or (_at(logits), None)
        # A number that has no room in the library's would become another one.
        top_k = min(params.top_k, size)
        filters = params.temperature, top_k, params.top_p, params.min_p
        token = draw_row(at, size, columns, *filters, uniform)
        if token < 0:
            raise MemoryError("no memory to choose a token")
        return token

    def mask(logits: Floats, mask: NDArray[np.bool_]) -> tuple[Floats, int]:
        nonlocal allowed, allowed_place
        logits, size = np.ascontiguousarray(logits, np.float32), len(logits)
        if size != len(allowed):
            # One for all: pages of new memory take as long as what is written into them.
            allowed = np.empty(size, np.float32)
            allowed_place = _at(allowed)
        return allowed, mask_row(_at(logits), _at(np.ascontiguousarray(mask)), size, allowed_place)

    return Passes(scan, draw, mask)


def _at(array: NDArray[np.generic]) -> int:
    """Where a contiguous array is."""
    # In a third of the time of `array.ctypes.data`.
    return array.__array_interface__["data"][0]
