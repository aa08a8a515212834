"""A second, smaller model that guesses the tokens of the first (speculative decoding, Leviathan et al. 2023).

It has a cache of its own, with the same slots. What a text has gained since it was last looked at is computed
when it is asked again, and guesses that did not come are forgotten: the next row begins before them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lifecycle.engines.backend import Backend, CacheBackend, Row
from lifecycle.engines.drafts import Tally
from lifecycle.engines.pace import Pace
from lifecycle.engines.sampling import Floats
from lifecycle.engines.state import RequestState
from lifecycle.errors import EngineError

log = logging.getLogger(__name__)

NEAR = 8
"""Tokens that a text may be behind to count as computed: two where all guesses came, one more for every step
without any."""
_TRIAL = 32
"""Tokens of a text that is computed to measure the model when it is opened."""
_REMEMBERED = 256
"""Guesses after which an older one counts for 1/e."""


class Draft(NamedTuple):
    """A draft model, as an engine is given it."""

    backend: Backend
    """Takes rows that begin before the end of what their slot holds."""
    max_model_len: int
    long_context: int | None = None
    """As that of `BatchedEngine`."""


class ModelTally(Tally):
    """The guesses of a draft model. The share counts those only before which all came, and soon forgets."""

    def __init__(self) -> None:
        super().__init__()
        self._tried = self._came = 0.0

    @property
    def acceptance(self) -> float:
        # Whoever gives a draft model expects it to agree.
        return (self._came + 6) / (self._tried + 8)

    def note(self, num_guessed: int, num_right: int) -> None:
        super().note(num_guessed, num_right)
        kept = 1.0 - 1.0 / _REMEMBERED
        self._tried = kept * self._tried + num_right + (num_right < num_guessed)
        self._came = kept * self._came + num_right


@dataclass(slots=True)
class _Text:
    """What a slot of the draft model holds: the first `size` tokens of a request, and guesses."""

    size: int = 0
    guesses: list[int] = field(default_factory=list[int])
    is_long: bool = False


class DraftModel:
    """The draft model of one engine. A failure of it ends the guessing, not the requests."""

    def __init__(self, draft: Draft) -> None:
        """Measures the model, so that no request has to pay for finding out what it costs.

        Raises:
            EngineError: the runtime failed.
        """
        self._backend = draft.backend
        self.max_model_len, self._long_context = draft.max_model_len, draft.long_context
        self._cache = draft.backend if isinstance(draft.backend, CacheBackend) else None
        self._texts: dict[int, _Text] = {}
        self.pace = Pace()
        self.is_working = True
        self._measure()

    @property
    def cache_bytes(self) -> int:
        """What its keys and values take; 0 where the backend cannot tell."""
        held = sum(text.size + len(text.guesses) for text in self._texts.values())
        return held * self._cache.bytes_per_token if self._cache is not None else 0

    def behind(self, state: RequestState) -> int:
        """Tokens to compute before the next one of a text can be guessed, 1 or more."""
        return len(state.tokens) - self._start(state)

    def ask_seconds(self, num_requests: int) -> float:
        """What it takes to guess one more token for each of so many requests."""
        return (self.pace.decode_seconds(num_requests) or 0.0) if num_requests else 0.0

    def propose(self, wanted: Sequence[tuple[RequestState, int]], room: int) -> list[list[int]]:
        """Guess up to so many tokens of each request; 1 or more and never beyond `max_model_len`.

        Of texts that are behind, `room` tokens together are computed at most. Those that are still behind
        then get no guess.
        """
        guesses: list[list[int]] = [[] for _ in wanted]
        try:
            self._propose(wanted, room, guesses)
        except (EngineError, MemoryError) as error:
            log.warning("the draft model is not asked any more: %s", error or "no memory")
            self.is_working = False
            for slot in list(self._texts):
                self.release(slot)
            return [[] for _ in wanted]
        return guesses

    def release(self, slot: int) -> None:
        """Forget the text of a slot."""
        if self._texts.pop(slot, None) is not None and self._cache is not None:
            self._cache.forget(slot)

    def close(self) -> None:
        """Free the model and its cache."""
        self.is_working = False
        self._texts.clear()
        self._backend.close()

    def _propose(
        self, wanted: Sequence[tuple[RequestState, int]], room: int, guesses: list[list[int]]
    ) -> None:
        rows: list[Row] = []
        asked: list[int] = []
        num_late = 0
        for place, (state, _) in enumerate(wanted):
            row = self._next_row(state, room - num_late)
            if row is not None:
                num_late += len(row.tokens) if len(row.tokens) > NEAR else 0
                asked += [place] * row.num_logits
                rows.append(row)
        begun = time.perf_counter()
        while rows:
            logits = self._backend.forward(rows)
            chosen = zip(asked, logits, strict=True)
            asked = [place for place, row in chosen if _guess(*wanted[place], row, guesses[place])]
            num_tokens = sum(len(row.tokens) for row in rows)
            rows = [self._guess_row(wanted[place][0], guesses[place][-1]) for place in asked]
            # What is done with the logits counts too.
            now = time.perf_counter()
            self.pace.note(num_tokens - num_late, num_late, now - begun)
            num_late, begun = 0, now

    def _next_row(self, state: RequestState, room: int) -> Row | None:
        """What comes next of a text, in `room` tokens if it is far behind; None if that is nothing."""
        start = self._start(state)
        tokens = state.tokens[start:]
        if len(tokens) > NEAR:
            tokens = tokens[: max(room, 0)]
        if not tokens:
            return None
        end = start + len(tokens)
        text = _Text(end, is_long=self._is_long(state))
        self._texts[state.slot] = text
        return Row(state.slot, start, tokens, int(end == len(state.tokens)), text.is_long)

    def _guess_row(self, state: RequestState, guess: int) -> Row:
        text = self._texts[state.slot]
        start = text.size + len(text.guesses)
        text.guesses.append(guess)
        return Row(state.slot, start, [guess], 1, text.is_long)

    def _start(self, state: RequestState) -> int:
        """Tokens of a text that need not be computed again; the last one gives the logits."""
        text = self._texts.get(state.slot)
        if text is None or text.is_long != self._is_long(state):
            return 0
        size = text.size
        for guess, token in zip(text.guesses, state.tokens[size:], strict=False):
            if guess != token:
                break
            size += 1
        return min(size, len(state.tokens) - 1)

    def _is_long(self, state: RequestState) -> bool:
        return self._long_context is not None and len(state.tokens) > self._long_context

    def _measure(self) -> None:
        """Run a text, so that the pace is known; the first run makes what later ones find."""
        count = self.pace.context = min(_TRIAL, self.max_model_len - 1)
        for tokens in ([0] * count, [0] * count, [0], [0], [0]):
            start = 0 if len(tokens) > 1 else count
            begun = time.perf_counter()
            self._backend.forward([Row(0, start, tokens, 1)])
            seconds = time.perf_counter() - begun
            if start == 0:
                self.pace.note(0, len(tokens), seconds)
            else:
                self.pace.note(1, 0, seconds)
        self._texts[0] = _Text(count)
        self.release(0)


def _guess(state: RequestState, most: int, logits: Floats, guessed: list[int]) -> bool:
    """Guess one more token of a text by `logits` [vocab_size]; whether another is wanted then."""
    token = state.sampler.propose(logits, len(guessed))
    if token is None:
        return False
    guessed.append(token)
    return len(guessed) < most
