"""Which requests get how many guessed tokens in the next step."""

from __future__ import annotations

from collections.abc import Iterable

from lifecycle.engines.drafts import Lookup, Tally, choose_lengths
from lifecycle.engines.pace import Pace
from lifecycle.engines.state import RequestState


class Speculation:
    """Drafts for the requests of one engine, `most` tokens each at most; 0 is none."""

    def __init__(self, most: int, max_model_len: int) -> None:
        self._most, self._max_model_len = most, max_model_len
        self.tally = Tally()

    def draft(self, states: Iterable[RequestState], pace: Pace) -> None:
        """Set the drafts of those that decode."""
        if not self._most:
            return
        decoding = [state for state in states if not state.is_prefilling]
        guesses = [self._guess(state) for state in decoding]
        able = [place for place, guess in enumerate(guesses) if guess]
        lengths = dict.fromkeys(range(len(decoding)), 0)
        if able:
            acceptances = [_lookup(decoding[place]).acceptance for place in able]
            num_decode = sum(len(state.tokens) - state.num_computed for state in decoding)
            most = [len(guesses[place]) for place in able]
            lengths |= zip(able, choose_lengths(acceptances, most, num_decode, pace), strict=True)
        for place, state in enumerate(decoding):
            state.draft = guesses[place][: lengths[place]]
            if guesses[place] and not state.draft:
                _lookup(state).rest()

    def _guess(self, state: RequestState) -> list[int]:
        if state.lookup is None:
            state.lookup = Lookup(self.tally)
        # The last token of a request is chosen and never computed.
        count = len(state.tokens)
        left = min(state.num_prompt + state.request.params.max_tokens, self._max_model_len) - count
        return state.lookup.guess(state.tokens, min(self._most, left - 1))


def _lookup(state: RequestState) -> Lookup:
    assert state.lookup is not None
    return state.lookup
