"""What a batched engine asks of a runtime: the logits of a few rows of new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


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

    def close(self) -> None:
        """Free the model and its caches."""
        ...
