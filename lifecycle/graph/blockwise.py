"""Weights of 4 or 8 bits in blocks along the input, symmetric, one float32 scale per block."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
import onnx_ir as ir

from lifecycle.graph.experts import quantize_experts
from lifecycle.graph.rewrite import GraphRewrite, Linear, Mixture, matrix_shape
from lifecycle.graph.rounding import quantize


@dataclass(frozen=True)
class Blockwise:
    """Products by `MatMulNBits`, the embedding by `GatherBlockQuantized`."""

    block_size: int = 64
    """Weights that share a scale: 16, 32, 64 or 128. ONNX Runtime's packed matrices hold a scale
    and a sum of 4 bytes each per block, so a weight of 4 bits takes 6 at 32, 5 at 64 and 4.5 at
    128, and reading them is what a decoding step of one row waits for."""
    bits: Literal[4, 8] = 4

    def linear(self, rewrite: GraphRewrite, linear: Linear) -> None:
        """Replace one product."""
        self.product(rewrite, linear, *self._store(rewrite, linear.name, linear.weight))

    def experts(self, rewrite: GraphRewrite, mixture: Mixture) -> None:
        """Replace a mixture of experts."""
        quantize_experts(rewrite, mixture, self.bits, self.block_size)

    def embedding(self, rewrite: GraphRewrite, node: ir.Node, head: Linear | None) -> None:
        """Replace the look-up of tokens, and the head if it is the same matrix: both then read
        the same bytes, as [vocab, blocks, bytes] and as [vocab, blocks * bytes]."""
        table, tokens = node.inputs
        assert table is not None and node.name is not None
        values, scales = self._store(rewrite, node.name, table)
        rows, width = matrix_shape(table)
        size = self.block_size
        row_bytes = -(-width // size) * size * self.bits // 8
        flat = rewrite.view(values, f"{node.name}.weight.int{self.bits}_rows", (rows, row_bytes))
        g = rewrite.before(node)
        found = g.node(
            "GatherBlockQuantized",
            f"{node.name}.dequantized",
            *(flat, tokens, scales),
            bits=self.bits,
            block_size=size,
            gather_axis=0,
            quantize_axis=1,
        )
        if width % size:
            ends = (("start", 0), ("end", width), ("axis", -1))
            bounds = [g.integers(f"{node.name}.{end}", number) for end, number in ends]
            found = g.node("Slice", f"{node.name}.whole", found, *bounds)
        rewrite.replace(node, found)
        if head is not None:
            self.product(rewrite, head, values, scales)

    def _store(
        self, rewrite: GraphRewrite, name: str, weight: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        pairs = list(
            rewrite.map_blocks(weight, lambda block: quantize(block, self.block_size, self.bits))
        )
        values = np.concatenate([pair[0] for pair in pairs])
        scales = np.concatenate([pair[1] for pair in pairs])
        return (
            rewrite.add(f"{name}.weight.int{self.bits}", values, prod(matrix_shape(weight))),
            rewrite.add(f"{name}.weight.scales", scales),
        )

    def product(
        self, rewrite: GraphRewrite, linear: Linear, values: ir.Value, scales: ir.Value
    ) -> None:
        """Put the operator for stored weights in the place of a product."""
        out, width = linear.shape
        y = rewrite.before(linear.node).node(
            "MatMulNBits",
            f"{linear.name}.product",
            *(linear.x, values, scales, None, None, linear.bias),
            K=width,
            N=out,
            bits=self.bits,
            block_size=self.block_size,
            # Activations in int8 by row and block: the only fast path on CPUs.
            accuracy_level=4,
        )
        rewrite.replace(linear.node, y)
