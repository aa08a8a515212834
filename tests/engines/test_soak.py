"""A short soak of the real engine; `python -m benchmarks.soak` is the long one."""

from __future__ import annotations

import pytest

from benchmarks.soak import SLOTS, soak
from benchmarks.watched import SoakError, Watched, WatchedEngine
from lifecycle.engines.backend import CacheBackend, Row
from lifecycle.engines.ort import OnnxEngine
from tests.engines.clock import StepClock
from tests.engines.conftest import Model


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take what a clock of their own says, whatever else a machine does: the same is copied every time."""
    clock, watch = StepClock(monkeypatch), WatchedEngine.watch

    def timed(self: WatchedEngine, backend: CacheBackend) -> Watched:
        watched = watch(self, backend)
        clock.times(watched, 0.002, 0.0001)
        return watched

    monkeypatch.setattr(WatchedEngine, "watch", timed)


@pytest.mark.parametrize("is_bounded", [True, False])
def test_no_request_is_lost_and_nothing_is_kept(
    stories: Model, monkeypatch: pytest.MonkeyPatch, steady: None, is_bounded: bool
) -> None:
    # Texts are short here: their memory would go at once.
    monkeypatch.setattr("lifecycle.engines.leaving._PART", 10_000)
    found = soak(stories.graph, 300, seed=1, is_bounded=is_bounded)
    assert sum(found["ends"].values()) == 300
    assert set(found["ends"]) == {"stop", "length", "cancelled", "timeout"}
    assert found["compared"] > 10
    # What it is about did happen.
    for name in ("preemptions", "prefix_hit_tokens", "accepted_tokens"):
        assert found[name] > 10, name


def test_what_is_not_given_alone_is_seen(
    stories: Model, monkeypatch: pytest.MonkeyPatch, steady: None
) -> None:
    honest = Watched.copy_cache

    def another(self: Watched, source: int, target: int, stop: int, start: int = 0) -> None:
        honest(self, source, target, stop, start)
        for keys in self._backend.cache.rows(SLOTS).values():  # type: ignore[attr-defined]
            keys[target, :, : stop // 2] = 0

    monkeypatch.setattr(Watched, "copy_cache", another)
    with pytest.raises(SoakError, match="what it gives alone"):
        soak(stories.graph, 300, seed=1, is_bounded=False)


def test_a_slot_in_two_hands_is_seen(stories: Model) -> None:
    backend = OnnxEngine.open(stories.graph)._backend  # pyright: ignore[reportPrivateUsage]
    watched = Watched(backend)  # type: ignore[arg-type]
    watched.forward([Row(0, 0, [1, 2, 3], 1)])
    with pytest.raises(SoakError, match=r"in two hands: \[0, 0\]"):
        watched.forward([Row(0, 3, [4], 1), Row(0, 3, [5], 1)])
    with pytest.raises(SoakError, match="slot 1 holds 0 tokens, 3 are taken"):
        watched.forward([Row(1, 3, [4], 1)])
    with pytest.raises(SoakError, match="slot 0 holds 3 tokens, 4 are taken"):
        watched.copy_cache(0, 1, 4)
