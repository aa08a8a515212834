"""What a batched engine asks of a runtime: the logits of a few rows of new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

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
    """The adapter slot that the text is computed with; 0 is none."""


class Backend(Protocol):
    """A model with a cache of keys and values for a fixed number of slots."""

    def forward(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Run the model once over rows of different slots.

        Returns:
            [L, vocab_size], where L is the sum of `num_logits`, row after row. The memory may
            be used again by the next call.

        Raises:
            EngineError: the runtime failed. Slots that were not in `rows` keep their texts.
        """
        ...

    def load_adapter(self, folder: Path) -> int:
        """Load a PEFT folder into a free adapter slot, which is returned: 1 or more.

        Raises:
            EngineError: the backend has no slots, none is free, or the adapter does not fit.
        """
        ...

    def unload_adapter(self, slot: int) -> None:
        """Make an adapter slot free that no row uses any more."""
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
    """A backend whose cache can be copied by ranges of tokens, and that takes rows which begin before
    the end of what their slot holds: what stands behind is forgotten."""

    @property
    def bytes_per_token(self) -> int:
        """What keys and values of one token take."""
        ...

    def read_cache(self, slot: int, start: int, stop: int) -> Block:
        """A copy of what a slot holds of its tokens `start` to `stop`."""
        ...

    def write_cache(self, slot: int, start: int, block: Block) -> None:
        """Put such a copy into a slot, from its token `start` on."""
        ...

    def copy_cache(self, source: int, target: int, stop: int) -> None:
        """Let a slot hold the first `stop` tokens that another one holds."""
        ...

    def forget(self, slot: int, before: int | None = None) -> None:
        """Give memory back: that of all that a slot holds, or of what it holds before a token that
        nothing looks back beyond."""
        ...
