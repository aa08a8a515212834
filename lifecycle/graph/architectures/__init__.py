"""From a Hugging Face `config.json` to a `DecoderSpec`: one short function per architecture.

A function takes the `Fields` of a config and is found by its `model_type` in the entry-point
group `lifecycle.architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lifecycle.errors import CheckpointError, PluginError, UnsupportedArchitectureError
from lifecycle.graph.fields import Fields
from lifecycle.graph.spec import DecoderSpec
from lifecycle.pipeline.registry import ARCHITECTURES, load_function, names
from lifecycle.pipeline.suggest import did_you_mean


def read_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The spec of a decoder from its `config.json`, in the form of transformers 5 or older.

    Raises:
        UnsupportedArchitectureError: no function here knows the `model_type`.
        CheckpointError: a field is missing or wrong, or asks for what the graph cannot express.
    """
    name, known = str(config.get("model_type", "")), names(ARCHITECTURES)
    if name not in known:
        raise UnsupportedArchitectureError(
            f"config.json: model_type: unsupported architecture '{name}'"
            f"{did_you_mean(name, known)} (supported: {', '.join(known)})"
        )
    if config.get("quantization_config"):
        raise CheckpointError(
            "config.json: quantization_config: the weights are already quantised; "
            "start from the full-precision checkpoint"
        )
    spec = load_function(ARCHITECTURES, name)(Fields(config))
    if not isinstance(spec, DecoderSpec):
        raise PluginError(f"{ARCHITECTURES} '{name}' gave no DecoderSpec: {spec!r}")
    _require_sound(spec)
    return spec


def _require_sound(spec: DecoderSpec) -> None:
    """Refuse numbers that are fine by themselves and do not go together."""
    attention = spec.attention
    if attention.num_heads % attention.num_kv_heads:
        raise CheckpointError(
            f"config.json: num_key_value_heads: {attention.num_kv_heads} does not divide "
            f"num_attention_heads, {attention.num_heads}"
        )
    if attention.head_size < 2 or attention.head_size % 2:
        raise CheckpointError(
            f"config.json: head_dim: rotation needs an even head size, got {attention.head_size} "
            "(hidden_size / num_attention_heads where head_dim is not set)"
        )
    for rope in spec.ropes:
        with np.errstate(all="ignore"):
            last = rope.frequencies(attention.head_size) * np.float32(spec.max_position_embeddings)
        if not np.isfinite(last).all():
            raise CheckpointError(
                f"config.json: rope_parameters: {rope} gives angles that are not finite "
                f"within {spec.max_position_embeddings} positions"
            )
