"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from lifecycle.training.settings import LoopSettings


def learning_rate(step: int, total: int, settings: LoopSettings) -> float:
    """The learning rate of a step, counted from 0, of a training of `total` steps.

    It rises linearly to `settings.learning_rate` in the warm-up and then falls to zero, which
    the step after the last one would reach.
    """
    warmup = round(settings.warmup * total)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    match settings.schedule:
        case "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            factor = 1 - progress
        case "constant":
            factor = 1.0
    return settings.learning_rate * factor
