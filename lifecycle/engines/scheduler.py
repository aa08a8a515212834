"""Which tokens of which requests the next step computes.

Requests wait in line for a slot and keep it until they end. Every step carries one token of
each request that decodes, and prompt chunks beside them. A chunk ends at a multiple of the
chunk size in its own prompt, never where the step happens to be full, so how a prompt is cut,
and with it the last bit of every number computed from it, does not depend on the other
requests.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from lifecycle.engines.backend import Row
from lifecycle.engines.base import Request
from lifecycle.engines.sampling import Sampler


@dataclass(slots=True, eq=False)
class RequestState:
    """A request on its way from the queue to its last token."""

    request: Request
    sampler: Sampler
    tokens: list[int]
    """The prompt and what was generated after it."""
    num_prompt: int
    num_prefill: int
    """Tokens to compute before the next one is chosen: the prompt, or more after `recompute`."""
    num_computed: int = 0
    """Tokens in the cache."""
    is_long: bool = False
    """Whether the text is beyond the model's first context (see `Row`)."""
    adapter: int = 0
    """The adapter slot that the request is computed with; 0 is none."""
    slot: int = -1
    num_cached: int = 0
    """Tokens of the prompt that the prefix cache had."""
    prefix_keys: list[bytes] = field(default_factory=list[bytes])
    """What the chunks of the text are kept under, as far as it was asked for."""

    @property
    def is_prefilling(self) -> bool:
        """Whether the next step computes more than the newest token."""
        return self.num_computed < self.num_prefill

    def recompute(self) -> None:
        """Begin again with all tokens so far."""
        self.num_computed, self.num_prefill = 0, len(self.tokens)
        self.prefix_keys.clear()

    def next_row(self, prefill_chunk: int) -> Row:
        """The tokens that the next step computes."""
        start = self.num_computed
        if start + 1 == len(self.tokens):
            return Row(self.slot, start, self.tokens[start:], 1, self.is_long, self.adapter)
        boundary = (start // prefill_chunk + 1) * prefill_chunk
        end = min(boundary, self.num_prefill) if self.is_prefilling else len(self.tokens)
        is_last = end == len(self.tokens)
        tokens = self.tokens[start:end]
        return Row(self.slot, start, tokens, int(is_last), self.is_long, self.adapter)


class Scheduler:
    """First come, first served, over `num_slots` slots."""

    def __init__(self, num_slots: int, prefill_chunk: int) -> None:
        self._prefill_chunk = prefill_chunk
        # The lowest free slot is taken first: slots in use stay together, so a runtime that
        # computes slots 0 to n - 1 has few idle ones among them.
        self._free = list(range(num_slots))
        self.waiting: OrderedDict[str, RequestState] = OrderedDict()
        self.running: dict[str, RequestState] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.running or request_id in self.waiting

    def states(self) -> Iterator[RequestState]:
        """All requests, running or waiting."""
        return chain(self.running.values(), self.waiting.values())

    def add(self, state: RequestState) -> None:
        """Put a request at the end of the line."""
        self.waiting[state.request.id] = state

    def remove(self, request_id: str) -> None:
        """Take a request out; its slot is free from the next step on."""
        if state := self.running.pop(request_id, None):
            heapq.heappush(self._free, state.slot)
        else:
            self.waiting.pop(request_id, None)

    def schedule(
        self, reuse: Callable[[RequestState], None] | None = None
    ) -> list[tuple[RequestState, Row]]:
        """Give free slots to waiting requests, then choose the rows of the next step. `reuse` may
        take a request further in its prompt, just before a chunk of it would be computed.

        Prompt chunks fill one chunk size per step, oldest request first: the step stays short
        for those that decode in it, and larger products would be no faster per token.
        """
        self._admit()
        rows: list[tuple[RequestState, Row]] = []
        budget = self._prefill_chunk
        for state in self.running.values():
            if reuse is not None and state.is_prefilling and budget > 0:
                reuse(state)
            row = state.next_row(self._prefill_chunk)
            if state.is_prefilling:
                # What does not fit ends the filling: a shorter prompt must not overtake.
                fits = len(row.tokens) <= budget
                budget = budget - len(row.tokens) if fits else 0
                if not fits:
                    continue
            rows.append((state, row))
        return rows

    def _admit(self) -> None:
        while self.waiting and self._free:
            _, state = self.waiting.popitem(last=False)
            state.slot = heapq.heappop(self._free)
            self.running[state.request.id] = state
