"""Copies of what was computed of a prompt, for requests with the same one."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from lifecycle.engines.backend import COPY_ERRORS, CacheBackend
from lifecycle.engines.state import RequestState


@dataclass(slots=True, eq=False)
class _Copy:
    twin: RequestState
    leader: RequestState
    """Whose text the tokens are of."""
    source: int
    """The slot that holds them."""
    stop: int
    """How many."""
    restarts: tuple[int, int]
    """Of both: whichever begins its text anew, the copy is of no use."""
    done: int = 0

    @property
    def is_valid(self) -> bool:
        return self.restarts == (self.twin.num_restarts, self.leader.num_restarts)


class TwinCopies:
    """Those that are due. A long prompt takes as long to copy as several steps, and there may be many twins, so it is
    done in parts; a twin brings nothing to a step until its copy is whole."""

    def __init__(self, cache: CacheBackend, part: int) -> None:
        """A part is so many tokens."""
        self._cache = cache
        self._part = part
        self._due: dict[str, _Copy] = {}
        """By the id of the twin."""

    def __bool__(self) -> bool:
        return bool(self._due)

    def __contains__(self, state: RequestState) -> bool:
        """Whether a request waits for its copy."""
        return state.request.id in self._due

    def add(self, twin: RequestState, leader: RequestState) -> None:
        """Let a request go on from what the slot of another one holds, as soon as its own holds it too."""
        count = twin.num_computed = twin.num_cached = leader.num_computed
        restarts = twin.num_restarts, leader.num_restarts
        self._due[twin.request.id] = _Copy(twin, leader, leader.slot, count, restarts)

    def is_read(self, state: RequestState) -> bool:
        """Whether what was computed for a request is yet to be copied."""
        return any(copy.leader is state for copy in self._due.values())

    def leave(self, state: RequestState) -> bool:
        """Forget a request that gives its slot back; whether that must stay as it is until `settle`."""
        self._due.pop(state.request.id, None)
        return self.is_read(state)

    def give_up(self, leaders: Collection[RequestState]) -> None:
        """What the slots of these requests hold is not to be trusted: twins compute it."""
        for copy in list(self._due.values()):
            if copy.leader in leaders:
                self._drop(copy)

    def settle(self, left: Collection[int]) -> None:
        """Give up what is of no use any more. Of those that wait for one of these slots, which will be other requests',
        one gets all at once, for the others."""
        for copy in list(self._due.values()):
            if not copy.is_valid:
                self._drop(copy)
        for source in left:
            heirs = [copy for copy in self._due.values() if copy.source == source]
            while heirs:
                first = heirs.pop(0)
                while first.twin in self:
                    self._go_on(first)
                if first.is_valid:
                    for copy in heirs:
                        copy.leader, copy.source = first.twin, first.twin.slot
                        copy.restarts = copy.twin.num_restarts, first.twin.num_restarts
                    break

    def copy_parts(self) -> Iterator[None]:
        """After `settle`: copy one part after the other, in the order of ranks."""
        for copy in sorted(self._due.values(), key=lambda copy: copy.twin.rank):
            while copy.twin in self:
                self._go_on(copy)
                yield

    def _go_on(self, copy: _Copy) -> None:
        """Copy the next part."""
        stop, twin = min(copy.done + self._part, copy.stop), copy.twin
        try:
            self._cache.copy_cache(copy.source, twin.slot, stop, copy.done)
        except COPY_ERRORS:
            self._drop(copy)
            return
        copy.done = stop
        if stop == copy.stop:
            del self._due[twin.request.id]
            # What was given back of the one is zeros in the other.
            twin.num_passed = copy.leader.num_passed
            self._cache.forget_passed(twin.slot, twin.num_passed)

    def _drop(self, copy: _Copy) -> None:
        del self._due[copy.twin.request.id]
        if copy.twin.num_restarts == copy.restarts[0]:
            copy.twin.recompute()
