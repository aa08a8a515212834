"""A state machine over a real engine: whatever else is asked of it, each request gets what it gets alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from benchmarks.watched import Watched, WatchedEngine
from lifecycle.engines.backend import Block, CacheBackend, Row
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.pytorch import TorchEngine
from lifecycle.engines.requests import Event, FinishReason, Request, SamplingParams
from lifecycle.errors import EngineError, RequestError

CONTEXT, LONGEST = 96, 16
"""Tokens of a text, and of an answer."""
CHUNKS = (8, 16)
NUM_PROMPTS = 8
ADAPTER_SLOTS = 3

Answer = list[tuple[int, float]]
"""Tokens with their log-probabilities."""


@dataclass(frozen=True)
class Subject:
    """A model for an engine, and what must come of it."""

    engine: type[PacedEngine | PacedTorchEngine]
    folder: Path
    prompts: Sequence[list[int]]
    """`NUM_PROMPTS` of them."""
    adapters: Sequence[Path]
    """None, or one for each of its slots."""
    answers: Mapping[tuple[int, int, int | None], Answer]
    """`LONGEST` tokens by prompt, chunk size (how a prompt is cut shows in last bits) and adapter."""
    bytes_per_token: int
    tolerance: float
    """Of log-probabilities where bits are not promised."""

    @property
    def is_exact(self) -> bool:
        """Whether a text gets the same bits from however much of it is computed in a step."""
        return issubclass(self.engine, PacedEngine)


class Paced(Watched):
    """A watched backend with a time of its own, so that what the engine makes of its speed is the same each
    time."""

    now = 0.0

    def forward(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        Paced.now += 0.02 + 0.002 * sum(len(row.tokens) for row in rows)
        return super().forward(rows)

    def read_cache(self, slot: int, start: int, stop: int) -> Block:
        Paced.now += 0.05
        return super().read_cache(slot, start, stop)

    def write_cache(self, slot: int, start: int, block: Block, count: int | None = None) -> None:
        Paced.now += 0.05
        super().write_cache(slot, start, block, count)

    def copy_cache(self, source: int, target: int, stop: int, start: int = 0) -> None:
        Paced.now += 0.05
        super().copy_cache(source, target, stop, start)


class PacedEngine(WatchedEngine):
    def watch(self, backend: CacheBackend) -> Watched:
        return Paced(backend)


class PacedTorchEngine(TorchEngine):
    def __init__(self, backend: CacheBackend, **arguments: Any) -> None:
        self.watched = Paced(backend)
        super().__init__(self.watched, **arguments)


class EngineMachine(RuleBasedStateMachine):
    """The engine of a subject under all that it is for."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject = subject
        self.names: dict[str, int] = {}
        """Which adapter each name stands for."""
        self.left: dict[str, Answer] = {}
        """What is still to come of each request that is there."""
        self.ends: dict[str, FinishReason] = {}
        """How each of them must end."""
        self.count = 0

    @initialize(
        slots=st.integers(1, 3),
        chunk=st.sampled_from(CHUNKS),
        prefix_tokens=st.sampled_from([0, 40, 1000]),
        contexts=st.sampled_from([None, 1, 2]),
        max_stall=st.sampled_from([None, 2.5, 1.2]),
        draft_tokens=st.sampled_from([0, 4]),
        loaded=st.integers(0, ADAPTER_SLOTS),
    )
    def open(
        self,
        slots: int,
        chunk: int,
        prefix_tokens: int,
        contexts: int | None,
        max_stall: float | None,
        draft_tokens: int,
        loaded: int,
    ) -> None:
        """There is little room of every kind."""
        size = self.subject.bytes_per_token
        self.options = EngineOptions(
            slots,
            CONTEXT,
            threads=1,
            prefill_chunk=chunk,
            prefix_cache_bytes=prefix_tokens * size,
            kv_cache_bytes=contexts and contexts * CONTEXT * size,
            max_stall=max_stall,
            draft_tokens=draft_tokens,
        )
        self.most = CONTEXT * (contexts or 2 * slots)
        self.engine = self.subject.engine.open(self.subject.folder, self.options)
        for number in range(min(loaded, len(self.subject.adapters))):
            self.load("abc"[number], number)

    @rule(
        number=st.integers(0, NUM_PROMPTS - 1),
        place=st.integers(0, 3),
        max_tokens=st.integers(1, LONGEST),
        stop_at=st.none() | st.integers(0, LONGEST - 1),
        priority=st.integers(0, 2),
        salt=st.sampled_from(["", "", "s"]),
        copies=st.sampled_from([1, 1, 3]),
    )
    def submit(
        self,
        number: int,
        place: int = 0,
        max_tokens: int = LONGEST,
        stop_at: int | None = None,
        priority: int = 0,
        salt: str = "",
        copies: int = 1,
    ) -> None:
        """`place` is that of the adapter's name, 0 none; `stop_at` that of a token which ends the answer."""
        names = [None, *sorted(self.names)]
        name = names[place % len(names)]
        adapter = None if name is None else self.names[name]
        answer = self.subject.answers[number, self.options.prefill_chunk, adapter]
        stop = frozenset[int]() if stop_at is None else frozenset({answer[stop_at][0]})
        params = SamplingParams(max_tokens, logprobs=0, stop_token_ids=stop, ignore_eos=True)
        ends_at = next((i for i, (token, _) in enumerate(answer) if token in stop), LONGEST)
        for _ in range(copies):
            id = str(self.count)
            self.count += 1
            prompt = self.subject.prompts[number]
            self.engine.submit(Request(id, prompt, params, name, salt, priority))
            self.left[id] = answer[: min(max_tokens, ends_at)]
            is_stopped = ends_at < max_tokens
            self.ends[id] = FinishReason.STOP if is_stopped else FinishReason.LENGTH

    @precondition(lambda self: self.engine.num_running == self.options.max_num_seqs)
    @rule(number=st.integers(0, NUM_PROMPTS - 1), place=st.integers(0, 3), count=st.integers(0, 6))
    def urge(self, number: int, place: int, count: int) -> None:
        """One comes for which another has to leave its slot."""
        self.submit(number, place, priority=-self.count - 1)
        self.step(count)

    @precondition(lambda self: self.left)
    @rule(count=st.sampled_from([1, 2, 6, 20]))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.take(self.engine.step())

    @precondition(lambda self: self.left)
    @rule(place=st.integers(0, 20))
    def cancel(self, place: int) -> None:
        id = list(self.left)[place % len(self.left)]
        self.engine.cancel(id)
        self.left[id], self.ends[id] = [], FinishReason.CANCELLED

    @precondition(lambda self: self.subject.adapters)
    @rule(
        name=st.sampled_from("abcd"),
        number=st.integers(0, ADAPTER_SLOTS - 1),
        replace=st.booleans(),
        evict=st.booleans(),
    )
    def load(self, name: str, number: int, replace: bool = False, evict: bool = False) -> None:
        before = self.engine.adapters
        try:
            self.engine.load_adapter(
                name,
                self.subject.adapters[number],
                replace=replace,
                evict=before if evict else (),
            )
        except EngineError as error:
            assert "already" in str(error) or "slots are taken" in str(error)
            assert self.engine.adapters == before
            return
        assert name not in before or replace
        gone = set(before) - set(self.engine.adapters)
        assert len(gone) <= evict
        self.names = {n: number for n, number in self.names.items() if n not in gone}
        self.names[name] = number

    @precondition(lambda self: self.names)
    @rule(place=st.integers(0, ADAPTER_SLOTS - 1))
    def unload(self, place: int) -> None:
        name = sorted(self.names)[place % len(self.names)]
        self.engine.unload_adapter(name)
        del self.names[name]
        with pytest.raises(RequestError, match=f"no adapter '{name}'"):
            self.engine.submit(Request("refused", [1], adapter=name))

    def take(self, events: list[Event]) -> None:
        for event in events:
            left = self.left[event.request_id]
            if event.token_id is not None:
                token, logprob = left.pop(0)
                assert event.token_id == token
                self.check(event.logprob, logprob)
            if event.finish_reason is not None:
                assert event.finish_reason is self.ends[event.request_id], event
                assert not left, "it ended too early"
                del self.left[event.request_id], self.ends[event.request_id]

    def check(self, found: float | None, wanted: float) -> None:
        """The same bits, unless tokens were guessed or a text was computed anew: then it is cut
        otherwise."""
        is_cut_alike = not self.options.draft_tokens and self.options.kv_cache_bytes is None
        is_exact = is_cut_alike and self.subject.is_exact
        assert found is not None
        assert abs(found - wanted) <= (0.0 if is_exact else self.subject.tolerance)

    @invariant()
    def room_is_kept(self) -> None:
        stats = self.engine.stats
        assert stats.num_running <= self.options.max_num_seqs
        assert stats.num_running + stats.num_waiting <= len(self.left)
        assert stats.cache_tokens <= self.most
        assert stats.prefix_bytes <= self.options.prefix_cache_bytes
        assert sorted(self.engine.adapters) == sorted(self.names)

    def teardown(self) -> None:
        engine = self.engine
        for _ in range(2000):
            if not self.left:
                break
            self.take(engine.step())
        assert not self.left, "requests never end"
        stats = engine.stats
        assert stats.num_running == stats.num_waiting == stats.cache_tokens == 0
        assert not any(engine.watched.held.values()), "a slot was not given back"
        for name in engine.adapters:
            engine.unload_adapter(name)
        if self.subject.adapters:
            # Nothing keeps the slot of an adapter.
            for n in range(ADAPTER_SLOTS):
                engine.load_adapter(str(n), self.subject.adapters[n])
        engine.close()
