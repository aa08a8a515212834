"""What an evaluation found, before it is judged and written down."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from lifecycle.errors import StageError
from lifecycle.evaluation.gates import METRICS, Measure


@dataclass(frozen=True, slots=True)
class Answer:
    """A question with the expected and the given answer, for a reader to look at."""

    prompt: str
    expected: str
    got: str


@dataclass(frozen=True, slots=True)
class Findings:
    """Metrics of a model and of its reference, over how much, and answers as examples."""

    metrics: dict[str, float] = field(default_factory=dict[str, float])
    reference_metrics: dict[str, float] = field(default_factory=dict[str, float])
    counts: dict[str, int] = field(default_factory=dict[str, int])
    """Samples, tokens and questions measured, and those left out because they are too long."""
    answers: list[Answer] = field(default_factory=list[Answer])

    def __or__(self, other: Findings) -> Findings:
        return Findings(
            self.metrics | other.metrics,
            self.reference_metrics | other.reference_metrics,
            self.counts | other.counts,
            self.answers + other.answers,
        )

    def settled(self, measures: Collection[Measure]) -> Findings:
        """What `measures` ask for, with six significant digits: what lies beyond is the noise of
        a machine, and would give equal evaluations different digests. Counts stay whole."""
        return Findings(
            _settled(self.metrics, measures),
            _settled(self.reference_metrics, measures),
            self.counts,
            self.answers,
        )

    def require_finite(self) -> None:
        """Refuse a metric that is no number.

        Raises:
            StageError: names the first such metric.
        """
        for whose, metrics in (("reference", self.reference_metrics), ("model", self.metrics)):
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise StageError(f"{name} of the {whose} is {value}: its logits are no use")


def _settled(metrics: Mapping[str, float], measures: Collection[Measure]) -> dict[str, float]:
    return {
        name: value if isinstance(value := metrics[name], int) else float(f"{value:.6g}")
        for name, metric in METRICS.items()
        if name in metrics and metric.measure in measures
    }
