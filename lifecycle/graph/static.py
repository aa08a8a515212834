"""Static int8: activations in uint8 with ranges that calibration data has fixed, as pairs of
QuantizeLinear and DequantizeLinear that ONNX Runtime turns into integer operators.

With one fixed scale per tensor a result does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.ranges import Range
from lifecycle.graph.rewrite import Convolution, GraphRewrite, Linear

_ACTIVATIONS = ("Relu", "Clip")
"""What ONNX Runtime takes into the quantisation of a convolution's output."""
_JOINING = ("Add", "AveragePool", "GlobalAveragePool")
"""Computed in integers where all that they read is quantised."""
_KEEPING = ("Flatten", "Identity", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""What they give has the range of what they read."""


class Int8Static(Int8Rowwise):
    """Products and convolutions in int8 by output channel, their inputs in uint8 by tensor; the
    outputs of convolutions, and what adds or pools such outputs, in uint8 as well.

    Biases are int32. What products give is in float32 until the next one reads it. Tables are stored as `Int8Rowwise` stores them.
    """

    def __init__(self, weight_bits: int, ranges: Mapping[str, Range]) -> None:
        """`ranges` are those of the tensors that `observed` names."""
        super().__init__(weight_bits)
        self._ranges = ranges
        self._known: dict[ir.Value, ir.Value] = {}

    def convolution(self, rewrite: GraphRewrite, conv: Convolution) -> None:
        """Quantise what a convolution reads and gives."""
        node, name = conv.node, conv.name
        assert conv.weight.const_value is not None
        weights = conv.weight.const_value.numpy()
        flat = weights.reshape(len(weights), -1)
        values, scales = self.quantize([flat], flat.shape)
        x = self._quantized(rewrite, node.inputs[0])
        g = rewrite.before(node)
        stored = rewrite.add(f"{name}.weight.int8", values.reshape(weights.shape), values.size)
        scale = rewrite.add(f"{name}.weight.scale", scales)
        node.replace_input_with(0, x)
        node.replace_input_with(
            1, g.node("DequantizeLinear", f"{name}.weight.float", stored, scale, axis=0)
        )
        if conv.bias is not None:
            node.replace_input_with(2, _bias(rewrite, node, conv.bias, scales * _step(x)))
        self._quantize_output(rewrite, node)

    def finish(self, rewrite: GraphRewrite) -> None:
        """Quantise what adds or pools tensors that are quantised."""
        for node in rewrite.graph:
            if node.op_type not in _JOINING:
                continue
            reads = [value and self._known.get(value, value) for value in node.inputs]
            if all(value is None or _is_dequantized(value) for value in reads):
                for place, value in enumerate(reads):
                    node.replace_input_with(place, value)
                self._quantize_output(rewrite, node)

    def _product(
        self, rewrite: GraphRewrite, linear: Linear, weight: ir.Value, scale: ir.Value
    ) -> None:
        x = self._quantized(rewrite, linear.x)
        g, name = rewrite.before(linear.node), linear.name
        # QGemm is made only where the zeros are spelled out.
        zeros = g.constant(f"int8.zeros.{linear.shape[0]}", np.zeros(linear.shape[0], np.int8))
        floats = g.node("DequantizeLinear", f"{name}.weight.float", weight, scale, zeros, axis=1)
        bias = linear.bias
        if bias is None:
            y = g.node("MatMul", f"{name}.product", x, floats)
        elif linear.has_vector_bias and scale.const_value is not None:
            steps = scale.const_value.numpy() * _step(x)
            integers = _bias(rewrite, linear.node, bias, np.broadcast_to(steps, linear.shape[:1]))
            y = g.node("Gemm", f"{name}.product", x, floats, integers)
        else:
            y = g.node("Gemm", f"{name}.product", x, floats, bias)
        rewrite.replace(linear.node, y)

    def _quantized(self, rewrite: GraphRewrite, x: ir.Value | None) -> ir.Value:
        """A tensor as it is when it has been through uint8."""
        assert x is not None
        if _is_dequantized(x):
            return x
        if x not in self._known:
            maker = x.producer()
            source = maker.inputs[0] if maker and maker.op_type in _KEEPING else None
            like = source.producer() if source is not None and _is_dequantized(source) else None
            self._known[x] = self._pair(rewrite, x, like)
        return self._known[x]

    def _pair(self, rewrite: GraphRewrite, x: ir.Value, like: ir.Node | None = None) -> ir.Value:
        """x, quantised and dequantised; with the scale of the node `like`, if there is one."""
        g, name = rewrite.after(x), str(x.name)
        if like is not None:
            bounds = like.inputs[1:3]
        else:
            found = self._ranges[name]
            bounds = [
                g.scalar(f"{name}.scale", found.scale),
                g.scalar(f"{name}.zero", found.zero),
            ]
        integers = g.node("QuantizeLinear", f"{name}.uint8", x, *bounds)
        y = g.node("DequantizeLinear", f"{name}.dequantized", integers, *bounds)
        y.type, y.shape = x.type, x.shape
        return y

    def _quantize_output(self, rewrite: GraphRewrite, node: ir.Node) -> None:
        y = _activated(node)
        if any(use.node.op_type == "QuantizeLinear" for use in y.uses()):
            return
        name = y.name
        z = self._pair(rewrite, y)
        (quantize,) = (use.node for use in y.uses() if use.node.op_type == "QuantizeLinear")
        is_output = y.is_graph_output()
        ir.convenience.replace_all_uses_with(y, z, replace_graph_outputs=True)
        quantize.replace_input_with(0, y)
        if is_output:
            y.name, z.name = f"{name}.float", name


def _bias(
    rewrite: GraphRewrite, node: ir.Node, bias: ir.Value, steps: NDArray[np.float32]
) -> ir.Value:
    """A constant bias [out] in int32, in steps of input times weight scale, [out]."""
    assert bias.const_value is not None
    most, name = 2**31 - 1, str(node.name)
    floats = np.broadcast_to(bias.const_value.numpy().reshape(-1), steps.shape)
    rounded = np.clip(np.rint(floats.astype(np.float64) / steps), -most, most).astype(np.int32)
    integers = rewrite.add(f"{name}.bias.int32", rounded)
    scale = rewrite.add(f"{name}.bias.scale", np.ascontiguousarray(steps))
    return rewrite.before(node).node(
        "DequantizeLinear", f"{name}.bias.float", integers, scale, axis=0
    )


def observed(source: Path) -> list[str]:
    """The tensors whose ranges `Int8Static` may ask for."""
    rewrite = GraphRewrite(source)
    convolutions = rewrite.convolutions()
    found = [linear.x for linear in rewrite.linears()]
    found += [value for conv in convolutions if (value := conv.node.inputs[0])]
    found += [_activated(conv.node) for conv in convolutions]
    if convolutions:
        found += [_activated(node) for node in rewrite.graph if node.op_type in _JOINING]
    made = [value for node in rewrite.graph for value in node.outputs]
    order = {value: place for place, value in enumerate((*rewrite.graph.inputs, *made))}
    return [str(value.name) for value in sorted(set(found), key=lambda value: order[value])]


def _activated(node: ir.Node) -> ir.Value:
    """What a node gives, behind its activation if it has one."""
    y = node.outputs[0]
    uses = list(y.uses())
    if len(uses) == 1 and not y.is_graph_output() and uses[0].node.op_type in _ACTIVATIONS:
        return uses[0].node.outputs[0]
    return y


def _is_dequantized(value: ir.Value) -> bool:
    maker = value.producer()
    return maker is not None and maker.op_type == "DequantizeLinear"


def _step(x: ir.Value) -> np.float32:
    """The scale of a dequantised tensor."""
    maker = x.producer()
    scale = maker.inputs[1] if maker is not None else None
    assert scale is not None and scale.const_value is not None
    return np.float32(scale.const_value.numpy())
