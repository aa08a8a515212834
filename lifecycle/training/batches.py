"""Which rows a step trains on: a function of seed, epoch and step, and of nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lifecycle.data.packing import Packed
from lifecycle.training.settings import LoopSettings


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of `Packed` that are computed at once, each tensor int64 [rows, context_length]."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor


def batch_of(rows: Packed, indices: NDArray[np.int64], device: torch.device) -> Batch:
    """Some rows, on a device."""
    arrays = (rows.input_ids, rows.position_ids, rows.labels)
    return Batch(*(torch.from_numpy(array[indices]).to(device) for array in arrays))


class Batches:
    """The rows of each optimiser step. An epoch is a new order of all rows; its last step may
    have fewer."""

    def __init__(self, rows: int, settings: LoopSettings) -> None:
        self._rows, self._seed, self._size = rows, settings.seed, settings.batch_size
        self._per_epoch = math.ceil(rows / settings.batch_size)
        self.total = settings.steps or settings.epochs * self._per_epoch
        """Optimiser steps in all."""

    def at(self, step: int) -> NDArray[np.int64]:
        """The indices of a step's rows, counted from step 0."""
        epoch, place = divmod(step, self._per_epoch)
        start = place * self._size
        return _order(self._rows, self._seed, epoch)[start : start + self._size]


@lru_cache(maxsize=2)
def _order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def in_parts(indices: NDArray[np.int64], size: int | None) -> Iterator[NDArray[np.int64]]:
    """Consecutive parts of at most `size` indices; None is all at once."""
    size = size or len(indices)
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
