"""A benchmark of an engine as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from lifecycle.benchmarking.metrics import e2el, finished, inter_token_latencies, ttft
from lifecycle.benchmarking.report import Point, Report
from lifecycle.commands.bench_tables import LATENCIES, latencies, throughput
from lifecycle.commands.plots import FIGURE_STYLE, PAGE_STYLE, Figure, Series
from lifecycle.pipeline.progress import number

_QUANTILES = 200
_MOST_DOTS = 2000
"""Requests of a series that are drawn; of more, every second, third, … one is."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>Benchmark of {{ name }}</title>
<style>
{{ style }}
h1 { overflow-wrap: anywhere } div { margin-bottom: 1.5em }
td { white-space: nowrap } td, th { padding-right: .6em; font-size: 14px } .failed, .interrupted { color: var(--red) }
</style></head><body>
<h1>{{ name }}</h1>
<p>{{ engine }}: <b class="{{ 'done' if report.status == 'ok' else report.status }}">{{ report.status }}</b>
{%- for line in lines %}<br>{{ line }}{% endfor %}</p>
{% if not report.points %}<p>Nothing has been measured.</p>{% endif %}
{% for headings, rows in tables %}
<div><table><thead><tr>{% for cell in headings %}<th>{{ cell }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endfor %}
{% for figure in figures %}{{ figure }}{% endfor %}
</body></html>
"""


def render(report: Report) -> str:
    """The page, without references to anything outside it."""
    engine, points = report.engine, report.points
    cache = number(engine["prefix_cache_bytes"] >> 20)
    return (
        Environment(autoescape=True)
        .from_string(_PAGE)
        .render(
            report=report,
            name=report.model["name"],
            engine=f"engine {engine['name']}",
            lines=[
                f"{engine['max_num_seqs']} slots of {engine['max_model_len']:,} tokens, "
                f"{engine['threads']} threads, chunks of {engine['prefill_chunk']} tokens, "
                f"prefix cache of {cache} MiB",
                ", ".join(f"{key} {value}" for key, value in report.environment.items()),
                *_trace_lines(report),
            ],
            tables=[throughput(report), latencies(report)] if points else [],
            figures=[Markup(figure.to_html()) for figure in figures(report)],
            style=Markup(PAGE_STYLE + FIGURE_STYLE),
        )
    )


def _trace_lines(report: Report) -> Iterator[str]:
    if (trace := report.workload["trace"]) is not None:
        parts = [f"{trace['requests']:,} requests of {trace['path']}"]
        if trace["speed"] != 1:
            parts.append(f"{trace['speed']:g} times as fast")
        if trace["scale"] != 1:
            parts.append(f"lengths divided by {trace['scale']:g}")
        if trace["skipped"]:
            parts.append(f"{trace['skipped']:,} more that do not fit are left out")
        yield ", ".join(parts)


def figures(report: Report) -> list[Figure]:
    """By batch where there are several, over time where requests come by themselves."""
    points = [point for point in report.points if point.metrics.completed]
    if not points:
        return []
    if points[0].workload.concurrency is None:
        over_time = [_over_time(point) for point in points]
        return [*over_time, *_distributions([[point] for point in points])]
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.workload.lengths, []).append(point)
    found = [_throughput(groups)]
    for lengths, group in groups.items():
        found += [_percentiles(name, lengths, group) for name in ("TTFT", "TPOT", "E2E")]
    return [figure for figure in [*found, *_distributions(list(groups.values()))] if figure.series]


def _throughput(groups: dict[str, list[Point]]) -> Figure:
    batches = sorted({_batch(point) for group in groups.values() for point in group})
    return Figure(
        "Throughput by batch",
        "requests in flight",
        "output tokens/s",
        [
            Series(name, [(batches.index(_batch(p)), p.metrics.output_throughput) for p in group])
            for name, group in groups.items()
        ],
        [str(batch) for batch in batches],
    )


def _percentiles(name: str, lengths: str, group: Sequence[Point]) -> Figure:
    found = [getattr(point.metrics, LATENCIES[name]) for point in group]
    series = [
        Series(label, [(i, getattr(one, key)) for i, one in enumerate(found) if one is not None])
        for label, key in (("median", "median"), ("90th percentile", "p90"), ("99th", "p99"))
    ]
    return Figure(
        f"{name} by batch, {lengths}",
        "requests in flight",
        f"{name}, ms",
        [one for one in series if one.points],
        [str(_batch(point)) for point in group],
    )


def _distributions(groups: Sequence[Sequence[Point]]) -> Iterator[Figure]:
    for group in groups:
        series = [
            Series(point.workload.label, _quantiles(gaps), has_marks=False)
            for point in group
            if (gaps := inter_token_latencies(point.measurement))
        ]
        if series:
            title = ", ".join(filter(None, ("ITL up to the 99th percentile", _lengths(group))))
            yield Figure(title, "gap between two tokens, ms", "share of gaps, %", series)


def _quantiles(seconds: Sequence[float]) -> list[tuple[float, float]]:
    """The distribution up to its 99th percentile; the few gaps beyond would squeeze all others."""
    shares = np.linspace(0, 0.99, min(_QUANTILES, 2 * len(seconds)))
    values = 1000 * np.quantile(np.array(seconds), shares)
    return list(zip(values.tolist(), (100 * shares).tolist(), strict=True))


def _over_time(point: Point) -> Figure:
    records = finished(point.measurement)
    records = records[:: 1 + len(records) // _MOST_DOTS]
    kinds: dict[str, Callable[..., float]] = {"TTFT": ttft, "E2E": e2el}
    title = ", ".join(filter(None, ("Latency over time", point.workload.label, _lengths([point]))))
    return Figure(
        title,
        "arrival, s",
        "ms",
        [
            Series(name, [(r.arrival, 1000 * latency(r)) for r in records], is_line=False)
            for name, latency in kinds.items()
        ],
    )


def _lengths(group: Sequence[Point]) -> str:
    return group[0].workload.lengths


def _batch(point: Point) -> int:
    assert point.workload.concurrency is not None
    return point.workload.concurrency
