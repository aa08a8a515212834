"""Llama and the models that changed a few things about it."""

from __future__ import annotations

from dataclasses import replace

from lifecycle.graph.architectures.common import (
    FULL,
    SLIDING,
    mixed_layers,
    read_common,
)
from lifecycle.graph.fields import Fields
from lifecycle.graph.spec import BlockNorms, DecoderSpec, Layer, TensorNames


def llama(fields: Fields) -> DecoderSpec:
    """Llama 1 to 3.3 and models of its shape, such as SmolLM2."""
    return read_common(fields)


def mistral(fields: Fields) -> DecoderSpec:
    """Mistral 7B and later: Llama with a window of 4,096 tokens if not said, or in some layers."""
    fields = fields.or_else(num_key_value_heads=8, sliding_window=4096)
    spec = read_common(fields)
    if types := fields.choices("layer_types", (FULL, SLIDING), len(spec.layers)):
        layer = spec.layers[0]
        ropes = {FULL: layer.rope, SLIDING: layer.rope}
        return replace(spec, layers=mixed_layers(fields, types, layer.feed_forward, ropes))
    return with_window(spec, fields.optional_integer("sliding_window"))


def qwen2(fields: Fields) -> DecoderSpec:
    """Qwen 2 and 2.5: biases on queries, keys and values."""
    spec = read_common(fields.or_else(num_key_value_heads=32))
    attention = replace(spec.attention, qkv_bias=True, o_bias=False)
    return replace(spec, attention=attention, layers=qwen_layers(fields, spec))


def qwen3(fields: Fields) -> DecoderSpec:
    """Qwen 3: queries and keys normalised per head; a head size of 128 if not said."""
    spec = read_common(fields.or_else(num_key_value_heads=32, head_dim=128))
    attention = replace(spec.attention, qk_norm="head")
    return replace(spec, attention=attention, layers=qwen_layers(fields, spec))


def smollm3(fields: Fields) -> DecoderSpec:
    """SmolLM3: every fourth layer sees no positions, and may have a window instead."""
    fields = fields.or_else(
        num_key_value_heads=4,
        tie_word_embeddings=True,
        rope_theta=2_000_000.0,
        sliding_window=None,
        no_rope_layer_interval=4,
    )
    spec = read_common(fields)
    every, count = fields.integer("no_rope_layer_interval"), len(spec.layers)
    rotated = fields.bits("no_rope_layers", count) or [(i + 1) % every > 0 for i in range(count)]
    types = [FULL if has_rope else SLIDING for has_rope in rotated]
    given = fields.choices("layer_types", (FULL, SLIDING), count) or ()
    if SLIDING in given and not fields.flag("use_sliding_window"):
        raise fields.wrong("layer_types", f"{FULL} in all layers where use_sliding_window is false")
    layers = qwen_layers(fields.or_else(layer_types=types), spec)
    return replace(
        spec,
        layers=tuple(
            layer if has_rope else replace(layer, rope=None)
            for layer, has_rope in zip(layers, rotated, strict=True)
        ),
    )


def phi3(fields: Fields) -> DecoderSpec:
    """Phi-3, 3.5 and 4-mini: fused matrices, and rotations for long texts."""
    rope = fields.section("rope_scaling").values or fields.section("rope_parameters").values
    if rope.get("rope_type", rope.get("type")) == "yarn":
        # What one release called its LongRoPE.
        longrope = {**rope, "rope_type": "longrope"}
        fields = replace(fields, values={**fields.values, "rope_scaling": longrope})
    fields = fields.or_else(rms_norm_eps=1e-5, original_max_position_embeddings=4096)
    spec = read_common(fields, partial_rotary=True)
    spec = with_window(spec, fields.optional_integer("sliding_window"))
    fused = {"qkv_proj": "self_attn.qkv_proj", "gate_up_proj": "mlp.gate_up_proj"}
    return replace(spec, names=TensorNames(changes=fused))


def olmo2(fields: Fields) -> DecoderSpec:
    """OLMo 2: norms behind attention and MLP, and over all queries and all keys."""
    spec = read_common(fields.or_else(rms_norm_eps=1e-5))
    return replace(
        spec,
        attention=replace(spec.attention, qk_norm="width"),
        block_norms=BlockNorms(
            None, "post_attention_layernorm", None, "post_feedforward_layernorm"
        ),
    )


def granite(fields: Fields) -> DecoderSpec:
    """Granite 3: Llama with factors on embedding, attention, residuals and logits."""
    fields = fields.or_else(
        embedding_multiplier=1.0,
        attention_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=1.0,
    )
    spec = read_common(fields)
    return replace(
        spec,
        attention=replace(spec.attention, scale=fields.number("attention_multiplier")),
        embedding_scale=fields.number("embedding_multiplier"),
        residual_scale=fields.number("residual_multiplier"),
        logit_scale=1 / fields.number("logits_scaling"),
    )


def with_window(spec: DecoderSpec, window: int | None) -> DecoderSpec:
    """The same window for all layers."""
    return replace(spec, layers=tuple(replace(layer, window=window) for layer in spec.layers))


def qwen_layers(fields: Fields, spec: DecoderSpec) -> tuple[Layer, ...]:
    """Layers with the window of a Qwen model, which may be switched off or differ."""
    fields = fields.or_else(sliding_window=4096, max_window_layers=28)
    count = len(spec.layers)
    types = fields.choices("layer_types", (FULL, SLIDING), count)
    window = fields.optional_integer("sliding_window")
    if not fields.flag("use_sliding_window") or window is None:
        return spec.layers
    if types is None:
        full = fields.integer("max_window_layers", least=0)
        types = [FULL if i < full else SLIDING for i in range(count)]
    first = spec.layers[0]
    return mixed_layers(fields, types, first.feed_forward, {FULL: first.rope, SLIDING: first.rope})
