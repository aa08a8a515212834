"""A run as one self-contained HTML page: stages, lineage, metrics, and curves over time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from lifecycle.commands.front import STYLE, figure, searches
from lifecycle.commands.plots import PAGE_STYLE
from lifecycle.pipeline import runs
from lifecycle.pipeline.progress import number
from lifecycle.pipeline.runs import Run
from lifecycle.pipeline.store import Store

WIDTH, HEIGHT = 500, 160
MOST_POINTS = 400

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{{ run.recipe }} {{ run.run }}</title>
<style>
{{ style }}
td.metrics { columns: 2 } td.metrics span { display: block; break-inside: avoid } td.metrics .failed { column-span: all }
{{ front_style }}</style></head><body>
<h1>{{ run.recipe }}</h1>
<p>Run <code>{{ run.run }}</code>: <b class="{{ 'done' if run.status == 'ok' else run.status }}">{{ run.status }}</b>
{%- if run.overrides %}, with <code>{{ run.overrides | join(" ") }}</code>{% endif %}</p>
<div><table><thead><tr><th>stage<th>made by<th>from<th>status<th>seconds<th>artifact<th>metrics</tr></thead>
{% for name, stage in run.stages.items() %}
<tr id="{{ name }}"><td><b>{{ name }}</b><td>{{ stage.use }}
<td>{% for source in stage.inputs.values() %}<a href="#{{ source }}">{{ source }}</a> {% endfor %}
<td class="{{ stage.status }}">{{ stage.status }}<td>{{ "%.1f" | format(stage.seconds) }}
<td><code>{{ (stage.digest or "")[:12] }}</code>
<td class="metrics">{% for key, value in metrics(stage) %}<span>{{ key }} <b>{{ value }}</b></span>{% endfor %}
{% if stage.error %}<span class="failed">{{ stage.error }}</span>{% endif %}</tr>
{% endfor %}</table></div>
{% for name, front in fronts %}<h2>{{ name }}</h2>
{{ front }}
{% endfor %}
{% for curve in curves %}
<figure><svg viewBox="0 0 {{ width }} {{ height }}" width="{{ width }}" height="{{ height }}" role="img"
 aria-label="{{ curve.stage }} {{ curve.metric }}">
<polyline points="{{ curve.points }}"/>
<text x="0" y="11">{{ curve.high }}</text><text x="0" y="{{ height - 3 }}">{{ curve.low }}</text>
</svg><figcaption>{{ curve.stage }}: {{ curve.metric }}, last {{ curve.last }}</figcaption></figure>
{% endfor %}
</body></html>
"""


def render(store: Store, run: Run) -> str:
    """The page of a run, without references to anything outside it."""
    template = Environment(autoescape=True).from_string(_PAGE)
    return template.render(
        run=run,
        metrics=_metrics,
        curves=_curves(store, run),
        width=WIDTH,
        height=HEIGHT,
        fronts=[(name, Markup(figure(search))) for name, search in searches(run)],
        style=Markup(PAGE_STYLE),
        front_style=Markup(STYLE),
    )


def _metrics(stage: runs.StageRun) -> list[tuple[str, str]]:
    return [(k, number(v)) for k, v in stage.metrics.items() if isinstance(v, (int, float))]


def _curves(store: Store, run: Run) -> list[dict[str, str]]:
    """Every metric that a stage reported at least three times, as an SVG polyline."""
    found: list[dict[str, str]] = []
    for name in run.stages:
        series: dict[str, list[tuple[float, float]]] = {}
        for row in _rows(runs.folder(store, run.run) / f"{name}.jsonl"):
            phase, done = row.pop("phase", ""), row.pop("done", 0.0)
            row.pop("time", None)
            for key, value in row.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    series.setdefault(f"{phase} {key}", []).append((done, value))
        for metric, points in series.items():
            if len(points) >= 3:
                found.append({"stage": name, "metric": metric, **_polyline(points)})
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows that were written to their end."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def _polyline(points: list[tuple[float, float]]) -> dict[str, str]:
    thinned = points[:: max(1, len(points) // MOST_POINTS)]
    xs, ys = [x for x, _ in thinned], [y for _, y in thinned]
    left, low = min(xs), min(ys)
    across, up = (max(xs) - left) or 1.0, (max(ys) - low) or 1.0
    scaled = (
        f"{(x - left) / across * (WIDTH - 2) + 1:.1f},{HEIGHT - 15 - (y - low) / up * (HEIGHT - 30):.1f}"
        for x, y in thinned
    )
    return {
        "points": " ".join(scaled),
        "high": number(max(ys)),
        "low": number(low),
        "last": number(points[-1][1]),
    }
