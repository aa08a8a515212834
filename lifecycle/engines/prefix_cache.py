"""Keys and values of how prompts begin, kept for prompts that begin alike: a system prompt that many
requests share, or a conversation that goes on.

A prompt is kept in chunks, as the engine computes it anyway, each under a hash of all tokens up to its end. So what
a request finds is to the last bit what it would have computed. Where a token gets the same bits however its text is
cut, what a prompt has beyond its last whole chunk is kept too, and of a chunk what two prompts have in common is
taken, if it is not behind a window.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from itertools import islice
from math import inf
from typing import NamedTuple

import numpy as np

from lifecycle.engines.backend import COPY_ERRORS, Block, CacheBackend, Row
from lifecycle.engines.state import RequestState

_LEAST = 16
"""Tokens of a part of a chunk that are worth a copy."""
_MOST_TRIED = 8
"""Blocks that begin alike, of which the one that has most in common with a text is looked for."""


class _Kept(NamedTuple):
    """A chunk, or the end of a prompt."""

    block: Block
    tokens: list[int]
    family: bytes | None
    """Of those that begin alike, where parts of it may be taken."""


class PrefixCache:
    """Blocks of one chunk each under a budget of bytes; the least recently used go first."""

    def __init__(
        self,
        budget: int,
        chunk: int,
        backend: CacheBackend,
        *,
        cuts_freely: bool = False,
        window: float = inf,
    ) -> None:
        """`cuts_freely` says that what a token gets does not depend on how its text is cut, `window` how many tokens each
        layer looks back on at least, if there are so many."""
        self._budget, self._chunk, self._backend, self._window = budget, chunk, backend, window
        self._cuts_freely = cuts_freely
        self._blocks: OrderedDict[bytes, _Kept] = OrderedDict()
        self._families: dict[bytes, dict[bytes, None]] = {}
        """Keys of blocks with the same text before them and the same first tokens; what was used last is last."""
        self.num_bytes = 0
        """Held now."""
        self.hit_tokens = 0
        """Tokens of prompts that did not have to be computed, so far."""
        self.query_tokens = 0
        """Tokens of the prompts that were submitted."""

    def reuse(self, state: RequestState, seconds: float | None = None) -> bool:
        """Fill the slot of a request with the chunks that come next in its prompt and are here, one at least unless there
        is no time at all, until that has taken so many seconds; whether there is nothing more to fill it with. One token
        at least is left to compute: the logits after it are needed."""
        found: list[bytes] = []
        begun, is_whole, first = time.perf_counter(), True, state.num_computed
        chunk, most = self._chunk, min(state.first_logit, state.num_prompt)
        while (start := state.num_computed) % chunk == 0 and start < most:
            key, count = self._longest(state, start, min(start + chunk, most))
            if key is None:
                break
            is_late = seconds is not None and time.perf_counter() - begun >= seconds
            if is_late and (found or not seconds):
                is_whole = False
                break
            try:
                self._backend.write_cache(state.slot, start, self._blocks[key].block, count)
            except COPY_ERRORS:
                break
            state.num_computed += count
            state.num_cached += count
            self.hit_tokens += min(count, max(state.num_computed - state.num_seen, 0))
            found.append(key)
        # A chunk is of no use without those before it, so it has to be the first to go.
        for key in reversed(found):
            self._touch(key)
        if found:
            self._touch_before(state, first)
        return is_whole

    def keep(self, state: RequestState, row: Row) -> None:
        """Keep the chunk that a step has just ended, if it was one of a prompt."""
        stop = row.start + len(row.tokens)
        start = (stop - 1) // self._chunk * self._chunk
        is_end = self._cuts_freely and stop == state.num_prompt and stop - start >= _LEAST
        if stop > state.num_prompt or (stop % self._chunk and not is_end):
            return
        tokens = state.tokens[start:stop]
        key = self._key(state, start // self._chunk, tokens)
        family = self._family(state, start, tokens)
        # Memory behind a window may have been given back: whole, such a chunk is right for those behind it.
        if state.num_passed - self._window > start:
            family = None
        if family is None and (len(tokens) < self._chunk or key in self._blocks):
            return
        for other in self._alike(family):
            if _begins(self._blocks[other].tokens, tokens):
                self._touch(other)
                self._touch_before(state, start)
                return
        try:
            block = self._backend.read_cache(row.slot, start, stop)
            # What a failing device left must end the request that it failed, not all that begin like it.
            is_broken = block.dtype.kind == "f" and not np.isfinite(block).all()
        except COPY_ERRORS:
            return
        if is_broken or block.nbytes > self._budget:
            return
        self._add(key, _Kept(block, tokens, family))
        self._touch_before(state, start)
        while self.num_bytes > self._budget:
            self._remove(next(iter(self._blocks)))

    def clear(self) -> None:
        """Forget all."""
        self._blocks.clear()
        self._families.clear()
        self.num_bytes = 0

    def _longest(self, state: RequestState, start: int, stop: int) -> tuple[bytes | None, int]:
        """The block that has most of a request's tokens from the beginning of a chunk up to `stop`, and how many."""
        tokens = state.tokens[start:stop]
        if len(tokens) == self._chunk:
            key = self._key(state, start // self._chunk, tokens)
            if key in self._blocks:
                return key, self._chunk
        family = self._family(state, start, tokens)
        counts = {key: _common(self._blocks[key].tokens, tokens) for key in self._alike(family)}
        best = max(counts, key=counts.__getitem__, default=None)
        return (best, counts[best]) if best is not None and counts[best] >= _LEAST else (None, 0)

    def _touch_before(self, state: RequestState, start: int) -> None:
        """The same for the chunks before `start`: none is of use without those before it."""
        for earlier in reversed(state.prefix_keys[: start // self._chunk]):
            if earlier in self._blocks:
                self._touch(earlier)

    def _add(self, key: bytes, kept: _Kept) -> None:
        if key in self._blocks:
            # The same, but behind a window.
            self._remove(key)
        self._blocks[key] = kept
        self.num_bytes += kept.block.nbytes
        if kept.family is None:
            return
        for other in self._alike(kept.family):
            # A conversation that has gone on: all that it was is in what it is now.
            if _begins(kept.tokens, self._blocks[other].tokens):
                self._remove(other)
        self._families.setdefault(kept.family, {})[key] = None

    def _alike(self, family: bytes | None) -> list[bytes]:
        """The last few of a family."""
        if family is None:
            return []
        return list(islice(reversed(self._families.get(family, {})), _MOST_TRIED))

    def _touch(self, key: bytes) -> None:
        """Take note that a block was used."""
        self._blocks.move_to_end(key)
        if (family := self._blocks[key].family) is not None:
            alike = self._families[family]
            del alike[key]
            alike[key] = None

    def _remove(self, key: bytes) -> None:
        kept = self._blocks.pop(key)
        self.num_bytes -= kept.block.nbytes
        if kept.family is not None:
            alike = self._families[kept.family]
            del alike[key]
            if not alike:
                del self._families[kept.family]

    def _family(self, state: RequestState, start: int, tokens: Sequence[int]) -> bytes | None:
        """What blocks have in common of which one may have a part of `tokens`; None if none may."""
        if not self._cuts_freely or len(tokens) < _LEAST:
            return None
        return _digest(self._before(state, start // self._chunk), tokens[:_LEAST])

    def _key(self, state: RequestState, number: int, tokens: Sequence[int]) -> bytes:
        """Of a chunk of a request's text, or of its first tokens: of those and all before them, and of all else that
        the cache depends on."""
        if len(tokens) < self._chunk:
            return _digest(self._before(state, number), tokens)
        return self._before(state, number + 1)

    def _before(self, state: RequestState, number: int) -> bytes:
        """The key of all before a chunk."""
        keys = state.prefix_keys
        while len(keys) < number:
            start = len(keys) * self._chunk
            before = keys[-1] if keys else _root(state)
            keys.append(_digest(before, state.tokens[start : start + self._chunk]))
        return keys[number - 1] if number else _root(state)


def _root(state: RequestState) -> bytes:
    """Requests with other salts find nothing of each other, so that none can tell by the time what
    another has asked."""
    salt = state.request.cache_salt.encode(errors="surrogatepass")
    head = f"{state.adapter} {state.is_long} {len(salt)} ".encode()
    return blake2b(head + salt, digest_size=16).digest()


def _digest(before: bytes, tokens: Sequence[int]) -> bytes:
    return blake2b(before + np.array(tokens, np.int64).tobytes(), digest_size=16).digest()


def _begins(tokens: Sequence[int], beginning: Sequence[int]) -> bool:
    return tokens[: len(beginning)] == beginning


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count
