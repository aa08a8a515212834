"""Each option of sampling, by how often tokens are drawn: chi-square against chances that come from
transformers' own processors, or are spelled out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from lifecycle.engines import asking
from lifecycle.engines.draft_model import Draft, DraftModel
from lifecycle.engines.pace import Pace
from lifecycle.engines.requests import SamplingParams
from lifecycle.engines.sampling import Sampler, choose, scan
from tests.engines.toy import VOCAB, ToyBackend, ToyEngine, next_token

Chances = NDArray[np.float64]

SIZE, DRAWS = 30, 3000
LOGITS = np.random.default_rng(2).normal(0, 1.2, SIZE).astype(np.float32)
PROMPT, OUTPUT, ENDS = [1, 2, 3, 4, 9, 2, 3, 5, 1, 2], [26, 26, 1, 2, 3], frozenset({7, 10})
"""Of the text, "1 2 3" came before 4, and "2 3" also before 5."""
LEAST = 1e-3
"""Seeds are fixed, so that a right distribution is always this probable and a wrong one never."""


class Take(LogitsProcessor):
    """Takes something from the logits of tokens."""

    def __init__(self, amounts: dict[int, float]) -> None:
        self.amounts = amounts

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for token, amount in self.amounts.items():
            scores[:, token] -= amount
        return scores


BIAS = SequenceBiasLogitsProcessor([[[4], 1.5], [[11], -2.0]])
PRESENCE = Take(dict.fromkeys(OUTPUT, 1.5))
FREQUENCY = Take({token: 1.2 * count for token, count in Counter(OUTPUT).items()})
DRY = Take({4: 0.8 * 1.75, 5: 0.8})
BANS = SuppressTokensLogitsProcessor([4, 12])
NO_ENDS = MinNewTokensLengthLogitsProcessor(len(PROMPT), len(OUTPUT) + 1, sorted(ENDS))

CASES: dict[str, tuple[dict[str, Any], list[LogitsProcessor]]] = {
    "temperature": ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
    "top_k": ({"top_k": 6}, [TopKLogitsWarper(6)]),
    "top_p": ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
    "min_p": ({"min_p": 0.15}, [MinPLogitsWarper(0.15)]),
    "min_p of top_p": (
        {"top_p": 0.98, "min_p": 0.15},
        [TopPLogitsWarper(0.98), MinPLogitsWarper(0.15)],
    ),
    "typical_p": ({"typical_p": 0.5}, [TypicalLogitsWarper(0.5)]),
    "repetition_penalty": (
        {"repetition_penalty": 1.8},
        [RepetitionPenaltyLogitsProcessor(1.8)],
    ),
    "presence_penalty": ({"presence_penalty": 1.5}, [PRESENCE]),
    "frequency_penalty": ({"frequency_penalty": 1.2}, [FREQUENCY]),
    "dry_multiplier": ({"dry_multiplier": 0.8}, [DRY]),
    "logit_bias": ({"logit_bias": {4: 1.5, 11: -2.0}}, [BIAS]),
    "banned_token_ids": ({"banned_token_ids": frozenset({4, 12})}, [BANS]),
    "min_tokens": ({"min_tokens": len(OUTPUT) + 1}, [NO_ENDS]),
    "all": (
        {
            "logit_bias": {4: 1.5, 11: -2.0},
            "repetition_penalty": 1.3,
            "presence_penalty": 1.5,
            "frequency_penalty": 1.2,
            "dry_multiplier": 0.8,
            "min_tokens": len(OUTPUT) + 1,
            "temperature": 1.4,
            "top_k": 20,
            "top_p": 0.95,
            "min_p": 0.05,
            "typical_p": 0.8,
        },
        [
            *(BIAS, RepetitionPenaltyLogitsProcessor(1.3), PRESENCE, FREQUENCY, DRY, NO_ENDS),
            *(TemperatureLogitsWarper(1.4), TopKLogitsWarper(20), TopPLogitsWarper(0.95)),
            *(MinPLogitsWarper(0.05), TypicalLogitsWarper(0.8)),
        ],
    ),
}


def chances(processors: Sequence[LogitsProcessor]) -> Chances:
    """Of the tokens behind PROMPT and OUTPUT."""
    text = torch.tensor([[*PROMPT, *OUTPUT]])
    scores = torch.tensor(LOGITS.astype(np.float64))[None]
    for processor in processors:
        scores = processor(text, scores)
    return torch.softmax(scores[0], 0).numpy()


def probability(counts: NDArray[np.int64], expected: Chances) -> float:
    """How probable counts are that are at least as far from their chances as these, by chi-square. What is
    expected fewer than five times counts as one."""
    if counts[expected == 0].any():
        return 0.0
    wanted = expected * counts.sum()
    rare = wanted < 5
    found = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(wanted[~rare], wanted[rare].sum())
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    statistic = ((found - wanted) ** 2 / wanted).sum()
    halves = torch.tensor([len(found) - 1, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(halves[0], halves[1]))


def draw(params: SamplingParams) -> int:
    """The next token of a request."""
    sampler = Sampler(params, PROMPT, SIZE, ENDS)
    for token in OUTPUT:
        sampler.note(token)
    choice = choose(scan(LOGITS[None]), 0, sampler)
    assert choice is not None
    return choice.token_id


@pytest.mark.parametrize("name", CASES)
def test_tokens_come_as_often_as_the_option_says(name: str) -> None:
    options, processors = CASES[name]
    drawn = [
        draw(SamplingParams(**{"temperature": 1.0, **options, "seed": seed}))
        for seed in range(DRAWS)
    ]
    counts = np.bincount(drawn, minlength=SIZE)
    assert probability(counts, chances(processors)) > LEAST
    # It would be seen if the option were passed over.
    assert probability(counts, chances([])) < LEAST / 1000


def test_an_end_may_come_when_min_tokens_have() -> None:
    options = {"temperature": 1.0, "min_tokens": len(OUTPUT)}
    drawn = [draw(SamplingParams(**options, seed=seed)) for seed in range(DRAWS)]
    counts = np.bincount(drawn, minlength=SIZE)
    assert counts[sorted(ENDS)].all() and probability(counts, chances([])) > LEAST


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses take no time, so that as many are made as may be."""
    monkeypatch.setattr(Pace, "decode_seconds", lambda self, num_tokens: 1.0)
    monkeypatch.setattr(DraftModel, "ask_seconds", lambda self, num_requests: 0.0)
    monkeypatch.setattr(asking, "_LONGEST_REST", 0)


# Whatever comes behind its end has come before, and 5 and 6 after that.
QUOTED = [token for first in range(VOCAB) for token in (9, first, 5, 6)] + [9]
DRAWN: dict[str, Any] = {
    "max_tokens": 4,
    "temperature": 0.8,
    "frequency_penalty": 1.2,
    "ignore_eos": True,
    "logit_bias": {5: 1.5, 6: 1.0},
}


def toy_chances(prompt: Sequence[int], output: Sequence[int]) -> Chances:
    """Of the toy's next token by `DRAWN`."""
    scores = np.zeros(VOCAB)
    scores[next_token([*prompt, *output])] += 1.0
    scores[[5, 6]] += 1.5, 1.0
    for token in output:
        scores[token] -= DRAWN["frequency_penalty"]
    weights = np.exp(scores / 0.8)
    return weights / weights.sum()


@pytest.mark.parametrize(("prompt", "agreement"), [(QUOTED, None), ([1, 2, 3], 0.5)])
def test_guessed_tokens_come_as_often_as_others(
    always: None, prompt: list[int], agreement: float | None
) -> None:
    """By prompt lookup and by a draft model. Two tokens after each other are looked at, since those drawn
    by one random number would each be as frequent as they should."""
    draft = None if agreement is None else Draft(ToyBackend(agreement), 80)
    batch, rounds = 500, 8
    engine = ToyEngine.make(batch, 80, 80, draft=draft, draft_tokens=3)
    found: list[tuple[int, ...]] = []
    for n in range(rounds):
        seeds = range(n * batch, (n + 1) * batch)
        params = [SamplingParams(**DRAWN, seed=seed) for seed in seeds]
        found += [one.token_ids for one in engine.generate([prompt] * batch, params)]
    stats = engine.stats
    assert stats.draft_tokens > len(found)
    assert 0.02 < stats.accepted_tokens / stats.draft_tokens < 0.98

    tokens = np.array(found)
    pairs = toy_chances(prompt, [])[:, None] * [toy_chances(prompt, [a]) for a in range(VOCAB)]
    later = sum(
        pairs[a, :, None] * [toy_chances(prompt, [a, b]) for b in range(VOCAB)]
        for a in range(VOCAB)
    )
    for place, expected in enumerate((pairs, later)):
        cells = tokens[:, place] * VOCAB + tokens[:, place + 1]
        counts = np.bincount(cells, minlength=VOCAB**2)
        assert probability(counts, np.ravel(expected)) > LEAST
