"""Matrices stored as floats of 16 bits and computed with in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lifecycle.errors import StageError
from lifecycle.graph.rewrite import GraphRewrite, Linear, Mixture

_FORMATS = {"fp16": (ir.DataType.FLOAT16, 65504.0), "bf16": (ir.DataType.BFLOAT16, 3.3895314e38)}
"""The type that is stored, and its largest number."""


class Half:
    """Weights in `fp16` or `bf16`. ONNX Runtime makes float32 of them when it loads the graph, except
    of the embedding, of which it makes float32 of the rows that it looks up."""

    def __init__(self, form: Literal["fp16", "bf16"]) -> None:
        self._form = form
        self._stored, self._largest = _FORMATS[form]

    def linear(self, rewrite: GraphRewrite, linear: Linear) -> None:
        """Replace the weights of one product."""
        self._read_product(rewrite, linear, self._store(rewrite, linear.weight))

    def experts(self, rewrite: GraphRewrite, mixture: Mixture) -> None:
        """Replace the weights of a mixture of experts."""
        for place, weight in ((2, mixture.gate_up), (4, mixture.down)):
            self._read_as_float(rewrite, mixture.node, place, self._store(rewrite, weight))

    def embedding(self, rewrite: GraphRewrite, node: ir.Node, head: Linear | None) -> None:
        """Replace a table that is looked up, and the weights of the head if they are the same."""
        table, tokens = node.inputs
        assert table is not None and node.name is not None
        stored = self._store(rewrite, table)
        g = rewrite.before(node)
        rows = g.node("Gather", f"{node.name}.{self._form}", stored, tokens)
        rewrite.replace(node, g.node("Cast", f"{node.name}.float", rows, to=ir.DataType.FLOAT))
        if head is not None:
            self._read_product(rewrite, head, stored)

    def _read_product(self, rewrite: GraphRewrite, linear: Linear, stored: ir.Value) -> None:
        """Stored is [out, in], whichever way round the product reads its weights."""
        is_transposed = bool(linear.node.attributes.get_int("transB", 0))
        self._read_as_float(rewrite, linear.node, 1, stored, is_transposed)

    def _read_as_float(
        self,
        rewrite: GraphRewrite,
        node: ir.Node,
        place: int,
        stored: ir.Value,
        as_stored: bool = True,
    ) -> None:
        name, g = f"{node.name}.{stored.name}.float", rewrite.before(node)
        floats = g.node("Cast", name, stored, to=ir.DataType.FLOAT)
        if not as_stored:
            floats = g.node("Transpose", f"{name}.transposed", floats, perm=[1, 0])
        node.replace_input_with(place, floats)

    def _store(self, rewrite: GraphRewrite, weight: ir.Value) -> ir.Value:
        assert weight.name is not None and weight.shape is not None
        shape = tuple(weight.shape.numpy())
        # Two products may read the same weights, and one of them the other way round.
        turned = "" if weight.is_initializer() else ".transposed"
        name = f"{weight.name}.{self._form}{turned}"
        if (known := rewrite.graph.initializers.get(name)) is not None:
            return known
        blocks = rewrite.map_blocks(weight, self._rounding(weight.name))
        return rewrite.stream(name, self._stored, shape, blocks)

    def _rounding(self, name: str) -> Callable[[NDArray[np.float32]], NDArray[np.uint16]]:
        def round_block(block: NDArray[np.float32]) -> NDArray[np.uint16]:
            if (largest := float(np.abs(block).max())) > self._largest:
                raise StageError(
                    f"{name} holds {largest:g}, and {self._form} reaches only to "
                    f"{self._largest:g}; take scheme bf16, or keep it in float32 with skip"
                )
            # Files take bytes of whatever type; numpy itself knows no bfloat16.
            return block.astype(self._stored.numpy()).view(np.uint16)

        return round_block
