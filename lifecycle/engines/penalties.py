"""What changes the logits of a request before its next token is chosen.

The order is: bias, repetition penalty, presence and frequency penalties, DRY, and last the tokens
that may not come, which nothing lifts. Presence and frequency count the output alone, as in the OpenAI
API; the repetition penalty and DRY read the prompt as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.requests import LONGEST_REPEAT, SamplingParams

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

_READ = 4096
"""Last tokens of a text that DRY looks for repetitions in."""
_MOST = 1e30
"""Of a penalty; finite in float32 also when others are added."""


class Adjustments:
    """The adjustments of one request, and what they know of its tokens."""

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocab_size: int,
        ends: frozenset[int],
        output: Sequence[int] = (),
    ) -> None:
        """`ends` are the tokens that would end the request, `output` those chosen so far."""
        self._params, self._prompt, self._vocab_size = params, prompt, vocab_size
        self._banned, self._ends = _ids(params.banned_token_ids), _ids(ends)
        self._biased = _ids(params.logit_bias)
        self._bias = np.array([params.logit_bias[i] for i in self._biased.tolist()], np.float32)
        # A turn of a conversation ends as the one before did, and must.
        self._breakers = params.dry_breakers | ends
        self._counts = Counter[int](output)
        self._num_output = len(output)
        self._begun = [*prompt, *output] if output else prompt
        # Made with the first token: a request that waits in line takes no memory for them.
        self._seen: NDArray[np.bool_] | None = None
        self._history: Ids | None = None

    @staticmethod
    def asked_for(params: SamplingParams) -> bool:
        """Whether the parameters adjust anything."""
        return bool(
            params.logit_bias
            or params.repetition_penalty != 1.0
            or params.presence_penalty
            or params.frequency_penalty
            or params.dry_multiplier
            or params.banned_token_ids
            or params.min_tokens
        )

    def apply(self, logits: Floats) -> Floats:
        """The logits [vocab_size] that a token is chosen by; `logits` are left as they are."""
        params, adjusted = self._params, logits.copy()
        adjusted[self._biased] += self._bias
        if params.repetition_penalty != 1.0:
            _repetition(adjusted, self._tokens_seen(), np.float32(params.repetition_penalty))
        if self._counts and (params.presence_penalty or params.frequency_penalty):
            ids = np.fromiter(self._counts, np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(ids))
            adjusted[ids] -= params.presence_penalty + params.frequency_penalty * counts
        if params.dry_multiplier:
            self._dry(adjusted)
        adjusted[self._banned] = -np.inf
        if self._num_output < params.min_tokens:
            adjusted[self._ends] = -np.inf
        return adjusted

    def note(self, token: int) -> None:
        """Take note of a chosen token."""
        if self._params.repetition_penalty != 1.0:
            self._tokens_seen()[token] = True
        if self._params.dry_multiplier:
            history, size = self._text(), len(self._prompt) + self._num_output
            if size == len(history):
                self._history = history = np.concatenate([history, np.empty_like(history)])
            history[size] = token
        self._counts[token] += 1
        self._num_output += 1

    def _tokens_seen(self) -> NDArray[np.bool_]:
        """Which tokens the prompt and the output hold, [vocab_size]."""
        if self._seen is None:
            self._seen = np.zeros(self._vocab_size, dtype=np.bool_)
            self._seen[np.asarray(self._begun)] = True
        return self._seen

    def _text(self) -> Ids:
        """Prompt and output, and room for more of it."""
        if self._history is None:
            self._history = np.array(self._begun, np.int64)
        return self._history

    def _dry(self, logits: Floats) -> None:
        """DRY ("don't repeat yourself", as text-generation-webui and llama.cpp have it): a token that would
        make a repetition longer loses multiplier * base ** (length - allowed)."""
        params = self._params
        history = self._text()[: len(self._prompt) + self._num_output]
        tokens, lengths = continuations(history[-_READ:], self._breakers)
        counted = lengths >= params.dry_allowed_length
        tokens, lengths = tokens[counted], lengths[counted]
        powers = np.float64(params.dry_base) ** (lengths - params.dry_allowed_length)
        penalties = np.minimum(params.dry_multiplier * powers, _MOST).astype(np.float32)
        most = np.zeros_like(logits)
        np.maximum.at(most, tokens, penalties)
        logits -= most


def continuations(history: Ids, breakers: frozenset[int]) -> tuple[Ids, Ids]:
    """Where the end of `history` stands earlier in it: the token that followed each time, and how many
    tokens before that are the same as those at the end. No repetition reaches over a breaker,
    and a breaker continues none."""
    none = np.empty(0, np.int64)
    last = len(history) - 1
    recent = history[::-1][:LONGEST_REPEAT].tolist()
    unbroken = next((i for i, token in enumerate(recent) if token in breakers), len(recent))
    if last < 1 or unbroken == 0:
        return none, none
    places = np.flatnonzero(history[:last] == history[last])
    lengths = np.ones(len(places), np.int64)
    alive = np.arange(len(places))
    for back in range(1, unbroken):
        at = places[alive] - back
        alive = alive[(at >= 0) & (history[at] == recent[back])]
        if not len(alive):
            break
        lengths[alive] += 1
    tokens = history[places + 1]
    goes_on = ~np.isin(tokens, _ids(breakers))
    return tokens[goes_on], lengths[goes_on]


def _repetition(logits: Floats, seen: NDArray[np.bool_], penalty: np.float32) -> None:
    values = logits[seen]
    logits[seen] = np.where(values > 0, values / penalty, values * penalty)


def _ids(ids: Iterable[int]) -> Ids:
    return np.array(sorted(ids), np.int64)
