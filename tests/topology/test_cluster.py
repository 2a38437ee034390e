"""Sessions on a cluster: what differs from one server, and what if slots move or nodes are lost."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import re
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import alogin, login
from django.contrib.auth.models import User
from django.contrib.sessions.backends.base import VALID_KEY_CHARS, CreateError, UpdateError
from django.contrib.sessions.backends.db import SessionStore as DatabaseStore
from django.core.cache import caches
from django.core.management import call_command
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory
from django.utils.crypto import get_random_string
from redis.crc import key_slot
from redis.exceptions import AskError, ConnectionError

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.checks.settings import check_settings
from django_clustered_sessions.checks.store import check_store
from django_clustered_sessions.exceptions import (
    SessionLockLost,
    SessionNotReplicated,
    SessionStoreUnavailable,
)
from django_clustered_sessions.middleware import ClusteredSessionMiddleware
from django_clustered_sessions.monitoring import counters as counters_module
from django_clustered_sessions.monitoring import history
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol import results
from django_clustered_sessions.protocol.commands import records
from django_clustered_sessions.protocol.effects import Everywhere, Flow, plain
from django_clustered_sessions.protocol.record import EndReason, HiddenKey
from django_clustered_sessions.protocol.scripts import script
from django_clustered_sessions.session import finish
from django_clustered_sessions.session.near_cache import near_cache
from django_clustered_sessions.session.state import SessionState
from django_clustered_sessions.store import connections, drivers
from django_clustered_sessions.store import exchange as exchanging
from django_clustered_sessions.store.budget import Budget
from django_clustered_sessions.store.runner import report_the_rest
from tests.children import forked
from tests.clusters import IMPATIENT_MS, ClusterServers, ask
from tests.conftest import use_store
from tests.gateways import Browser, place, wait_for_replicas
from tests.gateways import load_scripts as load_scripts_into
from tests.locking import (
    BOUND_S,
    Threads,
    claim,
    free,
    new_session,
    new_token,
    now_ms,
    outcome,
    owner,
    seize,
    wait_for_sleepers,
)
from tests.locking import ask as ask_store
from tests.servers import StoreServer, free_port, wait_for

ADA = User(pk=1, username="ada", password="md5$secret")
BACKEND = "django.contrib.auth.backends.ModelBackend"


@pytest.fixture(scope="module")
def servers(server_binary: Path) -> Iterator[ClusterServers]:
    """Run one cluster of three primaries of each kind for this module."""
    with ClusterServers(binary=server_binary) as started:
        yield started


@pytest.fixture
def cluster(servers: ClusterServers, settings: Any) -> ClusterServers:
    """Empty the cluster and point the settings at it."""
    servers.flush()
    servers.use(settings)
    return servers


@pytest.fixture(scope="module")
def with_replica(server_binary: Path) -> Iterator[ClusterServers]:
    """Run one cluster whose first primary has a replica, for tests that stop none of them."""
    with ClusterServers(replicas=1, binary=server_binary) as started:
        yield started


class World:
    """A session's methods in their synchronous or asynchronous form, each on a loop of its own."""

    def __init__(self, *, is_async: bool) -> None:
        self.is_async = is_async

    def do(self, session: SessionStore, method: str, *arguments: Any) -> Any:
        if self.is_async:
            return asyncio.run(getattr(session, f"a{method}")(*arguments))
        return getattr(session, method)(*arguments)

    def opened(self, key: str | None) -> SessionStore:
        """Return a session that is loaded."""
        session = SessionStore(key)
        self.do(session, "get", "n")
        return session


@pytest.fixture(params=["sync", "async"])
def world(request: pytest.FixtureRequest) -> World:
    return World(is_async=request.param == "async")


@pytest.fixture
def exchanges(monkeypatch: pytest.MonkeyPatch) -> list[list[bytes]]:
    """Give what is sent to any node, a round trip for each item."""
    sent: list[list[bytes]] = []
    exchange, aexchange = exchanging.exchange, exchanging.aexchange

    def counted(connection: Any, packed: list[bytes], deadline: float) -> list[Any]:
        sent.extend([packed] if packed else [])
        return exchange(connection, packed, deadline)

    async def acounted(connection: Any, packed: list[bytes], deadline: float) -> list[Any]:
        sent.extend([packed] if packed else [])
        return await aexchange(connection, packed, deadline)

    monkeypatch.setattr(exchanging, "exchange", counted)
    monkeypatch.setattr(exchanging, "aexchange", acounted)
    return sent


def slot_of(key: str) -> int:
    return key_slot(place(key).record.encode())


def elsewhere(servers: ClusterServers, source: StoreServer) -> StoreServer:
    """Return a primary that is another one."""
    return next(one for one in servers.primaries if one is not source)


def load_scripts(servers: ClusterServers) -> None:
    """Let all primaries know all scripts."""
    for server in servers.primaries:
        with server.client() as client:
            load_scripts_into(client)


# Django's contract.


@pytest.mark.each_server
def test_session_lives_from_first_to_last(cluster: ClusterServers, world: World) -> None:
    session = SessionStore()
    session["a"] = 1
    world.do(session, "save")
    key = session.session_key or ""
    assert world.do(SessionStore(), "exists", key)
    other = world.opened(key)
    other["b"] = [1]
    session["a"] = 2
    world.do(session, "save")
    world.do(other, "save")
    for _ in range(3):
        world.do(other, "increment", "n")
        world.do(other, "save")
    assert world.do(SessionStore(key), "load") == {"a": 2, "b": [1], "n": 3}
    world.do(session, "delete", key)
    assert not world.do(SessionStore(), "exists", key)
    with pytest.raises(UpdateError):
        world.do(other, "save")


def test_taken_key_is_refused(cluster: ClusterServers, world: World) -> None:
    key = new_session()
    with pytest.raises(CreateError):
        world.do(SessionStore(key), "save", True)


def test_flushed_session_is_gone(cluster: ClusterServers, world: World) -> None:
    session = world.opened(new_session(n=1))
    key = session.session_key
    world.do(session, "flush")
    gone = world.opened(key)
    assert (gone.session_key, gone.state.ended) == (None, EndReason.FLUSHED)


def test_sessions_are_spread_over_all_nodes(cluster: ClusterServers, world: World) -> None:
    keys = [new_session(n=n) for n in range(40)]
    assert [world.do(SessionStore(key), "load") for key in keys] == [{"n": n} for n in range(40)]
    assert all(ask(server, "DBSIZE") for server in cluster.primaries)


def test_many_loops_and_threads_lose_no_increment(
    cluster: ClusterServers, threads: Threads
) -> None:
    keys = [new_session() for _ in range(8)]

    def work(key: str, world: World) -> None:
        for _ in range(5):
            session = world.opened(key)
            world.do(session, "increment", "n")
            world.do(session, "save")

    started = [
        threads.start(work, key, World(is_async=is_async))
        for key in keys
        for is_async in (True, False)
    ]
    for one in started:
        outcome(one)
    assert [SessionStore(key)["n"] for key in keys] == [10] * 8


# Login: two keys in two slots.


def apart(servers: ClusterServers, monkeypatch: pytest.MonkeyPatch, key: str) -> str:
    """Let the next new key be on another node than ``key``; return it."""
    home = servers.owner(place(key).record)
    new = next(
        made
        for made in (f"new{number:029}" for number in range(1000))
        if servers.owner(place(made).record) is not home
    )
    monkeypatch.setattr(SessionState, "new_key", lambda self: HiddenKey(new))
    return new


@pytest.mark.each_server
def test_cycle_key_takes_all_along(
    cluster: ClusterServers, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that this release cannot read, the counter, the mode and the birth move too."""
    session = SessionStore()
    session["a"] = {"x": 1}
    session.set_expiry(300)
    session.create()
    session.increment("n", 7)
    session.save()
    key = session.session_key or ""
    new = apart(cluster, monkeypatch, key)
    client = cluster.client(place(key).record)
    client.hset(place(key).record, "d:later", b"12345678" + b"?from a later release")
    # Another process has written that.
    near_cache.clear()
    before = client.hgetall(place(key).record)
    rotating = world.opened(key)
    began_ms = now_ms(client)
    world.do(rotating, "cycle_key")
    ended_ms = now_ms(client)
    assert rotating.session_key == new
    after = cluster.client(place(new).record).hgetall(place(new).record)
    meta = after.pop(b"m:")
    assert after == {name: value for name, value in before.items() if name[:2] != b"m:"}
    assert meta[1:2] + meta[10:16] == before[b"m:"][1:2] + before[b"m:"][10:16]
    # The servers share a clock.
    assert began_ms <= int.from_bytes(meta[16:22]) - 300_000 <= ended_ms
    late = world.opened(key)
    assert (late.session_key, late.state.ended) == (None, EndReason.ROTATED)
    rotating["a"]["x"] = 2
    world.do(rotating, "save")
    assert SessionStore(new)["a"] == {"x": 2}
    assert not ask(cluster.owner(place(key).record), "ZSCORE", place(key).index, place(key).id)
    assert ask(cluster.owner(place(new).record), "ZSCORE", place(new).index, place(new).id)


def test_encrypted_values_move_to_another_node(
    cluster: ClusterServers, world: World, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    """Also those whose key the node that moves them does not have."""
    first, second = "01" * 32, "02" * 32
    settings.CLUSTERED_SESSIONS_ENCRYPTION_KEYS = [first]
    session = SessionStore()
    session["a"] = {"x": 1}
    session.create()
    key = session.session_key or ""
    new = apart(cluster, monkeypatch, key)
    settings.CLUSTERED_SESSIONS_ENCRYPTION_KEYS = [second]
    near_cache.clear()
    rotating = SessionStore(key)
    assert world.do(rotating, "get", "a") is None
    world.do(rotating, "cycle_key")
    assert rotating.session_key == new
    rotating["b"] = 2
    world.do(rotating, "save")
    settings.CLUSTERED_SESSIONS_ENCRYPTION_KEYS = [first, second]
    near_cache.clear()
    assert dict(SessionStore(new).items()) == {"a": {"x": 1}, "b": 2}


def test_move_to_another_node_brings_no_old_key_back(
    cluster: ClusterServers, world: World, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    """A process has the session at hand as it was before sessionrekey."""
    first, second = "01" * 32, "02" * 32
    settings.CLUSTERED_SESSIONS_ENCRYPTION_KEYS = [first]
    session = SessionStore()
    session["a"] = {"x": 1}
    session.create()
    key = session.session_key or ""
    new = apart(cluster, monkeypatch, key)
    settings.CLUSTERED_SESSIONS_ENCRYPTION_KEYS = [second, first]
    call_command("sessionrekey", stdout=io.StringIO())
    rotating = world.opened(key)
    world.do(rotating, "cycle_key")
    assert rotating.session_key == new
    settings.CLUSTERED_SESSIONS_ENCRYPTION_KEYS = [second]
    near_cache.clear()
    assert dict(SessionStore(new).items()) == {"a": {"x": 1}}


@pytest.mark.each_server
def test_what_others_write_in_between_is_not_lost(
    cluster: ClusterServers, world: World, monkeypatch: pytest.MonkeyPatch, threads: Threads
) -> None:
    key = new_session(n=1)
    rotating = world.opened(key)
    copy, writes = records.copy, iter(range(2))

    def copied(*arguments: Any) -> Any:
        if (number := next(writes, None)) is not None:
            # A thread has no event loop that would mind.
            outcome(threads.start(write, number))
        return copy(*arguments)

    def write(number: int) -> None:
        other = SessionStore(key)
        other[f"late{number}"] = number
        other.save()

    monkeypatch.setattr(records, "copy", copied)
    world.do(rotating, "cycle_key")
    assert SessionStore(rotating.session_key)._session.copy() == {"n": 1, "late0": 0, "late1": 1}
    assert cluster.stored() == {place(key).record, place(rotating.session_key or "").record}


def test_late_writer_is_told_that_the_key_was_rotated(
    cluster: ClusterServers, world: World
) -> None:
    key = new_session(n=1)
    late, rotating = world.opened(key), world.opened(key)
    late["b"] = 1
    world.do(rotating, "cycle_key")
    with pytest.raises(UpdateError, match="rotated"):
        world.do(late, "save")


@pytest.mark.each_server
def test_late_writer_goes_on_under_the_new_key_on_another_node(
    cluster: ClusterServers, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = new_session(n=1, _auth_user_id="1")
    writer, other = world.opened(key), world.opened(key)
    late, rotating = world.opened(key), world.opened(key)
    with monkeypatch.context() as patch:
        new = apart(cluster, patch, key)
        world.do(rotating, "cycle_key")
    writer.increment("n", 2)
    world.do(writer, "save")
    world.do(other, "cycle_key")
    other["c"] = 1
    world.do(other, "save")
    assert (other.session_key, other.state.has_moved_on) == (key, True)
    world.do(late, "flush")
    assert cluster.stored() == {place(key).record, place(new).record}
    assert world.opened(new).state.ended is EndReason.FLUSHED


def test_login_over_an_unreadable_user_moves_to_another_node(
    cluster: ClusterServers, world: World, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    key = new_session(n=1, _auth_user_id="1")
    settings.SESSION_SERIALIZER = "tests.serializers.PickleSerializer"
    near_cache.clear()
    session = world.opened(key)
    new = apart(cluster, monkeypatch, key)
    world.do(session, "cycle_key")
    session["_auth_user_id"] = "2"
    world.do(session, "save")
    settings.SESSION_SERIALIZER = "django.contrib.sessions.serializers.JSONSerializer"
    near_cache.clear()
    client = cluster.client(place(new).record)
    fields = {name for name in client.hkeys(place(new).record) if name[:2] != b"m:"}
    assert fields == {b"d:_auth_user_id"}


def test_crash_between_the_two_steps_leaves_the_old_key(
    cluster: ClusterServers, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = new_session(n=1)
    rotating = world.opened(key)

    def crash(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(records, "leave", crash)
    with pytest.raises(KeyboardInterrupt):
        world.do(rotating, "cycle_key")
    assert world.do(SessionStore(key), "load") == {"n": 1}


@pytest.mark.parametrize("reason", ["flushed", "deleted"])
def test_ended_session_does_not_live_on_under_a_new_key(
    cluster: ClusterServers, world: World, reason: str
) -> None:
    key = new_session(n=1)
    rotating = world.opened(key)
    other = SessionStore(key)
    other.flush() if reason == "flushed" else other.delete(key)
    with pytest.raises(UpdateError, match=reason):
        world.do(rotating, "cycle_key")
    assert cluster.stored() == {place(key).record}


@pytest.mark.each_server
@pytest.mark.parametrize("step", ["create", "leave"])
def test_step_whose_reply_is_lost_is_taken_once(
    cluster: ClusterServers, world: World, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of one that somebody is logged into there is no second one in its place.
    key = new_session(n=1, _auth_user_id="1")
    rotating = world.opened(key)
    load_scripts(cluster)
    cut_reply(monkeypatch, script(step).sha)
    world.do(rotating, "cycle_key")
    assert world.do(SessionStore(rotating.session_key), "get", "n") == 1
    assert world.opened(key).state.ended is EndReason.ROTATED


def cut_reply(monkeypatch: pytest.MonkeyPatch, matching: bytes) -> None:
    """Cut the connection once, after the reply to what holds ``matching`` has come."""
    exchange, aexchange = exchanging.exchange, exchanging.aexchange
    cuts = [matching]

    def is_cut(packed: list[bytes]) -> bool:
        return bool(cuts and any(cuts[0] in one for one in packed) and cuts.pop())

    def cutting(connection: Any, packed: list[bytes], deadline: float) -> list[Any]:
        replies = exchange(connection, packed, deadline)
        if is_cut(packed):
            connection.disconnect()
            raise ConnectionError("cut")
        return replies

    async def acutting(connection: Any, packed: list[bytes], deadline: float) -> list[Any]:
        replies = await aexchange(connection, packed, deadline)
        if is_cut(packed):
            await connection.disconnect(nowait=True)
            raise ConnectionError("cut")
        return replies

    monkeypatch.setattr(exchanging, "exchange", cutting)
    monkeypatch.setattr(exchanging, "aexchange", acutting)


@pytest.mark.each_server
def test_lock_goes_along_to_the_new_key(cluster: ClusterServers, world: World) -> None:
    key = new_session(n=1)
    waiter = "w" * 16

    def use(session: SessionStore) -> None:
        assert isinstance(claim(key, waiter), results.Held)
        session["a"] = 1

    async def auses() -> str:
        session = SessionStore(key)
        async with session.alock():
            use(session)
            await session.acycle_key()
            check(session)
        return session.session_key or ""

    def check(session: SessionStore) -> None:
        new = session.session_key or ""
        assert owner(cluster.client(place(new).record), new) == session.state.lock.grant.token
        # Who waited is woken and told.
        assert ask(cluster.owner(place(key).record), "LLEN", place(key).ended_mailbox) == 1
        assert isinstance(claim(key, waiter), results.Gone)
        session["b"] = 2

    if world.is_async:
        new = asyncio.run(auses())
    else:
        session = SessionStore(key)
        with session.lock():
            use(session)
            session.cycle_key()
            check(session)
        new = session.session_key or ""
    assert world.do(SessionStore(new), "load") == {"n": 1, "a": 1, "b": 2}
    assert owner(cluster.client(place(new).record), new) == ""
    assert not cluster.client(place(new).record).exists(place(new).locks)


def test_cycle_key_waits_for_the_lock_of_another(
    cluster: ClusterServers, world: World, threads: Threads
) -> None:
    key = new_session(n=1)
    rotating = world.opened(key)
    token = seize(key)
    rotation = threads.start(world.do, rotating, "cycle_key")
    wait_for_sleepers(cluster.client(place(key).record), 1)
    assert free(key, token) is not None
    outcome(rotation)
    new = rotating.session_key or ""
    assert world.do(SessionStore(new), "load") == {"n": 1}
    assert owner(cluster.client(place(new).record), new) == ""
    assert world.opened(key).state.ended is EndReason.ROTATED


def test_cycle_key_refuses_after_its_lock_was_lost(cluster: ClusterServers) -> None:
    key = new_session(n=1)
    session = SessionStore(key)
    with pytest.raises(SessionLockLost), session.lock():
        client = cluster.client(place(key).record)
        client.hdel(place(key).record, "m:lock")
        seize(key)
        session.cycle_key()
    assert SessionStore(key)["n"] == 1
    assert cluster.stored() == {place(key).record}


# Round trips.


def log_in(request: HttpRequest) -> HttpResponse:
    login(request, ADA, BACKEND)
    return HttpResponse()


async def alog_in(request: HttpRequest) -> HttpResponse:
    await alogin(request, ADA, BACKEND)
    return HttpResponse()


def change(request: HttpRequest) -> HttpResponse:
    request.session["n"] += 1
    return HttpResponse()


async def achange(request: HttpRequest) -> HttpResponse:
    await request.session.aset("n", 1 + await request.session.aget("n"))
    return HttpResponse()


async def nothing(*args: Any, **kwargs: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("view", "aview", "trips"),
    [(change, achange, 2), (log_in, alog_in, 4)],
    ids=["change", "login"],
)
def test_requests_take_so_many_round_trips(
    cluster: ClusterServers,
    world: World,
    exchanges: list[list[bytes]],
    view: Any,
    aview: Any,
    trips: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load_scripts(cluster)
    # A login notes when it was.
    monkeypatch.setattr(User, "save", lambda *args, **kwargs: None)
    monkeypatch.setattr(User, "asave", nothing)
    # However slow the machine is, no answer here is late.
    monkeypatch.setattr(finish, "LATE_S", float("inf"))

    def request() -> HttpRequest:
        made = RequestFactory().get("/")
        made.COOKIES["sessionid"] = new_session(n=0)
        return made

    requests = [request() for _ in range(2)]
    for served in requests:
        exchanges.clear()
        if world.is_async:
            asyncio.run(ClusteredSessionMiddleware(aview)(served))  # type: ignore[arg-type]
        else:
            ClusteredSessionMiddleware(view)(served)
    assert len(exchanges) == trips


# Slots that move.


@pytest.mark.each_server
def test_moved_slot_is_looked_for_once(
    cluster: ClusterServers, world: World, exchanges: list[list[bytes]]
) -> None:
    key = new_session(n=1)
    home = cluster.owner(place(key).record)
    cluster.move(slot_of(key), home, elsewhere(cluster, home))
    near_cache.clear()
    exchanges.clear()
    assert world.do(SessionStore(key), "load") == {"n": 1}
    # MOVED, the map, the load.
    assert len(exchanges) == 3
    # The other node may not know the script that asks for what has changed.
    near_cache.clear()
    exchanges.clear()
    assert world.do(SessionStore(key), "load") == {"n": 1}
    assert len(exchanges) == 1


@pytest.mark.each_server
def test_key_ahead_of_its_slot_is_read(cluster: ClusterServers, world: World) -> None:
    """ASK: the slot is still the source's, the record is the target's."""
    key = new_session(n=1)
    known = world.opened(key)
    home = cluster.owner(place(key).record)
    target = elsewhere(cluster, home)
    with cluster.moving(slot_of(key), home, target):
        cluster.migrate(slot_of(key), home, target, place(key).record)
        # A script, at hand here; and not.
        assert world.do(SessionStore(key), "load") == {"n": 1}
        near_cache.clear()
        assert world.do(SessionStore(key), "load") == {"n": 1}
        assert world.do(known, "exists", key)
        with pytest.raises(AskError):
            ask(home, "EXISTS", place(key).record)


@pytest.mark.each_server
@pytest.mark.usefixtures("figures")
@pytest.mark.parametrize("is_ahead", [True, False], ids=["ahead", "at home"])
def test_figures_stay_behind_while_their_slot_is_open(
    cluster: ClusterServers, world: World, monkeypatch: pytest.MonkeyPatch, is_ahead: bool
) -> None:
    """They are written, and would have the read that takes them along wait as a write does."""
    key = new_session(n=1)
    home = cluster.owner(place(key).record)
    target = elsewhere(cluster, home)
    counters.drain(now=True)
    counters.add(writes_refused=7)
    monkeypatch.setattr(counters_module, "INTERVAL_S", 0.0)
    with cluster.moving(slot_of(key), home, target):
        moved = place(key).record if is_ahead else place(key).index
        cluster.migrate(slot_of(key), home, target, moved)
        assert world.do(SessionStore(key), "load") == {"n": 1}
    assert world.do(SessionStore(key), "load") == {"n": 1}
    report_the_rest()
    out = StringIO()
    call_command("sessionstats", "--format", "json", stdout=out)
    assert json.loads(out.getvalue())["counters"]["writes_refused"] == 7


@pytest.mark.each_server
def test_write_waits_until_its_slot_has_moved(
    cluster: ClusterServers,
    world: World,
    exchanges: list[list[bytes]],
    threads: Threads,
) -> None:
    """It is not begun while it might be refused in its middle, as an end with its tombstone."""
    key = new_session(n=1)
    seize(key)
    writing, ending = world.opened(key), world.opened(key)
    home = cluster.owner(place(key).record)
    with cluster.moving(slot_of(key), home, elsewhere(cluster, home)):
        before = cluster.client(place(key).record).hgetall(place(key).record)
        exchanges.clear()
        end = threads.start(world.do, ending, "flush")
        wait_for(lambda: len(exchanges) > 2, "it is told to try again", timeout_s=30)
        assert cluster.client(place(key).record).hgetall(place(key).record) == before
    outcome(end)
    assert world.opened(key).state.ended is EndReason.FLUSHED
    writing["a"] = 1
    with pytest.raises(UpdateError, match="flushed"):
        world.do(writing, "save")


@pytest.mark.each_server
def test_slot_that_never_arrives_is_no_logout(
    cluster: ClusterServers, settings: Any, world: World
) -> None:
    browser = Browser(settings, asgi=world.is_async)
    browser.key = key = new_session(n=1)
    home = cluster.owner(place(key).record)
    with cluster.moving(slot_of(key), home, elsewhere(cluster, home)):
        settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 0.3
        response = browser.visit(achange if world.is_async else change)
        assert response.status_code == 503
        assert not response.cookies
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 15.0
    assert browser.visit(achange if world.is_async else change).status_code == 200
    assert SessionStore(key)["n"] == 2


@pytest.mark.each_server
def test_no_increment_is_lost_while_slots_move(cluster: ClusterServers, threads: Threads) -> None:
    key = new_session()
    slot, done = slot_of(key), threading.Event()

    def work(world: World) -> int:
        counted = 0
        while not done.is_set():
            session = world.opened(key)
            world.do(session, "increment", "n")
            session[f"{threading.get_ident()}"] = counted
            world.do(session, "save")
            counted += 1
        return counted

    workers = [threads.start(work, World(is_async=is_async)) for is_async in (True, False) * 2]
    for _ in range(6):
        home = cluster.owner(place(key).record)
        target = elsewhere(cluster, home)
        before = SessionStore(key)["n"]
        with cluster.moving(slot, home, target):
            cluster.migrate(slot, home, target, place(key).record)
        wait_for(lambda n=before: SessionStore(key)["n"] > n + 4, "they go on", timeout_s=30)
    done.set()
    counted = [outcome(worker) for worker in workers]
    assert SessionStore(key)["n"] == sum(counted)
    assert len(SessionStore(key).load()) == 1 + len(workers)


@pytest.mark.each_server
def test_waiter_whose_slot_moves_gets_its_turn(
    cluster: ClusterServers, world: World, threads: Threads
) -> None:
    key = new_session(n=1)
    token = seize(key)
    home = cluster.owner(place(key).record)

    def locked() -> None:
        if world.is_async:
            asyncio.run(alocked())
        else:
            with SessionStore(key).lock() as session:
                session["a"] = 1

    async def alocked() -> None:
        async with SessionStore(key).alock() as session:
            await session.aset("a", 1)

    waiting = threads.start(locked)
    wait_for_sleepers(home.client(), 1)
    cluster.move(slot_of(key), home, elsewhere(cluster, home))
    assert free(key, token) is not None
    outcome(waiting)
    assert SessionStore(key)["a"] == 1


@pytest.mark.parametrize("is_first", [True, False])
def test_lock_passes_between_a_thread_and_a_loop(
    cluster: ClusterServers, world: World, threads: Threads, is_first: bool
) -> None:
    """The one with the lock and the one who waits: each once on an event loop of its own."""
    key = new_session(n=0)
    asynchronous, synchronous = World(is_async=True), World(is_async=False)
    first, second = (asynchronous, synchronous) if is_first else (synchronous, asynchronous)
    entered, goes_on = threading.Event(), threading.Event()

    def add(session: SessionStore, n: int) -> None:
        session["n"] = n + 1
        entered.set()
        assert goes_on.wait(30)

    async def alocked() -> None:
        async with SessionStore(key).alock() as session:
            add(session, await session.aget("n"))

    def locked(world: World) -> None:
        if world.is_async:
            asyncio.run(alocked())
            return
        with SessionStore(key).lock() as session:
            add(session, session["n"])

    started = [threads.start(locked, first)]
    assert entered.wait(30)
    started.append(threads.start(locked, second))
    wait_for_sleepers(cluster.client(place(key).record), 1)
    goes_on.set()
    for one in started:
        outcome(one)
    assert SessionStore(key)["n"] == 2


# Nodes that are lost.


def impatient(binary: Path, replicas: int = 0) -> ClusterServers:
    """Return a cluster that soon takes a silent node for down."""
    return ClusterServers(replicas=replicas, binary=binary, node_timeout_ms=IMPATIENT_MS)


def test_killed_primary_is_replaced_under_load(
    settings: Any, threads: Threads, server_binary: Path
) -> None:
    """Requests meanwhile get a 503, and are served once the replica has taken over."""
    with impatient(server_binary, replicas=1) as servers:
        servers.use(settings)
        settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 30.0
        lost = servers.primaries[0]
        keys: list[str] = []
        while {servers.owner(place(key).record) for key in keys} != set(servers.primaries):
            keys += [new_session(n=1) for _ in range(4)]
        for key in keys:
            World(is_async=True).opened(key)
        # The replica holds what was acknowledged.
        assert ask(lost, "WAIT", 1, 5000) == 1
        wait_for(
            lambda: ask(servers.replicas[0], "DBSIZE") == ask(lost, "DBSIZE"), "all is replicated"
        )
        lost.kill()

        def added(key: str, world: World) -> bool:
            session = SessionStore(key)
            try:
                world.do(session, "increment", "n")
                world.do(session, "save")
            except SessionStoreUnavailable:
                return False
            return True

        def add(key: str, world: World) -> None:
            wait_for(lambda: added(key, world), "the replica has taken over", timeout_s=60)

        worlds = [World(is_async=True), World(is_async=False)]
        for one in [threads.start(add, key, world) for key in keys for world in worlds]:
            one.result(90)
        assert [SessionStore(key)["n"] for key in keys] == [3] * len(keys)
        new = [key for key in keys if servers.owner(place(key).record) is servers.replicas[0]]
        assert new
        # What is known now costs nothing more.
        settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 5.0
        assert [SessionStore(key)["n"] for key in new] == [3] * len(new)


def test_write_waits_for_its_own_nodes_replicas(
    with_replica: ClusterServers, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_replica.use(settings)
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 10.0
    settings.CLUSTERED_SESSIONS_SYNC_REPLICAS = 1
    for world in (World(is_async=False), World(is_async=True)):
        homes = set()
        while homes != {True, False}:
            session = SessionStore()
            wait_for_replicas(monkeypatch, 0.1)
            with suppress(SessionNotReplicated):
                world.do(session, "save")
            owner = with_replica.owner(place(session.session_key or "").record)
            has_replica = owner is with_replica.primaries[0]
            homes.add(has_replica)
            # A replica that is there is waited for, also where the machine stands still.
            wait_for_replicas(monkeypatch, 4.0 if has_replica else 0.1)
            world.do(session, "increment", "n")
            with nullcontext() if has_replica else pytest.raises(SessionNotReplicated):
                world.do(session, "save")


def test_move_waits_for_the_replicas_of_both_nodes(
    with_replica: ClusterServers, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a failover of the old key's node would bring the session back under it."""
    with_replica.use(settings)
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 10.0

    def next_key_on(has_replica: bool) -> str:
        keys = iter(lambda: get_random_string(32, VALID_KEY_CHARS), None)
        first = with_replica.primaries[0]
        key = next(
            one for one in keys if has_replica == (with_replica.owner(place(one).record) is first)
        )
        monkeypatch.setattr(SessionState, "new_key", lambda self: HiddenKey(key))
        return key

    for world in (World(is_async=False), World(is_async=True)):
        for old, new in ((False, True), (True, False), (True, True)):
            settings.CLUSTERED_SESSIONS_SYNC_REPLICAS = 0
            session = SessionStore()
            session["n"] = 1
            next_key_on(old)
            session.create()
            settings.CLUSTERED_SESSIONS_SYNC_REPLICAS = 1
            wait_for_replicas(monkeypatch, 4.0 if old and new else 0.1)
            key = next_key_on(new)
            with nullcontext() if old and new else pytest.raises(SessionNotReplicated):
                world.do(session, "cycle_key")
            assert session.session_key == key
            assert world.opened(key)["n"] == 1


@pytest.mark.each_server
def test_repeated_leave_of_the_old_key_writes_again(cluster: ClusterServers) -> None:
    """WAIT behind it asks about this connection's own writes."""
    key = new_session(n=1)
    home = cluster.owner(place(key).record)
    version = SessionStore(key)
    version.load()
    options = version.state.write_options()
    leave = records.leave(place(key), b"thiscopy", version.state.version, place(key), options)

    def changes() -> int:
        found = re.search(rb"rdb_changes_since_last_save:(\d+)", ask(home, "INFO", "persistence"))
        assert found
        return int(found[1])

    for _ in range(2):
        before = changes()
        assert records.parse_leave(ask_store(leave)) is None
        assert changes() > before


def test_hanging_primary_holds_up_no_other_node(settings: Any, server_binary: Path) -> None:
    """New connections to it hang as well; the other nodes' sessions do not notice."""
    with impatient(server_binary, replicas=1) as servers:
        servers.use(settings)
        hung = servers.primaries[0]
        homes = {}
        while len(homes) < 3:
            key = new_session(n=1)
            homes[servers.owner(place(key).record)] = key
        key = homes.pop(hung)
        assert ask(hung, "WAIT", 1, 5000) == 1
        settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 1.0
        hung.pause()
        try:
            for world in (World(is_async=False), World(is_async=True)):
                # Nobody knows any node yet.
                connections.slot_map.cache_clear()
                connections.working_pools.forget()
                began = time.monotonic()
                with suppress(SessionStoreUnavailable):
                    world.do(SessionStore(key), "load")
                assert time.monotonic() - began < 1.0 + 3.0
                for other in homes.values():
                    wait_for(
                        lambda w=world, k=other: loads(w, k), "others are served", timeout_s=30
                    )
            wait_for(lambda: loads(world, key), "the replica has taken over", timeout_s=30)
        finally:
            hung.resume()


def loads(world: World, key: str) -> bool:
    try:
        return bool(world.do(SessionStore(key), "load") == {"n": 1})
    except SessionStoreUnavailable:
        return False


def all_are(servers: ClusterServers, state: bytes) -> bool:
    """Return whether all servers that run report a state of the cluster."""
    up = [server for server in servers.servers if server.process is not None]
    return all(state in ask(server, "CLUSTER INFO") for server in up)


def refusal(key: str) -> str:
    """Return why a session cannot be loaded."""
    with pytest.raises(SessionStoreUnavailable) as caught:
        SessionStore(key).load()
    return str(caught.value)


@pytest.mark.each_server
def test_cluster_that_is_down_is_no_logout(settings: Any, server_binary: Path) -> None:
    with impatient(server_binary) as servers:
        servers.use(settings)
        browsers = [Browser(settings, asgi=asgi) for asgi in (False, True)]
        lost = servers.primaries[0]
        for browser in browsers:
            while servers.owner(place(browser.key).record) is lost or not browser.key:
                browser.key = new_session(n=1)
        lost.kill()
        # Each node learns it by itself, and serves until then.
        wait_for(lambda: all_are(servers, b"cluster_state:fail"), "it is down", timeout_s=30)
        settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 0.5
        for browser, view in zip(browsers, (change, achange), strict=True):
            key = browser.key
            response = browser.visit(view)
            assert (response.status_code, browser.key) == (503, key)
            wait_for(lambda k=key: "has lost slots" in refusal(k), "the cause is named")
        lost.start()
        wait_for(lambda: all_are(servers, b"cluster_state:ok"), "it is up", timeout_s=30)
        settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 15.0
        for browser, view in zip(browsers, (change, achange), strict=True):
            assert browser.visit(view).status_code == 200
            assert SessionStore(browser.key)["n"] == 2


def test_start_up_node_that_is_away_is_passed_over(
    cluster: ClusterServers, world: World, settings: Any
) -> None:
    cluster.use(settings, free_port(), cluster.primaries[-1].port)
    key = new_session(n=1)
    assert world.do(SessionStore(key), "load") == {"n": 1}


def test_cluster_without_any_node_is_unavailable(settings: Any, world: World) -> None:
    ClusterServers().use(settings, free_port(), free_port())
    # The nodes are asked for the map before the session is: that alone is not to use it up.
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 2.0
    with pytest.raises(SessionStoreUnavailable, match="does not answer"):
        world.do(SessionStore("x" * 32), "load")


# Connections.


def test_async_views_under_wsgi_leave_no_socket(cluster: ClusterServers, settings: Any) -> None:
    def connected() -> int:
        # The one that asks is among them.
        return sum(
            len(ask(one, "CLIENT LIST", "TYPE", "NORMAL").splitlines()) for one in cluster.primaries
        )

    keys = [new_session(n=1) for _ in range(10)]
    browser = Browser(settings)

    def visit() -> None:
        for browser.key in keys:
            assert browser.visit(achange).status_code == 200

    # The middleware's own part is synchronous here, and keeps its connections.
    visit()
    gc.collect()
    before = connected()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        visit()
        wait_for(lambda: connected() <= before, "every connection is closed")
        gc.collect()
    assert connections.working_pools.by_loop == {}


@pytest.mark.parametrize("near_reads", ["checked", "tracked"])
def test_node_that_has_lost_its_slots_is_left(
    settings: Any, server_binary: Path, near_reads: str
) -> None:
    """Or addresses that come and go would each leave sockets in a process that lives long."""
    settings.CLUSTERED_SESSIONS_NEAR_READS = near_reads

    def connected(server: StoreServer) -> int:
        # Without the one that asks.
        return len(ask(server, "CLIENT LIST", "TYPE", "NORMAL").splitlines()) - 1

    async def main() -> None:
        keys = [await asyncio.to_thread(new_session, n=1) for _ in range(20)]

        async def use() -> None:
            # At once, so that some share a connection.
            await asyncio.gather(*(SessionStore(key).aget("n") for key in keys))
            for key in keys[:8]:
                await asyncio.to_thread(SessionStore(key).get, "n")

        before, after = servers.primaries[0], servers.replicas[0]
        await use()
        assert connected(before) >= 2
        # By itself: an election may fail where the machine stands still.
        ask(after, "CLUSTER FAILOVER", "TAKEOVER")
        wait_for(lambda: b"role:slave" in ask(before, "INFO", "replication"), "it has no slots")
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            async with asyncio.timeout(BOUND_S):
                while connected(before):
                    near_cache.clear()
                    await use()
            gc.collect()
        assert connected(after) >= 2

    with ClusterServers(primaries=2, replicas=1, binary=server_binary) as servers:
        servers.use(settings)
        asyncio.run(main())


async def test_changed_settings_close_what_is_made_afterwards(
    cluster: ClusterServers, settings: Any
) -> None:
    """A trip that is under way goes on to nodes that it has not asked yet."""
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 20.0

    def times() -> Flow[list[Any]]:
        return (yield Everywhere((plain("TIME"),)))

    left: Any = connections.apool()
    # Of one node.
    learning = left.slot_map.refreshing(Budget(20.0))
    await drivers.arun(learning, left.pool, Budget(20.0))
    assert len(left.pools) == 1
    cluster.primaries[0].pause()
    try:
        asking = asyncio.create_task(drivers.arun(times(), connections.apool, Budget(20.0)))
        # Up to its first reply.
        await asyncio.sleep(0)
        settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 21.0
        assert connections.apool() is not left
    finally:
        cluster.primaries[0].resume()
    assert len(await asking) == len(left.pools) == 3
    assert not any(pool.idle for pool in left.pools)


def test_child_process_has_connections_of_its_own(cluster: ClusterServers) -> None:
    keys = [new_session(n=1) for _ in range(10)]
    numbers = forked(lambda: bytes(SessionStore(key)["n"] for key in keys))
    assert numbers == bytes([1] * len(keys))
    assert all(SessionStore(key)["n"] == 1 for key in keys)


def test_entry_of_a_cluster_is_a_cache_too(cluster: ClusterServers) -> None:
    caches["sessions"].set("a", 1)
    assert caches["sessions"].get("a") == 1


# Figures and checks.


@pytest.mark.each_server
@pytest.mark.usefixtures("figures")
def test_sessionstats_counts_all_nodes(cluster: ClusterServers) -> None:
    counters.drain(now=True)
    report_the_rest()
    cluster.flush()
    keys = [new_session(n=n) for n in range(25)]
    for _ in range(15):
        new_session(_auth_user_id="1")
    SessionStore(keys[0]).flush()
    seize(keys[1])
    claim(keys[1], new_token())
    report_the_rest()
    out = StringIO()
    call_command("sessionstats", "--format", "json", stdout=out)
    found = json.loads(out.getvalue())
    assert found["sessions"] == {"total": 39, "logged_in": 15, "anonymous": 24}
    assert found["measured"] == {"sessions": 39, "unreadable": 0, "exact": True}
    assert found["store"]["primaries"] == 3
    primaries = {one["address"]: one for one in found["topology"]["primaries"]}
    assert primaries.keys() == {f"127.0.0.1:{server.port}" for server in cluster.primaries}
    ranges = sorted(tuple(each) for one in primaries.values() for each in one["slots"])
    assert ranges[0][0] == 0
    assert ranges[-1][1] == 16383
    assert all(last + 1 == first for (_, last), (first, _) in pairwise(ranges))
    memory = [ask(server, "INFO", "memory") for server in cluster.primaries]
    assert found["store"]["used_memory_bytes"] > 2 * min(
        int(re.search(rb"used_memory:(\d+)", info)[1]) for info in memory
    )
    assert (found["counters"]["created"], found["counters"]["ended"]) == (40, 1)
    out = StringIO()
    call_command("sessionstats", "--locks", "--format", "json", stdout=out)
    (held,) = json.loads(out.getvalue())["held_locks"]
    assert held["session"] == place(keys[1]).id[:12]


@pytest.mark.usefixtures("figures")
def test_history_and_users_of_all_nodes(cluster: ClusterServers) -> None:
    counters.clear()
    cluster.flush()
    for _ in range(5):
        for user in ("1", "2", "2"):
            new_session(_auth_user_id=user)
    SessionStore(new_session(_auth_user_id="3")).flush()
    report_the_rest()
    found = history.recent(1)
    assert sum(row.created for row in found.rows) == 16
    assert sum(row.ended for row in found.rows) == 1
    assert found.levels[-1].sessions == 15
    out = StringIO()
    call_command("sessionstats", "--top-users", "5", "--format", "json", stdout=out)
    assert json.loads(out.getvalue())["users"] == {"logged_in": 2, "most_sessions": [10, 5]}


@pytest.mark.each_server
def test_checks_accept_a_cluster_and_refuse_a_socket(
    cluster: ClusterServers, settings: Any
) -> None:
    settings.SESSION_ENGINE = "django_clustered_sessions.backend"
    assert [message for message in check_settings() if message.is_serious()] == []
    assert {message.id for message in check_store()} <= {"clustered_sessions.W008"}
    settings.CACHES["sessions"]["LOCATION"] = "unix:///run/store.sock"
    settings.CACHES = settings.CACHES | {}
    (message,) = [message for message in check_settings() if message.is_serious()]
    assert message.id == "clustered_sessions.E001"


@pytest.mark.each_server
def test_entry_that_hides_a_cluster_says_what_to_do(cluster: ClusterServers, settings: Any) -> None:
    key = new_session(n=1)
    home = cluster.owner(place(key).record)
    use_store(settings, f"{elsewhere(cluster, home).url}/0")
    with pytest.raises(SessionStoreUnavailable, match="node of a cluster"):
        SessionStore(key).load()
    settings.SESSION_ENGINE = "django_clustered_sessions.backend"
    assert "clustered_sessions.W019" in {message.id for message in check_store()}


@pytest.mark.django_db(transaction=True)
def test_sessions_of_another_engine_move_to_all_nodes(
    cluster: ClusterServers, settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = "django.contrib.sessions.backends.db"
    keys = []
    for n in range(30):
        old = DatabaseStore()
        old["n"] = n
        old.create()
        keys.append(old.session_key)
    assert SessionStore(keys[0])["n"] == 0
    for brought in ("taken over", "here already"):
        stdout = StringIO()
        call_command("sessionimport", stdout=stdout)
        assert f"{29 if brought == 'taken over' else 30}  {brought}\n" in stdout.getvalue()
    assert [SessionStore(key)["n"] for key in keys] == list(range(30))
