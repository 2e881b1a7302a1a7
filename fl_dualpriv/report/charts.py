"""Line charts as inline SVG, whose colours follow the page. Standard library only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 12, 36
_TICKS = 5
_DASHES = ("", "6 3", "2 3", "8 3 2 3")


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart.

    Attributes:
        name: Name in the legend.
        points: (x, y), sorted by x.
    """

    name: str
    points: Sequence[tuple[float, float]]


def nice_ticks(low: float, high: float) -> list[float]:
    """Return round numbers that cover an interval.

    Example:
        >>> nice_ticks(0.0, 36.2)
        [0.0, 10.0, 20.0, 30.0, 40.0]
    """
    span = max(high - low, 1e-9)
    raw = span / (_TICKS - 1)
    size = 10 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= raw - 1e-12)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(float(step * k), 10) for k in range(first, last + 1)]


def line_chart(series: Sequence[Series], *, x_name: str, y_name: str, title: str) -> str:
    """Return an SVG element of lines with marks, axes and a legend; empty if no series has a point.

    Args:
        series: The lines. Colours and dashes tell them apart.
        x_name: Name of the x axis.
        y_name: Name of the y axis.
        title: Description for screen readers.
    """
    drawn = [line for line in series if line.points]
    if not drawn:
        return ""
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points]
    ticks_y = nice_ticks(min(0.0, *ys), max(ys))
    low_x, high_x = min(xs), max(max(xs), min(xs) + 1)
    legend_rows = len(drawn)
    height = HEIGHT + 18 * legend_rows

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - _LEFT - _RIGHT)
        up = (y - ticks_y[0]) / (ticks_y[-1] - ticks_y[0])
        return across, HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    for tick in ticks_y:
        _, y = at(low_x, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in [tick for tick in nice_ticks(low_x, high_x) if low_x <= tick <= high_x and tick == int(tick)]:
        x, _ = at(tick, ticks_y[0])
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_name)}</text>')
    middle = (HEIGHT - _BOTTOM) / 2
    parts.append(f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(y_name)}</text>')
    for number, line in enumerate(drawn):
        dash = _DASHES[number % len(_DASHES)]
        places = [at(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        style = f'class="line c{number % 6}"' + (f' stroke-dasharray="{dash}"' if dash else "")
        parts.append(f'<polyline {style} points="{path}"/>')
        for (x, y), (at_x, value) in zip(places, line.points, strict=True):
            parts.append(
                f'<circle class="dot c{number % 6}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                f"<title>{escape(line.name)}, {at_x:g}: {value:.2f}</title></circle>"
            )
        y = HEIGHT + 18 * number + 10
        parts.append(f'<line {style} x1="{_LEFT}" x2="{_LEFT + 28}" y1="{y - 4}" y2="{y - 4}"/>')
        parts.append(f'<text x="{_LEFT + 36}" y="{y}">{escape(line.name)}</text>')
    return "".join([*parts, "</svg>"])
