"""The weights of the loaded adapters, as the graph with slots takes them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.adapters import PLACES, TOKENS, AdapterLayout
from lifecycle.engines.backend import Row
from lifecycle.engines.base import AdapterWeights
from lifecycle.engines.packed_adapter import pack_adapter
from lifecycle.engines.peft import PeftFolder
from lifecycle.errors import EngineError

MIN_WIDTH = 2
"""Rows of a product of the graph with slots (see `lifecycle.engines.adapters`)."""
_CACHE_LINE = 64
"""Bytes that memory gives at once."""
_PATIENCE = 8
"""Weights of adapters without a token that are read in vain before the used ones are put side
by side; that costs about as much as reading so many."""


def read_weights(folder: Path, layout: AdapterLayout) -> dict[str, NDArray[np.float32]]:
    """Read a PEFT folder as the graph with slots takes it.

    Raises:
        EngineError: the adapter does not fit.
    """
    adapter = PeftFolder(folder, layout)
    found = {name: np.zeros(shape, np.float32) for name, shape in layout.shapes().items()}
    for product in layout.products:
        for k in range(len(product.modules)):
            if (update := adapter.update(product, k)) is not None:
                start, rank = k * layout.rank, update[0].shape[1]
                found[product.a][:, start : start + rank], found[product.b(k)][:rank] = update
    return found


def _zeros(shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """Zeros that begin where a cache line does."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(count + _CACHE_LINE, np.uint8)
    begin = -raw.ctypes.data % _CACHE_LINE
    return raw[begin : begin + count].view(dtype).reshape(shape)


class AdapterBank:
    """Entries side by side in one array per input: entry 0 is zeros, for rows without adapter.

    The graph takes a range of entries. Which entry an adapter has may change from step to step,
    so that those in use lie together; its number, by which it is known outside, does not.
    """

    def __init__(self, layout: AdapterLayout, inputs: Collection[str] = ()) -> None:
        """Take the memory of all entries; the system gives it as they are filled. `inputs` are the graph's, of
        whose products some may take bytes.

        Raises:
            EngineError: there is not so much.
        """
        self._layout = layout
        self._packed = [product for product in layout.products if product.packed in inputs]
        packed = {product.packed for product in self._packed}
        try:
            self._arrays = {
                name: _zeros((layout.slots + 1, *shape), np.uint8 if name in packed else np.float32)
                for name, shape in layout.shapes(packed).items()
            }
        except (MemoryError, ValueError) as error:
            raise EngineError(
                f"no memory for {layout.slots} adapter slots of rank {layout.rank} ({error}): "
                "export the model with fewer, or of a lower rank"
            ) from error
        self._entries = dict[int, int]()
        """Number to entry, of the loaded adapters."""
        self._num_loaded = 0
        self.state = 0
        """Another number for other weights in some entry; 1 or more once there are any."""
        self._wasted = 0

    def entry_of(self, weights: Mapping[str, NDArray[np.float32]]) -> AdapterWeights:
        """Weights as an entry holds them.

        Raises:
            EngineError: one is too large for it.
        """
        found = dict[str, NDArray[Any]](weights)
        for product in self._packed:
            second = [found.pop(product.b(k)) for k in range(len(product.modules))]
            try:
                found[product.packed] = pack_adapter(found.pop(product.a), second)
            except OverflowError:
                raise EngineError(
                    f"the adapter's weights for '{product.name}' are beyond what a float holds: it is damaged"
                ) from None
        return found

    def load(self, weights: AdapterWeights, instead_of: int = 0) -> int:
        """Take an adapter into a free entry, or into that of another one, by its number; its own is 1 or
        more, and no other adapter's, so that nothing that was computed with one is taken for another's.

        Raises:
            EngineError: all entries are taken, or the weights are of another model; nothing has changed.
        """
        if {name: (array.dtype, *array.shape) for name, array in weights.items()} != {
            name: (array.dtype, *array.shape[1:]) for name, array in self._arrays.items()
        }:
            raise EngineError(
                "the adapter was read for another model: read it with this engine's read_adapter"
            )
        count = self._layout.slots
        free = set(range(1, count + 1)) - set(self._entries.values())
        if not (free or instead_of):
            raise EngineError(
                f"all {count} adapter slots are taken: unload one, or export the model with more"
            )
        entry = self._entries.pop(instead_of) if instead_of else min(free)
        for name, array in self._arrays.items():
            array[entry] = weights[name]
        self._num_loaded += 1
        self.state += 1
        self._entries[self._num_loaded] = entry
        return self._num_loaded

    def unload(self, number: int) -> None:
        """Make the entry of an adapter free."""
        del self._entries[number]

    def select(self, rows: Sequence[Row]) -> range:
        """The entries that a step over `rows` needs."""
        used = {row.adapter for row in rows if row.adapter}
        entries = [self._entries[number] for number in used]
        is_plain = any(not row.adapter for row in rows)
        chosen = range(0 if is_plain else min(entries), max(entries) + 1)
        self._wasted += len(chosen) - len(used) - is_plain
        if self._wasted >= _PATIENCE:
            self._gather(used)
            chosen = range(0 if is_plain else 1, len(used) + 1)
        return chosen

    def weights(self, entries: range) -> AdapterWeights:
        """The inputs of the graph for a range of entries; views, not copies."""
        return {name: array[entries.start : entries.stop] for name, array in self._arrays.items()}

    def inputs(self, rows: Sequence[Row], entries: range) -> Mapping[str, NDArray[np.int64]]:
        """Which tokens of a step belong to which of `entries`; the tokens are in the order of
        `rows`."""
        tokens: list[list[int]] = [[] for _ in entries]
        places: list[tuple[int, int]] = []
        for row in rows:
            group = (self._entries[row.adapter] if row.adapter else 0) - entries.start
            for _ in row.tokens:
                tokens[group].append(len(places))
                places.append((group, len(tokens[group]) - 1))
        width = max(MIN_WIDTH, *map(len, tokens))
        padded = [group + [0] * (width - len(group)) for group in tokens]
        return {TOKENS: np.array(padded, np.int64), PLACES: np.array(places, np.int64)}

    def _gather(self, used: set[int]) -> None:
        """Exchange entries until those of the `used` adapters are the first ones."""
        self._wasted = 0
        self.state += 1
        numbers = {entry: number for number, entry in self._entries.items()}
        free = [entry for entry in range(1, len(used) + 1) if numbers.get(entry) not in used]
        for number in used:
            if (entry := self._entries[number]) <= len(used):
                continue
            place = free.pop()
            for array in self._arrays.values():
                array[[place, entry]] = array[[entry, place]]
            if other := numbers.get(place):
                self._entries[other] = entry
            self._entries[number] = place
