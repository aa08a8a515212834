"""A request on its way from the queue to its last token."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from lifecycle.engines.backend import Block, Row
from lifecycle.engines.drafts import Lookup, Record
from lifecycle.engines.requests import PromptLogprob, Request
from lifecycle.engines.sampling import Sampler

GRAIN = 2
"""Tokens that prompts are cut at multiples of where a step has no room for a whole chunk. What a prompt
gives is the same to the last bit wherever it is cut, unless a single token is left: ONNX Runtime computes
products of one row by another kernel."""
LONGEST_RUN = 16
"""Tokens that a request which decodes gets in a step, drafts aside, and brings to the next. A constraint may force
hundreds at once; together they would hold up all others, and be wider than the cache has room for."""


@dataclass(slots=True, eq=False)
class RequestState:
    """A request, its text so far, and how much of that the model has seen."""

    request: Request
    sampler: Sampler
    tokens: list[int]
    """The prompt and what was generated after it."""
    num_prompt: int
    num_prefill: int
    """Tokens to compute before the next one is chosen: the prompt, or more after `recompute`."""
    num_computed: int = 0
    """Tokens in the cache."""
    num_passed: int = 0
    """Tokens that there were when memory behind windows was given back last."""
    is_long: bool = False
    """Whether the text is beyond the model's first context (see `Row`)."""
    adapter: int = 0
    """The number of the adapter that the request is computed with; 0 is none."""
    slot: int = -1
    order: int = 0
    """Number of the request among all that came."""
    arrived: float = 0.0
    """Time of `time.monotonic` at which it came."""
    queue_seconds: float | None = None
    """How long it waited for its first slot."""
    deadline: float = inf
    """Time of `time.monotonic` at which it ends."""
    num_cached: int = 0
    """Tokens of the prompt that were found computed."""
    num_restarts: int = 0
    """How often it was begun anew."""
    num_seen: int = 0
    """Tokens that had been in the cache when the request was begun anew."""
    prefix_keys: list[bytes] = field(default_factory=list[bytes])
    """What the chunks of the text are kept under, as far as it was asked for."""
    twin_key: int = 0
    """Equal for prompts that can share all that is computed of them."""
    parked: list[Block] = field(default_factory=list[Block])
    """What was put aside of its part of the cache, from its end on."""
    lookup: Lookup | None = None
    """What guesses its next tokens from its own text."""
    asked: Record | None = None
    """How often a draft model was right about it."""
    guesser: Record | None = None
    """Which of the two the draft is from."""
    draft: list[int] = field(default_factory=list[int])
    """Guessed tokens that the next step computes behind the newest one."""
    prompt_logprobs: list[PromptLogprob] = field(default_factory=list[PromptLogprob])
    """Those of the prompt's tokens, as far as they are known."""

    @property
    def is_prefilling(self) -> bool:
        """Whether the next step computes more than the newest token."""
        return self.num_computed < self.num_prefill

    @property
    def num_left(self) -> int:
        """Tokens that are not computed yet."""
        return len(self.tokens) - self.num_computed

    @property
    def rank(self) -> tuple[int, int]:
        """Requests of lower rank go first."""
        return self.request.priority, self.order

    @property
    def first_logit(self) -> int:
        """The first token whose logits are wanted: the one before the next that is scored or chosen."""
        params = self.request.params
        if params.prompt_logprobs is not None:
            scored = params.prompt_logprobs_from + len(self.prompt_logprobs)
            if scored < self.num_prompt:
                return scored - 1
        return len(self.tokens) - 1

    def yields_to(self, other: RequestState) -> bool:
        """Whether it gives its slot to another request."""
        return self.request.priority > other.request.priority

    def recompute(self) -> None:
        """Begin again with all tokens so far."""
        self.num_restarts += 1
        self.num_seen = max(self.num_seen, self.num_computed)
        self.num_computed, self.num_prefill = 0, len(self.tokens)
        self.num_cached = self.num_passed = 0
        self.prefix_keys.clear()
        self.draft.clear()
        self.parked.clear()

    def decoding_row(self, room: int) -> Row:
        """Of the tokens that a request which decodes has left the first, as many more as go into `room`, and its draft."""
        start = self.num_computed
        if start == len(self.tokens) - 1 and self.num_prompt <= start:
            # As below, without the time that it takes: this is what most rows are.
            tokens = [self.tokens[start], *self.draft]
            return Row(self.slot, start, tokens, len(tokens), self.is_long, self.adapter, 0)
        stop = start + 1 + room
        # A draft stands behind the newest token only.
        if stop < len(self.tokens):
            self.draft.clear()
        return self._row([*self.tokens[start:stop], *self.draft])

    def prompt_row(self, prefill_chunk: int, room: int) -> Row | None:
        """What is left of a prompt's chunk, or as much as goes into `room` tokens; None if that is nothing."""
        start = self.num_computed
        last = stop = min((start // prefill_chunk + 1) * prefill_chunk, self.num_prefill)
        if last - start > room:
            stop = (start + room) // GRAIN * GRAIN
            if stop <= start:
                return None
            stop += last - stop == 1
        return self._row(self.tokens[start:stop])

    def _row(self, tokens: list[int]) -> Row:
        start, first = self.num_computed, max(self.first_logit, self.num_computed)
        count = max(start + len(tokens) - first, 0)
        num_prompt = min(max(self.num_prompt - start, 0), len(tokens))
        return Row(self.slot, start, tokens, count, self.is_long, self.adapter, num_prompt)
