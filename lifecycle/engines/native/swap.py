"""Puts this project's operators in the place of ONNX Runtime's in a graph, without the onnx package.

Graphs on disk hold ONNX Runtime's operators only, so that any of its builds runs them. What is replaced is what
decoders of this project consist of: attention with a number of new tokens for each row, products of blocks, and
the nodes of a row-wise product, which become one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from lifecycle.engines.onnx_file import field_of, spans

DOMAIN = "lifecycle"
OPERATORS = ATTENTION, BLOCKS, ROWWISE = "GroupQueryAttention", "MatMulNBits", "RowwiseMatMul"

_FLOAT, _INT8 = 1, 3
"""Types of elements, as protobuf numbers."""
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
_LANES = 16
"""What the width of a head is a multiple of."""


@dataclass(slots=True)
class _Node:
    """A node; attributes are messages as they are in the file."""

    inputs: list[str]
    outputs: list[str]
    name: str
    operator: str
    domain: str = ""
    attributes: dict[str, bytes] = field(default_factory=dict[str, bytes])

    @staticmethod
    def read(message: memoryview) -> _Node:
        node = _Node([], [], "", "")
        for number, value, _ in spans(message):
            if value is None:
                continue
            if number == 5:
                node.attributes[_name(value)] = bytes(value)
                continue
            text = bytes(value).decode()
            if number == 1:
                node.inputs.append(text)
            elif number == 2:
                node.outputs.append(text)
            elif number == 3:
                node.name = text
            elif number == 4:
                node.operator = text
            elif number == 7:
                node.domain = text
        return node

    def write(self) -> bytes:
        texts = [(1, text) for text in self.inputs] + [(2, text) for text in self.outputs]
        texts += [(3, self.name), (4, self.operator), (7, self.domain)]
        parts = [field_of(number, text.encode()) for number, text in texts]
        return b"".join(parts + [field_of(5, value) for value in self.attributes.values()])

    def number(self, attribute: str) -> int:
        """An attribute's integer, 0 where there is none."""
        return _numbers(memoryview(self.attributes.get(attribute, b""))).get(3, 0)

    def text(self, attribute: str) -> str:
        """An attribute's text, empty where there is none."""
        for number, value, _ in spans(memoryview(self.attributes.get(attribute, b""))):
            if number == 4 and value is not None:
                return bytes(value).decode()
        return ""


def swap(data: bytes, operators: Collection[str] = OPERATORS) -> bytes:
    """A model with the given ones of our operators wherever they can do what ONNX Runtime's do.

    Raises:
        ValueError, IndexError: it is no ONNX model.
    """
    parts: list[bytes | memoryview] = []
    model = memoryview(data)
    for number, value, span in spans(model):
        if number == 7 and value is not None:
            parts.append(field_of(7, _graph(value, operators)))
        else:
            parts.append(model[span])
    # An import of operators: their domain, and version 1.
    parts.append(field_of(8, field_of(1, DOMAIN.encode()) + b"\x10\x01"))
    return b"".join(parts)


def _graph(message: memoryview, wanted: Collection[str]) -> bytes:
    nodes: list[_Node] = []
    others: list[memoryview] = []
    outputs: set[str] = set()
    caches: dict[str, tuple[int, int]] = {}
    """Of each input its type and its last dimension."""
    for number, value, span in spans(message):
        if number == 1 and value is not None:
            nodes.append(_Node.read(value))
            continue
        others.append(message[span])
        if number == 11 and value is not None:
            caches[_name(value)] = _tensor(value)
        elif number == 12 and value is not None:
            outputs.add(_name(value))
    if ROWWISE in wanted:
        nodes = _rowwise(nodes, outputs)
    for node in nodes:
        if node.domain != "com.microsoft" or node.operator not in wanted:
            continue
        if node.operator == ATTENTION and _is_known_attention(node, caches):
            cache_type, _ = caches[node.inputs[_PAST_KEY]]
            node.operator += "Int8" if cache_type == _INT8 else ""
        elif node.operator != BLOCKS or not _is_known_product(node):
            continue
        node.domain = DOMAIN
    return b"".join([*(field_of(1, node.write()) for node in nodes), *others])


def _is_known_attention(node: _Node, caches: dict[str, tuple[int, int]]) -> bool:
    given = {i for i, name in enumerate(node.inputs) if name}
    cache_type, width = caches.get(node.inputs[_PAST_KEY], (0, 0))
    is_integer = cache_type == _INT8
    scaled = all(place in given for place in _SCALES) and (
        {node.text("k_quant_type"), node.text("v_quant_type")} == {"PER_CHANNEL"}
    )
    return (
        _COUNTS in given
        and given <= _ATTENTION_INPUTS
        and node.attributes.keys() <= _ATTENTION_ATTRIBUTES
        and (scaled if is_integer else cache_type == _FLOAT and not given & set(_SCALES))
        and width > 0
        and width % _LANES == 0
    )


def _is_known_product(node: _Node) -> bool:
    # Only at this level activations are rounded; the order of columns (input 4) is never given.
    return (
        node.number("accuracy_level") == 4
        and node.number("bits") in (4, 8)
        and node.attributes.keys() <= _PRODUCT_ATTRIBUTES
        and not any(node.inputs[4:5])
    )


def _rowwise(nodes: list[_Node], outputs: set[str]) -> list[_Node]:
    """The nodes with each row-wise product as one (see `lifecycle.graph.int8`)."""
    made_by = {name: node for node in nodes for name in node.outputs}
    uses = Counter(name for node in nodes for name in node.inputs)
    readers: dict[str, list[_Node]] = {}
    for node in nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    gone: set[int] = set()
    instead: dict[int, _Node] = {}

    def chain(product: _Node) -> tuple[list[_Node], str] | None:
        """The nodes that become one, the last of them last, and what they read."""
        try:
            quantize = made_by[product.inputs[0]]
            divide = made_by[quantize.inputs[0]]
            most = made_by[divide.inputs[1]]
            magnitude = made_by[most.inputs[0]]
            (scaled,) = readers[product.outputs[0]]
        except (KeyError, ValueError, IndexError):
            return None
        found = [magnitude, most, divide, quantize, product, scaled]
        kinds = ["Abs", "ReduceMax", "Div", "QuantizeLinear", "MatMulIntegerToFloat", "Mul"]
        x, largest = magnitude.inputs[0], most.outputs[0]
        # Read by others, a value has to stay.
        inner = {node.outputs[0]: 2 if node is most else 1 for node in found[:-1]}
        same = (
            [node.operator for node in found] == kinds
            and divide.inputs[0] == x
            and set(scaled.inputs) == {product.outputs[0], largest}
            and all(uses[name] == count and name not in outputs for name, count in inner.items())
        )
        return (found, x) if same else None

    for product in nodes:
        if product.operator != "MatMulIntegerToFloat" or (found := chain(product)) is None:
            continue
        members, x = found
        weight, scale = product.inputs[1], product.inputs[3]
        transposed = made_by.get(weight)
        is_transposed = transposed is not None and transposed.operator == "Transpose"
        if is_transposed and transposed is not None:
            weight = transposed.inputs[0]
            if uses[transposed.outputs[0]] == 1:
                gone.add(id(transposed))
        elif transposed is not None:
            continue
        gone.update(map(id, members[:-1]))
        # name, i (3) and its type (20): the integer.
        flag = field_of(1, b"transposed") + bytes([0x18, int(is_transposed), 0xA0, 0x01, 2])
        instead[id(members[-1])] = _Node(
            [x, weight, scale],
            list(members[-1].outputs),
            product.name,
            ROWWISE,
            DOMAIN,
            {"transposed": flag},
        )
    return [instead.get(id(node), node) for node in nodes if id(node) not in gone]


def _name(message: memoryview) -> str:
    """Field 1 of a message: what attributes, inputs and outputs are called."""
    for number, value, _ in spans(message):
        if number == 1 and value is not None:
            return bytes(value).decode()
    return ""


def _tensor(value: memoryview) -> tuple[int, int]:
    """Of an input the type of its elements and its last dimension, 0 where that has no number."""
    kind, last = 0, 0
    for tensor in _below(value, 2, 1):
        kind = _numbers(tensor).get(1, 0)
        for shape in _below(tensor, 2):
            for dimension in _below(shape, 1):
                last = _numbers(dimension).get(1, 0)
    return kind, last


def _below(message: memoryview, *path: int) -> list[memoryview]:
    """The messages that field numbers lead to."""
    found = [message]
    for wanted in path:
        found = [
            value
            for each in found
            for number, value, _ in spans(each)
            if number == wanted and value is not None
        ]
    return found


def _numbers(message: memoryview) -> dict[int, int]:
    """The fields of a message that are plain numbers."""
    found: dict[int, int] = {}
    for number, value, span in spans(message):
        if value is None and message[span.start] & 7 == 0:
            found[number] = _last_number(bytes(message[span]))
    return found


def _last_number(encoded: bytes) -> int:
    """The value behind a tag, both written seven bits at a time."""
    value = shift = 0
    begin = next(i for i, byte in enumerate(encoded) if byte < 0x80) + 1
    for byte in encoded[begin:]:
        value |= (byte & 0x7F) << shift
        shift += 7
    return value
