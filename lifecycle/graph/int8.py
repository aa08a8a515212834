"""Row-wise int8: every row of the activations is quantised by its own maximum.

A request's outlier therefore cannot coarsen its neighbours in the batch, and because integer
sums are exact, a row's result does not depend on which rows it is computed with.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.rewrite import GraphRewrite, Linear, Mixture, matrix_shape


class Int8Rowwise:
    """Weights in int8 with one scale per output channel, activations in uint8 by row.

    `weight_bits` 7 keeps weights within ±63. Processors without VNNI instructions (AVX2) add
    two products in 16 bits, which 8-bit weights can overflow; 7 bits never do. (This project's own
    kernels add 8-bit weights otherwise there, which takes longer.)
    """

    def __init__(self, weight_bits: int) -> None:
        self.weight_bits = weight_bits
        self.levels = 2 ** (weight_bits - 1) - 1

    def bytes(self, shape: tuple[int, int]) -> int:
        """What a matrix [out, in] takes."""
        out, width = shape
        return out * (width + 4)

    def linear(self, rewrite: GraphRewrite, linear: Linear) -> None:
        """Replace one product; its weights are stored transposed, as the operator wants them."""
        values, scales = self.quantize(rewrite.blocks(linear.weight), linear.shape)
        transposed = np.ascontiguousarray(values.T)
        weight = rewrite.add(f"{linear.name}.weight.int8", transposed, values.size)
        self._product(rewrite, linear, weight, rewrite.add(f"{linear.name}.weight.scale", scales))

    def experts(self, rewrite: GraphRewrite, mixture: Mixture) -> None:
        """Replace a mixture of experts: in blocks, for its operator has no other fast form."""
        Blockwise(32, bits=8).experts(rewrite, mixture)

    def embedding(self, rewrite: GraphRewrite, node: ir.Node, head: Linear | None) -> None:
        """Replace the look-up of tokens, and the head if it is the same matrix."""
        table, tokens = node.inputs
        assert table is not None and node.name is not None
        values, scales = self.quantize(rewrite.blocks(table), matrix_shape(table))
        weight = rewrite.add(f"{node.name}.weight.int8", values, values.size)
        scale = rewrite.add(f"{node.name}.weight.scale", scales)
        g = rewrite.before(node)
        rows = g.node("Gather", f"{node.name}.int8", weight, tokens)
        row_scales = g.node("Gather", f"{node.name}.scales", scale, tokens)
        column = g.node("Unsqueeze", f"{node.name}.column", row_scales, g.integers("axis.last", -1))
        floats = g.node("Cast", f"{node.name}.float", rows, to=ir.DataType.FLOAT)
        rewrite.replace(node, g.node("Mul", f"{node.name}.dequantized", floats, column))
        if head is not None:
            # ONNX Runtime folds this transposition when it loads the graph.
            transposed = rewrite.before(head.node).node(
                "Transpose", f"{head.name}.transposed", weight, perm=[1, 0]
            )
            self._product(rewrite, head, transposed, scale)

    def quantize(
        self, blocks: Iterable[NDArray[np.float32]], shape: tuple[int, int]
    ) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Weights [out, in] as integers [out, in], and the scale of each row, [out]."""
        values = np.empty(shape, np.int8)
        scales = np.empty(shape[0], np.float32)
        done = 0
        for block in blocks:
            part = slice(done, done + len(block))
            scale = np.abs(block).max(axis=1) / np.float32(self.levels)
            scale[scale == 0] = 1
            scales[part] = scale
            values[part] = np.rint(block / scale[:, None])
            done += len(block)
        return values, scales

    def _product(
        self, rewrite: GraphRewrite, linear: Linear, weight: ir.Value, scale: ir.Value
    ) -> None:
        g, name = rewrite.before(linear.node), linear.name
        step = g.scalar("int8.step", np.float32(1 / 127))
        zero = g.scalar("int8.zero", np.uint8(128))
        last = g.integers("axis.last", -1)
        largest = g.node("ReduceMax", f"{name}.max", g.node("Abs", f"{name}.abs", linear.x), last)
        # A row of zeros gives 0/0 here, any integers next, and zeros when `largest` comes back.
        unit = g.node("Div", f"{name}.unit", linear.x, largest)
        rows = g.node("QuantizeLinear", f"{name}.uint8", unit, step, zero)
        product = g.node(
            "MatMulIntegerToFloat",
            f"{name}.product",
            *(rows, weight, step, scale, zero),
        )
        y = g.node("Mul", f"{name}.scaled", product, largest)
        if linear.bias is not None:
            y = g.node("Add", f"{name}.biased", y, linear.bias)
        rewrite.replace(linear.node, y)
