from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lifecycle.engines.backend import Row
from lifecycle.engines.layout import advance, pack


def test_a_chunk_beside_a_decoding_row_and_an_idle_slot() -> None:
    inputs = pack([Row(2, 5, [11], 1), Row(0, 4, [21, 22, 23], 2)], max_model_len=64)
    assert inputs["input_ids"].tolist() == [11, 21, 22, 23]
    assert inputs["position_ids"].tolist() == [[5], [4], [5], [6]]
    assert inputs["query_seqlens"].tolist() == [3, 0, 1]
    assert inputs["seqlens_k"].tolist() == [6, 0, 5]
    assert inputs["logit_index"].tolist() == [0, 2, 3]
    assert inputs["total_sequence_length"].tolist() == [64]
    assert inputs["pad_index"].tolist() == [[1, 2, 3], [0, 0, 0], [0, 0, 0]]
    assert inputs["unpad_index"].tolist() == [[2, 0], [0, 0], [0, 1], [0, 2]]


def test_rows_are_two_wide_even_when_each_has_one_token() -> None:
    inputs = pack([Row(slot, 7, [slot], 1) for slot in range(3)], max_model_len=64)
    assert inputs["pad_index"].shape == (3, 2)


def test_a_step_may_want_no_logits() -> None:
    assert pack([Row(0, 0, [1, 2], 0)], max_model_len=8)["logit_index"].shape == (0,)


@given(slots=st.lists(st.integers(0, 9), min_size=1, unique=True), seed=st.integers(0, 99))
def test_a_decoding_step_moves_on_as_if_laid_out_anew(slots: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    starts, tokens = random.integers(0, 50, (2, len(slots))).tolist()
    first = [Row(slot, start, [1], 1) for slot, start in zip(slots, starts, strict=True)]
    second = [
        Row(row.slot, row.start + 1, [token], 1) for row, token in zip(first, tokens, strict=True)
    ]
    inputs = pack(first, max_model_len=64)
    advance(inputs, second)
    expected = pack(second, max_model_len=64)
    assert {k: v.tolist() for k, v in inputs.items()} == {
        k: v.tolist() for k, v in expected.items()
    }


rows = st.lists(
    st.tuples(st.integers(0, 50), st.lists(st.integers(0, 999), min_size=1, max_size=9)),
    min_size=1,
    max_size=6,
)


@given(texts=rows, seed=st.integers(0, 99))
def test_laying_out_and_packing_again_gives_the_tokens_back(
    texts: list[tuple[int, list[int]]], seed: int
) -> None:
    slots = np.random.default_rng(seed).permutation(8)[: len(texts)].tolist()
    inputs = pack(
        [Row(slot, start, tokens, 1) for slot, (start, tokens) in zip(slots, texts, strict=True)],
        max_model_len=64,
    )
    packed = inputs["input_ids"]
    per_row = packed[inputs["pad_index"]]
    for slot, (start, tokens) in zip(slots, texts, strict=True):
        assert per_row[slot, : len(tokens)].tolist() == tokens
        assert inputs["query_seqlens"][slot] == len(tokens)
        assert inputs["seqlens_k"][slot] == start + len(tokens) - 1
    assert per_row[tuple(inputs["unpad_index"].T)].tolist() == packed.tolist()
    assert inputs["query_seqlens"].sum() == len(packed)
    assert packed[inputs["logit_index"]].tolist() == [tokens[-1] for _, tokens in texts]
