"""Where channels of activations can be scaled without a change of what the graph computes.

The products that read a value take the scale into their columns, also those of all experts of a mixture; it
is taken out of what makes the value: the weights of a norm, or rows of the product before it. Between the two may be what hands
channels on in proportion: a rectifier, the second factor of a gated MLP, attention from its
values to its output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lifecycle.graph.rewrite import GraphRewrite, Linear, Mixture

NORMS = {
    "RMSNormalization": slice(1, 3),
    "LayerNormalization": slice(1, 3),
    "SkipSimplifiedLayerNormalization": slice(2, 3),
    "SkipLayerNormalization": slice(2, 4),
}
"""Operators -> which of their inputs are weights and biases, [channels]."""


@dataclass(frozen=True, slots=True)
class Source:
    """What makes some channels."""

    constants: tuple[ir.Value, ...]
    """Weights and biases whose rows, or values, make one channel each."""
    start: int
    """The row of the first channel."""
    copies: NDArray[np.intp]
    """Row behind `start` of each channel that is read: attention hands a head of values to several
    heads of its output."""


@dataclass(frozen=True, slots=True)
class Channels:
    """Channels that products read, and what makes them."""

    readers: tuple[Linear, ...]
    source: Source
    mixture: Mixture | None = None
    """That reads them too: its router is one of `readers`."""

    @property
    def weights(self) -> list[ir.Value]:
        """The matrices whose columns meet these channels."""
        found = [reader.weight for reader in self.readers]
        return found if self.mixture is None else [*found, self.mixture.gate_up]


def scalable_channels(rewrite: GraphRewrite) -> list[Channels]:
    """All channels of a graph that can be scaled, in the order of their first readers."""
    readers: dict[ir.Value, list[Linear]] = {}
    for linear in rewrite.linears():
        readers.setdefault(linear.x, []).append(linear)
    mixtures = {mixture.node.inputs[0]: mixture for mixture in rewrite.mixtures()}
    found: list[Channels] = []
    for value, linears in readers.items():
        mixture = mixtures.get(value)
        source = _trace(value, 0, linears[0].shape[1])
        if source is None:
            continue
        channels = Channels(tuple(linears), source, mixture)
        read_by_others = len(value.uses()) > len(channels.weights)
        if not read_by_others and all(map(_is_own, (*channels.weights, *source.constants))):
            found.append(channels)
    return found


def _is_own(constant: ir.Value) -> bool:
    """Whether a constant lies in the file of weights, and one node alone reads it."""
    return isinstance(constant.const_value, ir.ExternalTensor) and len(constant.uses()) == 1


def _trace(value: ir.Value | None, start: int, count: int) -> Source | None:
    """What makes `count` channels of a value from `start` on; None if it cannot take a scale."""
    node = value.producer() if value is not None else None
    if value is None or node is None:
        return None
    if value is not node.outputs[0] and node.op_type != "Split":
        return None
    if node.op_type in NORMS or node.op_type == "Gemm":
        constants = node.inputs[NORMS.get(node.op_type, slice(1, 3))]
        return Source(tuple(c for c in constants if c is not None), start, np.arange(count))
    match node.op_type:
        case "Relu" | "Gather" | "GatherND":
            return _through(node.inputs[0], start, count)
        case "Mul":
            found = (_through(factor, start, count) for factor in reversed(node.inputs))
            return next((source for source in found if source is not None), None)
        case "Split":
            before = sum(_sizes(node)[: list(node.outputs).index(value)])
            return _through(node.inputs[0], before + start, count)
        case "Concat":
            return _through_last(node.inputs[-1], count)
        case "GroupQueryAttention":
            return _through_attention(node, count)
        case _:
            return None


def _through(value: ir.Value | None, start: int, count: int) -> Source | None:
    """As `_trace`, for a value that nothing else may read."""
    return _trace(value, start, count) if value is not None and len(value.uses()) == 1 else None


def _through_last(value: ir.Value | None, count: int) -> Source | None:
    """The last part of a concatenation, if it is as wide as the channels that are looked for."""
    node = value.producer() if value is not None else None
    if value is None or node is None or node.op_type != "Split":
        return None
    width = _sizes(node)[list(node.outputs).index(value)]
    return _through(value, 0, count) if width == count else None


def _through_attention(node: ir.Node, count: int) -> Source | None:
    """From the output of attention to its values, which are the last of its packed input."""
    heads, kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    size = count // heads
    source = _through(node.inputs[0], (heads + kv_heads) * size, kv_heads * size)
    if source is None:
        return None
    rows = source.copies.reshape(kv_heads, size)
    return replace(source, copies=np.repeat(rows, heads // kv_heads, axis=0).reshape(-1))


def _sizes(split: ir.Node) -> list[int]:
    sizes = split.inputs[1]
    assert sizes is not None and sizes.const_value is not None
    return sizes.const_value.numpy().tolist()
