"""Lays the rows of a step out as the inputs of a decoder graph (see `decoder`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.backend import Row

MIN_WIDTH = 2
"""GroupQueryAttention has a kernel of its own for steps in which every row has one token; its
sums run in another order than those of the general kernel. A request would decode through the
one or the other depending on whether a neighbour prefills, and its tokens could differ from
those it gets alone. With rows laid out at least two wide the general kernel always runs, and
its results do not depend on the width."""

Inputs = dict[str, NDArray[np.int64] | NDArray[np.int32]]


def pack(
    rows: Sequence[Row], max_model_len: int, long_offset: int = 0, num_slots: int | None = None
) -> Inputs:
    """The integer inputs of one step; row b of the graph is slot b, idle where `rows` has none.

    `max_model_len` is the most tokens that a row can have, `long_offset` what is added to the
    positions of long texts. There are `num_slots` rows, or as many as to the last one of `rows`.
    """
    num_slots = num_slots or max(row.slot for row in rows) + 1
    width = max(MIN_WIDTH, *(len(row.tokens) for row in rows))
    total = sum(len(row.tokens) for row in rows)
    input_ids = np.empty(total, dtype=np.int64)
    position_ids = np.empty((total, 1), dtype=np.int64)
    pad_index = np.zeros((num_slots, width), dtype=np.int64)
    unpad_index = np.empty((total, 2), dtype=np.int64)
    seqlens_k = np.zeros(num_slots, dtype=np.int32)
    query_seqlens = np.zeros(num_slots, dtype=np.int32)
    logit_index: list[int] = []
    begin = 0
    for row in rows:
        count = len(row.tokens)
        end = begin + count
        input_ids[begin:end] = row.tokens
        first = row.start + long_offset * row.is_long
        position_ids[begin:end, 0] = np.arange(first, first + count)
        pad_index[row.slot, :count] = np.arange(begin, end)
        unpad_index[begin:end, 0] = row.slot
        unpad_index[begin:end, 1] = np.arange(count)
        seqlens_k[row.slot] = row.start + count - 1
        query_seqlens[row.slot] = count
        logit_index.extend(range(end - row.num_logits, end))
        begin = end
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "pad_index": pad_index,
        "unpad_index": unpad_index,
        "logit_index": np.array(logit_index, dtype=np.int64),
        "seqlens_k": seqlens_k,
        "query_seqlens": query_seqlens,
        "total_sequence_length": np.array([max_model_len], dtype=np.int32),
    }


def advance(inputs: Inputs, rows: Sequence[Row], long_offset: int = 0) -> None:
    """Turn the inputs of a decoding step, one token per row, into those of the next one over the
    same slots: only tokens and positions move on."""
    slots, starts = [row.slot for row in rows], [row.start for row in rows]
    inputs["input_ids"][:] = [row.tokens[0] for row in rows]
    inputs["position_ids"][:, 0] = starts
    if long_offset:
        inputs["position_ids"][:, 0] += [long_offset * row.is_long for row in rows]
    inputs["seqlens_k"][slots] = starts
