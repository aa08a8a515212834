"""Gates: which metrics exist, the bounds they are held to, and the verdicts."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, cast

from lifecycle.errors import GateError
from lifecycle.pipeline.suggest import did_you_mean

Measure = Literal["perplexity", "accuracy", "agreement", "invariance", "feeding", "speed", "size"]
"""What an evaluation can be asked to do; each gives one metric or several."""

BY_DEFAULT: tuple[Measure, ...] = ("perplexity", "accuracy", "agreement")
"""What is measured without being asked for: what the same models give on every machine."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of a report: the measure that gives it, and whether it needs a reference."""

    measure: Measure
    needs_reference: bool


METRICS: Mapping[str, Metric] = {
    "perplexity": Metric("perplexity", needs_reference=False),
    "perplexity_ratio": Metric("perplexity", needs_reference=True),
    "accuracy": Metric("accuracy", needs_reference=False),
    "accuracy_drop": Metric("accuracy", needs_reference=True),
    "top1_agreement": Metric("agreement", needs_reference=True),
    "kl": Metric("agreement", needs_reference=True),
    "logit_max_diff": Metric("agreement", needs_reference=True),
    "batch_invariance": Metric("invariance", needs_reference=False),
    "batch_max_diff": Metric("invariance", needs_reference=False),
    "feeding_max_diff": Metric("feeding", needs_reference=False),
    "tokens_per_second": Metric("speed", needs_reference=False),
    "speed": Metric("speed", needs_reference=True),
    "bytes": Metric("size", needs_reference=False),
    "size": Metric("size", needs_reference=True),
}

NOT_QUALITY: tuple[Measure, ...] = ("invariance", "feeding", "speed", "size")
"""What tells nothing of how much is lost beside a reference."""

DIFFERENCES = ("max_relative_error", "cosine", "top1_agreement", "size", "speed")
"""What a comparison of two graphs measures; the speed only where it is asked for."""

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
}
_BOUND = re.compile(
    r"\s*(?P<operator><=|>=|<|>)\s*"
    r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)\s*(?P<percent>%?)\s*",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Bound:
    """What a metric must be: `<= 1.02`, `>= 55 %`."""

    operator: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Bound:
        """Read an operator (`<=`, `<`, `>=`, `>`) and a number; `55 %` is 0.55.

        Raises:
            ValueError: the text is not of that form.
        """
        found = _BOUND.fullmatch(text)
        if found is not None:
            # Decimal, because a percentage divided as a float is not always the float it names.
            limit = float(Decimal(found["number"]) / (100 if found["percent"] else 1))
            if math.isfinite(limit):
                return cls(found["operator"], limit)
        raise ValueError(f"'{text}' is no bound; write one like '<= 1.02' or '>= 55 %'")

    def holds(self, measured: float) -> bool:
        """Whether `measured` is inside the bound; NaN and infinity never are."""
        return math.isfinite(measured) and _OPERATORS[self.operator](measured, self.limit)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A metric held to its bound; the bound is as the recipe spells it."""

    metric: str
    bound: str
    measured: float
    passed: bool


def spelled_gates(gates: Any) -> Any:
    """Gates as a recipe has them; a number without an operator is refused with the way out.

    Raises:
        ValueError: names the metric.
    """
    if isinstance(gates, Mapping):
        for name, bound in cast("Mapping[str, Any]", gates).items():
            if isinstance(bound, int | float):
                raise ValueError(
                    f"'{name}': {bound!r} does not say on which side of it the metric must be; "
                    f"write '<= {bound!r}' or '>= {bound!r}'"
                )
    return gates


def check_gates(
    gates: Mapping[str, str], measures: Collection[str], *, has_reference: bool
) -> None:
    """Check gates before anything runs.

    Raises:
        ValueError: an unknown metric, a metric that `measures` do not give, a metric that needs
            a reference where there is none, or a bound that cannot be read.
    """
    for name, bound in gates.items():
        metric = METRICS.get(name)
        if metric is None:
            known = ", ".join(METRICS)
            raise ValueError(f"unknown metric '{name}'{did_you_mean(name, METRICS)} ({known})")
        if metric.needs_reference and not has_reference:
            raise ValueError(f"'{name}' compares two models: set 'reference'")
        if metric.measure not in measures:
            raise ValueError(f"'{name}' is not measured: add '{metric.measure}' to 'metrics'")
        _check_bound(name, bound)


def check_bounds(gates: Mapping[str, str], known: Collection[str]) -> None:
    """Check gates on metrics that are always measured.

    Raises:
        ValueError: an unknown metric, or a bound that cannot be read.
    """
    for name, bound in gates.items():
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"unknown metric '{name}'{hint} ({', '.join(known)})")
        _check_bound(name, bound)


def _check_bound(name: str, bound: str) -> None:
    try:
        Bound.parse(bound)
    except ValueError as error:
        raise ValueError(f"'{name}': {error}") from error


def judge(metrics: Mapping[str, float], gates: Mapping[str, str]) -> list[Verdict]:
    """Hold every gated metric to its bound, in the order of the recipe."""
    return [
        Verdict(name, bound, metrics[name], Bound.parse(bound).holds(metrics[name]))
        for name, bound in gates.items()
    ]


def require_passed(verdicts: Collection[Verdict], metrics: Mapping[str, float]) -> None:
    """Stop unless every verdict is good.

    Raises:
        GateError: names every failed gate, its measured value beside its bound; carries all
            `metrics`, since the report of a failed evaluation is not kept.
    """
    failed = [v for v in verdicts if not v.passed]
    if failed:
        lines = "; ".join(f"{v.metric} is {v.measured!r}, bound {v.bound}" for v in failed)
        raise GateError(f"gates failed ({len(failed)} of {len(verdicts)}): {lines}", dict(metrics))
