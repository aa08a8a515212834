"""New models: an architecture given by `model_type` and fields of its transformers config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lifecycle.errors import StageError
from lifecycle.pipeline.suggest import did_you_mean

_FROM_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


def new_config(architecture: Mapping[str, Any], tokens: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of a new model.

    Args:
        architecture: `model_type` and fields of the config class of that type.
        tokens: `vocab_size`, `bos_token_id`, `eos_token_id` and `pad_token_id`.

    Raises:
        StageError: an unknown type or field, or a value that the type refuses.
    """
    given = dict(architecture)
    name = str(given.pop("model_type", ""))
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or name not in CONFIG_MAPPING:
        raise StageError(
            f"architecture: model_type: no causal language model '{name}'"
            f"{did_you_mean(name, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}; "
            "it is a name of transformers, such as llama or qwen3"
        )
    config_class = cast("type[PreTrainedConfig]", CONFIG_MAPPING[name])
    known = {field.name for field in fields(config_class)}
    for key in given:
        if key in _FROM_TOKENIZER:
            raise StageError(f"architecture: {key}: the tokenizer decides it; take it out")
        if key not in known:
            raise StageError(
                f"architecture: {key}: no field of {config_class.__name__}{did_you_mean(key, known)}"
            )
    try:
        return config_class(**given, **tokens, dtype="float32")
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise StageError(f"architecture: {error}") from error


def new_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A model of random weights, the same for the same seed, in float32 on the CPU."""
    torch.manual_seed(seed)
    return cast("PreTrainedModel", AutoModelForCausalLM.from_config(config, dtype=torch.float32))
