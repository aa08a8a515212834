"""A backend whose next token is a pure function of the text in the slot.

It lets the scheduler be tested by itself, and refuses what no real cache could do.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.backend import Row
from lifecycle.engines.base import AdapterWeights, EngineOptions
from lifecycle.engines.batched import BatchedEngine
from lifecycle.engines.draft_model import Draft
from lifecycle.engines.windows import ALL_SEEN, Windows
from lifecycle.errors import EngineError

VOCAB = 17
EOS = 0


def next_token(text: Sequence[int]) -> int:
    """The toy's greedy continuation of a text."""
    return zlib.crc32(bytes(text)) % VOCAB


def continuation(prompt: Sequence[int], limit: int) -> list[int]:
    """What a request with this prompt must give, up to its end or `limit` tokens."""
    text = list(prompt)
    while len(text) - len(prompt) < limit and (token := next_token(text)) != EOS:
        text.append(token)
    return text[len(prompt) :]


def guessed_token(text: Sequence[int], agreement: float) -> int:
    """What a draft model that agrees with so large a share of the texts says comes next."""
    agrees = zlib.crc32(bytes(text), 1) % 1000 < 1000 * agreement
    return (next_token(text) + (not agrees)) % VOCAB


class ToyBackend:
    """Texts by slot. `fail_next` makes the next step fail; `poison` makes a text's row NaN."""

    can_roll_back = True

    def __init__(self, agreement: float = 1.0) -> None:
        self.agreement = agreement
        self.texts: dict[int, list[int]] = {}
        self.passed: dict[int, int] = {}
        """Tokens that slots had when what is behind their windows was given back."""
        self.steps: list[list[Row]] = []
        self.fail_next = False
        self.poison: int | None = None
        self.closed = False

    def forward(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        self.steps.append(list(rows))
        if self.fail_next:
            self.fail_next = False
            self.texts.clear()
            raise EngineError("the runtime gave up")
        assert rows and len({row.slot for row in rows}) == len(rows), "a slot is shared"
        return np.concatenate([self._row(row) for row in rows])

    def extend(self, row: Row) -> list[int]:
        """The text of a slot with the tokens of a row."""
        if row.start == 0:
            self.texts[row.slot] = []
        text = self.texts[row.slot]
        assert row.start <= len(text), "the slot holds another text"
        del text[row.start :]
        assert len(row.tokens) > 0
        text += row.tokens
        return text

    def _row(self, row: Row) -> NDArray[np.float32]:
        text = self.extend(row)
        logits = np.zeros((row.num_logits, VOCAB), dtype=np.float32)
        for back in range(row.num_logits):
            logits[-1 - back, guessed_token(text[: len(text) - back], self.agreement)] = 1.0
        if self.poison is not None and text[0] == self.poison:
            logits[:] = np.nan
        return logits

    def read_cache(self, slot: int, start: int, stop: int) -> NDArray[np.int64]:
        text = self.texts[slot][start:stop]
        assert len(text) == stop - start
        return np.array(text)

    def write_cache(
        self, slot: int, start: int, block: NDArray[np.int64], count: int | None = None
    ) -> None:
        text = self.texts.get(slot, [])[:start]
        assert len(text) == start
        self.texts[slot] = text + block[:count].tolist()

    bytes_per_token = 8

    def copy_cache(self, source: int, target: int, stop: int, start: int = 0) -> None:
        assert len(self.texts[source]) >= stop
        before = self.texts[target][:start] if start else []
        assert len(before) == start
        self.texts[target] = before + self.texts[source][start:stop]

    def forget(self, slot: int, start: int = 0) -> None:
        kept = self.texts.pop(slot, [])[:start]
        self.texts |= {slot: kept} if kept else {}
        self.passed[slot] = 0

    def forget_passed(self, slot: int, count: int, before: int = 0) -> None:
        self.passed[slot] = count

    adapter_slots = 0

    def read_adapter(self, folder: Path) -> AdapterWeights:
        raise NotImplementedError

    def load_adapter(self, weights: AdapterWeights, instead_of: int = 0) -> int:
        raise NotImplementedError

    def unload_adapter(self, number: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.closed = True


class ToyEngine(BatchedEngine):
    """The real engine over the toy."""

    backend: ToyBackend

    @classmethod
    def make(
        cls,
        max_num_seqs: int = 3,
        max_model_len: int = 24,
        prefill_chunk: int = 4,
        *,
        long_context: int | None = None,
        backend: ToyBackend | None = None,
        draft: Draft | None = None,
        windows: Windows = ALL_SEEN,
        cuts_freely: bool = False,
        **options: Any,
    ):
        """`options` are those of `EngineOptions`."""
        backend = backend or ToyBackend()
        engine = cls(
            backend,
            options=EngineOptions(max_num_seqs, prefill_chunk=prefill_chunk, **options),
            vocab_size=VOCAB,
            max_model_len=max_model_len,
            eos_token_ids=frozenset({EOS}),
            long_context=long_context,
            windows=windows,
            cuts_freely=cuts_freely,
            draft=draft,
        )
        engine.backend = backend
        return engine

    @classmethod
    def open(cls, path, options=None):
        raise NotImplementedError
