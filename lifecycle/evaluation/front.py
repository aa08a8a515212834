"""Which of several models is the best that holds a bound, and which no other one beats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lifecycle.evaluation.gates import METRICS, NOT_QUALITY, Bound, judge

Objective = Literal["latency", "throughput", "size"]

NOISE = 0.03
"""Part by which two speeds must differ at least to count as different. Engines on the very same
graph were measured up to so far apart."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate and what was measured of it."""

    name: str
    metrics: Mapping[str, float]
    """Among them those of the bound, `bytes`, and `tokens_per_second` with its `error` (standard,
    as a part of it)."""


def quality_metric(bound: Mapping[str, str]) -> str | None:
    """The first metric of a bound that is about quality."""
    return next((name for name in bound if METRICS[name].measure not in NOT_QUALITY), None)


def holding(trials: Sequence[Trial], bound: Mapping[str, str]) -> list[Trial]:
    """Those inside of every bound."""
    return [t for t in trials if all(verdict.passed for verdict in judge(t.metrics, bound))]


def best(trials: Sequence[Trial], bound: Mapping[str, str], objective: Objective) -> Trial:
    """The best by the objective; of those that a clock cannot tell from it, the one with the best
    value of the bound's quality metric."""
    top = max(trials, key=lambda trial: _gain(trial, objective))

    def rivals_top(trial: Trial) -> bool:
        slack = 0.0
        if objective != "size":
            slack = max(NOISE, math.hypot(top.metrics["error"], trial.metrics["error"]))
        return _gain(trial, objective) >= _gain(top, objective) * (1 - slack)

    rivals = [trial for trial in trials if trial is top or rivals_top(trial)]
    return min(rivals, key=lambda trial: (_loss(trial, bound), -_gain(trial, objective)))


def nearest(trials: Sequence[Trial], bound: Mapping[str, str]) -> Trial:
    """The one whose worst metric is the least outside, as a part of that metric's limit."""

    def excess(trial: Trial) -> float:
        failed = [verdict for verdict in judge(trial.metrics, bound) if not verdict.passed]
        return max((_distance(v.measured, Bound.parse(v.bound).limit) for v in failed), default=0)

    return min(trials, key=excess)


def pareto_front(
    trials: Sequence[Trial], bound: Mapping[str, str], objective: Objective
) -> list[Trial]:
    """Those that no other one beats by the objective or the bound's quality metric without losing
    by the other of the two."""
    points = [(_gain(trial, objective), _loss(trial, bound)) for trial in trials]
    return [
        trial
        for trial, (gain, loss) in zip(trials, points, strict=True)
        if not any(g >= gain and x <= loss and (g, x) != (gain, loss) for g, x in points)
    ]


def _gain(trial: Trial, objective: Objective) -> float:
    """More is better."""
    return -trial.metrics["bytes"] if objective == "size" else trial.metrics["tokens_per_second"]


def _loss(trial: Trial, bound: Mapping[str, str]) -> float:
    """Less is better; the operator of the bound says which side of it is the good one."""
    name = quality_metric(bound)
    assert name is not None
    value = trial.metrics[name]
    return value if Bound.parse(bound[name]).operator.startswith("<") else -value


def _distance(measured: float, limit: float) -> float:
    if not math.isfinite(measured):
        return math.inf
    return abs(measured - limit) / (abs(limit) or 1)
