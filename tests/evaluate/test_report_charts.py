import json
import math
import re

import pytest

from vlm.evaluate.report_charts import MAX_POINTS, Chart, Scale, Series, Tick, draw, short


def chart(points: list[tuple[float, float]], scale: Scale = "data", dots: bool = False) -> Chart:
    drawn = draw("T", "u", [Series(label="a", points=points, dots=dots)], scale=scale)
    assert drawn is not None
    return drawn


def places(path: str) -> list[tuple[float, float]]:
    numbers = [float(n) for n in re.findall(r"-?[\d.]+(?:e-?\d+)?", path.replace("h0", ""))]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def value_at(ticks: list[Tick], at: float) -> float:
    """Reads a linear axis as a person does: from two labelled ticks."""
    (x0, v0), (x1, v1) = [(tick.at, float(tick.label)) for tick in (ticks[0], ticks[-1])]
    return v0 + (at - x0) * (v1 - v0) / (x1 - x0)


def test_a_line_is_where_its_axes_say() -> None:
    points = [(0.0, 3.0), (10.0, 1.5), (40.0, 2.25), (100.0, 0.5)]
    drawn = chart(points)
    read = [
        (value_at(drawn.x_ticks, x), value_at(drawn.y_ticks, y))
        for x, y in places(drawn.lines[0].path)
    ]
    for (x, y), (read_x, read_y) in zip(points, read, strict=True):
        assert read_x == pytest.approx(x, abs=0.1)
        assert read_y == pytest.approx(y, abs=0.01)
    assert drawn.lines[0].last == "0.5"
    assert json.loads(drawn.hover)["series"] == [
        {"label": "a", "points": [list(point) for point in points]}
    ]


def test_a_large_span_goes_logarithmic() -> None:
    drawn = chart([(0, 0.0), (1, 1e-6), (2, 1e-4), (3, 1e-2)])
    ys = [y for _, y in places(drawn.lines[0].path)]
    assert drawn.unit == "u, log scale"
    assert len(ys) == 3, "zero has no place on it"
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.02), "equal factors, equal steps"
    assert [tick.label for tick in drawn.y_ticks] == ["1e-6", "1e-5", "1e-4", "0.001", "0.01"]
    assert chart([(0, -1.0), (1, 1e-6), (2, 100.0)]).unit == "u", "not with negative values"


def test_from_zero() -> None:
    assert chart([(0, 800.0), (1, 900.0)]).y_ticks[0].label == "800"
    assert chart([(0, 800.0), (1, 900.0)], "from_zero").y_ticks[0] == Tick(label="0", at=100.0)


def test_many_points_become_means_within_their_range() -> None:
    points = [(float(n), 5.0 + (n % 2)) for n in range(100_000)]
    drawn = chart(points)
    hover = json.loads(drawn.hover)["series"][0]["points"]
    assert MAX_POINTS / 2 < len(hover) <= MAX_POINTS
    assert hover[-1][0] == 99_999
    assert all(y == pytest.approx(5.5, abs=0.01) for _, y in hover)
    band = [value_at(drawn.y_ticks, y) for _, y in places(drawn.lines[0].band)]
    assert min(band) == pytest.approx(5.0, abs=0.01)
    assert max(band) == pytest.approx(6.0, abs=0.01)


def test_few_points_are_shown_as_they_are() -> None:
    points = [(float(n), math.sin(n)) for n in range(MAX_POINTS)]
    drawn = chart(points[::-1])
    assert len(places(drawn.lines[0].path)) == MAX_POINTS
    assert drawn.lines[0].band == ""


def test_dots_stay_round_in_a_stretched_box() -> None:
    assert chart([(0, 1.0), (1, 2.0)], dots=True).lines[0].path.count("h0") == 2


@pytest.mark.parametrize("scale", ["data", "from_zero"])
@pytest.mark.parametrize(
    "ys",
    [
        [0.0],
        [3.0],
        [-2.0],
        [1e-30, 1e-30],
        [1e29, -1e29],
        [0.1, 0.1 + 1e-16],
        [0.9991, 0.9999],
        [0.0, 1e-12],
        [1e-20, 1e20],
        [1.0, 60.0],
        [7.0, 7000.0],
    ],
)
def test_any_values_stay_in_the_box(ys: list[float], scale: Scale) -> None:
    drawn = chart([(float(n), y) for n, y in enumerate(ys)], scale)
    for x, y in places(drawn.lines[0].path):
        assert 0 <= x <= 100
        assert 0 <= y <= 100
    for ticks in (drawn.x_ticks, drawn.y_ticks):
        assert 1 <= len(ticks) <= 8
        assert all(-0.01 <= tick.at <= 100.01 for tick in ticks)
        assert len({tick.label for tick in ticks}) == len(ticks), ticks


def test_nothing_to_draw() -> None:
    assert draw("T", "u", []) is None
    assert draw("T", "u", [Series(label="a", points=[])]) is None


def test_a_series_without_points_has_no_line() -> None:
    drawn = draw("T", "u", [Series(label="a", points=[]), Series(label="b", points=[(1, 1)])])
    assert drawn is not None
    assert [line.label for line in drawn.lines] == ["b"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.93412, "0.934"),
        (12, "12"),
        (1234.4, "1234"),
        (12_500, "12.5k"),
        (1_000_000, "1M"),
        (2.5e9, "2.5G"),
        (3e-5, "3e-5"),
        (0.00012, "1.2e-4"),
        (1e15, "1e15"),
        (-0.5, "-0.5"),
    ],
)
def test_short(value: float, text: str) -> None:
    assert short(value) == text
    assert float(text.rstrip("kMG")) != 0 or value == 0
