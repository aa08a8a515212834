from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lifecycle.data.split import held_out_keys, is_held_out

KEYS = st.lists(st.text(max_size=5), max_size=40)
FRACTIONS = st.floats(0, 0.99)


@given(KEYS, KEYS, FRACTIONS, st.integers(0, 3))
def test_adding_rows_moves_no_other_row(
    keys: list[str], more: list[str], fraction: float, seed: int
) -> None:
    before = held_out_keys(keys, fraction, seed)
    assert before == held_out_keys(keys + more, fraction, seed) & set(keys)


@given(st.text(), FRACTIONS, FRACTIONS)
def test_a_larger_fraction_holds_out_all_that_a_smaller_one_does(
    key: str, a: float, b: float
) -> None:
    assert is_held_out(key, min(a, b)) <= is_held_out(key, max(a, b))


@given(KEYS, st.integers(1, 50))
def test_a_number_holds_out_that_many_rows_and_keeps_copies_together(
    keys: list[str], number: int
) -> None:
    held_out = held_out_keys(keys, number)
    rows = [key for key in keys if key in held_out]
    largest = max((keys.count(key) for key in held_out), default=0)
    assert min(number, len(keys)) <= len(rows) < number + max(largest, 1)
    assert held_out == held_out_keys(keys[::-1], number)


def test_the_fraction_is_met_and_seeds_differ() -> None:
    keys = [str(i) for i in range(20_000)]
    assert abs(len(held_out_keys(keys, 0.1)) / 20_000 - 0.1) < 0.01
    both = held_out_keys(keys, 0.1) & held_out_keys(keys, 0.1, seed=1)
    assert abs(len(both) / 20_000 - 0.01) < 0.005
