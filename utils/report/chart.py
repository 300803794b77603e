"""Line charts of the report, as SVG.

The lines are in an SVG that is stretched to the width of the page; ticks and labels are HTML beside it, so that they
have the size of text on a phone as well. The values are in the page too, for the script that shows them on hovering.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from utils.report.curves import Curve, Point

# The coordinates of the drawing, which is stretched afterwards.
WIDTH, HEIGHT = 1000, 400
# About as many ticks as an axis has.
TICKS = 5
# Positive values whose ratio exceeds this number are drawn on a logarithmic axis, if the chart allows it.
LOG_RATIO = 50


@dataclass(frozen=True)
class Line:
    """A curve of a chart."""

    name: str
    """The line's name in the legend."""
    curve: Curve
    """The line's values."""
    unit: float = 1.0
    """Units of the metric in one unit of the axis, such as 2**30 bytes."""
    has_dots: bool = False
    """True if the line has few values, and each has a dot."""


@dataclass(frozen=True)
class Chart:
    """Some curves over the same steps."""

    title: str
    """The title."""
    y_label: str
    """The meaning of the values, with their unit."""
    lines: Sequence[Line]
    """The curves; those without points are left out."""
    from_zero: bool = True
    """True if the axis begins at zero."""
    may_be_log: bool = False
    """True if the axis is logarithmic if the values differ widely."""


@dataclass(frozen=True)
class Axis:
    """The values that an axis shows."""

    low: float
    """The value at its beginning."""
    high: float
    """The value at its end."""
    is_log: bool = False
    """True if the axis is logarithmic."""

    def fraction(self, value: float) -> float:
        """The place of a value on the axis, from 0 to 1."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        # Halves, since the difference of the largest numbers is infinite.
        return min(1.0, max(0.0, (value / 2 - low / 2) / (high / 2 - low / 2)))


def chart_html(chart: Chart, last_step: int) -> str:
    """A chart as HTML; empty if no curve has a value."""
    drawn = [line for line in chart.lines if line.curve.points]
    notes = "".join(f"<p class=note>{escape(text)}</p>" for line in chart.lines if (text := _not_finite_text(line)))
    title, label = escape(chart.title), escape(chart.y_label)
    if not drawn:
        return f"<figure><figcaption><b>{title}</b></figcaption>{notes}</figure>" if notes else ""
    across, up = Axis(0, max(last_step, 1)), _y_axis(chart, drawn)
    logarithmic = ", logarithmic" if up.is_log else ""
    x_ticks = [(value, tick_text(value)) for value in ticks(across.low, across.high) if value == int(value)]
    y_ticks = [(value, tick_text(value)) for value in (_log_ticks(up) if up.is_log else ticks(up.low, up.high))]
    grid = "".join(f"M0 {_y(up, value)}H{WIDTH}" for value, _ in y_ticks)
    lines = "".join(_line_svg(line, number, across, up) for number, line in enumerate(drawn))
    legend = "".join(f'<span class="key c{number}">{escape(line.name)}</span>' for number, line in enumerate(drawn))
    summary = "; ".join(f"{line.name}: last {tick_text(line.curve.last / line.unit)}" for line in drawn)
    return (
        f"<figure class=chart><figcaption><b>{title}</b> <span>{label}{logarithmic}</span></figcaption>"
        f"<div class=plot><div class=y>{''.join(_y_tick(up, *tick) for tick in y_ticks)}</div><div class=area>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(f"{chart.title}. {summary}")}"><path class=grid d="{grid}"/>{lines}</svg>'
        f"<div class=cursor hidden></div></div>"
        f"<div class=x>{''.join(_x_tick(across, *tick) for tick in x_ticks)}</div></div>"
        f"<div class=legend>{legend}<span class=axis>step</span></div><output></output>{notes}"
        f'<script type="application/json">{_data(drawn, across)}</script></figure>'
    )


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, about `TICKS` of them.

    >>> ticks(0, 300), ticks(4.6, 8.4)
    ([0.0, 100.0, 200.0, 300.0], [5.0, 6.0, 7.0, 8.0])
    """
    rough = high / TICKS - low / TICKS
    if not rough > 0 or not math.isfinite(rough):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((factor * power for factor in (1, 2, 5) if rough <= factor * power * 1.0001), 10 * power)
    if not step > 0 or not math.isfinite(step) or abs(low) > 1e12 * step:
        return [low]
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_text(value: float) -> str:
    """A number with as many digits as a reader needs.

    >>> tick_text(0.3), tick_text(12500), tick_text(5e-6), tick_text(0)
    ('0.3', '12,500', '5e-06', '0')
    """
    if value != 0 and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.3g}".replace("e+", "e")
    text = f"{value:,.{0 if abs(value) >= 1000 else 2 if abs(value) >= 10 else 4}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _y_axis(chart: Chart, lines: Sequence[Line]) -> Axis:
    low = min(point.low / line.unit for line in lines for point in line.curve.points)
    high = max(point.high / line.unit for line in lines for point in line.curve.points)
    if chart.may_be_log and low > 0 and high / low > LOG_RATIO:
        return Axis(low / 1.1, min(high * 1.1, 1e308), is_log=True)
    if chart.from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    margin = high / 20 - low / 20
    return Axis(low if chart.from_zero and low == 0 else max(low - margin, -1e308), min(high + margin, 1e308))


def _log_ticks(axis: Axis) -> list[float]:
    """Powers of ten on a logarithmic axis, at most about `TICKS`; its ends if there is none."""
    first, last = math.ceil(math.log10(axis.low)), math.floor(math.log10(axis.high))
    every = max(1, math.ceil((last - first + 1) / (TICKS + 1)))
    return [10.0**power for power in range(first, last + 1, every)] or [axis.low, axis.high]


def _line_svg(line: Line, number: int, across: Axis, up: Axis) -> str:
    """The mean of each point and, where points have several values, the band from the smallest to the largest."""
    points = line.curve.points
    places = [(round(WIDTH * across.fraction(_middle(point))), point) for point in points]
    mean = " ".join(f"{x} {_y(up, point.mean / line.unit)}" for x, point in places)
    svg = ""
    if points[0].count > 1:
        above = " ".join(f"{x} {_y(up, point.high / line.unit)}" for x, point in places)
        below = " ".join(f"{x} {_y(up, point.low / line.unit)}" for x, point in reversed(places))
        svg += f'<path class="band c{number}" d="M{above} {below}Z"/>'
    svg += f'<path class="line c{number}" d="M{mean}"/>'
    if line.has_dots or len(points) == 1:
        dots = "".join(f"M{x} {_y(up, point.mean / line.unit)}h0" for x, point in places)
        svg += f'<path class="dots c{number}" d="{dots}"/>'
    return svg


def _middle(point: Point) -> float:
    return (point.first_step + point.last_step) / 2


def _y(axis: Axis, value: float) -> int:
    return round(HEIGHT * (1 - axis.fraction(value)))


def _y_tick(axis: Axis, value: float, text: str) -> str:
    return f'<span style="top:{100 * (1 - axis.fraction(value)):.1f}%">{text}</span>'


def _x_tick(axis: Axis, value: float, text: str) -> str:
    percent = 100 * axis.fraction(value)
    if percent > 95:  # in the middle of its place, a long number would leave the chart
        return f'<span class=last style="right:{100 - percent:.1f}%">{text}</span>'
    return f'<span style="left:{percent:.1f}%">{text}</span>'


def _data(lines: Sequence[Line], across: Axis) -> str:
    """The data for hovering: points as [step, value] or [first step, last step, mean, low, high]."""
    content = {
        "last": across.high,
        "lines": [{"name": line.name, "points": [_values(point, line.unit) for point in line.curve.points]}
                  for line in lines],
    }  # fmt: skip
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def _values(point: Point, unit: float) -> list[float]:
    if point.count == 1:
        return [_rounded(point.first_step), _rounded(point.mean / unit)]
    values = (point.mean / unit, point.low / unit, point.high / unit)
    return [_rounded(point.first_step), _rounded(point.last_step), *map(_rounded, values)]


def _rounded(value: float) -> float:
    """A number with few digits. A whole one is written without a point, as steps are."""
    if abs(value) >= 1e15:
        return float(f"{value:.5g}")
    rounded = float(f"{value:.5g}") if abs(value) < 1e5 else round(value)
    return int(rounded) if rounded == int(rounded) else rounded


def _not_finite_text(line: Line) -> str:
    curve = line.curve
    if not curve.not_finite:
        return ""
    step = tick_text(curve.first_not_finite_step or 0)
    values = "1 value is" if curve.not_finite == 1 else f"{curve.not_finite:,} values are"
    return f"{line.name}: {values} not finite, first at step {step}"
