"""What was computed of a prompt is copied to those with the same one in parts, and read by none before it is whole."""

from __future__ import annotations

import pytest

from lifecycle.engines.requests import Request, SamplingParams
from lifecycle.engines.sampling import Sampler
from lifecycle.engines.state import RequestState
from lifecycle.engines.twins import follows
from lifecycle.engines.windows import Windows
from tests.engines.texts import PARTS, PROMPT, Texts
from tests.engines.toy import VOCAB


def test_others_go_on_between_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Texts(monkeypatch)
    texts.begin(30, 30, 30)
    # All have their first token at once.
    assert [len(texts.found[f"t{n}"]) for n in range(3)] == [1, 1, 1]
    assert texts.backend.copies == []
    told = [texts.step() for _ in range(8)]
    assert texts.backend.copies == [(1, slot, *part) for slot in (2, 3) for part in PARTS]
    assert all({"decodes", "t0"} <= each for each in told)
    assert ["t1" in each for each in told] == [False] * 3 + [True] * 5
    assert ["t2" in each for each in told] == [False] * 7 + [True]
    texts.finish()
    assert [len(texts.found[f"t{n}"]) for n in range(3)] == [30, 30, 30]
    assert texts.engine.stats.prompt_tokens == len(PROMPT) + 3


def test_where_nobody_waits_all_is_copied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Texts(monkeypatch)
    results = texts.engine.generate([PROMPT] * 3, SamplingParams(4, ignore_eos=True))
    assert len({tuple(result.token_ids) for result in results}) == 1
    rows = [len(rows) for rows in texts.backend.steps]
    assert rows == [1, 3, 3, 3]


def test_one_token_takes_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Texts(monkeypatch)
    texts.begin(1, 1, 1)
    texts.finish()
    assert texts.backend.copies == []


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_of_those_left_one_gets_all_and_the_others_follow_it(
    monkeypatch: pytest.MonkeyPatch, is_cancelled: bool
) -> None:
    texts = Texts(monkeypatch)
    texts.begin(30 if is_cancelled else 1, 30, 30)
    if is_cancelled:
        texts.step()
        assert texts.backend.copies == [(1, 2, *PARTS[0])]
        texts.engine.cancel("t0")
    copies = [(source, source + 1, *part) for source in (1, 2) for part in PARTS]
    for count in range(is_cancelled, 8):
        assert texts.backend.copies == copies[:count]
        assert "decodes" in texts.step()
    assert texts.backend.copies == copies
    texts.finish()
    assert texts.engine.stats.prompt_tokens == len(PROMPT) + 3


def test_those_that_leave_together_take_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a client that asked for several answers is gone, or the time of all is over."""
    texts = Texts(monkeypatch)
    texts.begin(30, 30, 30)
    for n in range(3):
        texts.engine.cancel(f"t{n}")
    texts.submit("other", [7, 7, 7], 20)
    texts.finish()
    assert texts.backend.copies == []
    assert len(texts.found["other"]) == 20


def test_after_a_failed_step_nothing_is_copied_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Texts(monkeypatch)
    texts.begin(30, 30, 30)
    texts.step()
    texts.backend.fail_next = True
    failed = {event.request_id for event in texts.engine.step() if event.error}
    assert failed == {"decodes", "t0"}
    texts.finish()
    assert [len(texts.found[f"t{n}"]) for n in (1, 2)] == [30, 30]


@pytest.mark.parametrize("who", ["t1", "t2"])
def test_a_twin_that_leaves_is_not_copied_to(monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    texts = Texts(monkeypatch)
    texts.begin(30, 30, 30)
    texts.step()
    texts.engine.cancel(who)
    # Its slot goes to another.
    texts.submit("other", [7, 7, 7], 20)
    texts.finish()
    assert len(texts.backend.copies) == (5 if who == "t1" else 4)
    assert len(texts.found["other"]) == 20


def test_a_copy_that_fails_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Texts(monkeypatch)
    texts.begin(30, 30)
    texts.step()
    texts.backend.fails = True
    texts.finish()
    assert len(texts.found["t1"]) == 30
    assert texts.engine.stats.prompt_tokens == 2 * len(PROMPT) + 3 + 1


def test_one_that_is_put_aside_before_its_copy_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Texts(monkeypatch, slots=3)
    texts.begin(30, 30)
    texts.step()
    texts.submit("urgent", [5, 5], 5, priority=-1)
    texts.finish()
    assert texts.engine.stats.preemptions == 1
    assert len(texts.found["t1"]) == 30


def test_what_is_still_to_be_copied_is_not_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Texts(monkeypatch, slots=7, windows=Windows([16]))
    texts.begin(60, 60, 60, 60, 60, 60)
    while len(texts.backend.copies) < 20:
        # As far as the prompt had gone when it was finished.
        assert texts.backend.passed[1] == len(PROMPT)
        texts.step()
    assert len(texts.found["t0"]) > 16
    for _ in range(20):
        texts.step()
    assert min(texts.backend.passed[slot] for slot in range(1, 7)) > len(PROMPT)
    texts.finish()


def test_texts_that_become_long_while_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is computed anew then, in the slot that would be copied; another group waits longer."""
    texts = Texts(monkeypatch, slots=7, long_context=len(PROMPT) + 2)
    texts.begin(30, 30, 30)
    for n in range(3):
        texts.submit(f"u{n}", PROMPT[::-1], 30)
    while not texts.found["u0"]:
        texts.step()
    for _ in range(2):
        texts.step()
    texts.engine.cancel("u0")
    texts.finish()
    whole = [f"t{n}" for n in range(3)] + ["u1", "u2"]
    assert [len(texts.found[id]) for id in whole] == [30] * 5


def test_nobody_follows_one_that_is_begun_anew() -> None:
    def made(name: str) -> RequestState:
        sampler = Sampler(SamplingParams(), [1, 2], VOCAB)
        return RequestState(Request(name, [1, 2]), sampler, [1, 2], 2, 2)

    leader, other = made("leader"), made("other")
    assert follows(other, leader)
    leader.tokens.append(3)
    leader.recompute()
    assert not follows(other, leader)
