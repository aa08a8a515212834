"""Keys and values of how prompts begin, kept for prompts that begin alike: a system prompt that many
requests share, or a conversation that goes on.

A prompt is kept in whole chunks, as the engine computes it anyway, each under a hash of all tokens up
to its end. So what a request finds is to the last bit what it would have computed.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

import numpy as np

from lifecycle.engines.backend import COPY_ERRORS, Block, CacheBackend, Row
from lifecycle.engines.state import RequestState


class PrefixCache:
    """Blocks of one chunk each under a budget of bytes; the least recently used go first."""

    def __init__(self, budget: int, chunk: int, backend: CacheBackend) -> None:
        self._budget, self._chunk, self._backend = budget, chunk, backend
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()
        self.num_bytes = 0
        """Held now."""
        self.hit_tokens = 0
        """Tokens of prompts that did not have to be computed, so far."""
        self.query_tokens = 0
        """Tokens of the prompts that were submitted."""

    def reuse(self, state: RequestState) -> None:
        """Fill the slot of a request with the chunks that come next in its prompt and are here. One
        token at least is left to compute: the logits after it are needed."""
        found: list[bytes] = []
        chunk, most = self._chunk, min(state.first_logit, state.num_prompt)
        while (start := state.num_computed) % chunk == 0 and start + chunk <= most:
            key = self._key(state, start // chunk)
            if key not in self._blocks:
                break
            try:
                self._backend.write_cache(state.slot, start, self._blocks[key])
            except COPY_ERRORS:
                break
            state.num_computed += chunk
            state.num_cached += chunk
            self.hit_tokens += chunk
            found.append(key)
        # A chunk is of no use without those before it, so it has to be the first to go.
        for key in reversed(found):
            self._blocks.move_to_end(key)

    def keep(self, state: RequestState, row: Row) -> None:
        """Keep the chunk that a step has just ended, if it was one of a prompt."""
        stop = row.start + len(row.tokens)
        start = stop - self._chunk
        if stop % self._chunk or stop > state.num_prompt:
            return
        key = self._key(state, start // self._chunk)
        if key in self._blocks:
            return
        try:
            block = self._backend.read_cache(row.slot, start, stop)
        except COPY_ERRORS:
            return
        if block.nbytes > self._budget:
            return
        self._blocks[key] = block
        self.num_bytes += block.nbytes
        for earlier in reversed(state.prefix_keys[: start // self._chunk]):
            if earlier in self._blocks:
                self._blocks.move_to_end(earlier)
        while self.num_bytes > self._budget:
            _, block = self._blocks.popitem(last=False)
            self.num_bytes -= block.nbytes

    def clear(self) -> None:
        """Forget all."""
        self._blocks.clear()
        self.num_bytes = 0

    def _key(self, state: RequestState, number: int) -> bytes:
        """Of a chunk of a request's text: of its tokens and all before them, and of all else that the
        cache depends on."""
        keys = state.prefix_keys
        while len(keys) <= number:
            before = keys[-1] if keys else _root(state)
            start = len(keys) * self._chunk
            tokens = np.array(state.tokens[start : start + self._chunk], np.int64)
            keys.append(blake2b(before + tokens.tobytes(), digest_size=16).digest())
        return keys[number]


def _root(state: RequestState) -> bytes:
    """Requests with other salts find nothing of each other, so that none can tell by the time what
    another has asked."""
    salt = state.request.cache_salt.encode(errors="surrogatepass")
    head = f"{state.adapter} {state.is_long} {len(salt)} ".encode()
    return blake2b(head + salt, digest_size=16).digest()
