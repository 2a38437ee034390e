"""Broken off at any point, nothing is left behind: swept over every line and every await.

Synchronously a signal's exception may come before any line, asynchronously a cancellation at any
await. After each: every connection of the pools is right, the lock is free, nobody stands in its
queue, and the next operation works.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import linecache
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from pathlib import Path
from random import Random
from types import CodeType, FrameType, coroutine
from typing import Any

import django
import pytest
import redis
from django.http import HttpRequest, HttpResponse
from django.test import AsyncRequestFactory, RequestFactory
from hiredis import pack_command

import django_clustered_sessions
from django_clustered_sessions import backend
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionLockTimeout
from django_clustered_sessions.middleware import ClusteredSessionMiddleware
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.session import leases
from django_clustered_sessions.session.near_cache import near_cache
from django_clustered_sessions.store import connections
from django_clustered_sessions.store.cluster import Nodes
from django_clustered_sessions.store.exchange import aconnect, aexchange, connect, exchange
from tests.children import child, finish
from tests.clusters import ClusterServers
from tests.conftest import DATABASE, use_store
from tests.gateways import place
from tests.locking import free, new_session, owner, queue, seize
from tests.servers import deadline_s, wait_for

pytestmark = pytest.mark.timeout(600)

PACKAGE = str(Path(django_clustered_sessions.__file__).parent)
#: Where lines are that a signal may come before: the package's, and those that greet.
FILES = (PACKAGE, redis.connection.__file__)


class Stop(BaseException):
    """Exception of a signal, as KeyboardInterrupt is one."""


class SoftLimit(Exception):  # noqa: N818
    """Exception of a signal that a view may catch, as Celery's soft time limit is one."""


class Lines:
    """Counts the lines that run inside, and raises before one of them. A context manager."""

    def __init__(
        self,
        at: int | None = None,
        error: type[BaseException] = Stop,
        files: tuple[str, ...] = FILES,
    ) -> None:
        self.count = 0
        self._at, self._error, self._files = at, error, files
        self._known: dict[CodeType, bool] = {}
        self._lines: dict[int, int] = {}

    def __enter__(self) -> Lines:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *args: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if code not in self._known:
            self._known[code] = code.co_filename.startswith(self._files)
        self._lines.pop(id(frame), None)
        return self._line if self._known[code] else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line" and not self._ends_with(frame):
            self.count += 1
            if self._at is not None and self.count >= self._at and not _is_swallowed(frame):
                sys.settrace(self._before)
                raise self._error(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return self._line

    def _ends_with(self, frame: FrameType) -> bool:
        """Return whether this is the line of a ``with`` whose body has just ended.

        It is traced once more then; but Python looks for signals at the end of calls, and between
        the last one of the body and that of ``__exit__`` there is none.
        """
        code, line = frame.f_code, frame.f_lineno
        before, self._lines[id(frame)] = self._lines.get(id(frame), 0), line
        return before > line and linecache.getline(code.co_filename, line).strip().startswith(
            "with"
        )


def _is_swallowed(frame: FrameType | None) -> bool:
    """Return whether a finalizer runs, whenever that was: Python lets no exception out of it."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


class Awaits:
    """Runs a coroutine, counts where it waits, and cancels its task at one of them.

    ``again``: at each later one as well, as some frameworks do.
    """

    def __init__(self, at: int | None = None, *, again: bool = False) -> None:
        self.count = 0
        self._at, self._again = at, again

    async def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return await self._step(work)

    @coroutine
    def _step(self, work: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        task = asyncio.current_task()
        assert task is not None
        send: Callable[[], Any] = lambda: work.send(None)  # noqa: E731
        while True:
            try:
                waits_for = send()
            except StopIteration as stop:
                return stop.value
            self.count += 1
            if self._at is not None and (
                self.count == self._at or (self._again and self.count > self._at)
            ):
                task.cancel()
            try:
                yield waits_for
            except BaseException as error:
                caught = error
                send = lambda: work.throw(caught)  # noqa: B023, E731
            else:
                send = lambda: work.send(None)  # noqa: E731


# What is broken off.


def lock_and_change(key: str) -> None:
    with SessionStore(key).lock() as session:
        session["n"] += 1


async def alock_and_change(key: str) -> None:
    async with SessionStore(key).alock() as session:
        await session.aset("n", await session.aget("n") + 1)


def lock_and_fail(key: str) -> None:
    with contextlib.suppress(LookupError), SessionStore(key).lock() as session:
        session["n"] += 1
        raise LookupError


async def alock_and_fail(key: str) -> None:
    with contextlib.suppress(LookupError):
        async with SessionStore(key).alock() as session:
            await session.aset("n", 7)
            raise LookupError


def save(key: str) -> None:
    session = SessionStore(key)
    session["n"] += 1
    session.save()


async def asave(key: str) -> None:
    session = SessionStore(key)
    await session.aset("n", await session.aget("n") + 1)
    await session.asave()


def in_request(key: str) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        request.session["n"] += 1
        return HttpResponse()

    request = RequestFactory().get("/")
    request.COOKIES["sessionid"] = key
    ClusteredSessionMiddleware(view)(request)


async def ain_request(key: str) -> None:
    async def view(request: HttpRequest) -> HttpResponse:
        await request.session.aset("n", await request.session.aget("n") + 1)
        return HttpResponse()

    request = AsyncRequestFactory().get("/")
    request.COOKIES["sessionid"] = key
    await ClusteredSessionMiddleware(view)(request)


def wait_in_vain(key: str) -> None:
    with contextlib.suppress(SessionLockTimeout), SessionStore(key).lock():
        pass


async def await_in_vain(key: str) -> None:
    with contextlib.suppress(SessionLockTimeout):
        async with SessionStore(key).alock():
            pass


#: While another has the lock.
IN_VAIN = (wait_in_vain, await_in_vain)

SYNC = [lock_and_change, lock_and_fail, save, in_request, wait_in_vain]
ASYNC = [alock_and_change, alock_and_fail, asave, ain_request, await_in_vain]


# What has to be right afterwards.


def pools_of(pool: Any) -> list[Any]:
    return list(pool.pools) if isinstance(pool, Nodes) else [pool]


def idle(pool: Any) -> list[Any]:
    """Return the connections that a pool would lend, most likely."""
    return list(pool.idle)


def check_connections(database: int) -> None:
    """Hold that each connection that is at hand answers what it is asked, in the right database."""
    for pool in pools_of(connections.pool()):
        for connection in idle(pool):
            connect(connection, deadline_s())
            commands = [pack_command(("ECHO", "here")), pack_command(("CLIENT", "INFO"))]
            echo, info = exchange(connection, commands, deadline_s())
            assert echo == b"here"
            assert f" db={database} " in info.decode()


async def acheck_connections(database: int) -> None:
    for pool in pools_of(connections.apool()):
        for connection in idle(pool):
            await aconnect(connection, deadline_s())
            commands = [pack_command(("ECHO", "here")), pack_command(("CLIENT", "INFO"))]
            echo, info = await aexchange(connection, commands, deadline_s())
            assert echo == b"here"
            assert f" db={database} " in info.decode()


def check_lock(store: Any, key: str, *, at_once: bool = True) -> None:
    if not at_once:
        wait_for(lambda: not owner(store, key) and not queue(store, key), "the lock is free")
    assert owner(store, key) == ""
    assert queue(store, key) == []
    assert not leases.waiting_room.waiting(place(key).record)


def forget_connections() -> None:
    """Let what comes next connect."""
    for pool in pools_of(connections.pool()):
        pool.disconnect()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Collect no cycles inside, and all of them at the end.

    Nothing that is lent may depend on when Python collects. The end, because what is left open
    would be told of in a later test.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()


@uncollected()
def sweep_lines(
    store: Any, work: Callable[[str], None], error: type[BaseException], *, database: int, step: int
) -> int:
    """Break off before every line, or each ``step``-th one; return how many there are."""
    key = new_session(n=0)
    work(key)
    forget_connections()
    token = seize(key) if work in IN_VAIN else ""
    with Lines() as lines:
        work(key)
    if token:
        free(key, token)
    before = SessionStore(key).load()["n"]
    for at in range(1, lines.count + 1, step):
        forget_connections()
        where = "nowhere"
        context = contextvars.copy_context()
        token = seize(key) if work in IN_VAIN else ""
        try:
            with Lines(at, error):
                context.run(work, key)
        except (error, Exception) as stop:
            # An exception of a signal may look like one of the code that it meets, as of a
            # serialiser; what counts is what is left.
            where = str(stop)
            del stop
        if token:
            assert [locker.token for locker in queue(store, key)] in ([token], [])
            free(key, token)
        try:
            check_lock(store, key)
            check_connections(database)
            after = SessionStore(key).load()["n"]
            assert after in (before, before + 1)
            with SessionStore(key).lock() as session:
                session["n"] = after + 1
            before = SessionStore(key).load()["n"]
            assert before == after + 1
            check_lock(store, key)
        except BaseException as problem:
            problem.add_note(f"{work.__name__} was broken off by {error.__name__} at {at}, {where}")
            raise
    return lines.count


async def sweep_awaits(
    store: Any, work: Callable[[str], Coroutine[Any, Any, None]], *, again: bool, database: int
) -> int:
    """Cancel at every await; return how many there are."""
    loop = asyncio.get_running_loop()

    async def apart(work: Coroutine[Any, Any, Any]) -> None:
        task = loop.create_task(work, context=contextvars.Context())
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def afresh() -> None:
        for pool in pools_of(connections.apool()):
            await pool.disconnect()

    key = await asyncio.to_thread(new_session, n=0)
    await apart(work(key))
    await afresh()
    awaits = Awaits()
    token = await asyncio.to_thread(seize, key) if work in IN_VAIN else ""
    await apart(awaits.run(work(key)))
    if token:
        await asyncio.to_thread(free, key, token)
    for at in range(1, awaits.count + 1):
        before = (await SessionStore(key).aload())["n"]
        await afresh()
        token = await asyncio.to_thread(seize, key) if work in IN_VAIN else ""
        await apart(Awaits(at, again=again).run(work(key)))
        if token:
            await asyncio.to_thread(wait_for, lambda: len(queue(store, key)) < 2, "it has left")
            await asyncio.to_thread(free, key, token)
        try:
            await asyncio.to_thread(check_lock, store, key, at_once=not again)
            await acheck_connections(database)
            after = (await SessionStore(key).aload())["n"]
            assert after in (before, before + 1, 7)
            async with SessionStore(key).alock() as session:
                await session.aset("n", after + 1)
            assert (await SessionStore(key).aload())["n"] == after + 1
            await asyncio.to_thread(check_lock, store, key)
            others = asyncio.all_tasks() - {asyncio.current_task()}
            assert all("renew" in repr(task).lower() for task in others), others
        except BaseException as problem:
            problem.add_note(f"{work.__name__} was cancelled at await {at}")
            raise
    return awaits.count


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a machine that stands still give up a lock all the same."""
    monkeypatch.setattr(backend, "GIVING_UP_S", 10.0)


@pytest.fixture
def locks(settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    # Long enough for a slice of sleep, and short enough to be waited out at each point.
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 0.02


@pytest.mark.full
@pytest.mark.usefixtures("locks")
# redis-py's, which the collector closes: broken off before anything else knows of the socket.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.parametrize(
    ("work", "error"),
    [*((work, Stop) for work in SYNC), (lock_and_change, SoftLimit), (in_request, SoftLimit)],
    ids=lambda it: it.__name__,
)
def test_signal_before_any_line_leaves_nothing(
    store: redis.Redis, work: Callable[[str], None], error: type[BaseException]
) -> None:
    # Each point of waiting in vain waits, and most of its lines are in turns that are alike.
    step = 3 if work in IN_VAIN else 1
    assert sweep_lines(store, work, error, database=DATABASE, step=step) > 300


@pytest.mark.full
@pytest.mark.usefixtures("locks")
@pytest.mark.parametrize("again", [False, True], ids=["once", "again"])
@pytest.mark.parametrize("work", ASYNC, ids=lambda work: work.__name__)
def test_cancellation_at_any_await_leaves_nothing(
    store: redis.Redis, work: Callable[[str], Coroutine[Any, Any, None]], again: bool
) -> None:
    assert asyncio.run(sweep_awaits(store, work, again=again, database=DATABASE)) > 4


# On a cluster, where an operation is made of trips to nodes.


@pytest.fixture(scope="module")
def servers(server_binary: Path) -> Iterator[ClusterServers]:
    with ClusterServers(binary=server_binary) as started:
        yield started


@pytest.fixture
def cluster(servers: ClusterServers, settings: Any, locks: None) -> Iterator[redis.RedisCluster]:
    servers.flush()
    servers.use(settings)
    # Closed here: it is made of cycles, and might be collected socket first in a later test.
    with redis.RedisCluster(host="127.0.0.1", port=servers.primaries[0].port) as client:
        yield client


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
# What an exception that may be caught does at each line is seen above; here at some.
@pytest.mark.parametrize(("error", "step"), [(Stop, 1), (SoftLimit, 3)])
def test_signal_on_a_cluster_leaves_nothing(
    cluster: redis.RedisCluster, error: type[BaseException], step: int
) -> None:
    assert sweep_lines(cluster, lock_and_change, error, database=0, step=step) > 300


@pytest.mark.full
@pytest.mark.usefixtures("locks")
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.parametrize("work", [lock_and_change, save], ids=lambda work: work.__name__)
def test_signal_costs_a_pool_no_connection(
    store: redis.Redis, settings: Any, work: Callable[[str], None]
) -> None:
    few = {"max_connections": 2}
    waits = "redis.BlockingConnectionPool"
    location = settings.CACHES["sessions"]["LOCATION"]
    use_store(settings, location, CONNECTION_POOL_CLASS=waits, CONNECTION_POOL_KWARGS=few)
    assert sweep_lines(store, work, SoftLimit, database=DATABASE, step=1) > 300


@pytest.mark.full
@pytest.mark.parametrize("again", [False, True], ids=["once", "again"])
def test_cancellation_on_a_cluster_leaves_nothing(cluster: redis.RedisCluster, again: bool) -> None:
    asyncio.run(sweep_awaits(cluster, alock_and_change, again=again, database=0))


# Some points of it with each change.


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.usefixtures("locks")
def test_signal_before_some_lines_leaves_nothing(store: redis.Redis) -> None:
    sweep_lines(store, lock_and_change, Stop, database=DATABASE, step=23)


@pytest.mark.usefixtures("locks")
def test_cancellation_at_each_await_leaves_nothing(store: redis.Redis) -> None:
    asyncio.run(sweep_awaits(store, ain_request, again=False, database=DATABASE))


# Real signals, in a process of its own: they end it where C code does not bear them.


def under_signals(url: str, times: int) -> None:
    """Be interrupted so many times; print how often, and what the session has in the end."""
    use_store(
        django.conf.settings,
        url,
        CONNECTION_POOL_CLASS="redis.BlockingConnectionPool",
        CONNECTION_POOL_KWARGS={"max_connections": 3},
    )
    key, dice, broken = new_session(n=0), Random(times), 0

    def stop(*args: object) -> None:
        raise SoftLimit

    signal.signal(signal.SIGALRM, stop)
    for number in range(times):
        with contextlib.suppress(SoftLimit):
            try:
                signal.setitimer(signal.ITIMER_REAL, dice.uniform(5e-5, 2e-3))
                if number % 3 == 0:
                    forget_connections()
                (lock_and_change, save)[number % 2](key)
            except SoftLimit:
                broken += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    with SessionStore(key).lock() as session:
        print(broken, session["n"])


@pytest.mark.full
def test_real_signals_end_nothing_but_their_work(store: redis.Redis, settings: Any) -> None:
    location = settings.CACHES["sessions"]["LOCATION"]
    with child("tests.topology.test_broken_off", location, "2000") as interrupted:
        (printed,) = finish(interrupted)
    broken, count = map(int, printed.split())
    assert broken > 200
    assert count > 0


if __name__ == "__main__":
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
    django.setup()
    under_signals(sys.argv[1], int(sys.argv[2]))


# Tracked reads: a channel that was broken off tells of no change any more.


def read_all(keys: list[str]) -> list[Any]:
    return [SessionStore(key).get("n") for key in keys]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.parametrize("error", [Stop, SoftLimit])
@pytest.mark.parametrize("is_open", [False, True])
def test_tracked_read_broken_off_serves_nothing_old(
    store: Any, settings: Any, error: type[BaseException], is_open: bool
) -> None:
    settings.CLUSTERED_SESSIONS_NEAR_READS = "tracked"
    settings.CLUSTERED_SESSIONS_NEAR_MAX_AGE = 60.0
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = None
    keys = [new_session(n=0) for _ in range(2)]
    bodies = [store.dump(place(key).record) for key in keys]
    read_all(keys)

    def begin() -> None:
        """Have news under way, and the channel closed or open."""
        if not is_open:
            for client in store.client_list():
                if "t" in client["flags"]:
                    store.client_kill_filter(_id=client["id"])
            near_cache.clear()
        else:
            read_all(keys)
            for key, body in zip(keys, bodies, strict=True):
                store.restore(place(key).record, 0, body, replace=True)

    begin()
    with Lines() as lines:
        read_all(keys)
    assert lines.count > 100
    for at in range(1, lines.count + 1):
        begin()
        with contextlib.suppress(error, Exception), Lines(at, error):
            read_all(keys)
        gc.collect(0)
        read_all(keys)
        for key in keys:
            store.delete(place(key).record)
        try:
            wait_for(lambda: read_all(keys) == [None, None], "the end is seen", timeout_s=5.0)
        except AssertionError as problem:
            problem.add_note(f"it was broken off at {at} of {lines.count}")
            raise
        for key, body in zip(keys, bodies, strict=True):
            store.restore(place(key).record, 0, body, replace=True)
    before = counters.counts["near_reads"]
    wait_for(
        lambda: read_all(keys) == [0, 0] and counters.counts["near_reads"] > before, "it is tracked"
    )


async def test_tracked_read_cancelled_serves_nothing_old(store: Any, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_NEAR_READS = "tracked"
    settings.CLUSTERED_SESSIONS_NEAR_MAX_AGE = 60.0
    keys = [await asyncio.to_thread(new_session, n=0) for _ in range(4)]

    async def reads() -> list[Any]:
        return [await SessionStore(key).aget("n") for key in keys]

    await reads()
    for _ in range(200):
        near_cache.clear()
        task = asyncio.create_task(reads())
        for _ in range(random.randrange(12)):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert await reads() == [0, 0, 0, 0]
    assert len([one for one in store.client_list() if "t" in one["flags"]]) == 1
    before = counters.counts["near_reads"]
    assert await reads() == [0, 0, 0, 0]
    assert counters.counts["near_reads"] == before + 4
    for key in keys:
        store.delete(place(key).record)
    deadline = deadline_s()
    while await reads() != [None] * 4:
        assert time.monotonic() < deadline
