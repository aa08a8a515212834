"""What a batched engine asks of a runtime: the logits of a few rows of new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.base import AdapterWeights
from lifecycle.errors import EngineError

COPY_ERRORS = (EngineError, MemoryError)
"""What copying a cache may raise. Copies only save work: where one fails, it is done."""

Block = NDArray[Any]
"""Keys and values of a range of tokens, as a backend keeps them."""


class Row(NamedTuple):
    """The new tokens of one slot in one step."""

    slot: int
    start: int
    """Tokens already in the slot's cache; a row that starts at 0 begins a new text there."""
    tokens: Sequence[int]
    num_logits: int
    """How many logits are wanted: those after the last so many of `tokens`."""
    is_long: bool = False
    """Whether the text is beyond the first context of a model that rotates such texts otherwise."""
    adapter: int = 0
    """The number of the adapter that the text is computed with; 0 is none."""
    num_prompt: int = 0
    """How many of `tokens`, the first ones, belong to the prompt; they may have a graph of their own."""


class Backend(Protocol):
    """A model with a cache of keys and values for a fixed number of slots."""

    @property
    def can_roll_back(self) -> bool:
        """Whether it takes rows that begin before the end of what their slot holds: what stands behind is forgotten."""
        ...

    def forward(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Run the model once over rows of different slots.

        Returns:
            [L, vocab_size], where L is the sum of `num_logits`, row after row. The memory may
            be used again by the next call.

        Raises:
            EngineError: the runtime failed. Slots that were not in `rows` keep their texts.
        """
        ...

    @property
    def adapter_slots(self) -> int:
        """Adapters that it can hold together."""
        ...

    def read_adapter(self, folder: Path) -> AdapterWeights:
        """Read a PEFT folder, and make ready what the first adapter needs; any thread may do that while
        another one runs the model.

        Raises:
            EngineError: the backend has no slots, or the adapter does not fit.
        """
        ...

    def load_adapter(self, weights: AdapterWeights, instead_of: int = 0) -> int:
        """Take an adapter into a free slot, or into that of an adapter which no row uses any more.

        Returns:
            Its number, 1 or more, which no other adapter has had or gets.

        Raises:
            EngineError: no slot is free, or the weights are of another model; nothing has changed.
        """
        ...

    def unload_adapter(self, number: int) -> None:
        """Make the slot of an adapter free that no row uses any more."""
        ...

    def close(self) -> None:
        """Free the model and its caches."""
        ...


@runtime_checkable
class HiddenBackend(Backend, Protocol):
    """A backend that gives what a model makes of a text before its output head."""

    hidden_size: int

    def hidden_states(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """As `forward`, with the normed hidden states, [L, hidden_size], in place of logits; rows have
        no adapter.

        Raises:
            EngineError: the model was exported without them, or the runtime failed.
        """
        ...


@runtime_checkable
class CacheBackend(Backend, Protocol):
    """A backend whose cache can be copied by ranges of tokens, and that can roll back. Copies may raise `COPY_ERRORS`."""

    @property
    def bytes_per_token(self) -> int:
        """What keys and values of one token take."""
        ...

    def read_cache(self, slot: int, start: int, stop: int) -> Block:
        """A copy of what a slot holds of its tokens `start` to `stop`."""
        ...

    def write_cache(self, slot: int, start: int, block: Block, count: int | None = None) -> None:
        """Put such a copy, or its first `count` tokens, into a slot, from its token `start` on."""
        ...

    def copy_cache(self, source: int, target: int, stop: int, start: int = 0) -> None:
        """Let a slot that holds `start` tokens go on as another one does, up to `stop`."""
        ...

    def forget(self, slot: int, start: int = 0) -> None:
        """Give back the memory of what a slot holds from its token `start` on: nothing looks at it any more."""
        ...

    def forget_passed(self, slot: int, count: int, before: int = 0) -> None:
        """Give back the memory of what layers with windows do not look back on after the first `count` tokens; it was
        after `before` that this was done last."""
        ...
