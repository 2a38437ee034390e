"""The documentation shows the commands that a store gets and the replies that it gives."""

from __future__ import annotations

import io
import json
import re
import threading
import time
from typing import Any

import pytest
import redis
from django.core.management import call_command

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.checks.store import check_store
from django_clustered_sessions.conf import conf
from django_clustered_sessions.monitoring.counters import KEPT, NAMES, counters
from django_clustered_sessions.protocol.commands import statistics
from django_clustered_sessions.protocol.locks import LockOutcome
from django_clustered_sessions.protocol.record import Locker, SessionKeys
from django_clustered_sessions.session.lock import SessionLock
from django_clustered_sessions.store import connections
from tests.conftest import use_store
from tests.pages import page, shape
from tests.servers import StoreServer, wait_for


def test_json_of_sessionstats_is_as_documented(store: redis.Redis) -> None:
    # What this process has counted would make a node of it that never waited.
    counters.drain(now=True)
    session = SessionStore()
    session["n"] = 1
    session.save()
    counts = ("0" if name == "sync_shortfalls" else "1" for name in NAMES)
    store.hset("session:{000}:figures", "web-1", " ".join(["1", "0", *counts]))
    at, future, since = (
        SessionKeys.of("session", session.session_key or ""),
        (2**47).to_bytes(6),
        bytes(6),
    )
    store.hset(at.record, "m:lock", b"a" * 16 + future + since + b"\1web-1")
    lockers = (token * 16 + future + since + b"\1\5web-1" for token in (b"a", b"b"))
    store.hset(at.locks, at.id, b"".join(lockers))
    found = []
    slot = int(time.time() * 1000) // statistics.SLOT_MS
    store.hset("session:{000}:history", f"{slot} web-1", " ".join("1" for _ in KEPT))
    for option in ({"exact": True}, {"locks": True}, {"history": 1}):
        stdout = io.StringIO()
        call_command("sessionstats", format="json", stdout=stdout, **option)
        found.append(shape(json.loads(stdout.getvalue())))
    examples = re.findall(r"^```json\n(.*?)^```", page("sessionstats-json.md"), re.DOTALL | re.M)
    assert found == [shape(json.loads(example)) for example in examples]


def assert_waiters_are_woken(session: SessionStore) -> None:
    """Wait for a lock; who is not allowed to read its mailbox would find out later."""
    place = SessionKeys.of(conf.key_prefix, session.session_key or "")
    turns: list[LockOutcome] = []

    def wait() -> None:
        waiter = SessionStore(session.session_key)
        with waiter.lock():
            waiter.increment("hits")

    def is_waited_for() -> bool:
        client = redis.Redis(connection_pool=connections.pool())
        return len(Locker.parse_all(client.hget(place.locks, place.id) or b"")) == 2

    thread = threading.Thread(target=wait)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SessionLock, "count", lambda self, turn: turns.append(turn))
        with session.lock():
            thread.start()
            wait_for(is_waited_for, "somebody waits for the lock")
        thread.join(10)
    assert not thread.is_alive()
    assert [turn.handed_on for turn in turns] == [False, True]


def test_access_rule_is_enough(
    store_server: StoreServer, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (rule,) = re.findall(r"^ACL SETUSER site .*$", page("caches.md"), re.MULTILINE)
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
