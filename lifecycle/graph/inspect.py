"""What an ONNX graph is made of: inputs, operators, weights and the precision they are stored in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx_ir as ir

from lifecycle.engines.decoder import GRAPH
from lifecycle.errors import StageError
from lifecycle.graph.reading import read_model

_WEIGHTS_AT = {
    "Conv": 1,
    "ConvTranspose": 1,
    "Gather": 0,
    "GatherBlockQuantized": 0,
    "Gemm": 1,
    "MatMul": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "MatMulNBits": 1,
    "QLinearConv": 3,
    "QLinearMatMul": 3,
    "DynamicQuantizeMatMul": 1,
}
"""Operators that read a matrix -> the input where it stands."""
_MIXTURES = {"MoE": (2, 4), "QMoE": (2, 5)}
_LOOKS_UP = ("Gather", "GatherBlockQuantized")
_PASSES_ON = ("Transpose", "DequantizeLinear", "Cast", "Identity", "Reshape")
"""Operators whose constant input stands for their output."""


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a graph."""

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None
    """Free dimensions by their names; None if nothing is known."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A node that reads constant weights."""

    name: str
    operator: str
    shape: tuple[int, ...]
    """Of the weights, as they are stored for the operator."""
    precision: str
    """Such as `float32`, `int8` or `int4, blocks of 64`."""
    parameters: int
    bytes: int
    """With scales, zero points and biases."""
    multiply_adds: int
    """Per row of its input: a token, where rows are tokens. 0 for a look-up; an expert that a row
    does not visit does not count. For a convolution per place of its output."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """All that `lifecycle inspect` shows."""

    file: str
    opsets: dict[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    operators: dict[str, int]
    """How many nodes of each there are, the most frequent first; subgraphs included."""
    parameters: int
    """Weights that matrices hold; what two of them share counts once."""
    bytes: int
    """Of all constants; what two of them share counts once."""
    multiply_adds: int
    """Of all matrices, per row."""
    matrices: tuple[Matrix, ...]


def inspect_graph(path: Path) -> Inspection:
    """Read a graph, or the one in a folder; its weights are not read.

    Raises:
        EngineError: its weights are missing or lie outside its folder.
        StageError: it is no ONNX graph.
    """
    file = path / GRAPH if path.is_dir() else path
    if not file.is_file():
        raise StageError(f"{file} does not exist; give an .onnx file or a folder with {GRAPH}")
    model = read_model(file)
    graph = model.graph
    nodes = list(graph.all_nodes())
    matrices = tuple(filter(None, map(_matrix, nodes)))
    counts = Counter(_operator(node) for node in nodes)
    shared: dict[object, int] = {}
    for node, matrix in zip(filter(_matrix, nodes), matrices, strict=True):
        shared[_storage(_weights(node)[0])] = matrix.parameters
    constants = {_storage(value): _size(value) for value in graph.initializers.values()}
    return Inspection(
        file=str(file),
        opsets=dict(model.opset_imports),
        inputs=tuple(_port(value) for value in graph.inputs),
        outputs=tuple(_port(value) for value in graph.outputs),
        operators=dict(counts.most_common()),
        parameters=sum(shared.values()),
        bytes=sum(constants.values()),
        multiply_adds=sum(matrix.multiply_adds for matrix in matrices),
        matrices=matrices,
    )


def _matrix(node: ir.Node) -> Matrix | None:
    weights = _weights(node)
    if not weights:
        return None
    bits, size = _number(node, "bits") or _number(node, "expert_weight_bits"), None
    if bits is None and node.op_type in ("GatherBlockQuantized", "QMoE"):
        bits = 4
    stored = sum(prod(_shape(value)) for value in weights)
    if bits is not None:
        size = _number(node, "block_size")
        precision = f"int{bits}" + (f", blocks of {size}" if size else "")
        parameters = stored * 8 // bits
        if node.op_type == "MatMulNBits":
            # Without the padding of its last blocks.
            parameters = (_number(node, "K") or 0) * (_number(node, "N") or 0)
    else:
        precision, parameters = _type_name(weights[0].dtype), stored
    return Matrix(
        name=node.name or node.outputs[0].name or "",
        operator=_operator(node),
        shape=_shape(weights[0]),
        precision=precision,
        parameters=parameters,
        bytes=sum(map(_size, _constants(node))),
        multiply_adds=_multiply_adds(node, weights, parameters),
    )


def _multiply_adds(node: ir.Node, weights: list[ir.Value], parameters: int) -> int:
    if node.op_type in _LOOKS_UP:
        return 0
    if node.op_type in _MIXTURES:
        return parameters * (_number(node, "k") or 1) // _shape(weights[0])[0]
    return parameters


def _weights(node: ir.Node) -> list[ir.Value]:
    """The constant matrices that a node reads; none if it reads no matrix."""
    places = _MIXTURES.get(node.op_type) or (
        (_WEIGHTS_AT[node.op_type],) if node.op_type in _WEIGHTS_AT else ()
    )
    found = [_constant(node.inputs[at]) for at in places if at < len(node.inputs)]
    return [value for value in found if value is not None and len(_shape(value)) > 1]


def _constant(value: ir.Value | None) -> ir.Value | None:
    """The stored constant that a value is, or is made of by an operator that only changes its
    form."""
    while value is not None and value.const_value is None:
        producer = value.producer()
        if producer is None or producer.op_type not in _PASSES_ON:
            return None
        value = producer.inputs[0]
    return value


def _constants(node: ir.Node) -> Iterator[ir.Value]:
    for value in node.inputs:
        if (found := _constant(value)) is not None:
            yield found


def _storage(value: ir.Value) -> object:
    """What is equal for two constants of the same bytes."""
    tensor = value.const_value
    if isinstance(tensor, ir.ExternalTensor):
        return tensor.location, tensor.offset
    return value.name


def _size(value: ir.Value) -> int:
    assert value.const_value is not None
    return value.const_value.nbytes


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(value.const_value.shape.numpy())


def _number(node: ir.Node, name: str) -> int | None:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else None


def _operator(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _port(value: ir.Value) -> Port:
    shape = None
    if value.shape is not None:
        shape = tuple(
            dim if isinstance(dim, int) else (dim.value or "?") for dim in value.shape.dims
        )
    return Port(value.name or "", _type_name(value.dtype), shape)


def _type_name(dtype: ir.DataType | None) -> str:
    if dtype is None:
        return "unknown"
    return "float32" if dtype == ir.DataType.FLOAT else dtype.name.lower()
