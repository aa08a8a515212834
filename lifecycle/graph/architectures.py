"""From a Hugging Face `config.json` to a `DecoderSpec`: one short function per architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lifecycle.errors import CheckpointError, UnsupportedArchitectureError
from lifecycle.graph.fields import Fields
from lifecycle.graph.spec import DecoderSpec, LinearScaling, Llama3Scaling, Rope
from lifecycle.pipeline.suggest import did_you_mean

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


FULL, SLIDING = "full_attention", "sliding_attention"


def read_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The spec of a decoder from its `config.json`, in the form of transformers 5 or older.

    Raises:
        UnsupportedArchitectureError: no function here knows the `model_type`.
        CheckpointError: a field is missing or wrong, or asks for what the graph cannot express.
    """
    name = str(config.get("model_type", ""))
    if name not in ARCHITECTURES:
        raise UnsupportedArchitectureError(
            f"config.json: model_type: unsupported architecture '{name}'"
            f"{did_you_mean(name, ARCHITECTURES)} (supported: {', '.join(sorted(ARCHITECTURES))})"
        )
    if config.get("quantization_config"):
        raise CheckpointError(
            "config.json: quantization_config: the weights are already quantised; "
            "start from the full-precision checkpoint"
        )
    spec = ARCHITECTURES[name](Fields(config))
    _require_sound(spec)
    return spec


def llama(fields: Fields) -> DecoderSpec:
    """Llama 1 to 3.2 and models of its shape, such as SmolLM2."""
    attention_bias = fields.flag("attention_bias")
    return replace(
        _common(fields),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias"),
    )


def mistral(fields: Fields) -> DecoderSpec:
    """Mistral 7B and later: Llama with a sliding window, of 4,096 tokens if not said."""
    fields = fields.or_else(num_key_value_heads=8, sliding_window=4096)
    return replace(_common(fields), sliding_window=fields.optional_integer("sliding_window"))


def qwen2(fields: Fields) -> DecoderSpec:
    """Qwen 2 and 2.5: biases on queries, keys and values."""
    fields = fields.or_else(num_key_value_heads=32)
    return replace(_common(fields), qkv_bias=True, sliding_window=_qwen_window(fields))


def qwen3(fields: Fields) -> DecoderSpec:
    """Qwen 3: queries and keys normalised per head; a head size of 128 if not said."""
    fields = fields.or_else(num_key_value_heads=32, head_dim=128)
    attention_bias = fields.flag("attention_bias")
    return replace(
        _common(fields),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
        sliding_window=_qwen_window(fields),
    )


ARCHITECTURES: dict[str, Callable[[Fields], DecoderSpec]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
}
"""`model_type` -> the function that reads its config."""


def _common(fields: Fields) -> DecoderSpec:
    """What all of them share. Defaults are those of transformers, for fields that it leaves out;
    those that differ between architectures are set by their functions."""
    fields = fields.or_else(hidden_act="silu", rms_norm_eps=1e-6)
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    return DecoderSpec(
        architecture=fields.values["model_type"],
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.optional_integer("num_key_value_heads") or heads,
        head_size=fields.optional_integer("head_dim") or hidden // heads,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        norm_eps=fields.number("rms_norm_eps"),
        rope=_rope(fields),
        activation=fields.choice("hidden_act", ACTIVATIONS),
        tied_embeddings=fields.flag("tie_word_embeddings"),
    )


def _require_sound(spec: DecoderSpec) -> None:
    """Refuse numbers that are fine by themselves and do not go together."""
    if spec.num_heads % spec.num_kv_heads:
        raise CheckpointError(
            f"config.json: num_key_value_heads: {spec.num_kv_heads} does not divide "
            f"num_attention_heads, {spec.num_heads}"
        )
    if spec.head_size < 2 or spec.head_size % 2:
        raise CheckpointError(
            f"config.json: head_dim: rotation needs an even head size, got {spec.head_size} "
            "(hidden_size / num_attention_heads where head_dim is not set)"
        )
    with np.errstate(all="ignore"):
        last = spec.rope.frequencies(spec.head_size) * np.float32(spec.max_position_embeddings)
    if not np.isfinite(last).all():
        raise CheckpointError(
            f"config.json: rope_parameters: {spec.rope} gives angles that are not finite "
            f"within {spec.max_position_embeddings} positions"
        )


def _rope(fields: Fields) -> Rope:
    """Both spellings, the older `rope_scaling` before `rope_parameters`: so does transformers,
    whose files have a `rope_parameters` even where a `rope_scaling` was added by hand."""
    scaling, parameters = fields.section("rope_scaling"), fields.section("rope_parameters")
    rope = (scaling if scaling.values else parameters).or_else(
        rope_theta=fields.values.get("rope_theta", 10_000.0),
        partial_rotary_factor=fields.values.get("partial_rotary_factor"),
        original_max_position_embeddings=fields.integer("max_position_embeddings"),
    )
    rope = rope.or_else(rope_type=rope.values.get("type", "default"))
    if rope.values["partial_rotary_factor"] not in (None, 1.0):
        raise rope.wrong("partial_rotary_factor", "1.0: only whole heads can be rotated")
    kind = rope.choice("rope_type", _SCALINGS)
    return Rope(rope.number("rope_theta"), _SCALINGS[kind](rope))


def _llama3(rope: Fields) -> Llama3Scaling:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise rope.wrong("high_freq_factor", f"more than low_freq_factor, {low}")
    original = rope.integer("original_max_position_embeddings")
    return Llama3Scaling(rope.number("factor"), low, high, original)


_SCALINGS: dict[str, Callable[[Fields], LinearScaling | Llama3Scaling | None]] = {
    "default": lambda _: None,
    "linear": lambda rope: LinearScaling(rope.number("factor")),
    "llama3": _llama3,
}


def _qwen_window(fields: Fields) -> int | None:
    """The window of a Qwen model, which may be switched off or differ between layers."""
    fields = fields.or_else(sliding_window=4096, max_window_layers=28)
    layers = fields.integer("num_hidden_layers")
    types = fields.choices("layer_types", (FULL, SLIDING), layers)
    window = fields.optional_integer("sliding_window")
    if not fields.flag("use_sliding_window") or window is None:
        return None
    full = fields.integer("max_window_layers", least=0)
    types = types or [FULL if i < full else SLIDING for i in range(layers)]
    if len(set(types)) > 1:
        raise CheckpointError(
            "config.json: layer_types: layers with different kinds of attention are not supported"
        )
    return window if types[0] == SLIDING else None
