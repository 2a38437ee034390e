"""The documentation says what the code does."""

from __future__ import annotations

import ast
import io
import json
import re
import socket
import threading
import time
from functools import cached_property
from typing import Any

import pytest
import redis
from django.core.management import call_command

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.checks.store import OLDEST, check_store
from django_clustered_sessions.conf import PREFIX, Settings, conf
from django_clustered_sessions.counters import KEPT, NAMES, counters
from django_clustered_sessions.protocol import commands
from django_clustered_sessions.protocol.locks import Turn
from django_clustered_sessions.protocol.record import Locker, Place
from django_clustered_sessions.session.hold import Hold
from django_clustered_sessions.store import connections
from tests.children import ROOT
from tests.conftest import use_store
from tests.pages import DOCS, page, shape
from tests.servers import StoreServer, wait_for


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
    tests = (ROOT / "tests" / "unit" / "test_checks.py").read_text(encoding="utf-8")
    for id_ in re.findall(r"`clustered_sessions\.(\w+)`", page("checks.md")):
        assert f'"{id_}"' in tests or f"clustered_sessions.{id_}" in tests


def test_oldest_stores_are_documented() -> None:
    (redis_, valkey) = (".".join(map(str, OLDEST[name])) for name in ("redis", "valkey"))
    assert f"older than Redis {redis_} or Valkey {valkey}" in page("checks.md")


def test_counters_are_documented() -> None:
    documented = re.findall(r"^\| `([a-z0-9_]+)` \|", page("sessionstats.md"), re.MULTILINE)
    assert [name for name in documented if name in NAMES] == list(NAMES)


def test_json_of_sessionstats_is_as_documented(store: redis.Redis) -> None:
    # What this process has counted would make a node of it that never waited.
    counters.take(now=True)
    session = SessionStore()
    session["n"] = 1
    session.save()
    counts = ("0" if name == "sync_shortfalls" else "1" for name in NAMES)
    store.hset("session:{000}:figures", "web-1", " ".join(["1", "0", *counts]))
    at, future, since = (
        Place.of("session", session.session_key or ""),
        (2**47).to_bytes(6),
        bytes(6),
    )
    store.hset(at.record, "m:lock", b"a" * 16 + future + since)
    lockers = (token * 16 + future + since + b"\1\5web-1" for token in (b"a", b"b"))
    store.hset(at.locks, at.id, b"".join(lockers))
    found = []
    slot = int(time.time() * 1000) // commands.SLOT_MS
    store.hset("session:{000}:history", f"{slot} web-1", " ".join("1" for _ in KEPT))
    for option in ({"locks": True}, {"history": 1}, {"exact": True}):
        stdout = io.StringIO()
        call_command("sessionstats", format="json", stdout=stdout, **option)
        found.append(shape(json.loads(stdout.getvalue())))
    examples = re.findall(r"^```json\n(.*?)^```", page("sessionstats.md"), re.DOTALL | re.M)
    assert found == [shape(json.loads(example)) for example in examples]


def assert_waiters_are_woken(session: SessionStore) -> None:
    """Wait for a lock; who is not allowed to read its mailbox would find out later."""
    place = Place.of(conf.key_prefix, session.session_key or "")
    turns: list[Turn] = []

    def wait() -> None:
        waiter = SessionStore(session.session_key)
        with waiter.lock():
            waiter.increment("hits")

    def is_waited_for() -> bool:
        client = redis.Redis(connection_pool=connections.pool())
        return len(Locker.parse_all(client.hget(place.locks, place.id) or b"")) == 2

    thread = threading.Thread(target=wait)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hold, "count", lambda self, turn: turns.append(turn))
        with session.lock():
            thread.start()
            wait_for(is_waited_for, "somebody waits for the lock")
        thread.join(10)
    assert not thread.is_alive()
    assert [turn.handed_on for turn in turns] == [False, True]


def test_access_rule_is_enough(
    store_server: StoreServer, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
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
        assert_waiters_are_woken(session)
        stdout = io.StringIO()
        call_command("sessionstats", format="json", stdout=stdout)
        assert check_store() == []
        session.flush()
    found = json.loads(stdout.getvalue())
    assert not [record for record in caplog.records if record.levelname != "INFO"]
    assert found["sessions"]["total"] == 1
    assert None not in (found["memory_bytes"]["total"], found["store"]["save"])


@pytest.mark.parametrize("name", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page(name)):
        assert (DOCS / target).exists(), target
