"""What an ONNX graph is made of: inputs, operators, weights and the precision they are stored in."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as passes

from lifecycle.engines.decoder import GRAPH
from lifecycle.errors import StageError
from lifecycle.graph.constants import WITH_SCALES, Stored, all_stored, elements, stored
from lifecycle.graph.reading import read_model, require_few_nodes
from lifecycle.graph.work import (
    ATTENTION,
    CONVOLUTIONS,
    PRODUCTS,
    RECURRENT,
    TRANSPOSED,
    attention_width,
    total_work,
)

_LOOKS_UP = {
    "EmbedLayerNormalization": (2, 3, 4),
    "Gather": (0,),
    "GatherBlockQuantized": (0,),
    "QEmbedLayerNormalization": (2, 3, 4),
}
_FOUR_BITS = ("GatherBlockQuantized", "MatMulNBits", "QMoE")
"""If they do not say otherwise."""
_MIXTURES = {"MoE": (2, 4), "QMoE": (2, 5)}
_WEIGHTS_AT = {
    **_LOOKS_UP,
    **_MIXTURES,
    **dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED, "MatMulNBits", "Attention", "QAttention"), (1,)),
    **dict.fromkeys((*PRODUCTS, "Einsum"), (0, 1)),
    **dict.fromkeys(RECURRENT, (1, 2)),
    "QGemm": (0, 3),
    "QLinearConv": (3,),
    "QLinearMatMul": (0, 3),
}
"""Operators that read matrices -> the inputs where those stand."""


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
    does not visit does not count. For a convolution per place of its output, for a transposed one of its
    input; for an LSTM, GRU or RNN per step of a sequence, in both directions if it has them."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """All that `lifecycle inspect` shows."""

    file: str
    opsets: dict[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    operators: dict[str, int]
    """How many nodes of each there are, the most frequent first; subgraphs are included, calls of
    functions are what these are made of."""
    parameters: int
    """Weights that matrices hold; what two of them share counts once."""
    bytes: int
    """Of all constants, those of subgraphs and functions too; what two of them share counts once."""
    others: int
    """Values in constants that are no matrix's weights: norms, biases, scales, tables, shapes."""
    multiply_adds: int
    """Of all matrices, per row; of each branch of an `If`, and of one turn of a loop."""
    attention: int | None
    """Multiply-adds of all attention per row and position that it reads; None if shapes do not tell."""
    total: dict[str, int] | None
    """Multiply-adds of one run: names of free dimensions, joined by `·`, -> their factor; `""`: whatever these
    are. None if a shape is unknown, or where it depends on conditions or loops."""
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
    require_few_nodes(file, model)
    passes.InlinePass()(model)
    graph = model.graph
    ports = [tuple(map(_port, side)) for side in (graph.inputs, graph.outputs)]
    _infer_shapes(model)
    nodes = list(graph.all_nodes())
    read = [(node, _matrix(node)) for node in nodes]
    matrices = tuple(matrix for _, matrix in read if matrix is not None)
    constants = all_stored(graph)
    shared = {
        key: count for node, matrix in read if matrix for key, count in _parameters(node).items()
    }
    widths = [attention_width(node) for node in nodes if node.op_type in ATTENTION]
    return Inspection(
        file=str(file),
        opsets=dict(model.opset_imports),
        inputs=ports[0],
        outputs=ports[1],
        operators=dict(Counter(map(_operator, nodes)).most_common()),
        parameters=sum(shared.values()),
        bytes=sum(tensor.nbytes for tensor in constants.values()),
        others=elements(tensor for key, tensor in constants.items() if key not in shared),
        multiply_adds=sum(matrix.multiply_adds for matrix in matrices),
        attention=None if None in widths else sum(filter(None, widths)),
        total=total_work((node, matrix.multiply_adds if matrix else 0) for node, matrix in read),
        matrices=matrices,
    )


def _infer_shapes(model: ir.Model) -> None:
    """As far as they can be: a graph whose shapes contradict each other is shown as well."""
    logging.getLogger(passes.ShapeInferencePass.__module__).setLevel(logging.ERROR)
    passes.ShapeInferencePass(check_type=False, strict_mode=False)(model)


def _matrix(node: ir.Node) -> Matrix | None:
    counts = _parameters(node)
    if not counts:
        return None
    first = next(tensor for value in _weights(node) for tensor in stored(value).values())
    bits, precision = _bits(node), _type_name(first.dtype)
    if bits is not None:
        size = _number(node, "block_size")
        precision = f"int{bits}" + (f", blocks of {size}" if size else "")
    read: Stored = {}
    for value in node.inputs:
        read |= stored(value, WITH_SCALES)
    return Matrix(
        name=node.name or node.outputs[0].name or "",
        operator=_operator(node),
        shape=tuple(first.shape.numpy()),
        precision=precision,
        parameters=sum(counts.values()),
        bytes=sum(tensor.nbytes for tensor in read.values()),
        multiply_adds=_multiply_adds(node, sum(counts.values())),
    )


def _bits(node: ir.Node) -> int | None:
    """Of each weight, where a node packs them."""
    bits = _number(node, "bits") or _number(node, "expert_weight_bits")
    return 4 if bits is None and node.op_type in _FOUR_BITS else bits


def _parameters(node: ir.Node) -> dict[object, int]:
    """The stored constants that a node reads as weights -> how many these are."""
    if node.op_type == "MatMulNBits":
        # Without the padding of its last blocks.
        count = (_number(node, "K") or 0) * (_number(node, "N") or 0)
        return dict.fromkeys(stored(node.inputs[1]), count)
    found = {key: tensor for value in _weights(node) for key, tensor in stored(value).items()}
    return {key: elements([tensor]) * 8 // (_bits(node) or 8) for key, tensor in found.items()}


def _weights(node: ir.Node) -> list[ir.Value]:
    """The inputs of a node that are constant matrices; a row in a look-up is no matrix."""
    values = [node.inputs[at] for at in _WEIGHTS_AT.get(node.op_type, ()) if at < len(node.inputs)]
    least = 2 if node.op_type in _LOOKS_UP else 1
    return [
        value
        for value in values
        if value is not None
        and any(len(tensor.shape) >= least for tensor in stored(value).values())
    ]


def _multiply_adds(node: ir.Node, parameters: int) -> int:
    if node.op_type in _LOOKS_UP:
        return 0
    weights = _weights(node)
    if node.op_type in _MIXTURES:
        experts = next(iter(stored(weights[0]).values())).shape.numpy()[0]
        return parameters * (_number(node, "k") or 1) // experts
    shapes = [value.shape for value in weights]
    if _bits(node) is None and all(shape is not None and shape.is_static() for shape in shapes):
        # Parts of a constant may be all that it reads.
        return sum(prod(shape.numpy()) for shape in shapes if shape is not None)
    return parameters


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
