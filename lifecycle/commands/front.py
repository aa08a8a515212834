"""What a search has found, as a table and as a figure: cost against quality, the bound, the choice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lifecycle.commands.output import say, table
from lifecycle.commands.plots import AXES, Scale
from lifecycle.evaluation.front import quality_metric
from lifecycle.evaluation.gates import Bound
from lifecycle.pipeline.progress import number
from lifecycle.pipeline.runs import Run

Search = Mapping[str, Any]
"""The metric `search` of a stage (see `lifecycle.stages.search`)."""

WIDTH, HEIGHT = 640, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 16, 46
_MILLION = 1_000_000
_CLOSE = 10
"""Pixels within which the numbers of two marks would cover each other."""
_COST = ("tokens_per_second", "speed", "bytes", "size")
_UNITS = {
    "kl": ", nats",
    **dict.fromkeys(("accuracy", "accuracy_drop", "top1_agreement"), ", share"),
}

_FIGURE = (
    """<figure class="front"><svg viewBox="0 0 {{ width }} {{ height }}" width="{{ width }}"
 height="{{ height }}" role="img" aria-label="{{ y_title }} against {{ x_title }}">
"""
    + AXES
    + """<line class="bound" x1="{{ left }}" x2="{{ right }}" y1="{{ limit }}" y2="{{ limit }}"/>
<text class="bound" x="{{ right }}" y="{{ limit - 5 }}" text-anchor="end">bound {{ bound }}</text>
<polyline class="front" points="{{ front }}"/>
{%- for p in points %}
<g class="point{{ ' holds' if p.holds }}"><title>{{ p.title }}</title>
{%- if p.chosen %}<circle class="ring" cx="{{ p.x }}" cy="{{ p.y }}" r="9"/>{% endif %}
<circle cx="{{ p.x }}" cy="{{ p.y }}" r="4.5"/>
<text x="{{ p.x + 11 }}" y="{{ p.y - 7 }}">{{ p.label }}</text></g>
{%- endfor %}
</svg><figcaption>{{ caption }}</figcaption></figure>
<div><table><thead><tr>{% for cell in headings %}<th>{{ cell }}{% endfor %}</tr></thead>
{% for row in rows %}<tr{% if row[0].startswith("→") %} class="chosen"{% endif %}>
{%- for cell in row %}<td>{{ cell }}{% endfor %}</tr>
{% endfor %}</table></div>
{%- for name, reason in left_out.items() %}<p>{{ name }} is left out: {{ reason }}</p>{% endfor %}
"""
)

STYLE = """
.grid line { stroke: var(--line) } polyline.front { fill: none; stroke: var(--blue); stroke-width: 1 }
line.bound { stroke: var(--red); stroke-dasharray: 5 4 } text.bound { fill: var(--red) }
.point circle { fill: var(--page); stroke: var(--blue); stroke-width: 1.5 }
.point.holds circle { fill: var(--blue) } .point circle.ring { fill: none; stroke: var(--green); stroke-width: 2.5 }
tr.chosen td { font-weight: bold }
"""


def searches(run: Run) -> list[tuple[str, Search]]:
    """What the stages of a run have searched, by their names; also those that found nothing."""
    found = ((name, stage.metrics.get("search")) for name, stage in run.stages.items())
    return [(name, search) for name, search in found if isinstance(search, dict)]


def show(run: Run) -> None:
    """Print the table of every search of a run."""
    for name, search in searches(run):
        say(f"{name}: {caption(search)}")
        table(headings(search), rows(search))


def headings(search: Search) -> tuple[str, ...]:
    """The columns of `rows`."""
    bounds = (f"{name} {search['bound'].get(name, '')}".rstrip() for name in _quality(search))
    requests = "1 request" if search["batch"] == 1 else f"{search['batch']} requests"
    speed = f"tokens/s, {requests}"
    return ("", "candidate", speed, "speed", "MB", "size", *bounds, "holds", "front")


def rows(search: Search) -> list[tuple[str, ...]]:
    """One line per candidate, numbered as in the figure; the chosen one has an arrow."""
    return [
        (
            f"→ {index}" if row["chosen"] else str(index),
            row["name"],
            number(row["tokens_per_second"]),
            f"{row['speed']:.2f} ± {row['speed'] * row['error']:.2f}",
            f"{row['bytes'] / _MILLION:,.2f}",
            f"{row['size']:.3f}",
            *(f"{row[name]:.4g}" for name in _quality(search)),
            "yes" if row["holds"] else "no",
            "yes" if row["on_front"] else "",
        )
        for index, row in enumerate(search["candidates"], start=1)
    ]


def caption(search: Search) -> str:
    """What was asked for, in words."""
    bound = ", ".join(f"{name} {text}" for name, text in search["bound"].items())
    held = sum(row["holds"] for row in search["candidates"])
    return (
        f"Best {search['objective']} with {bound}: {held} of {len(search['candidates'])} "
        "candidates hold."
    )


def figure(search: Search) -> str:
    """The figure and its table as HTML, for a page with `STYLE`."""
    from jinja2 import Environment

    by_size = search["objective"] == "size"
    metric = quality_metric(search["bound"])
    assert metric is not None
    text = search["bound"][metric]
    limit = Bound.parse(text).limit
    found: list[dict[str, Any]] = search["candidates"]
    across = [row["bytes"] / _MILLION if by_size else row["tokens_per_second"] for row in found]
    up = [row[metric] for row in found]
    x = Scale(across, _LEFT, WIDTH - _RIGHT)
    y = Scale([*up, limit], HEIGHT - _BOTTOM, _TOP)
    places = [(x.at(a), y.at(b)) for a, b in zip(across, up, strict=True)]
    front = sorted(place for place, row in zip(places, found, strict=True) if row["on_front"])
    requests = "one request" if search["batch"] == 1 else f"{search['batch']} requests together"
    template = Environment(autoescape=True).from_string(_FIGURE)
    return template.render(
        width=WIDTH,
        height=HEIGHT,
        left=_LEFT,
        right=WIDTH - _RIGHT,
        top=_TOP,
        bottom=HEIGHT - _BOTTOM,
        xs=x.ticks(),
        ys=y.ticks(),
        x_title="size of the weights, MB" if by_size else f"decoding of {requests}, tokens/s",
        y_title=metric + _UNITS.get(metric, ""),
        limit=y.at(limit),
        bound=f"{metric} {text}",
        front=" ".join(f"{a},{b}" for a, b in front),
        points=_points(places, found),
        caption=caption(search),
        headings=headings(search),
        rows=rows(search),
        left_out=search["left_out"],
    )


def _quality(search: Search) -> list[str]:
    """The columns besides those of cost: what is bound first, then what is always measured."""
    names = dict.fromkeys([*search["bound"], "perplexity_ratio", "kl", "top1_agreement"])
    return [name for name in names if name not in _COST]


def _points(places: list[tuple[float, float]], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The marks with their numbers; those that nearly coincide share one label."""
    points: list[dict[str, Any]] = []
    for index, ((x, y), row) in enumerate(zip(places, found, strict=True), start=1):
        figures = ", ".join(f"{k} {number(v)}" for k, v in row.items() if type(v) in (int, float))
        point = {name: row[name] for name in ("holds", "chosen")}
        point |= {"x": x, "y": y, "label": str(index), "title": f"{row['name']}: {figures}"}
        close = (p for p in points if p["label"] and math.dist((p["x"], p["y"]), (x, y)) < _CLOSE)
        if (other := next(close, None)) is not None:
            other["label"] += f", {index}"
            point["label"] = ""
        points.append(point)
    return points
