"""Weights of 4 or 8 bits in blocks along the input, one scale per block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import onnx_ir as ir

from lifecycle.graph.experts import quantize_experts
from lifecycle.graph.rewrite import GraphRewrite, Linear, Mixture, matrix_shape
from lifecycle.graph.rounding import Blocks, Fit, Grid, Packed, least_squares, quantize

Stored = Sequence[ir.Value | None]
"""Integers [rows, blocks, bytes], scales [rows, blocks], and the packed zeros if there are any."""


@dataclass(frozen=True)
class Blockwise:
    """Products by `MatMulNBits`, the embedding by `GatherBlockQuantized`."""

    block_size: int = 64
    bits: Literal[4, 8] = 4
    symmetric: bool = True
    fit: Fit = least_squares
    """How the scale and the zero of a block are found."""

    @property
    def grid(self) -> Grid:
        """The values that weights can take."""
        return Grid(self.block_size, self.bits, self.symmetric)

    def bytes(self, shape: tuple[int, int]) -> int:
        """What a matrix [out, in] takes."""
        return self.grid.bytes(shape)

    def linear(self, rewrite: GraphRewrite, linear: Linear) -> None:
        """Replace one product."""
        self.product(rewrite, linear, self._store(rewrite, linear.name, linear.weight))

    def rounded_product(self, rewrite: GraphRewrite, linear: Linear) -> Blocks:
        """The weights of a product as they will be stored."""
        return self.rounded(rewrite, linear.weight)

    def settled(self, rewrite: GraphRewrite, linear: Linear) -> Blocks:
        """The same, after which those behind it are rounded."""
        return self.rounded_product(rewrite, linear)

    def rounded(self, rewrite: GraphRewrite, weight: ir.Value) -> Blocks:
        """Weights by themselves, whatever reads them."""
        grid, fit = rewrite.fitted(self.grid, weight), self.fit
        return Blocks.joined(rewrite.map_blocks(weight, lambda rows: quantize(rows, grid, fit)))

    def experts(self, rewrite: GraphRewrite, mixture: Mixture) -> None:
        """Replace a mixture of experts."""
        quantize_experts(rewrite, mixture, self.grid, self.fit)

    def embedding(self, rewrite: GraphRewrite, node: ir.Node, head: Linear | None) -> None:
        """Replace the look-up of tokens, and the head if it is the same matrix: both then read
        the same bytes, as [vocab, blocks, bytes] and as [vocab, blocks * bytes]."""
        table, tokens = node.inputs
        assert table is not None and node.name is not None
        rows, width = matrix_shape(table)
        values, scales, zeros = stored = self._store(rewrite, node.name, table)
        assert values is not None
        size = self.block_size
        row_bytes = -(-width // size) * size * self.bits // 8
        flat = rewrite.view(values, f"{node.name}.weight.int{self.bits}_rows", (rows, row_bytes))
        g = rewrite.before(node)
        found = g.node(
            "GatherBlockQuantized",
            f"{node.name}.dequantized",
            *(flat, tokens, scales, *([zeros] if zeros is not None else [])),
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
            self.product(rewrite, head, stored)

    def _store(self, rewrite: GraphRewrite, name: str, weight: ir.Value) -> Stored:
        """Blocks are packed as they are made: unpacked, a head of 4 bits would take twice its size."""
        grid, fit = rewrite.fitted(self.grid, weight), self.fit
        parts = rewrite.map_blocks(weight, lambda rows: quantize(rows, grid, fit).pack())
        return self._add(rewrite, name, Packed.joined(parts), matrix_shape(weight))

    def _add(
        self, rewrite: GraphRewrite, name: str, packed: Packed, shape: tuple[int, int]
    ) -> Stored:
        zeros, elements = packed.zeros, prod(shape)
        return (
            rewrite.add(f"{name}.weight.int{self.bits}", packed.values, elements),
            rewrite.add_scales(f"{name}.weight.scales", packed.scales),
            None if zeros is None else rewrite.add(f"{name}.weight.zeros", zeros),
        )

    def product(self, rewrite: GraphRewrite, linear: Linear, stored: Stored) -> None:
        """Put the operator for stored weights in the place of a product."""
        out, width = linear.shape
        g = rewrite.before(linear.node)
        y = g.node(
            "MatMulNBits",
            f"{linear.name}.product",
            *(linear.x, *stored, None, linear.bias if linear.has_vector_bias else None),
            K=width,
            N=out,
            bits=self.bits,
            block_size=self.block_size,
            # Activations in int8 by row and block: the only fast path on CPUs.
            accuracy_level=4,
        )
        if linear.bias is not None and not linear.has_vector_bias:
            y = g.node("Add", f"{linear.name}.biased", y, linear.bias)
        rewrite.replace(linear.node, y)
