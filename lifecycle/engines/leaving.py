"""Memory of texts that have ended, on its way back to the system."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lifecycle.engines.backend import CacheBackend
from lifecycle.engines.state import RequestState

_PART = 8 << 20
"""Bytes that a step gives back, or so many as leave:"""
_SHARE = 16


class Leaving:
    """The slots of ended requests, whose memory is given back a part a step: the system takes it page by page, which
    is, for a long text, as long as several steps that all others would wait for."""

    def __init__(self, cache: CacheBackend) -> None:
        self._cache = cache
        self._part = max(_PART // cache.bytes_per_token, 1)
        self._ends: dict[int, int] = {}
        """Of each slot, tokens before which its memory has not been given back yet."""

    def add(self, slot: int, num_tokens: int) -> None:
        """Nobody needs what a slot holds any more: so many tokens, and guesses that may stand behind them."""
        self._ends[slot] = max(num_tokens, self._ends.get(slot, 0))

    def give_back_all(self) -> None:
        """At once; no request may have a slot."""
        for slot in self._ends:
            self._cache.forget(slot)
        self._ends.clear()

    def give_back(self, running: Iterable[RequestState], left: Mapping[int, int]) -> None:
        """A part of it, from its end on, as far as no other request has its place by then; `left` are slots that are kept
        for others, with the tokens of each."""
        if not self._ends:
            return
        taken = {**left, **{s.slot: len(s.tokens) + len(s.draft) for s in running}}
        count = max(self._part, sum(self._ends.values()) // _SHARE)
        for slot, end in list(self._ends.items()):
            least = taken.get(slot, 0)
            start = max(end - count, least)
            self._cache.forget(slot, start)
            if start > least:
                self._ends[slot] = start
                return
            del self._ends[slot]
            count -= max(end - start, 0)
            if count <= 0:
                return
