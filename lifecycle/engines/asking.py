"""When a draft model is asked, so that it gains much or costs little.

What it costs and what its guesses save is measured, the time to weigh that included. It may lose a small share of the
engine's time and no more: out of that share come texts that are computed in the hope of guesses, and a guess now and
then where none would pay, since texts change. Until that share has come together it may lose a little for guesses that
are expected to pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lifecycle.engines.base import EngineOptions
from lifecycle.engines.draft_model import NEAR, DraftModel, ModelTally
from lifecycle.engines.drafts import AskCosts, Offer, Record, choose_lengths
from lifecycle.engines.pace import Pace
from lifecycle.engines.state import RequestState

_SHARE = 0.008
"""Of the engine's time that the model may lose."""
_START, _MOST = 16, 250
"""Steps whose time it may lose before it has gained any, for guesses that seem to pay, and at a time."""
_PLAIN_EVERY, _CLOSE_EVERY, _CLOSE = 64, 32, 0.3
"""Steps after which some are made without it: what they take is what guesses are measured by, and it grows with the
texts. More often where guesses are expected to save less than such a share of a step."""
_PLAIN = 3
"""Those steps. The first counts for nothing: behind the draft model one takes some 6 to 15 % longer, since it has been
in the processor's caches."""
_LONGEST_REST = 15
"""Steps without weighing guesses, once they have not been worth it for some time."""
_FORGET = 16
"""How often guesses may turn out not to be worth it until what steps behind the model took, and what guesses have saved,
is forgotten: it may have been measured on a busy machine or with more requests, and is not while nobody is asked."""
_LEAST = 0.1
"""Share of a step that guesses have to be expected to save. Less may be an error of the measurement."""
_LEAST_SAVED, _NEWEST = 0.05, 0.1
"""Steps that a step with guesses has to have saved on average, and the weight of the newest one in it."""
_SURE = 0.97
"""Share of what steps seem to take without guesses that is sure to be saved, less by how irregular they are: who asks
whenever guesses seem to pay asks most when steps without were measured too long."""
_LONG = 64
"""Tokens that a request is expected to bring yet; if it has brought more, so many."""
_OUTLIER = 3.0
"""A step counts as at most so many times what it takes without guesses: a machine may be busy for a moment."""
_MARGIN = 2.0
"""How many times what a text costs to compute it has to save, since nobody knows how long it will be."""

Wanted = Sequence[tuple[RequestState, int]]


class _Asked(NamedTuple):
    """What the model was asked before the last step."""

    num_decode: int
    plain: float
    """Seconds that the step would have taken without guesses, as far as that is sure,"""
    base: float
    """and that it was expected to take with those that are not the model's."""
    num_guessed: int
    seconds: float
    """What the model took."""
    num_right: int
    """Right guesses of all steps before."""
    is_usual: bool
    """Whether it was expected to pay, and no text had to be computed first, which is weighed by itself."""
    step_seconds: float | None = None
    """Of that step, once it is over; None where it had prompts too."""


class Asking:
    """Decides for whom a draft model guesses, and keeps count of what it gains."""

    def __init__(self, model: DraftModel, options: EngineOptions) -> None:
        self.model, self.tally = model, ModelTally()
        self.costs = AskCosts(model.ask_seconds, Pace())
        self._chunk = options.prefill_chunk
        self._balance = 0.0
        self._counted = 0.0
        """Seconds of the engine that have been added to it."""
        self._asked: _Asked | None = None
        self._since_plain = self._plain_left = 0
        self._start = 0.0
        """Seconds that may be lost before any are gained."""
        self._saved = 0.0
        """Share of a step that guesses were last expected to save."""
        self._has_saved = 2 * _LEAST
        """What they have saved on average; at first it is expected."""
        self._rest = self._resting = self._num_idle = 0
        self._is_behind = self._is_doubted = False
        """Whether the model has run since the last step without it, and whether what steps take was in doubt before the
        last one."""

    def begin(self, pace: Pace, num_decode: int, *, is_alone: bool) -> bool:
        """Before each step of so many decoding tokens: count what the last one has gained; whether the model may be
        asked now. `is_alone` says whether the step computes no prompts: those take their steps in any case, and
        who decodes beside them saves none by guesses."""
        self._settle(pace)
        step = pace.decode_seconds(1)
        if step is None:
            return False
        self._start = _START * step
        self._balance = min(self._balance, _MOST * step)
        self.costs.pace.context = self.model.pace.context = pace.context
        every = _CLOSE_EVERY if self._saved < _CLOSE else _PLAIN_EVERY
        # Once: where requests guess from their own texts, no step may be made that ends the doubt.
        was_doubted, self._is_doubted = self._is_doubted, pace.is_doubted(num_decode)
        if self._since_plain >= every or (self._is_doubted and not was_doubted):
            self._since_plain, self._plain_left = 0, _PLAIN
        if self._plain_left:
            self._plain_left -= 1
            return False
        if self._resting:
            self._resting -= 1
            return False
        # Where no guess can be paid for, nothing need be weighed.
        able = self.model.is_working and self._left >= self.model.ask_seconds(1)
        return is_alone and able

    def _settle(self, pace: Pace) -> None:
        """Count what the last step has gained."""
        self._balance += _SHARE * (pace.seconds - self._counted)
        self._counted = pace.seconds
        asked, self._asked = self._asked, None
        self._is_behind = asked is not None
        if asked is None:
            return
        gained = self._gained(asked)
        self._balance += gained
        if asked.plain and asked.is_usual and asked.step_seconds is not None:
            self._has_saved += _NEWEST * (gained / asked.plain - self._has_saved)
        self._since_plain += 1

    def note(self, num_decode: int, num_prompt: int, seconds: float) -> bool:
        """Take note of a step; whether it is one of those that the model has made longer, by which no other should be
        measured."""
        # Nothing is weighed before a step in which nobody chooses: it is no step behind the model.
        is_behind, self._is_behind = self._is_behind and not num_prompt, False
        if is_behind and self._asked is not None:
            self._asked = self._asked._replace(step_seconds=seconds)
            if self._asked.num_guessed:
                self.costs.pace.note(num_decode, 0, seconds)
        return is_behind

    def charge(self, seconds: float) -> None:
        """Count what it took to decide whom to ask."""
        self._balance -= seconds

    @property
    def _left(self) -> float:
        """What may be spent on guesses that seem to pay."""
        return self._balance + self._start

    def offer(self, state: RequestState, most: int) -> Offer:
        """What the model could guess for a request that wants `most` tokens."""
        if state.asked is None:
            state.asked = Record(self.tally)
        most = min(most, self.model.max_model_len - len(state.tokens))
        # The share of one request is from few guesses: who was lucky would be believed.
        acceptance = (state.asked.acceptance + self.tally.acceptance) / 2
        return Offer(acceptance, max(most, 0), is_asked=True)

    def ask(
        self, wanted: Wanted, saved: float, num_decode: int, num_other: int, pace: Pace
    ) -> None:
        """Set the drafts of requests.

        Args:
            wanted: those that the model may guess for, and how many tokens would pay.
            saved: seconds that this would save for each token.
            num_decode: tokens of the step without guesses.
            num_other: guesses in it that are not the model's.
        """
        plain = pace.decode_seconds(num_decode) or 0.0
        self._saved = saved * num_decode / plain if plain else 0.0
        is_worth = self._saved >= _LEAST and self._has_saved >= _LEAST_SAVED
        chosen = self._worth_it(wanted, saved) if is_worth else ()
        self._num_idle = 0 if chosen else self._num_idle + 1
        is_usual = bool(chosen) and all(self.model.behind(state) <= NEAR for state, _ in chosen)
        chosen = chosen or self._trial(wanted, num_decode, pace)
        guesses: list[list[int]] = []
        if self._num_idle >= _FORGET:
            self._num_idle, self.costs = 0, AskCosts(self.model.ask_seconds, Pace())
            self.costs.pace.context = pace.context
            self._has_saved = 2 * _LEAST
        self._rest = 0 if chosen else min(2 * self._rest + 1, _LONGEST_REST)
        self._resting = self._rest
        if chosen:
            before, right = self.model.pace.seconds, self.tally.right
            guesses = self.model.propose(chosen, self._room(num_decode, pace))
            num_guessed = sum(map(len, guesses))
            seconds = self.model.pace.seconds - before
            sure = _SURE * (1.0 - pace.noise)
            base = pace.decode_seconds(num_decode + num_other) or 0.0
            self._asked = _Asked(
                num_decode, sure * plain, base, num_guessed, seconds, right, is_usual
            )
            self._is_behind = True
        for (state, _), guess in zip(chosen, guesses, strict=True):
            state.draft, state.guesser = guess, state.asked
        for state, _ in wanted:
            if not state.draft and state.asked is not None:
                state.asked.rest()

    def _gained(self, asked: _Asked) -> float:
        """Seconds that the guesses have saved."""
        # No guess makes a step shorter: what looks so is noise, and would pay for more guesses.
        taken = min(asked.step_seconds or asked.base, _OUTLIER * asked.base)
        longer = max(taken - asked.base, 0.0)
        right = self.tally.right - asked.num_right
        return right * asked.plain / asked.num_decode - longer - asked.seconds

    def _worth_it(self, wanted: Wanted, saved: float) -> Wanted:
        """Those whose text is computed already, or costs less than it will save."""
        budget = self._left
        chosen: list[tuple[RequestState, int]] = []
        for state, length in wanted if budget > 0 else ():
            late = self.model.behind(state)
            cost = 0.0 if late <= NEAR else late * self.model.pace.prompt_token_seconds
            if length and _MARGIN * cost <= saved * _expected(state) and cost <= budget:
                budget -= cost
                chosen.append((state, length))
        return chosen

    def _trial(self, wanted: Wanted, num_decode: int, pace: Pace) -> Wanted:
        """One guess for the request for which it costs least, once there is time to lose for it."""
        able = [state for state, _ in wanted if self.offer(state, 1).most]
        if not able or self._balance < 0:
            return []
        state = min(able, key=self.model.behind)
        late = self.model.behind(state) * self.model.pace.prompt_token_seconds
        plain = pace.decode_seconds(num_decode) or 0.0
        longer = self.costs.step_seconds(num_decode + 1, pace) - plain
        if late + self.model.ask_seconds(1) + max(longer, 0.0) > self._balance:
            return []
        at_best = [Offer(1.0, self.offer(state, NEAR).most, is_asked=True)]
        best = choose_lengths(at_best, num_decode, pace, self.costs)
        return [(state, 1)] if any(best.lengths) else []

    def _room(self, num_decode: int, pace: Pace) -> int:
        """Tokens of late texts that a step may compute: as prompts, they must not hold the others up."""
        token = self.model.pace.prompt_token_seconds
        seconds = pace.stall_seconds(num_decode)
        if seconds is None or not token:
            return self._chunk
        return min(self._chunk, max(int(seconds / token), NEAR))


def _expected(state: RequestState) -> int:
    """Tokens that a request is expected to bring yet."""
    brought = len(state.tokens) - state.num_prompt
    return min(state.request.params.max_tokens - brought, max(brought, _LONG))
