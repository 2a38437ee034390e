"""Sentinel: a primary that is killed, paused or cut off, and what a process knows of it."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import pytest
import redis

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.checks.settings import check_settings
from django_clustered_sessions.checks.store import check_store
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.store import connections
from django_clustered_sessions.store import sentinel as watching
from tests.children import forked
from tests.conftest import SERVERS, store_binary
from tests.locking import new_session
from tests.pages import block
from tests.servers import StoreServer, wait_for
from tests.topologies import NAME, Replicated

# A Sentinel in TILT takes half a minute to come back.
pytestmark = pytest.mark.timeout(300)

#: Generous: what is waited for is the condition.
BOUND_S = 60.0

#: Where it is looked at: no request takes longer than this, in seconds, and what a machine stands
#: still beside it.
TIMEOUT_S, STILL_S = 2.0, 5.0


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def is_async(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


class Outcome(NamedTuple):
    """One request: its session, when it began and ended, in seconds, and how it failed."""

    key: str
    began_s: float
    ended_s: float
    error: Exception | None

    @property
    def took_s(self) -> float:
        """Seconds that it took."""
        return self.ended_s - self.began_s


class Writers:
    """Write sessions without a pause, each in a thread or task of its own; a context manager."""

    def __init__(self, keys: list[str], *, is_async: bool) -> None:
        self._keys, self._is_async = keys, is_async
        self._ends = threading.Event()
        self.outcomes: list[Outcome] = []

    def __enter__(self) -> Writers:
        work: list[Callable[[], Any]] = (
            [lambda: asyncio.run(self._aall())]
            if self._is_async
            else [lambda key=key: self._write(key) for key in self._keys]
        )
        self._threads = [threading.Thread(target=one) for one in work]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join(BOUND_S)
            assert not thread.is_alive()

    def successes(self, *, since_s: float) -> list[Outcome]:
        """Return the requests that began since a moment and succeeded."""
        return [one for one in list(self.outcomes) if not one.error and one.began_s > since_s]

    def wait_for_successes(self) -> float:
        """Wait until each has written again; return when the first had, in seconds.

        No request is under way then that began before: it has met one of two faults at most.
        """
        since_s, keys = time.monotonic(), set(self._keys)
        wait_for(
            lambda: {one.key for one in self.successes(since_s=since_s)} == keys,
            "each writes again",
            timeout_s=BOUND_S,
        )
        return min(one.ended_s for one in self.successes(since_s=since_s))

    def _write(self, key: str) -> None:
        while not self._ends.is_set():
            began_s, error = time.monotonic(), None
            try:
                write(key)
            except Exception as failed:
                error = failed
            self._note(key, began_s, error)
            # As a browser would, or refusals would fill the memory.
            self._ends.wait(0.002)

    async def _aall(self) -> None:
        await asyncio.gather(*(self._awrite(key) for key in self._keys))

    async def _awrite(self, key: str) -> None:
        while not self._ends.is_set():
            began_s, error = time.monotonic(), None
            try:
                await awrite(key)
            except Exception as failed:
                error = failed
            self._note(key, began_s, error)
            await asyncio.sleep(0.002)

    def _note(self, key: str, began_s: float, error: Exception | None) -> None:
        self.outcomes.append(Outcome(key, began_s, time.monotonic(), error))


def sessions(topology: Replicated, number: int = 6) -> list[str]:
    """Store sessions that all replicas have, and return their keys."""
    keys = [new_session(n=0) for _ in range(number)]
    # WAIT is about what its own connection wrote.
    wait_for(lambda: offsets(topology) == {0}, "the replicas have all")
    return keys


def offsets(topology: Replicated) -> set[int]:
    with topology.primary.client() as client:
        told = client.info("replication")
    return {
        told["master_repl_offset"] - told[f"slave{number}"]["offset"]
        for number in range(len(topology.replicas))
    }


def write(key: str) -> None:
    """Write a session once."""
    session = SessionStore(key)
    session["n"] += 1
    session.save()


async def awrite(key: str) -> None:
    """See write()."""
    session = SessionStore(key)
    await session.aset("n", await session.aget("n") + 1)
    await session.asave()


def scripts_run(client: redis.Redis) -> int:
    """Return how many scripts clients have sent to a server."""
    stats = client.info("commandstats")
    return sum(
        stats.get(f"cmdstat_{name}", {"calls": 0})["calls"]
        for name in ("eval", "evalsha", "eval_ro", "evalsha_ro")
    )


def wait_until_seen(server: StoreServer) -> None:
    """Wait until this process's watcher knows the primary."""
    watcher = connections.watcher()
    assert watcher is not None
    wait_for(
        lambda: watcher.names("127.0.0.1", server.port), "the watcher sees it", timeout_s=BOUND_S
    )


def test_writes_go_on_after_a_failover_under_load(settings: Any, is_async: bool) -> None:
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = TIMEOUT_S
    # Each kind of server once.
    kind = SERVERS[is_async % len(SERVERS)]
    with Replicated(sentinels=3, binary=store_binary(kind)) as topology:
        topology.use(settings, 1)
        with Writers(sessions(topology), is_async=is_async) as writers:
            writers.wait_for_successes()
            topology.primary.kill()
            topology.promoted()
            promoted_s = time.monotonic()
            back_s = writers.wait_for_successes()
    failed = [one.error for one in writers.outcomes if one.error]
    assert failed
    assert {type(error) for error in failed} == {SessionStoreUnavailable}
    assert max(one.took_s for one in writers.outcomes) < TIMEOUT_S + STILL_S
    # A second and a bit where the machine has time.
    assert back_s - promoted_s < BOUND_S / 2


def test_tasks_leave_a_primary_that_was_cut_off(settings: Any) -> None:
    """It takes writes as before: nothing but the Sentinels tells that it is none any more."""
    with Replicated(sentinels=3) as topology:
        topology.admit("site", "on", ">secret", "~*", "+@all")
        topology.use(settings, 1, user="site:secret")
        with Writers(sessions(topology), is_async=True) as writers:
            writers.wait_for_successes()
            old = topology.cut_off("hidden")
            promoted = topology.promoted()
            wait_until_seen(promoted)
            # What was under way when the change was seen has ended then.
            writers.wait_for_successes()
            before = scripts_run(old)
            writers.wait_for_successes()
            assert scripts_run(old) == before
            assert old.info("replication")["role"] == "master"
            assert scripts_run(promoted.client()) > 0
    # Who needed a new connection while the Sentinels knew of no primary.
    failed = {type(one.error) for one in writers.outcomes if one.error}
    assert failed <= {SessionStoreUnavailable}


def test_threads_send_nothing_to_a_paused_primary(settings: Any) -> None:
    """Bytes in its socket would be executed when it goes on, before it knows of the failover."""
    with Replicated(sentinels=3) as topology:
        topology.use(settings, 1)
        keys = sessions(topology)
        with Writers(keys, is_async=False) as writers:
            writers.wait_for_successes()
        # As many idle connections as there were writers; none has anything under way.
        before = scripts_run(topology.primary.client())
        topology.primary.pause()
        promoted = topology.promoted()
        wait_until_seen(promoted)
        with Writers(keys, is_async=False) as writers:
            writers.wait_for_successes()
            topology.primary.resume()
            old = topology.primary.client()
            wait_for(lambda: old.ping(), "it goes on")
            writers.wait_for_successes()
        assert scripts_run(old) == before
    assert not [one.error for one in writers.outcomes if one.error]


def test_silent_sentinels_cost_no_request(settings: Any, is_async: bool) -> None:
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 6.0
    before = counters.counts["breaker_opened"]
    with Replicated(sentinels=3) as topology:
        topology.use(settings, 1)
        with Writers(sessions(topology), is_async=is_async) as writers:
            writers.wait_for_successes()
            for sentinel in topology.sentinels:
                sentinel.pause()
            try:
                raw = topology.primary.client()
                for _ in range(10):
                    # Each needs a new connection, and so the primary's address.
                    raw.client_kill_filter(_type="normal", skipme=True)
                    writers.wait_for_successes()
            finally:
                for sentinel in topology.sentinels:
                    sentinel.resume()
    assert not [one.error for one in writers.outcomes if one.error]
    assert counters.counts["breaker_opened"] == before


def test_hanging_primary_costs_the_timeout_at_most(settings: Any) -> None:
    """Asynchronously everything has a timeout around it; a thread has none but its sockets'."""
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = TIMEOUT_S
    with Replicated(sentinels=3) as topology:
        topology.use(settings, 1)
        with Writers(sessions(topology), is_async=False) as writers:
            writers.wait_for_successes()
            topology.primary.pause()
            try:
                topology.promoted()
                writers.wait_for_successes()
            finally:
                topology.primary.resume()
    assert {type(one.error) for one in writers.outcomes} <= {SessionStoreUnavailable, type(None)}
    assert max(one.took_s for one in writers.outcomes) < TIMEOUT_S + STILL_S


def test_write_refused_by_a_replica_goes_to_the_primary(
    settings: Any, is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So only who connects asks.
    monkeypatch.setattr(watching, "INTERVAL_S", 3600.0)
    with Replicated(sentinels=1) as topology:
        topology.use(settings, 1)
        old, (new,), (sentinel,) = topology.primary, topology.replicas, topology.sentinels

        def demote() -> None:
            sentinel.client().execute_command("SENTINEL REMOVE", NAME)
            new.client().replicaof("no", "one")
            old.client().replicaof("127.0.0.1", new.port)
            sentinel.client().execute_command("SENTINEL MONITOR", NAME, "127.0.0.1", new.port, 1)

        async def go() -> None:
            session = SessionStore(key)
            await session.aset("n", await session.aget("n") + 1)
            demote()
            await session.asave()
            assert await SessionStore(key).aget("n") == 1

        (key,) = sessions(topology, 1)
        if is_async:
            asyncio.run(go())
        else:
            session = SessionStore(key)
            session["n"] += 1
            demote()
            session.save()
            assert SessionStore(key)["n"] == 1
        assert "cmdstat_evalsha" in old.client().info("commandstats")
        assert scripts_run(new.client()) > 0


def test_write_to_a_replica_without_sentinels_is_refused(settings: Any) -> None:
    with Replicated() as topology:
        topology.use(settings, 1)
        key = new_session(n=0)
        topology.primary.client().replicaof("127.0.0.1", topology.replicas[0].port)
        with pytest.raises(SessionStoreUnavailable, match="it is a replica"):
            write(key)


def test_documented_configuration_works(settings: Any) -> None:
    """Servers, Sentinels and entry are those of the page, but for their addresses and timeouts."""
    directives, watch, entry = (
        block("deploy-store.md", word)
        for word in ("maxmemory 2gb", "sentinel monitor", "SENTINEL_KWARGS")
    )
    flags = [word for line in directives.splitlines() for word in f"--{line}".split(" ", 1)]
    with Replicated(*flags) as topology:
        watch = watch.replace("10.0.0.1 6379 2", f"127.0.0.1 {topology.primary.port} 1")
        with StoreServer("--sentinel", config=watch) as sentinel:
            topology.admit("site", "on", ">...", "~session:*", "+@all")
            sentinel.client().execute_command("ACL SETUSER", "site", "on", ">...", "+@all")
            namespace: dict[str, Any] = {}
            exec(
                re.sub(r"\(\"sentinel-\d.*\)", f'("127.0.0.1", {sentinel.port})', entry), namespace
            )
            settings.CACHES = namespace["CACHES"]
            settings.SESSION_CACHE_ALIAS = namespace["SESSION_CACHE_ALIAS"]
            assert check_settings() == []
            assert check_store() == []
            assert SessionStore(new_session(n=1))["n"] == 1
            asyncio.run(awrite(new_session(n=1)))


def test_threads_and_loops_share_one_watcher(settings: Any) -> None:
    with Replicated(sentinels=1) as topology:
        topology.use(settings, 1)
        for _ in range(3):
            key = new_session(n=0)
            write(key)
            asyncio.run(awrite(key))
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("session-store-watcher") == 1


def test_child_process_watches_for_itself(settings: Any) -> None:
    with Replicated(sentinels=1) as topology:
        topology.use(settings, 1)
        key = new_session(n=0)

        def work() -> bytes:
            names = [thread.name for thread in threading.enumerate()]
            write(key)
            return " ".join(names).encode()

        assert b"session-store-watcher" not in forked(work)
        assert SessionStore(key)["n"] == 1
