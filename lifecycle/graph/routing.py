"""Which tokens a mixture hands to which of its experts, and what an expert makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lifecycle.graph.rounding import Floats


@dataclass(frozen=True, slots=True)
class Visits:
    """The tokens that one expert gets."""

    rows: Floats
    """What it reads of them, [tokens, in]."""
    shares: Floats
    """What its output for each is multiplied by, [tokens, 1]."""


@dataclass(frozen=True, slots=True)
class Routed:
    """What a mixture reads, a batch of texts after the other."""

    rows: Sequence[Floats]
    """[tokens, in]."""
    shares: Sequence[Floats]
    """What the output of each expert is multiplied by, [tokens, experts]; 0 for those that a token does not
    visit."""

    def visits(self, expert: int) -> Visits:
        """The tokens of one expert, and nothing of the others."""
        shares = [part[:, expert] for part in self.shares]
        here = [np.flatnonzero(part) for part in shares]

        def picked(parts: Sequence[Floats]) -> Floats:
            return np.concatenate([a[at] for a, at in zip(parts, here, strict=True)])

        return Visits(picked(self.rows), picked(shares)[:, None])

    def counts(self) -> NDArray[np.int64]:
        """How many tokens each expert gets, [experts]."""
        return np.sum([np.count_nonzero(part, axis=0) for part in self.shares], axis=0)


def routing_shares(logits: Floats, per_token: int, normalize: bool) -> Floats:
    """What the operator `MoE` multiplies the experts' outputs by, from a router's logits, [tokens, experts]
    both: their softmax, of the `per_token` best alone if `normalize`, and 0 for the others."""
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    best = np.argpartition(-odds, per_token - 1, axis=-1)[:, :per_token]
    kept = np.zeros_like(odds)
    np.put_along_axis(kept, best, np.take_along_axis(odds, best, axis=-1), axis=-1)
    return kept / (kept if normalize else odds).sum(axis=-1, keepdims=True)


def gated(rows: Floats, gate_up: Floats) -> Floats:
    """silu(gate) * up, [tokens, size], of rows [tokens, in] and weights [2 * size, in] whose rows take turns."""
    both: Floats = rows @ gate_up.T
    gate, up = both[:, 0::2], both[:, 1::2]
    # As tanh, which does not overflow.
    half = np.float32(0.5)
    silu: Floats = half * gate * (1 + np.tanh(half * gate))
    return silu * up
