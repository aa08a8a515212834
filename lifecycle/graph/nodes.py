"""A few verbs over onnx-ir, so that a builder reads like the model it writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

OPSET = 23
"""The first with `RMSNormalization`."""
IR_VERSION = 11
"""The one that came with that opset."""
MICROSOFT = "com.microsoft"

CONTRIB_OPS = frozenset(
    {
        "GatherBlockQuantized",
        "GroupQueryAttention",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "MoE",
        "QMoE",
        "QuickGelu",
        "RotaryEmbedding",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)
"""Operators that are taken from ONNX Runtime's own domain."""


class GraphNodes:
    """Adds nodes to a graph: at its end, or before or behind one of its nodes."""

    def __init__(
        self,
        graph: ir.Graph | None = None,
        before: ir.Node | None = None,
        after: ir.Node | None = None,
    ) -> None:
        opsets = {"": OPSET, MICROSOFT: 1}
        self.graph = graph or ir.Graph([], [], nodes=[], name="decoder", opset_imports=opsets)
        self._before, self._after = before, after

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """An input of the graph; dimensions with names are free."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def output(
        self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]
    ) -> None:
        """Make a value an output of the graph."""
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self.graph.outputs.append(value)

    def initializer(self, value: ir.Value) -> ir.Value:
        """Make a value with a constant tensor known to the graph; twice is fine."""
        assert value.name is not None
        return self.graph.initializers.setdefault(value.name, value)

    def integers(self, name: str, *numbers: int) -> ir.Value:
        """A constant int64 vector, such as a shape; stored in the graph itself."""
        return self.constant(name, np.array(numbers, np.int64))

    def scalar(self, name: str, value: np.generic) -> ir.Value:
        """A constant without dimensions; stored in the graph itself."""
        return self.constant(name, np.asarray(value))

    def constant(self, name: str, values: NDArray[Any]) -> ir.Value:
        """A small constant; stored in the graph itself."""
        tensor = ir.tensor(values, name=name)
        shape, kind = ir.Shape(values.shape), ir.TensorType(tensor.dtype)
        return self.initializer(ir.Value(name=name, shape=shape, type=kind, const_value=tensor))

    def node(self, op: str, name: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """A node with one output, named as the node is."""
        return self.nodes(op, name, inputs, (name,), **attributes)[0]

    def nodes(
        self,
        op: str,
        name: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[str],
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """A node with several outputs; an output named "" is left out."""
        node = ir.node(
            op,
            inputs,
            attributes,
            domain=MICROSOFT if op in CONTRIB_OPS else "",
            outputs=[ir.Value(name=output) for output in outputs],
            name=name,
        )
        if self._before is not None:
            self.graph.insert_before(self._before, node)
        elif self._after is not None:
            self.graph.insert_after(self._after, node)
            self._after = node
        else:
            self.graph.append(node)
        return node.outputs


def save_model(graph: ir.Graph, path: Path, ir_version: int = IR_VERSION) -> None:
    """Write the graph; its external tensors must lie in files beside `path`."""
    model = ir.Model(graph, ir_version=max(ir_version, IR_VERSION), producer_name="lifecycle")
    ir.save(model, path)
