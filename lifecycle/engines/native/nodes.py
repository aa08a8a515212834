"""The nodes of an ONNX graph, read and written without the onnx package."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lifecycle.engines.onnx_file import field_of, number_of, spans

_GRAPH, _OPSET = 7, 8
"""Fields of a model."""
_NODE, _INITIALIZER, _INPUT, _OUTPUT = 1, 5, 11, 12
"""Fields of a graph."""
_TENSOR_NAME = 8
_GRAPHS = (6, 11)
"""Fields of an attribute that are graphs."""
_FOUR_BYTES = 5
"""How a float is written."""
_INTEGER = 2
"""The type of an attribute that is one."""


@dataclass(slots=True, eq=False)
class Node:
    """A node; attributes are messages as they are in the file."""

    inputs: list[str]
    outputs: list[str]
    name: str
    operator: str
    domain: str = ""
    attributes: dict[str, bytes] = field(default_factory=dict[str, bytes])
    rest: bytes = b""
    """Fields that mean nothing here."""

    @staticmethod
    def read(message: memoryview) -> Node:
        """A node of a graph."""
        node = Node([], [], "", "")
        for number, value, span in spans(message):
            if value is None or number not in (1, 2, 3, 4, 5, 7):
                node.rest += bytes(message[span])
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
            else:
                node.domain = text
        return node

    def write(self) -> bytes:
        """The message that a graph holds."""
        texts = [(1, text) for text in self.inputs] + [(2, text) for text in self.outputs]
        texts += [(3, self.name), (4, self.operator), (7, self.domain)]
        parts = [field_of(number, text.encode()) for number, text in texts]
        attributes = [field_of(5, value) for value in self.attributes.values()]
        return b"".join([*parts, *attributes, self.rest])

    def is_a(self, operator: str) -> bool:
        """Whether it is one of ONNX's or ONNX Runtime's operators."""
        return self.operator == operator and self.domain in ("", "ai.onnx", "com.microsoft")

    def integer(self, attribute: str) -> int:
        """An attribute's integer, 0 where there is none."""
        return dict(_numbers(memoryview(self.attributes.get(attribute, b"")))).get(3, 0)

    def real(self, attribute: str) -> float:
        """An attribute's float, 0 where there is none."""
        message = memoryview(self.attributes.get(attribute, b""))
        for number, _, span in spans(message):
            if number != 2:
                continue
            if message[span][0] & 7 != _FOUR_BYTES:
                raise ValueError(f"the attribute '{attribute}' of '{self.name}' is no float")
            return struct.unpack("<f", message[span][-4:])[0]
        return 0.0

    @property
    def has_graphs(self) -> bool:
        """Whether it holds graphs of its own, which may read what is around it."""
        values = [memoryview(value) for value in self.attributes.values()]
        return any(_below(value, field) for value in values for field in _GRAPHS)

    def text(self, attribute: str) -> str:
        """An attribute's text, empty where there is none."""
        for number, value, _ in spans(memoryview(self.attributes.get(attribute, b""))):
            if number == 4 and value is not None:
                return bytes(value).decode()
        return ""

    def set_integer(self, attribute: str, value: int) -> None:
        """Give it an attribute that is a number, 0 or more."""
        name = field_of(1, attribute.encode())
        self.attributes[attribute] = name + number_of(3, value) + number_of(20, _INTEGER)


class Graph:
    """The nodes of a model's graph, to be changed and written back."""

    def __init__(self, model: bytes) -> None:
        """Raises ValueError or IndexError where it is no ONNX model."""
        self._around: list[bytes] = []
        self._rest: list[memoryview] = []
        self.nodes: list[Node] = []
        """As they were read."""
        self.outputs: set[str] = set()
        self.inputs: dict[str, tuple[int, list[int]]] = {}
        """Of each input the type of its elements and its dimensions, 0 where one has no number."""
        self.initializers: dict[str, list[int]] = {}
        """The dimensions of each."""
        self._input_places: dict[str, int] = {}
        """Where in the rest each is described."""
        whole = memoryview(model)
        for number, value, span in spans(whole):
            if number == _GRAPH and value is not None:
                self._read(value)
            else:
                self._around.append(bytes(whole[span]))
        self._instead: dict[Node, Node] = {}
        self._gone: set[Node] = set()
        self._made_by: dict[str, Node] = {}
        self._readers: dict[str, list[Node]] = {}
        for node in self.nodes:
            self._note(node)

    def _read(self, message: memoryview) -> None:
        for number, value, span in spans(message):
            if number == _NODE and value is not None:
                self.nodes.append(Node.read(value))
                continue
            self._rest.append(message[span])
            if number == _INPUT and value is not None:
                self.inputs[_name(value)] = _tensor(value)
                self._input_places[_name(value)] = len(self._rest) - 1
            elif number == _INITIALIZER and value is not None:
                name = next((bytes(text).decode() for text in _below(value, _TENSOR_NAME)), "")
                self.initializers[name] = [n for field, n in _numbers(value) if field == 1]
            elif number == _OUTPUT and value is not None:
                self.outputs.add(_name(value))

    def _note(self, node: Node) -> None:
        # What is not asked for, or not given, has no name.
        for name in filter(None, node.outputs):
            self._made_by[name] = node
        for name in filter(None, node.inputs):
            self._readers.setdefault(name, []).append(node)

    def replace_inputs(self, old: Iterable[str], new: str, kind: int, dims: Sequence[int]) -> None:
        """Let the graph have an input instead of others, of a type and dimensions, 0 for any."""
        for name in old:
            self._rest[self._input_places.pop(name)] = memoryview(b"")
            del self.inputs[name]
        self._rest.append(memoryview(field_of(_INPUT, _described(new, kind, dims))))
        self._input_places[new] = len(self._rest) - 1
        self.inputs[new] = (kind, list(dims))

    def add_output(self, name: str, kind: int, dims: Sequence[int]) -> None:
        """Let the world outside read a value, of a type and dimensions, 0 for any."""
        self._rest.append(memoryview(field_of(_OUTPUT, _described(name, kind, dims))))
        self.outputs.add(name)

    def maker(self, name: str, operator: str) -> Node | None:
        """The node that makes a value, if it is such an operator."""
        node = self._made_by.get(name)
        return node if node is not None and node.is_a(operator) else None

    def made_by(self, name: str) -> Node | None:
        """The node that makes a value."""
        return self._made_by.get(name)

    def is_computed(self, name: str) -> bool:
        """Whether a value comes with a run, from a node or as an input."""
        return name in self._made_by or name in self.inputs

    def readers(self, name: str) -> list[Node]:
        """The nodes that read a value; none where the world outside reads it too."""
        return [] if name in self.outputs else self._readers.get(name, [])

    def replace(self, old: Iterable[Node], last: Node, new: Node) -> None:
        """Put a node in the place of `last` and of others, on which nothing else depends."""
        self._gone.update(old)
        self._instead[last] = new
        for node in (*old, last):
            for name in filter(None, node.inputs):
                readers = self._readers[name]
                readers[:] = [reader for reader in readers if reader is not node]
            for name in filter(None, node.outputs):
                del self._made_by[name]
        self._note(new)

    def _now(self, node: Node) -> Node:
        while node in self._instead:
            node = self._instead[node]
        return node

    def write(self, domain: str) -> bytes:
        """The model, which imports operators of a domain besides those it had."""
        nodes = [self._now(node) for node in self.nodes]
        written = [field_of(_NODE, node.write()) for node in nodes if node not in self._gone]
        graph = b"".join([*written, *self._rest])
        version = bytes([2 << 3, 1])
        imported = field_of(_OPSET, field_of(1, domain.encode()) + version)
        return b"".join([*self._around, field_of(_GRAPH, graph), imported])


def _name(message: memoryview) -> str:
    """Field 1 of a message: what attributes, inputs and outputs are called."""
    return next((bytes(value).decode() for value in _below(message, 1)), "")


def _described(name: str, kind: int, dims: Sequence[int]) -> bytes:
    """What a graph says of an input or an output."""
    sizes = b"".join(field_of(1, number_of(1, size) if size else b"") for size in dims)
    tensor = number_of(1, kind) + field_of(2, sizes)
    return field_of(1, name.encode()) + field_of(2, field_of(1, tensor))


def _tensor(value: memoryview) -> tuple[int, list[int]]:
    kind, dims = 0, list[int]()
    for tensor in _below(value, 2, 1):
        kind = dict(_numbers(tensor)).get(1, 0)
        dims = [dict(_numbers(dimension)).get(1, 0) for dimension in _below(tensor, 2, 1)]
    return kind, dims


def _below(message: memoryview, *path: int) -> list[memoryview]:
    """What field numbers lead to."""
    found = [message]
    for wanted in path:
        found = [
            value
            for each in found
            for number, value, _ in spans(each)
            if number == wanted and value is not None
        ]
    return found


def _numbers(message: memoryview) -> Iterator[tuple[int, int]]:
    """The fields of a message that are plain numbers, each written seven bits at a time behind its tag."""
    for number, value, span in spans(message):
        if value is not None or message[span][0] & 7:
            continue
        encoded = bytes(message[span])
        begin = next(i for i, byte in enumerate(encoded) if byte < 0x80) + 1
        yield number, sum((byte & 0x7F) << 7 * i for i, byte in enumerate(encoded[begin:]))
