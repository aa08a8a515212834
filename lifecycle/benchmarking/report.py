"""The points of a benchmark, and the JSON object that they become.

Its `format` grows when a key changes its meaning or goes; new keys may come without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lifecycle.benchmarking import memory
from lifecycle.benchmarking.clock import Clock
from lifecycle.benchmarking.measure import Measurement, measure
from lifecycle.benchmarking.metrics import Metrics, summarize
from lifecycle.benchmarking.workload import Workload
from lifecycle.engines.base import Engine

FORMAT = 1

Status = Literal["ok", "interrupted", "failed"]


@dataclass(frozen=True, slots=True)
class Point:
    """One workload and what was measured of it."""

    workload: Workload
    measurement: Measurement
    metrics: Metrics
    peak_rss_bytes: int
    """Most resident memory of the process in the meantime."""
    rss_growth_bytes: int | None
    """How much more that is than once the engine was open; None where the system does not say."""

    def to_json(self) -> dict[str, Any]:
        """A point of the report."""
        workload = self.workload
        return {
            "concurrency": workload.concurrency,
            "rate": workload.rate,
            "prompt_len": workload.prompt_len,
            "output_len": workload.output_len,
            "complete": self.measurement.is_complete,
            **asdict(self.metrics),
            "peak_rss_bytes": self.peak_rss_bytes,
            "rss_growth_bytes": self.rss_growth_bytes,
        }


@dataclass(slots=True)
class Report:
    """A whole benchmark; `points` grows while it runs."""

    model: Mapping[str, Any]
    engine: Mapping[str, Any]
    workload: Mapping[str, Any]
    environment: Mapping[str, Any]
    points: list[Point] = field(default_factory=list[Point])
    status: Status = "ok"

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "format": FORMAT,
            "benchmark": "engine",
            "status": self.status,
            "model": dict(self.model),
            "engine": dict(self.engine),
            "workload": dict(self.workload),
            "environment": dict(self.environment),
            "points": [point.to_json() for point in self.points],
        }


def measure_point(
    engine: Engine,
    workload: Workload,
    *,
    base_rss: int | None,
    bounds: Mapping[str, float] | None = None,
    clock: Clock | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_done: Callable[[int, int], None] | None = None,
) -> Point | None:
    """Warm up, then measure a workload; None if it was stopped before anything was measured.

    Args:
        base_rss: resident memory once the engine was open.
        bounds: those of goodput, in milliseconds.

    Raises:
        EngineError: a request failed.
    """
    warm_up = workload.warm_up
    measure(engine, warm_up, concurrency=len(warm_up), clock=clock, should_stop=should_stop)
    can_reset = memory.reset_peak()
    found = measure(
        engine,
        workload.requests,
        concurrency=workload.concurrency,
        clock=clock,
        should_stop=should_stop,
        on_done=on_done,
    )
    if not any(record.token_times for record in found.records):
        return None
    peak = memory.peak()
    growth = None if base_rss is None or not can_reset else max(0, peak - base_rss)
    return Point(workload, found, summarize(found, bounds), peak, growth)
