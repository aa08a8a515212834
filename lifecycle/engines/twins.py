"""Copies of what was computed of a prompt, for requests with the same one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from lifecycle.engines.backend import COPY_ERRORS, CacheBackend
from lifecycle.engines.state import RequestState


@dataclass(slots=True, eq=False)
class _Copy:
    twin: RequestState
    leader: RequestState | None
    """Who has the slot that holds the tokens; None if it has left, and the slot stays as it is."""
    source: int
    """That slot."""
    stop: int
    """How many tokens."""
    passed: int
    """Before how many of them memory behind windows has been given back."""
    restarts: tuple[int, int]
    """Of twin and leader: whichever begins its text anew, the copy is of no use."""
    done: int = 0

    @property
    def is_valid(self) -> bool:
        if self.twin.num_restarts != self.restarts[0]:
            return False
        return self.leader is None or self.leader.num_restarts == self.restarts[1]

    def follow(self, leader: RequestState) -> None:
        """Go on from the slot of another request with the same prompt."""
        self.leader, self.source = leader, leader.slot
        self.restarts = self.restarts[0], leader.num_restarts


class TwinCopies:
    """Those that are due. A long prompt takes as long to copy as several steps, and there may be many twins, so it is
    done in parts; a twin brings nothing to a step until its copy is whole."""

    def __init__(self, cache: CacheBackend | None, part: int) -> None:
        """`cache` is None where nothing can be copied; a part is so many tokens."""
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
        passed = leader.num_passed
        self._due[twin.request.id] = _Copy(twin, leader, leader.slot, count, passed, restarts)

    def is_read(self, slot: int) -> bool:
        """Whether what a slot holds is yet to be copied."""
        return any(copy.source == slot for copy in self._due.values())

    def is_heir(self, twin: RequestState) -> bool:
        """Whether a request waits for what the slot of one that has left holds."""
        copy = self._due.get(twin.request.id)
        return copy is not None and copy.leader is None

    def leave(self, state: RequestState) -> bool:
        """Forget a request that gives its slot back; whether that must stay as it is while it is read."""
        self._due.pop(state.request.id, None)
        heirs = [copy for copy in self._due.values() if copy.leader is state and copy.is_valid]
        for copy in heirs:
            copy.leader = None
        return bool(heirs)

    def give_up(self, leaders: Collection[RequestState]) -> None:
        """What the slots of these requests hold is not to be trusted: twins compute it."""
        for copy in list(self._due.values()):
            if copy.leader in leaders:
                self._drop(copy)

    def settle(self) -> None:
        """Give up what is of no use any more."""
        for copy in list(self._due.values()):
            if not copy.is_valid:
                self._drop(copy)

    def due(self) -> list[RequestState]:
        """The twins that wait."""
        return [copy.twin for copy in self._due.values()]

    def copy_part(self, twin: RequestState) -> None:
        """After `settle`: copy the next part for a twin that is due."""
        assert self._cache is not None
        copy = self._due[twin.request.id]
        stop = min(copy.done + self._part, copy.stop)
        try:
            self._cache.copy_cache(copy.source, twin.slot, stop, copy.done)
        except COPY_ERRORS:
            self._drop(copy)
            return
        copy.done = stop
        if stop == copy.stop:
            # What was given back of the one is zeros in the other.
            twin.num_passed = copy.passed
            self._cache.forget_passed(twin.slot, twin.num_passed)
            self._finish(copy)

    def _finish(self, copy: _Copy) -> None:
        del self._due[copy.twin.request.id]
        if copy.leader is not None:
            return
        # The slot is free sooner where the others go on from this one.
        for other in self._due.values():
            if other.source == copy.source:
                other.follow(copy.twin)

    def _drop(self, copy: _Copy) -> None:
        del self._due[copy.twin.request.id]
        if copy.twin.num_restarts == copy.restarts[0]:
            copy.twin.recompute()


def follows(state: RequestState, leader: RequestState) -> bool:
    """Whether all that is computed for the prompt of `leader` is what `state` needs. One that is begun anew goes on behind
    its prompt, so nothing is shared of it."""
    return (
        state is not leader
        and state.is_prefilling
        and leader.num_prefill == leader.num_prompt
        and state.twin_key == leader.twin_key
        and state.num_prefill == state.num_prompt == leader.num_prompt
        and state.adapter == leader.adapter
        and state.is_long == leader.is_long
        and state.request.params.prompt_logprobs is None
        and state.request.cache_salt == leader.request.cache_salt
        and state.tokens == leader.tokens[: leader.num_prompt]
    )
