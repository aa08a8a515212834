"""A benchmark of an engine as tables: one row a point."""

from __future__ import annotations

from collections.abc import Sequence

from lifecycle.benchmarking.metrics import Latency
from lifecycle.benchmarking.report import Point, Report
from lifecycle.pipeline.progress import number

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Headings and rows."""

LATENCIES = {
    "TTFT": "ttft_ms",
    "TPOT": "tpot_ms",
    "ITL": "itl_ms",
    "E2E": "e2el_ms",
    "queue": "queue_ms",
}
"""What latencies are called, and where they are in `Metrics`."""


def throughput(report: Report) -> Table:
    """Tokens, requests and memory."""
    bounds = report.workload.get("goodput") or {}
    good = " ".join(f"{name}≤{limit:g}" for name, limit in bounds.items())
    headings = (
        *("", "prompt", "output", "requests", "output tokens/s", "all tokens/s", "requests/s"),
        *((f"goodput/s, {good}",) if good else ()),
        *("cached tokens", "peak MiB", "growth MiB"),
    )
    return _without_empty(headings, [_throughput_row(p, bool(good)) for p in report.points])


def latencies(report: Report) -> Table:
    """Median, 90th and 99th percentile of each latency, in milliseconds."""
    names = (f"{name} ms" for name in LATENCIES)
    return _without_empty(
        ("median / p90 / p99", "prompt", "output", *names),
        [
            (*_label(point), *(_cell(getattr(point.metrics, key)) for key in LATENCIES.values()))
            for point in report.points
        ],
    )


def _without_empty(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    """Leave out the columns that no row has anything in, such as the lengths of a trace."""
    kept = [i for i in range(len(headings)) if not rows or any(row[i] for row in rows)]
    return tuple(headings[i] for i in kept), [tuple(row[i] for i in kept) for row in rows]


def _throughput_row(point: Point, has_goodput: bool) -> tuple[str, ...]:
    metrics, growth = point.metrics, point.rss_growth_bytes
    requests = str(metrics.completed)
    if metrics.completed < len(point.workload.requests):
        requests += f" of {len(point.workload.requests)}"
    return (
        *_label(point),
        requests,
        f"{metrics.output_throughput:,.1f}",
        f"{metrics.total_throughput:,.1f}",
        f"{metrics.request_throughput:,.2f}",
        *((f"{metrics.goodput:,.2f}",) if has_goodput and metrics.goodput is not None else ()),
        number(metrics.cached_tokens),
        number(point.peak_rss_bytes >> 20),
        "" if growth is None else f"{growth / 2**20:,.1f}",
    )


def _label(point: Point) -> Sequence[str]:
    workload = point.workload
    if workload.prompt_len is None:
        return (workload.label, "", "")
    return (workload.label, number(workload.prompt_len), number(workload.output_len or 0))


def _cell(latency: Latency | None) -> str:
    if latency is None:
        return ""
    return " / ".join(_short(value) for value in (latency.median, latency.p90, latency.p99))


def _short(milliseconds: float) -> str:
    """Three digits that mean something, without an exponent."""
    digits = 0 if milliseconds >= 100 else 1 if milliseconds >= 10 else 2
    return f"{milliseconds:,.{digits}f}"
