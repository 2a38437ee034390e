"""The documentation says what the code does."""

from __future__ import annotations

import ast
import io
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import redis
from django.core.management import call_command

from django_clustered_sessions import checks
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.conf import PREFIX, Settings, conf
from django_clustered_sessions.counters import NAMES
from tests.conftest import use_store
from tests.servers import StoreServer

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def test_settings_are_documented_with_their_defaults(settings: Any) -> None:
    sections = re.findall(
        rf"^### {PREFIX}(\w+)\n\nType: .*\. Default: (.+)$", page("settings.md"), re.MULTILINE
    )
    names = [name for name, property_ in vars(Settings).items() if isinstance(property_, property)]
    assert [name for name, _ in sections] == [name.upper() for name in names]
    assert not any(hasattr(settings, PREFIX + name) for name, _ in sections)
    for name, default in sections:
        value = getattr(conf, name.lower())
        if default == "the host's name":
            assert value == socket.gethostname()
        else:
            documented = ast.literal_eval(default.strip("`"))
            assert (type(value), value) == (type(documented), documented)


def test_checks_are_documented() -> None:
    raised = re.findall(r'id="(clustered_sessions\.\w+)"', Path(checks.__file__).read_text())
    documented = re.findall(r"^\| `(clustered_sessions\.\w+)` \|", page("checks.md"), re.MULTILINE)
    assert set(documented) == set(raised)
    assert len(documented) == len(set(documented))


def test_each_check_has_a_test() -> None:
    tests = (ROOT / "tests" / "test_checks.py").read_text(encoding="utf-8")
    for id_ in re.findall(r"`clustered_sessions\.(\w+)`", page("checks.md")):
        assert f'"{id_}"' in tests or f"clustered_sessions.{id_}" in tests


def test_oldest_stores_are_documented() -> None:
    (redis_, valkey) = (".".join(map(str, checks.OLDEST[name])) for name in ("redis", "valkey"))
    assert f"older than Redis {redis_} or Valkey {valkey}" in page("checks.md")


def test_counters_are_documented() -> None:
    documented = re.findall(r"^\| `([a-z_]+)` \|", page("sessionstats.md"), re.MULTILINE)
    assert [name for name in documented if name in NAMES] == list(NAMES)


def test_json_of_sessionstats_is_as_documented(store: redis.Redis) -> None:
    session = SessionStore()
    session["n"] = 1
    session.save()
    store.hset("session:{000}:figures", "web-1", "1 0 1")
    stdout = io.StringIO()
    call_command("sessionstats", format="json", stdout=stdout)
    (example,) = re.findall(r"^```json\n(.*?)^```", page("sessionstats.md"), re.DOTALL | re.M)
    assert shape(json.loads(stdout.getvalue())) == shape(json.loads(example))


def shape(value: Any) -> Any:
    """Reduce JSON to its names and kinds; all items of a list have one shape."""
    if isinstance(value, dict):
        return [(name, shape(item)) for name, item in value.items()]
    if isinstance(value, list):
        return [shape(value[0])]
    return type(value)


def test_access_rule_is_enough(store_server: StoreServer, settings: Any) -> None:
    (rule,) = re.findall(r"^ACL SETUSER site .*$", page("settings.md"), re.MULTILINE)
    with StoreServer("--appendonly", "yes", binary=store_server.binary) as server:
        with server.client() as client:
            client.execute_command(*rule.replace(">PASSWORD", ">secret").split())
        use_store(settings, f"redis://site:secret@127.0.0.1:{server.port}/1")
        session = SessionStore()
        session["n"] = 1
        session.save()
        session["n"] += 1
        session.increment("hits")
        session.save()
        session.cycle_key()
        assert session.exists(session.session_key)
        assert SessionStore(session.session_key).load() == {"n": 2, "hits": 1}
        stdout = io.StringIO()
        call_command("sessionstats", format="json", stdout=stdout)
        assert checks.check_store() == []
        session.flush()
    found = json.loads(stdout.getvalue())
    assert found["sessions"]["total"] == 1
    assert None not in (found["memory_bytes"]["total"], found["store"]["save"])


@pytest.mark.parametrize("name", ["settings.md", "checks.md", "sessionstats.md"])
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page(name)):
        assert (DOCS / target).exists(), target
