"""Inline SVG: a line and rows of intervals. No library, no script, no network.

In: numbers. Out: `Markup`, with every text escaped.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 680, 220
LEFT, BOTTOM, TOP, RIGHT = 64, 30, 10, 10
MAX_POINTS, COLOURS = 600, 3
ROW, LINE = 26, 18
LABELS = 300
LOG_FROM = 50
"""Where the largest of positive values is so many times the smallest, the axis is logarithmic."""
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Interval:
    """One line of a chart: `low` to `high` around `middle`; `good` decides the colour."""

    label: str
    middle: float
    low: float
    high: float
    good: bool


def line_chart(curves: Mapping[str, Sequence[Point]], x_label: str, y_label: str) -> Markup:
    """Curves through (x, y) on the same axes, named in the corner; those of fewer than two points are left out.

    Points that are not finite are left out; of very many, every n-th is drawn. Where y falls (or rises) far, its axis
    is logarithmic and says so.
    """
    drawn = {name: points for name, given in curves.items() if len(points := _thinned(given)) > 1}
    if not drawn:
        return Markup("<p>fewer than two points: no curve</p>")
    xs, ys = zip(*(point for points in drawn.values() for point in points), strict=True)
    logarithmic = min(ys) > 0 and max(ys) > LOG_FROM * min(ys)
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    y_label += " (log scale)" if logarithmic else ""
    (x0, x1), (low, high) = _span(xs), _span(ys)
    y0, y1 = scale(low), scale(high)

    def placed(x: float, y: float) -> str:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return f"{across:.1f},{HEIGHT - BOTTOM - (scale(y) - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP):.1f}"

    parts = [
        Markup(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'),
        _text(LEFT, HEIGHT - 10, f"{x0:g}"),
        _text(WIDTH - RIGHT, HEIGHT - 10, f"{x1:g}", "end"),
        _text((LEFT + WIDTH) / 2, HEIGHT - 10, x_label, "middle"),
        _text(LEFT - 6, HEIGHT - BOTTOM, f"{low:.3g}", "end"),
        _text(LEFT - 6, TOP + 10, f"{high:.3g}", "end"),
        _text(WIDTH - RIGHT, TOP + 10, y_label, "end"),
    ]
    for number, name in enumerate(curves):
        if name not in drawn:
            continue
        points = drawn[name]
        line = " ".join(placed(x, y) for x, y in points)
        kind, y = f"curve c{number % COLOURS}", TOP + 10 + LINE * (list(drawn).index(name) + 1)
        parts.append(Markup(f'<polyline class="{kind}" points="{line}"/>'))
        parts.append(Markup(f'<path class="{kind}" d="M{WIDTH - RIGHT - 24} {y - 4}h24"/>'))
        parts.append(_text(WIDTH - RIGHT - 30, y, name, "end"))
    return _svg(HEIGHT, y_label, _join(parts))


def _thinned(points: Sequence[Point]) -> list[Point]:
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    thinned = finite[:: max(1, math.ceil(len(finite) / MAX_POINTS))]
    return thinned if not finite or thinned[-1] == finite[-1] else [*thinned, finite[-1]]


def interval_chart(intervals: Sequence[Interval], x_label: str) -> Markup:
    """Intervals below one another, with a line at zero."""
    ends = [v for i in intervals for v in (i.low, i.middle, i.high) if math.isfinite(v)]
    if not ends:
        return Markup("<p>nothing to compare</p>")
    low, high = _span([0.0, *ends])
    bottom = ROW * len(intervals) + 8
    height = bottom + 2 * LINE + 4

    def across(value: float) -> float:
        inside = min(max(value, low), high)
        return LABELS + (inside - low) / (high - low) * (WIDTH - LABELS - RIGHT)

    parts = [Markup(f'<path class="zero" d="M{across(0):.1f} 4V{bottom}"/>')]
    for number, entry in enumerate(intervals):
        y = ROW * number + 20
        kind = "good" if entry.good else "bad"
        parts.append(_text(LABELS - 8, y + 4, entry.label, "end"))
        parts.append(Markup(f'<path class="{kind}" d="M{across(entry.low):.1f} {y}H{across(entry.high):.1f}"/>'))
        parts.append(Markup(f'<circle class="{kind}" cx="{across(entry.middle):.1f}" cy="{y}" r="4"/>'))
    parts += [
        *(_text(across(value), bottom + LINE, f"{value:+.3g}", anchor) for value, anchor in _ends(low, high)),
        _text(across(0), bottom + LINE, "0", "middle"),
        _text((LABELS + WIDTH) / 2, bottom + 2 * LINE, x_label, "middle"),
    ]
    return _svg(height, x_label, _join(parts))


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ends(low: float, high: float) -> list[tuple[float, str]]:
    """Ends of an axis that are far enough from zero for a label beside zero's, and where their labels go."""
    near = (high - low) / 8
    return [(value, anchor) for value, anchor in ((low, "start"), (high, "end")) if abs(value) > near]


def _text(x: float, y: float, text: str, anchor: str = "start") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, escape(text))


def _join(parts: Sequence[Markup]) -> Markup:
    return Markup("").join(parts)


def _svg(height: int, title: str, inside: Markup) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(WIDTH, height, title, inside)
