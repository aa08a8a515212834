"""The weights of the loaded adapters, as the graph with slots takes them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.adapters import PLACES, TOKENS, AdapterLayout
from lifecycle.engines.backend import Row
from lifecycle.engines.base import AdapterWeights
from lifecycle.engines.peft import PeftFolder
from lifecycle.errors import EngineError

MIN_WIDTH = 2
"""Rows of a product of the graph with slots (see `lifecycle.engines.adapters`)."""
_MOST_HALF = float(np.uint32(0x7F7F8000).view(np.float32))
"""From here on numbers round to infinity."""
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


def as_pairs(matrix: NDArray[np.float32]) -> NDArray[np.uint16]:
    """A matrix rounded to bfloat16, its rows two by two: [n, m] as [n / 2, m, 2], in the shape that it had."""
    bits = matrix.view(np.uint32)
    halves = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    rows, columns = matrix.shape
    return np.ascontiguousarray(halves.reshape(rows // 2, 2, columns).swapaxes(1, 2)).reshape(
        rows, columns
    )


def as_tiles(matrix: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Such pairs with their columns 16 by 16: [n, m] as [m / 16, n / 2, 16, 2], in the shape that it had.

    What is multiplied at once lies together: otherwise each of its rows would be on another page."""
    rows, columns = matrix.shape
    pairs = as_pairs(matrix).reshape(rows // 2, columns // 16, 32)
    return np.ascontiguousarray(pairs.swapaxes(0, 1)).reshape(rows, columns)


class AdapterBank:
    """Entries side by side in one array per input: entry 0 is zeros, for rows without adapter.

    The graph takes a range of entries. Which entry an adapter has may change from step to step,
    so that those in use lie together; its number, by which it is known outside, does not.
    """

    def __init__(self, layout: AdapterLayout, halved: Collection[str] = ()) -> None:
        """Take the memory of all entries; the system gives it as they are filled. The `halved` inputs are
        pairs of bfloat16s (A as `as_pairs` lays them out, B as `as_tiles` does), the others float32.

        Raises:
            EngineError: there is not so much.
        """
        self._layout = layout
        first = {product.a for product in layout.products}
        self._halved = {name: as_pairs if name in first else as_tiles for name in halved}
        """How the inputs of pairs are laid out."""
        try:
            self._arrays = {
                name: np.zeros(
                    (layout.slots + 1, *shape), np.uint16 if name in halved else np.float32
                )
                for name, shape in layout.shapes().items()
            }
        except (MemoryError, ValueError) as error:
            raise EngineError(
                f"no memory for {layout.slots} adapter slots of rank {layout.rank} ({error}): "
                "export the model with fewer, or of a lower rank"
            ) from error
        self._entries = dict[int, int]()
        """Number to entry, of the loaded adapters."""
        self._num_loaded = 0
        self._wasted = 0

    def entry_of(self, weights: Mapping[str, NDArray[np.float32]]) -> AdapterWeights:
        """Weights as an entry holds them.

        Raises:
            EngineError: one is too large for it.
        """
        for name in self._halved:
            if np.abs(weights[name]).max(initial=0.0) >= _MOST_HALF:
                raise EngineError(
                    f"the adapter has a weight for '{name}' beyond what bfloat16 holds: it is damaged"
                )
        return {
            name: self._halved[name](matrix) if name in self._halved else matrix
            for name, matrix in weights.items()
        }

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
