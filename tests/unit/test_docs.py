"""The documentation says what the code does."""

from __future__ import annotations

import ast
import logging
import pkgutil
import re
import socket
from functools import cached_property
from importlib import import_module
from operator import attrgetter
from typing import Any

import pytest

from django_clustered_sessions.checks.store import OLDEST
from django_clustered_sessions.conf import PREFIX, Settings
from django_clustered_sessions.monitoring.counters import NAMES
from tests.children import ROOT
from tests.pages import DOCS, page


def test_settings_are_documented_with_their_defaults(settings: Any) -> None:
    sections = re.findall(
        rf"^### {PREFIX}(\w+)\n\nType: .*\. Default: (.+)$", page("settings.md"), re.MULTILINE
    )
    names = [
        name for name, property_ in vars(Settings).items() if isinstance(property_, cached_property)
    ]
    assert [name for name, _ in sections] == [name.upper() for name in names]
    # The tests' own.
    del settings.CLUSTERED_SESSIONS_STORE_TIMEOUT
    assert not any(hasattr(settings, PREFIX + name) for name, _ in sections)
    for name, default in sections:
        value = getattr(Settings(), name.lower())
        if default == "the host's name":
            assert value == socket.gethostname()
        else:
            documented = ast.literal_eval(default.strip("`"))
            assert (type(value), value) == (type(documented), documented)


def test_checks_are_documented() -> None:
    sources = sorted((ROOT / "django_clustered_sessions" / "checks").glob("*.py"))
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    raised = re.findall(r'id="(clustered_sessions\.\w+)"', text)
    documented = re.findall(r"^\| `(clustered_sessions\.\w+)` \|", page("checks.md"), re.MULTILINE)
    assert set(documented) == set(raised)
    assert len(documented) == len(set(documented))


def test_each_check_has_a_test() -> None:
    paths = (ROOT / "tests").glob("*/test_*checks.py")
    tests = "".join(path.read_text(encoding="utf-8") for path in paths)
    for id_ in re.findall(r"`clustered_sessions\.(\w+)`", page("checks.md")):
        assert f'"{id_}"' in tests or f"clustered_sessions.{id_}" in tests


def test_oldest_stores_are_documented() -> None:
    (redis_, valkey) = (".".join(map(str, OLDEST[name])) for name in ("redis", "valkey"))
    assert f"older than Redis {redis_} or Valkey {valkey}" in page("checks.md")


def test_counters_are_documented() -> None:
    documented = re.findall(r"^\| `([a-z0-9_]+)` \|", page("sessionstats.md"), re.MULTILINE)
    assert [name for name in documented if name in NAMES] == list(NAMES)


@pytest.mark.parametrize("name", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page(name)):
        assert (DOCS / target).exists(), target


def test_places_in_the_code_that_internals_cites_exist() -> None:
    cited = re.findall(r"`([\w/]+)\.(py|lua)(?::([\w.]+))?`", page("internals.md"))
    assert len(cited) > 100
    package = ROOT / "django_clustered_sessions"
    for path, kind, name in cited:
        if path.startswith("tests/"):
            assert name in (ROOT / f"{path}.py").read_text(encoding="utf-8"), (path, name)
        elif kind == "py":
            module = import_module(f"django_clustered_sessions.{path.replace('/', '.')}")
            assert not name or attrgetter(name)(module), (path, name)
        elif "/" in path:
            source = (package / f"{path}.lua").read_text(encoding="utf-8")
            assert not name or f"local function {name}(" in source, (path, name)


def test_names_of_the_package_in_the_docs_can_be_imported() -> None:
    """Loggers are named like modules, and are none."""
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"]
    text = "\n".join(page.read_text() for page in pages)
    names = set(re.findall(r"\bdjango_clustered_sessions(?:\.\w+)+", text))
    unknown = {name for name in names if name not in logging.root.manager.loggerDict}
    assert names and [name for name in sorted(unknown) if not is_there(name)] == []


def is_there(name: str) -> bool:
    """Return whether a dotted name is a module, or something in one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True
