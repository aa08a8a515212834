"""Opening models: local folders only, safetensors only, and never code from a model folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lifecycle.errors import CheckpointError

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "adapter"
"""The folder of the PEFT adapter beside the files of its base model."""


def quiet() -> None:
    """Keep transformers from drawing progress bars over those of the run."""
    transformers_logging.disable_progress_bar()


@contextmanager
def without_renaming_warnings() -> Iterator[None]:
    """Inside, PEFT may use an attribute of transformers' models by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        yield


def load_base(
    path: Path, dtype: torch.dtype | None = torch.float32, device: str = "cpu"
) -> PreTrainedModel:
    """The causal language model of a folder without its adapter, in evaluation mode.

    `dtype` None takes the type in which the weights are stored.

    Raises:
        CheckpointError: the folder holds no model that transformers can read without running
            code from the folder.
    """
    quiet()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype or "auto",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be opened as a language model: {error}") from error
    # The library's decorators hide from type checkers what `to` takes and returns.
    cast("torch.nn.Module", model).to(device)
    return cast("PreTrainedModel", model.eval())


def load_adapted(
    path: Path, dtype: torch.dtype | None = torch.float32, device: str = "cpu"
) -> PeftModel:
    """The model of a folder with its adapter on it, not merged, in evaluation mode.

    Raises:
        CheckpointError: as `load_base`, or the adapter does not fit the model.
    """
    from peft import PeftModel

    base = load_base(path, dtype, device)
    try:
        with without_renaming_warnings():
            adapted = PeftModel.from_pretrained(base, str(path / ADAPTER), local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / ADAPTER} does not fit its model: {error}") from error
    return adapted.eval()


def load_model(
    path: Path, dtype: torch.dtype | None = torch.float32, device: str = "cpu"
) -> PreTrainedModel:
    """The causal language model of a folder as it answers: with its adapter, if it has one.

    The adapter stays beside the weights, as in training, so that a merge can be measured
    against it.

    Raises:
        CheckpointError: as `load_base` and `load_adapted`.
    """
    if not (path / ADAPTER).is_dir():
        return load_base(path, dtype, device)
    return cast("PreTrainedModel", load_adapted(path, dtype, device).get_base_model())
