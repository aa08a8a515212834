"""From logits to the next token of each request.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p; each
works on what the one before it left. A request draws one random number per token from its
own generator, so its tokens depend on its seed alone and not on its neighbours.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.base import SamplingParams

Floats = NDArray[np.float32]
Ids = NDArray[np.intp]

_GREEDY_BELOW = 1e-5
"""A temperature below this divides a float32 into infinities; the limit it tends to is greedy."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The next token of a request, with its log-probability where that was asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Sampler:
    """How one request chooses: its parameters, its random numbers, the tokens it has seen."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab_size: int) -> None:
        self.params = params
        self.is_greedy = params.temperature < _GREEDY_BELOW
        self.is_penalised = params.repetition_penalty != 1.0
        seed = secrets.randbits(64) if params.seed is None else params.seed % 2**64
        self._random = np.random.Generator(np.random.Philox(seed))
        self._seen = np.zeros(vocab_size if self.is_penalised else 0, dtype=np.bool_)
        if self.is_penalised:
            self._seen[np.asarray(prompt)] = True

    def choose(self, logits: Floats) -> int:
        """A token for finite-topped `logits` [vocab_size], which are left as they are."""
        if self.is_penalised:
            logits = _penalise(logits, self._seen, self.params.repetition_penalty)
        if self.is_greedy:
            token = int(logits.argmax())
        else:
            ids, weights = candidates(logits, self.params)
            token = int(ids[_draw(weights, self._random.random())])
        if self.is_penalised:
            self._seen[token] = True
        return token


def sample(logits: Floats, samplers: Sequence[Sampler]) -> list[Choice | None]:
    """The next token of each row of `logits` [len(samplers), vocab_size].

    None stands for a row that has NaN or +inf in it, or nothing but -inf.
    """
    # One pass over the logits serves greedy rows and the check: argmax finds NaN first.
    best = logits.argmax(axis=1)
    usable = np.isfinite(logits[np.arange(len(best)), best])
    # Masked logits near the lowest float may overflow to -inf, which is what they mean.
    with np.errstate(over="ignore"):
        return [
            _choose(row, sampler, token) if ok else None
            for row, sampler, token, ok in zip(
                logits, samplers, best.tolist(), usable.tolist(), strict=True
            )
        ]


def candidates(logits: Floats, params: SamplingParams) -> tuple[Ids, Floats]:
    """The tokens that the filters leave, and their weights (not normalised).

    `logits` are [vocab_size], already penalised, with a finite maximum.
    """
    weights = np.exp((logits - logits.max()) / np.float32(params.temperature))
    ids = np.arange(len(weights))
    if 0 < params.top_k < len(ids):
        ids = ids[_top_k(weights, params.top_k)]
    if params.top_p < 1.0:
        ids = ids[_top_p(weights[ids], params.top_p)]
    if params.min_p > 0.0:
        # The largest weight is exp(0) = 1 and no filter removes it.
        ids = ids[weights[ids] >= params.min_p]
    return ids, weights[ids]


def _choose(logits: Floats, sampler: Sampler, best: int) -> Choice:
    params = sampler.params
    is_plain = sampler.is_greedy and not sampler.is_penalised
    token = best if is_plain else sampler.choose(logits)
    return Choice(token) if params.logprobs is None else _report(logits, token, params.logprobs)


def _penalise(logits: Floats, seen: NDArray[np.bool_], penalty: float) -> Floats:
    factor = np.float32(penalty)
    penalised = np.where(logits > 0, logits / factor, logits * factor)
    return np.where(seen, penalised, logits)


def _top_k(weights: Floats, k: int) -> Ids:
    """Indices of the k largest; among equals the lower index stays."""
    least = np.partition(weights, -k)[-k]
    above = np.flatnonzero(weights > least)
    level = np.flatnonzero(weights == least)[: k - len(above)]
    return np.concatenate([above, level])


def _top_p(weights: Floats, top_p: float) -> Ids:
    """Indices of the fewest largest whose share is at least `top_p`, largest first."""
    total = float(weights.sum(dtype=np.float64))
    # All weights below (1 - p) / n of the total have less than 1 - p of it together, so the
    # nucleus lies among the others: a few hundred to sort instead of a whole vocabulary.
    likely = np.flatnonzero(weights >= np.float32((1.0 - top_p) * total / len(weights)))
    order = likely[np.argsort(-weights[likely], kind="stable")]
    share = np.cumsum(weights[order], dtype=np.float64)
    return order[: int(np.searchsorted(share, top_p * total)) + 1]


def _draw(weights: Floats, uniform: float) -> int:
    """The index at which the running sum of `weights` passes `uniform` in [0, 1) of the total."""
    share = np.cumsum(weights, dtype=np.float64)
    index = int(np.searchsorted(share, uniform * float(share[-1]), side="right"))
    return min(index, len(share) - 1)


def _report(logits: Floats, token: int, count: int) -> Choice:
    """`token` with the model's own log-probabilities: before penalty, temperature and filters."""
    shifted = logits - logits.max()
    logprobs = shifted - np.log(np.exp(shifted).sum(dtype=np.float64))
    top = _top_k(logits, count) if count else np.empty(0, dtype=np.intp)
    ranked = top[np.argsort(-logprobs[top], kind="stable")]
    pairs = zip(ranked.tolist(), logprobs[ranked].tolist(), strict=True)
    return Choice(token, float(logprobs[token]), tuple(pairs))
