"""From logits to the next token of each request.

The order is that of transformers: penalties (see `penalties`), temperature, top-k, top-p, min-p,
typical-p; each works on what the one before it left. A request draws one random number per token from its
own generator, so its tokens depend on its seed alone and not on its neighbours.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Sequence
from math import isfinite, log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.penalties import Adjustments
from lifecycle.engines.requests import Constraint, SamplingParams
from lifecycle.errors import RequestError

Floats = NDArray[np.float32]
Place = tuple[int, int]
"""The addresses of a row of logits and of its columns (see `Scan`)."""

_GREEDY_BELOW = 1e-5
"""A temperature below this divides a float32 into infinities; the limit it tends to is greedy."""

_BLOCK, _COLUMN, _FEW = 256, 64, 1024
_HUGE = np.float32(3e38)
_AT_ONCE = 32
"""Random numbers that are made together: one at a time takes ten times as long."""


class Scan(NamedTuple):
    """The logits of some rows, and what one pass over them has found."""

    logits: Floats
    """[n, vocab_size]."""
    best: list[int]
    """The most likely token of each row."""
    tops: list[float]
    """Its logit: NaN or +inf where the row has one, -inf where it has nothing else."""
    columns: Floats | None = None
    """The largest of each so many neighbours, [n, columns], where a kernel draws that needs them."""
    first: Place = (0, 0)
    """Of the first row, if there are columns."""

    def place(self, at: int) -> Place | None:
        """Where a kernel finds a row and its columns."""
        if self.columns is None:
            return None
        logits, columns = self.first
        return logits + at * self.logits.strides[0], columns + at * self.columns.strides[0]


class Passes(NamedTuple):
    """How a step goes over its logits."""

    scan: Callable[[Floats], Scan]
    """As `scan`."""
    draw: Callable[[Floats, SamplingParams, float, Place | None], int]
    """As `draw_token`; the last argument is the row's place in a `Scan`, if its logits are as they were."""
    mask: Callable[[Floats, NDArray[np.bool_]], tuple[Floats, int]]
    """`masked`, whose memory the next one may take, and the first of the largest."""


class Choice(NamedTuple):
    """The next token of a request, with its log-probability where that was asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Sampler:
    """How one request chooses: its parameters, its random numbers, the tokens it has seen."""

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocab_size: int,
        ends: frozenset[int] = frozenset(),
        constraint: Constraint | None = None,
        passes: Passes | None = None,
    ) -> None:
        """`ends` are the tokens that would end the request, `passes` are `NUMPY` if None."""
        self.params = params
        self._passes = passes or NUMPY
        self._constraint = constraint
        self.is_greedy = params.temperature < _GREEDY_BELOW
        is_adjusted = Adjustments.asked_for(params)
        self._adjust = Adjustments(params, prompt, vocab_size, ends) if is_adjusted else None
        self.is_plain = self.is_greedy and self._adjust is None and constraint is None
        seed = secrets.randbits(64) if params.seed is None else params.seed % 2**64
        self._random = np.random.Generator(np.random.Philox(seed))
        self._drawn = deque[float]()
        """Random numbers of the next tokens, as far as they were looked at."""

    def choose(self, logits: Floats, place: Place | None = None) -> int | None:
        """A token for finite-topped `logits` [vocab_size], which are left as they are; None if the
        adjustments leave none that can come. `place` is that of a `Scan`."""
        if self._adjust is not None:
            logits = self._adjust.apply(logits)
        is_changed, best = self._adjust is not None or self._constraint is not None, 0
        if self._constraint is not None:
            logits, best = self._passes.mask(logits, self._constraint.mask())
        elif is_changed or self.is_greedy:
            best = int(logits.argmax())
        if is_changed and not isfinite(logits[best]):
            return None
        if self.is_greedy:
            token = best
        else:
            token = self._passes.draw(
                logits, self.params, self._uniform(), None if is_changed else place
            )
            self._drawn.popleft()
        if self._constraint is not None:
            self._constraint.accept(token)
        self._note(token)
        return token

    def propose(self, logits: Floats, ahead: int) -> int | None:
        """What would be chosen by the `logits` [vocab_size] of a draft model, `ahead` tokens after the next
        one: by the random number of that place and the adjustments of this one, and without the constraint.
        None if they are not finite, or nothing could come."""
        with np.errstate(over="ignore"):
            if self._adjust is not None:
                logits = self._adjust.apply(logits)
            best = int(logits.argmax())
            if not isfinite(logits[best]):
                return None
            if self.is_greedy:
                return best
            return self._passes.draw(logits, self.params, self._uniform(ahead), None)

    def _uniform(self, ahead: int = 0) -> float:
        """The random number in [0, 1) of the token `ahead` places after the next one."""
        while len(self._drawn) <= ahead:
            self._drawn.extend(self._random.random(_AT_ONCE).tolist())
        return self._drawn[ahead]

    def note(self, token: int) -> None:
        """Take note of a token that came without being chosen."""
        if self._constraint is not None:
            self._constraint.accept(token)
        self._note(token)

    def _note(self, token: int) -> None:
        if self._adjust is not None:
            self._adjust.note(token)


def choose(rows: Scan, at: int, sampler: Sampler) -> Choice | None:
    """The next token by one of the rows.

    None stands for logits with NaN or +inf among them, or nothing but -inf. Masked logits near the lowest float may
    overflow to -inf, which is what they mean: the caller sees to it that numpy does not warn of that.

    Raises:
        RequestError: what the request asks for leaves no token that may come.
    """
    best = rows.best[at]
    if not isfinite(rows.tops[at]):
        return None
    count = sampler.params.logprobs
    if sampler.is_plain and count is None:
        return Choice(best)
    logits = rows.logits[at]
    token = best if sampler.is_plain else sampler.choose(logits, rows.place(at))
    if token is None:
        raise RequestError(
            "no token may come next: the grammar, min_tokens, stop_token_ids and banned_token_ids leave "
            "none together"
        )
    if count is None:
        return Choice(token)
    # The model's own chances: before penalty, temperature and filters.
    logprobs = log_softmax(logits)
    return Choice(token, float(logprobs[token]), ranked(logits, logprobs, count))


def masked(logits: Floats, mask: NDArray[np.bool_]) -> Floats:
    """Finite `logits` with -inf where a `mask` is false. `np.where` takes ten times as long for masks without order, which
    those of grammars are."""
    found = np.subtract(mask.view(np.int8), 1, dtype=np.float32)
    # Of -1 twice becomes -inf, of 0 it stays 0.
    found *= _HUGE
    found *= _HUGE
    found += logits
    return found


def _mask(logits: Floats, mask: NDArray[np.bool_]) -> tuple[Floats, int]:
    found = masked(logits, mask)
    return found, int(found.argmax())


def scan(logits: Floats) -> Scan:
    """What one pass over `logits` [n, vocab_size] finds."""
    # It serves greedy rows and the check: argmax finds NaN first.
    best = logits.argmax(axis=1)
    return Scan(logits, best.tolist(), logits[np.arange(len(best)), best].tolist())


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities of all tokens, [vocab_size]."""
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum(dtype=np.float64))


def ranked(logits: Floats, logprobs: Floats, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most likely tokens with their log-probabilities, the likeliest first."""
    if count == 0:
        return ()
    top = np.flatnonzero(logits >= np.partition(logits, -count)[-count])
    order = top[np.argsort(-logits[top], kind="stable")][:count]
    return tuple(zip(order.tolist(), logprobs[order].tolist(), strict=True))


class Candidates(NamedTuple):
    """The tokens that may come."""

    tokens: NDArray[np.int64] | None
    """In ascending order; None if `weights` are those of the whole vocabulary."""
    weights: Floats
    """Their chances, not normalised; 0 for those filtered out."""


def token_weights(logits: Floats, params: SamplingParams) -> Floats:
    """The chances of all tokens, [vocab_size], not normalised; 0 for those filtered out.

    `logits` are [vocab_size], already penalised, with a finite maximum.
    """
    tokens, weights = candidates(logits, params)
    if tokens is None:
        return weights
    spread = np.zeros_like(logits)
    spread[tokens] = weights
    return spread


def candidates(logits: Floats, params: SamplingParams) -> Candidates:
    """The tokens of `logits` that pass the filters, as in `token_weights`.

    What is filtered out is left behind as early as possible: every pass over a vocabulary costs a
    good part of what all else does.
    """
    tokens = None
    if 0 < params.top_k < len(logits):
        tokens = _largest_tokens(logits, params.top_k)
    elif params.min_p > 0.0 and params.top_p == 1.0:
        # A little below, for the exact comparison is that of weights.
        least = logits.max() + np.float32(params.temperature * (log(params.min_p) - 0.01))
        tokens = np.flatnonzero(logits >= least)
    left = logits if tokens is None else logits[tokens]
    weights = left - left.max()
    weights /= np.float32(params.temperature)
    np.exp(weights, out=weights)
    if params.top_p < 1.0:
        _keep_nucleus(weights, params.top_p)
    if params.min_p > 0.0:
        # The largest weight is exp(0) = 1 and no filter removes it.
        weights[weights < params.min_p] = 0.0
    if params.typical_p < 1.0:
        _keep_typical(weights, params.typical_p)
    return Candidates(tokens, weights)


def _largest_tokens(logits: Floats, count: int) -> NDArray[np.int64]:
    """The `count` tokens of the largest logits; the lower of equals."""
    if count <= len(logits) // _COLUMN:
        tokens = _largest_columns(logits, count)
    else:
        tokens = np.arange(len(logits))
    left = logits[tokens]
    least = np.partition(left, -count)[-count]
    is_kept: NDArray[np.bool_] = left > least
    is_kept[np.flatnonzero(left == least)[: count - np.count_nonzero(is_kept)]] = True
    return tokens[is_kept]


def _largest_columns(logits: Floats, count: int) -> NDArray[np.int64]:
    """A few more tokens than the `count` of the largest logits, in order, and all of these.

    The logits are laid out in columns, which processors compare many of at once. As many columns have a logit at least
    as large as a bound, so the largest are among theirs; what is left over belongs to none.
    """
    width = len(logits) // _COLUMN
    whole = width * _COLUMN
    table = logits[:whole].reshape(_COLUMN, width)
    tops = table.max(axis=0)
    bound = np.partition(tops, -count)[-count]
    columns = np.flatnonzero(tops >= bound)
    rows, places = np.divmod(np.flatnonzero(table[:, columns] >= bound), len(columns))
    tokens = rows * width + columns[places]
    if whole < len(logits):
        tokens = np.concatenate([tokens, whole + np.flatnonzero(logits[whole:] >= bound)])
    return tokens


def _keep_largest(weights: Floats, count: int, least: np.float32) -> None:
    """Zero all but the `count` largest, the smallest of which is `least`; the lower of equals
    stay."""
    weights[weights < least] = 0.0
    surplus = np.count_nonzero(weights) - count
    if surplus > 0:
        weights[np.flatnonzero(weights == least)[-surplus:]] = 0.0


def _keep_nucleus(weights: Floats, top_p: float) -> None:
    """Zero all but the fewest largest whose share is at least `top_p`."""
    total = float(weights.sum(dtype=np.float64))
    likely, count, left = weights, 0, top_p * total
    if len(weights) > _FEW:
        # All weights below (1 - p) / n of the total have less than 1 - p of it together, so the
        # nucleus lies among the others: often a few hundred to sort instead of a vocabulary.
        likely = weights[weights >= np.float32((1.0 - top_p) * total / len(weights))]
    # Where many are likely, halve them without sorting until few are left to sort.
    while len(likely) > _FEW:
        middle = len(likely) // 2
        likely = np.partition(likely, middle)
        share = float(likely[middle:].sum(dtype=np.float64))
        if share >= left:
            likely = likely[middle:]
        else:
            count, left, likely = count + len(likely) - middle, left - share, likely[:middle]
    ranked = np.sort(likely)[::-1]
    shares = np.cumsum(ranked, dtype=np.float64)
    last = min(int(np.searchsorted(shares, left)), len(ranked) - 1)
    _keep_largest(weights, count + last + 1, ranked[last])


def _keep_typical(weights: Floats, share: float) -> None:
    """Zero all but those nearest to the expected surprise whose share is at least `share`."""
    left = np.flatnonzero(weights)
    chances = weights[left].astype(np.float64)
    chances /= chances.sum()
    surprise = -np.log(chances)
    distances = np.abs(surprise - (chances * surprise).sum())
    # A stable order would take several times as long; it matters where a tie is cut only.
    ranked = np.argsort(distances)
    last = min(int(np.searchsorted(np.cumsum(chances[ranked]), share)), len(ranked) - 1)
    edge = distances[ranked[last]]
    is_kept = distances < edge
    ties = np.flatnonzero(distances == edge)
    is_kept[ties[: last + 1 - np.count_nonzero(is_kept)]] = True
    weights[left[~is_kept]] = 0.0


def draw_token(
    logits: Floats, params: SamplingParams, uniform: float, place: Place | None = None
) -> int:
    """The token of a random number in [0, 1) by `logits` [vocab_size], already penalised, with a finite
    maximum. Of its `place` only kernels make use."""
    tokens, weights = candidates(logits, params)
    found = _draw(weights, uniform)
    return found if tokens is None else int(tokens[found])


def _draw(weights: Floats, uniform: float) -> int:
    """The index at which the running sum of `weights` passes `uniform` in [0, 1) of the total.

    First the block, then the token in it: a running sum over a whole vocabulary takes longer
    than everything else that sampling does.
    """
    if len(weights) <= _BLOCK:
        shares = np.cumsum(weights, dtype=np.float64)
        return _first_above(shares, uniform * float(shares[-1]))
    blocks = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64)
    ends = np.cumsum(blocks)
    target = uniform * float(ends[-1])
    block = _first_above(ends, target)
    start = block * _BLOCK
    inside = np.cumsum(weights[start : start + _BLOCK], dtype=np.float64)
    return start + _first_above(inside, target - float(ends[block] - blocks[block]))


def _first_above(shares: NDArray[np.float64], target: float) -> int:
    """The first index whose running sum is above `target`; it is never one of weight 0."""
    # Rounding may bring the target up to the very end, which nothing is above.
    below_end = float(np.nextafter(shares[-1], 0.0))
    return int(np.searchsorted(shares, min(target, below_end), side="right"))


NUMPY = Passes(scan, draw_token, _mask)
