"""Scores of continuations and of prompts, against transformers and the PyTorch engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lifecycle.engines import progress
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.batched import BatchedEngine
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.pytorch import TorchEngine
from lifecycle.engines.requests import PromptLogprob, Request, SamplingParams
from lifecycle.engines.sampling import Floats
from lifecycle.engines.state import RequestState
from lifecycle.training.models import load_model
from tests.engines.clock import StepClock
from tests.engines.conftest import Model
from tests.engines.toy import ToyEngine

LENGTHS = ((1, 1), (3, 40), (40, 3), (31, 33), (64, 1), (1, 90))
"""Of contexts and continuations, around chunks of 32."""
OPTIONS = EngineOptions(3, 128, 1, 32, prefix_cache_bytes=1 << 20, draft_tokens=3)


@pytest.fixture(scope="module")
def pairs() -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(0)
    text = rng.integers(3, 512, 128).tolist()
    found = [(text[:a], rng.integers(3, 512, b).tolist()) for a, b in LENGTHS]
    # Equal contexts, one whose prompt is the other's.
    return [
        *found,
        (text[:40], found[1][1][:9]),
        (text[:20], text[20:70]),
        (text[:60], text[60:70]),
    ]


def logprobs(model: Model, text: list[int]) -> np.ndarray:
    """transformers' log-softmax after each token, [tokens, vocab]."""
    with torch.inference_mode():
        logits = load_model(model.checkpoint)(torch.tensor([text])).logits[0]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


@pytest.mark.parametrize("kind", [OnnxEngine, TorchEngine])
def test_scores_are_those_of_transformers(
    kind: type[BatchedEngine], stories: Model, pairs: list[tuple[list[int], list[int]]]
) -> None:
    engine = kind.open(stories.graph if kind is OnnxEngine else stories.checkpoint, OPTIONS)
    # The greedy continuation is the one that is greedy.
    greedy = engine.generate([pairs[2][0]], SamplingParams(max_tokens=9, ignore_eos=True))[0]
    pairs = [*pairs, (pairs[2][0], list(greedy.token_ids))]
    # Twice: from the prefix cache the second time.
    for found in (engine.score(pairs), engine.score(pairs)):
        for (context, continuation), score in zip(pairs, found, strict=True):
            rows = logprobs(stories, [*context, *continuation])[len(context) - 1 : -1]
            wanted = sum(row[token] for row, token in zip(rows, continuation, strict=True))
            assert score.logprob == pytest.approx(wanted, abs=2e-3)
            assert score.is_greedy == (rows.argmax(axis=1) == continuation).all()
        assert [score.is_greedy for score in found][-1]


@pytest.mark.parametrize("kind", [OnnxEngine, TorchEngine])
@pytest.mark.parametrize("first", [1, 32, 50])
def test_logprobs_of_a_prompt_are_those_of_transformers(
    kind: type[BatchedEngine], first: int, stories: Model, pairs: list[tuple[list[int], list[int]]]
) -> None:
    engine = kind.open(stories.graph if kind is OnnxEngine else stories.checkpoint, OPTIONS)
    text = [*pairs[3][0], *pairs[3][1]]
    params = SamplingParams(max_tokens=2, prompt_logprobs=3, prompt_logprobs_from=first)
    plain = SamplingParams(max_tokens=2)
    engine.submit(Request("scored", text, params))
    # Beside it a prompt that is the same.
    engine.submit(Request("twin", text, plain))
    found: tuple[PromptLogprob, ...] = ()
    tokens: dict[str, list[int | None]] = {"scored": [], "twin": []}
    while engine.num_running or engine.num_waiting:
        for event in engine.step():
            found += event.prompt_logprobs
            tokens[event.request_id].append(event.token_id)
    assert tokens["scored"] == tokens["twin"]
    rows = logprobs(stories, text)[first - 1 : -1]
    assert len(found) == len(rows) == len(text) - first
    for row, token, part in zip(rows, text[first:], found, strict=True):
        assert part.logprob == pytest.approx(row[token], abs=1e-3)
        best = np.sort(row)[::-1]
        assert best[part.rank - 1] == pytest.approx(row[token], abs=1e-4)
        assert [value for _, value in part.top_logprobs] == pytest.approx(best[:3], abs=1e-3)


def test_what_scoring_takes_counts_as_time_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, clock = ToyEngine.make(2, 200, 8, max_stall=2.0), StepClock(monkeypatch)
    clock.times(engine.backend, 1.0, 0.01)
    real = progress._score

    def slow(state: RequestState, logits: Floats, count: int) -> int:
        clock.now += 0.1 * len(logits)
        return real(state, logits, count)

    monkeypatch.setattr(progress, "_score", slow)
    engine.submit(Request("a", [8], SamplingParams(max_tokens=190, ignore_eos=True)))
    engine.step()
    engine.step()
    engine.submit(Request("b", [5] * 150, SamplingParams(max_tokens=1, prompt_logprobs=0)))
    while "b" in engine._scheduler:
        engine.step()
    rows = [row for rows in engine.backend.steps for row in rows if row.slot == 1]
    # A chunk before that is known; later what goes into the time that others may wait.
    assert len(rows[0].tokens) == 8 and max(len(row.tokens) for row in rows[8:]) <= 8 // 2 + 3
    assert engine._pace.prompt_token_seconds > 0.05
