"""The feed-forward half of a layer: a plain or gated MLP, or a mixture of experts."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from lifecycle.graph.parts import Parts
from lifecycle.graph.spec import Experts, Mlp

_TANH = ("Gelu", {"approximate": "tanh"})
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "silu": ("QuickGelu", {"alpha": 1.0}),
    "gelu": ("Gelu", {}),
    "gelu_pytorch_tanh": _TANH,
    "gelu_new": _TANH,
    "gelu_fast": _TANH,
    "relu": ("Relu", {}),
}
"""transformers' name -> operator and attributes."""


def feed_forward(parts: Parts, i: int, x: ir.Value) -> ir.Value:
    """That of layer `i`, [T, hidden] to [T, hidden]."""
    match parts.spec.layers[i].feed_forward:
        case Mlp() as mlp if mlp.gated:
            inner = _gated(parts, i, x, mlp)
        case Mlp() as mlp:
            shape = (mlp.size, parts.spec.hidden_size)
            up = parts.linear(f"layers.{i}.mlp.up_proj", i, x, shape, mlp.bias)
            inner = _activation(parts, f"layers.{i}.mlp.act", up, mlp)
        case Experts() as experts:
            return _mixture(parts, i, x, experts)
    shape = (parts.spec.hidden_size, mlp.size)
    return parts.linear(f"layers.{i}.mlp.down_proj", i, inner, shape, mlp.bias)


def _gated(parts: Parts, i: int, x: ir.Value, mlp: Mlp) -> ir.Value:
    """activation(gate(x)) * up(x), gate and up in one product."""
    g, name = parts.g, f"layers.{i}.mlp"
    shape = (2 * mlp.size, parts.spec.hidden_size)
    product = f"{name}.gate_up_proj"
    # Adapters add to each half, unless the checkpoint has both in one module.
    is_one = len(parts.spec.names.of("gate_up_proj").split()) == 1
    both = (parts.linear if is_one else parts.base)(product, i, x, shape, mlp.bias)
    halves = g.integers("split.gate_up", mlp.size, mlp.size)
    outputs = (f"{name}.gate", f"{name}.up")
    gate, up = g.nodes("Split", f"{name}.split", (both, halves), outputs, axis=-1)
    if not is_one:
        gate, up = parts.adapted(product, i, x, shape, gate, up)
    return g.node("Mul", f"{name}.gated", _activation(parts, f"{name}.act", gate, mlp), up)


def _activation(parts: Parts, name: str, x: ir.Value, mlp: Mlp) -> ir.Value:
    op, attributes = ACTIVATIONS[mlp.activation]
    return parts.g.node(op, name, x, **attributes)


def _mixture(parts: Parts, i: int, x: ir.Value, experts: Experts) -> ir.Value:
    """The operator picks by the router's logits; its SwiGLU with alpha 1 and beta 0 is a gated
    MLP with silu, whose limit must lie beyond all activations."""
    g, name = parts.g, f"layers.{i}.mlp"
    logits = parts.linear(f"{name}.router", i, x, (experts.count, parts.spec.hidden_size), False)
    source = parts.source
    gate_up = g.initializer(source.experts_in(f"{name}.experts.gate_up_proj", i, experts))
    down = g.initializer(source.experts_out(f"{name}.experts.down_proj", i, experts))
    return g.node(
        "MoE",
        f"{name}.experts",
        *(x, logits, gate_up, None, down),
        k=experts.per_token,
        normalize_routing_weights=int(experts.normalize),
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        swiglu_limit=3.0e38,
    )
