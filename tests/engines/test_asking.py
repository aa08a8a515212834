"""Where guesses of a draft model do not pay they cost little, by a clock that only steps move."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from lifecycle.engines.backend import Row
from lifecycle.engines.draft_model import Draft
from lifecycle.engines.drafts import Lookup
from lifecycle.engines.requests import SamplingParams
from tests.engines.clock import StepClock
from tests.engines.toy import VOCAB, ToyBackend, ToyEngine


def timed(
    clock: StepClock, step: float, token: float, agreement: float = 1.0, before: float = 0.0
) -> ToyBackend:
    """A toy whose steps take time as `StepClock.times` says."""
    backend = ToyBackend(agreement)
    clock.times(backend, step, token, before)
    return backend


def speed(
    monkeypatch: pytest.MonkeyPatch,
    agreement: float,
    *,
    batch: int = 1,
    prompt: int = 20,
    output: int = 400,
    rounds: int = 10,
    cost: float = 0.2,
    token: float = 0.002,
    before: float = 0.0,
) -> float:
    """How many times as fast requests are with a draft model that takes `cost` of the time of a model whose steps take
    0.02 seconds, `token` for each token more than one, and `before` for each that stands before them."""
    prompts = [[1 + (n * 7 + i) % 16 for i in range(prompt)] for n in range(rounds)]
    params = SamplingParams(max_tokens=output, ignore_eos=True)
    seconds: list[float] = []
    texts: list[object] = []
    for has_draft in (False, True):
        clock = StepClock(monkeypatch)
        guesser = timed(clock, cost * 0.02, cost * token, agreement, cost * before)
        engine = ToyEngine.make(
            batch,
            2048,
            128,
            backend=timed(clock, 0.02, token, before=before),
            draft=Draft(guesser, 2048) if has_draft else None,
            draft_tokens=6 if has_draft else 0,
        )
        texts.append(engine.generate(prompts, params))
        seconds.append(clock.now)
    assert texts[0] == texts[1]
    return seconds[0] / seconds[1]


@pytest.mark.parametrize("batch", [1, 4])
def test_guesses_that_never_come_cost_little(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    assert speed(monkeypatch, 0.0, batch=batch) >= 0.97


def test_a_text_is_not_computed_for_less_than_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert speed(monkeypatch, 1.0, prompt=1000, output=20) >= 0.97


def test_guesses_that_come_are_worth_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert speed(monkeypatch, 1.0) > 2
    assert speed(monkeypatch, 0.8, batch=4, rounds=20) > 1.1
    assert speed(monkeypatch, 0.8, prompt=300, rounds=6) > 1.2
    # A text that takes many steps to be computed saves nothing while it is.
    assert speed(monkeypatch, 1.0, prompt=1500, output=300, rounds=3, cost=0.1) > 1.3


@pytest.mark.parametrize(
    ("batch", "agreement", "token"),
    [(1, 0.2, 0.004), (4, 0.5, 0.004), (8, 0.5, 0.002), (8, 0.6, 0.004)],
)
@pytest.mark.parametrize("before", [0.0001, 0.0003])
def test_new_requests_are_not_measured_by_old_ones(
    monkeypatch: pytest.MonkeyPatch, batch: int, agreement: float, token: float, before: float
) -> None:
    """Steps grow with their texts, by 2 and 4 times over 200 tokens, and begin anew."""
    given = {"output": 200, "rounds": 5 * batch, "token": token, "before": before / batch}
    assert speed(monkeypatch, agreement, batch=batch, **given) >= 0.975  # type: ignore[arg-type]


class Scripted(ToyBackend):
    """Says a text, whatever it reads."""

    def __init__(self, text: Sequence[int]) -> None:
        super().__init__()
        self.text = text

    def _row(self, row: Row) -> NDArray[np.float32]:
        size = len(self.extend(row))
        logits = np.zeros((row.num_logits, VOCAB), dtype=np.float32)
        for back in range(row.num_logits):
            logits[-1 - back, self.text[size - back]] = 1.0
        return logits


def test_where_nothing_repeats_texts_are_looked_at_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[int] = []
    guess = Lookup.guess

    def counted(lookup: Lookup, tokens: Sequence[int], most: int) -> list[int]:
        looks.append(len(tokens))
        clock.now += 0.0005
        return guess(lookup, tokens, most)

    monkeypatch.setattr(Lookup, "guess", counted)
    novel, pairs = [1], set[tuple[int, int]]()
    while new := [n for n in range(1, VOCAB) if (novel[-1], n) not in pairs]:
        pairs.add((novel[-1], new[-1]))
        novel.append(new[-1])
    text = [*novel, *novel[40:140], *novel[:10]]
    told = len(novel)
    clock = StepClock(monkeypatch)
    backend = Scripted(text)
    clock.times(backend, 0.02, 0.002)
    engine = ToyEngine.make(1, 1024, backend=backend, draft_tokens=6)
    params = SamplingParams(max_tokens=len(text) - 2, ignore_eos=True)
    generation = engine.generate([text[:2]], params)[0]
    assert list(generation.token_ids) == text[2:]
    assert sum(size < told for size in looks) < 20 + told / 4
    # The quotation is found within some steps, and then told in large ones.
    assert engine.stats.steps < told + 45


def test_guesses_are_worth_more_where_texts_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        speed(monkeypatch, 0.7, batch=4, rounds=20, output=200, before=before / 4)
        for before in (0.0, 0.0001, 0.0003)
    ]
    assert 0.97 < found[0] < found[1] < found[2]
    assert found[1] > 1.12
    assert found[2] > 1.2


def test_a_model_that_begins_to_agree_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StepClock(monkeypatch)
    guesser = timed(clock, 0.004, 0.0004, agreement=0.0)
    engine = ToyEngine.make(
        1, 1024, backend=timed(clock, 0.02, 0.002), draft=Draft(guesser, 1024), draft_tokens=6
    )
    params = SamplingParams(max_tokens=300, ignore_eos=True)
    engine.generate([[n] * 4 for n in range(1, 5)], params)
    guesser.agreement = 1.0
    engine.generate([[n] * 4 for n in range(5, 10)], params)
    before = engine.stats
    engine.generate([[10] * 4], params)
    after = engine.stats
    assert after.generated_tokens - before.generated_tokens > 2 * (after.steps - before.steps)


def test_prompts_are_no_loss_of_the_draft_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short answers to long prompts: the steps of the next prompt are none of its own."""
    clock = StepClock(monkeypatch)
    guesser = timed(clock, 0.004, 0.00001)
    engine = ToyEngine.make(
        1, 1024, 128, backend=timed(clock, 0.02, 0.002), draft=Draft(guesser, 1024), draft_tokens=6
    )
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    guessed: list[int] = []
    for _ in range(4):
        before = engine.stats.draft_tokens
        engine.generate([[1 + n % 9] * 300 for n in range(150)], params)
        guessed.append(engine.stats.draft_tokens - before)
    assert min(guessed) > 60


def test_a_moment_of_a_busy_machine_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first steps with guesses take ten times as long; later guesses are worth it all the same."""
    clock = StepClock(monkeypatch)
    guesser = timed(clock, 0.002, 0.0002)
    backend = timed(clock, 0.02, 0.0005)
    engine = ToyEngine.make(
        4, 1024, 128, backend=backend, draft=Draft(guesser, 1024), draft_tokens=6
    )
    forward, slow = backend.forward, [2]

    def busy(rows: Sequence[Row]) -> NDArray[np.float32]:
        if slow[0] and sum(len(row.tokens) for row in rows) > 4 and rows[0].start > 3:
            slow[0] -= 1
            clock.now += 0.2
        return forward(rows)

    backend.forward = busy
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    for _ in range(2):
        engine.generate([[n] * 4 for n in range(1, 9)], params)
    assert slow[0] == 0
    before = engine.stats
    engine.generate([[n] * 4 for n in range(9, 17)], params)
    after = engine.stats
    assert after.generated_tokens - before.generated_tokens > 8 * (after.steps - before.steps)
