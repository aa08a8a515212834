"""What attention and feed-forward are made of: products and norms with weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lifecycle.engines.adapters import Product
from lifecycle.graph.adapters import AdapterSlots, modules_of
from lifecycle.graph.nodes import GraphNodes
from lifecycle.graph.spec import DecoderSpec, Experts
from lifecycle.graph.tensors import TensorSource


class Parts:
    """Adds products and norms to a graph."""

    def __init__(
        self,
        spec: DecoderSpec,
        source: TensorSource,
        g: GraphNodes,
        slots: AdapterSlots | None = None,
    ) -> None:
        self.spec, self.source, self.g, self._slots = spec, source, g, slots
        # In a mixture PEFT takes the names of MLPs for those of experts, also where there are none.
        self._has_experts = any(isinstance(layer.feed_forward, Experts) for layer in spec.layers)

    def linear(
        self, name: str, layer: int, x: ir.Value, shape: tuple[int, int], bias: bool
    ) -> ir.Value:
        """`base`, with what adapters add to it."""
        return self.adapted(name, layer, x, shape, self.base(name, layer, x, shape, bias))[0]

    def base(
        self, name: str, layer: int, x: ir.Value, shape: tuple[int, int], bias: bool
    ) -> ir.Value:
        """x · Wᵀ + b, W of `shape` [out, in]; the last word of `name` says which product.

        Gemm with transB takes weights as checkpoints store them, so they are copied, not
        transposed. ONNX Runtime packs them at load; decode and prefill are as fast as MatMul on
        transposed weights (2048×2048, 1/8/128 tokens: 0.18/0.65/7.5 ms against 0.20/1.0/7.1).
        """
        part = name.rpartition(".")[2]
        constants = [self.source.linear(name, layer, part, shape)]
        if bias:
            constants.append(self.source.linear(name, layer, part, shape[:1], "bias"))
        return self.g.node("Gemm", name, x, *map(self.g.initializer, constants), transB=1)

    def adapted(
        self, name: str, layer: int, x: ir.Value, shape: tuple[int, int], *ys: ir.Value
    ) -> Sequence[ir.Value]:
        """`ys`, a product of `base` in whole or by its modules, with what adapters add to it."""
        if self._slots is None or (self._has_experts and ".mlp." in name):
            return ys
        product = self._product(name, layer, name.rpartition(".")[2], shape)
        return self._slots.add(product, x, ys)

    def _product(self, name: str, layer: int, part: str, shape: tuple[int, int]) -> Product:
        """What an adapter must know of a product."""
        sizes, names = self.spec.attention, self.spec.names
        found = [self.source.layer_name(layer, one) for one in names.of(part).split()]
        rows = {
            1: [shape[0]],
            2: [shape[0] // 2] * 2,
            3: [sizes.q_size, sizes.kv_size, sizes.kv_size],
        }[len(found)]
        heads = sizes.num_heads if names.heads_together and part == "qkv_proj" else 0
        return Product(name, shape[1], modules_of(names.prefix, found, rows), heads)

    def norm(self, name: str, source: str, x: ir.Value, size: int) -> ir.Value:
        """`x` [.., size], normalised by the weights that `source` names."""
        op = "RMSNormalization" if self.spec.norm.kind == "rms" else "LayerNormalization"
        scale = self._norm_weights(name, source, size)
        return self.g.node(op, name, x, *scale, epsilon=self.spec.norm.epsilon)

    def add_norm(
        self, name: str, source: str, x: ir.Value, residual: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """The sum of both, normalised, and the sum itself, each [T, hidden]."""
        is_rms = self.spec.norm.kind == "rms"
        outputs = self.g.nodes(
            "SkipSimplifiedLayerNormalization" if is_rms else "SkipLayerNormalization",
            name,
            (x, residual, *self._norm_weights(name, source, self.spec.hidden_size)),
            (name, "", "", f"{name}.residual"),
            epsilon=self.spec.norm.epsilon,
        )
        return outputs[0], outputs[3]

    def scaled(self, name: str, x: ir.Value, factor: float) -> ir.Value:
        """`x` times a constant."""
        if factor == 1:
            return x
        return self.g.node("Mul", name, x, self.g.scalar(f"{name}.factor", np.float32(factor)))

    def _norm_weights(self, name: str, source: str, size: int) -> Sequence[ir.Value]:
        kinds = ("weight", "bias") if self.spec.norm.bias else ("weight",)
        return [self.g.initializer(self.source.norm(name, source, size, kind)) for kind in kinds]
