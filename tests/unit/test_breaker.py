"""The breaker opens on failures in a row, lets one probe through at a time, and closes again."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.monitoring.counters import NAMES, counters
from django_clustered_sessions.store.circuit_breaker import (
    FAILURES,
    FIRST_PROBE_S,
    LONGEST_PROBE_S,
    CircuitBreaker,
)
from django_clustered_sessions.store.errors import AllLent, SentinelsSlow, refusal, unavailable


class Clock:
    """A clock that goes when it is told to."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    # No jitter: the whole interval each time.
    return CircuitBreaker("store:1", clock, lambda: 1.0)


def away() -> SessionStoreUnavailable:
    error = SessionStoreUnavailable("does not answer")
    error.is_away = True
    return error


def fail(breaker: CircuitBreaker, error: BaseException | None = None) -> BaseException:
    """Let a trip fail, and return the error that comes of it."""
    with pytest.raises(BaseException) as caught, breaker.trip():  # noqa: PT012
        raise error or away()
    return caught.value


def is_asked(breaker: CircuitBreaker, error: BaseException | None = None) -> bool:
    """Return whether a trip, which then fails, gets through to the store."""
    error = error or away()
    return fail(breaker, error) is error


def opened(breaker: CircuitBreaker) -> CircuitBreaker:
    for _ in range(FAILURES):
        assert is_asked(breaker)
    return breaker


def test_breaker_opens_after_failures_in_a_row(breaker: CircuitBreaker) -> None:
    for _ in range(3):
        for _ in range(FAILURES - 1):
            assert is_asked(breaker)
        with breaker.trip():
            pass
    assert not breaker.is_open
    before = dict(counters.counts)
    opened(breaker)
    assert breaker.is_open
    for _ in range(5):
        assert not is_asked(breaker)
    assert counters.counts["breaker_opened"] == before["breaker_opened"] + 1
    assert counters.counts["nonstop_trips"] == before["nonstop_trips"] + 5


@pytest.mark.usefixtures("figures")
def test_figures_tell_the_last_and_the_longest_absence(
    breaker: CircuitBreaker, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This process's clock is an hour ahead of the store's.
    monkeypatch.setattr(counters, "clock_offset_ms", 3_600_000)

    def told() -> tuple[int, int]:
        """Return both, and forget them."""
        found = dict(zip(NAMES, counters.drain(now=True), strict=True))
        return found["store_longest_away_ms"], found["store_last_away_ms"]

    counters.drain(now=True)
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
def test_failures_that_are_no_absence_open_nothing(
    breaker: CircuitBreaker, is_away: bool | None
) -> None:
    error = SessionStoreUnavailable("full")
    error.is_away = is_away
    for _ in range(FAILURES * 3):
        assert is_asked(breaker, error)
    assert not breaker.is_open


def test_refusal_is_an_answer_to_the_probe(breaker: CircuitBreaker, clock: Clock) -> None:
    opened(breaker)
    clock.now_s += FIRST_PROBE_S
    error = SessionStoreUnavailable("full")
    error.is_away = False
    assert is_asked(breaker, error)
    assert not breaker.is_open


def test_probes_go_one_at_a_time_at_growing_intervals(
    breaker: CircuitBreaker, clock: Clock
) -> None:
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
def test_broken_off_probe_makes_room_for_the_next(
    breaker: CircuitBreaker, clock: Clock, error: BaseException
) -> None:
    opened(breaker)
    clock.now_s += FIRST_PROBE_S
    assert is_asked(breaker, error)
    assert breaker.is_open
    assert is_asked(breaker)
    assert not is_asked(breaker)


@given(st.floats(0, 1, exclude_max=True))
def test_jitter_takes_at_most_half_of_the_interval(chance: float) -> None:
    clock = Clock()
    breaker = opened(CircuitBreaker("store:1", clock, lambda: chance))
    clock.now_s += FIRST_PROBE_S / 2 - 0.001
    assert not is_asked(breaker)
    clock.now_s += FIRST_PROBE_S / 2 + 0.002
    assert is_asked(breaker)


def test_log_has_one_line_for_each_change_of_state(
    breaker: CircuitBreaker, clock: Clock, caplog: pytest.LogCaptureFixture
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
        ("WARNING", "the session store at store:1 is back after 2.5 s"),
    ]


def test_errors_know_whether_the_log_has_told_them(breaker: CircuitBreaker) -> None:
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
        (AllLent(3), None),
        (SentinelsSlow("no answer"), None),
    ],
)
def test_unanswered_trips_count_as_away_and_refusals_do_not(
    error: Exception, is_away: bool | None
) -> None:
    assert unavailable(error).is_away is is_away


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (redis.BusyLoadingError("Valkey is loading the dataset in memory"), "LOADING"),
        (redis.AuthenticationError("invalid username-password pair"), "WRONGPASS"),
        (redis.AuthenticationError("Authentication required."), "NOAUTH"),
        (redis.exceptions.NoPermissionError("User site has no permissions"), "NOPERM"),
        (refusal(lambda text: redis.ResponseError(text[4:]), "OOM command not allowed"), "OOM"),
    ],
)
def test_advice_is_found_where_redis_py_cuts_off_the_word(error: Exception, word: str) -> None:
    """As release 6 does."""
    assert f"({word}: {error})" in str(unavailable(error))


def test_forked_process_begins_with_closed_breakers() -> None:
    # In a process of its own: this one has threads, and a fork of it would have their locks.
    code = """
import os
from django_clustered_sessions.store.circuit_breaker import FAILURES, breakers
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
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
