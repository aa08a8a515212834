"""Sampling against transformers' own filters, and against the chances it should give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lifecycle.engines.requests import SamplingParams
from lifecycle.engines.sampling import Choice, Sampler, choose, scan, token_weights

VOCAB = 40
filters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.1, 0.7, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 3, 10, VOCAB, 1000]),
        "top_p": st.sampled_from([0.05, 0.5, 0.9, 0.99, 1.0]),
        "min_p": st.sampled_from([0.0, 0.02, 0.3, 1.0]),
        "typical_p": st.sampled_from([0.05, 0.4, 0.9, 1.0]),
    }
)


def random_logits(seed: int, rows: int = 1, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, vocab)).astype(np.float32)


def sample(logits: np.ndarray, samplers: list[Sampler]) -> list[Choice | None]:
    """One choice per row, as the engine makes them."""
    rows = scan(logits)
    with np.errstate(over="ignore"):
        return [choose(rows, at, sampler) for at, sampler in enumerate(samplers)]


def pick(logits: np.ndarray, params: SamplingParams, prompt: list[int] | None = None) -> Choice:
    choice = sample(logits[None], [Sampler(params, prompt or [0], len(logits))])[0]
    assert choice is not None
    return choice


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 2**32 - 1), chosen=filters)
def test_the_filters_are_those_of_transformers(seed: int, chosen: dict[str, float]) -> None:
    import torch
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        TypicalLogitsWarper,
    )

    params = SamplingParams(**chosen)  # type: ignore[arg-type]
    logits = random_logits(seed)[0]
    expected = TemperatureLogitsWarper(params.temperature)(None, torch.tensor(logits)[None])
    if params.top_k:
        expected = TopKLogitsWarper(params.top_k)(None, expected)
    if params.top_p < 1:
        expected = TopPLogitsWarper(params.top_p)(None, expected)
    if params.min_p:
        expected = MinPLogitsWarper(params.min_p)(None, expected)
    if params.typical_p < 1:
        before = torch.softmax(expected[0], dim=0).double()
        expected = TypicalLogitsWarper(params.typical_p)(None, expected)
        surprise = -before.log()
        order = (surprise - (before * surprise).nansum()).abs().argsort(stable=True)
        assume((before[order].cumsum(0) - params.typical_p).abs().min() > 1e-5)
    probabilities = torch.softmax(expected[0], dim=0).numpy()

    weights = token_weights(logits, params)
    found = weights / weights.sum()
    # A share that equals the bound to the last bit may fall on either side.
    assume(np.abs(np.cumsum(np.sort(probabilities)[::-1]) - params.top_p).min() > 1e-6)
    np.testing.assert_allclose(found, probabilities, atol=1e-5)


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32 - 1), penalty=st.sampled_from([0.5, 1.1, 2.0]))
def test_the_penalty_is_that_of_transformers(seed: int, penalty: float) -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = random_logits(seed)[0]
    seen = np.random.default_rng(seed).integers(0, VOCAB, 12).tolist()
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([seen]), torch.tensor(logits)[None])[0].argmax()
    assert pick(logits, SamplingParams(repetition_penalty=penalty), seen).token_id == expected


def test_the_penalty_counts_what_was_generated() -> None:
    logits = np.array([2.0, 1.9, 1.8, -5.0], dtype=np.float32)
    sampler = Sampler(SamplingParams(repetition_penalty=1.2), [3], 4)
    assert [sampler.choose(logits) for _ in range(3)] == [0, 1, 2]
    assert logits.tolist() == np.array([2.0, 1.9, 1.8, -5.0], dtype=np.float32).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1e-30])
def test_greedy_takes_the_first_of_equals(temperature: float) -> None:
    logits = np.array([0.0, 3.0, 1.0, 3.0], dtype=np.float32)
    assert pick(logits, SamplingParams(temperature=temperature)).token_id == 1


@pytest.mark.parametrize("chosen", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}])
def test_the_narrowest_filters_leave_the_best(chosen: dict[str, float]) -> None:
    logits = random_logits(3)[0]
    params = SamplingParams(temperature=1.0, **chosen)  # type: ignore[arg-type]
    assert np.flatnonzero(token_weights(logits, params)).tolist() == [logits.argmax()]


def test_top_k_keeps_the_lower_ids_among_equals() -> None:
    logits = np.array([1.0, 2.0, 1.0, 1.0], dtype=np.float32)
    weights = token_weights(logits, SamplingParams(temperature=1.0, top_k=3))
    assert np.flatnonzero(weights).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.3, seed=5),
        SamplingParams(temperature=0.8, top_p=0.8, seed=6),
        SamplingParams(temperature=1.0, top_k=6, min_p=0.05, seed=7),
        SamplingParams(temperature=1.0, typical_p=0.7, seed=8),
    ],
)
def test_tokens_come_as_often_as_they_should(params: SamplingParams) -> None:
    # More tokens than the sampler sums up in one block.
    logits = random_logits(11, vocab=600)[0] / 2
    weights = token_weights(logits, params)
    draws = 20_000
    sampler = Sampler(params, [0], len(logits))
    counts = np.bincount([sampler.choose(logits) for _ in range(draws)], minlength=len(logits))
    expected = draws * weights / weights.sum()
    assert counts[weights == 0].sum() == 0
    # The chi-square statistic needs about five expected draws of each: the rest counts as one.
    rare = expected < 5
    found = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    chi_square = float(((found - wanted) ** 2 / wanted).sum())
    # Mean n - 1 and variance 2 (n - 1): five deviations are far beyond chance.
    freedom = len(found) - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("vocab", [100, 129, 1000, 49_152, 50_257])
def test_top_k_of_a_large_vocabulary(vocab: int) -> None:
    """Ways that look at less than all tokens keep what a sort keeps, the lower ids among equals."""
    rng = np.random.default_rng(vocab)
    spread = rng.standard_normal(vocab).astype(np.float32)
    masked = np.where(rng.random(vocab) < 0.7, np.float32(-np.inf), spread)
    for logits in (spread, np.round(spread), masked):
        for count in (1, 2, 40, 90):
            weights = token_weights(logits, SamplingParams(temperature=1.0, top_k=count))
            expected = np.lexsort((np.arange(vocab), -logits))[:count]
            possible = expected[np.isfinite(logits[expected])]
            assert np.array_equal(np.flatnonzero(weights), np.sort(possible))


def test_a_seed_gives_the_same_tokens_beside_any_neighbours() -> None:
    logits = random_logits(1, rows=30)
    params = SamplingParams(temperature=1.0, seed=42)

    def tokens(position: int, width: int) -> list[int]:
        samplers = [Sampler(SamplingParams(temperature=1.5), [0], VOCAB) for _ in range(width)]
        samplers[position] = Sampler(params, [0], VOCAB)
        out: list[int] = []
        for row in logits:
            batch = random_logits(len(out), rows=width)
            batch[position] = row
            choice = sample(batch, samplers)[position]
            assert choice is not None
            out.append(choice.token_id)
        return out

    alone = tokens(0, 1)
    assert tokens(0, 5) == tokens(3, 5) == alone
    assert len(set(alone)) > 5


def test_requests_without_a_seed_differ() -> None:
    logits = np.zeros(VOCAB, dtype=np.float32)
    params = SamplingParams(temperature=1.0)
    first, second = Sampler(params, [0], VOCAB), Sampler(params, [0], VOCAB)
    assert [first.choose(logits) for _ in range(30)] != [second.choose(logits) for _ in range(30)]


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**64 - 1])
def test_every_seed_of_the_protocol_works(seed: int) -> None:
    params = SamplingParams(temperature=1.0, seed=seed)
    assert pick(random_logits(2)[0], params) == pick(random_logits(2)[0], params)


def test_logprobs_are_the_models_own() -> None:
    logits = random_logits(4)[0]
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    params = SamplingParams(temperature=3.0, seed=1, top_k=5, repetition_penalty=1.5, logprobs=3)
    choice = pick(logits, params)
    assert choice.logprob == pytest.approx(expected[choice.token_id], abs=1e-5)
    best = np.argsort(-expected)[:3]
    assert [id for id, _ in choice.top_logprobs] == best.tolist()
    assert [p for _, p in choice.top_logprobs] == pytest.approx(expected[best].tolist(), abs=1e-5)
    alone = pick(logits, SamplingParams(logprobs=0))
    assert alone.logprob == pytest.approx(expected.max(), abs=1e-5) and alone.top_logprobs == ()
    assert pick(logits, SamplingParams()).logprob is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_has_no_next_token(bad: float, temperature: float) -> None:
    logits = random_logits(5, rows=3)
    logits[1, 7] = bad
    samplers = [Sampler(SamplingParams(temperature=temperature), [0], VOCAB) for _ in range(3)]
    choices = sample(logits, samplers)
    assert choices[1] is None and choices[0] is not None and choices[2] is not None
    logits[1] = -np.inf
    assert sample(logits, samplers)[1] is None


def test_masked_logits_are_never_drawn() -> None:
    lowest = np.finfo(np.float32).min
    for mask in (-np.inf, lowest):
        logits = np.full(VOCAB, mask, dtype=np.float32)
        logits[[3, 8]] = 1.0
        params = SamplingParams(temperature=0.5, repetition_penalty=1.3, logprobs=2, seed=9)
        choices = {pick(logits, params, prompt=[1]).token_id for _ in range(20)}
        assert choices <= {3, 8}


def test_a_tie_at_the_edge_of_the_typical_goes_to_the_first() -> None:
    # The most typical is the fifth; of the four behind it, which are equal, the share leaves room for two.
    logits = np.log(np.array([0.2, 0.2, 0.2, 0.2, 0.199, 0.001], np.float32))
    weights = token_weights(logits, SamplingParams(temperature=1.0, typical_p=0.55))
    assert np.flatnonzero(weights).tolist() == [0, 1, 4]
    whole = token_weights(logits, SamplingParams(temperature=1.0, typical_p=1 - 1e-12))
    assert np.count_nonzero(whole) == 6
