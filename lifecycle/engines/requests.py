"""What goes into an engine and what comes out of it: requests, how they are sampled, and events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

LONGEST_REPEAT = 64
"""Tokens of a repetition that DRY looks at."""


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    """Its time was over (`Request.timeout`)."""
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen; validated when a request is submitted."""

    max_tokens: int = 128
    """Most new tokens; the engine also ends a request at its context length."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    typical_p: float = 1.0
    """Locally typical sampling (Meister et al. 2022): the tokens whose surprise is nearest to the expected
    one, up to this share of the chances."""
    repetition_penalty: float = 1.0
    """Over prompt and output, as in CTRL (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that the output holds."""
    frequency_penalty: float = 0.0
    """Taken once for each time that the output holds a token."""
    dry_multiplier: float = 0.0
    """What the shortest repetition that is not allowed costs its next token (DRY); 0 is none."""
    dry_base: float = 1.75
    """How many times as much each token more of the repetition costs."""
    dry_allowed_length: int = 2
    """Tokens of a repetition whose continuation costs dry_multiplier; shorter ones cost nothing. At most
    `LONGEST_REPEAT`."""
    dry_breakers: frozenset[int] = frozenset()
    """Tokens that no repetition reaches over; those that end the request are among them."""
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float], hash=False)
    """Added to the logits of tokens."""
    banned_token_ids: frozenset[int] = frozenset()
    """Tokens that never come."""
    min_tokens: int = 0
    """New tokens before the request may end: no token that ends it comes, and no stop sequence counts."""
    seed: int | None = None
    """The same seed gives the same tokens whatever else is in the batch."""
    stop_token_ids: frozenset[int] = frozenset()
    """End the request besides the model's own end-of-sequence ids; not part of the output."""
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    """End the request when the output ends with one; unlike a stop token it is part of it."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """Report the chosen token's log-probability and that many alternatives."""
    prompt_logprobs: int | None = None
    """Report the same of the prompt's tokens, from `prompt_logprobs_from` on; `max_tokens` may be 0 then."""
    prompt_logprobs_from: int = 1
    """Index of the first token of the prompt that is scored; the very first has nothing before it."""


class Constraint(Protocol):
    """What the output of one request must be: a grammar, with its place in it. It counts the tokens that
    were chosen, so each request needs its own."""

    def mask(self) -> NDArray[np.bool_]:
        """The tokens that may come next, [vocab_size]; what ends the request is among them where
        the output may end."""
        ...

    def accept(self, token: int) -> None:
        """Take note of a chosen token, one that the mask allows.

        Raises:
            RequestError: the grammar has grown beyond its limits.
        """
        ...

    def forced(self) -> Sequence[int]:
        """The tokens that must come next; the engine does not ask the model about them, unless their
        log-probabilities are wanted, and calls `accept` for each that it takes."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow what was accepted."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue."""

    id: str
    prompt: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    adapter: str | None = None
    """The name of a loaded adapter to answer with."""
    cache_salt: str = ""
    """Prompts share what is cached of them only with prompts of the same salt."""
    priority: int = 0
    """Lower ones go first, and take the slots of higher ones, which go on where they were."""
    tenant: str = ""
    """Whom the request is for: among requests of one priority that wait, those go first whose tenant
    has had the fewest tokens."""
    timeout: float | None = None
    """Seconds after its submission at which the request ends."""
    constraint: Constraint | None = field(default=None, compare=False)
    """What the output must be; used by this request alone."""


class PromptLogprob(NamedTuple):
    """How likely one token of a prompt was to the model."""

    logprob: float
    rank: int
    """1 for the most likely token of its place, 2 for the next."""
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Event(NamedTuple):
    """One new token of a request, or its end. The last event of a request has `finish_reason`; with a
    stop sequence or the last token it brings a token too.

    `token_id` is None on an end that brings no token (stop token, cancellation, error).
    """

    request_id: str
    token_id: int | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    error: str = ""
    is_refused: bool = False
    """Whether the error lies in what the request asked for."""
    cached_tokens: int = 0
    """With the first token: those of the prompt that were not computed, but found in the prefix cache."""
    prompt_logprobs: tuple[PromptLogprob, ...] = ()
    """With the first token, where asked for."""
    queue_seconds: float | None = None
    """With the first token: how long the request waited for a slot."""
    stop_token_id: int | None = None
    """The token that ended the request, which is no part of its output; the log-probabilities of this
    event are its."""


@dataclass(frozen=True, slots=True)
class Generation:
    """All that one prompt gave."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a continuation is to the model."""

    logprob: float
    """The sum over its tokens, natural logarithm."""
    is_greedy: bool
    """Whether each of its tokens is the most likely one of its place."""
