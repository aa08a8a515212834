"""Configs become specs in both spellings; what cannot be expressed is refused by name."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lifecycle.errors import CheckpointError, UnsupportedArchitectureError
from lifecycle.graph.architectures import read_spec
from lifecycle.graph.rope import FactorScaling, LinearScaling, Llama3Scaling, YarnScaling
from lifecycle.pipeline.registry import ARCHITECTURES, names
from tests.graph.models import LLAMA3_ROPE, MODELS, SHAPE, make_model

LLAMA: dict[str, Any] = {"model_type": "llama", **SHAPE}


@pytest.mark.parametrize("name", MODELS)
def test_every_saved_config_is_read(name: str) -> None:
    config = json.loads(make_model(name).config.to_json_string(use_diff=False))
    spec = read_spec(config)
    assert spec.architecture == name.split("-")[0]
    assert spec.attention.num_heads == 4
    assert spec.attention.num_kv_heads == config.get("num_key_value_heads", 4)


def test_every_architecture_is_held_to_pytorch() -> None:
    """By tests/graph/test_builder.py, which takes all of `MODELS`."""
    assert {model_type for model_type, _ in MODELS.values()} == set(names(ARCHITECTURES))


def test_old_and_new_spellings_of_rope_are_equal() -> None:
    scaling = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}
    old = read_spec(LLAMA | {"rope_theta": 500.0, "rope_scaling": scaling})
    new = read_spec(LLAMA | {"rope_parameters": LLAMA3_ROPE})
    assert old == new
    assert old.ropes[0].theta == 500.0
    assert old.ropes[0].scaling == Llama3Scaling(4.0, 1.0, 4.0, 32)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": LLAMA3_ROPE, "rope_parameters": {"rope_theta": 9.0}},
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_theta": 9.0}},
        {"rope_scaling": LLAMA3_ROPE | {"rope_theta": 7.0}, "rope_theta": 9.0},
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"type": "linear", "rope_type": "default"}, "rope_theta": 9.0},
    ],
)
def test_of_two_spellings_of_rope_the_one_of_transformers_counts(changes: dict[str, Any]) -> None:
    wanted = LlamaConfig(**SHAPE | copy.deepcopy(changes)).rope_parameters
    assert read_spec(LLAMA | changes).ropes == read_spec(LLAMA | {"rope_parameters": wanted}).ropes


def test_older_scaling_says_type() -> None:
    spec = read_spec(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert spec.ropes[0].scaling == LinearScaling(2.0)


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama-llama3-rope",
        "llama-linear-rope",
        "llama-yarn-rope",
        "llama-yarn-factor",
        "llama-dynamic-rope",
    ],
)
def test_rope_tables_equal_transformers(name: str) -> None:
    config = make_model(name).config
    assert isinstance(config, LlamaConfig)
    spec = read_spec(json.loads(config.to_json_string(use_diff=False)))
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(128)[None])
    size = spec.attention.head_size
    for of, wanted in ((np.cos, cos), (np.sin, sin)):
        shape, rows = spec.ropes[0].table(of, 128, size)
        table = np.concatenate(list(rows))
        assert table.dtype == np.float32
        assert table.shape == shape == (128, size // 2)
        np.testing.assert_allclose(table, wanted[0, :, : size // 2], atol=2e-5)


def test_an_unknown_architecture_lists_the_known() -> None:
    with pytest.raises(
        UnsupportedArchitectureError, match=r"'qwen4'.*did you mean 'qwen[23]'.*llama"
    ):
        read_spec(LLAMA | {"model_type": "qwen4"})


def test_a_config_without_an_architecture_is_refused() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="model_type"):
        read_spec(SHAPE)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelo"}, r"hidden_act.*'gelo'.*did you mean 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarm", "factor": 2.0}}, r"rope_type.*'yarm'.*'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"'factor' is missing"),
        ({"rope_parameters": {"partial_rotary_factor": 0.1}}, r"partial_rotary_factor.*0\.1"),
        ({"rope_parameters": {"partial_rotary_factor": 1.5}}, r"partial_rotary_factor.*1\.5"),
        ({"num_hidden_layers": None}, r"num_hidden_layers.*None"),
        ({"vocab_size": "96"}, r"vocab_size.*'96'"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config"),
    ],
)
def test_what_cannot_be_expressed_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        read_spec(LLAMA | changes)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
GEMMA3 = {"model_type": "gemma3_text", "head_dim": 16}
MIXED = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"is_causal": False}, "is_causal: expected True"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor.*whole heads.*0\.5"),
        (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional"),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights: expected True"),
        ({"model_type": "starcoder2", "mlp_type": "gated"}, "mlp_type: expected 'default'"),
        ({"model_type": "smollm3", "layer_types": MIXED}, "layer_types.*use_sliding_window"),
        ({"model_type": "smollm3", "no_rope_layers": [2, 0]}, "no_rope_layers: .*0 or 1"),
        (
            {"model_type": "phi3", "rope_scaling": LONG | {"type": "su", "long_factor": [1]}},
            "long_factor",
        ),
        ({"model_type": "qwen3_moe", "num_experts": 4}, "num_experts_per_tok: .*at most"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [7]}, "mlp_only_layers: .*below 2"),
        ({"model_type": "mixtral", "hidden_act": "gelu"}, "hidden_act: expected one of silu"),
        ({"model_type": "gpt2", "n_inner": 0}, "n_inner: expected an integer from 1"),
        (GEMMA3 | {"rope_parameters": {"rope_theta": 9.0}}, "expected full_attention and"),
    ],
)
def test_what_would_be_another_model_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        read_spec(LLAMA | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"is_causal": None},
        GEMMA3 | {"use_bidirectional_attention": None, "attn_logit_softcapping": None},
        GEMMA3 | {"sliding_window_pattern": None, "layer_types": MIXED},
        {"model_type": "cohere2", "sliding_window_pattern": None, "layer_types": MIXED},
        {"model_type": "smollm3", "max_window_layers": None},
        {"model_type": "qwen3_moe", "max_window_layers": None, "num_experts": 8},
    ],
)
def test_null_is_as_good_as_absent(changes: dict[str, Any]) -> None:
    read_spec(LLAMA | changes)


def test_windows_are_those_of_transformers() -> None:
    def windows(**changes: Any) -> list[int | None]:
        return [layer.window for layer in read_spec(LLAMA | changes).layers]

    assert windows(model_type="mistral", layer_types=MIXED, sliding_window=9) == [None, 9]
    window = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}
    assert windows(model_type="qwen3_moe", num_experts=8, **window) == [9, 9]
    assert windows(model_type="qwen3", **window) == [None, None]
    gemma = {"sliding_window": 9, "num_hidden_layers": 6}
    assert windows(**GEMMA3, **gemma) == [9, 9, 9, 9, 9, None]


def test_phi3_calls_its_longrope_yarn() -> None:
    for name in ("type", "rope_type"):
        spec = read_spec(LLAMA | {"model_type": "phi3", "rope_scaling": LONG | {name: "yarn"}})
        assert spec.ropes[0].scaling == FactorScaling((1.0,) * 8)
    long = LONG | {"type": "longrope", "rope_type": "yarn"}
    changes = {"rope_scaling": long, "max_position_embeddings": 8192}
    assert read_spec(LLAMA | changes | {"model_type": "phi3"}).long_context == 4096


def test_the_original_context_beside_the_rotation_counts_more() -> None:
    spec = read_spec(LLAMA | {"original_max_position_embeddings": 64, "rope_scaling": YARN})
    assert spec.ropes[0].scaling == YarnScaling(4.0, 64)


def test_yarn_that_was_switched_on_by_hand_lengthens_the_context() -> None:
    spec = read_spec(LLAMA | {"rope_scaling": YARN, "max_position_embeddings": 32})
    assert spec.max_position_embeddings == 128


def test_names_that_only_look_like_fields_are_not_read() -> None:
    neox = {"model_type": "gpt_neox", "num_key_value_heads": None, "num_attention_heads": 4}
    spec = read_spec(LLAMA | neox | {"partial_rotary_factor": 0.5, "rope_theta": 5.0})
    assert (spec.ropes[0].size, spec.ropes[0].theta) == (4, 10_000.0)
    gemma = read_spec(LLAMA | GEMMA3 | {"hidden_act": "gelu"}).layers[0].feed_forward
    assert gemma.activation == "gelu_pytorch_tanh"
    moe = {"model_type": "qwen3_moe", "num_experts": 8}
    assert read_spec(LLAMA | moe).attention.head_size == 16


QWEN = {"model_type": "qwen2", "use_sliding_window": True}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rms_norm_eps": None}, "rms_norm_eps: expected a number, got None"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"rope_theta": None}, "rope_theta.*None"),
        ({"rope_theta": 0}, "rope_theta: expected a number above 0.*got 0"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 1e-37}}, "rope_parameters: .*not finite"),
        ({"rope_scaling": []}, r"rope_scaling: expected one object.*\[\]"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r"rope_scaling: rope_type.*\['linear'\]"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling: factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor.*'2'"),
        ({"rope_parameters": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "more than low_freq_factor"),
        ({"rope_parameters": {"full_attention": LLAMA3_ROPE}}, "rope_parameters: .*all layers"),
        ({"head_dim": 16.0}, r"head_dim.*16\.0"),
        ({"head_dim": 15}, "head_dim.*even.*15"),
        ({"hidden_size": 3}, "head_dim.*even.*0"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads.*'2'"),
        ({"num_key_value_heads": 3}, "3 does not divide num_attention_heads, 4"),
        ({"num_attention_heads": True}, "num_attention_heads.*True"),
        ({"max_position_embeddings": 10**13}, "max_position_embeddings.*10000000000000"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: expected true or false.*'false'"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window.*got 0"),
        ({"model_type": "mistral", "sliding_window": "4"}, "sliding_window.*'4'"),
        ({"model_type": "mistral", "sliding_window": 4.0}, r"sliding_window.*4\.0"),
        (QWEN | {"max_window_layers": None}, "max_window_layers.*None"),
        (QWEN | {"layer_types": ["chunked_attention"] * 2}, "layer_types.*sliding_attention"),
        (QWEN | {"layer_types": ["full_attention"]}, "layer_types: expected a list of 2"),
        (QWEN | {"layer_types": "full_attention"}, "layer_types"),
        (QWEN | {"layer_types": [{}, []]}, "layer_types"),
    ],
)
def test_a_wrong_value_is_named_with_its_field(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{named}"):
        read_spec(LLAMA | changes)


@pytest.mark.parametrize(("name", "heads"), [("llama", 64), ("mistral", 8), ("qwen3", 32)])
def test_each_architecture_has_its_own_default_of_heads(name: str, heads: int) -> None:
    config = LLAMA | {"model_type": name, "num_attention_heads": 64, "head_dim": 2}
    assert read_spec(config | {"num_key_value_heads": None}).attention.num_kv_heads == 64
    del config["num_key_value_heads"]
    assert read_spec(config).attention.num_kv_heads == heads


def test_defaults_are_those_of_transformers() -> None:
    assert read_spec(LLAMA | {"model_type": "mistral"}).layers[0].window == 4096
    assert read_spec(LLAMA | {"model_type": "qwen3"}).attention.head_size == 128
    assert read_spec(LLAMA | {"model_type": "qwen2"}).layers[0].window is None
