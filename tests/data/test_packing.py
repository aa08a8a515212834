from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifecycle.data.packing import IGNORED, Packed, best_fit, pack_documents, pack_samples
from lifecycle.errors import DataError

PAD = 0
CONTEXT = 12
FLAGS = st.lists(st.booleans(), min_size=1, max_size=CONTEXT + 6)


def samples_of(flags: list[list[bool]]) -> list[tuple[list[int], list[bool]]]:
    """Samples in which every token occurs once."""
    token = iter(range(1, 10_000))
    return [([next(token) for _ in row], row) for row in flags]


def unpacked(packed: Packed) -> list[tuple[list[int], list[int]]]:
    """The samples of the rows again: ids and labels; a sample begins where positions do."""
    found: list[tuple[list[int], list[int]]] = []
    for ids, positions, labels in zip(
        packed.input_ids, packed.position_ids, packed.labels, strict=True
    ):
        starts = [*np.flatnonzero(positions == 0), CONTEXT]
        for start, end in pairwise(starts):
            assert positions[start:end].tolist() == list(range(end - start))
            assert labels[start] == IGNORED
            found.append((ids[start:end].tolist(), labels[start:end].tolist()))
    return [sample for sample in found if sample[0][0] != PAD]


@given(st.lists(FLAGS, max_size=30), st.sampled_from(["truncate", "drop"]))
def test_no_token_is_lost_or_doubled_and_no_label_crosses(
    flags: list[list[bool]], on_long: str
) -> None:
    samples = samples_of(flags)
    long = [sample for sample in samples if len(sample[0]) > CONTEXT]
    rest = [s for s in samples if on_long == "truncate" or len(s[0]) <= CONTEXT]
    expected = [(ids[:CONTEXT], flag[:CONTEXT]) for ids, flag in rest if any(flag[1:CONTEXT])]
    if not expected:
        with pytest.raises(DataError, match="no sample has a token to train on"):
            pack_samples(samples, CONTEXT, PAD, on_long)  # type: ignore[arg-type]
        return
    packed = pack_samples(samples, CONTEXT, PAD, on_long)  # type: ignore[arg-type]
    assert sorted(unpacked(packed)) == sorted(
        (ids, [IGNORED, *(t if f else IGNORED for t, f in zip(ids[1:], flag[1:], strict=True))])
        for ids, flag in expected
    )
    assert packed.unsupervised == len(rest) - len(expected)
    assert packed.too_long == (len(long) if on_long == "drop" else 0)
    assert packed.truncated == sum(len(ids) == CONTEXT for ids, _ in expected) - sum(
        len(s[0]) == CONTEXT and any(s[1][1:]) for s in samples
    )


@given(st.lists(st.integers(1, 20), max_size=60))
def test_best_fit_places_each_once_within_the_capacity(lengths: list[int]) -> None:
    rows = best_fit(lengths, 20)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 20 for row in rows)
    # Two rows of it never fit into one.
    sums = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(sums) < 2 or sums[0] + sums[1] > 20


@given(st.lists(st.lists(st.integers(1, 9), max_size=9), max_size=20))
def test_documents_are_one_stream_with_an_end_after_each(documents: list[list[int]]) -> None:
    stream = [token for ids in documents for token in [*ids, 99]]
    if len(stream) < CONTEXT:
        with pytest.raises(DataError, match=f"has {len(stream)} tokens, fewer than one row of 12"):
            pack_documents(documents, CONTEXT, 99)
        return
    packed = pack_documents(documents, CONTEXT, 99)
    rows = packed.input_ids.ravel().tolist()
    assert rows == stream[: len(rows)] and len(stream) - len(rows) < CONTEXT
    assert (packed.labels[:, 1:] == packed.input_ids[:, 1:]).all()
    assert (packed.labels[:, 0] == IGNORED).all()
    assert (packed.position_ids == np.arange(CONTEXT)).all()
