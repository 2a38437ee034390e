"""Hold the imports of the package to the picture in ``docs/internals.md``."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import django_clustered_sessions

PACKAGE = Path(django_clustered_sessions.__file__).parent

#: A module imports from the rows below its folder's only, and from those below its own in there.
HOUSE = [
    "apps management pytest_plugin templatetags urls",
    "admin checks",
    "channels devices expiry middleware",
    "endings",
    "backend opentelemetry plots prometheus registry",
    "figures session",
    "history moving",
    "store",
    "signals",
    "cluster decorators embedded events responses serializers",
    "conf counters protocol",
    "exceptions migrations models",
]
ROOMS = {
    "": [
        "apps admin backend channels cluster conf counters decorators embedded endings "
        "events exceptions expiry history middleware models opentelemetry plots prometheus "
        "pytest_plugin registry responses serializers signals urls"
    ],
    "checks": ["store", "settings", "entry values"],
    "devices": ["urls", "views", "rows", "agents"],
    "figures": [
        "tables",
        "documents metrics reporting survey",
        "held_locks statistics",
        "replies servers",
    ],
    "management.commands": ["sessionevents sessionimport sessionserver sessionstats"],
    "migrations": ["0001_session"],
    "moving": ["in_bulk", "taking_over", "old_engine"],
    "protocol": [
        "flows limits",
        "listing locks",
        "commands",
        "fields outcomes terms",
        "record steps",
        "merge scripts",
    ],
    "session": [
        "operations",
        "admission hold",
        "holding lifetime replication usage",
        "clients near values",
    ],
    "store": ["connections drivers", "breaker nodes replies watching"],
    "templatetags": ["clustered_sessions"],
}


def _ranks() -> dict[str, tuple[str, int, int]]:
    """Return each module's part of the house, and how far down part and module are."""
    floors = {part: floor for floor, row in enumerate(HOUSE) for part in row.split()}
    ranks = {}
    for room, rows in ROOMS.items():
        for rank, row in enumerate(rows):
            for name in row.split():
                module = f"{room}.{name}".lstrip(".")
                part = module.partition(".")[0]
                ranks[module] = part, floors[part], rank
    return ranks


RANK = _ranks()

#: Modules that touch a store; nobody else knows redis-py.
STORE = {"cluster", *(module for module in RANK if module.startswith("store."))} - {"store.breaker"}

#: Logic that gets clock, token and randomness as arguments, and runs without Django.
PURE = {"events", "exceptions", *(module for module in RANK if module.startswith("protocol."))}
IMPURE = {"asgiref", "asyncio", "django", "os", "random", "secrets", "socket", "threading", "time"}


def modules() -> dict[str, Path]:
    """Return the package's modules by their name inside it."""
    paths = {path.relative_to(PACKAGE): path for path in PACKAGE.rglob("*.py")}
    return {
        ".".join(name.with_suffix("").parts): path
        for name, path in paths.items()
        if name.name != "__init__.py"
    }


def imported(path: Path) -> Iterator[str]:
    """Yield the absolute name of everything a module imports, at its top or inside a function."""
    package = (PACKAGE.name, *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def within(name: str) -> str | None:
    """Return the module of the package that an imported name stands for, None for any other."""
    top, _, rest = name.partition(".")
    if top != PACKAGE.name:
        return None
    return next((module for module in (rest, rest.rpartition(".")[0]) if module in RANK), None)


def test_every_module_has_a_row() -> None:
    assert set(modules()) == set(RANK)


@pytest.mark.parametrize("module", RANK)
def test_imports_point_downwards(module: str) -> None:
    part, floor, rank = RANK[module]
    own = {found for name in imported(modules()[module]) if (found := within(name))}
    inside = {name for name in own if RANK[name][0] == part}
    assert {name for name in inside if RANK[name][2] <= rank} == set()
    assert {name for name in own - inside if RANK[name][1] <= floor} == set()


@pytest.mark.parametrize("module", RANK)
def test_imports_from_outside_are_where_they_belong(module: str) -> None:
    outside = {name.partition(".")[0] for name in imported(modules()[module])}
    if module not in STORE:
        assert not outside & {"redis", "valkey", "hiredis"}
    if module in PURE:
        assert not outside & IMPURE


def test_importing_the_package_opens_no_connection() -> None:
    names = [f"{PACKAGE.name}.{module}" for module in RANK]
    code = f"""
import importlib, os, socket, subprocess, sys, threading
os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
def audit(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.fork"):
        raise SystemExit(f"{{event}} {{arguments}}")
sys.addaudithook(audit)
import django
django.setup()
for name in {names}:
    importlib.import_module(name)
assert threading.active_count() == 1, threading.enumerate()
"""
    root = PACKAGE.parent
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=root, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
