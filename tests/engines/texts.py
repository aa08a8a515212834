"""Requests whose texts are copied from slot to slot, or put aside, by parts of ten tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lifecycle.engines import scheduler
from lifecycle.engines.backend import Row
from lifecycle.engines.requests import Request, SamplingParams
from lifecycle.errors import EngineError
from tests.engines.clock import StepClock
from tests.engines.toy import ToyBackend, ToyEngine, next_token

PROMPT = [1 + n * n % 7 for n in range(40)]
PARTS = [(0, 10), (10, 20), (20, 30), (30, 40)]


class Recording(ToyBackend):
    """Knows what was copied, and what memory was given back."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[int, int, int, int]] = []
        self.moves: list[tuple[str, int, int, int]] = []
        """What was put aside of which slot, from where to where, and written back."""
        self.fails = False
        self.is_long: dict[int, bool] = {}
        """Whether a slot was filled as that of a long text."""

    def extend(self, row: Row) -> list[int]:
        if row.start == 0:
            self.is_long[row.slot] = row.is_long
        assert self.is_long[row.slot] == row.is_long
        return super().extend(row)

    def copy_cache(self, source: int, target: int, stop: int, start: int = 0) -> None:
        if self.fails:
            raise EngineError("the copy failed")
        super().copy_cache(source, target, stop, start)
        if start == 0:
            self.is_long[target] = self.is_long[source]
        assert self.is_long[target] == self.is_long[source]
        self.copies.append((source, target, start, stop))

    def read_cache(self, slot: int, start: int, stop: int) -> NDArray[np.int64]:
        if self.fails:
            raise EngineError("the copy failed")
        self.moves.append(("out", slot, start, stop))
        return super().read_cache(slot, start, stop)

    def write_cache(
        self, slot: int, start: int, block: NDArray[np.int64], count: int | None = None
    ) -> None:
        if self.fails:
            raise EngineError("the copy failed")
        super().write_cache(slot, start, block, count)
        if start == 0:
            self.is_long[slot] = False
        self.moves.append(("back", slot, start, start + len(block)))


class Texts:
    """An engine whose copies take so long that one part is made in a step, and what its requests get."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slots: int = 5, **options: Any) -> None:
        monkeypatch.setattr(scheduler, "_PART", 10 * ToyBackend.bytes_per_token)
        self.backend, self.clock = Recording(), StepClock(monkeypatch)
        self.engine = ToyEngine.make(slots, 256, 64, backend=self.backend, max_stall=3.0, **options)
        self.clock.times(self.backend, 0.02, 0.0002)
        self.clock.copies(self.backend, 1.0)
        self.found: dict[str, list[int]] = {}
        self.prompts: dict[str, list[int]] = {}

    def submit(self, id: str, prompt: list[int], count: int, **more: Any) -> None:
        self.found[id], self.prompts[id] = [], prompt
        self.engine.submit(Request(id, prompt, SamplingParams(count, ignore_eos=True), **more))

    def step(self) -> set[str]:
        """Who got tokens in one step."""
        told: set[str] = set()
        for event in self.engine.step():
            assert not event.error
            if event.token_id is not None:
                self.found[event.request_id].append(event.token_id)
                told.add(event.request_id)
        return told

    def finish(self) -> None:
        """Run to the end: every text is what its prompt leads to."""
        while self.engine.num_running or self.engine.num_waiting:
            self.step()
        for id, tokens in self.found.items():
            text = list(self.prompts[id])
            for token in tokens:
                assert token == next_token(text)
                text.append(token)

    def begin(self, *counts: int) -> None:
        """One that decodes, and beside it so many with one prompt, of which the first has just been computed."""
        self.submit("decodes", [3, 2, 1], 200)
        for _ in range(4):
            self.step()
        for n, count in enumerate(counts):
            self.submit(f"t{n}", PROMPT, count)
        while not self.found["t0"]:
            self.step()

    def copy_from_late(self, prompt: list[int], priority: int) -> None:
        """Three with one prompt, of which the first ends: its slot is free once "late", of this priority, has all, and
        "twin" is copied from that one. And two urgent ones."""
        self.submit("first", prompt, 50)
        self.submit("late", prompt, 50, priority=priority)
        self.step()
        self.submit("twin", prompt, 50, priority=1)
        while not self.found["first"]:
            self.step()
        self.engine.cancel("first")
        for n in range(2):
            self.submit(f"urgent {n}", [5, 4, 6], 60)
