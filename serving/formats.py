"""How an answer is written: chat completions and text completions, whole and in chunks."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from serving.cards import ModelCard
from serving.generation import Answer, Delta, Generation, Token
from serving.scores import by_text, echoed_logprobs, prompt_entries
from serving.text import TokenTexts

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Format(ABC):
    """The wire format of one response; all its chunks share one id."""

    id: str
    card: ModelCard
    token_text: TokenTexts
    prompt_tokens: int
    num_choices: int
    include_usage: bool
    logprobs: bool
    prompt_logprobs: int | None = None
    """How many tokens to tell of each place of the prompts, as vLLM does; None for nothing."""
    created: int = field(default_factory=lambda: int(time.time()))

    object: ClassVar[str]
    chunk_object: ClassVar[str]

    def whole(self, answers: Sequence[Answer], generation: Generation) -> bytes:
        """The response that is no stream, as JSON.

        It is made choice by choice: with log-probabilities it may have a hundred megabytes, and the
        interpreter does nothing else while a piece of it is written.
        """
        choices = (_written(self.choice(answer) | _stop_reason(answer)) for answer in answers)
        parts = {name: _written(value) for name, value in self._head(self.object).items()}
        parts["choices"] = f"[{','.join(choices)}]"
        rest = self.rest(answers, generation).items()
        parts |= {name: _written(value) for name, value in rest}
        fields = ",".join(f'"{name}":{text}' for name, text in parts.items())
        return f"{{{fields}}}".encode()

    def rest(self, answers: Sequence[Answer], generation: Generation) -> Json:
        """What stands behind the choices of a response that is no stream."""
        return {"usage": self._usage(generation)}

    def chunk(self, choices: Sequence[Json]) -> Json:
        """One chunk of a stream."""
        chunk = self._head(self.chunk_object) | {"choices": list(choices)}
        return chunk | {"usage": None} if self.include_usage else chunk

    def usage_chunk(self, generation: Generation) -> Json:
        """The last chunk of a stream that counts tokens."""
        return self.chunk([]) | {"usage": self._usage(generation)}

    @abstractmethod
    def opening(self) -> list[Json]:
        """The choices of the chunks that come before any token."""

    @abstractmethod
    def choice(self, answer: Answer) -> Json:
        """A whole answer."""

    @abstractmethod
    def delta(self, delta: Delta) -> Json:
        """A piece of an answer."""

    def _head(self, kind: str) -> Json:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.card.name}
        if self.card.fingerprint is not None:
            head["system_fingerprint"] = self.card.fingerprint
        return head

    def _usage(self, generation: Generation) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generation.completion_tokens,
            "total_tokens": self.prompt_tokens + generation.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class ChatFormat(Format):
    """`chat.completion` and `chat.completion.chunk`."""

    object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    def rest(self, answers: Sequence[Answer], generation: Generation) -> Json:
        rest = super(ChatFormat, self).rest(answers, generation)
        if self.prompt_logprobs is None:
            return rest
        scores = prompt_entries(answers[0], self.prompt_logprobs, self.token_text)
        return rest | {"prompt_logprobs": scores}

    def opening(self) -> list[Json]:
        delta = {"role": "assistant", "content": ""}
        return [self._piece(index, delta, (), None) for index in range(self.num_choices)]

    def choice(self, answer: Answer) -> Json:
        return {
            "index": answer.index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(answer.tokens),
            "finish_reason": answer.finish_reason,
        }

    def delta(self, delta: Delta) -> Json:
        content = {"content": delta.text} if delta.text else {}
        piece = self._piece(delta.index, content, delta.tokens, delta.finish_reason)
        return piece | _stop_reason(delta)

    def _piece(
        self, index: int, delta: Json, tokens: Sequence[Token], finish_reason: str | None
    ) -> Json:
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(tokens) if tokens else None,
            "finish_reason": finish_reason,
        }

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        if not self.logprobs:
            return None
        return {"content": [self._token(token) for token in tokens], "refusal": None}

    def _token(self, token: Token) -> Json:
        top = [self._entry(id, logprob) for id, logprob in token.top]
        return self._entry(token.id, token.logprob) | {"top_logprobs": top}

    def _entry(self, token_id: int, logprob: float) -> Json:
        text = self.token_text(token_id)
        # A token that is a part of a character has no text, and so no bytes, of its own.
        raw = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": raw}


@dataclass(frozen=True, slots=True)
class CompletionFormat(Format):
    """`text_completion`, whose chunks look like its whole."""

    echoes: Mapping[int, str] = field(default_factory=dict[int, str])
    """What is repeated before each answer, by its index."""
    num_echoed: int | None = None
    """How many tokens to tell of each place of what is repeated; None for nothing."""

    object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    def opening(self) -> list[Json]:
        return [self._choice(index, text, (), None) for index, text in self.echoes.items()]

    def choice(self, answer: Answer) -> Json:
        echo = self.echoes.get(answer.index, "")
        tokens = answer.tokens
        if self.num_echoed is not None and answer.end is not None:
            # Programs that score texts ask for one token more, and leave out the last one that comes.
            tokens = [*tokens, answer.end]
        tokens = [replace(token, offset=token.offset + len(echo)) for token in tokens]
        choice = self._choice(answer.index, echo + answer.text, tokens, answer.finish_reason)
        if self.num_echoed is not None:
            before = echoed_logprobs(answer, self.num_echoed, self.token_text)
            choice["logprobs"] = {k: before[k] + v for k, v in choice["logprobs"].items()}
        if self.prompt_logprobs is not None:
            entries = prompt_entries(answer, self.prompt_logprobs, self.token_text)
            choice["prompt_logprobs"] = entries
        return choice

    def delta(self, delta: Delta) -> Json:
        echo = self.echoes.get(delta.index, "")
        tokens = [replace(token, offset=token.offset + len(echo)) for token in delta.tokens]
        choice = self._choice(delta.index, delta.text, tokens, delta.finish_reason)
        return choice | _stop_reason(delta)

    def _choice(
        self, index: int, text: str, tokens: Sequence[Token], finish_reason: str | None
    ) -> Json:
        logprobs = self._logprobs(tokens) if self.logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, tokens: Sequence[Token]) -> Json:
        return {
            "tokens": [self.token_text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [by_text(token.top, self.token_text) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


def _written(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _stop_reason(part: Answer | Delta) -> Json:
    """What `length` does not say."""
    return {"stop_reason": "timeout"} if part.timed_out else {}
