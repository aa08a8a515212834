"""From a Hugging Face `config.json` to a `DecoderSpec`: one short function per architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lifecycle.errors import CheckpointError, UnsupportedArchitectureError
from lifecycle.graph.spec import DecoderSpec, LinearScaling, Llama3Scaling, Rope
from lifecycle.pipeline.suggest import did_you_mean

Config = Mapping[str, Any]

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


def read_spec(config: Config) -> DecoderSpec:
    """The spec of a decoder from its `config.json`, in the form of transformers 5 or older.

    Raises:
        UnsupportedArchitectureError: no function here knows the `model_type`.
        CheckpointError: a field is missing, or asks for what the graph cannot express.
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
    return ARCHITECTURES[name](config)


def llama(config: Config) -> DecoderSpec:
    """Llama 1 to 3.2 and models of its shape, such as SmolLM2."""
    attention_bias = bool(config.get("attention_bias", False))
    return replace(
        _common(config),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def mistral(config: Config) -> DecoderSpec:
    """Mistral 7B and later: Llama with a sliding window, of 4,096 tokens if not said."""
    return replace(_common(config), sliding_window=config.get("sliding_window", 4096))


def qwen2(config: Config) -> DecoderSpec:
    """Qwen 2 and 2.5: biases on queries, keys and values."""
    return replace(_common(config), qkv_bias=True, sliding_window=_qwen_window(config))


def qwen3(config: Config) -> DecoderSpec:
    """Qwen 3: queries and keys normalised per head; a head size of 128 if not said."""
    attention_bias = bool(config.get("attention_bias", False))
    return replace(
        _common({"head_dim": 128, **config}),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
        sliding_window=_qwen_window(config),
    )


ARCHITECTURES: dict[str, Callable[[Config], DecoderSpec]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
}
"""`model_type` -> the function that reads its config."""


def _common(config: Config) -> DecoderSpec:
    """What all of them share. Defaults are those of transformers, for fields that it leaves out."""
    heads = _number(config, "num_attention_heads")
    hidden = _number(config, "hidden_size")
    activation = config.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"config.json: hidden_act: unknown activation '{activation}'"
            f"{did_you_mean(str(activation), ACTIVATIONS)} (known: {', '.join(ACTIVATIONS)})"
        )
    return DecoderSpec(
        architecture=config["model_type"],
        vocab_size=_number(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_number(config, "intermediate_size"),
        num_layers=_number(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or hidden // heads,
        max_position_embeddings=_number(config, "max_position_embeddings"),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope=_rope(config),
        activation=activation,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def _number(config: Config, field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {field}: expected a positive integer, got {value!r}")
    return value


def _rope(config: Config) -> Rope:
    """Both spellings: `rope_parameters`, and the older `rope_theta` beside `rope_scaling`."""
    values: dict[str, Any] = {
        "rope_theta": config.get("rope_theta", 10_000.0),
        "partial_rotary_factor": config.get("partial_rotary_factor", 1.0),
        "original_max_position_embeddings": config.get("max_position_embeddings"),
        **(config.get("rope_scaling") or {}),
        **(config.get("rope_parameters") or {}),
    }
    kind = values.get("rope_type", values.get("type", "default"))
    if values["partial_rotary_factor"] not in (None, 1.0):
        raise CheckpointError(
            "config.json: partial_rotary_factor: only rotation of whole heads is supported, "
            f"got {values['partial_rotary_factor']}"
        )
    if kind not in _SCALINGS:
        raise CheckpointError(
            f"config.json: rope_type: unknown rotary scaling '{kind}'"
            f"{did_you_mean(str(kind), _SCALINGS)} (known: {', '.join(_SCALINGS)})"
        )
    try:
        return Rope(float(values["rope_theta"]), _SCALINGS[kind](values))
    except KeyError as error:
        raise CheckpointError(
            f"config.json: rope_parameters: {error} is missing for rope_type '{kind}'"
        ) from None


_SCALINGS: dict[str, Callable[[Config], LinearScaling | Llama3Scaling | None]] = {
    "default": lambda _: None,
    "linear": lambda values: LinearScaling(values["factor"]),
    "llama3": lambda values: Llama3Scaling(
        values["factor"],
        values["low_freq_factor"],
        values["high_freq_factor"],
        values["original_max_position_embeddings"],
    ),
}


def _qwen_window(config: Config) -> int | None:
    """The window of a Qwen model, which may be switched off or differ between layers."""
    window = config.get("sliding_window", 4096)
    if not config.get("use_sliding_window", False) or window is None:
        return None
    layers = _number(config, "num_hidden_layers")
    full = config.get("max_window_layers", 28)
    types = config.get("layer_types") or [
        "full_attention" if i < full else "sliding_attention" for i in range(layers)
    ]
    if len(set(types)) > 1:
        raise CheckpointError(
            "config.json: layer_types: layers with different kinds of attention are not supported"
        )
    return window if types[0] == "sliding_attention" else None
