"""Keys and values of slots, in the caches of transformers."""

# transformers and torch type their own interfaces loosely.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lifecycle.engines.backend import Block


class TorchCache:
    """One cache of transformers per slot, with keys and values of each layer, [1, heads, tokens, width]."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._caches: dict[int, DynamicCache] = {}

    @property
    def is_copyable(self) -> bool:
        """Whether it is keys and values of all tokens: no layer has a window, or makes a state of what it has seen."""
        layers = DynamicCache(config=self._config).layers
        return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)

    def begin(self, slot: int, start: int) -> DynamicCache:
        """What a slot holds of its first `start` tokens, for those that come next; what stands behind is forgotten."""
        if start == 0:
            self._caches[slot] = DynamicCache(config=self._config)
        else:
            self.forget(slot, start)
        return self._caches[slot]

    def shapes(self, slot: int) -> list[tuple[int, int]]:
        """Heads and width of keys and values, layer by layer, as a slot has them."""
        return [(tensor.shape[1], tensor.shape[3]) for tensor in self._tensors(slot, 0)]

    def read(self, slot: int, start: int, stop: int) -> Block:
        """A copy of tokens of a slot, [tokens, n]: what all layers hold of each."""
        parts = [t[0, :, start:].transpose(0, 1).flatten(1) for t in self._tensors(slot, stop)]
        return torch.cat(parts, 1).numpy()

    def write(self, slot: int, start: int, block: Block, shapes: Sequence[tuple[int, int]]) -> None:
        """Put such a copy into a slot, from its token `start` on."""
        parts = torch.from_numpy(block).split([heads * width for heads, width in shapes], 1)
        pairs = zip(parts, shapes, strict=True)
        tensors = [part.unflatten(1, shape).transpose(0, 1)[None] for part, shape in pairs]
        self._add(slot, start, tensors)

    def copy(self, source: int, target: int, stop: int, start: int = 0) -> None:
        """Let a slot hold the tokens `start` to `stop` that another one holds."""
        self._add(target, start, [each[:, :, start:] for each in self._tensors(source, stop)])

    def forget(self, slot: int, start: int) -> None:
        """What a slot holds from its token `start` on. The memory of a part goes once its text goes on."""
        if start == 0:
            self._caches.pop(slot, None)
        elif slot in self._caches:
            cache = self._caches[slot]
            if (beyond := cache.get_seq_length() - start) > 0:
                cache.crop(-beyond)

    def clear(self) -> None:
        """Let go of all memory."""
        self._caches.clear()

    def _tensors(self, slot: int, stop: int) -> list[Tensor]:
        """Keys and values of its first tokens, layer by layer; views, not copies."""
        layers: Any = self._caches[slot].layers
        return [tensor[:, :, :stop] for layer in layers for tensor in (layer.keys, layer.values)]

    def _add(self, slot: int, start: int, tensors: list[Tensor]) -> None:
        """Put keys and values behind the first `start` tokens of a slot."""
        cache = self.begin(slot, start)
        layers: Any = cache.layers
        for number, (keys, values) in enumerate(zip(tensors[::2], tensors[1::2], strict=True)):
            if start == 0:
                cache.update(keys, values, number)
                continue
            layer = layers[number]
            # What a model has computed may be written to in this mode only.
            with torch.inference_mode():
                layer.keys, layer.values = _joined(layer.keys, keys), _joined(layer.values, values)


def _joined(old: Tensor, new: Tensor) -> Tensor:
    """Tokens behind others, [1, heads, tokens, width], in place where there is room: a text that is copied in parts
    must not be copied whole for each. What is computed next takes memory for just the tokens that there are."""
    before, width = old.shape[2:]
    count = before + new.shape[2]
    if old.stride(2) != width or old.stride(1) < count * width:
        room = old.new_empty((*old.shape[:2], 2 * count, width))
        room[:, :, :before] = old
        old = room[:, :, :before]
    whole = old.as_strided((*old.shape[:2], count, width), old.stride(), old.storage_offset())
    whole[:, :, before:] = new
    return whole
