"""Tracked reads while stores, links and processes fail: none is older than the bound.

Readers in a process of their own, eight threads and eight tasks, log each read; the test writes and
breaks things.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest
import redis

from django_clustered_sessions.backend import SessionStore
from tests.conftest import DATABASE, use_store
from tests.locking import Threads, new_session, outcome
from tests.servers import CountingProxy, StoreServer, wait_for
from tests.tracked_reader import Found, Reader, Written, reading, too_old

MAX_AGE_S: Final = 0.3
#: Sessions that are read, and the writes between two faults.
SESSIONS: Final = 6
WRITES: Final = 30


class Site:
    """A store, readers of it past a proxy, and a writer that logs what was acknowledged."""

    def __init__(self, server: StoreServer, proxy: CountingProxy, reader: Reader, keys: list[str]):
        self.server, self.proxy, self.reader, self.keys = server, proxy, reader, keys
        self.writes: list[Written] = []
        self._n = 1

    def write(self, times: int = WRITES) -> None:
        """Change all sessions in turn."""
        for turn in range(times):
            self._n += 1
            key = self.keys[turn % len(self.keys)]
            session = SessionStore(key)
            session["n"] = self._n
            session.save()
            self.writes.append(Written(time.monotonic(), key, self._n))

    def end(self, key: str) -> None:
        """End a session."""
        SessionStore(key).flush()
        self.writes.append(Written(time.monotonic(), key, None))

    def settle(self) -> None:
        """Wait until all sessions were read when only what was written last may be found."""
        from_s = self.writes[-1].done_s + MAX_AGE_S
        wait_for(
            lambda: {one.key for one in self.reader.found if one.began_s > from_s} >= {*self.keys},
            "all is read",
            timeout_s=30.0,
        )

    def check(self) -> None:
        """Fail if any read was too old."""
        self.settle()
        assert too_old(self.reader.found, self.writes, MAX_AGE_S) == []


@pytest.fixture
def server(store_server: StoreServer) -> Iterator[StoreServer]:
    with StoreServer("--appendonly", "yes", binary=store_server.binary) as started:
        yield started


@pytest.fixture
def site(server: StoreServer, settings: Any, tmp_path: Path) -> Iterator[Site]:
    with on_site(server, settings, tmp_path) as found:
        yield found


@contextmanager
def on_site(
    server: StoreServer, settings: Any, folder: Path, *, busy_threads: int = 0
) -> Iterator[Site]:
    use_store(settings, f"{server.url}/{DATABASE}")
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 10.0
    keys = [new_session(n=1) for _ in range(SESSIONS)]
    with (
        CountingProxy(server.port) as proxy,
        reading(
            folder,
            f"{proxy.url}/{DATABASE}",
            keys,
            busy_threads=busy_threads,
            NEAR_MAX_AGE=MAX_AGE_S,
            # Busy threads let one that waits for the store go on late.
            STORE_TIMEOUT=5.0 if busy_threads else 1.0,
        ) as reader,
    ):
        found = Site(server, proxy, reader, keys)
        found.write()
        found.settle()
        yield found


def kill(server: StoreServer, *, tracked: bool) -> None:
    with server.client() as client:
        for one in client.client_list():
            if ("t" in one["flags"]) == tracked:
                with suppress(redis.RedisError):
                    client.client_kill_filter(_id=one["id"], skipme=True)


def is_busy(client: redis.Redis) -> bool:
    """Return whether a script runs that the store may be told to end."""
    try:
        client.ping()
    except redis.ResponseError as error:
        return str(error).startswith("BUSY")
    return False


def stand_still(site: Site) -> None:
    """Let the reader stand still for longer than a lease, and sessions change meanwhile."""
    site.reader.process.send_signal(signal.SIGSTOP)
    site.write()
    until_s = time.monotonic() + MAX_AGE_S
    wait_for(lambda: time.monotonic() > until_s, "the lease is over")
    site.reader.process.send_signal(signal.SIGCONT)


def test_age_is_bounded_while_all_is_well(site: Site) -> None:
    for _ in range(5):
        site.write()
        site.settle()
    site.end(site.keys[0])
    site.check()


def test_age_is_bounded_while_connections_are_killed(site: Site) -> None:
    for _ in range(5):
        kill(site.server, tracked=True)
        site.write()
        kill(site.server, tracked=False)
        site.write()
        site.settle()
    site.check()


@pytest.mark.parametrize("direction", ["requests", "replies"])
def test_age_is_bounded_while_a_link_swallows(site: Site, direction: Any) -> None:
    for _ in range(3):
        site.proxy.swallow(direction, of=b"TRACKING")
        site.write()
        site.settle()
    site.check()


def test_age_is_bounded_while_links_are_cut(site: Site) -> None:
    for _ in range(5):
        site.proxy.cut()
        site.write()
        site.settle()
    site.proxy.refuse()
    site.write()
    site.proxy.accept()
    site.check()


def test_age_is_bounded_after_a_reader_stood_still(site: Site) -> None:
    for _ in range(3):
        stand_still(site)
        site.settle()
    site.check()


def test_age_is_bounded_after_the_store_stood_still(site: Site) -> None:
    for _ in range(3):
        site.server.pause()
        until_s = time.monotonic() + 2 * MAX_AGE_S
        wait_for(lambda: time.monotonic() > until_s, "the lease is over")  # noqa: B023
        site.server.resume()
        site.write()
    site.check()


def test_age_is_bounded_while_the_store_is_busy(site: Site) -> None:
    with site.server.client() as client, Threads() as threads:
        client.config_set("busy-reply-threshold", 50)

        def busy() -> None:
            with site.server.client(socket_timeout=30.0) as other, suppress(redis.RedisError):
                other.eval("while true do end", 0)

        for _ in range(2):
            ending = threads.start(busy)
            wait_for(lambda: is_busy(client), "the script runs")
            until_s = time.monotonic() + 2 * MAX_AGE_S
            wait_for(lambda: time.monotonic() > until_s, "the lease is over")  # noqa: B023
            client.script_kill()
            outcome(ending)
            site.write()
    site.check()


@pytest.mark.parametrize("kind", ["ALL", "WRITE"])
def test_age_is_bounded_while_clients_are_paused(site: Site, kind: str) -> None:
    with site.server.client() as client:
        for _ in range(3):
            client.execute_command("CLIENT", "PAUSE", "600", kind)
            site.write(SESSIONS)
            site.write()
    site.check()


def test_age_is_bounded_over_restarts(site: Site) -> None:
    for _ in range(2):
        site.write()
        site.server.restart()
        site.write()
        site.settle()
    site.check()


@pytest.mark.parametrize("direction", ["requests", "replies"])
def test_age_is_bounded_over_a_restart_behind_a_black_hole(site: Site, direction: Any) -> None:
    """The end of the connection is swallowed, too, and a store without a tracking table answers."""
    for _ in range(2):
        site.proxy.swallow(direction, of=b"TRACKING")
        site.server.restart()
        site.write()
        site.settle()
    site.check()


def test_age_is_bounded_when_the_store_is_emptied(site: Site) -> None:
    site.write()
    with site.server.client() as client:
        client.flushall()
    at_s = time.monotonic()
    site.writes += [Written(at_s, key, None) for key in site.keys]
    site.check()


def test_age_is_bounded_while_the_table_is_full(site: Site) -> None:
    with site.server.client() as client:
        client.config_set("tracking-table-max-keys", 3)
    for _ in range(5):
        site.write()
        site.settle()
    site.check()


def test_age_is_bounded_with_threads_for_io(
    store_server: StoreServer, settings: Any, tmp_path: Path
) -> None:
    with (
        StoreServer("--io-threads", "4", binary=store_server.binary) as server,
        on_site(server, settings, tmp_path) as site,
    ):
        for _ in range(3):
            kill(site.server, tracked=True)
            site.write()
            site.proxy.swallow("replies", of=b"TRACKING")
            site.write()
            site.settle()
            stand_still(site)
        site.check()


def test_age_is_bounded_beside_busy_threads(
    server: StoreServer, settings: Any, tmp_path: Path
) -> None:
    with on_site(server, settings, tmp_path, busy_threads=16) as site:
        for _ in range(3):
            kill(site.server, tracked=True)
            site.write()
            stand_still(site)
            site.proxy.swallow("replies", of=b"TRACKING")
            site.write()
        site.check()


def test_demoted_store_is_not_believed(
    site: Site, store_server: StoreServer, settings: Any
) -> None:
    """It copies another store, which knows nothing of these sessions."""
    with StoreServer(binary=store_server.binary) as other, site.server.client() as client:
        client.replicaof("127.0.0.1", other.port)
        wait_for(
            lambda: client.info("replication")["master_link_status"] == "up", "it has copied it"
        )
        at_s = time.monotonic()
        site.writes += [Written(at_s, key, None) for key in site.keys]
        site.check()


def test_checker_finds_a_read_that_is_too_old() -> None:
    writes = [Written(1.0, "a", 1), Written(2.0, "a", 2), Written(3.0, "a", None)]

    def found(began_s: float, value: int | None) -> list[str]:
        return too_old([(Found(began_s, began_s, "a", value))], writes, 0.5)

    assert found(1.9, 1) == found(2.5, 1) == found(3.4, 2) == found(9.0, None) == []
    assert len(found(2.6, 1)) == len(found(3.6, 2)) == 1
