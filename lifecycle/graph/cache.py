"""A cache of keys and values in 8 or 4 bits, with scales that calibration texts gave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lifecycle.engines.decoder import DecoderInfo
from lifecycle.graph.calibration import Calibration
from lifecycle.graph.rewrite import GraphRewrite
from lifecycle.graph.rotation import Rotation

_Floats = NDArray[np.float32]

KvType = Literal["int8", "int4"]
_STORED = {"int8": ir.DataType.INT8, "int4": ir.DataType.UINT8}
_LARGEST = {"int8": 127, "int4": 7}
_K_SCALE, _V_SCALE = 12, 13
"""Inputs of `GroupQueryAttention`."""
SCALE_SUFFIXES = (".k_scale", ".v_scale")
"""What the names of the scales of keys and of values end with."""
_PLACES = 16
"""Places, spread over the whole context, at which each key is measured: a rotation makes another of
two channels large at each, and texts for calibration are shorter than those that are served."""
_PARTS = np.linspace(1, 0.5, 6, dtype=np.float32)
"""Scales tried in 4 bits, as parts of the one that reaches the largest value."""
_SAMPLES = 1 << 15
"""Values of a channel that squared errors are taken of; evenly spread, if there are more."""


@dataclass(frozen=True, slots=True)
class QuantizedCache:
    """A cache of integers, each the value of a channel divided by the channel's scale."""

    kv_dtype: KvType
    scales: Sequence[tuple[_Floats, _Floats]]
    """Of the keys and of the values of each layer, [kv_heads, head_size] each."""

    def apply(self, rewrite: GraphRewrite) -> None:
        """Let the attention of every layer store integers."""
        nodes = [node for node in rewrite.graph if node.op_type == "GroupQueryAttention"]
        for node, scales in zip(nodes, self.scales, strict=True):
            places = (_K_SCALE, _V_SCALE)
            for place, suffix, scale in zip(places, SCALE_SUFFIXES, scales, strict=True):
                name = f"{node.name}{suffix}"
                value = rewrite.weights.add_array(name, scale[None, :, None, :])
                rewrite.graph.initializers[name] = value
                node.replace_input_with(place, value)
            for name in ("k_quant_type", "v_quant_type"):
                node.attributes[name] = ir.AttrString(name, "PER_CHANNEL")
            bits = 8 if self.kv_dtype == "int8" else 4
            node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", bits)
            for value in (*node.inputs[3:5], *node.outputs[1:3]):
                assert value is not None and value.shape is not None
                batch, heads, capacity, width = value.shape
                assert isinstance(width, int)
                stored = width // 2 if self.kv_dtype == "int4" else width
                value.shape = ir.Shape((batch, heads, capacity, stored))
                value.type = ir.TensorType(_STORED[self.kv_dtype])


def calibrate_cache(
    calibration: Calibration,
    info: DecoderInfo,
    kv_dtype: KvType,
    on_done: Callable[[int, int], None] | None = None,
) -> QuantizedCache:
    """The scales of every layer for what the texts leave in its cache; `on_done(layers, all)`
    follows the work."""
    scales: list[tuple[_Floats, _Floats]] = []
    for layer in range(info.num_layers):
        keys, values = calibration.cached(layer)
        everywhere = _everywhere(keys, calibration.positions(), calibration.rotation(layer))
        of_keys = channel_scales(everywhere, kv_dtype)
        scales.append((of_keys, channel_scales([values], kv_dtype)))
        if on_done is not None:
            on_done(layer + 1, info.num_layers)
    return QuantizedCache(kv_dtype, scales)


@dataclass(frozen=True, slots=True)
class _Everywhere:
    """Keys as they are at places all over the context; made anew each time, one place at once."""

    keys: _Floats
    positions: NDArray[np.int64]
    rotation: Rotation

    def __iter__(self) -> Iterator[_Floats]:
        step = -(-len(self.rotation.cos) // _PLACES)
        for by in range(0, len(self.rotation.cos), step):
            yield self.rotation.moved(self.keys, self.positions, by)


def _everywhere(
    keys: _Floats, positions: NDArray[np.int64], rotation: Rotation | None
) -> Iterable[_Floats]:
    return [keys] if rotation is None else _Everywhere(keys, positions, rotation)


def channel_scales(blocks: Iterable[_Floats], kv_dtype: KvType) -> _Floats:
    """The scale of each channel of blocks [heads, tokens, size], as [heads, size]; `blocks` are
    read twice for `int4`.

    In 8 bits the largest value is the last step. In 4 bits it is the scale, of a few, that
    leaves the least squared error: large values are rare, and all others pay for them.
    """
    last = np.float32(_LARGEST[kv_dtype])
    found = [(block.shape[1], np.abs(block).max(axis=1)) for block in blocks]
    largest = np.max([of_block for _, of_block in found], axis=0)
    largest[largest == 0] = 1
    if kv_dtype == "int8":
        return largest / last
    apart = -(-sum(tokens for tokens, _ in found) // _SAMPLES)
    trials = largest / last * _PARTS[:, None, None]
    errors = np.zeros(trials.shape, np.float64)
    for block in (block[:, ::apart] for block in blocks):
        for error, scale in zip(errors, trials, strict=True):
            steps = np.clip(np.rint(block / scale[:, None]), -last - 1, last)
            error += np.square(steps * scale[:, None] - block).sum(axis=1)
    return np.take_along_axis(trials, errors.argmin(axis=0)[None], axis=0)[0]
