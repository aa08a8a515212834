"""Cohere's Command R7B and later."""

from __future__ import annotations

from dataclasses import replace

from lifecycle.graph.architectures.common import (
    FULL,
    SLIDING,
    mixed_layers,
    read_common,
    read_layer_types,
)
from lifecycle.graph.architectures.rotation import read_rope
from lifecycle.graph.fields import Fields
from lifecycle.graph.spec import BlockNorms, DecoderSpec, Norm


def cohere2(fields: Fields) -> DecoderSpec:
    """Cohere 2: attention and MLP side by side behind one norm; three layers with a window that
    are rotated before each without one that is not."""
    fields = fields.or_else(
        layer_norm_eps=1e-5,
        logit_scale=0.0625,
        tie_word_embeddings=True,
        sliding_window=4096,
        sliding_window_pattern=4,
    )
    spec = read_common(fields)
    rope = read_rope(fields, spec.attention.head_size, interleaved=True)
    types = read_layer_types(fields, "sliding_window_pattern")
    ropes = {FULL: None, SLIDING: rope}
    return replace(
        spec,
        layers=mixed_layers(fields, types, spec.layers[0].feed_forward, ropes),
        norm=Norm(fields.number("layer_norm_eps"), "layer"),
        block_norms=BlockNorms(before_mlp=None),
        parallel=True,
        logit_scale=fields.number("logit_scale"),
    )
