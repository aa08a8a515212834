"""Merging an adapter into its base, with proof that the answers stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lifecycle.errors import StageError
from lifecycle.pipeline.artifact import Metrics
from lifecycle.training.model_folder import stored_dtype, write_tuned
from lifecycle.training.models import load_adapted, load_base

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}
"""Largest difference of logits, relative to the largest logit, that rounding explains."""
_PROBE_SHAPE = (2, 32)


def merge(model: Path, out: Path) -> Metrics:
    """Merge in float32, write in the type of the base's weights, and compare the logits of the
    written model with those of base and adapter, both computed in float32.

    Returns:
        `max_logit_diff`, and `max_logit_diff_relative` to the largest logit.

    Raises:
        StageError: the logits differ by more than rounding explains.
    """
    adapted = load_adapted(model)
    probe = _probe(adapted.config.vocab_size)
    expected = _logits(adapted, probe)
    write_tuned(cast("PreTrainedModel", adapted.merge_and_unload()), model, out)
    del adapted
    difference = float((_logits(load_base(out), probe) - expected).abs().max())
    relative = difference / float(expected.abs().max())
    bound = _TOLERANCE[stored_dtype(out)]
    if not relative <= bound:
        raise StageError(
            f"the merged model answers differently: its logits are off by {relative:.2g} of the "
            f"largest, more than the {bound:g} that rounding explains; adapters on tied "
            "embeddings cannot be merged: take embed_tokens and lm_head out of target_modules"
        )
    return {"max_logit_diff": difference, "max_logit_diff_relative": relative}


def _probe(vocab_size: int) -> Tensor:
    tokens = np.random.default_rng(0).integers(vocab_size, size=_PROBE_SHAPE)
    return torch.from_numpy(tokens)


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens, use_cache=False).logits.float()
