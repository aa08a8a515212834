"""Texts of requests whose slots others need: put aside, and written back when there is a slot again."""

from __future__ import annotations

from collections.abc import Iterable

from lifecycle.engines.backend import COPY_ERRORS, CacheBackend
from lifecycle.engines.state import RequestState


class Parking:
    """A long text takes as long to copy as several steps, so it is done in parts; meanwhile its request holds its
    slot and brings nothing to a step. Of a text on its way the slot holds the beginning and blocks hold the rest, so it
    may turn round anywhere, and takes memory once where a cache gives back that of a part: the host's does, PyTorch's
    keeps it until all is out, a device's for good. One goes out at a time: the next one is computed until
    then."""

    def __init__(self, cache: CacheBackend | None, part: int, most: float) -> None:
        """`cache` is None where nothing can be put aside; a part is so many tokens, and `most` may be aside together."""
        self._cache = cache
        self._part = part
        self._most = most
        self.going: RequestState | None = None
        """Whose text is put aside; its slot will be free then."""
        self._coming: dict[str, RequestState] = {}
        """Those whose text is written back."""
        self._aside: dict[str, RequestState] = {}
        """Those that have left their slots, with their text put aside."""

    def __bool__(self) -> bool:
        """Whether any text is on its way."""
        return self.going is not None or bool(self._coming)

    def __contains__(self, state: RequestState) -> bool:
        """Whether the text of a request in a slot is on its way."""
        return state is self.going or state.request.id in self._coming

    @property
    def num_tokens(self) -> int:
        """Tokens of all these texts, on their way or aside: each is whole, also behind windows."""
        states = [*self._aside.values(), *self._coming.values()]
        if self.going is not None:
            states.append(self.going)
        return _count(states)

    def put_aside(self, state: RequestState) -> bool:
        """Begin to, if no other one is; whether there is anything to put aside, and room for it."""
        if self._cache is None or not state.num_computed:
            return False
        if _count(self._aside.values()) + state.num_computed > self._most:
            return False
        self._coming.pop(state.request.id, None)
        self.going = state
        state.draft.clear()
        return True

    def take_back(self, state: RequestState) -> None:
        """Begin to write the text of a request into its new slot, if it is aside."""
        if self._aside.pop(state.request.id, None) is not None:
            self._coming[state.request.id] = state

    def turn_back(self) -> None:
        """Let the request stay that is about to leave its slot: nobody needs it any more."""
        state, self.going = self.going, None
        if state is not None and state.parked:
            self._coming[state.request.id] = state

    def finish(self) -> RequestState | None:
        """Who has nothing in its slot any more and leaves it, if anybody."""
        state = self.going
        if state is None or self._num_in_slot(state):
            return None
        self.going = None
        self._aside[state.request.id] = state
        return state

    def end(self, state: RequestState) -> None:
        """A request ends or begins anew: what was put aside of it is of no use any more."""
        if state is self.going:
            self.going = None
        self._coming.pop(state.request.id, None)
        self._aside.pop(state.request.id, None)
        state.parked.clear()

    def drop_last(self) -> bool:
        """Give up what was put aside last, to be computed anew; whether anything was."""
        if not self._aside:
            return False
        self._aside.popitem()[1].recompute()
        return True

    def due(self) -> list[RequestState]:
        """Those of whose texts there are parts to copy."""
        due = list(self._coming.values())
        if self.going is not None and self._num_in_slot(self.going):
            due.append(self.going)
        return due

    def copy_part(self, state: RequestState) -> None:
        """Copy the next part of a text that is due."""
        if state is self.going:
            self._read_part(state)
        else:
            self._write_part(state)

    def _num_in_slot(self, state: RequestState) -> int:
        """Texts are cut at multiples of a part; the last block is the first one behind what the slot holds."""
        num_blocks = -(-state.num_computed // self._part)
        return min((num_blocks - len(state.parked)) * self._part, state.num_computed)

    def _read_part(self, state: RequestState) -> None:
        assert self._cache is not None
        stop = self._num_in_slot(state)
        start = (stop - 1) // self._part * self._part
        try:
            state.parked.append(self._cache.read_cache(state.slot, start, stop))
        except COPY_ERRORS:
            self._give_up(state)
            return
        self._cache.forget(state.slot, start)

    def _write_part(self, state: RequestState) -> None:
        assert self._cache is not None
        try:
            self._cache.write_cache(state.slot, self._num_in_slot(state), state.parked[-1])
        except COPY_ERRORS:
            self._give_up(state)
            return
        state.parked.pop()
        if not state.parked:
            del self._coming[state.request.id]
            # What was put aside has zeros there.
            self._cache.forget_passed(state.slot, state.num_passed)

    def _give_up(self, state: RequestState) -> None:
        """It is computed anew: who waits for its slot finds nothing to put aside."""
        self.end(state)
        state.recompute()


def _count(states: Iterable[RequestState]) -> int:
    """Tokens of their texts."""
    return sum(state.num_computed for state in states)
