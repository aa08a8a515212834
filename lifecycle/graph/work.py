"""How many multiply-adds the nodes of a graph are, where shapes tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import prod

import onnx_ir as ir

Dims = tuple[int | str, ...]
"""Numbers, and free dimensions by their names."""

LOOPS = ("Loop", "Scan", "SequenceMap")
RECURRENT = ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")
ATTENTION = ("Attention", "QAttention", "GroupQueryAttention", "MultiHeadAttention")
TRANSPOSED = ("ConvTranspose", "ConvTransposeWithDynamicPads")
CONVOLUTIONS = (
    "Conv",
    "ConvInteger",
    "FusedConv",
    "NhwcConv",
    "NhwcFusedConv",
    "QLinearConv",
    "DeformConv",
)
PRODUCTS = (
    "DynamicQuantizeMatMul",
    "FusedGemm",
    "FusedMatMul",
    "Gemm",
    "MatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QGemm",
    "QLinearMatMul",
)
"""Operators that multiply their first input by another."""


def total_work(nodes: Iterable[tuple[ir.Node, int]]) -> dict[str, int] | None:
    """The multiply-adds of one run as a sum: names of free dimensions, joined by `·`, -> their factor.

    Args:
        nodes: Those of a graph and its subgraphs, each with the multiply-adds of its constant weights per row.

    Returns:
        None where a shape is unknown, or where work depends on values: on conditions and on the turns of loops.
    """
    terms = Counter[str]()
    for node, per_row in nodes:
        if node.op_type in (*LOOPS, "If", "Einsum"):
            return None
        dims = _work(node, per_row)
        if dims is None:
            return None
        names = sorted(dim for dim in dims if isinstance(dim, str))
        terms["·".join(names)] += prod(dim for dim in dims if isinstance(dim, int))
    return {names: factor for names, factor in terms.items() if factor}


def attention_width(node: ir.Node) -> int | None:
    """Multiply-adds of attention for each pair of a row and a position that it reads: those of its score, and of
    adding its value up; over all heads. None if shapes do not tell."""
    query, value = _dims(node, 0), _dims(node, 2)
    if node.op_type == "GroupQueryAttention":
        return _grouped_width(node, query)
    if node.op_type == "QAttention" or (node.op_type == "Attention" and node.domain):
        sizes = node.attributes.get("qkv_hidden_sizes")
        if sizes is not None:
            return sizes.as_ints()[0] + sizes.as_ints()[2]
        width = _product((_dims(node, 1) or ("?",))[-1:])
        return None if width is None else width * 2 // 3
    heads = _number(node, "num_heads") or _number(node, "q_num_heads")
    if query is not None and len(query) == 5:
        return _product((2, query[2], query[4]))
    ahead = _heads_width(query, heads, heads)
    behind = _heads_width(
        value, heads or (query[1] if query else None), _number(node, "kv_num_heads") or heads
    )
    return ahead + behind if ahead is not None and behind is not None else None


def _grouped_width(node: ir.Node, query: Dims | None) -> int | None:
    heads, pairs = _number(node, "num_heads") or 0, _number(node, "kv_num_heads") or 0
    past = _dims(node, 3)
    if past is not None and isinstance(past[-1], int):
        return 2 * heads * past[-1]
    if query is None or not isinstance(query[-1], int):
        return None
    packed = len(node.inputs) < 2 or node.inputs[1] is None
    return 2 * query[-1] * heads // (heads + 2 * pairs if packed else heads)


def _heads_width(dims: Dims | None, heads: int | str | None, own: int | None) -> int | None:
    """Heads times the size of one, of (B, heads, S, size) or of (B, S, own heads × size)."""
    if dims is None or not isinstance(dims[-1], int):
        return None
    if len(dims) == 4:
        return _product((heads or dims[1], dims[3]))
    return dims[-1] * heads // own if isinstance(heads, int) and own else None


def _work(node: ir.Node, per_row: int) -> Dims | None:
    """Factors of the multiply-adds of a node; None if shapes do not tell."""
    operator = node.op_type
    if operator in PRODUCTS:
        return _joined(_output(node), _inner(node))
    if operator in (*CONVOLUTIONS, *TRANSPOSED):
        return _convolution(node)
    if operator in RECURRENT:
        steps = _dims(node, 0)
        return _joined((per_row,), steps[:2] if steps else None)
    if operator in ATTENTION:
        return None if node.domain else _attention(node)
    if per_row:
        rows = _dims(node, 0)
        return _joined((per_row,), rows[:-1] if rows else None)
    return (0,)


def _inner(node: ir.Node) -> Dims | None:
    """The dimension that a product sums over."""
    dims = _dims(node, 0)
    if dims is None:
        return None
    return dims[-2:-1] if _number(node, "transA") and len(dims) > 1 else dims[-1:]


def _convolution(node: ir.Node) -> Dims | None:
    quantized = node.op_type == "QLinearConv"
    kernel = _dims(node, 3 if quantized else 1)
    places = _dims(node, 0) if node.op_type in TRANSPOSED else _output(node)
    if places is None:
        return None
    channels = -1 if node.op_type.startswith("Nhwc") else 1
    return _joined(
        kernel, tuple(dim for at, dim in enumerate(places) if at != channels % len(places))
    )


def _attention(node: ir.Node) -> Dims | None:
    """Of ai.onnx: (B, S, heads × size) or (B, heads, S, size); all positions, also those that a mask hides."""
    query, keys = _dims(node, 0), _dims(node, 1)
    if len(node.outputs) > 1 and node.outputs[1].name:
        keys = _plain(node.outputs[1].shape)
    width = attention_width(node)
    if query is None or keys is None or width is None:
        return None
    return width, query[0], query[-2], keys[-2]


def _output(node: ir.Node) -> Dims | None:
    return _plain(node.outputs[0].shape)


def _dims(node: ir.Node, at: int) -> Dims | None:
    value = node.inputs[at] if at < len(node.inputs) else None
    return None if value is None else _plain(value.shape)


def _plain(shape: ir.Shape | None) -> Dims | None:
    """None too if a dimension has no name, or one that shape inference made up."""
    if shape is None:
        return None
    dims = tuple(dim if isinstance(dim, int) else dim.value for dim in shape.dims)
    known = tuple(
        dim for dim in dims if isinstance(dim, int) or (dim and not dim.startswith("unk__"))
    )
    return known if len(known) == len(dims) else None


def _joined(one: Dims | None, other: Dims | None) -> Dims | None:
    return None if one is None or other is None else one + other


def _product(dims: Iterable[int | str]) -> int | None:
    found = tuple(dims)
    numbers = [dim for dim in found if isinstance(dim, int)]
    return prod(numbers) if len(numbers) == len(found) else None


def _number(node: ir.Node, name: str) -> int | None:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else None
