"""Gemma 2 and 3, text models."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

from lifecycle.errors import CheckpointError
from lifecycle.graph.architectures.common import (
    FULL,
    SLIDING,
    mixed_layers,
    read_common,
    read_layer_types,
)
from lifecycle.graph.architectures.rotation import make_rope
from lifecycle.graph.fields import Fields
from lifecycle.graph.rope import Rope
from lifecycle.graph.spec import BlockNorms, DecoderSpec

_SANDWICH = BlockNorms(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def gemma2(fields: Fields) -> DecoderSpec:
    """Gemma 2: norms on both sides, soft caps, every other layer with a window."""
    fields = _named(fields).or_else(attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    spec = _gemma(fields)
    layer = spec.layers[0]
    types = read_layer_types(fields.or_else(sliding_window_pattern=2), "sliding_window_pattern")
    ropes = {FULL: layer.rope, SLIDING: layer.rope}
    return replace(spec, layers=mixed_layers(fields, types, layer.feed_forward, ropes))


def gemma3(fields: Fields) -> DecoderSpec:
    """Gemma 3: five layers with a window and a rotation of their own before each without."""
    fields = _named(fields).or_else(sliding_window_pattern=6)
    size = fields.integer("head_dim")
    ropes: dict[str, Rope | None] = {
        kind: make_rope(fields, rope, size) for kind, rope in _rope_fields(fields).items()
    }
    # The two rotations are read above, not as one for all layers.
    spec = _gemma(fields.without("rope_parameters", "rope_scaling"))
    types = read_layer_types(fields, "sliding_window_pattern")
    layers = mixed_layers(fields, types, spec.layers[0].feed_forward, ropes)
    return replace(spec, layers=layers, attention=replace(spec.attention, qk_norm="head"))


def _named(fields: Fields) -> Fields:
    fields.require("use_bidirectional_attention", False)
    # `hidden_act` is in published files too, and is not read.
    fields = fields.or_else(hidden_activation="gelu_pytorch_tanh")
    return fields.called(hidden_act="hidden_activation").or_else(
        num_key_value_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        tie_word_embeddings=True,
    )


def _gemma(fields: Fields) -> DecoderSpec:
    spec = read_common(fields)
    attention = replace(
        spec.attention,
        scale=fields.number("query_pre_attn_scalar") ** -0.5,
        softcap=fields.optional_number("attn_logit_softcapping"),
    )
    return replace(
        spec,
        attention=attention,
        norm=replace(spec.norm, plus_one=True),
        block_norms=_SANDWICH,
        embedding_scale=sqrt(spec.hidden_size),
        logit_softcap=fields.optional_number("final_logit_softcapping"),
    )


def _rope_fields(fields: Fields) -> dict[str, Fields]:
    """The fields of either rotation, whether they are written apart or, as before transformers
    5, as a base for each and one scaling for the layers without a window."""
    values = fields.values
    stored = values.get("rope_parameters") or {}
    if not isinstance(stored, dict):
        raise fields.wrong("rope_parameters", "an object")
    where = "config.json: rope_parameters"
    if stored and not {FULL, SLIDING} >= stored.keys():
        raise CheckpointError(f"{where}: expected {FULL} and {SLIDING}, got {', '.join(stored)}")
    found = {kind: Fields(stored.get(kind) or {}, f"{where}: {kind}") for kind in (FULL, SLIDING)}
    scaling = fields.section("rope_scaling")
    if scaling.values:
        merged = {**found[FULL].values, **scaling.values}
        found[FULL] = Fields(merged, scaling.where)
    bases = {
        FULL: values.get("rope_theta", 1_000_000.0),
        SLIDING: values.get("rope_local_base_freq", 10_000.0),
    }
    return {kind: rope.or_else(rope_theta=bases[kind]) for kind, rope in found.items()}
