"""Configs become specs in both spellings; what cannot be expressed is refused by name."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lifecycle.errors import CheckpointError, UnsupportedArchitectureError
from lifecycle.graph.architectures import read_spec
from lifecycle.graph.spec import LinearScaling, Llama3Scaling
from tests.graph.models import LLAMA3_ROPE, MODELS, SHAPE

LLAMA: dict[str, Any] = {"model_type": "llama", **SHAPE}


@pytest.mark.parametrize("name", MODELS)
def test_every_saved_config_is_read(name: str) -> None:
    config = json.loads(MODELS[name]().config.to_json_string(use_diff=False))
    spec = read_spec(config)
    assert spec.architecture == name.split("-")[0]
    assert (spec.num_heads, spec.num_kv_heads) == (4, config["num_key_value_heads"])


def test_old_and_new_spellings_of_rope_are_equal() -> None:
    scaling = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}
    old = read_spec(LLAMA | {"rope_theta": 500.0, "rope_scaling": scaling})
    new = read_spec(LLAMA | {"rope_parameters": LLAMA3_ROPE})
    assert old == new
    assert old.rope.theta == 500.0
    assert old.rope.scaling == Llama3Scaling(4.0, 1.0, 4.0, 32)


def test_older_scaling_says_type() -> None:
    spec = read_spec(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert spec.rope.scaling == LinearScaling(2.0)


@pytest.mark.parametrize("name", ["llama", "llama-llama3-rope", "llama-linear-rope"])
def test_rope_tables_equal_transformers(name: str) -> None:
    config = MODELS[name]().config
    spec = read_spec(json.loads(config.to_json_string(use_diff=False)))
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(128)[None])
    found = spec.rope.tables(128, spec.head_size)
    for table, wanted in zip(found, (cos, sin), strict=True):
        assert table.dtype == np.float32
        np.testing.assert_allclose(table, wanted[0, :, : spec.head_size // 2], atol=2e-5)


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
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, r"rope_type.*'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"'factor' is missing"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor.*0\.5"),
        ({"num_hidden_layers": None}, r"num_hidden_layers.*None"),
        ({"vocab_size": "96"}, r"vocab_size.*'96'"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
            r"layer_types",
        ),
    ],
)
def test_what_cannot_be_expressed_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        read_spec(LLAMA | changes)


def test_defaults_are_those_of_transformers() -> None:
    assert read_spec(LLAMA | {"model_type": "mistral"}).sliding_window == 4096
    assert read_spec(LLAMA | {"model_type": "qwen3"}).head_size == 128
    assert read_spec(LLAMA | {"model_type": "qwen2"}).sliding_window is None
