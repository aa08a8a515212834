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
from operator import attrgetter

from lifecycle.engines.backend import CacheBackend, Row
from lifecycle.engines.leaving import Leaving
from lifecycle.engines.line import WaitingLine
from lifecycle.engines.parking import Parking
from lifecycle.engines.state import GRAIN, RequestState
from lifecycle.engines.twins import TwinCopies, follows
from lifecycle.engines.windows import ALL_SEEN, Windows

_PART = 4 << 20
"""Bytes that are copied before the time is looked at."""
_MOMENT = 1e-9
"""Seconds in which one chunk is copied, however long that takes."""

Batch = list[tuple[RequestState, Row]]
Rank = tuple[int, int]
Reuse = Callable[[RequestState, float | None], bool]
_rank: Callable[[RequestState], Rank] = attrgetter("rank")


class Scheduler:
    """Gives `num_slots` slots to requests, and rows of them to steps."""

    def __init__(
        self,
        num_slots: int,
        prefill_chunk: int,
        *,
        cache: CacheBackend | None = None,
        max_cache_tokens: float = inf,
        max_aside_tokens: float = inf,
        windows: Windows = ALL_SEEN,
        reuse: Reuse | None = None,
        on_release: Callable[[int], None] | None = None,
    ) -> None:
        """
        Args:
            cache: what holds keys and values; None if they cannot be copied.
            max_cache_tokens: how many tokens it may hold for all requests together, at least one context.
            max_aside_tokens: how many tokens of texts may be put aside; what would be more is computed anew.
            windows: what of a text it holds.
            reuse: may take a request further in its prompt, just before it would be computed, in so many seconds;
                whether that was all it could do.
            on_release: is told of each slot whose request leaves it.
        """
        self._prefill_chunk = prefill_chunk
        self._cache = cache
        part = max(_PART // cache.bytes_per_token, 1) if cache is not None else 0
        self._copies = TwinCopies(cache, part)
        self._parking = Parking(cache, part, max_aside_tokens)
        self._left: dict[int, int] = {}
        """Slots of requests that have left them, which are yet to be copied: not free until then. With each the tokens
        that were computed in it."""
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
        counts = [s.num_computed for s in self.running.values() if s not in parking]
        return parking.num_tokens + sum(map(self._windows.held, [*counts, *self._left.values()]))

    def seen_tokens(self) -> Sequence[float]:
        """Of each request that decodes, the tokens that its next one looks back on."""
        counts = [s.num_computed for s in self.active() if s.num_computed >= s.num_prefill]
        return counts if self._windows.narrowest == inf else list(map(self._windows.held, counts))

    def active(self) -> Collection[RequestState]:
        """Those in slots that may have rows in the next step."""
        copies, parking = self._copies, self._parking
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
        self._parking.end(state)
        self.waiting.leave(state)
        if not self.running:
            self._settle()

    def drop(self, states: Collection[RequestState]) -> None:
        """Take requests out after a step that failed: their slots may hold anything."""
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
        if not self._copies.is_read(state.slot):
            self._cache.forget_passed(state.slot, state.num_computed, state.num_passed)
            state.num_passed = state.num_computed

    def find(self, request_id: str) -> RequestState | None:
        """A request by its id."""
        return self.running.get(request_id) or self.waiting.get(request_id)

    @property
    def is_copying(self) -> bool:
        """Whether there is anything to copy."""
        return bool(self._copies or self._parking)

    def copy(self, seconds: float | None, fewer: float | None = None) -> float | None:
        """Copy what is due of texts, in the order of ranks, in so many seconds, one part at least; what is left of them.
        What is put aside and back may take `fewer`: it spares no work. For requests that come after a prompt in a slot it
        is one part, whose time is not the prompt's loss. Before guesses are made: who has waited for a copy wants some."""
        left = inf if seconds is None else seconds
        weight = seconds / fewer if seconds and fewer else 1.0
        while (state := self._next_copy()) is not None:
            is_behind, begun = self._is_behind_prompt(state), time.perf_counter()
            is_twin = state in self._copies
            (self._copies if is_twin else self._parking).copy_part(state)
            if is_behind:
                break
            left -= (1.0 if is_twin else weight) * (time.perf_counter() - begun)
            if left <= 0:
                break
        # A slot may be free now.
        self.admit()
        return None if seconds is None else max(left, 0.0)

    def _next_copy(self) -> RequestState | None:
        """Of whose text a part is copied next."""
        return min([*self._parking.due(), *self._copies.due()], key=self._copy_rank, default=None)

    def _copy_rank(self, state: RequestState) -> Rank:
        """That of who needs it first: the text's own request, or who waits for the slot that is free then."""
        is_emptying = state is self._parking.going or self._copies.is_heir(state)
        waits = self.waiting.first() if is_emptying else None
        return state.rank if waits is None else min(state.rank, waits.rank)

    def _is_behind_prompt(self, state: RequestState) -> bool:
        rank = self._copy_rank(state)
        return any(other.is_prefilling and other.rank < rank for other in self.active())

    def admit(self) -> None:
        """Give slots to waiting requests. Where none is free, one of higher priority number makes room."""
        self._settle()
        if (gone := self._parking.finish()) is not None:
            # It goes on where it was.
            self._send_back(gone)
        while (state := self.waiting.first()) is not None:
            if self._free and self._has_room(state):
                self._place(state)
            elif not self._make_room(state):
                break
        going = self._parking.going
        if going is not None and (state is None or not going.yields_to(state)):
            self._parking.turn_back()

    def schedule(
        self, room: int | None = None, seconds: float | None = None, left: float | None = None
    ) -> Batch:
        """Choose the rows of the next step.

        Prompts fill one chunk size per step, or `room` tokens where there are requests that decode, which may wait
        `seconds` for what is taken of other prompts, of which `left` are left, in the order of their ranks. The step
        stays short for those that decode in it, and larger products would be no faster per token.
        """
        batch, budget = self._decoding(room), self._prefill_chunk
        if batch and room is not None:
            runs = sum(len(row.tokens) - len(state.draft) - 1 for state, row in batch)
            budget = min(budget, max(room - runs, GRAIN))
        self._add_prompts(batch, budget, *((seconds, left) if batch else (None, None)))
        self._fit(batch)
        if self._leaving is not None:
            self._leaving.give_back(self.running.values(), self._left)
        return batch

    def _decoding(self, room: int | None) -> Batch:
        """The rows of requests that decode. Where some wait for one token, what constraints have forced upon others has
        to go into twice `room`, which plans for half of what may be, and into `room` where there are prompts."""
        active = self.active()
        states = [state for state in active if not state.is_prefilling]
        spare = sum(state.num_left for state in states)
        if room is not None and any(state.num_left == 1 for state in states):
            spare = max(room, GRAIN) * (2 if len(states) == len(active) else 1)
        batch: Batch = []
        for state in states:
            row = state.decoding_row(spare)
            spare -= len(row.tokens) - len(state.draft) - 1
            batch.append((state, row))
        return batch

    def share(self, leader: RequestState) -> list[RequestState]:
        """Take the requests in slots that have the prompt which `leader` has just finished to where it is."""
        if self._cache is None or len(leader.tokens) > leader.num_prompt:
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
        twins = [other for other in self.active() if follows(other, leader)]
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
        for state in sorted(filling, key=_rank):
            if budget <= 0:
                return
            if self._cache is not None and any(follows(state, leader) for leader in leaders):
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
            row = state.prompt_row(self._prefill_chunk, budget)
            if row is None:
                # What does not fit ends the filling: a shorter prompt must not overtake.
                return
            budget -= len(row.tokens)
            batch.append((state, row))

    def _make_room(self, state: RequestState) -> bool:
        """Let one that yields to a waiting request leave its slot; whether it has. It takes some steps where its text is
        put aside, or where a slot is yet to be copied."""
        others = [other for other in self.running.values() if other.yields_to(state)]
        if not others or self._left:
            return False
        if self._free:
            # It is the cache that is full.
            self._preempt(max(others, key=_rank))
            return True
        last = self._last_to_go(others)
        if last is None or self._parking.going is not None:
            return False
        if last not in self._copies and self._parking.put_aside(last):
            return False
        self._preempt(last)
        return True

    def _last_to_go(self, states: Collection[RequestState]) -> RequestState | None:
        """The last one, unless it is yet to be copied: then one that can be put aside at once."""
        read, copies = self._copies.is_read, self._copies
        last = max(states, key=_rank)
        if not read(last.slot):
            return last
        able = [state for state in states if state not in copies and not read(state.slot)]
        return max(able, key=_rank, default=None)

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
        left = sum(map(self._windows.held, self._left.values()))
        return sum(wanted) + left + self._prefill_chunk <= self._max_cache_tokens

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
            last = max(self.running.values(), key=_rank)
            self._preempt(last)
            batch[:] = [pair for pair in batch if pair[0] is not last]

    def _surplus(self, batch: Batch) -> float:
        added = sum(len(row.tokens) for _, row in batch)
        return self.cache_tokens + added - self._max_cache_tokens

    def _preempt(self, state: RequestState) -> None:
        """Send a request back to its line, to be computed anew."""
        self._send_back(state)
        self._parking.end(state)
        state.recompute()
        # It may have been the last one that a slot was kept for.
        self._settle()

    def _send_back(self, state: RequestState) -> None:
        self.num_preemptions += 1
        del self.running[state.request.id]
        self._release(state)
        self.waiting.push(state)

    def _release(self, state: RequestState) -> None:
        slot, state.slot = state.slot, -1
        if self._on_release is not None:
            self._on_release(slot)
        if self._copies.leave(state):
            self._left[slot] = state.num_computed
        else:
            self._free_slot(slot, len(state.tokens))

    def _settle(self) -> None:
        """Free the slots that were yet to be copied, and are no more."""
        self._copies.settle()
        for slot in [slot for slot in self._left if not self._copies.is_read(slot)]:
            self._free_slot(slot, self._left.pop(slot))

    def _free_slot(self, slot: int, num_tokens: int) -> None:
        if self._leaving is not None:
            self._leaving.add(slot, num_tokens)
            if not self.running:
                self._leaving.give_back_all()
        elif self._cache is not None:
            self._cache.forget(slot)
        heapq.heappush(self._free, slot)
