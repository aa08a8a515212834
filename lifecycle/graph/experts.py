"""Mixtures of experts with weights in 4 or 8 bits, by blocks along the input."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import onnx_ir as ir

from lifecycle.errors import StageError
from lifecycle.graph.rewrite import GraphRewrite, Mixture
from lifecycle.graph.rounding import Fit, Grid, Packed, quantize


def quantize_experts(rewrite: GraphRewrite, mixture: Mixture, grid: Grid, fit: Fit) -> None:
    """Round each block of all experts by itself, in blocks of at most those of `grid`, and store them.

    Raises:
        StageError: no size of blocks divides the inputs of both products.
    """
    grid = common_grid(mixture, grid)

    def rounded(weight: ir.Value) -> Packed:
        own = rewrite.fitted(grid, weight)
        return Packed.joined(
            rewrite.map_blocks(weight, lambda rows: quantize(rows, own, fit).pack())
        )

    store_experts(rewrite, mixture, grid, rounded(mixture.gate_up), rounded(mixture.down))


def store_experts(
    rewrite: GraphRewrite, mixture: Mixture, grid: Grid, gate_up: Packed, down: Packed
) -> None:
    """Put the operator `QMoE` in the place of `MoE`; the rows of all experts, one expert after the other, are of
    a grid like `grid`."""
    first = _store(rewrite, f"{mixture.name}.gate_up_proj", mixture.gate_up, grid, gate_up)
    second = _store(rewrite, f"{mixture.name}.down_proj", mixture.down, grid, down)
    x, logits = mixture.node.inputs[:2]
    attributes: dict[str, Any] = {
        name: attribute.value for name, attribute in mixture.node.attributes.items()
    }
    g = rewrite.before(mixture.node)
    shares = None
    if not attributes["normalize_routing_weights"]:
        # Without weights of its own the operator makes those of the picked experts add up to 1,
        # whatever the attribute says.
        shares = g.node("Softmax", f"{mixture.name}.shares", logits, axis=-1)
    # Biases and third weights come between.
    operands = [x, logits, *first[:2], None, *second[:2], *[None] * 4]
    operands += [first[2], second[2], None, shares]
    while operands[-1] is None:
        operands.pop()
    y = g.node(
        "QMoE",
        f"{mixture.name}.int{grid.bits}",
        *operands,
        expert_weight_bits=grid.bits,
        block_size=grid.block_size,
        # Activations in int8 by row and block: by far the fastest way on CPUs.
        accuracy_level=4,
        **attributes,
    )
    rewrite.replace(mixture.node, y)


def experts_bytes(mixture: Mixture, grid: Grid) -> tuple[int, int]:
    """The weights of a mixture, and the bytes that `quantize_experts` stores for them."""
    grid = common_grid(mixture, grid)
    shapes = [_shape(weight) for weight in (mixture.gate_up, mixture.down)]
    sizes = [grid.bytes((experts * rows, width)) for experts, rows, width in shapes]
    return sum(map(prod, shapes)), sum(sizes)


def _store(
    rewrite: GraphRewrite, name: str, weight: ir.Value, grid: Grid, packed: Packed
) -> list[ir.Value | None]:
    """Integers [experts, out, bytes], scales [experts, out, blocks], packed zeros if there are any."""
    shape = _shape(weight)
    integers, codes = (a.reshape(*shape[:2], -1) for a in (packed.values, packed.scales.values))
    scales = replace(packed.scales, values=codes)
    zeros = packed.zeros
    return [
        rewrite.add(f"{name}.int{grid.bits}", integers, prod(shape)),
        rewrite.add_scales(f"{name}.scales", scales),
        None if zeros is None else rewrite.add(f"{name}.zeros", zeros.reshape(*shape[:2], -1)),
    ]


def _shape(weight: ir.Value) -> tuple[int, int, int]:
    """[experts, out, in] of the weights of a mixture."""
    assert weight.shape is not None
    experts, rows, width = weight.shape.numpy()
    return experts, rows, width


def common_grid(mixture: Mixture, grid: Grid) -> Grid:
    """A grid whose blocks, at most those of `grid`, divide the inputs of both products.

    Raises:
        StageError: there is none.
    """
    widths = [_shape(weight)[2] for weight in (mixture.gate_up, mixture.down)]
    sizes = (size for size in (128, 64, 32, 16) if size <= grid.block_size)
    found = next((size for size in sizes if not any(width % size for width in widths)), None)
    if found is None:
        raise StageError(
            f"{mixture.name}: blocks of 16 to {grid.block_size} weights do not divide inputs of "
            f"{widths[0]} and {widths[1]}; keep it in float32 with skip: ['*.experts']"
        )
    return replace(grid, block_size=found)
