"""Work in the background: it goes on after a failure, starts when it can, and asks no setting."""

from __future__ import annotations

import asyncio
import logging
import threading
from contextvars import ContextVar
from typing import Any

import pytest
import redis
from django.test import override_settings

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.protocol.effects import Flow
from django_clustered_sessions.session import background, leases
from django_clustered_sessions.session.background import Background, Worlds
from tests.children import forked
from tests.locking import lease_end_ms, new_session, owner
from tests.servers import wait_for

#: An entry of CACHES that a process cannot build a connection from.
NOT_AN_ENTRY: Any = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}


#: A variable of a request's context.
of_request: ContextVar[bool] = ContextVar("of_request", default=False)


class Work(Background):
    """Work that counts its rounds, and fails as often as it is told to."""

    name = "counted-work"
    interval_s = 0.01

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        super().__init__(loop)
        self.rounds, self.failures, self.is_left = 0, 0, False
        self.to_do = 0

    @property
    def has_work(self) -> bool:
        return self.to_do > 0

    def do(self, rounds: int) -> None:
        with self.lock:
            self.to_do += rounds
        self.start()

    def round(self) -> Flow[None]:
        self.rounds += 1
        if self.failures:
            self.failures -= 1
            raise ValueError("told to fail")
        self.to_do -= 1
        yield from ()

    def stopped(self) -> None:
        self.is_left = True


def failures(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [one for one in caplog.records if one.levelno == logging.ERROR]


def workers() -> int:
    return sum(one.name == "counted-work" for one in threading.enumerate())


def test_thread_goes_on_after_failures_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    work = Work()
    work.failures = 3
    work.do(2)
    wait_for(lambda: not work.has_work, "all is done")
    (told,) = failures(caplog)
    assert told.exc_info is not None
    assert "counted-work" in told.getMessage()
    work.failures = 1
    work.do(1)
    wait_for(lambda: not work.has_work, "all is done again")
    assert len(failures(caplog)) == 2


async def test_task_goes_on_after_failures_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    work = Work(asyncio.get_running_loop())
    work.failures = 3
    work.do(2)
    await asyncio.to_thread(wait_for, lambda: not work.has_work, "all is done")
    assert len(failures(caplog)) == 1


def test_thread_ends_when_idle_and_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "IDLE_S", 0.02)
    work = Work()
    for number in (1, 2):
        work.do(1)
        wait_for(lambda: not work.is_running and not workers(), "it has ended")
        assert work.rounds == number


async def test_task_ends_when_idle_and_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "IDLE_S", 0.02)
    work = Work(asyncio.get_running_loop())
    for number in (1, 2):
        work.do(1)
        await asyncio.to_thread(wait_for, lambda: not work.is_running, "it has ended")
        assert work.rounds == number
    assert not work.is_left


def test_work_of_a_loop_that_ends_is_left_to_others() -> None:
    worlds = Worlds(Work)

    async def main() -> Work:
        work = worlds.here()
        assert worlds.here() is work
        work.do(1_000_000)
        return work

    work = asyncio.run(main())
    assert work.is_left
    assert not work.is_running
    assert worlds.here() is worlds.sync


def test_work_of_a_loop_that_was_closed_without_a_word_is_left_to_others() -> None:
    worlds = Worlds(Work)
    loop = asyncio.new_event_loop()

    async def look() -> Work:
        return worlds.here()

    work = loop.run_until_complete(look())
    loop.close()
    asyncio.run(look())
    assert work.is_left


async def test_task_is_made_by_a_factory_of_the_site() -> None:
    """It may be one from before tasks had a context and a name."""
    loop = asyncio.get_running_loop()
    loop.set_task_factory(lambda loop, work: asyncio.Task(work, loop=loop))
    work = Work(loop)
    work.do(1)
    await asyncio.to_thread(wait_for, lambda: not work.has_work, "all is done")


async def test_task_keeps_nothing_of_the_request_that_started_it() -> None:
    """Its context would have the request's locks, user and language for as long as it runs."""
    found: list[bool] = []

    class Looking(Work):
        """Work that looks for what the request has left."""

        def round(self) -> Flow[None]:
            found.append(of_request.get())
            return super().round()

    work = Looking(asyncio.get_running_loop())
    of_request.set(True)
    work.do(1)
    await asyncio.to_thread(wait_for, lambda: not work.has_work, "all is done")
    assert found == [False]


def test_forked_child_starts_without_work() -> None:
    worlds = Worlds(Work)
    worlds.sync.do(1_000_000)
    assert forked(lambda: b"%d" % worlds.sync.to_do) == b"0"
    worlds.sync.to_do = 0


def test_start_that_was_broken_off_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal's exception may come at any line, that of the start included."""
    work = Work()

    def interrupted(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "start", interrupted)
        work.do(1)
    work.do(1)
    wait_for(lambda: not work.has_work, "all is done")


def test_lock_is_taken_where_no_thread_is_to_be_had(
    store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    key = new_session()
    monkeypatch.setattr(leases, "renewers", Worlds(leases.Renewer))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with SessionStore(key).lock() as session:
            session["n"] = 1
    assert SessionStore(key)["n"] == 1
    with SessionStore(key).lock():
        assert leases.renewers.here().is_running


@pytest.fixture
def lease_s(settings: Any) -> float:
    """Set a lease that a busy machine can keep up, and that a test can wait for."""
    settings.CLUSTERED_SESSIONS_LOCK_LEASE = 2.0
    return 2.0


def test_leases_are_renewed_whatever_the_setting_has_become(
    store: redis.Redis, lease_s: float
) -> None:
    key = new_session()
    with SessionStore(key).lock():
        first_end_ms = lease_end_ms(store, key)
        with override_settings(CLUSTERED_SESSIONS_LOCK_LEASE=None):
            wait_for(lambda: lease_end_ms(store, key) > first_end_ms + 1000, "two renewals")


async def test_leases_of_tasks_are_renewed_whatever_the_setting_has_become(
    store: redis.Redis, lease_s: float
) -> None:
    key = await asyncio.to_thread(new_session)
    async with SessionStore(key).alock():
        first_end_ms = lease_end_ms(store, key)
        with override_settings(CLUSTERED_SESSIONS_LOCK_LEASE=None):
            await asyncio.to_thread(
                wait_for, lambda: lease_end_ms(store, key) > first_end_ms + 1000, "two renewals"
            )


def test_each_lease_is_renewed_at_its_own_pace(store: redis.Redis, settings: Any) -> None:
    """A lease of an hour is left alone while one of two seconds is renewed."""
    long, short = new_session(), new_session()
    settings.CLUSTERED_SESSIONS_LOCK_LEASE = 3600.0
    # No renewal reaches the end of this, which would leave the lease's end as it is.
    settings.CLUSTERED_SESSIONS_LOCK_MAX_HOLD = 7200.0
    with SessionStore(long).lock():
        long_end_ms = lease_end_ms(store, long)
        settings.CLUSTERED_SESSIONS_LOCK_LEASE = 2.0
        with SessionStore(short).lock():
            short_end_ms = lease_end_ms(store, short)
            wait_for(lambda: lease_end_ms(store, short) > short_end_ms + 1000, "two renewals")
            assert lease_end_ms(store, long) == long_end_ms


def test_leases_are_renewed_after_an_exception(
    store: redis.Redis, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    key = new_session()
    settings.CLUSTERED_SESSIONS_LOCK_LEASE = 4.0
    with SessionStore(key).lock():
        mine, first_end_ms = owner(store, key), lease_end_ms(store, key)
        # Another test's settings, say: this process cannot build a connection for a while.
        with override_settings(CACHES=NOT_AN_ENTRY):
            wait_for(lambda: failures(caplog), "a round has failed")
        wait_for(lambda: lease_end_ms(store, key) > first_end_ms + 1000, "it is renewed")
        assert owner(store, key) == mine
    assert len(failures(caplog)) == 1
