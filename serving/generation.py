"""The answers to one request while they grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lifecycle.engines.base import Event, Request
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


@dataclass(slots=True)
class Answer:
    """One answer in full."""

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list[Token])
    finish_reason: str | None = None


@dataclass(slots=True)
class _Choice:
    index: int
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
            request.id: _Choice(index, text)
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
        answers = [Answer(choice.index) for choice in self._choices.values()]
        async for deltas in self:
            for delta in deltas:
                answer = answers[delta.index]
                answer.text += delta.text
                answer.tokens += delta.tokens
                answer.finish_reason = delta.finish_reason
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
        text, tokens = "", ()
        if event.token_id is not None:
            self.completion_tokens += 1
            if event.logprob is not None:
                token = Token(event.token_id, event.logprob, event.top_logprobs, choice.shown)
                tokens = (token,)
            text = choice.text.push(event.token_id)
        if event.finish_reason is not None:
            text += choice.text.finish()
        reason = None if event.finish_reason is None else str(event.finish_reason)
        if choice.text.stopped:
            self._call.finish(event.request_id)
            reason = "stop"
        choice.shown += len(text)
        choice.finished = reason is not None
        if not (text or tokens or reason):
            return None
        return Delta(choice.index, text, tokens, reason)
