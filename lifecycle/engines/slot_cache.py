"""Keys and values of a fixed number of slots, in memory that follows what is in use."""

# onnxruntime ships no type information.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lifecycle.engines.backend import Block
from lifecycle.engines.ort_session import present_name
from lifecycle.errors import EngineError


class SlotCache:
    """One array per name, [slots, heads, capacity, width], that a graph reads and writes in place.

    The memory of a slot comes page by page as it is written and goes when it is forgotten, so the cache
    takes what its texts have filled and not its capacity. Two neighbouring names may share their pages, token by token: of
    the pages that texts end in, nothing is in half of each on average, and there are half as many.
    """

    def __init__(
        self,
        names: Sequence[str],
        shape: tuple[int, int, int, int],
        dtype: np.dtype[Any],
        windows: Sequence[int] = (),
        *,
        shared: int = 1,
    ) -> None:
        """Reserve room for `shape`, or some more tokens per slot.

        Args:
            windows: the tokens that is looked back on in each array, 0 for all; empty where that is so in all.
            shared: how many neighbouring names share their pages; they have the same windows.

        Raises:
            EngineError: there is not so much memory.
        """
        slots, heads, capacity, width = shape
        self._dtype = dtype
        self.bytes_per_token = len(names) * heads * width * dtype.itemsize
        self._places = {name: (n // shared, n % shared * width) for n, name in enumerate(names)}
        """The array of each name, and where it begins in each token."""
        self._width, width = width, shared * width
        # Whole pages for each head, so that what is given back is no other head's.
        per_page = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, width * dtype.itemsize)
        capacity = -(-capacity // per_page) * per_page
        shape = (slots, heads, capacity, width)
        try:
            count = len(names) // shared
            self._memory = [lazy_memory(math.prod(shape) * dtype.itemsize) for _ in range(count)]
        except (OSError, OverflowError) as error:
            size = self.bytes_per_token * slots * capacity
            raise EngineError(
                f"no memory for a cache of {size >> 20} MiB ({error}): lower max_num_seqs, "
                f"{slots}, max_model_len or prefill_chunk, together {capacity} tokens per slot"
            ) from error
        self._arrays = [np.frombuffer(memory, dtype).reshape(shape) for memory in self._memory]
        self._windows = windows[::shared] or [0] * count

    def num_rows(self, count: int) -> int:
        """Slots that a graph is given where it needs the first `count`."""
        return count

    def bind(self, binding: ort.IOBinding, count: int) -> None:
        """Let a graph read and write the first `count` slots of each array."""
        for name, array in self.rows(count).items():
            # Where names share their pages, a graph has to know how far apart its tokens are.
            place = ("cpu", 0, self._dtype.type, list(array.shape), array.ctypes.data)
            binding.bind_input(name, *place)
            binding.bind_output(present_name(name), *place)

    def rows(self, count: int) -> dict[str, NDArray[Any]]:
        """The first `count` slots of each array; views, not copies."""
        return {
            name: self._arrays[n][:count, ..., begin : begin + self._width]
            for name, (n, begin) in self._places.items()
        }

    def read(self, slot: int, start: int, stop: int) -> Block:
        """A copy of what a slot holds of its tokens `start` to `stop`."""
        return np.stack([array[slot, :, start:stop] for array in self._arrays])

    def write(self, slot: int, start: int, block: Block) -> None:
        """Put such a copy into a slot, from its token `start` on."""
        for array, part in zip(self._arrays, block, strict=True):
            array[slot, :, start : start + part.shape[1]] = part

    def copy(self, source: int, target: int, stop: int, start: int = 0) -> None:
        """Let a slot hold the tokens `start` to `stop` that another one holds."""
        for array in self._arrays:
            array[target, :, start:stop] = array[source, :, start:stop]

    def forget(self, slot: int, start: int = 0) -> None:
        """Give back the memory of a slot's tokens from `start` on: of the whole pages among them, which are zeros
        then."""
        for memory, array in zip(self._memory, self._arrays, strict=True):
            row, head, token = array.strides[:3]
            if start == 0:
                _give_back(memory, slot * row, row)
                continue
            for begin in range(slot * row, (slot + 1) * row, head):
                _give_back(memory, begin + start * token, head - start * token)

    def forget_passed(self, slot: int, count: int, before: int = 0) -> None:
        """The same for what lies behind the window of each array once a slot has `count` tokens; this was done last
        when it had `before`."""
        arrays = zip(self._memory, self._arrays, self._windows, strict=True)
        for memory, array, window in arrays:
            if not window or count <= window:
                continue
            row, head, token = array.strides[:3]
            # The page that was not whole then may be now.
            start = max((before - window) * token - mmap.PAGESIZE, 0)
            for begin in range(slot * row, (slot + 1) * row, head):
                _give_back(memory, begin + start, (count - window) * token - start)

    def clear(self) -> None:
        """Let go of all memory, once no graph is bound to it."""
        self._places.clear()
        self._arrays.clear()
        self._memory.clear()


def lazy_memory(size: int) -> mmap.mmap:
    """Zeros that take memory page by page. `numpy.zeros` asks for huge pages, one of which spans several
    heads: the first tokens of a text then took the memory of its whole slot."""
    # Private, or a fork of the process would write into the same cache.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def _give_back(memory: mmap.mmap, start: int, size: int) -> None:
    """Let the whole pages among `size` bytes from `start` on be zeros again that take no memory. Only Linux promises
    that."""
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (start + size - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0 and sys.platform == "linux":
        memory.madvise(mmap.MADV_DONTNEED, first, size)
