"""An exported graph opened for change: its products with constants, replaced one by one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lifecycle.engines.decoder import HIDDEN_GRAPH, DecoderInfo
from lifecycle.engines.limits import usable_cores
from lifecycle.graph.adapters import graph_file
from lifecycle.graph.factors import Factors
from lifecycle.graph.hidden import read_hidden
from lifecycle.graph.nodes import MICROSOFT, GraphNodes
from lifecycle.graph.rounding import Grid
from lifecycle.graph.scales import Scales
from lifecycle.graph.weights import WeightFile, move_weights

T = TypeVar("T")

BLOCK = 1 << 18
"""Elements that are quantised together at most, but for the rest of a row: 1 MB of float32, which stays in a core's cache."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A node y = x · Wᵀ + b, `Gemm` or `MatMul`, whose weights are constant."""

    node: ir.Node
    name: str
    weight: ir.Value
    """As [out, in]. Where the graph has them the other way round, a value outside the graph whose
    tensor is transposed when it is read."""
    bias: ir.Value | None
    shape: tuple[int, int]
    """[out, in] of the weights."""

    @property
    def has_vector_bias(self) -> bool:
        """Whether the bias is one constant for each output, [out], and nothing else that `Gemm`
        would spread over its result."""
        bias = self.bias
        if bias is None or bias.shape is None or not is_constant(bias):
            return False
        return tuple(bias.shape.numpy()) == self.shape[:1]

    @property
    def x(self) -> ir.Value:
        """What it reads now: another value than at first where its producer was replaced."""
        found = self.node.inputs[0]
        assert found is not None
        return found


@dataclass(frozen=True, slots=True)
class Mixture:
    """A node `MoE`: both its weights are constants [experts, out, in]."""

    node: ir.Node
    name: str
    gate_up: ir.Value
    """Rows of gates and ups take turns."""
    down: ir.Value

    @property
    def num_experts(self) -> int:
        """How many there are, whoever visits them."""
        assert self.down.shape is not None
        return self.down.shape.numpy()[0]


@dataclass(frozen=True, slots=True)
class Convolution:
    """A node `Conv` whose weights [out, in, …] and bias are constant."""

    node: ir.Node
    name: str
    weight: ir.Value
    bias: ir.Value | None


class GraphRewrite:
    """The graph in `folder`, and the file that takes the weights of the new one; without such a
    file it can only be looked at."""

    def __init__(self, folder: Path, weights: WeightFile | None = None) -> None:
        model = ir.load(folder / graph_file(folder))
        self.graph, self.ir_version = model.graph, model.ir_version
        self.graph.opset_imports.setdefault(MICROSOFT, 1)
        if (folder / HIDDEN_GRAPH).is_file():
            read_hidden(GraphNodes(self.graph), DecoderInfo.load(folder).hidden_size)
        self._weights = weights
        self.folder = folder
        self.quantized_elements = 0
        """Weights that are stored as integers so far."""
        self.quantized_bytes = 0
        """Bytes that stand for them, scales included."""
        self._factors: dict[str, Factors] = {}
        self._pool = ThreadPoolExecutor(usable_cores())

    @property
    def weights(self) -> WeightFile:
        """Where new tensors go."""
        assert self._weights is not None, "opened to be looked at"
        return self._weights

    def linears(self) -> list[Linear]:
        """All products with constant weights, in the order of the graph."""
        constants = self._matrices()
        found: list[Linear] = []
        for node in self.graph:
            weight = _product_weight(node, constants)
            if weight is not None:
                bias = node.inputs[2] if len(node.inputs) > 2 else None
                assert node.name is not None
                found.append(Linear(node, node.name, weight, bias, matrix_shape(weight)))
        return found

    def mixtures(self) -> list[Mixture]:
        """All mixtures of experts, in the order of the graph."""
        found: list[Mixture] = []
        for node in self.graph:
            if node.op_type == "MoE":
                gate_up, down = node.inputs[2], node.inputs[4]
                assert gate_up is not None and down is not None and node.name is not None
                found.append(Mixture(node, node.name, gate_up, down))
        return found

    def convolutions(self) -> list[Convolution]:
        """All convolutions with constant weights, in the order of the graph."""
        found: list[Convolution] = []
        for node in self.graph:
            if node.op_type == "Conv" and not node.domain:
                _, weight, *rest = node.inputs
                bias = rest[0] if rest else None
                assert weight is not None and node.name is not None
                if all(v is None or is_constant(v) for v in (weight, bias)):
                    found.append(Convolution(node, node.name, weight, bias))
        return found

    def lookups(self) -> list[ir.Node]:
        """All nodes Gather that take rows of a constant table of floats."""
        constants = self._matrices()
        return [
            node
            for node in self.graph
            if node.op_type == "Gather"
            and node.inputs[0] in constants
            and node.attributes.get_int("axis", 0) == 0
        ]

    def before(self, node: ir.Node) -> GraphNodes:
        """New nodes go before `node`."""
        return GraphNodes(self.graph, before=node)

    def after(self, value: ir.Value) -> GraphNodes:
        """New nodes go right behind the one that makes `value`; of an input, to the beginning."""
        maker = value.producer()
        if maker is not None:
            return GraphNodes(self.graph, after=maker)
        return GraphNodes(self.graph, before=self.graph[0])

    def replace(self, node: ir.Node, value: ir.Value) -> None:
        """Let `value` stand where the output of `node` stood."""
        old = node.outputs[0]
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        value.name, value.type, value.shape = old.name, old.type, old.shape

    def blocks(self, weight: ir.Value) -> Iterator[NDArray[np.float32]]:
        """The rows of a weight matrix, or of several in one tensor, in order, some at a time:
        [rows, in]; with the factors of `scale`."""
        return (read() for read in self._reads(weight))

    def _reads(self, weight: ir.Value) -> Iterator[Callable[[], NDArray[np.float32]]]:
        """What reads each of `blocks`."""
        tensor = weight.const_value
        assert tensor is not None
        *leading, width = tensor.shape.numpy()
        rows = prod(leading)
        cores = usable_cores()
        # As many for each core, or the last one would work alone; but none so small that threads wait for the interpreter.
        count = cores * -(-rows * width // (cores * BLOCK))
        count = min(count, -(-2 * rows * width // BLOCK))
        step = max(-(-rows // max(count, 1)), 1)
        whole = None if isinstance(tensor, ir.ExternalTensor) else tensor.numpy()

        def read(row: int, stop: int) -> NDArray[np.float32]:
            if whole is None:
                assert isinstance(tensor, ir.ExternalTensor)
                block = _floats(tensor, row * width, stop * width).reshape(-1, width)
            else:
                block = whole.reshape(-1, width)[row:stop]
            return self._scaled(weight, block, row)

        return (partial(read, row, min(row + step, rows)) for row in range(0, rows, step))

    def expert(self, weight: ir.Value, expert: int) -> NDArray[np.float32]:
        """The weights of one expert of a mixture, [out, in]; with the factors of `scale`."""
        tensor = weight.const_value
        assert tensor is not None
        _, rows, width = tensor.shape.numpy()
        if isinstance(tensor, ir.ExternalTensor):
            start = expert * rows * width
            found = _floats(tensor, start, start + rows * width).reshape(rows, width)
        else:
            found = tensor.numpy()[expert]
        return self._scaled(weight, found, expert * rows)

    def _scaled(
        self, constant: ir.Value, block: NDArray[np.float32], row: int
    ) -> NDArray[np.float32]:
        """Rows of a constant from `row` on, with the factors that it was given."""
        factors = self._factors.get(str(constant.name))
        return block if factors is None else factors.applied(block, row)

    def map_blocks(
        self, weight: ir.Value, change: Callable[[NDArray[np.float32]], T]
    ) -> Iterator[T]:
        """`change` of each of `blocks`, in order."""
        return self.at_once(lambda read=read: change(read()) for read in self._reads(weight))

    def at_once(self, tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
        """What tasks give, in order; a few are worked on at once, which numpy's larger operations allow."""
        pending: deque[Future[T]] = deque()
        try:
            for task in tasks:
                pending.append(self._pool.submit(task))
                if len(pending) > 2 * usable_cores():
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for each in pending:
                each.cancel()

    def fitted(self, grid: Grid, weight: ir.Value) -> Grid:
        """A grid whose scales fit these weights, which are read once for it."""
        return grid.fitting(self.map_blocks(weight, grid.largest))

    def scale(
        self,
        constant: ir.Value,
        *,
        rows: NDArray[np.float32] | None = None,
        columns: NDArray[np.float32] | None = None,
    ) -> None:
        """Let a constant be multiplied by factors, as `Factors` takes them, when it is read."""
        assert constant.name is not None and constant.shape is not None
        shape = constant.shape.numpy()
        self._factors.setdefault(constant.name, Factors(shape)).multiply(rows, columns)

    def add(self, name: str, values: NDArray[Any], elements: int = 0) -> ir.Value:
        """Store a quantised tensor, or its scales, that stands for `elements` weights."""
        self.quantized_elements += elements
        self.quantized_bytes += values.nbytes
        value = self.weights.add_array(name, values)
        self.graph.initializers[name] = value
        return value

    def add_scales(self, name: str, scales: Scales) -> ir.Value:
        """Store scales, and give them in float32 by nodes that ONNX Runtime computes once, when it loads
        the graph, before it packs the weights."""
        stored = self.add(name, scales.values)
        if scales.values.dtype == np.float32:
            return stored
        g = self.before(self.graph[0])
        floats = g.node("Cast", f"{name}.float", stored, to=ir.DataType.FLOAT)
        if scales.unit is None:
            return floats
        unit = self.add(f"{name}.unit", np.array(scales.unit))
        squares = g.node("Mul", f"{name}.squared", floats, g.node("Abs", f"{name}.size", floats))
        return g.node("Mul", f"{name}.scaled", squares, unit)

    def stream(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], blocks: Iterable[NDArray[Any]]
    ) -> ir.Value:
        """Store a tensor of `shape` with as many weights, of which blocks come in order."""
        self.quantized_elements += prod(shape)
        self.quantized_bytes += prod(shape) * dtype.bitwidth // 8
        value = self.weights.add(name, dtype, shape, blocks)
        self.graph.initializers[name] = value
        return value

    def view(self, value: ir.Value, name: str, shape: tuple[int, ...]) -> ir.Value:
        """The same stored bytes under another shape."""
        tensor = value.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        seen = ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=tensor.base_dir,
        )
        self.graph.initializers[name] = ir.Value(
            name=name, shape=seen.shape, type=ir.TensorType(tensor.dtype), const_value=seen
        )
        return self.graph.initializers[name]

    def finish(self) -> ir.Graph:
        """Copy what is still used of the old weights, and drop what is not."""
        for node in reversed(self.graph):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                self.graph.remove(node, safe=True)
        for name in self._factors:
            value = self.graph.initializers.get(name)
            if value is not None and value.uses():
                tensor = value.const_value
                assert tensor is not None
                shape = tuple(tensor.shape.numpy())
                copied = self.weights.add(name, ir.DataType.FLOAT, shape, self.blocks(value))
                value.const_value = copied.const_value
        move_weights(self.graph, self.weights)
        self._pool.shutdown()
        return self.graph

    def _matrices(self) -> set[ir.Value | None]:
        return {
            value
            for value in self.graph.initializers.values()
            if value.dtype == ir.DataType.FLOAT
            and value.shape is not None
            and len(value.shape) == 2
            and all(value.shape.numpy())
        }


def _floats(tensor: ir.ExternalTensor, start: int, stop: int) -> NDArray[np.float32]:
    """The values of a float32 tensor from `start` to `stop`."""
    # Read, not mapped: mapped pages would count as memory of the process until the end.
    return np.fromfile(tensor.path, "<f4", stop - start, offset=(tensor.offset or 0) + 4 * start)


def is_constant(value: ir.Value) -> bool:
    """Whether a value is stored float32."""
    return value.is_initializer() and value.dtype == ir.DataType.FLOAT


def _product_weight(node: ir.Node, constants: set[ir.Value | None]) -> ir.Value | None:
    """The weights of a product as [out, in]; None if it is none, or they are not constant."""
    if node.domain or node.op_type not in ("Gemm", "MatMul"):
        return None
    get = node.attributes
    factors = (get.get_float("alpha", 1.0), get.get_float("beta", 1.0))
    if get.get_int("transA", 0) or factors != (1, 1):
        return None
    x, weight = node.inputs[:2]
    if x is None or (x.shape is not None and len(x.shape) < 2):
        return None
    transposed = bool(get.get_int("transB", 0))
    maker = weight.producer() if weight is not None else None
    if maker is not None and maker.op_type == "Transpose" and _swaps(maker):
        weight, transposed = maker.inputs[0], not transposed
    if weight not in constants or weight is None:
        return None
    return weight if transposed else _transposed(weight)


def _swaps(transpose: ir.Node) -> bool:
    return tuple(transpose.attributes.get_ints("perm", (1, 0))) == (1, 0)


def _transposed(stored: ir.Value) -> ir.Value:
    """A matrix the other way round, which is made when it is read."""

    def read() -> ir.TensorProtocol:
        tensor = stored.const_value
        assert tensor is not None
        if isinstance(tensor, ir.ExternalTensor):
            values = _floats(tensor, 0, prod(tensor.shape.numpy()))
        else:
            values = tensor.numpy()
        return ir.tensor(np.ascontiguousarray(values.reshape(rows, width).T))

    rows, width = matrix_shape(stored)
    shape = ir.Shape((width, rows))
    tensor = ir.LazyTensor(read, ir.DataType.FLOAT, shape, cache=False, name=stored.name)
    return ir.Value(name=stored.name, shape=shape, type=stored.type, const_value=tensor)


def matrix_shape(weight: ir.Value) -> tuple[int, int]:
    """[out, in] of a weight matrix."""
    assert weight.shape is not None
    rows, width = weight.shape.numpy()
    return rows, width
