"""The settings that every kind of training shares."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from lifecycle.pipeline.stage import RUNTIME


class LoopSettings(BaseModel):
    """How long, how fast and where a training loop runs. Stages inherit these fields."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    epochs: int = Field(1, ge=1)
    """Passes over the training data."""
    steps: int | None = Field(None, ge=1)
    """Optimiser steps; replaces `epochs`."""
    batch_size: int = Field(8, ge=1)
    """Rows of `context_length` tokens per optimiser step."""
    context_length: int = Field(512, ge=8)
    """Tokens per row."""
    learning_rate: float = Field(1e-3, gt=0)
    """The highest learning rate, reached at the end of the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls to zero after the warm-up; `constant` keeps it."""
    warmup: float = Field(0.05, ge=0, le=1)
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decay of matrices; vectors such as norms and biases are not decayed."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    seed: int = Field(0, ge=0)
    """Of the first weights, the order of the data and dropout."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """What the model computes in; weights and optimiser stay in float32. `auto` is bfloat16
    where the host is fast at it."""
    evaluate_every: int | None = Field(None, ge=1)
    """Steps between losses on the test split; None takes one at the end."""
    evaluate_rows: int = Field(256, ge=1)
    """Most rows of the test split that a loss is taken of, evenly spread over it."""
    micro_batch_size: Annotated[int | None, RUNTIME] = Field(None, ge=1)
    """Rows computed at once; gradients of the others of a step are added up. None takes all."""
    save_seconds: Annotated[float, RUNTIME] = Field(20.0, ge=0)
    """Seconds between snapshots to resume from; more where writing one takes long."""
    device: Annotated[str, RUNTIME] = "auto"
    """`cpu`, `cuda:1`, …; `auto` is the accelerator of the host if there is one."""
    threads: Annotated[int | None, RUNTIME] = Field(None, ge=1)
    """Threads inside an operator; None leaves the choice to PyTorch."""
