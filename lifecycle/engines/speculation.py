"""Which requests get how many guessed tokens in the next step, and who guesses them."""

from __future__ import annotations

import time
from collections.abc import Iterable

from lifecycle.engines.asking import Asking
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.draft_model import DraftModel
from lifecycle.engines.drafts import Lookup, Offer, Tally, choose_lengths
from lifecycle.engines.pace import Pace
from lifecycle.engines.state import RequestState

_IDLE, _SHARE, _LONGEST_REST = 4, 0.003, 16
"""Looks at all texts without a guess that is worth its time, after which looks may take such a share of the time: that is
how many steps are made between two, at most so many. One takes 1 to 8 % of a step."""
_WEIGHT = 0.2
"""Of a new measurement in what a look takes."""


class Speculation:
    """Drafts for the requests of one engine: from their own texts, else from a draft model."""

    def __init__(
        self, options: EngineOptions, max_model_len: int, model: DraftModel | None = None
    ) -> None:
        """`options.draft_tokens` are guessed for a request at most; 0 is none."""
        self._most, self._max_model_len = options.draft_tokens, max_model_len
        self._tally = Tally()
        self._num_idle = self._resting = self._skipped = 0
        self._look_seconds = 0.0
        """What a look takes, on average."""
        self._asking = Asking(model, options) if model is not None else None

    @property
    def guessed(self) -> int:
        """Tokens guessed so far."""
        return self._tally.guessed + (self._asking.tally.guessed if self._asking else 0)

    @property
    def right(self) -> int:
        """Those of them that came."""
        return self._tally.right + (self._asking.tally.right if self._asking else 0)

    @property
    def cache_bytes(self) -> int:
        """What the draft model's keys and values take."""
        return self._asking.model.cache_bytes if self._asking else 0

    def draft(self, states: Iterable[RequestState], pace: Pace) -> None:
        """Set the drafts of those that decode."""
        asking = self._asking
        if not self._most or (asking is None and self._is_resting()):
            return
        states = list(states)
        decoding = [state for state in states if not state.is_prefilling]
        if not decoding:
            return
        num_decode = sum(len(state.tokens) - state.num_computed for state in decoding)
        if asking is not None:
            # A prompt counts from its second step on: without guesses in the first, models that are often right gain less.
            is_alone = len(decoding) == sum(state.num_computed > 0 for state in states)
            if not asking.begin(pace, num_decode, is_alone=is_alone):
                if self._is_resting():
                    return
                asking = None
        looked = time.perf_counter()
        offers = [self._offer(state, asking) for state in decoding]
        begun, before = time.perf_counter(), asking.model.pace.seconds if asking else 0.0
        lengths, saved = choose_lengths(offers, num_decode, pace, asking and asking.costs)
        wanted, computed = list[tuple[RequestState, int]](), 0.0
        for state, offer, length in zip(decoding, offers, lengths, strict=True):
            if offer.is_asked:
                state.draft = []
                wanted.append((state, length))
            else:
                state.draft, state.guesser = state.draft[:length], state.lookup
            if state.lookup is not None and offer.most and not state.draft:
                state.lookup.rest(1 + self._skipped)
        if asking is not None and wanted:
            num_other = sum(len(state.draft) for state in decoding)
            asking.ask(wanted, saved, num_decode, num_other, pace)
            computed = asking.model.pace.seconds - before
            asking.charge(time.perf_counter() - begun - computed)
        self._rest(
            decoding, time.perf_counter() - looked - computed, pace.decode_seconds(num_decode)
        )

    def _is_resting(self) -> bool:
        """Whether nobody looks at texts before this step."""
        if not self._resting:
            return False
        self._resting -= 1
        self._skipped += 1
        return True

    def _rest(self, decoding: list[RequestState], seconds: float, step: float | None) -> None:
        """After a look that took so long, before a step that takes `step`: when to look next."""
        self._skipped = self._resting = 0
        self._look_seconds += _WEIGHT * (seconds - self._look_seconds)
        has_guesses = any(state.draft for state in decoding)
        self._num_idle = 0 if has_guesses else self._num_idle + 1
        if self._num_idle >= _IDLE and step:
            self._resting = min(int(self._look_seconds / (_SHARE * step)), _LONGEST_REST)

    def note(self, pace: Pace, num_decode: int, num_prompt: int, seconds: float) -> None:
        """Take note of how long the step took that the drafts were for, as `Pace.note`."""
        if self._asking is None or not self._asking.note(num_decode, num_prompt, seconds):
            pace.note(num_decode, num_prompt, seconds)
        else:
            pace.seconds += seconds

    def release(self, slot: int) -> None:
        """Take note of a slot whose request has left it."""
        if self._asking is not None:
            self._asking.model.release(slot)

    def close(self) -> None:
        """Free the draft model."""
        if self._asking is not None:
            self._asking.model.close()

    def _offer(self, state: RequestState, asking: Asking | None) -> Offer:
        """What can be guessed for a request; what its own text says is its draft then."""
        if state.lookup is None:
            state.lookup = Lookup(self._tally)
        # The last token of a request is chosen and never computed.
        count = len(state.tokens)
        left = min(state.num_prompt + state.request.params.max_tokens, self._max_model_len) - count
        most = min(self._most, left - 1)
        state.draft = state.lookup.guess(state.tokens, most)
        found = Offer(state.lookup.acceptance if state.draft else 0.0, len(state.draft))
        asked = asking.offer(state, most) if asking is not None else None
        is_better = asked is not None and asked.most > 0 and asked.acceptance > found.acceptance
        return asked if asked is not None and is_better else found
