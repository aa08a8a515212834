"""Puts this project's operators in the place of ONNX Runtime's in a graph.

Graphs on disk hold ONNX Runtime's operators only, so that any of its builds runs them. What is replaced is what
decoders of this project consist of: attention, with the nodes that lay tokens out in rows before it and pack them
again; products of blocks; the nodes of a row-wise product; a gate before either product; and what adapters add to
one. Whatever differs from what ours can do stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lifecycle.engines.adapters import FIRST, PLACES, TOKENS
from lifecycle.engines.native.nodes import Graph, Node
from lifecycle.engines.packed_adapter import packed_bytes

DOMAIN = "lifecycle"
ATTENTION, BLOCKS, ROWWISE = "PackedAttention", "MatMulNBits", "RowwiseMatMul"
GATE, NORM, UPDATE = "Gate", "SkipNorm", "AdapterUpdate"
_PRODUCTS = (BLOCKS, ROWWISE)

LOGITS, TOPS = "logits", "logits.tops"
"""Outputs of a graph: the second is what a product adds to the first, see `sampling.Scan.columns`."""
_FLOAT, _UINT8, _INT8 = 1, 2, 3
"""Types of elements, as protobuf numbers."""
_BITS = {_INT8: 8, _UINT8: 4}
"""Of a value in a cache of such elements."""
_PAST_KEY, _SCALES, _COUNTS = 3, (12, 13), 16
_ATTENTION_INPUTS = {0, 3, 4, 5, 6, 7, 8, *_SCALES, _COUNTS}
"""Those of attention's inputs that our operator reads, or may pass over."""
_ATTENTION_ATTRIBUTES = {
    "num_heads",
    "kv_num_heads",
    "do_rotary",
    "rotary_interleaved",
    "local_window_size",
    "scale",
    "softcap",
    "k_quant_type",
    "v_quant_type",
    "kv_cache_bit_width",
}
_PRODUCT_ATTRIBUTES = {"K", "N", "bits", "block_size", "accuracy_level"}
_STEP, _ZERO = "int8.step", "int8.zero"
"""What quantisation calls the scale and the zero of rounded rows."""
_BY_TOKEN = {
    "Abs",
    "Add",
    "Cast",
    "Concat",
    "Gather",
    "GatherBlockQuantized",
    "Mul",
    "RMSNormalization",
    "RotaryEmbedding",
    "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "Split",
    "Squeeze",
    "Unsqueeze",
}
"""Operators of ONNX Runtime that are known to compute each token by itself."""
_LAST_AXIS = (-1, 2**64 - 1)
"""As it is, and as protobuf writes it."""
_OWN_INPUTS = {ROWWISE: 4, BLOCKS: 6}
"""Of a product, before those of an adapter."""
_MOST_PARTS = 3
"""Products that share their input, as queries, keys and values do."""
_HEAD_STEP = 8
"""What the width of a head is a multiple of."""


def swap(model: bytes) -> bytes:
    """A model with our operators wherever they do what its own do.

    Raises:
        ValueError, IndexError: it is no ONNX model, or has an output of a name that is ours.
    """
    graph = Graph(model)
    if TOPS in graph.outputs:
        raise ValueError(f"it has an output '{TOPS}', which is what our kernels add")
    for node in graph.nodes:
        if node.is_a("MatMulIntegerToFloat"):
            _swap_rowwise(graph, node)
        elif node.is_a("MatMulNBits") and _is_known_product(graph, node):
            node.domain = DOMAIN
        elif node.is_a("GroupQueryAttention") and _is_known_attention(graph, node):
            _swap_attention(graph, node)
        elif node.is_a("SkipSimplifiedLayerNormalization"):
            _swap_norm(node)
    for node in graph.nodes:
        if node.is_a("Gather") and node.inputs[1:] == [TOKENS]:
            _swap_update(graph, node)
    for node in graph.nodes:
        if node.is_a("Mul") and len(node.inputs) == 2:
            _swap_gate(graph, node)
    _ask_for_tops(graph)
    return graph.write(DOMAIN)


def computes_by_token(model: bytes) -> bool:
    """Whether, with our operators, a model gives a token the same bits whatever tokens are computed with it.

    Raises:
        ValueError, IndexError: it is no ONNX model.
    """
    nodes = Graph(swap(model)).nodes
    return all(node.domain == DOMAIN or node.operator in _BY_TOKEN for node in nodes)


def attends(swapped: bytes, cache: Sequence[tuple[str, str]]) -> bool:
    """Whether our attention is all that reads and writes the cache of a model with our operators. `cache` are its inputs,
    each with its output: keys and values of one layer after the other.

    Raises:
        ValueError, IndexError: it is no ONNX model.
    """
    graph = Graph(swapped)
    if any(node.has_graphs for node in graph.nodes):
        return False
    for (key, new_key), (value, new_value) in zip(cache[::2], cache[1::2], strict=True):
        readers = graph.readers(key)
        if len(readers) != 1 or graph.readers(value) != readers or readers[0].domain != DOMAIN:
            return False
        node = readers[0]
        if node.inputs[3:5] != [key, value] or node.outputs[1:3] != [new_key, new_value]:
            return False
    return True


def _ask_for_tops(graph: Graph) -> None:
    """Let the product that gives logits tell of the largest of each so many neighbours too."""
    head = graph.made_by(LOGITS)
    if head is not None and head.domain == DOMAIN and head.operator in _PRODUCTS:
        head.set_integer("tops", 1)
        head.outputs.append(TOPS)
        graph.add_output(TOPS, _FLOAT, [0, 0])


def _swap_rowwise(graph: Graph, product: Node) -> None:
    """Make one node of those of a row-wise product (see `lifecycle.graph.int8`)."""
    quantize = graph.maker(product.inputs[0], "QuantizeLinear")
    divide = quantize and graph.maker(quantize.inputs[0], "Div")
    most = divide and graph.maker(divide.inputs[1], "ReduceMax")
    magnitude = most and graph.maker(most.inputs[0], "Abs")
    readers = graph.readers(product.outputs[0])
    if not (quantize and divide and most and magnitude) or len(readers) != 1:
        return
    scaled, x, largest = readers[0], magnitude.inputs[0], most.outputs[0]
    inner = (magnitude, divide, quantize, product)
    if (
        not scaled.is_a("Mul")
        or product.inputs[2:5:2] != [_STEP, _ZERO]
        or quantize.inputs[1:] != [_STEP, _ZERO]
        or len(product.inputs) != 5
        or set(scaled.inputs) != {product.outputs[0], largest}
        or divide.inputs[0] != x
        # What others read has to stay.
        or any(len(graph.readers(node.outputs[0])) != 1 for node in inner)
        or len(graph.readers(largest)) != 2
    ):
        return
    weight, scale = product.inputs[1], product.inputs[3]
    old = [most, *inner]
    new = Node([x, weight, scale], scaled.outputs, product.name, ROWWISE, DOMAIN)
    if graph.is_computed(weight):
        # A head that shares the matrix of the embedding.
        transposed = graph.maker(weight, "Transpose")
        if transposed is None:
            return
        new.inputs[1] = transposed.inputs[0]
        new.set_integer("transposed", 1)
        if len(graph.readers(weight)) == 1:
            old.append(transposed)
    bias = _only_reader(graph, scaled, "Add")
    shape = graph.initializers.get(scale, [])
    given = [name for name in bias.inputs if graph.initializers.get(name) == shape] if bias else []
    if bias is not None and len(given) == 1 and len(shape) == 1 and not graph.is_computed(given[0]):
        new.inputs.append(given[0])
        new.outputs = bias.outputs
        old.append(scaled)
        scaled = bias
    graph.replace(old, scaled, new)


def _is_known_product(graph: Graph, node: Node) -> bool:
    # Only at this level activations are rounded; the order of columns (input 4) is never given. Zeros and a bias have to
    # be there before the graph runs.
    return (
        node.integer("accuracy_level") == 4
        and node.integer("bits") in (4, 8)
        and node.attributes.keys() <= _PRODUCT_ATTRIBUTES
        and not any(node.inputs[4:5])
        and not any(map(graph.is_computed, (*node.inputs[3:4], *node.inputs[5:6])))
    )


def _is_known_attention(graph: Graph, node: Node) -> bool:
    given = {i for i, name in enumerate(node.inputs) if name}
    cache_type, dims = graph.inputs.get(node.inputs[_PAST_KEY], (0, []))
    width = (dims[-1] if dims else 0) * (2 if cache_type == _UINT8 else 1)
    scales = given & set(_SCALES)
    if cache_type in _BITS:
        kinds = {node.text("k_quant_type"), node.text("v_quant_type")}
        is_known = len(scales) == 2 and kinds == {"PER_CHANNEL"}
        is_known = is_known and node.integer("kv_cache_bit_width") == _BITS[cache_type]
    else:
        is_known = cache_type == _FLOAT and not scales
    return (
        is_known
        and _COUNTS in given
        and given <= _ATTENTION_INPUTS
        and node.attributes.keys() <= _ATTENTION_ATTRIBUTES
        and width > 0
        and width % _HEAD_STEP == 0
    )


def _swap_attention(graph: Graph, node: Node) -> None:
    """Make one node of attention and what lays its tokens out and packs them."""
    pad = graph.maker(node.inputs[0], "Gather")
    readers = graph.readers(node.outputs[0])
    if pad is None or len(readers) != 1 or not readers[0].is_a("GatherND"):
        return
    if len(graph.readers(node.inputs[0])) != 1:
        return
    unpad = readers[0]
    cache_type, _ = graph.inputs[node.inputs[_PAST_KEY]]
    operator = ATTENTION + (f"Int{_BITS[cache_type]}" if cache_type in _BITS else "")
    inputs = [pad.inputs[0], *node.inputs[1:], unpad.inputs[1]]
    outputs = [unpad.outputs[0], *node.outputs[1:]]
    new = Node(inputs, outputs, node.name, operator, DOMAIN, node.attributes)
    graph.replace([pad, node], unpad, new)


def _swap_norm(node: Node) -> None:
    # Outputs: what is normalised, two that are never asked for, the sum.
    outputs = node.outputs
    if len(node.inputs) == 3 and len(outputs) == 4 and outputs[3] and not any(outputs[1:3]):
        node.operator, node.domain = NORM, DOMAIN
        node.outputs = [outputs[0], outputs[3]]


def _swap_update(graph: Graph, gather: Node) -> None:
    """Make one node of those that add an adapter to a product (see `lifecycle.graph.adapters`)."""
    inner = _only_reader(graph, gather, "MatMul")
    if inner is None:
        return
    old = [gather, inner]
    split = _only_reader(graph, inner, "Split")
    if split is not None:
        old.append(split)
    outers = [_reader(graph, name, "MatMul") for name in (split or inner).outputs]
    concat = _reader(graph, outers[0].outputs[0], "Concat") if outers[0] else None
    found = [node for node in outers if node is not None]
    if len(found) != len(outers) or len(found) > _MOST_PARTS:
        return
    packed = [_only_reader(graph, node, "GatherND") for node in ([concat] if concat else found)]
    sums = [node and _only_reader(graph, node, "Add") for node in packed]
    if concat is not None:
        if concat.inputs != [node.outputs[0] for node in found]:
            return
        old.append(concat)
    old += found
    banks = [inner.inputs[1], PLACES, *(node.inputs[1] for node in found)]
    bases: list[str] = []
    for pack, node in zip(packed, sums, strict=True):
        if pack is None or node is None or pack.inputs[1] != PLACES:
            return
        others = [name for name in node.inputs if name != pack.outputs[0]]
        if len(others) != 1:
            return
        bases += others
        old.append(pack)
    added = [node for node in sums if node is not None]
    x, name = gather.inputs[0], inner.name
    if len(added) == 1:
        new = Node([x, bases[0], *banks], added[0].outputs, name, UPDATE, DOMAIN)
        graph.replace(old, added[0], new)
        _join(graph, new)
        return
    # The parts of a product that is split before they are added to: split it behind instead.
    base = graph.maker(bases[0], "Split")
    if base is None or base.outputs != bases or any(len(graph.readers(b)) != 1 for b in bases):
        return
    whole = f"{base.inputs[0]}.adapted"
    new = Node([x, base.inputs[0], *banks], [whole], name, UPDATE, DOMAIN)
    outputs = [output for node in added for output in node.outputs]
    inputs = [whole, *base.inputs[1:]]
    graph.replace([*old, *added[:-1]], added[-1], replace(base, inputs=inputs, outputs=outputs))
    graph.replace([], base, new)
    _join(graph, new)


def _join(graph: Graph, update: Node) -> None:
    """Make one node of a product and what adapters add to it, which is computed in bytes then: they come as one input
    (see `lifecycle.engines.packed_adapter`)."""
    x, base, first, places, *rest = update.inputs
    product = graph.made_by(base)
    if product is None or product.domain != DOMAIN or product.operator not in _PRODUCTS:
        return
    banks = [first, *rest]
    kinds = [graph.inputs.get(bank, (0, [])) for bank in banks]
    if (
        product.inputs[0] != x
        or not first.endswith(FIRST)
        or graph.readers(base) != [update]
        or any(graph.readers(bank) != [update] for bank in banks)
        or any(kind != _FLOAT or len(dims) != 3 or 0 in dims[1:] for kind, dims in kinds)
        # Columns are taken 16 by 16.
        or any(dims[2] % 16 for _, dims in kinds[1:])
    ):
        return
    (_, (_, depth, inner)), *parts = kinds
    rank, columns = parts[0][1][1], [dims[2] for _, dims in parts]
    if inner != rank * len(parts) or any(dims[1] != rank for _, dims in parts):
        return
    own = _OWN_INPUTS[product.operator]
    given = product.inputs + [""] * (own - len(product.inputs))
    packed = first.removesuffix(FIRST)
    attributes = dict(product.attributes)
    new = replace(
        product, inputs=[*given, packed, places], outputs=update.outputs, attributes=attributes
    )
    new.set_integer("rank", rank)
    for k, count in enumerate(columns):
        new.set_integer(f"part{k}", count)
    graph.replace([product], update, new)
    graph.replace_inputs(banks, packed, _UINT8, [0, packed_bytes(depth, rank, columns)])


def _only_reader(graph: Graph, node: Node, operator: str) -> Node | None:
    return _reader(graph, node.outputs[0], operator)


def _reader(graph: Graph, name: str, operator: str) -> Node | None:
    """The only node that reads a value, if it is such an operator."""
    readers = graph.readers(name)
    return readers[0] if len(readers) == 1 and readers[0].is_a(operator) else None


def _swap_gate(graph: Graph, gated: Node) -> None:
    """Make one node of silu(gate) * up, or a part of the product that is alone in reading it."""
    for act_name, up in (gated.inputs, gated.inputs[::-1]):
        act = graph.maker(act_name, "QuickGelu")
        split = graph.maker(up, "Split")
        if act is None or split is None or act.real("alpha") != 1:
            continue
        gate = act.inputs[0]
        if split.outputs != [gate, up] or split.integer("axis") not in _LAST_AXIS:
            continue
        if any(len(graph.readers(name)) != 1 for name in (gate, up, act_name)):
            continue
        readers = graph.readers(gated.outputs[0])
        if len(readers) == 1 and readers[0].domain == DOMAIN and readers[0].operator in _PRODUCTS:
            product = readers[0]
            inputs = [split.inputs[0], *product.inputs[1:]]
            new = replace(product, inputs=inputs, attributes=dict(product.attributes))
            new.set_integer("gated", 1)
            graph.replace([split, act, gated], product, new)
        else:
            new = Node([split.inputs[0]], gated.outputs, gated.name, GATE, DOMAIN)
            graph.replace([split, act], gated, new)
        return
