"""Tracked reads: no trip where the store would tell of a change, and never older than the bound."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from secrets import token_hex
from typing import Any
from weakref import ref

import pytest
import redis
from django.core.management import call_command
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.decorators import session_fresh, session_locked
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.middleware import ClusteredSessionMiddleware
from django_clustered_sessions.monitoring.counters import AGES, counters
from django_clustered_sessions.protocol.commands import records
from django_clustered_sessions.protocol.effects import plain
from django_clustered_sessions.protocol.record import Meta
from django_clustered_sessions.session.near_cache import near_cache
from django_clustered_sessions.store import clock, connections, drivers, tracking
from django_clustered_sessions.store.runner import report_the_rest
from tests.children import forked
from tests.clocks import Ages, is_answered
from tests.conftest import DATABASE, use_store
from tests.elsewhere import Elsewhere, started
from tests.gateways import load_scripts, place
from tests.locking import BOUND_S, new_session
from tests.servers import CountingProxy, StoreServer, wait_for

#: A bound that no test comes to: a change that is seen sooner was told.
LONG_S = 60.0
#: A bound that a test waits for.
SHORT_S = 0.3


@pytest.fixture(autouse=True)
def tracked(store: redis.Redis, settings: Any) -> None:
    near_cache.clear()
    load_scripts(store)
    settings.CLUSTERED_SESSIONS_NEAR_READS = "tracked"
    settings.CLUSTERED_SESSIONS_NEAR_MAX_AGE = LONG_S


@pytest.fixture
def elsewhere(store: redis.Redis, store_server: StoreServer) -> Iterator[Elsewhere]:
    """Give another node, which knows the store's own address."""
    with started(f"{store_server.url}/{DATABASE}") as node:
        yield node


def read(key: str, name: str = "n") -> Any:
    return SessionStore(key).get(name)


def free_reads() -> int:
    return counters.counts["near_reads"]


def is_free(key: str) -> bool:
    """Return whether a read costs no trip."""
    before = free_reads()
    read(key)
    return free_reads() > before


def visit(key: str, view: Callable[[HttpRequest], HttpResponse]) -> HttpResponse:
    request = RequestFactory().get("/")
    request.COOKIES = {"sessionid": key}
    return ClusteredSessionMiddleware(view)(request)


def page(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(request.session.get("n")))


def channels(store: redis.Redis) -> list[str]:
    """Return the ids of the tracked connections."""
    return [client["id"] for client in store.client_list() if "t" in client["flags"]]


def test_second_read_costs_no_trip(proxy: CountingProxy) -> None:
    key = new_session(n=1)
    assert read(key) == 1
    proxy.reset()
    for _ in range(10):
        assert read(key) == 1
    assert (proxy.round_trips, proxy.connections) == (0, 0)


def test_copy_ages_while_the_machine_is_suspended(
    store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = new_session(n=1)
    read(key)
    assert is_free(key)
    now = clock.now_s
    # time.monotonic() would stand still.
    monkeypatch.setattr(clock, "now_s", lambda: now() + 2 * LONG_S)
    assert not is_free(key)


def test_channel_is_told_its_role_by_the_greeting_alone(proxy: CountingProxy) -> None:
    key = new_session(n=1)
    proxy.reset()
    assert read(key) == 1
    assert sum(b"HELLO" in one for one in proxy.requests) == 1


def test_second_read_costs_no_trip_on_an_event_loop(proxy: CountingProxy) -> None:
    key = new_session(n=1)

    async def reads() -> None:
        for _ in range(10):
            assert await SessionStore(key).aget("n") == 1

    async def main() -> None:
        await SessionStore(key).aget("n")
        proxy.reset()
        await reads()
        assert proxy.round_trips == 0
        await asyncio.gather(*(reads() for _ in range(5)))

    asyncio.run(main())


def test_tasks_share_the_channel(store: redis.Redis) -> None:
    keys = [new_session(n=n) for n in range(20)]

    async def main() -> None:
        await SessionStore(keys[0]).aget("n")
        found = await asyncio.gather(*(SessionStore(key).aget("n") for key in keys))
        assert found == list(range(20))
        assert len(channels(store)) == 1
        before = free_reads()
        assert [await SessionStore(key).aget("n") for key in keys] == list(range(20))
        assert free_reads() == before + 20

    asyncio.run(main())


class Stop(BaseException):
    """Exception of a signal, as KeyboardInterrupt is one."""


class Interrupting(tuple[Any, ...]):
    """A trip that a signal's exception keeps from being sent."""

    def __len__(self) -> int:
        raise Stop


def test_question_that_was_not_sent_gets_no_other_ones_answer(store: redis.Redis) -> None:
    """Or one visitor would be served the session of another."""
    keys = [new_session(n=n) for n in range(2)]
    near_cache.clear()

    async def main() -> None:
        await SessionStore(keys[1]).aget("n")
        near_cache.clear()
        pool, its = tracking.here()
        channel = its.usable(pool, place(keys[0]).record)
        assert channel is not None
        channel.ask_along("", Interrupting(), lambda *replies: None)
        with pytest.raises(Stop):
            await SessionStore(keys[0]).aget("n")
        reads = [asyncio.create_task(SessionStore(key).aget("n")) for key in reversed(keys)]
        assert await asyncio.gather(*reads) == [1, 0]

    asyncio.run(main())


def ask_along(take: Callable[..., Any]) -> tuple[str, tracking.Channel]:
    """Ask along with the next read of a session, which is returned with its channel."""
    key = new_session(n=1)
    read(key)
    near_cache.clear()
    pool, its = tracking.here()
    record = place(key).record
    channel = its.usable(pool, record)
    assert channel is not None
    channel.ask_along(record, records.described([place(key)]), take)
    return key, channel


def test_fault_that_nobody_waits_for_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def take(*replies: Any) -> None:
        raise IndexError("too few of them")

    key, channel = ask_along(take)
    assert read(key) == 1
    wait_for(lambda: read(key) == 1 and not channel.is_open, "it is closed")
    (told,) = [one for one in caplog.records if one.levelname == "ERROR"]
    assert told.name == "django_clustered_sessions.store"
    assert "too few of them" in caplog.text


def test_signal_is_heard_where_nobody_waits(caplog: pytest.LogCaptureFixture) -> None:
    taken: list[Any] = []

    def take(*replies: Any) -> None:
        taken.append(replies)
        if len(taken) == 1:
            raise SoftLimit

    key, channel = ask_along(take)

    def is_heard() -> bool:
        try:
            read(key)
        except SoftLimit:
            return True
        return False

    wait_for(is_heard, "it is raised")
    assert not channel.is_open
    assert read(key) == 1
    assert not [one for one in caplog.records if one.levelname == "ERROR"]


class SoftLimit(Exception):  # noqa: N818
    """Exception of a signal, as Celery's soft time limit is one."""


def test_signal_is_heard_while_the_store_is_slow(proxy: CountingProxy, settings: Any) -> None:
    """And is not taken for the end of the connection, after which the read goes on."""
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 10.0
    key = new_session(n=1)
    read(key)
    near_cache.clear()

    def stop(*signal_and_frame: object) -> None:
        proxy.resume()
        raise SoftLimit

    before = signal.signal(signal.SIGALRM, stop)
    proxy.stall()
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(SoftLimit):
            read(key)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        proxy.resume()
    assert read(key) == 1


@pytest.mark.parametrize("is_async", [False, True])
def test_channel_in_vain_takes_from_the_trips_time(
    proxy: CountingProxy, settings: Any, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    """Outside of a request too, where each operation has STORE_TIMEOUT."""
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 2.0
    key = new_session(n=1)
    near_cache.clear()
    given: list[float] = []

    def perform(trip: Any, pool: Any, seconds: float) -> Any:
        given.append(seconds)
        raise SessionStoreUnavailable("away")

    monkeypatch.setattr(drivers, "aperform" if is_async else "perform", perform)
    proxy.stall()
    with pytest.raises(SessionStoreUnavailable):
        asyncio.run(SessionStore(key).aload()) if is_async else SessionStore(key).load()
    proxy.resume()
    # The channel was waited for, for half of it.
    assert given[-1] <= 1.0


def test_channel_that_comes_after_its_loops_end_is_closed(
    store: redis.Redis, proxy: CountingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: a thread opens it, and is not broken off with the task that wants it."""
    key = new_session(n=1)
    close = connections._close_channels
    closed = []

    def close_before_it_is_open(pool: Any) -> None:
        close(pool)
        # Not for the collector.
        closed.append(pool)
        proxy.resume()

    monkeypatch.setattr(connections, "_close_channels", close_before_it_is_open)

    async def main() -> None:
        # The loop's pool, whose end closes the channels.
        await SessionStore(key).aexists(key)
        proxy.stall()
        reading = asyncio.create_task(SessionStore(key).aget("n"))
        async with asyncio.timeout(BOUND_S):
            while not any(b"HELLO" in one for one in proxy.requests):
                await asyncio.sleep(0)
        assert not reading.done()

    asyncio.run(main())
    assert closed
    assert tracking.here()[0] not in closed
    wait_for(lambda: not channels(store), "the store sees the end")


async def test_channel_keeps_nothing_of_a_request(proxy: CountingProxy) -> None:
    """The event loop watches it while others read."""
    current: ContextVar[object] = ContextVar("current")
    key = await asyncio.to_thread(new_session, n=1)
    await SessionStore(key).aget("n")
    pool, its = tracking.here()
    channel = its.usable(pool, place(key).record)
    assert channel is not None
    proxy.stall()

    async def request() -> Any:
        request = threading.Event()
        current.set(request)
        asking = channel.aask((plain("TIME"),), lambda *_: None, BOUND_S)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await asking
        return ref(request)

    gone = await asyncio.create_task(request())
    await asyncio.sleep(0)
    assert channel.is_open
    assert gone() is None
    proxy.resume()


def test_tasks_that_wait_for_a_thread_open_one_channel(store: redis.Redis) -> None:
    """As at the start of a process: the first ones find none, and the last ones one."""
    keys = [new_session(n=n) for n in range(8)]
    near_cache.clear()

    def opened() -> int:
        found: dict[str, Any] = store.info("commandstats").get("cmdstat_client|tracking", {})
        return found.get("calls", 0)

    async def main() -> list[Any]:
        executor, all_wait = ThreadPoolExecutor(1), threading.Event()
        asyncio.get_running_loop().set_default_executor(executor)
        executor.submit(all_wait.wait)
        reads = [asyncio.create_task(SessionStore(key).aget("n")) for key in keys]
        asyncio.get_running_loop().call_soon(all_wait.set)
        return await asyncio.gather(*reads)

    before = opened()
    assert asyncio.run(main()) == list(range(8))
    assert opened() == before + 1


def test_checked_reads_open_no_channel(store: redis.Redis, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_NEAR_READS = "checked"
    key = new_session(n=1)
    assert [read(key) for _ in range(3)] == [1, 1, 1]
    assert (channels(store), free_reads()) == ([], 0)


def test_channel_ends_with_its_pool(store: redis.Redis, settings: Any) -> None:
    """And not only once nothing refers to the pool any more, as a remembered error does."""
    key = new_session(n=1)
    read(key)
    kept = [tracking.here()[0]]

    async def main() -> None:
        await SessionStore(key).aget("n")
        kept.append(tracking.here()[0])

    asyncio.run(main())
    assert len(channels(store)) == 1
    settings.CACHES = dict(settings.CACHES)
    wait_for(lambda: not channels(store), "the store sees the end")
    assert len(kept) == 2
    assert counters.counts["near_leases_lost"] == 0


def test_change_of_another_node_is_told(elsewhere: Elsewhere) -> None:
    key = new_session(n=1)
    for n in range(2, 5):
        assert read(key) == n - 1
        assert is_free(key)
        elsewhere.write(key, n=n)
        wait_for(lambda: read(key) == n, "the change is seen")  # noqa: B023


def test_change_of_another_node_is_told_on_an_event_loop(elsewhere: Elsewhere) -> None:
    key = new_session(n=1)

    async def main() -> None:
        assert await SessionStore(key).aget("n") == 1
        assert await SessionStore(key).aget("n") == 1
        await asyncio.to_thread(elsewhere.write, key, n=2)
        deadline = time.monotonic() + 10
        while await SessionStore(key).aget("n") != 2:
            assert time.monotonic() < deadline

    asyncio.run(main())


def test_ended_session_is_told(elsewhere: Elsewhere) -> None:
    key = new_session(n=1)
    assert read(key) == 1
    assert is_free(key)
    elsewhere.end(key)
    wait_for(lambda: read(key) is None, "the end is seen")


def test_page_after_a_change_costs_no_trip(proxy: CountingProxy) -> None:
    key = new_session(n=1)
    read(key)
    session = SessionStore(key)
    session["n"] = 2
    session.save()
    proxy.reset()
    assert read(key) == 2
    assert proxy.round_trips == 0


def test_session_is_tracked_again_after_a_change_of_ones_own(elsewhere: Elsewhere) -> None:
    """The next question, which is about another session, takes that along."""
    key, other = new_session(n=1), new_session(n=1)
    read(key)
    session = SessionStore(key)
    session["n"] = 2
    session.save()

    def is_tracked() -> bool:
        read(other)
        copy = near_cache.copy(place(key).record)
        return copy is not None and copy.is_tracked

    wait_for(is_tracked, "it is tracked again")
    assert (read(key), is_free(key)) == (2, True)
    elsewhere.write(key, n=3)
    wait_for(lambda: read(key) == 3, "the change is told")


def test_copy_of_what_was_written_is_as_the_store_has_it(store: redis.Redis) -> None:
    key = new_session(n=1, old="x" * 100)
    read(key)
    session = SessionStore(key)
    session["n"], session["new"] = 2, {"a": ["b"]}
    session.increment("hits")
    del session["old"]
    session.save()
    before = free_reads()
    written = SessionStore(key)
    assert written.load() == {"n": 2, "new": {"a": ["b"]}, "hits": 1}
    assert free_reads() == before + 1
    assert written.state.found is not None
    assert written.state.found.meta == Meta.parse(store.hget(place(key).record, "m:") or b"")


def test_change_on_top_of_an_old_copy_merges(elsewhere: Elsewhere) -> None:
    key = new_session(n=1, m=1)
    read(key)
    session = SessionStore(key)
    assert session["n"] == 1
    elsewhere.write(key, n=2)
    session["m"] = 2
    session.save()
    assert {name: read(key, name) for name in "nm"} == {"n": 2, "m": 2}


def test_large_session_is_not_sent_again(proxy: CountingProxy, settings: Any) -> None:
    key = new_session(**{f"k{i}": "x" * 1000 for i in range(64)})
    read(key)
    settings.CLUSTERED_SESSIONS_NEAR_MAX_AGE = SHORT_S
    until_s = time.monotonic() + SHORT_S
    wait_for(lambda: time.monotonic() > until_s, "the lease is over")
    proxy.reset()
    assert len(SessionStore(key).load()) == 64
    assert (proxy.round_trips, proxy.connections) == (1, 0)
    assert proxy.bytes_received < 1000
    # However long this takes.
    settings.CLUSTERED_SESSIONS_NEAR_MAX_AGE = LONG_S
    assert is_free(key)


# The reads that ask the store in any case.


def test_locked_and_fresh_views_ask_the_store(proxy: CountingProxy) -> None:
    key = new_session(n=1)
    visit(key, page)
    for view in (session_locked(page), session_fresh(page)):
        proxy.reset()
        assert visit(key, view).content == b"1"
        assert proxy.round_trips >= 1


def test_fresh_view_behind_a_hidden_mark_asks_the_store(elsewhere: Elsewhere) -> None:
    key = new_session(n=1)
    read(key)

    def hidden(request: HttpRequest) -> HttpResponse:
        assert request.session["n"] == 1
        request.session["mine"] = 1
        elsewhere.write(key, n=2)
        return session_fresh(page)(request)

    assert visit(key, hidden).content == b"2"
    assert read(key, "mine") == 1


def test_lock_by_hand_reads_from_the_store(elsewhere: Elsewhere) -> None:
    key = new_session(n=1)
    read(key)
    session = SessionStore(key)
    assert session["n"] == 1
    elsewhere.write(key, n=2)
    with session.lock():
        assert session["n"] == 2


def test_conflicts_that_are_errors_have_checked_reads(store: redis.Redis, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_ON_CONFLICT = "error"
    key = new_session(n=1)
    assert [read(key) for _ in range(3)] == [1, 1, 1]
    assert free_reads() == 0


def test_request_that_moved_its_session_asks_the_store(store: redis.Redis) -> None:
    key = new_session(n=1)
    session = SessionStore(key)
    session.cycle_key()
    assert read(key) is None
    read(session.session_key or "")
    before = free_reads()
    assert session.load() == {"n": 1}
    assert free_reads() == before


def test_missing_session_is_no_copy(elsewhere: Elsewhere, store: redis.Redis) -> None:
    key = new_session(n=1)
    record = place(key).record
    dumped = store.dump(record)
    store.delete(record)
    assert read(key) is None
    store.restore(record, 0, dumped)
    assert read(key) == 1


def test_session_that_expires_is_not_served(
    store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    ages = Ages(monkeypatch)
    session = SessionStore(new_session(n=1))
    session.set_expiry(20)
    session.save()
    key = session.session_key or ""
    read(key)
    ages.go_on(19)
    assert is_free(key)
    # The copy is proven for longer than the session lives.
    ages.go_on(2)
    assert not is_free(key)


# The bound, whatever fails. One session keeps the channel busy, as other visitors do.


def test_proof_is_renewed_without_a_wait(
    proxy: CountingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    ages, key = Ages(monkeypatch), new_session(n=1)
    read(key)
    proxy.reset()
    for _ in range(5):
        ages.go_on(0.6 * LONG_S)
        assert all(is_free(key) for _ in range(10))
        wait_for(lambda: is_answered(key), "the store has answered")
    assert b"".join(proxy.requests).count(b"PING") == 5
    assert counters.counts["near_longest_age_ms"] == 600 * LONG_S


@pytest.mark.parametrize("direction", ["requests", "replies"])
def test_link_that_swallows_is_noticed(
    proxy: CountingProxy, elsewhere: Elsewhere, settings: Any, direction: Any
) -> None:
    settings.CLUSTERED_SESSIONS_NEAR_MAX_AGE = SHORT_S
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 4.0
    key = new_session(n=1)
    read(key)
    proxy.swallow(direction, of=b"TRACKING")
    elsewhere.write(key, n=2)
    until_s = time.monotonic() + SHORT_S
    while time.monotonic() <= until_s:
        read(key)
    assert read(key) == 2
    wait_for(lambda: is_free(key), "another channel is open")
    assert counters.counts["near_leases_lost"] == 1


def test_idle_process_asks_for_nothing_and_then_the_store(
    proxy: CountingProxy, elsewhere: Elsewhere, settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_NEAR_MAX_AGE = SHORT_S
    key = new_session(n=1)
    read(key)
    proxy.reset()
    until_s = time.monotonic() + 2 * SHORT_S
    wait_for(lambda: time.monotonic() > until_s, "the lease is over")
    assert proxy.round_trips == 0
    assert not is_free(key)
    assert proxy.round_trips == 1
    # However long this takes.
    settings.CLUSTERED_SESSIONS_NEAR_MAX_AGE = LONG_S
    assert is_free(key)


def test_channel_that_is_killed_is_forgotten(store: redis.Redis, elsewhere: Elsewhere) -> None:
    key, other = new_session(n=1), new_session(n=1)
    read(key), read(other)
    assert is_free(key)
    for id_ in channels(store):
        store.client_kill_filter(_id=id_)
    elsewhere.write(key, n=2)
    elsewhere.write(other, n=2)
    wait_for(lambda: counters.counts["near_leases_lost"] or read(other), "its end is noticed")
    # One opens the channel again, and the other must not find its old copy there.
    wait_for(lambda: read(other) == 2 and is_free(other), "the channel is open again")
    assert read(key) == 2


def test_channel_that_the_store_closes_as_idle_is_forgotten(
    store: redis.Redis, elsewhere: Elsewhere, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(lambda: store.config_set("timeout", 0))
    key = new_session(n=1)
    read(key)
    assert is_free(key)
    store.config_set("timeout", 1)
    wait_for(lambda: not channels(store), "it was closed")
    elsewhere.write(key, n=2)
    assert read(key) == 2


def test_other_connections_may_be_killed(store: redis.Redis, elsewhere: Elsewhere) -> None:
    key = new_session(n=1)
    read(key)
    for client in store.client_list():
        if "t" not in client["flags"]:
            store.client_kill_filter(_id=client["id"], skipme=True)
    assert is_free(key)
    elsewhere.write(key, n=2)
    wait_for(lambda: read(key) == 2, "the change is seen")


def test_emptied_database_is_told(store: redis.Redis) -> None:
    for empty in (store.flushall, store.flushdb):
        key = new_session(n=1)
        read(key)
        assert is_free(key)
        empty()
        wait_for(lambda: read(key) is None, "it is seen")  # noqa: B023


def test_fork_begins_with_checked_reads(store: redis.Redis, elsewhere: Elsewhere) -> None:
    key = new_session(n=1)
    read(key)

    def in_child() -> bytes:
        first, second = is_free(key), is_free(key)
        return b"%d %d %d" % (first, second, read(key))

    assert forked(in_child) == b"0 1 1"
    # The parent's channel is as it was.
    assert is_free(key)
    elsewhere.write(key, n=2)
    wait_for(lambda: read(key) == 2, "the change is seen")


@pytest.mark.full
def test_full_tracking_table_tells_what_it_drops(
    store: redis.Redis, elsewhere: Elsewhere, request: pytest.FixtureRequest
) -> None:
    store.config_set("tracking-table-max-keys", 100)
    request.addfinalizer(lambda: store.config_set("tracking-table-max-keys", 1_000_000))
    keys = [new_session(n=1) for _ in range(10_000)]
    for key in keys:
        assert read(key) == 1
    wait_for(lambda: store.info()["tracking_total_keys"] <= 100, "the table was cut")
    for key in keys[:: len(keys) // 20]:
        elsewhere.write(key, n=2)
        wait_for(lambda: read(key) == 2, "the change is seen")  # noqa: B023
    assert counters.counts["near_invalidations"] >= 9000


def test_eviction_by_a_write_of_its_own_is_told(
    store: redis.Redis, request: pytest.FixtureRequest
) -> None:
    def reset() -> None:
        store.config_set("maxmemory", 0)
        store.config_set("maxmemory-policy", "noeviction")

    request.addfinalizer(reset)
    keys = [new_session(n=1, more="x" * 1000) for _ in range(200)]
    for key in keys:
        assert read(key) == 1
    store.config_set("maxmemory-policy", "allkeys-random")
    # Some more than is used: what connections take cannot be evicted.
    store.config_set("maxmemory", store.info("memory")["used_memory"] + 200_000)
    for _ in range(300):
        # Each write makes room for itself, once that is used up, or is refused where what takes the
        # room is no session.
        with suppress(SessionStoreUnavailable):
            new_session(n=1, more=token_hex(1500))
    evicted = [key for key in keys if not store.exists(place(key).record)]
    assert evicted
    for key in evicted:
        wait_for(lambda: read(key) is None, "it is seen")  # noqa: B023


def test_key_of_another_database_drops_the_copy(
    store: redis.Redis, store_server: StoreServer
) -> None:
    key = new_session(n=1)
    read(key)
    with store_server.client(db=DATABASE + 1) as other:
        other.set(place(key).record, "x")
        other.delete(place(key).record)
    wait_for(lambda: counters.counts["near_invalidations"] or not read(key), "it was told")
    assert read(key) == 1


@pytest.mark.parametrize("rights", [["-client|tracking"], ["-ping"]])
def test_store_that_refuses_is_told_once_and_asked(
    store: redis.Redis,
    store_server: StoreServer,
    elsewhere: Elsewhere,
    settings: Any,
    caplog: pytest.LogCaptureFixture,
    rights: list[str],
) -> None:
    settings.CLUSTERED_SESSIONS_NEAR_MAX_AGE = SHORT_S
    store.execute_command("ACL SETUSER", "site", "on", ">secret", "~*", "+@all", *rights)
    use_store(settings, f"redis://site:secret@127.0.0.1:{store_server.port}/{DATABASE}")
    key, other = new_session(n=1), new_session(n=1)
    with caplog.at_level(logging.WARNING):
        for n in range(2, 5):
            read(other)
            elsewhere.write(key, n=n)
            wait_for(lambda: read(other) and read(key) == n, "it is seen")  # noqa: B023
    told = [one for one in caplog.records if "does not tell this process" in one.message]
    assert len(told) <= 1
    store.execute_command("ACL DELUSER", "site")


@pytest.mark.usefixtures("figures")
def test_statistics_tell_of_reads_without_a_trip(store: redis.Redis, elsewhere: Elsewhere) -> None:
    key = new_session(n=1)
    for _ in range(4):
        read(key)
    elsewhere.write(key, n=2)
    wait_for(lambda: read(key) == 2, "the change is seen")
    for client in channels(store):
        store.client_kill_filter(_id=client)
    wait_for(lambda: counters.counts["near_leases_lost"] or read(key) is None, "it is lost")
    report_the_rest()
    shown, told = io.StringIO(), io.StringIO()
    call_command("sessionstats", stdout=shown)
    call_command("sessionstats", format="json", stdout=told)
    document = json.loads(told.getvalue())
    counted, ages = document["counters"], document["near_cache"]["read_age_ms"]
    assert "of the loads took no round trip." in shown.getvalue()
    line = "Ages of what they found, in ms: p50 {p50:,}, p99 {p99:,}, max {max:,}."
    assert line.format(**ages) in shown.getvalue()
    assert counted["near_reads"] >= 3
    assert counted["near_invalidations"] >= 1
    assert counted["near_leases_lost"] == 1
    assert 0 <= ages["p50"] <= ages["p99"] <= ages["max"] == counted["near_longest_age_ms"]
    assert ages["max"] <= LONG_S * 1000
    assert sum(counted[name] for name in AGES.classes) == counted["near_reads"]


def test_busy_channel_does_without(proxy: CountingProxy, store: redis.Redis, settings: Any) -> None:
    """A read beside another thread's goes over the pool."""
    # No answer is late, however busy the machine: it would open another channel.
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 30.0
    keys = [new_session(n=n) for n in range(8)]
    read(keys[0])
    errors: list[BaseException] = []

    def work(key: str, n: int) -> None:
        try:
            for _ in range(200):
                assert read(key) == n
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(key, n)) for n, key in enumerate(keys)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(channels(store)) == 1


def test_read_over_a_channel_that_another_thread_closes_ends(proxy: CountingProxy) -> None:
    """As at a failover: it goes on over the pool, and does not poll until its time is up."""
    key = new_session(n=1)
    read(key)
    pool, its = tracking.here()
    channel = its.usable(pool, place(key).record)
    assert channel is not None
    proxy.stall()
    asking = threading.Thread(target=channel.ask, args=((plain("PING"),), None, 60.0))
    asking.start()
    wait_for(lambda: any(b"PING" in one for one in proxy.requests), "it is asked")
    channel.close()
    proxy.resume()
    asking.join(10.0)
    assert not asking.is_alive()
