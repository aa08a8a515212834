"""What is done to logits before a token is chosen, against what it means spelled out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lifecycle.engines.penalties import Adjustments, Floats, continuations
from lifecycle.engines.requests import FinishReason, SamplingParams
from lifecycle.engines.sampling import Sampler
from tests.engines.toy import EOS, VOCAB, ToyEngine, continuation

SIZE = 12
TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=40)
LOGITS = np.random.default_rng(3).normal(0, 3, SIZE).astype(np.float32)


def adjusted(
    params: dict[str, Any], prompt: Sequence[int], output: Sequence[int], ends: Sequence[int] = ()
) -> Floats:
    """What becomes of `LOGITS` after an output whose tokens came one by one."""
    adjustments = Adjustments(SamplingParams(**params), prompt, SIZE, frozenset(ends))
    for token in output:
        adjustments.apply(LOGITS)
        adjustments.note(token)
    before = LOGITS.copy()
    found = adjustments.apply(LOGITS)
    np.testing.assert_array_equal(LOGITS, before)
    at_once = Adjustments(SamplingParams(**params), prompt, SIZE, frozenset(ends), output)
    np.testing.assert_array_equal(at_once.apply(LOGITS), found)
    unasked = Adjustments(SamplingParams(**params), prompt, SIZE, frozenset(ends))
    for token in output:
        unasked.note(token)
    np.testing.assert_array_equal(unasked.apply(LOGITS), found)
    return found


@settings(deadline=None, max_examples=60)
@given(prompt=TEXTS, output=st.lists(st.integers(0, 3), max_size=20))
def test_presence_and_frequency_count_the_output_alone(
    prompt: list[int], output: list[int]
) -> None:
    found = adjusted({"presence_penalty": 0.5, "frequency_penalty": -0.25}, prompt, output)
    wanted = [
        logit - (0.5 - 0.25 * output.count(token) if token in output else 0)
        for token, logit in enumerate(LOGITS.tolist())
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def spelled_out(text: list[int], breakers: frozenset[int]) -> dict[int, int]:
    """How long the repetition is that each token would continue."""
    found: dict[int, int] = {}
    for place in range(len(text) - 1):
        length = 0
        while length <= place and text[place - length] == text[-1 - length] not in breakers:
            length += 1
        token = text[place + 1]
        if length and token not in breakers:
            found[token] = max(found.get(token, 0), length)
    return found


@settings(deadline=None, max_examples=200)
@given(text=TEXTS, breakers=st.frozensets(st.integers(0, 3), max_size=2))
def test_repetitions_are_found_as_long_as_they_are(
    text: list[int], breakers: frozenset[int]
) -> None:
    tokens, lengths = continuations(np.array(text), breakers)
    found: dict[int, int] = {}
    for token, length in zip(tokens.tolist(), lengths.tolist(), strict=True):
        found[token] = max(found.get(token, 0), length)
    assert found == spelled_out(text, breakers)


@settings(deadline=None, max_examples=60)
@given(prompt=TEXTS, output=st.lists(st.integers(0, 3), max_size=20))
def test_the_repetition_penalty_reads_prompt_and_output(
    prompt: list[int], output: list[int]
) -> None:
    found = adjusted({"repetition_penalty": 1.5}, prompt, output)
    wanted = [
        logit * (1.5 if logit < 0 else 1 / 1.5) if token in {*prompt, *output} else logit
        for token, logit in enumerate(LOGITS.tolist())
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(prompt=TEXTS, output=st.lists(st.integers(0, 3), max_size=20))
def test_dry_takes_more_the_longer_the_repetition(prompt: list[int], output: list[int]) -> None:
    params = {"dry_multiplier": 0.8, "dry_base": 1.5, "dry_allowed_length": 2}
    found = adjusted(params, prompt, output)
    wanted = LOGITS.astype(np.float64)
    for token, length in spelled_out([*prompt, *output], frozenset()).items():
        wanted[token] -= 0.8 * 1.5 ** (length - 2) if length >= 2 else 0
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_dry_of_a_very_long_repetition_is_finite_and_quick() -> None:
    params = SamplingParams(dry_multiplier=100.0, dry_base=100.0)
    adjustments = Adjustments(params, [1] * 5000, SIZE, frozenset())
    found = adjustments.apply(LOGITS)
    assert np.isfinite(found).all() and found[1] < -1e29
    assert (np.delete(found, 1) == np.delete(LOGITS, 1)).all()


def test_a_bias_is_added_first_and_a_ban_comes_last() -> None:
    params = {"logit_bias": {3: 100.0, 5: -2.5}, "banned_token_ids": frozenset({3})}
    found = adjusted(params, [0], [])
    assert found[3] == -np.inf and found[5] == LOGITS[5] - np.float32(2.5)
    # A bias that makes a logit positive is divided by the penalty, as any positive logit.
    found = adjusted({"logit_bias": {3: 50.0}, "repetition_penalty": 2.0}, [3], [])
    assert found[3] == (LOGITS[3] + 50) / 2


def test_ends_may_not_come_before_min_tokens() -> None:
    params = {"min_tokens": 2}
    for output, may_end in (([], False), ([1], False), ([1, 1], True)):
        found = adjusted(params, [0], output, ends=(7, 9))
        assert np.isfinite(found[[7, 9]]).all() == may_end


def test_where_no_token_is_left_none_is_chosen() -> None:
    only = np.full(SIZE, -np.inf, np.float32)
    only[4] = 1.0
    sampler = Sampler(SamplingParams(banned_token_ids=frozenset({4})), [0], SIZE)
    assert sampler.choose(only) is None


def test_a_request_runs_on_to_its_min_tokens() -> None:
    engine = ToyEngine.make(max_model_len=64)
    prompt = next([p] for p in range(1, VOCAB) if len(continuation([p], 30)) < 3)
    params = SamplingParams(min_tokens=8, max_tokens=20)
    (found,) = engine.generate([prompt], params)
    assert len(found.token_ids) >= 8 and EOS not in found.token_ids[:8]


def test_a_stop_sequence_ends_the_output_that_ends_with_it() -> None:
    whole = next(text for p in range(1, VOCAB) if len(text := [p, *continuation([p], 20)]) > 6)
    prompt, rest = whole[:1], whole[1:]
    params = SamplingParams(max_tokens=20, stop_sequences=((99 % VOCAB,) * 9, tuple(rest[1:3])))
    (found,) = ToyEngine.make(max_model_len=64).generate([prompt], params)
    assert list(found.token_ids) == rest[:3] and found.finish_reason is FinishReason.STOP
    # What the prompt ends with is no part of the output.
    params = SamplingParams(max_tokens=4, stop_sequences=((*prompt, rest[0]),))
    (found,) = ToyEngine.make(max_model_len=64).generate([prompt], params)
    assert list(found.token_ids) == rest[:4] and found.finish_reason is FinishReason.LENGTH


def test_dry_lets_a_turn_end_as_the_one_before_did() -> None:
    found = adjusted({"dry_multiplier": 1.0}, [5, 6, 7, 9, 5, 6], [], ends=(7,))
    np.testing.assert_array_equal(found, LOGITS)
    assert adjusted({"dry_multiplier": 1.0}, [5, 6, 7, 9, 5, 6], [])[7] == LOGITS[7] - 1


def test_no_stop_sequence_counts_before_min_tokens() -> None:
    whole = next(text for p in range(1, VOCAB) if len(text := [p, *continuation([p], 20)]) > 6)
    params = SamplingParams(max_tokens=5, min_tokens=3, stop_sequences=((whole[2],),))
    (found,) = ToyEngine.make(max_model_len=64).generate([whole[:1]], params)
    assert len(found.token_ids) >= 3


@pytest.mark.parametrize("name", ["repetition_penalty", "dry_multiplier"])
def test_a_request_that_waits_takes_no_memory_for_its_penalties(name: str) -> None:
    params: dict[str, Any] = {name: 1.1}
    Sampler(SamplingParams(**params), range(10**15), vocab_size=10**15)
