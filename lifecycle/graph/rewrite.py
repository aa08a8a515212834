"""An exported graph opened for change: its products with constants, replaced one by one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lifecycle.engines.decoder import GRAPH
from lifecycle.engines.limits import usable_cores
from lifecycle.errors import StageError
from lifecycle.graph.nodes import GraphNodes
from lifecycle.graph.weights import WeightFile

T = TypeVar("T")

BLOCK = 1 << 18
"""Elements that are quantised together: 1 MB of float32, which stays in a core's cache."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A node y = x · Wᵀ + b whose weights are constant."""

    node: ir.Node
    name: str
    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    shape: tuple[int, int]
    """[out, in] of the weights."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """A node `MoE`: both its weights are constants [experts, out, in]."""

    node: ir.Node
    name: str
    gate_up: ir.Value
    down: ir.Value


class GraphRewrite:
    """The graph in `folder`, and the file that takes the weights of the new one."""

    def __init__(self, folder: Path, weights: WeightFile) -> None:
        self.graph = ir.load(folder / GRAPH).graph
        self.weights = weights
        self.folder = folder
        self.input_factors: dict[ir.Value, NDArray[np.float32]] = {}
        """Factors [in] on the columns of weights, which whoever reads the weights gets applied."""
        self.quantized_elements = 0
        """Weights that are stored as integers so far."""
        self.quantized_bytes = 0
        """Bytes that stand for them, scales included."""

    def linears(self) -> list[Linear]:
        """All products with constant weights, in the order of the graph."""
        constants = self._matrices()
        found: list[Linear] = []
        for node in self.graph:
            if node.op_type == "Gemm" and node.inputs[1] in constants:
                x, weight, *bias = node.inputs
                assert x is not None and weight is not None and node.name is not None
                shape = matrix_shape(weight)
                found.append(Linear(node, node.name, x, weight, bias[0] if bias else None, shape))
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

    def embedding(self) -> ir.Node:
        """The Gather that looks tokens up in a table of floats."""
        constants = self._matrices()
        for node in self.graph:
            if node.op_type == "Gather" and node.inputs[0] in constants:
                return node
        raise StageError(f"{self.folder / GRAPH}: no embedding: this is no graph of a decoder")

    def before(self, node: ir.Node) -> GraphNodes:
        """New nodes go before `node`."""
        return GraphNodes(self.graph, before=node)

    def replace(self, node: ir.Node, value: ir.Value) -> None:
        """Let `value` stand where the output of `node` stood."""
        old = node.outputs[0]
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        value.name, value.type, value.shape = old.name, old.type, old.shape

    def blocks(self, weight: ir.Value) -> Iterator[NDArray[np.float32]]:
        """The rows of a weight matrix, or of several in one tensor, in order, some at a time:
        [rows, in], with their `input_factors`."""
        tensor = weight.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        *leading, width = tensor.shape.numpy()
        rows = prod(leading)
        step = max(1, BLOCK // width)
        factors = self.input_factors.get(weight)
        for row in range(0, rows, step):
            start, stop = row * width, min(row + step, rows) * width
            block = np.concatenate(list(_floats(tensor, start, stop))).reshape(-1, width)
            yield block if factors is None else block * factors

    def map_blocks(
        self, weight: ir.Value, change: Callable[[NDArray[np.float32]], T]
    ) -> Iterator[T]:
        """`change` of each of `blocks`, in order; a few are worked on at once, which numpy's
        larger operations allow."""
        cores = usable_cores()
        with ThreadPoolExecutor(cores) as pool:
            pending: deque[Future[T]] = deque()
            for block in self.blocks(weight):
                pending.append(pool.submit(change, block))
                if len(pending) > 2 * cores:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def add(self, name: str, values: NDArray[Any], elements: int = 0) -> ir.Value:
        """Store a quantised tensor, or its scales, that stands for `elements` weights."""
        self.quantized_elements += elements
        self.quantized_bytes += values.nbytes
        value = self.weights.add_array(name, values)
        self.graph.initializers[name] = value
        return value

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
        for name, value in list(self.graph.initializers.items()):
            tensor = value.const_value
            if not value.uses():
                del self.graph.initializers[name]
            elif isinstance(tensor, ir.ExternalTensor) and Path(tensor.path) != self.weights.path:
                shape = tuple(tensor.shape.numpy())
                is_scaled = value in self.input_factors
                blocks = self.blocks(value) if is_scaled else _floats(tensor, 0, prod(shape))
                value.const_value = self.weights.add(name, tensor.dtype, shape, blocks).const_value
        return self.graph

    def _matrices(self) -> set[ir.Value | None]:
        return {
            value
            for value in self.graph.initializers.values()
            if value.dtype == ir.DataType.FLOAT and len(value.shape or ()) == 2
        }


def _floats(tensor: ir.ExternalTensor, start: int, stop: int) -> Iterator[NDArray[np.float32]]:
    """The values of a float32 tensor from `start` to `stop`, at most `BLOCK` at a time."""
    for at in range(start, stop, BLOCK):
        offset = (tensor.offset or 0) + 4 * at
        yield np.fromfile(tensor.path, "<f4", min(BLOCK, stop - at), offset=offset)


def matrix_shape(weight: ir.Value) -> tuple[int, int]:
    """[out, in] of a weight matrix."""
    assert weight.shape is not None
    rows, width = weight.shape.numpy()
    return rows, width
