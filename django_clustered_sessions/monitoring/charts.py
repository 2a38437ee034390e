"""Charts as inline SVG, drawn on the server: no script, no style sheet, no library.

Colours and dashes are attributes, so they work under a Content-Security-Policy without inline
styles. Text and axes inherit the page's text colour, so charts suit dark pages too. A page should
show the numbers in a table beside the chart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from hashlib import sha256
from html import escape
from typing import Final, Literal

from django.utils.safestring import SafeString, mark_safe
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from django_clustered_sessions.monitoring.history import History

Kind = Literal["line", "bars"]

#: Most series of a chart; if there are more, the smallest become one.
MOST: Final = 6

#: Colours with a contrast of 3:1 at least on white and on black, distinct for the colour-blind.
_COLOURS: Final = ("#3b82c4", "#d1690e", "#1f9d6b", "#b55ba3", "#9c8412", "#c94f4f", "#808080")
#: Dashes that distinguish the lines without colours.
_DASHES: Final = ("", "6 3", "2 2", "8 3 2 3", "4 2", "1 3", "10 4")

_WIDTH: Final = 720
_HEIGHT: Final = 220
_LEFT: Final = 56
_RIGHT: Final = 14
_TOP: Final = 12
_BOTTOM: Final = 26
_LEGEND: Final = 20
#: Approximate width of a letter.
_LETTER: Final = 6.6


@dataclass(frozen=True, slots=True)
class Series:
    """Numbers over the times of a chart; None where the number is unknown."""

    label: str
    values: Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Plot:
    """Chart with its name and title, and the times and series that it shows."""

    name: str
    title: str
    times: Sequence[datetime]
    series: Sequence[Series]
    svg: SafeString


def overview(history: History, zone: tzinfo = UTC) -> list[Plot]:
    """Return the charts of the last hours: sessions, requests, waits for locks, and errors.

    ``zone`` is the time zone of the axes.
    """
    sessions = Series(_("sessions"), [level.sessions for level in history.levels])
    times = [level.at for level in history.levels]
    plots = [_plot("sessions", _("Sessions"), times, [sessions], "line", zone)]
    for name, title in (
        ("requests", _("Requests in 5 minutes")),
        ("lock_waits", _("Waits for locks in 5 minutes")),
        ("store_errors", _("Errors of the store in 5 minutes")),
    ):
        counted = [Series(node, values) for node, values in history.counted(name).items()]
        plots.append(_plot(name, title, history.starts, counted, "bars", zone))
    return plots


def _plot(
    name: str,
    title: str,
    times: Sequence[datetime],
    series: Sequence[Series],
    kind: Kind,
    zone: tzinfo,
) -> Plot:
    shown = merged(series)
    return Plot(
        name, title, times, shown, svg(*shown, title=title, times=times, kind=kind, zone=zone)
    )


def merged(series: Sequence[Series], most: int = MOST) -> list[Series]:
    """Return at most ``most`` series: the largest ones, and last the sum of all others."""
    if len(series) <= most:
        return list(series)
    by_size = sorted(series, key=lambda one: -sum(value or 0 for value in one.values))
    kept, rest = by_size[: most - 1], by_size[most - 1 :]
    sums = [
        None if all(value is None for value in values) else sum(value or 0 for value in values)
        for values in zip(*(one.values for one in rest), strict=True)
    ]
    others = ngettext("%(count)d other", "%(count)d others", len(rest)) % {"count": len(rest)}
    return [*(one for one in series if one in kept), Series(others, sums)]


def svg(
    *series: Series,
    title: str,
    times: Sequence[datetime],
    description: str = "",
    kind: Kind = "line",
    zone: tzinfo = UTC,
) -> SafeString:
    """Return a chart of series over times, as an ``<svg>`` element to put into a page.

    Draws lines, or stacked bars. ``description`` is read by screen readers; by default it is made
    of the numbers. ``zone`` is the time zone of the axis.

    Raises ValueError if a series has not one value for each time, or there are too many series.
    """
    if any(len(one.values) != len(times) for one in series):
        raise ValueError(f"each series needs {len(times)} values, one for each time")
    if len(series) > len(_COLOURS):
        raise ValueError(f"a chart tells {len(_COLOURS)} series apart, not {len(series)}")
    return mark_safe("".join(_Chart(series, times, kind, zone).draw(title, description)))


class _Chart:
    """Chart while it is drawn."""

    def __init__(
        self, series: Sequence[Series], times: Sequence[datetime], kind: Kind, zone: tzinfo
    ) -> None:
        self.series, self.times, self.kind, self.zone = series, times, kind, zone
        self.stacked = kind == "bars"
        if self.stacked:
            tops = [sum(one.values[at] or 0 for one in series) for at in range(len(times))]
        else:
            tops = [value for one in series for value in one.values if value is not None]
        self.has_data = any(value is not None for one in series for value in one.values)
        self.step = _step(max(tops, default=0))
        self.top = max(math.ceil(max(tops, default=0) / self.step), 1) * self.step
        # A single series needs no legend, because the title names it.
        self.key = 18 if self.stacked else 30
        self.legend = list(_legend(series, self.key)) if len(series) > 1 else []
        rows = 1 + max((row for _, row in self.legend), default=-1)
        self.floor = _TOP + _HEIGHT - _BOTTOM
        self.height = _HEIGHT + _TOP + rows * _LEGEND

    def draw(self, title: str, description: str) -> Iterator[str]:
        description = description or self._description()
        seed = repr((title, description, self.kind, [one.label for one in self.series]))
        name = "plot-" + sha256(seed.encode("utf-8", "replace")).hexdigest()[:8]
        yield (
            '<svg xmlns="http://www.w3.org/2000/svg" role="img"'
            f' viewBox="0 0 {_WIDTH} {self.height}" width="100%"'
            f' aria-labelledby="{name}-title {name}-desc" fill="currentColor"'
            ' font-family="system-ui, sans-serif" font-size="12">'
            f'<title id="{name}-title">{escape(title)}</title>'
            f'<desc id="{name}-desc">{escape(description)}</desc>'
        )
        yield from self._value_axis()
        yield from self._time_axis()
        if not self.has_data:
            yield _text((_LEFT + _WIDTH - _RIGHT) / 2, self.floor / 2, _("nothing yet"), "middle")
        elif self.stacked:
            yield from self._bars()
        else:
            yield from self._lines()
        yield from self._names()
        yield "</svg>"

    def _description(self) -> str:
        if not self.times or not self.has_data:
            return _("No data yet.")
        parts = []
        for one in self.series:
            known = [value for value in one.values if value is not None]
            if known:
                parts.append(
                    _("%(name)s: %(least)s to %(most)s, last %(last)s")
                    % {
                        "name": one.label,
                        "least": _short(min(known)),
                        "most": _short(max(known)),
                        "last": _short(known[-1]),
                    }
                )
        begin, end = (_clock(time, self.zone) for time in (self.times[0], self.times[-1]))
        return _("From %(begin)s to %(end)s. %(series)s.") % {
            "begin": begin,
            "end": end,
            "series": "; ".join(parts),
        }

    def _x(self, time: datetime) -> float:
        first, last = self.times[0], self.times[-1]
        if self.stacked:
            last += self._width
        whole = (last - first) / timedelta(seconds=1) or 1.0
        share = (time - first) / timedelta(seconds=1) / whole
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def _y(self, value: float) -> float:
        return self.floor - value / self.top * (self.floor - _TOP)

    @property
    def _width(self) -> timedelta:
        return self.times[1] - self.times[0] if len(self.times) > 1 else timedelta(minutes=5)

    def _value_axis(self) -> Iterator[str]:
        for number in range(round(self.top / self.step) + 1):
            value = number * self.step
            y = self._y(value)
            opacity = 0.6 if number == 0 else 0.18
            yield (
                f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
                f' stroke="currentColor" stroke-opacity="{opacity}"/>'
            )
            yield _text(_LEFT - 8, y + 4, _short(value), "end")

    def _time_axis(self) -> Iterator[str]:
        if not self.times:
            return
        for time in _ticks(self.times[0], self.times[-1], self.zone):
            x = self._x(time)
            yield (
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{self.floor}" y2="{self.floor + 4}"'
                ' stroke="currentColor" stroke-opacity="0.6"/>'
            )
            yield _text(x, self.floor + 18, _clock(time, self.zone), "middle")

    def _bars(self) -> Iterator[str]:
        bases = [0.0] * len(self.times)
        width = self._x(self.times[0] + self._width) - _LEFT
        if width > 4:
            # Gaps between narrower bars would flicker.
            width *= 0.86
        for number, one in enumerate(self.series):
            path = []
            for at, value in enumerate(one.values):
                if value:
                    x, y = self._x(self.times[at]), self._y(bases[at] + value)
                    height = self._y(bases[at]) - y
                    path.append(f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h-{width:.1f}z")
                    bases[at] += value
            if path:
                yield f'<path d="{"".join(path)}" fill="{_COLOURS[number]}"/>'

    def _lines(self) -> Iterator[str]:
        for number, one in enumerate(self.series):
            path, before, alone = [], False, []
            for at, value in enumerate(one.values):
                if value is not None:
                    after = at + 1 < len(one.values) and one.values[at + 1] is not None
                    x, y = self._x(self.times[at]), self._y(value)
                    path.append(f"{'L' if before else 'M'}{x:.1f} {y:.1f}")
                    if not before and not after:
                        alone.append(
                            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{_COLOURS[number]}"/>'
                        )
                before = value is not None
            yield (
                f'<path d="{"".join(path)}" fill="none" stroke="{_COLOURS[number]}"'
                f' stroke-width="2" stroke-linejoin="round"{_dashes(self, number)}/>'
            )
            yield from alone

    def _names(self) -> Iterator[str]:
        for number, (x, row) in enumerate(self.legend):
            y = _HEIGHT + _TOP + row * _LEGEND + 8
            colour = _COLOURS[number]
            if self.stacked:
                yield f'<rect x="{x:.0f}" y="{y - 9}" width="12" height="10" fill="{colour}"/>'
            else:
                yield (
                    f'<line x1="{x:.0f}" x2="{x + 24:.0f}" y1="{y - 4}" y2="{y - 4}"'
                    f' stroke="{colour}" stroke-width="2"{_dashes(self, number)}/>'
                )
            yield _text(x + self.key, y, _cut(self.series[number].label), "start")


def _dashes(chart: _Chart, number: int) -> str:
    dashes = _DASHES[number]
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _legend(series: Sequence[Series], key: int) -> Iterator[tuple[float, int]]:
    """Yield the position of each name in the legend: x, and its row."""
    x, row = float(_LEFT), 0
    for one in series:
        width = key + len(_cut(one.label)) * _LETTER + 18
        if x > _LEFT and x + width > _WIDTH - _RIGHT:
            x, row = float(_LEFT), row + 1
        yield x, row
        x += width


def _cut(label: str) -> str:
    return label if len(label) <= 40 else f"{label[:39]}…"


def _step(largest: float) -> int:
    """Return the distance of an axis' lines: 1, 2 or 5 times a power of ten, and at least 1."""
    wanted = max(largest / 4, 1)
    power: int = 10 ** math.floor(math.log10(wanted))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted)


def _ticks(first: datetime, last: datetime, zone: tzinfo) -> Iterator[datetime]:
    """Yield round times within a span, about eight."""
    minutes = (last - first) / timedelta(minutes=1)
    length = next((m for m in (5, 10, 15, 30, 60, 120, 180, 360) if minutes / m <= 9), 720)
    midnight = first.astimezone(zone).replace(hour=0, minute=0, second=0, microsecond=0)
    # In UTC, so that clock changes do not shift the ticks.
    time = midnight.astimezone(UTC)
    while time <= last:
        if time >= first:
            yield time
        time += timedelta(minutes=length)


def _clock(time: datetime, zone: tzinfo) -> str:
    return f"{time.astimezone(zone):%H:%M}"


def _short(value: float) -> str:
    """Return a number in a few characters."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g}"
