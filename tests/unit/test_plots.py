"""The charts: what is in the SVG, and what it does not need."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree
from zoneinfo import ZoneInfo

import pytest

from django_clustered_sessions.monitoring.charts import MOST, Series, merged, overview, svg
from django_clustered_sessions.monitoring.history import SLOT, History, Level, Row

SPACE = "{http://www.w3.org/2000/svg}"
START = datetime(2026, 3, 28, 18, 0, tzinfo=UTC)
TIMES = [START + n * SLOT for n in range(12)]


def drawn(*series: Series, **options: object) -> ElementTree.Element:
    options = {"title": "Requests", "times": TIMES} | options
    return ElementTree.fromstring(svg(*series, **options))  # type: ignore[arg-type]


def texts(root: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SPACE}text")]


def paths(root: ElementTree.Element) -> list[str]:
    return [path.get("d", "") for path in root.iter(f"{SPACE}path")]


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def a_history() -> History:
    rows = [
        Row(start, node, requests=10 * place, store_errors=int(place == 3))
        for start in TIMES
        for place, node in enumerate(("web-1", "web-2"), 2)
    ]
    levels = [Level(time, None if time < TIMES[3] else 50) for time in TIMES]
    now = TIMES[-1] + timedelta(minutes=2)
    return History(now, 1, TIMES, rows, [*levels, Level(now, 52)])


@pytest.mark.parametrize("kind", ["line", "bars"])
def test_chart_is_described_to_those_who_do_not_see_it(kind: str) -> None:
    root = drawn(Series("web-1", [n + 1 for n in range(12)]), kind=kind)
    assert root.get("role") == "img"
    names = [part.get("id") for part in root if part.tag in (f"{SPACE}title", f"{SPACE}desc")]
    assert root.get("aria-labelledby") == " ".join(map(str, names))
    title, description = root[0], root[1]
    assert title.text == "Requests"
    assert description.text == "From 18:00 to 18:55. web-1: 1 to 12, last 12."
    assert drawn(description="Much.")[1].text == "Much."


def test_two_charts_of_a_page_have_different_ids() -> None:
    found = [re.findall(r' id="([^"]+)"', plot.svg) for plot in overview(a_history())]
    ids = [name for names in found for name in names]
    assert len(ids) == len(set(ids)) == 8


def test_chart_needs_no_script_and_loads_nothing() -> None:
    for plot in overview(a_history()):
        assert not re.search(r"<(script|style|image|use|a|foreignObject)\b", plot.svg)
        assert not re.search(r"\s(style|on\w+|href|class)=", plot.svg)
        assert "url(" not in plot.svg


def test_names_are_escaped() -> None:
    name = """<script>alert("1")</script>&'"""
    found = svg(Series(name, [1] * 12), Series("b", [1] * 12), title=name, times=TIMES)
    assert "<script" not in found
    root = ElementTree.fromstring(found)
    assert (root[0].text, name in texts(root)) == (name, True)


def test_line_goes_through_its_points() -> None:
    root = drawn(Series("a", [0, 10, *([20] * 10)]))
    first, second, third, *_ = points(paths(root)[0])
    assert first[1] - second[1] == pytest.approx(second[1] - third[1], abs=0.2)
    assert third[0] - second[0] == pytest.approx(second[0] - first[0], abs=0.2)
    assert "nothing yet" not in texts(root)


def test_line_has_a_gap_where_nothing_is_known() -> None:
    root = drawn(Series("a", [1, 2, None, None, 5, 6, 7, None, 9, None, 1, 2]))
    (path,) = paths(root)
    assert path.count("M") == 4
    assert len(points(path)) == 8
    # A point between two gaps would be no line at all.
    assert len(list(root.iter(f"{SPACE}circle"))) == 1


def test_bars_stand_on_top_of_each_other() -> None:
    root = drawn(Series("a", [10] * 12), Series("b", [0, 20, *([0] * 10)]), kind="bars")
    low, high = (re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)", path) for path in paths(root))
    assert (len(low), len(high)) == (12, 1)
    (x, y, _, height) = map(float, high[0])
    below = [float(number) for number in low[1]]
    assert x == below[0]
    assert y + height == pytest.approx(below[1], abs=0.2)
    assert height == pytest.approx(2 * below[3], abs=0.3)
    right = float(low[-1][0]) + float(low[-1][2])
    assert right <= 720


@pytest.mark.parametrize(
    ("largest", "top"),
    [(0, "1"), (1, "1"), (3, "3"), (17, "20"), (999, "1 k"), (48_000, "60 k"), (3e6, "3 M")],
)
def test_axis_has_round_numbers(largest: float, top: str) -> None:
    root = drawn(Series("a", [largest] * 12))
    numbers = [text for text in texts(root) if ":" not in text]
    assert (numbers[0], numbers[-1]) == ("0", top)
    assert 2 <= len(numbers) <= 7
    assert len(set(numbers)) == len(numbers)


def test_times_are_those_of_the_zone_when_clocks_change() -> None:
    times = [START + n * SLOT for n in range(288)]
    labels = [
        text for text in texts(drawn(times=times, zone=ZoneInfo("Europe/Berlin"))) if ":" in text
    ]
    assert labels[0] == "21:00"
    # At 2:00 it is 3:00, for one night: three hours later it is 4:00.
    assert labels[1:3] == ["00:00", "04:00"]
    hours = [text for text in texts(drawn(times=TIMES)) if ":" in text]
    assert hours[:2] == ["18:00", "18:10"]


def test_series_that_are_too_many_are_merged() -> None:
    series = [Series(f"web-{n}", [n, None, 1]) for n in range(20)]
    found = merged(series)
    assert [one.label for one in found] == [
        *(f"web-{n}" for n in range(15, 20)),
        "15 others",
    ]
    assert found[-1].values == [sum(range(15)), None, 15]
    assert merged(series[:MOST]) == series[:MOST]
    with pytest.raises(ValueError, match="tells 7 series apart, not 20"):
        svg(*series, title="x", times=TIMES[:3])


def test_number_of_values_has_to_match_the_times() -> None:
    with pytest.raises(ValueError, match="12 values"):
        drawn(Series("a", [1, 2]))


def test_empty_chart_says_that_nothing_is_known_yet() -> None:
    for root in (drawn(), drawn(Series("a", [None] * 12)), drawn(kind="bars"), drawn(times=[])):
        assert "nothing yet" in texts(root)
        assert root[1].text == "No data yet."


def test_names_stay_within_the_chart() -> None:
    root = drawn(*(Series(f"web-{n}." + "n" * 60, [n] * 12) for n in range(6)))
    height = float(root.get("viewBox", "").split()[-1])
    shown = [text for text in root.iter(f"{SPACE}text") if "web-" in (text.text or "")]
    assert len(shown) == 6
    for text in shown:
        assert float(text.get("y", 0)) < height
        assert float(text.get("x", 0)) + len(text.text or "") * 6 < 720
    places = {(text.get("x"), text.get("y")) for text in shown}
    assert len(places) == 6


def test_legend_is_left_out_for_a_single_series() -> None:
    assert "sessions" not in texts(drawn(Series("sessions", [1] * 12)))
    assert "a" in texts(drawn(Series("a", [1] * 12), Series("b", [1] * 12)))


def test_history_gives_four_charts() -> None:
    found = {plot.name: plot for plot in overview(a_history())}
    assert list(found) == ["sessions", "requests", "lock_waits", "store_errors"]
    assert found["sessions"].series == [Series("sessions", [*([None] * 3), *([50] * 9), 52])]
    assert found["requests"].series == [
        Series("web-1", [20] * 12),
        Series("web-2", [30] * 12),
    ]
    assert found["store_errors"].series[1] == Series("web-2", [1] * 12)
    for plot in found.values():
        assert {len(one.values) for one in plot.series} == {len(plot.times)}
        ElementTree.fromstring(plot.svg)
        assert len(plot.svg) < 20_000
        assert plot.svg.__html__() == plot.svg
