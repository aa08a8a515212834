"""Copies of what was computed of a prompt, for requests with the same one."""

from __future__ import annotations

import time
from dataclasses import dataclass

from lifecycle.engines.backend import COPY_ERRORS, CacheBackend
from lifecycle.engines.state import RequestState

_PART = 8 << 20
"""Bytes that are copied before the time is looked at."""


@dataclass(slots=True, eq=False)
class _Copy:
    twin: RequestState
    leader: RequestState
    """Whose slot holds the tokens."""
    stop: int
    """How many."""
    done: int = 0


class TwinCopies:
    """Those that are due. A long prompt takes as long to copy as several steps, and there may be many twins, so it is
    done in parts; a twin brings nothing to a step until its copy is whole."""

    def __init__(self, cache: CacheBackend) -> None:
        self._cache = cache
        self._part = max(_PART // cache.bytes_per_token, 1)
        self._due: dict[str, _Copy] = {}
        """By the id of the twin."""

    def __bool__(self) -> bool:
        return bool(self._due)

    def __contains__(self, state: RequestState) -> bool:
        """Whether a request waits for its copy."""
        return state.request.id in self._due

    def add(self, twin: RequestState, leader: RequestState) -> None:
        """Let a request go on from what the slot of another one holds, as soon as its own holds it too."""
        twin.num_computed = twin.num_cached = leader.num_computed
        self._due[twin.request.id] = _Copy(twin, leader, leader.num_computed)

    def is_read(self, state: RequestState) -> bool:
        """Whether the slot of a request is yet to be copied."""
        return any(copy.leader is state for copy in self._due.values())

    def run(self, seconds: float | None = None) -> float | None:
        """Copy until that has taken so many seconds, one part at least; what is left of them."""
        begun = time.perf_counter()
        for copy in list(self._due.values()):
            # Either begins its text anew where that has become a long one.
            if copy.twin.num_computed < copy.stop or copy.leader.num_computed < copy.stop:
                self._give_up(copy)
            while copy.twin in self:
                self._go_on(copy)
                taken = time.perf_counter() - begun
                if seconds is not None and taken >= seconds:
                    return 0.0
        return None if seconds is None else max(seconds - (time.perf_counter() - begun), 0.0)

    def leave(self, state: RequestState) -> None:
        """Forget a request that gives its slot back. One of those that wait for it gets all at once, for the others."""
        self._due.pop(state.request.id, None)
        heirs = [copy for copy in self._due.values() if copy.leader is state]
        while heirs:
            first = heirs.pop(0)
            while first.twin in self:
                self._go_on(first)
            if first.twin.num_computed >= first.stop:
                for copy in heirs:
                    copy.leader = first.twin
                return

    def _go_on(self, copy: _Copy) -> None:
        """Copy the next part."""
        stop = min(copy.done + self._part, copy.stop)
        twin, leader = copy.twin, copy.leader
        try:
            self._cache.copy_cache(leader.slot, twin.slot, stop, copy.done)
        except COPY_ERRORS:
            self._give_up(copy)
            return
        copy.done = stop
        if stop == copy.stop:
            del self._due[twin.request.id]
            # What was given back of the one is zeros in the other.
            twin.num_passed = leader.num_passed
            self._cache.forget_passed(twin.slot, twin.num_passed)

    def _give_up(self, copy: _Copy) -> None:
        del self._due[copy.twin.request.id]
        copy.twin.recompute()
