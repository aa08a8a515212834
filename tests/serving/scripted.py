"""A real engine over a model that recites: what the HTTP side does can be told apart from what
the model says, and a test decides when a step happens or fails."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.backend import Row
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.batched import BatchedEngine


class ScriptedBackend:
    """The token after a text of n tokens is `script[n % len(script)]`."""

    def __init__(self, vocab_size: int, script: Sequence[int]) -> None:
        self.vocab_size, self.script = vocab_size, script
        self.gate = threading.Event()
        """A step waits until it is set."""
        self.gate.set()
        self.step_seconds = 0.0
        self.failure: Exception | None = None
        """What the next step raises."""
        self.num_steps = 0

    def forward(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        self.gate.wait()
        threading.Event().wait(self.step_seconds)
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
        self.gate.set()


class ScriptedEngine(BatchedEngine):
    """The real engine over a script."""

    backend: ScriptedBackend

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
        engine.backend = backend
        return engine

    @classmethod
    def open(cls, path: Path, options: EngineOptions | None = None) -> ScriptedEngine:
        raise NotImplementedError
