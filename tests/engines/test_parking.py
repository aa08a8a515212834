"""A text is put aside and written back in parts, while those that decode go on; whatever comes between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lifecycle.engines.backend import Row
from lifecycle.engines.windows import Windows
from lifecycle.errors import EngineError
from tests.engines.test_scheduler import BYTES
from tests.engines.texts import PROMPT, Texts

LATE = 45
"""Tokens in the cache of the one that gives its slot, when it is asked for it."""
OUT = [
    ("out", 1, 40, 45),
    ("out", 1, 30, 40),
    ("out", 1, 20, 30),
    ("out", 1, 10, 20),
    ("out", 1, 0, 10),
]
BACK = [("back", slot, start, stop) for _, slot, start, stop in reversed(OUT)]


class Slots(Texts):
    """Two slots, of one that decodes and one of higher priority number."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, slots: int = 2, count: int = 40, **options: Any
    ) -> None:
        super().__init__(monkeypatch, slots, **options)
        self.submit("decodes", [3, 2, 1], 200)
        self.submit("late", PROMPT, count, priority=2)
        while len(self.found["late"]) <= LATE - len(PROMPT):
            self.step()

    def urge(self, id: str = "urgent", count: int = 3, priority: int = 1) -> None:
        """A request comes that needs the slot."""
        self.submit(id, [5, 4, 6], count, priority=priority)

    @property
    def moves(self) -> list[tuple[str, int, int, int]]:
        """All that was put aside or written back so far."""
        return self.backend.moves

    def expect_nothing_computed_twice(self) -> None:
        """Of each text all but the last token was computed, once."""
        pairs = ((self.prompts[id], tokens) for id, tokens in self.found.items())
        wanted = sum(len(prompt) + len(tokens) - 1 for prompt, tokens in pairs)
        assert sum(len(row.tokens) for rows in self.backend.steps for row in rows) == wanted


def test_others_go_on_between_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Slots(monkeypatch)
    texts.urge()
    for count in range(1, 5):
        before = texts.clock.now
        assert texts.step() == {"decodes"}
        assert texts.moves == OUT[:count]
        assert texts.clock.now - before < 1.1
        assert texts.engine.stats.preemptions == 0
    # The slot is another's in the step that puts the rest aside.
    assert texts.step() == {"decodes", "urgent"}
    assert texts.moves == OUT and texts.engine.stats.preemptions == 1
    while texts.moves == OUT:
        texts.step()
    for count in range(2, 5):
        assert texts.step() == {"decodes"}
        assert texts.moves == OUT + BACK[:count]
    assert texts.step() == {"decodes", "late"}
    texts.finish()
    assert texts.moves == OUT + BACK and len(texts.found["late"]) == 40
    texts.expect_nothing_computed_twice()


def test_where_nobody_decodes_all_is_copied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Texts(monkeypatch, slots=1)
    texts.submit("late", PROMPT, 40, priority=2)
    while len(texts.found["late"]) <= LATE - len(PROMPT):
        texts.step()
    texts.submit("urgent", [5, 4, 6], 3)
    assert texts.step() == {"urgent"}
    assert texts.backend.moves == [(way, 0, *part) for way, _, *part in OUT]
    texts.finish()
    assert texts.backend.moves == [(way, 0, *part) for way, _, *part in OUT + BACK]
    assert len(texts.found["urgent"]) == 3 and len(texts.found["late"]) == 40


def test_memory_is_counted_and_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Slots(monkeypatch)
    texts.urge()
    while len(texts.found["late"]) < 40:
        texts.step()
        states = list(texts.engine._scheduler.states())  # pyright: ignore[reportPrivateUsage]
        aside = sum(len(block) for state in states for block in state.parked)
        in_slots = sum(map(len, texts.backend.texts.values()))
        if texts.engine.num_running == 2 and aside:
            # The memory of slots without a request goes back later.
            assert texts.engine.stats.cache_tokens == aside + in_slots
    texts.finish()
    assert texts.engine.stats.cache_tokens == 0


def test_a_slot_that_is_free_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Slots(monkeypatch, slots=3)
    texts.submit("ends", [8, 8], 30)
    texts.urge()
    for _ in range(2):
        texts.step()
    assert texts.moves == OUT[:2]
    texts.engine.cancel("ends")
    assert texts.step() == {"decodes", "urgent"}
    # What was put aside comes back.
    assert texts.moves == OUT[:2] + BACK[-2:-1]
    assert texts.step() == {"decodes", "urgent", "late"}
    texts.finish()
    assert texts.moves == OUT[:2] + BACK[-2:]
    assert texts.engine.stats.preemptions == 0 and len(texts.found["late"]) == 40


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_who_needed_the_slot_is_gone(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    texts = Slots(monkeypatch)
    texts.urge(count=100)
    for _ in range(steps):
        texts.step()
    texts.engine.cancel("urgent")
    texts.finish()
    assert texts.moves == OUT[:steps] + BACK[-steps:]
    assert texts.engine.stats.preemptions == (steps == 5)
    assert len(texts.found["late"]) == 40


@pytest.mark.parametrize("steps", [1, 3, 5, 9, 11])
def test_who_is_moved_is_gone(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """On its way out, aside, on its way back."""
    texts = Slots(monkeypatch)
    texts.urge()
    for _ in range(steps):
        texts.step()
    texts.engine.cancel("late")
    before = list(texts.moves)
    texts.finish()
    assert texts.moves == before
    assert len(texts.found["urgent"]) == 3
    assert texts.engine.stats.cache_tokens == 0


def test_a_second_one_is_more_urgent(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Slots(monkeypatch)
    texts.urge()
    for _ in range(2):
        texts.step()
    texts.urge("first", count=60, priority=0)
    while texts.moves != OUT:
        texts.step()
    assert texts.found["first"] and not texts.found["urgent"]
    texts.finish()
    assert texts.moves == OUT + BACK and len(texts.found["late"]) == 40


def test_two_go_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Slots(monkeypatch, slots=3)
    texts.submit("too", PROMPT[::-1], 60, priority=2)
    while len(texts.found["too"]) < 10:
        texts.step()
    texts.moves.clear()
    for id in ("urgent", "other"):
        texts.urge(id, count=30)
    while not texts.moves:
        # The one that came last goes first; the other is computed until then.
        assert "late" in texts.step()
    while not texts.found["other"]:
        assert ("late" in texts.step()) == (len(texts.moves) < 5)
    assert [slot for _, slot, _, _ in texts.moves] == [2] * 5 + [1] * 6
    texts.finish()
    texts.expect_nothing_computed_twice()


def test_one_that_comes_back_turns_round(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Slots(monkeypatch)
    texts.urge()
    while texts.moves != OUT + BACK[:3]:
        texts.step()
    texts.urge("again")
    while not texts.found["again"]:
        texts.step()
    # Only what had come back goes out again.
    assert texts.moves == OUT + BACK[:3] + OUT[-3:]
    texts.finish()
    assert len(texts.found["late"]) == 40
    texts.expect_nothing_computed_twice()


def test_one_that_comes_back_turns_round_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Slots(monkeypatch)
    texts.urge()
    while texts.moves != OUT + BACK[:3]:
        texts.step()
    texts.engine.cancel("decodes")
    texts.submit("other", [9] * 100, 3, priority=1)
    texts.step()
    texts.urge("again", priority=0)
    texts.step()
    assert texts.moves == OUT + BACK[:4] + OUT[-4:]
    texts.finish()
    assert len(texts.found["late"]) == 40


@pytest.mark.parametrize("has_twin", [False, True])
def test_of_a_prompt_on_its_way_nothing_is_computed(
    monkeypatch: pytest.MonkeyPatch, has_twin: bool
) -> None:
    """Nor is it a twin of one that is finished meanwhile."""
    texts, prompt = Texts(monkeypatch, slots=3), PROMPT * 5
    texts.submit("decodes", [3, 2, 1], 60)
    for _ in range(4):
        texts.step()
    texts.submit("late", prompt, 5, priority=2)
    texts.step()
    texts.submit("third", prompt if has_twin else [7], 30, priority=1)
    # All but the end of the twin's.
    for _ in range(3 if has_twin else 1):
        texts.step()
    texts.submit("urgent", [5, 4, 6], 40)
    while not texts.found["third"]:
        assert "late" not in texts.step()
    texts.finish()
    assert texts.engine.stats.preemptions == 1
    assert len(texts.found["late"]) == 5 and len(texts.found["third"]) == 30


@pytest.mark.parametrize("moved", [0, 1, 4, 5, 6, 9])
def test_a_copy_that_fails_is_computed(monkeypatch: pytest.MonkeyPatch, moved: int) -> None:
    texts = Slots(monkeypatch)
    texts.urge()
    while len(texts.moves) < moved:
        texts.step()
    texts.backend.fails = True
    texts.finish()
    assert len(texts.moves) == moved
    assert texts.engine.stats.preemptions == 1
    assert {id: len(tokens) for id, tokens in texts.found.items()} == {
        "decodes": 200,
        "late": 40,
        "urgent": 3,
    }


@pytest.mark.parametrize("moved", [2, 7])
def test_a_step_that_fails_concerns_no_text_on_its_way(
    monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    texts = Slots(monkeypatch)
    texts.urge()
    while len(texts.moves) < moved:
        texts.step()
    forward = texts.backend.forward

    def fails(rows: Sequence[Row]) -> NDArray[np.float32]:
        texts.backend.forward = forward
        raise EngineError("the step failed")

    texts.backend.forward = fails
    assert {event.request_id for event in texts.engine.step() if event.error} == {"decodes"}
    texts.finish()
    assert len(texts.found["late"]) == 40 and len(texts.found["urgent"]) == 3


def test_a_full_cache_gives_up_what_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other text grows until it takes the room of the one that is put aside."""
    texts = Slots(monkeypatch, count=150, kv_cache_bytes=256 * BYTES)
    while texts.engine.stats.cache_tokens < 250:
        texts.step()
    texts.urge()
    while texts.engine.stats.preemptions == 0:
        texts.step()
        assert texts.engine.stats.cache_tokens <= 256
    assert 0 < len(texts.moves) < 10
    texts.finish()
    assert {id: len(tokens) for id, tokens in texts.found.items()} == {
        "decodes": 200,
        "late": 150,
        "urgent": 3,
    }


def test_a_full_cache_gives_up_what_is_aside_first(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Slots(monkeypatch, count=150, kv_cache_bytes=256 * BYTES)
    while texts.engine.stats.cache_tokens < 200:
        texts.step()
    texts.urge(count=40)
    texts.finish()
    # It is computed anew; neither of the others had to leave.
    assert texts.engine.stats.preemptions == 1
    assert not any(way == "back" for way, *_ in texts.moves)


def test_those_that_copy_from_it_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, prompt = Texts(monkeypatch, slots=4), PROMPT * 5
    texts.submit("decodes", [3, 2, 1], 100)
    for _ in range(4):
        texts.step()
    texts.copy_from_late(prompt, priority=2)
    while not texts.found["urgent 1"]:
        assert len(texts.backend.copies) == 40 or not texts.backend.moves
        texts.step()
    assert len(texts.backend.moves) == 22
    texts.finish()
    assert len(texts.found["late"]) == len(texts.found["twin"]) == 50


def test_behind_a_window_memory_is_given_back_again(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Slots(monkeypatch, windows=Windows([16]))
    texts.urge()
    given: list[tuple[int, int]] = []
    forget = texts.backend.forget_passed

    def note(slot: int, count: int, before: int = 0) -> None:
        given.append((slot, count))
        forget(slot, count, before)

    while texts.moves != OUT:
        texts.step()
        assert texts.engine.stats.cache_tokens >= LATE
    texts.backend.forget_passed = note
    while texts.moves != OUT + BACK[:4]:
        texts.step()
    assert not any(slot == 1 for slot, _ in given)
    while texts.moves != OUT + BACK:
        texts.step()
    assert (1, 40) in given
    texts.finish()
