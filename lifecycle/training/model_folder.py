"""Writing model folders: new weights beside the other files of the model that was tuned."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from lifecycle.pipeline.artifact import walk_files
from lifecycle.pipeline.files import link_file
from lifecycle.training.models import ADAPTER, quiet

TRAINING = "training.json"
"""What a training says about itself: the digest of its chat template."""
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def stored_dtype(folder: Path) -> torch.dtype:
    """The type of the first matrix of a model folder's weights; float32 for anything but the
    usual three."""
    file = sorted(folder.glob("*.safetensors"))[0]
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a mapping)
            part = tensors.get_slice(name)
            if len(part.get_shape()) > 1:
                return _DTYPES.get(part.get_dtype(), torch.float32)
    return torch.float32


def write_new(model: PreTrainedModel, out: Path) -> None:
    """Write config, generation config and weights."""
    quiet()
    model.save_pretrained(out)


def write_tuned(model: PreTrainedModel, base: Path, out: Path) -> None:
    """Write the weights of `model` in the type of `base`'s, and link all other files of `base`
    but its adapter."""
    cast("nn.Module", model).to(stored_dtype(base))
    write_new(model, out)
    link_other_files(base, out)


def link_other_files(base: Path, out: Path) -> None:
    """Link the files of a model folder that are neither weights nor an adapter, in place of
    those that are there."""
    for source in walk_files(base):
        name = source.relative_to(base)
        if not is_weights(source) and ADAPTER not in name.parts:
            (out / name).unlink(missing_ok=True)
            link_file(source, out / name)


def is_weights(path: Path) -> bool:
    """Whether a file is a shard of safetensors, or the index of the shards."""
    return path.name.endswith((".safetensors", ".safetensors.index.json"))
