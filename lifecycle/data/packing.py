"""Tokens into rows without padding between them, and without one sample seeing another.

A model that restarts its positions inside a row must be run without an attention mask: then
transformers derives a block-diagonal mask from the positions, and samples stay apart.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lifecycle.errors import DataError

IGNORED = -100
"""The label of a token that is not trained."""

Sample = tuple[Sequence[int], Sequence[bool]]
"""Token ids, and whether each is trained."""


@dataclass(frozen=True)
class Packed:
    """Rows of tokens, each array int64 [rows, context_length]."""

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    """Restart at 0 with each sample, and with the padding at the end of a row."""
    labels: NDArray[np.int64]
    """The token itself where it is trained, else `IGNORED`; not shifted."""


@dataclass(frozen=True)
class PackedSamples(Packed):
    """Rows of whole samples, and what became of those that did not fit."""

    truncated: int
    """Samples longer than a row that were cut off."""
    too_long: int
    """Samples longer than a row that were left out."""
    unsupervised: int
    """Samples left out because nothing of them is trained."""


def pack_samples(
    samples: Iterable[Sample],
    context_length: int,
    pad_id: int,
    on_long: Literal["truncate", "drop"] = "truncate",
) -> PackedSamples:
    """Put whole samples into rows, the longest first, each where it leaves the least space
    (best-fit decreasing); the same samples always give the same rows.

    Raises:
        DataError: nothing is left to train on.
    """
    kept: list[Sample] = []
    count = {"truncated": 0, "too_long": 0, "unsupervised": 0}
    for ids, trained in samples:
        long = len(ids) > context_length
        if long and on_long == "drop":
            count["too_long"] += 1
        elif not any(trained[1:context_length]):
            count["unsupervised"] += 1
        else:
            count["truncated"] += long
            kept.append((ids[:context_length], trained[:context_length]))
    if not kept:
        raise DataError(
            f"no sample has a token to train on within {context_length} tokens "
            f"({count['too_long']} too long, {count['unsupervised']} without such a token)"
        )
    rows = [[kept[i] for i in row] for row in best_fit([len(s[0]) for s in kept], context_length)]
    return PackedSamples(*_arrays(rows, context_length, pad_id), **count)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The indices of `lengths`, grouped so that no group's sum is above `capacity`."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(free, (lengths[index], -1))
        if at == len(free):
            rows.append([])
            space, row = capacity, len(rows) - 1
        else:
            space, row = free.pop(at)
        rows[row].append(index)
        insort(free, (space - lengths[index], row))
    return rows


def _arrays(
    rows: Sequence[Sequence[Sample]], context_length: int, pad_id: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    shape = (len(rows), context_length)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for row, samples in enumerate(rows):
        start = 0
        for ids, trained in samples:
            end = start + len(ids)
            input_ids[row, start:end] = ids
            position_ids[row, start:end] = np.arange(len(ids))
            labels[row, start:end] = np.where(trained, ids, IGNORED)
            # Its prediction would come from the last token of the sample before it.
            labels[row, start] = IGNORED
            start = end
        position_ids[row, start:] = np.arange(context_length - start)
    return input_ids, position_ids, labels


def pack_documents(documents: Iterable[Sequence[int]], context_length: int, eos_id: int) -> Packed:
    """Documents one after another, each followed by `eos_id`, cut into rows in which every
    token is trained but the first. The rest that fills no row is left out.

    Raises:
        DataError: there is not even one row.
    """
    parts = [np.asarray([*ids, eos_id], dtype=np.int64) for ids in documents]
    stream = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    rows = len(stream) // context_length
    if not rows:
        raise DataError(
            f"the text has {len(stream)} tokens, fewer than one row of {context_length}"
        )
    input_ids = stream[: rows * context_length].reshape(rows, context_length)
    labels = input_ids.copy()
    labels[:, 0] = IGNORED
    position_ids = np.tile(np.arange(context_length), (rows, 1))
    return Packed(input_ids, position_ids, labels)
