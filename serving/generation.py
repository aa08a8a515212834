"""The answers to one request while they grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from lifecycle.engines.requests import Event, FinishReason, PromptLogprob, Request
from serving.text import AnswerText
from serving.worker import Call


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token whose log-probability was asked for."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most likely tokens at its place, with their log-probabilities."""
    offset: int
    """Characters of the answer that had been shown when it came."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one answer."""

    index: int
    text: str
    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None
    """`stop` or `length` in the last delta of an answer."""
    timed_out: bool = False
    """Whether the answer was cut because its time was over."""
    prompt_logprobs: tuple[PromptLogprob, ...] = ()
    """Those of all tokens of the prompt but the first, where asked for."""
    end: Token | None = None
    """The token that ended the answer, which is no part of it, where log-probabilities are asked for."""


@dataclass(slots=True)
class Answer:
    """One answer in full."""

    index: int
    prompt: Sequence[int] = ()
    text: str = ""
    tokens: list[Token] = field(default_factory=list[Token])
    finish_reason: str | None = None
    timed_out: bool = False
    prompt_logprobs: tuple[PromptLogprob, ...] = ()
    end: Token | None = None


@dataclass(slots=True)
class _Choice:
    index: int
    prompt: Sequence[int]
    text: AnswerText
    shown: int = 0
    finished: bool = False


class Generation:
    """The answers to one request: iterate for what each step adds, or `collect` all.

    Log-probabilities are reported for every generated token, those of a stop string included.
    """

    def __init__(
        self, call: Call, requests: Sequence[Request], texts: Sequence[AnswerText]
    ) -> None:
        self._call = call
        self._choices = {
            request.id: _Choice(index, request.prompt, text)
            for index, (request, text) in enumerate(zip(requests, texts, strict=True))
        }
        self.completion_tokens = 0
        """Tokens generated so far, over all answers."""
        self.cached_tokens = 0
        """Tokens of the prompts that were not computed, as far as it is known."""
        # Answers to one prompt come one after another, and the prompt is counted once.
        before = [None, *(request.prompt for request in requests)]
        pairs = zip(requests, before, strict=False)
        self._counted = {request.id for request, last in pairs if request.prompt is not last}

    def close(self) -> None:
        """Stop generating; needed whenever the answers are not read to their end."""
        self._call.close()

    async def collect(self) -> list[Answer]:
        """Wait for all answers.

        Raises:
            ApiError: the engine failed.
        """
        answers = [Answer(choice.index, choice.prompt) for choice in self._choices.values()]
        async for deltas in self:
            for delta in deltas:
                answer = answers[delta.index]
                answer.text += delta.text
                answer.tokens += delta.tokens
                answer.finish_reason = delta.finish_reason
                answer.timed_out = delta.timed_out
                answer.prompt_logprobs += delta.prompt_logprobs
                answer.end = delta.end
        return answers

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> list[Delta]:
        while True:
            events = await anext(self._call)
            deltas = [delta for event in events if (delta := self._take(event))]
            if deltas:
                return deltas

    def _take(self, event: Event) -> Delta | None:
        """What an event adds, if it is anything to see."""
        choice = self._choices[event.request_id]
        if event.request_id in self._counted:
            self.cached_tokens += event.cached_tokens
        if choice.finished:
            return None
        text = ""
        if event.token_id is not None:
            self.completion_tokens += 1
            text = choice.text.push(event.token_id)
        token = _token(event, choice.shown)
        tokens = (token,) if token is not None and event.token_id is not None else ()
        if event.finish_reason is not None:
            text += choice.text.finish()
        reason = None if event.finish_reason is None else str(event.finish_reason)
        timed_out = event.finish_reason is FinishReason.TIMEOUT
        if timed_out:
            # Clients know no other word for an answer that a limit has cut.
            reason = str(FinishReason.LENGTH)
        end = None if event.stop_token_id is None else token
        if choice.text.stopped:
            self._call.finish(event.request_id)
            reason, timed_out = "stop", False
        elif reason is not None:
            self._call.settle(event.request_id)
        choice.shown += len(text)
        choice.finished = reason is not None
        if not (text or tokens or reason or event.prompt_logprobs):
            return None
        return Delta(choice.index, text, tokens, reason, timed_out, event.prompt_logprobs, end)


def best_answers(answers: Sequence[Answer], best_of: int, n: int) -> list[Answer]:
    """Of each prompt's `best_of` answers the `n` with the highest log-probability per token, the best
    first; the token that ended an answer counts too."""
    best: list[Answer] = []
    for start in range(0, len(answers), best_of):
        ranked = sorted(answers[start : start + best_of], key=_mean_logprob, reverse=True)
        best += ranked[:n]
    for index, answer in enumerate(best):
        answer.index = index
    return best


def _token(event: Event, offset: int) -> Token | None:
    """The token of an event, if its log-probability is told."""
    id = event.stop_token_id if event.token_id is None else event.token_id
    if id is None or event.logprob is None:
        return None
    return Token(id, event.logprob, event.top_logprobs, offset)


def _mean_logprob(answer: Answer) -> float:
    tokens = [*answer.tokens, *([answer.end] if answer.end else [])]
    return sum(token.logprob for token in tokens) / len(tokens) if tokens else -inf
