"""From the logits of one request to what is told of it: tokens, scores of its prompt, its end."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.requests import Event, FinishReason, PromptLogprob
from lifecycle.engines.sampling import Choice, Floats, Scan, choose, log_softmax, ranked
from lifecycle.engines.state import LONGEST_RUN, RequestState
from lifecycle.errors import RequestError

_NOT_FINITE = "the model's output is not a finite number"


class Progress:
    """What the requests of one model have in common: what ends them."""

    def __init__(
        self, eos_token_ids: frozenset[int], max_model_len: int, long_context: int | None
    ) -> None:
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len
        self._long_context = long_context
        self._score_seconds = 0.0

    def take_score_seconds(self) -> float:
        """What scoring prompts has taken since this was asked last."""
        seconds, self._score_seconds = self._score_seconds, 0.0
        return seconds

    def is_long(self, num_tokens: int) -> bool:
        """What `Row.is_long` must be for the rows of a text of so many tokens."""
        return self._long_context is not None and num_tokens > self._long_context

    def advance(self, state: RequestState, rows: Scan, start: int, end: int) -> list[Event]:
        """Take what a step gave a request: score its prompt, choose tokens as far as its draft was right.

        Args:
            rows: those of a step.
            start, end: which are the request's: one after each of its last computed tokens, its draft
                among them; none of a prompt that goes on and is not scored.

        Returns:
            What there is to tell; the last event has a `finish_reason` if the request has ended.
        """
        if (count := state.request.params.prompt_logprobs) is not None:
            begun = time.perf_counter()
            start += _score(state, rows.logits[start:end], count)
            self._score_seconds += time.perf_counter() - begun
        if start == end:
            return []
        is_first = len(state.tokens) == state.num_prompt
        if state.request.params.max_tokens == 0:
            events = [Event(state.request.id, finish_reason=FinishReason.LENGTH)]
        else:
            events = self._choose(state, rows, start, end)
        if is_first:
            events[0] = events[0]._replace(
                cached_tokens=state.num_cached,
                prompt_logprobs=tuple(state.prompt_logprobs),
                queue_seconds=state.queue_seconds,
            )
        return events

    def _choose(self, state: RequestState, rows: Scan, start: int, end: int) -> list[Event]:
        """Choose a token, and one more for each guess that was chosen as guessed."""
        draft = state.draft
        if not draft:
            return self._follow(state, draft, rows, start, end)
        base, state.draft = len(state.tokens), []
        events = self._follow(state, draft, rows, start, end)
        right = _common(draft, state.tokens[base:])
        # Nothing is computed of a text that begins anew as a long one.
        if state.num_computed:
            state.num_computed += right
        if state.guesser is not None:
            state.guesser.note(len(draft), right)
        return events

    def _follow(
        self, state: RequestState, draft: list[int], rows: Scan, start: int, end: int
    ) -> list[Event]:
        base, events = len(state.tokens), list[Event]()
        at = start
        while True:
            try:
                choice = choose(rows, at, state.sampler)
                events += self._append(state, choice)
            except RequestError as error:
                events.append(failed(state, str(error), is_refused=True))
            if events[-1].finish_reason is not None:
                return events
            if not state.is_long and self.is_long(len(state.tokens)):
                # All that is in the cache was rotated as in a short text.
                state.is_long = True
                state.recompute()
                return events
            count = len(state.tokens) - base
            at = start + count
            if at >= end or state.tokens[base:] != draft[:count]:
                return events

    def _append(self, state: RequestState, choice: Choice | None) -> list[Event]:
        """Give a request a token, and those that its constraint leaves no choice about, as many as the next step computes:
        all of a long text would be told at once, and others wait meanwhile."""
        if choice is None:
            return [failed(state, _NOT_FINITE)]
        events = [self._event(state, choice)]
        constraint, params = state.request.constraint, state.request.params
        # Only the model can tell how likely a token was.
        if (
            constraint is None
            or params.logprobs is not None
            or events[-1].finish_reason is not None
        ):
            return events
        for token in constraint.forced()[: LONGEST_RUN - 1]:
            if token in params.banned_token_ids:
                break
            state.sampler.note(token)
            events.append(self._event(state, Choice(token)))
            if events[-1].finish_reason is not None:
                break
        return events

    def _event(self, state: RequestState, choice: Choice) -> Event:
        """The next token of a request, which it gets unless that is its end."""
        request, token = state.request, choice.token_id
        is_eos = token in self._eos_token_ids and not request.params.ignore_eos
        if is_eos or token in request.params.stop_token_ids:
            logprobs = choice.logprob, choice.top_logprobs
            return Event(request.id, None, *logprobs, FinishReason.STOP, stop_token_id=token)
        state.tokens.append(token)
        reason = self._reason(state)
        return Event(request.id, token, choice.logprob, choice.top_logprobs, reason)

    def _reason(self, state: RequestState) -> FinishReason | None:
        """Why the newest token is the last one, if it is."""
        params, constraint = state.request.params, state.request.constraint
        count = len(state.tokens) - state.num_prompt
        ends = params.stop_sequences if count >= params.min_tokens else ()
        is_stopped = bool(ends) and any(
            len(end) <= count and tuple(state.tokens[-len(end) :]) == end for end in ends
        )
        if is_stopped or (constraint is not None and constraint.is_complete):
            return FinishReason.STOP
        is_full = count >= params.max_tokens or len(state.tokens) >= self._max_model_len
        return FinishReason.LENGTH if is_full else None


def failed(state: RequestState, error: str, *, is_refused: bool = False) -> Event:
    """The end of a request by an error."""
    reason = FinishReason.ERROR
    return Event(state.request.id, finish_reason=reason, error=error, is_refused=is_refused)


def _score(state: RequestState, logits: Floats, count: int) -> int:
    """Score tokens of the prompt by the first of `logits`, with the `count` likeliest beside each; how many
    that took."""
    first = state.request.params.prompt_logprobs_from + len(state.prompt_logprobs)
    targets = state.tokens[first : state.num_prompt][: len(logits)]
    for row, target in zip(logits, targets, strict=False):
        state.prompt_logprobs.append(_prompt_logprob(row, target, count))
    return len(targets)


def _prompt_logprob(row: NDArray[np.float32], target: int, count: int) -> PromptLogprob:
    logprobs = log_softmax(row)
    rank = 1 + int(np.count_nonzero(row > row[target]))
    return PromptLogprob(float(logprobs[target]), rank, ranked(row, logprobs, count))


def _common(left: list[int], right: list[int]) -> int:
    """How many tokens two lists have in common from their beginning on."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
