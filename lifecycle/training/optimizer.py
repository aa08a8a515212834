"""AdamW, and its state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.optim import AdamW

from lifecycle.training.settings import LoopSettings

_BETAS = (0.9, 0.95)
"""As customary for language models (GPT-3, Llama)."""


def make_optimizer(weights: Iterable[nn.Parameter], settings: LoopSettings) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019) that decays matrices only."""
    weights = list(weights)
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
    ]
    # One pass over the memory instead of several; for small models the difference is overhead.
    return AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=_BETAS,
        fused=True,
    )


def step(
    optimizer: AdamW, weights: Iterable[nn.Parameter], tokens: int, rate: float, max_norm: float
) -> float:
    """Take one step along gradients that were summed over `tokens`, then clear them.

    Returns:
        The norm of the mean gradient before it was clipped. If it is not finite, the weights
        are as before.
    """
    weights = list(weights)
    for weight in weights:
        if weight.grad is not None:
            weight.grad.div_(tokens)
    norm = float(nn.utils.clip_grad_norm_(weights, max_norm))
    for group in optimizer.param_groups:
        group["lr"] = rate
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def state_tensors(optimizer: AdamW) -> dict[str, Tensor]:
    """The moments of every weight, as `{index}.{name}`."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": tensor for i in state for name, tensor in state[i].items()}


def restore(optimizer: AdamW, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `state_tensors` gave.

    Raises:
        ValueError: the tensors are not those of this optimiser's weights.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        # A copy, because tensors of a file do not start at the boundaries that fast code uses.
        state.setdefault(int(index), {})[name] = tensor.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
