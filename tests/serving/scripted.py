"""A real engine over a model that recites: what the HTTP side does can be told apart from what
the model says, and a test decides when a step happens or fails."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from math import inf
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.backend import Row
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.batched import BatchedEngine
from lifecycle.engines.requests import Event, Request


class ScriptedBackend:
    """The token after a text of n tokens is `script[n % len(script)]`."""

    can_roll_back = True

    def __init__(self, vocab_size: int, script: Sequence[int]) -> None:
        self.vocab_size, self.script = vocab_size, script
        self.failure: Exception | None = None
        """What the next step raises."""
        self.num_steps = self._num_begun = 0
        """Steps that were let go, and those that have begun."""
        self._may_begin = inf
        """Of the steps that begin, so many do not wait."""
        self._changed = threading.Condition()

    def hold(self, after: int = 0) -> None:
        """From now on let so many steps go, and the next one wait."""
        with self._changed:
            self._may_begin = self._num_begun + after

    def go(self) -> None:
        """Let all steps go."""
        with self._changed:
            self._may_begin = inf
            self._changed.notify()

    @property
    def is_held(self) -> bool:
        """Whether a step waits."""
        return self._num_begun > self._may_begin

    def forward(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        with self._changed:
            self._num_begun += 1
            goes = self._changed.wait_for(lambda: not self.is_held, timeout=60)
        assert goes, "no test lets the step go"
        self.num_steps += 1
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        lengths = [row.start + len(row.tokens) for row in rows for _ in range(row.num_logits)]
        logits = np.zeros((len(lengths), self.vocab_size), np.float32)
        for line, length in zip(logits, lengths, strict=True):
            line[self.script[length % len(self.script)]] = 100.0
        return logits

    def close(self) -> None:
        self.go()


class ScriptedEngine(BatchedEngine):
    """The real engine over a script; it knows in which order requests came and ended."""

    backend: ScriptedBackend
    came: list[str]
    ended: list[str]

    @classmethod
    def make(
        cls, script: Sequence[int], vocab_size: int, slots: int = 2, context: int = 512
    ) -> ScriptedEngine:
        backend = ScriptedBackend(vocab_size, script)
        engine = cls(
            backend,
            options=EngineOptions(max_num_seqs=slots),
            vocab_size=vocab_size,
            max_model_len=context,
            eos_token_ids=frozenset(),
        )
        engine.backend, engine.came, engine.ended = backend, [], []
        return engine

    def submit(self, request: Request) -> None:
        super().submit(request)
        self.came.append(request.id)

    def step(self) -> list[Event]:
        events = super().step()
        self.ended += [event.request_id for event in events if event.finish_reason is not None]
        return events

    @classmethod
    def open(cls, path: Path, options: EngineOptions | None = None) -> ScriptedEngine:
        raise NotImplementedError
