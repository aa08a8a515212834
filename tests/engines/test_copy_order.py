"""Copies of texts are made in the order of ranks, and none keeps a prompt of lower rank from being computed."""

from __future__ import annotations

import pytest

from lifecycle.engines.requests import Request, SamplingParams
from tests.engines.test_parking import BACK, OUT, Slots
from tests.engines.texts import PARTS, PROMPT, Texts
from tests.engines.toy import ToyEngine


def steps_to_first_token(texts: Texts, id: str) -> int:
    count = 0
    while not texts.found[id]:
        texts.step()
        count += 1
    return count


def coming_back(monkeypatch: pytest.MonkeyPatch) -> Slots:
    """A text of which the first part is back, with two slots free."""
    texts = Slots(monkeypatch, slots=4)
    for n, id in enumerate(("third", "fourth")):
        texts.submit(id, [8, n], 200)
    texts.urge()
    while BACK[0] not in texts.moves:
        texts.step()
    for id in ("third", "fourth"):
        texts.engine.cancel(id)
    return texts


def test_what_comes_back_costs_a_prompt_of_lower_rank_no_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def steps(has_text: bool) -> int:
        texts = Slots(monkeypatch, slots=3)
        texts.submit("third", [8, 8], 200)
        texts.urge()
        while BACK[0] not in texts.moves:
            texts.step()
        if not has_text:
            texts.engine.cancel("late")
        texts.engine.cancel("third")
        texts.submit("prompt", [9] * 150, 3)
        before = len(texts.moves)
        count = steps_to_first_token(texts, "prompt")
        # A part comes with each of these steps all the same, until all is there.
        assert len(texts.moves) - before == (min(count, len(BACK) - 1) if has_text else 0)
        return count

    assert 1 < steps(has_text=False) == steps(has_text=True)


def test_what_goes_out_for_another_costs_a_prompt_of_lower_rank_no_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def steps(is_slot_wanted: bool) -> int:
        texts = Slots(monkeypatch, slots=3)
        texts.submit("prompt", [9] * 150, 3, priority=0)
        if is_slot_wanted:
            texts.urge()
        count = steps_to_first_token(texts, "prompt")
        assert len(texts.moves) == (min(count, len(OUT)) if is_slot_wanted else 0)
        return count

    assert 1 < steps(is_slot_wanted=False) == steps(is_slot_wanted=True)


def test_it_is_copied_at_once_for_one_of_lower_rank_than_the_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = Slots(monkeypatch, slots=3)
    texts.submit("prompt", [9] * 150, 3, priority=1)
    texts.step()
    texts.urge(priority=0)
    assert steps_to_first_token(texts, "urgent") == len(OUT)
    # Time that copies take is the prompt's loss then.
    assert not texts.found["prompt"]


def test_a_twin_of_lower_rank_goes_before_a_text_that_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = coming_back(monkeypatch)
    for id in ("t0", "t1"):
        texts.submit(id, PROMPT, 30)
    while not texts.found["t0"]:
        texts.step()
    moves = list(texts.moves)
    assert moves[-1] in BACK[:-1]
    while len(texts.backend.copies) < len(PARTS):
        assert texts.moves == moves
        texts.step()
    texts.finish()
    assert texts.moves == OUT + BACK


def test_a_slot_that_twins_copy_from_is_another_ones_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its request has ended; who waits for it, more urgent or not, is no reason to copy all in one step."""
    texts = Texts(monkeypatch, slots=4)
    texts.begin(30, 60, 60)
    texts.engine.cancel("t0")
    texts.submit("other", [7, 7, 7], 20, priority=-1)
    for count in range(1, len(PARTS)):
        before = texts.clock.now
        assert texts.step() == {"decodes"}
        assert len(texts.backend.copies) == count and texts.clock.now - before < 1.1
    # All three texts are held until then.
    assert texts.engine.stats.cache_tokens > 3 * len(PROMPT)
    assert "other" in texts.step()
    assert texts.backend.copies == [(1, 2, *part) for part in PARTS]
    assert {row.slot for row in texts.backend.steps[-1]} == {0, 1, 2}
    texts.finish()
    assert texts.backend.copies[len(PARTS) :] == [(2, 3, *part) for part in PARTS]
    assert texts.engine.stats.preemptions == 0


def test_who_waits_for_it_comes_before_a_text_that_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = coming_back(monkeypatch)
    for id in ("t0", "t1"):
        texts.submit(id, [6, 1, 6, 1], 30, priority=3)
    while not texts.found["t0"]:
        texts.step()
    moves = list(texts.moves)
    assert moves[-1] in BACK[:-1]
    # The twin alone would come after it.
    texts.engine.cancel("t0")
    texts.urge("next")
    texts.step()
    assert texts.moves == moves and len(texts.backend.copies) == 1
    assert texts.engine.num_waiting == 0
    texts.finish()
    assert texts.moves == OUT + BACK


def test_one_is_put_aside_while_the_last_one_is_yet_to_be_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts, prompt = Texts(monkeypatch, slots=5), PROMPT * 5
    texts.submit("decodes", [3, 2, 1], 200)
    texts.submit("other", [8, 8], 100, priority=2)
    for _ in range(4):
        texts.step()
    texts.copy_from_late(prompt, priority=3)
    while not texts.found["urgent 1"]:
        texts.step()
    assert len(texts.backend.copies) == 20
    assert {slot for _, slot, _, _ in texts.backend.moves} == {1}
    texts.finish()
    assert len(texts.found["late"]) == len(texts.found["twin"]) == 50


def test_no_more_is_aside_than_slots_may_hold() -> None:
    """Each request is more urgent than all before it."""
    engine, limit = ToyEngine.make(2, 24, 8), 12
    for n in range(20):
        params = SamplingParams(limit, ignore_eos=True)
        engine.submit(Request(str(n), [1 + n % 7] * 11, params, priority=-n))
        for _ in range(4):
            engine.step()
        states = engine._scheduler.states()  # pyright: ignore[reportPrivateUsage]
        assert sum(len(block) for state in states for block in state.parked) <= 2 * 24
        assert engine.stats.cache_bytes <= 2 * engine.stats.cache_capacity_bytes
    assert engine.stats.preemptions > 10
    while engine.num_running or engine.num_waiting:
        engine.step()
    # Of the first ones that were put aside nothing was computed twice.
    rows = [row for rows in engine.backend.steps for row in rows if row.start == 0]
    assert len(rows) < 20 + engine.stats.preemptions
