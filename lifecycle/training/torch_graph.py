"""An exported decoder as a PyTorch function of its constants, so that they can be trained.

It computes what the float32 graph does for texts from their first token on; caches of keys and values are neither
read nor written.
"""

# onnx has no complete type information.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import onnx
import torch
from onnx import GraphProto, NodeProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional as F

from lifecycle.engines.backend import Row
from lifecycle.engines.decoder import GRAPH, DecoderInfo
from lifecycle.engines.layout import MIN_WIDTH, pack
from lifecycle.errors import StageError

Operands: TypeAlias = Sequence[Tensor | None]
Attributes: TypeAlias = Mapping[str, Any]
Operator: TypeAlias = Callable[[Operands, Attributes], Sequence[Tensor | None]]


class TorchGraph:
    """The nodes of a graph folder, and its constants as tensors. Texts are no longer than its short context, where it
    has two."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """
        Raises:
            StageError: the graph has an operator that is not known here, such as those of mixtures and of slots for
                adapters.
        """
        graph = _read(folder)
        self.vocab_size = DecoderInfo.load(folder).vocab_size
        self._device = device
        self._nodes = [(node, _attributes(node), _OPERATORS[node.op_type]) for node in graph.node]
        self.constants = {
            tensor.name: torch.from_numpy(numpy_helper.to_array(tensor, str(folder)).copy()).to(
                device
            )
            for tensor in graph.initializer
        }
        self._unread = [value.name for value in graph.input]

    @property
    def nodes(self) -> list[NodeProto]:
        """In the order in which they are computed."""
        return [node for node, _, _ in self._nodes]

    def logits(
        self, texts: Sequence[Sequence[int]], changed: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Those after each token, [tokens of all texts, vocab]; `changed` are other values of constants, by name."""
        rows = [Row(i, 0, list(text), len(text)) for i, text in enumerate(texts)]
        width = max(MIN_WIDTH, *map(len, texts))
        inputs = {
            name: torch.from_numpy(values).to(self._device)
            for name, values in pack(rows, width).items()
        }
        values: dict[str, Tensor | None] = dict.fromkeys(["", *self._unread])
        values |= {**inputs, **self.constants, **(changed or {})}
        for node, attributes, operator in self._nodes:
            operands = [values[name] for name in node.input]
            found = operator(operands, attributes)
            values |= {name: value for name, value in zip(node.output, found, strict=False) if name}
        logits = values["logits"]
        assert logits is not None
        return logits


def require_trainable(folder: Path) -> None:
    """
    Raises:
        StageError: the graph in a folder has an operator that is not known here.
    """
    _read(folder)


def _read(folder: Path) -> GraphProto:
    """Without what lies in other files."""
    graph = onnx.load(folder / GRAPH, load_external_data=False).graph
    if unknown := sorted({node.op_type for node in graph.node} - _OPERATORS.keys()):
        raise StageError(
            f"{folder}: a graph with the operator {unknown[0]} cannot be trained (only those with "
            f"{', '.join(sorted(_OPERATORS))})"
        )
    return graph


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {found.name: helper.get_attribute_value(found) for found in node.attribute}


def _gather(x: Operands, attributes: Attributes) -> Sequence[Tensor]:
    assert attributes.get("axis", 0) == 0
    table, index = _given(x)
    return (table[index],)


def _gather_nd(x: Operands, _: Attributes) -> Sequence[Tensor]:
    table, index = _given(x)
    return (table[tuple(index.unbind(-1))],)


def _gemm(x: Operands, attributes: Attributes) -> Sequence[Tensor]:
    assert attributes == {"transB": 1}
    rows, weight, *bias = _given(x)
    return (F.linear(rows, weight, *bias),)


def _rms_norm(x: Operands, attributes: Attributes) -> Sequence[Tensor]:
    rows, weight = _given(x)
    return (F.rms_norm(rows, rows.shape[-1:], weight, attributes["epsilon"]),)


def _layer_norm(x: Operands, attributes: Attributes) -> Sequence[Tensor]:
    rows, weight, *bias = _given(x)
    return (F.layer_norm(rows, rows.shape[-1:], weight, *bias, eps=attributes["epsilon"]),)


def _after_sum(norm: Operator) -> Operator:
    """A norm of a sum, which is given too."""

    def operator(x: Operands, attributes: Attributes) -> Sequence[Tensor | None]:
        rows, beside, *rest = _given(x)
        total = rows + beside
        return (*norm((total, *rest), attributes), None, None, total)

    return operator


def _split(x: Operands, attributes: Attributes) -> Sequence[Tensor]:
    whole, sizes = _given(x)
    return whole.split(sizes.tolist(), attributes["axis"])


def _concat(x: Operands, attributes: Attributes) -> Sequence[Tensor]:
    return (torch.cat(_given(x), attributes["axis"]),)


def _reshape(x: Operands, _: Attributes) -> Sequence[Tensor]:
    whole, shape = _given(x)
    # 0 keeps a dimension.
    sizes = [size or whole.shape[i] for i, size in enumerate(shape.tolist())]
    return (whole.reshape(sizes),)


def _squeeze(x: Operands, _: Attributes) -> Sequence[Tensor]:
    whole, axis = _given(x)
    return (whole.squeeze(int(axis)),)


def _unsqueeze(x: Operands, _: Attributes) -> Sequence[Tensor]:
    whole, axis = _given(x)
    return (whole.unsqueeze(int(axis)),)


def _quick_gelu(x: Operands, attributes: Attributes) -> Sequence[Tensor]:
    (rows,) = _given(x)
    return (
        F.silu(rows) if attributes["alpha"] == 1 else rows * (attributes["alpha"] * rows).sigmoid(),
    )


def _gelu(x: Operands, attributes: Attributes) -> Sequence[Tensor]:
    (rows,) = _given(x)
    return (F.gelu(rows, approximate=attributes.get("approximate", b"none").decode()),)


def _elementwise(function: Callable[..., Tensor]) -> Operator:
    return lambda x, _: (function(*_given(x)),)


def _rotary(x: Operands, attributes: Attributes) -> Sequence[Tensor]:
    """RotaryEmbedding of rows [T, 1, heads * size]."""
    rows, positions, cos, sin = _given(x)
    rotated = attributes.get("rotary_embedding_dim", 0) or 2 * cos.shape[1]
    heads = attributes.get("num_heads", 0) or rows.shape[-1] // rotated
    parts = rows.reshape(len(rows), heads, -1)
    turned = _turn(parts[..., :rotated], cos[positions], sin[positions], attributes)
    return (torch.cat([turned, parts[..., rotated:]], -1).reshape(rows.shape),)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, attributes: Attributes) -> Tensor:
    """Pairs of channels turned by angles that broadcast to half of `x`."""
    if attributes.get("interleaved", 0) or attributes.get("rotary_interleaved", 0):
        first, second = x[..., 0::2], x[..., 1::2]
        pairs = (first * cos - second * sin, second * cos + first * sin)
        return torch.stack(pairs, -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _attention(x: Operands, attributes: Attributes) -> Sequence[Tensor]:
    """GroupQueryAttention of queries, keys and values [B, S, width], of rows that all begin at the left."""
    whole, past = x[0], x[3]
    assert whole is not None
    heads, kv_heads = attributes["num_heads"], attributes["kv_num_heads"]
    batch, length, width = whole.shape
    size = width // (heads + 2 * kv_heads)
    parts = whole.reshape(batch, length, -1, size).transpose(1, 2)
    q, k, v = parts.split([heads, kv_heads, kv_heads], 1)
    if attributes["do_rotary"]:
        cos, sin = x[7], x[8]
        assert cos is not None and sin is not None and past is None
        q, k = (_turn(part, cos[:length], sin[:length], attributes) for part in (q, k))
    scale = attributes.get("scale", 0.0) or 1 / math.sqrt(size)
    window, cap = attributes.get("local_window_size", -1), attributes.get("softcap", 0.0)
    if window <= 0 and not cap:
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=heads != kv_heads
        )
    else:
        places = torch.arange(length, device=whole.device)
        late = places[:, None] - places
        is_seen = (late >= 0) & (late < (window if window > 0 else length))
        k, v = (part.repeat_interleave(heads // kv_heads, 1) for part in (k, v))
        scores = q @ k.transpose(-1, -2) * scale
        scores = cap * torch.tanh(scores / cap) if cap else scores
        y = scores.masked_fill(~is_seen, -math.inf).softmax(-1) @ v
    return (y.transpose(1, 2).reshape(batch, length, heads * size),)


def _given(x: Operands) -> list[Tensor]:
    """All operands but those that are left out."""
    return [operand for operand in x if operand is not None]


_OPERATORS: dict[str, Operator] = {
    "Add": _elementwise(torch.add),
    "Concat": _concat,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GroupQueryAttention": _attention,
    "LayerNormalization": _layer_norm,
    "Mul": _elementwise(torch.mul),
    "QuickGelu": _quick_gelu,
    "RMSNormalization": _rms_norm,
    "Relu": _elementwise(torch.relu),
    "Reshape": _reshape,
    "RotaryEmbedding": _rotary,
    "SkipLayerNormalization": _after_sum(_layer_norm),
    "SkipSimplifiedLayerNormalization": _after_sum(_rms_norm),
    "Split": _split,
    "Squeeze": _squeeze,
    "Tanh": _elementwise(torch.tanh),
    "Unsqueeze": _unsqueeze,
}
