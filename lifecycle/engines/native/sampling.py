"""Passes over logits by the kernels' library, where engines have it: in a fraction of the time."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.requests import SamplingParams
from lifecycle.engines.sampling import Passes, Place, Scan, draw_token

Floats = NDArray[np.float32]

_SIZE, _POINTER = ctypes.c_size_t, ctypes.c_void_p


@lru_cache(maxsize=4)
def native_passes(library: Path) -> Passes:
    """What `sampling` does by numpy, computed by a library that is loaded already.

    Weights differ in their last bits, and with them a token in some millions of draws.
    """
    functions = ctypes.CDLL(str(library))
    scan_rows, draw_row = functions.lifecycle_scan, functions.lifecycle_draw
    num_columns = functions.lifecycle_columns
    num_columns.argtypes, num_columns.restype = [_SIZE], _SIZE
    scan_rows.argtypes = [_POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER]
    scan_rows.restype = None
    doubles = [ctypes.c_double] * 3
    draw_row.argtypes = [_POINTER, _SIZE, _POINTER, ctypes.c_float, _SIZE, *doubles]
    draw_row.restype = ctypes.c_int64

    def scan(logits: Floats) -> Scan:
        logits = np.ascontiguousarray(logits, np.float32)
        count, size = logits.shape
        best, tops = np.empty(count, np.int64), np.empty(count, np.float32)
        columns = np.empty((count, num_columns(size)), np.float32)
        first = _at(logits), _at(columns)
        scan_rows(first[0], count, size, _at(best), _at(tops), first[1])
        return Scan(logits, best.tolist(), tops.tolist(), columns, first)

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

    return Passes(scan, draw)


def _at(array: NDArray[np.generic]) -> int:
    """Where a contiguous array is."""
    # In a third of the time of `array.ctypes.data`.
    return array.__array_interface__["data"][0]
