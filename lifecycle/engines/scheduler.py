"""Which tokens of which requests the next step computes.

Requests wait in line for a slot. Every step carries the newest token of each request that decodes, with
the tokens guessed behind it, and parts of prompts beside them. A prompt is cut at multiples of the chunk
size or of 2 in itself, where the model gives the same to the last bit, so what is computed from it does not
depend on the other requests.

A request gives its slot back before its end in two cases. To one of lower priority number: then its part
of the cache is put aside first. And where the cache is full: then it is computed anew later.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain
from math import inf

from lifecycle.engines.backend import CacheBackend, Row
from lifecycle.engines.leaving import Leaving
from lifecycle.engines.line import WaitingLine
from lifecycle.engines.parking import Parking
from lifecycle.engines.state import GRAIN, RequestState
from lifecycle.engines.twins import TwinCopies
from lifecycle.engines.windows import ALL_SEEN, Windows

_PART = 8 << 20
"""Bytes that are copied before the time is looked at."""
_MOMENT = 1e-9
"""Seconds in which one chunk is copied, however long that takes."""

Batch = list[tuple[RequestState, Row]]
Reuse = Callable[[RequestState, float | None], bool]


class Scheduler:
    """Gives `num_slots` slots to requests, and rows of them to steps."""

    def __init__(
        self,
        num_slots: int,
        prefill_chunk: int,
        *,
        cache: CacheBackend | None = None,
        max_cache_tokens: float = inf,
        windows: Windows = ALL_SEEN,
        reuse: Reuse | None = None,
        on_release: Callable[[int], None] | None = None,
    ) -> None:
        """
        Args:
            cache: what holds keys and values; None if they cannot be copied.
            max_cache_tokens: how many tokens it may hold for all requests together, at least one
                context.
            windows: what of a text it holds.
            reuse: may take a request further in its prompt, just before it would be computed, in so many seconds;
                whether that was all it could do.
            on_release: is told of each slot whose request leaves it.
        """
        self._prefill_chunk = prefill_chunk
        self._cache = cache
        part = max(_PART // cache.bytes_per_token, 1) if cache is not None else 0
        self._copies = TwinCopies(cache, part) if cache is not None else None
        self._parking = Parking(cache, part)
        self._left: dict[int, int] = {}
        """Slots of requests that have left them, which are yet to be copied; and how many tokens each holds."""
        # A bounded cache has no room for what nobody needs.
        self._leaving = Leaving(cache) if cache is not None and max_cache_tokens == inf else None
        self._max_cache_tokens = max_cache_tokens
        self._windows = windows
        self._reuse = reuse
        self._on_release = on_release
        # The lowest free slot is taken first: slots in use stay together, so a runtime that
        # computes slots 0 to n - 1 has few idle ones among them.
        self._free = list(range(num_slots))
        self._num_requests = 0
        self.waiting = WaitingLine()
        self.running: dict[str, RequestState] = {}
        self.num_preemptions = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.running or request_id in self.waiting

    def states(self) -> Iterator[RequestState]:
        """All requests, running or waiting."""
        return chain(self.running.values(), self.waiting)

    @property
    def cache_tokens(self) -> float:
        """Tokens whose keys and values are held; where windows differ, as a mean over the layers."""
        parking = self._parking
        states = (state for state in self.running.values() if state not in parking)
        return parking.num_tokens + sum(self._windows.held(s.num_computed) for s in states)

    def seen_tokens(self) -> Sequence[float]:
        """Of each request that decodes, the tokens that its next one looks back on."""
        counts = [s.num_computed for s in self.active() if s.num_computed >= s.num_prefill]
        return counts if self._windows.narrowest == inf else list(map(self._windows.held, counts))

    def active(self) -> Collection[RequestState]:
        """Those in slots that may have rows in the next step."""
        copies, parking = self._copies or (), self._parking
        if not copies and not parking:
            return self.running.values()
        return [s for s in self.running.values() if s not in copies and s not in parking]

    def add(self, state: RequestState) -> None:
        """Put a request at the end of its line."""
        state.order = self._num_requests
        self._num_requests += 1
        self.waiting.enter(state)

    def remove(self, state: RequestState) -> None:
        """Take a request out; its slot is free from the next step on."""
        if self.running.pop(state.request.id, None):
            self._release(state)
        self._parking.drop(state)
        self.waiting.leave(state)
        if not self.running:
            self._settle()

    def drop(self, states: Collection[RequestState]) -> None:
        """Take requests out after a step that failed: their slots may hold anything."""
        if self._copies:
            self._copies.give_up(states)
        for state in states:
            self.remove(state)

    def forget_old(self, state: RequestState) -> None:
        """Give back the memory of what no token looks back on any more, now and then."""
        narrowest = self._windows.narrowest
        if state.num_computed < narrowest or self._cache is None:
            return
        if state.num_computed < max(state.num_passed, narrowest) + self._windows.step:
            return
        if self._copies is not None and not self._copies.is_read(state):
            self._cache.forget_passed(state.slot, state.num_computed, state.num_passed)
            state.num_passed = state.num_computed

    def find(self, request_id: str) -> RequestState | None:
        """A request by its id."""
        return self.running.get(request_id) or self.waiting.get(request_id)

    @property
    def is_copying(self) -> bool:
        """Whether there is anything to copy."""
        return bool(self._copies or self._parking)

    def copy(self, seconds: float | None) -> float | None:
        """Copy what is due of texts, in so many seconds, one part at least; what is left of them. Before guesses are
        made: those who have waited for a copy want some."""
        begun = time.perf_counter()
        for _ in chain(
            self._parking.copy_parts(), self._copies.copy_parts() if self._copies else ()
        ):
            if seconds is not None and time.perf_counter() - begun >= seconds:
                break
        # A slot may be free now.
        self.admit()
        return None if seconds is None else max(seconds - (time.perf_counter() - begun), 0.0)

    def admit(self) -> None:
        """Give slots to waiting requests. Where none is free, one of higher priority number makes room."""
        self._settle()
        if (gone := self._parking.finish()) is not None:
            self._preempt(gone)
        while (state := self.waiting.first()) is not None:
            if self._free and self._has_room(state):
                self._place(state)
                continue
            last = self._last_running()
            if last.request.priority <= state.request.priority:
                break
            if not self._free and self._goes_aside(last):
                return
            self._preempt(last)
        self._parking.turn_back()

    def schedule(
        self, room: int | None = None, seconds: float | None = None, left: float | None = None
    ) -> Batch:
        """Choose the rows of the next step.

        Prompts fill one chunk size per step, or `room` tokens where there are requests that decode, which may wait
        `seconds` for what is taken of other prompts, of which `left` are left, in the order of their ranks. The step
        stays short for those that decode in it, and larger products would be no faster per token.
        """
        batch: Batch = []
        for state in self.active():
            if not state.is_prefilling and (row := state.next_row(self._prefill_chunk)) is not None:
                batch.append((state, row))
        budget = self._prefill_chunk
        if batch and room is not None:
            budget = min(budget, max(room, GRAIN))
        if batch:
            self._add_prompts(batch, budget, seconds, left)
        else:
            self._add_prompts(batch, budget)
        self._fit(batch)
        if self._leaving is not None:
            self._leaving.give_back(self.running.values())
        return batch

    def share(self, leader: RequestState) -> list[RequestState]:
        """Take the requests in slots that have the prompt which `leader` has just finished to where it is."""
        if self._copies is None or len(leader.tokens) > leader.num_prompt:
            return []
        twins = self._twins(leader)
        for twin in twins:
            self._copies.add(twin, leader)
        return twins

    def _twins(self, leader: RequestState) -> list[RequestState]:
        """Those that can go on from what was computed for `leader`, as many as the cache has room for."""
        if leader.num_prefill != leader.num_prompt:
            return []
        # A prompt that is scored has logits before it is finished.
        if leader.is_prefilling:
            return []
        twins = [other for other in self.active() if _follows(other, leader)]
        each = self._windows.held(leader.num_prompt)
        room = max((self._max_cache_tokens - self.cache_tokens) / each, 0)
        return twins[: int(min(room, len(twins)))]

    def _add_prompts(
        self,
        batch: Batch,
        budget: int,
        seconds: float | None = None,
        left: float | None = None,
    ) -> None:
        """`left` of the `seconds` that copies may take has not been taken yet."""
        leaders: list[RequestState] = []
        whole = budget
        if seconds and left is not None and left < seconds:
            # What was taken is no time to compute in; but nobody waits for ever.
            budget, left = max(int(whole * left / seconds), GRAIN), max(left, _MOMENT)
        filling = (state for state in self.active() if state.is_prefilling)
        for state in sorted(filling, key=lambda state: state.rank):
            if budget <= 0:
                return
            if self._cache is not None and any(_follows(state, leader) for leader in leaders):
                continue
            leaders.append(state)
            if self._reuse is not None:
                begun, before = time.perf_counter(), state.num_computed
                is_whole = self._reuse(state, left)
                if seconds and left is not None and state.num_computed > before:
                    left = max(left - (time.perf_counter() - begun), 0.0)
                    # What was taken is no time to compute in. To look and find nothing takes none: the least budget must
                    # stay what it is.
                    budget = min(budget, int(whole * left / seconds))
                if not is_whole:
                    # It goes on in the next step.
                    continue
            row = state.next_row(self._prefill_chunk, budget)
            if row is None:
                # What does not fit ends the filling: a shorter prompt must not overtake.
                return
            budget -= len(row.tokens)
            batch.append((state, row))

    def _goes_aside(self, state: RequestState) -> bool:
        """Whether those who wait get a slot once its text is put aside: that of a request, if none is yet."""
        if self._parking.is_emptying:
            return True
        if self._copies is not None:
            if state in self._copies:
                return False
            if self._copies.is_read(state):
                # They have to be copied first, in parts too.
                return True
        return self._parking.put_aside(state)

    def _place(self, state: RequestState) -> None:
        self.waiting.take(state)
        state.slot = heapq.heappop(self._free)
        if state.queue_seconds is None:
            state.queue_seconds = time.monotonic() - state.arrived
        self.running[state.request.id] = state
        self._parking.take_back(state)

    def _has_room(self, state: RequestState) -> bool:
        """Whether `state` goes into the cache beside the prompts that are in slots, with some room to
        grow: else it would soon have to leave again."""
        if self._max_cache_tokens == inf or not self.running:
            return True
        wanted = (
            self._windows.held(max(s.num_computed, s.num_prefill))
            for s in (state, *self.running.values())
        )
        return sum(wanted) + self._prefill_chunk <= self._max_cache_tokens

    def _fit(self, batch: Batch) -> None:
        """Make room in the cache for what a step adds to it: without guesses, then at the cost of what
        came last."""
        if self._max_cache_tokens == inf or self._surplus(batch) <= 0:
            return
        for place, (state, row) in enumerate(batch):
            if state.draft:
                count = len(row.tokens) - len(state.draft)
                state.draft.clear()
                batch[place] = state, row._replace(tokens=row.tokens[:count], num_logits=1)
        while self._surplus(batch) > 0:
            if self._parking.drop_last():
                continue
            last = self._last_running()
            self._preempt(last)
            batch[:] = [pair for pair in batch if pair[0] is not last]

    def _last_running(self) -> RequestState:
        return max(self.running.values(), key=lambda state: state.rank)

    def _surplus(self, batch: Batch) -> float:
        added = sum(len(row.tokens) for _, row in batch)
        return self.cache_tokens + added - self._max_cache_tokens

    def _preempt(self, state: RequestState) -> None:
        """Send a request back to its line, to be computed anew unless its text is aside."""
        self.num_preemptions += 1
        del self.running[state.request.id]
        state.draft.clear()
        self._release(state)
        # Somebody waits for its slot.
        self._settle()
        if not self._parking.is_aside(state):
            state.recompute()
        self.waiting.push(state)

    def _release(self, state: RequestState) -> None:
        slot, state.slot = state.slot, -1
        self._parking.leave(state)
        if self._on_release is not None:
            self._on_release(slot)
        if self._copies is not None and self._copies.leave(state):
            self._left[slot] = len(state.tokens)
        else:
            self._free_slot(slot, len(state.tokens))

    def _settle(self) -> None:
        """Free the slots that were yet to be copied."""
        if self._copies is not None and (self._copies or self._left):
            self._copies.settle(self._left)
            while self._left:
                self._free_slot(*self._left.popitem())

    def _free_slot(self, slot: int, num_tokens: int) -> None:
        if self._leaving is not None:
            self._leaving.add(slot, num_tokens)
            if not self.running:
                self._leaving.give_back_all()
        elif self._cache is not None:
            self._cache.forget(slot)
        heapq.heappush(self._free, slot)


def _follows(state: RequestState, leader: RequestState) -> bool:
    """Whether all that is computed for the prompt of `leader` is what `state` needs."""
    return (
        state is not leader
        and state.is_prefilling
        and state.twin_key == leader.twin_key
        and state.num_prefill == state.num_prompt == leader.num_prompt
        and state.adapter == leader.adapter
        and state.is_long == leader.is_long
        and state.request.params.prompt_logprobs is None
        and state.request.cache_salt == leader.request.cache_salt
        and state.tokens == leader.tokens[: leader.num_prompt]
    )
