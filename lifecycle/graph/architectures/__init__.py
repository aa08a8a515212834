"""From a Hugging Face `config.json` to a `DecoderSpec`: one short function per architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lifecycle.errors import CheckpointError, UnsupportedArchitectureError
from lifecycle.graph.architectures import cohere, gemma, gpt, llama, mixtures
from lifecycle.graph.fields import Fields
from lifecycle.graph.spec import DecoderSpec
from lifecycle.pipeline.suggest import did_you_mean

ARCHITECTURES: dict[str, Callable[[Fields], DecoderSpec]] = {
    "llama": llama.llama,
    "mistral": llama.mistral,
    "qwen2": llama.qwen2,
    "qwen3": llama.qwen3,
    "smollm3": llama.smollm3,
    "phi3": llama.phi3,
    "olmo2": llama.olmo2,
    "granite": llama.granite,
    "gemma2": gemma.gemma2,
    "gemma3_text": gemma.gemma3,
    "cohere2": cohere.cohere2,
    "gpt2": gpt.gpt2,
    "gpt_neox": gpt.gpt_neox,
    "stablelm": gpt.stablelm,
    "starcoder2": gpt.starcoder2,
    "mixtral": mixtures.mixtral,
    "qwen3_moe": mixtures.qwen3_moe,
}
"""`model_type` -> the function that reads its config."""


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
