"""Line charts for the report page: numbers in, percentages and SVG paths out.

A chart is drawn in a box of 100 x 100 that the page stretches; labels stay text of the page, so
they are readable at any width. Pure: no I/O, no HTML, no knowledge of metrics.
"""

import json
import math
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

#: above this many points, a line becomes the mean over that many stretches and a min-max band
MAX_POINTS = 240
#: an axis whose values span more than this goes logarithmic
LOG_ABOVE = 50.0

Scale = Literal["data", "from_zero"]
_Stretch = tuple[float, float, float, float]  # x, mean, min, max


@dataclass(frozen=True, kw_only=True)
class Series:
    """Values over steps; ``points`` are finite (x, y) pairs in any order."""

    label: str
    points: list[tuple[float, float]]
    #: dots for rare measurements, a line for the rest
    dots: bool = False
    #: which of the page's four colours and dashes
    style: int = 0


@dataclass(frozen=True, kw_only=True)
class Tick:
    label: str
    #: per cent of the axis, from the left or from the top
    at: float


@dataclass(frozen=True, kw_only=True)
class Line:
    label: str
    style: int
    dots: bool
    path: str
    band: str
    last: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    title: str
    unit: str
    note: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    #: JSON: {"x": [low, high], "series": [{"label", "points": [[x, y], ...]}, ...]}
    hover: str


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    is_log: bool

    def at(self, value: float) -> float:
        """Per cent of the way from low to high."""
        if self.is_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(100 * share, 2)


def draw(
    title: str, unit: str, series: list[Series], *, scale: Scale = "data", note: str = ""
) -> Chart | None:
    """None when no series has a point."""
    series = [s for s in series if s.points]
    if not series:
        return None
    y_axis = _y_axis([y for s in series for _, y in s.points], scale)
    if y_axis.is_log:
        kept = [[(x, y) for x, y in s.points if y > 0] for s in series]
    else:
        kept = [s.points for s in series]
    xs = [x for points in kept for x, _ in points]
    x_axis = _Axis(min(xs), max(xs), False) if max(xs) > min(xs) else _around(xs[0])
    thinned = [_thin(sorted(points), x_axis) for points in kept]
    hover = {
        "x": [x_axis.low, x_axis.high],
        "series": [
            {"label": s.label, "points": [[round(x), _round(mean)] for x, mean, _, _ in points]}
            for s, points in zip(series, thinned, strict=True)
        ],
    }
    return Chart(
        title=title,
        unit=f"{unit}, log scale" if y_axis.is_log else unit,
        note=note,
        lines=[
            _line(s, points, x_axis, y_axis)
            for s, points in zip(series, thinned, strict=True)
            if points
        ],
        x_ticks=_ticks(x_axis, whole=True),
        y_ticks=[Tick(label=tick.label, at=100 - tick.at) for tick in _ticks(y_axis)],
        hover=json.dumps(hover, separators=(",", ":")),
    )


def short(value: float) -> str:
    """Three significant digits, the way a person writes them: 0.934, 12.5k, 3e-5."""
    size = abs(value)
    for limit, unit, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if limit <= size < 1e12:
            return f"{value / unit:.4g}{suffix}"
    if 100 <= size < 1e4:
        return f"{value:.0f}"
    if 1e-4 <= size < 1e-3:
        return f"{value * 1e4:.3g}e-4"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+", "e")


def _line(series: Series, points: list[_Stretch], x_axis: _Axis, y_axis: _Axis) -> Line:
    places = [(x_axis.at(x), 100 - y_axis.at(mean)) for x, mean, _, _ in points]
    if series.dots:
        # A stroke of no length with round ends: a circle however the box is stretched.
        path = "".join(f"M{x:g} {y:g}h0" for x, y in places)
    else:
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in places)
    band = ""
    if not series.dots and any(low < high for _, _, low, high in points):
        upper = [f"{x_axis.at(x):g} {100 - y_axis.at(high):g}" for x, _, _, high in points]
        lower = [f"{x_axis.at(x):g} {100 - y_axis.at(low):g}" for x, _, low, _ in points]
        band = "M" + "L".join(upper + lower[::-1]) + "Z"
    last = short(points[-1][1])
    return Line(
        label=series.label, style=series.style, dots=series.dots, path=path, band=band, last=last
    )


def _thin(points: list[tuple[float, float]], x_axis: _Axis) -> list[_Stretch]:
    """Sorted points, gathered into MAX_POINTS equal stretches of the axis if there are more."""
    if len(points) <= MAX_POINTS:
        return [(x, y, y, y) for x, y in points]
    thinned = []
    for _, part in groupby(points, lambda p: int(x_axis.at(p[0]) * MAX_POINTS / 100.01)):
        stretch = list(part)
        ys = [y for _, y in stretch]
        thinned.append((stretch[-1][0], sum(ys) / len(ys), min(ys), max(ys)))
    return thinned


def _y_axis(values: list[float], scale: Scale) -> _Axis:
    low, high = min(values), max(values)
    positive = [v for v in values if v > 0]
    if scale == "data" and low >= 0 and positive and high / min(positive) > LOG_ABOVE:
        return _Axis(min(positive) / 1.1, high * 1.1, True)
    if scale == "from_zero":
        low = min(low, 0.0)
    if math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-30):
        return _around(low)
    room = 0.05 * (high - low)
    return _Axis(low if low == 0 else low - room, high + room, False)


def _around(value: float) -> _Axis:
    room = abs(value) / 2 or 1.0
    return _Axis(value - room, value + room, False)


def _ticks(axis: _Axis, whole: bool = False) -> list[Tick]:
    """About five round values within the axis: steps of 1, 2 or 5, on a log axis also powers."""
    if axis.is_log:
        return _log_ticks(axis)
    rough = (axis.high - axis.low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    if whole:
        step = max(step, 1.0)
    first, last = math.ceil(axis.low / step - 1e-9), math.floor(axis.high / step + 1e-9)
    # As many decimals as tell neighbours apart, unless that makes a long number.
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    plain = decimals <= 4 and max(abs(first), abs(last)) * step < 1e4
    values = [n * step for n in range(first, last + 1)]
    return [Tick(label=f"{v:.{decimals}f}" if plain else short(v), at=axis.at(v)) for v in values]


def _log_ticks(axis: _Axis) -> list[Tick]:
    powers = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
    values = [
        m * 10.0**p for p in powers for m in (1, 2, 5) if axis.low <= m * 10.0**p <= axis.high
    ]
    if len(values) > 6:
        values = [10.0**p for p in powers if axis.low <= 10.0**p <= axis.high]
        values = values[:: -(-len(values) // 6)]
    return [Tick(label=short(v), at=axis.at(v)) for v in values]


def _round(value: float) -> float:
    return float(f"{value:.4g}")
