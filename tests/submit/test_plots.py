"""Plots are well-formed, escape what they are told, and show what they are given."""

import math
import re
from xml.etree import ElementTree

import pytest

from submit.plots import (
    BUCKETS,
    HEIGHT,
    Bar,
    Dot,
    Mark,
    Series,
    Span,
    bar_plot,
    compact,
    line_plot,
    scatter_plot,
    span_plot,
    thinned,
    ticks,
)

EVIL = '<script>alert("1")</script>&'
SVG = "{http://www.w3.org/2000/svg}"


def drawn(svg: str) -> ElementTree.Element:
    """The drawing, read as XML: anything that is not escaped would be an error or an element."""
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert not list(root.iter(f"{SVG}script"))
    numbers = re.findall(r'\b(?:x|y|x1|x2|y1|y2|cx|cy|width|height)="([^"]*)"', svg)
    assert all(math.isfinite(float(number)) for number in numbers)
    return root


def titles(root: ElementTree.Element) -> list[str]:
    return [one.text or "" for one in root.iter(f"{SVG}title")]


def test_a_line_breaks_where_there_is_no_value() -> None:
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, None), (3.0, float("nan")), (4.0, 1.5), (5.0, 1.0)]
    root = drawn(line_plot(EVIL, [Series(EVIL, points)], [Mark(2.0, EVIL), Mark(3.0, "left out", "skipped")]))
    (path,) = [one.get("d") or "" for one in root.iter(f"{SVG}path") if "line" in (one.get("class") or "")]
    assert path.count("M") == 2
    assert f"tokens 0, {EVIL} 1" in titles(root)
    assert {EVIL, "left out"} <= set(titles(root))
    assert root.get("aria-label") == EVIL


@pytest.mark.parametrize("points", [[], [(1.0, None)], [(1.0, math.nan)]])
def test_nothing_is_drawn_of_nothing(points: list[tuple[float, float | None]]) -> None:
    assert line_plot("empty", [Series("loss", points)]) == ""
    assert span_plot("empty", []) == bar_plot("empty", [], [], compact) == ""
    assert scatter_plot("empty", [], [], x_label="x", y_label="y") == ""


@pytest.mark.parametrize("values", [[2.0], [0.0, 0.0], [5.0, 5.0, 5.0], [1e-12, 2e-12], [-1.0, 1.0], [1e15, 1e16]])
@pytest.mark.parametrize("log", [False, True])
def test_any_values_have_a_scale(values: list[float], log: bool) -> None:
    points = [(float(place), value) for place, value in enumerate(values)]
    drawn(line_plot("values", [Series("value", points, dots=True)], log=log, falls=True))
    drawn(line_plot("values", [Series("value", points)], log=log, zero=True))


def test_a_long_line_keeps_its_extremes() -> None:
    points = [(float(step), 100.0 if step == 5_000 else math.sin(step)) for step in range(10_000)]
    thin = thinned(points)
    assert len(thin) <= BUCKETS
    assert max(high for *_, high in thin) == 100.0
    assert min(low for _, _, low, _ in thin) == pytest.approx(-1, abs=1e-3)
    svg = line_plot("long", [Series("loss", points)])
    assert "band" in svg
    assert len(svg) < 60_000
    drawn(svg)


def test_the_steep_start_of_many_points_leaves_the_plot() -> None:
    points = [(float(step), 11.0 if step == 0 else 3 - step / 1000) for step in range(200)]
    labels = [one.text for one in drawn(line_plot("loss", [Series("loss", points)], falls=True)).iter(f"{SVG}text")]
    assert "10" not in labels
    labels = [one.text for one in drawn(line_plot("loss", [Series("loss", points)])).iter(f"{SVG}text")]
    assert "10" in labels


def test_a_few_points_stay_in_the_plot_beside_many() -> None:
    many = [(float(x), 20.0 if x == 0 else 2 + 1 / (x + 1)) for x in range(200)]
    few = Series("validation", [(0.0, 10.0), (199.0, 3.0)], 2, dots=True)
    picture = drawn(line_plot("loss", [Series("loss", many), few], falls=True))
    heights = [float(dot.get("cy", "nan")) for dot in picture.iter(f"{SVG}circle")]
    assert len(heights) == 2
    assert all(0 <= height <= HEIGHT for height in heights)


def test_scores_bars_and_dots_say_their_figures() -> None:
    span = Span(EVIL, 12.5, 10.0, 15.0, 20.0, [("other <i>", 33.0)])
    assert f"{EVIL}: 12.50, 95% 10.00 to 15.00, chance 20.0" in titles(drawn(span_plot("scores", [span])))
    assert "other <i>: 33.00" in titles(drawn(span_plot("scores", [span])))
    bar = Bar(EVIL, [("weights", 2e9, 1), ("cache", 0.0, 2)], "2 GB")
    root = drawn(bar_plot("memory", [bar], [("limit", 12e9)], compact))
    assert f"{EVIL}, weights: 2B" in titles(root)
    dots = [Dot(EVIL, 1e9, 20.0, 1, label=True), Dot("b", 3e9, 0.0, 7, hollow=True)]
    root = drawn(scatter_plot("front", dots, [(1e9, 20.0)], x_label="parameters", y_label="mean"))
    assert f"{EVIL}: mean 20.00, parameters 1B" in titles(root)


def test_labels_of_neighbours_do_not_lie_on_each_other() -> None:
    dots = [Dot(f"model {number}", 1e9 + number, 20.0, 1, label=True) for number in range(5)]
    root = drawn(scatter_plot("crowd", dots, [], x_label="x", y_label="y"))
    names = [one.text for one in root.iter(f"{SVG}text") if one.get("class") == "name"]
    assert len(names) <= 1
    assert len([one for one in titles(root) if one.startswith("model")]) == 5


def test_numbers_for_axes() -> None:
    assert [compact(value) for value in (0, 0.25, 12, 30_000, 1_234_000, 2.5e9, 3e-5)] == [
        "0", "0.25", "12", "30k", "1.23M", "2.5B", "3e-05",
    ]  # fmt: skip
    assert ticks(0, 10) == [0, 2.5, 5, 7.5, 10]
    assert ticks(-0.1, 0.1)[2] == 0.0
