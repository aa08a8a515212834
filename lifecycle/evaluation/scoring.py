"""Perplexity of models, and the agreement of a model with its reference, from logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BLOCK_VALUES = 1 << 22
"""Log-probabilities held at once per model: 32 MiB, so that a vocabulary of 150,000 and a long
sample do not ask for gigabytes."""


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural log-probabilities along the last axis, in float64."""
    with np.errstate(invalid="ignore"):
        shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@dataclass
class TokenLoss:
    """The negative log-likelihood of the scored tokens so far, in nats."""

    total: float = 0.0
    tokens: int = 0

    def add(self, log_probs: NDArray[np.float64], targets: NDArray[np.int64]) -> None:
        """Score `targets` [n] by the `log_probs` [n, vocab_size] that predicted them."""
        self.total -= float(log_probs[np.arange(len(targets)), targets].sum())
        self.tokens += len(targets)

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.total / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood per scored token.

        Scored are the supervised tokens of a conversation, that is the answers with their
        end-of-turn tokens, or all tokens of a text but the first of each window.
        """
        with np.errstate(over="ignore"):
            return float(np.exp(self.mean))


@dataclass
class Agreement:
    """How far a model's next-token distributions are from its reference's, so far."""

    positions: int = 0
    same_top: int = 0
    kl_total: float = 0.0
    logit_max_diff: float = 0.0

    def add_distributions(self, model: NDArray[np.float64], reference: NDArray[np.float64]) -> None:
        """Compare log-probabilities [n, vocab_size] of the same positions."""
        self.positions += len(model)
        self.same_top += int((model.argmax(axis=-1) == reference.argmax(axis=-1)).sum())
        self.kl_total += float((np.exp(reference) * (reference - model)).sum())

    def add_logits(self, model: NDArray[np.float32], reference: NDArray[np.float32]) -> None:
        """Compare logits [n, vocab_size] of the same positions."""
        with np.errstate(invalid="ignore"):
            worst = np.abs(model - reference).max()
        self.logit_max_diff = float(np.maximum(self.logit_max_diff, worst))

    @property
    def top1(self) -> float:
        """Share of positions where both models like the same token best."""
        return self.same_top / self.positions

    @property
    def kl(self) -> float:
        """Mean Kullback-Leibler divergence of the model from its reference, in nats:
        the sum over tokens of p_reference · ln(p_reference / p_model)."""
        return self.kl_total / self.positions


class Scorer:
    """Running sums over samples, so that no more than one sample's logits are ever held.

    The first model is the one under evaluation; a second one is its reference.
    """

    def __init__(self, models: int) -> None:
        self.losses = [TokenLoss() for _ in range(models)]
        self.agreement = Agreement()

    def add(self, targets: NDArray[np.int64], logits: Sequence[NDArray[np.float32]]) -> None:
        """Score `targets` [n] by each model's `logits` [n, vocab_size] that predicted them."""
        for rows in _blocks(*logits[0].shape):
            blocks = [log_softmax(model[rows]) for model in logits]
            for loss, block in zip(self.losses, blocks, strict=True):
                loss.add(block, targets[rows])
            if len(logits) == 2:
                self.agreement.add_distributions(*blocks)
                self.agreement.add_logits(logits[0][rows], logits[1][rows])


def _blocks(rows: int, vocab_size: int) -> Iterator[slice]:
    size = max(1, _BLOCK_VALUES // vocab_size)
    return (slice(start, start + size) for start in range(0, rows, size))
