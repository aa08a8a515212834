"""How long those that decode wait for what others take from the prefix cache, and that none waits for good."""

from __future__ import annotations

from typing import Any

import pytest

from lifecycle.engines.prefix_cache import PrefixCache
from lifecycle.engines.requests import Request, SamplingParams
from tests.engines.clock import StepClock
from tests.engines.toy import ToyEngine, continuation


def test_what_is_taken_of_other_prompts_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step has no more copies than those that decode may wait for, and those of another request wait too."""
    engine = ToyEngine.make(3, 200, 10, prefix_cache_bytes=1 << 20, max_stall=1.4)
    clock, backend = StepClock(monkeypatch), engine.backend
    clock.times(backend, 1.0, 0.01)
    text = [1 + n * n % 7 for n in range(95)]
    engine.generate([text], SamplingParams(max_tokens=1))
    copies: list[list[int]] = []
    write = backend.write_cache

    def timed(slot: int, start: int, block: Any, count: int | None = None) -> None:
        clock.now += 0.5
        copies[-1].append(slot)
        write(slot, start, block, count)

    backend.write_cache = timed  # type: ignore[method-assign]
    engine.submit(Request("decodes", [3, 2, 1], SamplingParams(max_tokens=60, ignore_eos=True)))
    for _ in range(5):
        engine.step()
    found: dict[str, list[int]] = {"long": [], "too": []}
    engine.submit(Request("long", text, SamplingParams(max_tokens=4)))
    engine.submit(Request("too", [*text, 5], SamplingParams(max_tokens=4)))
    while engine.num_running > 1 or engine.num_waiting:
        copies.append([])
        before = clock.now
        told = engine.step()
        assert clock.now - before <= 2.5 + 0.1
        for event in told:
            if event.request_id in found and event.token_id is not None:
                found[event.request_id].append(event.token_id)
    # Copies of half a second each may take 0.8.
    assert [len(each) for each in copies if each] == [2] * 9
    # Chunks are of no use without those before them: the first are the last to go.
    kept = list(engine.prefix_cache._blocks.values())  # type: ignore[union-attr]
    assert [list(block.tokens) for block in kept[-9:]] == [
        text[n : n + 10] for n in range(80, -1, -10)
    ]
    assert engine.stats.prefix_hit_tokens == 180
    assert found == {"long": continuation(text, 4), "too": continuation([*text, 5], 4)}


def test_to_look_for_what_is_not_there_keeps_no_prompt_from_being_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where others can wait for two tokens and no more."""
    engine = ToyEngine.make(2, 200, 10, prefix_cache_bytes=1 << 20, max_stall=1.01)
    clock, longest = StepClock(monkeypatch), PrefixCache._longest
    clock.times(engine.backend, 1.0, 0.5)

    def timed(*arguments: Any) -> Any:
        clock.now += 1e-4
        return longest(*arguments)

    monkeypatch.setattr(PrefixCache, "_longest", timed)
    engine.submit(Request("decodes", [3, 2, 1], SamplingParams(max_tokens=60, ignore_eos=True)))
    for _ in range(5):
        engine.step()
    engine.submit(Request("late", [1 + n % 7 for n in range(40)], SamplingParams(max_tokens=1)))
    told = [event.request_id for _ in range(30) for event in engine.step()]
    assert "late" in told and told.count("decodes") == 30
