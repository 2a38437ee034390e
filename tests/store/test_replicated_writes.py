"""Writes that wait for a replica: a primary and one replica, and each answer there is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionNotReplicated
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol.scripts import script
from tests.conftest import DATABASE, use_store
from tests.gateways import load_scripts, place
from tests.servers import CountingProxy, StoreServer
from tests.topologies import Replicated

#: What a session does to be written, each time by another script.
WRITES = ("save", "change", "cycle_key", "flush")


@pytest.fixture(scope="module")
def topology(server_binary: Path) -> Iterator[Replicated]:
    with Replicated(binary=server_binary) as started:
        yield started


@pytest.fixture
def replicated(topology: Replicated, settings: Any) -> Iterator[Replicated]:
    """Point the settings at the primary; a write waits for its replica, with patience."""
    with topology.primary.client(db=DATABASE) as client:
        client.flushall()
        load_scripts(client)
    topology.use(settings, DATABASE)
    settings.CLUSTERED_SESSIONS_SYNC_REPLICAS = 1
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 60.0
    settings.CLUSTERED_SESSIONS_SYNC_TIMEOUT = 20.0
    yield topology
    topology.replicas[0].resume()


@pytest.fixture
def silent(replicated: Replicated, settings: Any) -> Replicated:
    """Stop the replica; a write waits for a moment only."""
    settings.CLUSTERED_SESSIONS_SYNC_TIMEOUT = 0.05
    replicated.replicas[0].pause()
    return replicated


def write(session: SessionStore, name: str, is_async: bool) -> None:
    """Write a session in one of the ways."""
    if name == "change":
        session["n"] = 2
        name = "save"
    if is_async:
        async_to_sync(getattr(session, f"a{name}"))()
    else:
        getattr(session, name)()


def held(server: StoreServer, key: str | None) -> Any:
    """Return what a server has under a session's key."""
    with server.client(db=DATABASE) as client:
        return client.hgetall(place(key or "").record)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_acknowledged_write_is_on_the_replica(replicated: Replicated, is_async: bool) -> None:
    session = SessionStore()
    keys: list[str | None] = []
    for name in WRITES:
        write(session, name, is_async)
        keys.append(session.session_key or keys[-1])
        for key in keys:
            on_primary = held(replicated.primary, key)
            assert on_primary == held(replicated.replicas[0], key) != {}
    assert keys[0] == keys[1] != keys[2]
    assert (counters._counts["sync_waits"], counters._counts["sync_shortfalls"]) == (4, 0)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_write_without_its_replica_is_said_to_be_so(silent: Replicated, is_async: bool) -> None:
    session = SessionStore()
    for name in WRITES:
        with pytest.raises(SessionNotReplicated, match="0 of 1 replicas said within 50 ms"):
            write(session, name, is_async)
        # It has landed on the primary all the same.
        assert session.session_key is None or held(silent.primary, session.session_key)
    assert counters._counts["sync_shortfalls"] == 4


def test_unacknowledged_end_names_its_session(silent: Replicated, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_ON_SYNC_SHORTFALL = "warn"
    session = SessionStore()
    session.save()
    settings.CLUSTERED_SESSIONS_ON_SYNC_SHORTFALL = "error"
    with pytest.raises(SessionNotReplicated, match=place(session.session_key or "").id[:12]):
        session.flush()


def test_saving_again_asks_the_replica_again(silent: Replicated, settings: Any) -> None:
    session = SessionStore()
    for _ in range(2):
        with pytest.raises(SessionNotReplicated):
            session.save()
    settings.CLUSTERED_SESSIONS_SYNC_TIMEOUT = 20.0
    silent.replicas[0].resume()
    session.save()
    key = session.session_key
    assert held(silent.primary, key) == held(silent.replicas[0], key) != {}


def test_shortfall_may_be_a_warning_only(
    silent: Replicated, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings.CLUSTERED_SESSIONS_ON_SYNC_SHORTFALL = "warn"
    session = SessionStore()
    for name in WRITES:
        write(session, name, False)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 4
    assert caplog.text.count("0 of 1 replicas") == 4


def test_repeated_write_is_not_taken_for_replicated(silent: Replicated, settings: Any) -> None:
    """On its new connection nothing was written before: WAIT would have nothing to wait for."""
    with CountingProxy(silent.primary.port) as proxy:
        use_store(settings, f"{proxy.url}/{DATABASE}")
        proxy.cut_next("reply", matching=script("create").sha)
        with pytest.raises(SessionNotReplicated):
            SessionStore().save()
        assert proxy._faults == []


def test_wait_for_a_disk_that_is_none_is_an_error(replicated: Replicated, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_SYNC_FSYNC = True
    with pytest.raises(SessionNotReplicated, match="WAITAOF"):
        SessionStore().save()
