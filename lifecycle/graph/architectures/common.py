"""What the architectures have in common: the fields that most configs share."""

from __future__ import annotations

from collections.abc import Sequence

from lifecycle.graph.architectures.rotation import read_rope
from lifecycle.graph.feed_forward import ACTIVATIONS
from lifecycle.graph.fields import LARGEST, Fields
from lifecycle.graph.rope import Rope, YarnScaling
from lifecycle.graph.spec import Attention, DecoderSpec, Experts, Layer, Mlp, Norm

FULL, SLIDING = "full_attention", "sliding_attention"


def read_common(fields: Fields, partial_rotary: bool = False) -> DecoderSpec:
    """A decoder like Llama's from the fields that most configs share. Defaults are those of
    transformers, for fields that it leaves out; what differs between architectures is set by
    their functions. `partial_rotary`: whether they may rotate a part of each head."""
    fields.require("is_causal", True)
    fields.require("per_layer_config", None)
    fields = fields.or_else(hidden_act="silu", rms_norm_eps=1e-6)
    attention = read_attention(fields)
    mlp = Mlp(
        fields.integer("intermediate_size"),
        fields.choice("hidden_act", ACTIVATIONS),
        bias=fields.flag("mlp_bias"),
    )
    rope = read_rope(fields, attention.head_size, partial=partial_rotary)
    layer = Layer(mlp, rope)
    return DecoderSpec(
        architecture=fields.values["model_type"],
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        max_position_embeddings=_positions(fields, rope),
        layers=(layer,) * fields.integer("num_hidden_layers"),
        attention=attention,
        norm=Norm(fields.number("rms_norm_eps")),
        tied_embeddings=fields.flag("tie_word_embeddings"),
    )


def read_attention(fields: Fields) -> Attention:
    """Heads, and biases by `attention_bias`."""
    heads = fields.integer("num_attention_heads")
    bias = fields.flag("attention_bias")
    return Attention(
        num_heads=heads,
        num_kv_heads=fields.optional_integer("num_key_value_heads") or heads,
        head_size=fields.optional_integer("head_dim") or fields.integer("hidden_size") // heads,
        qkv_bias=bias,
        o_bias=bias,
    )


def _positions(fields: Fields, rope: Rope) -> int:
    """The longest text. YaRN is often switched on by a `rope_scaling` alone, which leaves
    `max_position_embeddings` as it was before."""
    positions = fields.integer("max_position_embeddings")
    if isinstance(rope.scaling, YarnScaling):
        stretched = rope.scaling.factor * rope.scaling.original_max_position_embeddings
        return max(positions, min(int(stretched), LARGEST))
    return positions


def read_layer_types(fields: Fields, period: str) -> list[str]:
    """Whether each layer is `SLIDING` or `FULL`: as `layer_types` says, else every layer slides
    but the last of each so many as the field `period` says."""
    layers = fields.integer("num_hidden_layers")
    if types := fields.choices("layer_types", (FULL, SLIDING), layers):
        return types
    every = fields.integer(period)
    return [SLIDING if (i + 1) % every else FULL for i in range(layers)]


def mixed_layers(
    fields: Fields, types: Sequence[str], feed_forward: Mlp | Experts, ropes: dict[str, Rope | None]
) -> tuple[Layer, ...]:
    """Layers with and without a window, each kind with its rotation."""
    window = fields.integer("sliding_window") if SLIDING in types else None
    return tuple(
        Layer(feed_forward, ropes[kind], window if kind == SLIDING else None) for kind in types
    )
