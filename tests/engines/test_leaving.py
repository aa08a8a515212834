"""What ended texts have held goes back to the system a part a step, and no part of what others hold."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from lifecycle.engines import leaving as leaving_module
from lifecycle.engines.leaving import Leaving
from lifecycle.engines.requests import Request, SamplingParams
from lifecycle.engines.slot_cache import SlotCache
from tests.engines.texts import PROMPT, Texts
from tests.engines.toy import ToyBackend, ToyEngine

MEBI = 1 << 20


class Cache(ToyBackend):
    """Says what was given back of it."""

    bytes_per_token = MEBI

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[int, int]] = []

    def forget(self, slot: int, start: int = 0) -> None:
        self.given.append((slot, start))


@dataclass
class Running:
    slot: int
    tokens: list[int]
    draft: list[int] = field(default_factory=list)


def leaving_of(cache: Cache, *texts: tuple[int, int]) -> Leaving:
    leaving = Leaving(cache)
    for slot, count in texts:
        leaving.add(slot, count)
    return leaving


def parts(
    leaving: Leaving, cache: Cache, *running: Any, left: Mapping[int, int] | None = None
) -> list[list[tuple[int, int]]]:
    """What each step gives back, until nothing is left."""
    found: list[list[tuple[int, int]]] = []
    for _ in range(100):
        cache.given.clear()
        leaving.give_back(running, left or {})
        if not cache.given:
            break
        found.append(list(cache.given))
    return found


def test_a_text_goes_in_parts_from_its_end_on() -> None:
    cache = Cache()
    assert parts(leaving_of(cache, (2, 20)), cache) == [[(2, 12)], [(2, 4)], [(2, 0)]]


def test_texts_go_one_after_another() -> None:
    cache = Cache()
    assert parts(leaving_of(cache, (1, 3), (0, 10)), cache) == [[(1, 0), (0, 5)], [(0, 0)]]


def test_the_more_leaves_the_more_goes_in_a_step() -> None:
    cache = Cache()
    assert len(parts(leaving_of(cache, *((slot, 1000) for slot in range(10))), cache)) < 100


def test_what_another_text_holds_by_then_stays() -> None:
    cache = Cache()
    running = Running(0, [0] * 9, [0])
    assert parts(leaving_of(cache, (0, 20)), cache, running) == [[(0, 12)], [(0, 10)]]
    assert parts(leaving_of(cache, (0, 5)), cache, running) == [[(0, 10)]]
    kept = parts(leaving_of(cache, (0, 20)), cache, left={0: 10})
    assert kept == [[(0, 12)], [(0, 10)]]


def test_what_twins_are_yet_to_copy_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot of the one that is copied from held a longer text before, which is given back meanwhile."""
    monkeypatch.setattr(leaving_module, "_PART", 40 * ToyBackend.bytes_per_token)
    texts = Texts(monkeypatch, slots=3)
    texts.submit("decodes", [3, 2, 1], 200)
    for _ in range(4):
        texts.step()
    texts.submit("long", [5] * 120, 1)
    while not texts.found["long"]:
        texts.step()
    texts.submit("first", PROMPT, 1)
    texts.submit("twin", PROMPT, 20)
    given: list[tuple[int, int]] = []

    def forget(slot: int, start: int = 0) -> None:
        given.append((slot, start))
        assert start >= texts.engine._scheduler._left.get(slot, 0)

    monkeypatch.setattr(texts.backend, "forget", forget)
    texts.finish()
    assert (1, len(PROMPT) + 1) in given


def test_a_slot_that_is_left_twice_is_given_back_to_its_farthest_end() -> None:
    cache = Cache()
    assert parts(leaving_of(cache, (0, 9), (0, 2)), cache) == [[(0, 1)], [(0, 0)]]


def test_the_last_to_go_leaves_nothing() -> None:
    engine = ToyEngine.make(2, 60, backend=Cache())
    free = SamplingParams(max_tokens=20, ignore_eos=True)
    engine.submit(Request("long", [1] * 30, SamplingParams(max_tokens=1, ignore_eos=True)))
    engine.submit(Request("short", [2, 3], free))
    while engine.num_running or engine.num_waiting:
        engine.step()
    given = engine.backend.given
    assert given[:2] == [(0, 23), (0, 15)] and given[-1] == (1, 0)
    assert [start for slot, start in given if slot == 0][-1] == 0


def test_a_full_cache_gives_back_at_once() -> None:
    cache = Cache()
    engine = ToyEngine.make(2, 60, backend=cache, kv_cache_bytes=80 * MEBI)
    free = SamplingParams(max_tokens=10, ignore_eos=True)
    engine.submit(Request("long", [1] * 30, SamplingParams(max_tokens=1, ignore_eos=True)))
    engine.submit(Request("short", [2, 3], free))
    while engine.num_running or engine.num_waiting:
        engine.step()
    assert cache.given == [(0, 0), (1, 0)]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux promises zeros")
@pytest.mark.parametrize(("shared", "per_page"), [(1, 16), (2, 8)])
def test_of_a_slot_the_pages_from_a_token_on_are_zeros_then(shared: int, per_page: int) -> None:
    cache = SlotCache(["keys", "values"], (3, 2, 256, 64), np.dtype(np.float32), shared=shared)
    arrays = cache.rows(3).values()
    for array in arrays:
        array[:] = 1
    wanted = np.ones((3, 2, 256), bool)
    # A page that has been begun stays.
    cache.forget(1, 70)
    wanted[1, :, -(-70 // per_page) * per_page :] = False
    for array in arrays:
        np.testing.assert_array_equal(array.any(axis=3), wanted)
    cache.forget(1)
    wanted[1] = False
    for array in arrays:
        np.testing.assert_array_equal(array.any(axis=3), wanted)
