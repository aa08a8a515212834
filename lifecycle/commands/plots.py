"""Figures of the project's pages: SVG made by hand, in colours that suit light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment

PAGE_STYLE = """:root { color-scheme: light dark; --page: #fff; --text: #222; --dim: #555; --line: #ddd; --red: #b00020; --green: #1b7f3b; --blue: #2457a6 }
@media (prefers-color-scheme: dark) {
:root { --page: #16181c; --text: #e6e6e6; --dim: #a8a8a8; --line: #3a3d44; --red: #ff7b86; --green: #63d18a; --blue: #86b4ff } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; padding: 0 1em; max-width: 70em; color: var(--text); background: var(--page) }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .3em .8em .3em 0; border-bottom: 1px solid var(--line); vertical-align: top }
td { font-variant-numeric: tabular-nums } td.metrics { color: var(--dim) }
code { font-size: .85em; color: var(--dim) } a { color: var(--blue) }
.failed { color: var(--red); white-space: pre-wrap } .done { color: var(--green) } .cached { color: var(--blue) }
figure { display: inline-block; margin: 1em 1em 1em 0 } figcaption { color: var(--dim) }
div { overflow-x: auto } svg { max-width: 100%; height: auto } polyline { fill: none; stroke: var(--blue); stroke-width: 1.5 } text { font-size: 11px; fill: var(--dim) }
"""
"""Of every page."""

FIGURE_STYLE = """
.grid line { stroke: var(--line) }
.s0 { --c: #2457a6 } .s1 { --c: #b5541c } .s2 { --c: #1b7f3b } .s3 { --c: #8a3ffc } .s4 { --c: #b00020 } .s5 { --c: #007d79 }
@media (prefers-color-scheme: dark) {
.s0 { --c: #86b4ff } .s1 { --c: #ff9d5c } .s2 { --c: #63d18a } .s3 { --c: #be95ff } .s4 { --c: #ff7b86 } .s5 { --c: #3ddbd9 } }
g.series polyline { stroke: var(--c) } g.series circle { fill: var(--c) } g.series.faint circle { fill-opacity: .55 }
figcaption span { color: var(--c); margin-right: .9em; white-space: nowrap } figcaption b { color: var(--text) }
"""
"""Of `Figure`."""

WIDTH, HEIGHT = 500, 290
_COLORS = 6
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 12, 44

AXES = """<g class="grid">
{%- for at, label in xs %}
<line x1="{{ at }}" x2="{{ at }}" y1="{{ top }}" y2="{{ bottom }}"/>
<text x="{{ at }}" y="{{ bottom + 16 }}" text-anchor="middle">{{ label }}</text>
{%- endfor %}
{%- for at, label in ys %}
<line x1="{{ left }}" x2="{{ right }}" y1="{{ at }}" y2="{{ at }}"/>
<text x="{{ left - 6 }}" y="{{ at + 4 }}" text-anchor="end">{{ label }}</text>
{%- endfor %}
</g>
<text x="{{ (left + right) / 2 }}" y="{{ height - 8 }}" text-anchor="middle">{{ x_title }}</text>
<text transform="translate(14 {{ (top + bottom) / 2 }}) rotate(-90)" text-anchor="middle">{{ y_title }}</text>
"""
"""The part of a figure's template with its grid and the titles beside it."""

_FIGURE = (
    """<figure><svg viewBox="0 0 {{ width }} {{ height }}" width="{{ width }}" height="{{ height }}"
 role="img" aria-label="{{ figure.title }}">
"""
    + AXES
    + """
{%- for series in shown %}
<g class="series s{{ series.color }}{{ '' if series.is_line else ' faint' }}">
{%- if series.is_line %}<polyline points="{% for x, y, _ in series.places %}{{ x }},{{ y }} {% endfor %}"/>{% endif %}
{%- if series.has_marks %}{% for x, y, title in series.places %}
<circle cx="{{ x }}" cy="{{ y }}" r="{{ 3.5 if series.is_line else 2.5 }}"><title>{{ title }}</title></circle>
{%- endfor %}{% endif %}</g>
{%- endfor %}
</svg><figcaption><b>{{ figure.title }}</b><br>
{%- for series in shown %}<span class="s{{ series.color }}">● {{ series.name }}</span>{% endfor %}</figcaption></figure>
"""
)


@dataclass(frozen=True, slots=True)
class Series:
    """Points that belong together."""

    name: str
    points: Sequence[tuple[float, float]]
    is_line: bool = True
    has_marks: bool = True


@dataclass(frozen=True, slots=True)
class Figure:
    """Series over one pair of axes; the upright one begins at 0."""

    title: str
    x_title: str
    y_title: str
    series: Sequence[Series]
    categories: Sequence[str] = ()
    """If there are any, x is an index into them."""

    def to_html(self) -> str:
        """The figure, for a page with `PAGE_STYLE` and `FIGURE_STYLE`."""
        every = [point for series in self.series for point in series.points]
        x = Scale([x for x, _ in every], _LEFT, WIDTH - _RIGHT)
        y = Scale([0.0, *(y for _, y in every)], HEIGHT - _BOTTOM, _TOP)
        xs = [(x.at(i), name) for i, name in enumerate(self.categories)] or x.ticks()
        return (
            Environment(autoescape=True)
            .from_string(_FIGURE)
            .render(
                figure=self,
                x_title=self.x_title,
                y_title=self.y_title,
                shown=[
                    {
                        "name": series.name,
                        "color": index % _COLORS,
                        "is_line": series.is_line,
                        "has_marks": series.has_marks,
                        "places": [
                            (x.at(a), y.at(b), f"{series.name}: {_short(b)}")
                            for a, b in series.points
                        ],
                    }
                    for index, series in enumerate(self.series)
                ],
                xs=xs,
                ys=y.ticks(),
                width=WIDTH,
                height=HEIGHT,
                left=_LEFT,
                right=WIDTH - _RIGHT,
                top=_TOP,
                bottom=HEIGHT - _BOTTOM,
            )
        )


def _short(value: float) -> str:
    """Three digits that mean something, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Scale:
    """From values to pixels, with some room at both ends."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        room = (high - low or abs(high) or 1) * 0.07
        self._low, self._high = low - room, high + room
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        """Pixels of a value."""
        part = (value - self._low) / (self._high - self._low)
        return round(self._start + part * (self._end - self._start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """About five round numbers: pixels and label."""
        rough = (self._high - self._low) / 5
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= rough)
        digits = max(0, -math.floor(math.log10(step)))
        first, last = math.ceil(self._low / step), math.floor(self._high / step)
        return [(self.at(i * step), f"{i * step:,.{digits}f}") for i in range(first, last + 1)]
