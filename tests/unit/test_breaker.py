"""The breaker opens on failures in a row, lets one probe through at a time, and closes again."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.counters import NAMES, counters
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.store import breaker as module
from django_clustered_sessions.store import connections
from django_clustered_sessions.store.breaker import (
    FAILURES,
    FIRST_PROBE_S,
    LONGEST_PROBE_S,
    Breaker,
)
from django_clustered_sessions.store.drivers import _unavailable
from tests.conftest import use_store
from tests.gateways import load_scripts
from tests.servers import CountingProxy, wait_for

KEY = "x" * 32


class Clock:
    """A clock that goes when it is told to."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    # No jitter: the whole interval each time.
    return Breaker("store:1", clock, lambda: 1.0)


def away() -> SessionStoreUnavailable:
    error = SessionStoreUnavailable("does not answer")
    error.is_away = True
    return error


def fail(breaker: Breaker, error: BaseException | None = None) -> BaseException:
    """Let a trip fail, and return the error that comes of it."""
    with pytest.raises(BaseException) as caught, breaker.trip():  # noqa: PT012
        raise error or away()
    return caught.value


def is_asked(breaker: Breaker, error: BaseException | None = None) -> bool:
    """Return whether a trip, which then fails, gets through to the store."""
    error = error or away()
    return fail(breaker, error) is error


def opened(breaker: Breaker) -> Breaker:
    for _ in range(FAILURES):
        assert is_asked(breaker)
    return breaker


def test_opens_after_failures_in_a_row_and_is_fast(breaker: Breaker) -> None:
    for _ in range(3):
        for _ in range(FAILURES - 1):
            assert is_asked(breaker)
        with breaker.trip():
            pass
    assert not breaker.is_open
    before = dict(counters._counts)
    opened(breaker)
    assert breaker.is_open
    for _ in range(5):
        assert not is_asked(breaker)
    assert counters._counts["breaker_opened"] == before["breaker_opened"] + 1
    assert counters._counts["nonstop_trips"] == before["nonstop_trips"] + 5


@pytest.mark.usefixtures("figures")
def test_figures_have_when_the_node_was_away_last_and_for_how_long(
    breaker: Breaker, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This process's clock is an hour ahead of the store's.
    monkeypatch.setattr(counters, "clock_offset_ms", 3_600_000)

    def told() -> tuple[int, int]:
        """Return both, and forget them."""
        found = dict(zip(NAMES, counters.take(now=True), strict=True))
        return found["store_longest_away_ms"], found["store_last_away_ms"]

    counters.take(now=True)
    began_ms = time.time() * 1000 - 3_600_001
    opened(breaker)
    longest_ms, last_ms = told()
    assert longest_ms == 0
    assert began_ms <= last_ms <= began_ms + 60_000
    clock.now_s += FIRST_PROBE_S / 2
    assert not is_asked(breaker)
    longest_ms, again_ms = told()
    assert longest_ms == FIRST_PROBE_S * 500
    assert last_ms <= again_ms <= began_ms + 60_000
    clock.now_s += FIRST_PROBE_S
    assert is_asked(breaker)
    assert told()[0] == FIRST_PROBE_S * 1500
    clock.now_s += 5.0
    with breaker.trip():
        pass
    longest_ms, at_the_end_ms = told()
    assert longest_ms == FIRST_PROBE_S * 1500 + 5000
    assert again_ms <= at_the_end_ms <= began_ms + 60_000


@pytest.mark.parametrize("is_away", [False, None])
def test_refusals_and_what_was_not_asked_open_nothing(
    breaker: Breaker, is_away: bool | None
) -> None:
    error = SessionStoreUnavailable("full")
    error.is_away = is_away
    for _ in range(FAILURES * 3):
        assert is_asked(breaker, error)
    assert not breaker.is_open


def test_refusal_is_an_answer_to_the_probe(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    clock.now_s += FIRST_PROBE_S
    error = SessionStoreUnavailable("full")
    error.is_away = False
    assert is_asked(breaker, error)
    assert not breaker.is_open


def test_one_probe_at_a_time_at_growing_intervals(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    intervals = [FIRST_PROBE_S]
    while len(intervals) < 6:
        intervals.append(min(intervals[-1] * 2, LONGEST_PROBE_S))
    for interval_s in intervals:
        clock.now_s += interval_s - 0.001
        assert not is_asked(breaker)
        clock.now_s += 0.002
        with suppress(SessionStoreUnavailable), breaker.trip():
            assert not is_asked(breaker)
            raise away()
    clock.now_s += LONGEST_PROBE_S
    with breaker.trip():
        assert breaker.is_open
    assert not breaker.is_open
    # All over again from the beginning.
    opened(breaker)
    clock.now_s += FIRST_PROBE_S
    assert is_asked(breaker)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), asyncio.CancelledError(), ValueError()])
def test_probe_that_is_broken_off_makes_room_for_the_next(
    breaker: Breaker, clock: Clock, error: BaseException
) -> None:
    opened(breaker)
    clock.now_s += FIRST_PROBE_S
    assert is_asked(breaker, error)
    assert breaker.is_open
    assert is_asked(breaker)
    assert not is_asked(breaker)


@given(st.floats(0, 1, exclude_max=True))
def test_jitter_is_within_half_of_the_interval(chance: float) -> None:
    clock = Clock()
    breaker = opened(Breaker("store:1", clock, lambda: chance))
    clock.now_s += FIRST_PROBE_S / 2 - 0.001
    assert not is_asked(breaker)
    clock.now_s += FIRST_PROBE_S / 2 + 0.002
    assert is_asked(breaker)


def test_one_line_for_each_change_of_state(
    breaker: Breaker, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    opened(breaker)
    for _ in range(20):
        clock.now_s += 0.1
        fail(breaker)
    clock.now_s += LONGEST_PROBE_S
    with breaker.trip():
        pass
    with breaker.trip():
        pass
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "ERROR",
            "the session store at store:1 is away, and is asked by one request at a time until "
            "it answers: does not answer",
        ),
        ("WARNING", "the session store at store:1 is back after 2.8 s"),
    ]


def test_errors_know_what_the_log_has(breaker: Breaker) -> None:
    errors = [fail(breaker) for _ in range(FAILURES + 1)]
    told = [error.is_told for error in errors if isinstance(error, SessionStoreUnavailable)]
    assert told == [False] * (FAILURES - 1) + [True, True]


@pytest.mark.parametrize(
    ("error", "is_away"),
    [
        (redis.ConnectionError("refused"), True),
        (redis.TimeoutError("Timeout reading"), True),
        (TimeoutError(), True),
        (ConnectionResetError(), True),
        (redis.BusyLoadingError("LOADING it is"), True),
        (redis.exceptions.MasterDownError("MASTERDOWN Link with MASTER is down"), True),
        (redis.exceptions.ClusterDownError("CLUSTERDOWN Hash slot not served"), True),
        (redis.ResponseError("BUSY Redis is busy running a script"), True),
        (redis.ResponseError("OOM command not allowed"), False),
        (redis.ReadOnlyError("READONLY You can't write against a read only replica."), False),
        (redis.exceptions.NoPermissionError("NOPERM no"), False),
        (redis.AuthenticationError("WRONGPASS invalid username-password pair"), False),
        (redis.AuthenticationError("NOAUTH Authentication required."), False),
        (redis.ResponseError("MISCONF Errors writing to the AOF file"), False),
        (redis.ResponseError("NOREPLICAS Not enough good replicas to write."), False),
        (redis.ResponseError("ERR unknown command"), False),
        (redis.MaxConnectionsError("Too many connections"), None),
        (redis.ConnectionError("No connection available."), None),
    ],
)
def test_what_counts_as_away(error: Exception, is_away: bool | None) -> None:
    assert _unavailable(error).is_away is is_away


def ask() -> None:
    SessionStore().exists(KEY)


async def aask() -> None:
    await SessionStore().aexists(KEY)


def lose(proxy: CountingProxy) -> None:
    """Make the store refuse until the breaker has opened."""
    proxy.refuse()
    for _ in range(FAILURES):
        with pytest.raises(SessionStoreUnavailable):
            ask()


@pytest.fixture
def slow_probes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let no probe through until the function that this gives is called."""
    monkeypatch.setattr(module, "FIRST_PROBE_S", 3600.0)

    def hurry() -> None:
        for breaker in module.breakers._nodes.values():
            breaker._probe_at_s = 0.0

    return hurry


def test_open_breaker_opens_no_connection(
    proxy: CountingProxy, slow_probes: Callable[[], None]
) -> None:
    ask()
    lose(proxy)
    proxy.accept()
    proxy.reset()
    for _ in range(20):
        with pytest.raises(SessionStoreUnavailable, match="was not asked"):
            ask()
        with pytest.raises(SessionStoreUnavailable, match="was not asked"):
            asyncio.run(aask())
    assert (proxy.connections, proxy.round_trips) == (0, 0)
    slow_probes()
    ask()
    assert proxy.connections == 1
    asyncio.run(aask())


def test_other_settings_are_another_store(
    proxy: CountingProxy, slow_probes: Callable[[], None], settings: Any
) -> None:
    lose(proxy)
    proxy.accept()
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 3
    ask()


def test_store_that_is_back_is_found_soon(proxy: CountingProxy) -> None:
    lose(proxy)
    with pytest.raises(SessionStoreUnavailable, match="was not asked"):
        ask()
    proxy.accept()

    def is_back() -> bool:
        with suppress(SessionStoreUnavailable):
            ask()
            return True
        return False

    wait_for(is_back, "the store is asked again", timeout_s=30)
    for _ in range(10):
        ask()


def test_threads_and_tasks_share_what_was_seen(
    proxy: CountingProxy, slow_probes: Callable[[], None]
) -> None:
    """An asynchronous view under WSGI has an event loop of its own, and would find out anew."""
    proxy.refuse()
    for _ in range(FAILURES):
        with pytest.raises(SessionStoreUnavailable):
            asyncio.run(aask())
    errors: list[str] = []

    def try_() -> None:
        try:
            ask()
        except SessionStoreUnavailable as error:
            errors.append(str(error))

    thread = threading.Thread(target=try_)
    thread.start()
    thread.join(30)
    assert len(errors) == 1
    assert "was not asked" in errors[0]


def test_one_probe_while_the_store_is_silent(
    proxy: CountingProxy,
    slow_probes: Callable[[], None],
    settings: Any,
) -> None:
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 30
    ask()
    lose(proxy)
    proxy.stall()
    proxy.accept()
    proxy.reset()
    slow_probes()
    probe = threading.Thread(target=ask)
    probe.start()
    wait_for(lambda: proxy.connections, "the probe is on its way", timeout_s=30)
    for _ in range(10):
        with pytest.raises(SessionStoreUnavailable, match="was not asked"):
            ask()
    assert proxy.connections == 1
    proxy.resume()
    probe.join(30)
    ask()


def test_waits_for_locks_open_nothing(store: redis.Redis, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 0.05
    load_scripts(store)
    session = SessionStore()
    session.create()
    with session.lock():
        key = session.session_key

        def wait() -> None:
            with suppress(Exception), SessionStore(key).lock():
                pass

        for _ in range(FAILURES + 1):
            thread = threading.Thread(target=wait)
            thread.start()
            thread.join(30)
        assert not connections.pool().breaker.is_open  # type: ignore[attr-defined]
    assert SessionStore(key).exists(key)


def test_full_store_is_no_store_that_is_away(store: redis.Redis) -> None:
    store.config_set("maxmemory", "1")
    try:
        for _ in range(FAILURES * 2):
            with pytest.raises(SessionStoreUnavailable, match="maxmemory"):
                SessionStore().create()
        ask()
    finally:
        store.config_set("maxmemory", "0")


def test_pool_without_a_connection_to_spare_is_no_store_that_is_away(
    store: redis.Redis, settings: Any
) -> None:
    use_store(
        settings,
        settings.CACHES["sessions"]["LOCATION"],
        CONNECTION_POOL_KWARGS={"max_connections": 1},
    )
    lent = connections.pool().get_connection()
    for _ in range(FAILURES * 2):
        with pytest.raises(SessionStoreUnavailable, match="Too many connections"):
            ask()
    connections.pool().release(lent)
    ask()


def test_fork_begins_with_closed_breakers() -> None:
    # In a process of its own: this one has threads, and a fork of it would have their locks.
    code = """
import os
from django_clustered_sessions.store.breaker import FAILURES, breakers
from django_clustered_sessions.exceptions import SessionStoreUnavailable

breaker = breakers.of("store:1")
for _ in range(FAILURES):
    try:
        with breaker.trip():
            error = SessionStoreUnavailable()
            error.is_away = True
            raise error
    except SessionStoreUnavailable:
        pass
assert breaker.is_open
child = os.fork()
if not child:
    os._exit(breaker.is_open)
_, status = os.waitpid(child, 0)
assert status == 0
assert breaker.is_open
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
