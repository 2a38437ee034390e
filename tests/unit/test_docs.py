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
from pathlib import Path
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


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page, made from its headings as GitHub and the site make them."""
    text = re.sub(r"^( *)```.*?^\1```$", "", path.read_text("utf-8"), flags=re.DOTALL | re.M)
    headings = (heading.lower() for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "path",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))],
    ids=lambda path: path.name,
)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        found = path.parent / target if target else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), (target, anchor)


#: Words on a page, without code and tables: what one reads at a sitting.
MOST_WORDS = 1500


@pytest.mark.parametrize("name", sorted(path.name for path in DOCS.glob("*.md")))
def test_pages_are_short_and_say_first_what_they_are_for(name: str) -> None:
    text = re.sub(r"^( *)(```|:::).*?^\1\2$", "", page(name), flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)
    assert len(prose.split()) <= MOST_WORDS
    if name != "changelog.md":
        first = prose.split("\n\n")[1].lstrip()
        assert re.match(r"This (page|site)|In this tutorial", first), first


def test_each_page_is_in_the_site_once() -> None:
    listed = re.findall(r"^([a-z-]+)$", page("index.md"), re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in DOCS.glob("*.md") if path.stem != "index")


def test_places_in_the_code_that_pages_about_the_inside_cite_exist() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in DOCS.glob("internals*.md"))
    cited = re.findall(r"`([\w/]+)\.(py|lua)(?::([\w.]+))?`", pages + page("glossary.md"))
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


def test_names_that_the_docs_tell_sites_to_use_are_on_the_page_of_the_api() -> None:
    """A page about the inside tells nobody to use a name."""
    pages = [path.read_text() for path in DOCS.glob("*.md") if "internals" not in path.name]
    text = "\n".join([*pages, (ROOT / "README.md").read_text()])
    documented = set(
        re.findall(r"django_clustered_sessions\.([\w.]+)$", page("api.md"), re.MULTILINE)
    )
    imported = re.findall(
        r"^ *from django_clustered_sessions\.([\w.]+) import (?:\(\s*([\w,\s]+?),?\s*\)|([\w, ]+))",
        text,
        re.MULTILINE,
    )
    used = {
        f"{module}.{name.strip()}"
        for module, many, few in imported
        for name in (many or few).split(",")
    }
    used |= {f"registry.{name}" for name in re.findall(r"\bregistry\.(\w+)\(", text)}
    assert len(used) > 20 and used <= documented, used - documented


def is_there(name: str) -> bool:
    """Return whether a dotted name is a module, or something in one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True
