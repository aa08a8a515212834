from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lifecycle.training.batches import Batches, in_parts
from lifecycle.training.settings import LoopSettings


@given(
    rows=st.integers(1, 60),
    size=st.integers(1, 20),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_every_epoch_has_every_row_once(rows: int, size: int, epochs: int, seed: int) -> None:
    batches = Batches(rows, LoopSettings(batch_size=size, epochs=epochs, seed=seed))
    seen = np.concatenate([batches.at(step) for step in range(batches.total)])
    assert seen.size == rows * epochs
    for epoch in seen.reshape(epochs, rows):
        assert sorted(epoch) == list(range(rows))


def test_a_step_is_the_same_whatever_was_asked_before() -> None:
    settings = LoopSettings(batch_size=4, epochs=5, seed=3)
    walked, jumped = Batches(30, settings), Batches(30, settings)
    steps = [walked.at(step) for step in range(walked.total)]
    for step in reversed(range(walked.total)):
        assert np.array_equal(jumped.at(step), steps[step])


def test_epochs_and_seeds_have_their_own_order() -> None:
    batches = Batches(64, LoopSettings(batch_size=64, epochs=2))
    other = Batches(64, LoopSettings(batch_size=64, epochs=2, seed=1))
    assert not np.array_equal(batches.at(0), batches.at(1))
    assert not np.array_equal(batches.at(0), other.at(0))


def test_steps_replace_epochs() -> None:
    assert Batches(10, LoopSettings(batch_size=4, epochs=9, steps=5)).total == 5


@given(count=st.integers(1, 40), size=st.none() | st.integers(1, 50))
def test_parts_are_the_whole(count: int, size: int | None) -> None:
    parts = list(in_parts(np.arange(count), size))
    assert np.array_equal(np.concatenate(parts), np.arange(count))
    assert all(len(part) <= (size or count) for part in parts)
