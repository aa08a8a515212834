"""Mixtures of experts with weights in 4 or 8 bits, by blocks along the input."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir

from lifecycle.errors import StageError
from lifecycle.graph.rewrite import GraphRewrite, Mixture
from lifecycle.graph.rounding import quantize


def quantize_experts(rewrite: GraphRewrite, mixture: Mixture, bits: int, block_size: int) -> None:
    """Put the operator `QMoE` in the place of `MoE`, in blocks of at most `block_size`.

    Raises:
        StageError: no size of blocks divides the inputs of both products.
    """
    weights = (mixture.gate_up, mixture.down)
    size = _common_block(mixture, block_size)
    stored: list[ir.Value] = []
    for weight, part in zip(weights, ("gate_up_proj", "down_proj"), strict=True):
        experts, rows, width = _shape(weight)
        pairs = list(rewrite.map_blocks(weight, lambda block: quantize(block, size, bits)))
        values = np.concatenate([pair[0].reshape(len(pair[0]), -1) for pair in pairs])
        scales = np.concatenate([pair[1] for pair in pairs])
        name = f"{mixture.name}.{part}"
        integers = values.reshape(experts, rows, width * bits // 8)
        stored.append(rewrite.add(f"{name}.int{bits}", integers, prod((experts, rows, width))))
        stored.append(rewrite.add(f"{name}.scales", scales.reshape(experts, rows, width // size)))
    gate_up, gate_up_scales, down, down_scales = stored
    x, logits = mixture.node.inputs[:2]
    attributes: dict[str, Any] = {
        name: attribute.value for name, attribute in mixture.node.attributes.items()
    }
    g = rewrite.before(mixture.node)
    operands = [x, logits, gate_up, gate_up_scales, None, down, down_scales]
    if not attributes["normalize_routing_weights"]:
        # Without weights of its own the operator makes those of the picked experts add up to 1,
        # whatever the attribute says. Biases, third weights and zero points come between.
        shares = g.node("Softmax", f"{mixture.name}.shares", logits, axis=-1)
        operands += [None] * 7 + [shares]
    y = g.node(
        "QMoE",
        f"{mixture.name}.int{bits}",
        *operands,
        expert_weight_bits=bits,
        block_size=size,
        # Activations in int8 by row and block: by far the fastest way on CPUs.
        accuracy_level=4,
        **attributes,
    )
    rewrite.replace(mixture.node, y)


def _shape(weight: ir.Value) -> tuple[int, int, int]:
    """[experts, out, in] of the weights of a mixture."""
    assert weight.shape is not None
    experts, rows, width = weight.shape.numpy()
    return experts, rows, width


def _common_block(mixture: Mixture, most: int) -> int:
    widths = [_shape(weight)[2] for weight in (mixture.gate_up, mixture.down)]
    sizes = (size for size in (128, 64, 32, 16) if size <= most)
    found = next((size for size in sizes if not any(width % size for width in widths)), None)
    if found is None:
        raise StageError(
            f"{mixture.name}: blocks of 16 to {most} weights do not divide inputs of "
            f"{widths[0]} and {widths[1]}; keep it in float32 with skip: ['*.experts']"
        )
    return found
