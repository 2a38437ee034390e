"""Requests of one event loop that share a connection: nobody gets the reply to another one."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import re
import time
from asyncio import selector_events
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import ANY
from weakref import ref

import pytest
import redis
from django.test import override_settings
from hiredis import pack_command

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.protocol.effects import plain
from django_clustered_sessions.store import connections, exchange, sharing
from tests.conftest import DATABASE, use_store
from tests.gateways import load_scripts, place
from tests.locking import new_session
from tests.servers import CountingProxy, StoreServer, alent, wait_for
from tests.topology.test_broken_off import Awaits, Lines, SoftLimit, uncollected

#: Where a signal may come between the bytes and their question: the package's code, and asyncio's.
FILES = (sharing.__file__, selector_events.__file__)

#: In a session, so that its reply comes in pieces.
PIECES = 300_000


@pytest.fixture
def visitors(store: redis.Redis) -> list[str]:
    """Return the keys of some sessions, each of which names its visitor."""
    load_scripts(store)
    return [new_session(whose=f"visitor {n}", n=0) for n in range(4)]


class Request:
    """Stand-in for the request that a view holds while it waits."""


async def share() -> list[Any]:
    """Let all that comes next share, as long as the connections are kept that this returns."""
    return [await alent(connections.apool()) for _ in range(2)]


def lines() -> list[Any]:
    """Return the connections of this loop that are shared."""
    pool: Any = connections.apool()
    return [line for line in pool.lines if line.is_open]


async def read(key: str) -> str:
    """Return whose session it is."""
    return str(await SessionStore(key).aget("whose"))


async def write(key: str) -> str:
    """Write into a session whose it is."""
    session = SessionStore(key)
    whose = str(await session.aget("whose"))
    await session.aset("written by", whose)
    await session.asave()
    return whose


async def write_much(key: str) -> None:
    """Write so much that it goes alone."""
    session = SessionStore(key)
    await session.aset("large", random.randbytes(20_000).hex())
    await session.asave()


def is_right(found: Any, number: int) -> bool:
    """Return whether a visitor got a session of its own, or was told that there is none now."""
    if isinstance(found, BaseException):
        return isinstance(found, SessionStoreUnavailable | KeyboardInterrupt | SoftLimit)
    return bool(found == f"visitor {number}")


# Where it is a gain.


async def test_many_at_once_use_few_connections(store: redis.Redis, visitors: list[str]) -> None:
    before = len(store.client_list())
    found = await asyncio.gather(*(read(visitors[n % 4]) for n in range(200)))
    assert found == [f"visitor {n % 4}" for n in range(200)]
    await asyncio.gather(*(write(visitors[n % 4]) for n in range(50)))
    assert len(store.client_list()) - before <= 8
    assert len(lines()) >= 2


async def test_connections_that_nobody_needs_are_closed(store: redis.Redis) -> None:
    """As after requests at once that could not share; those that are needed stay."""
    before = len(store.client_list())
    pool: Any = connections.apool()

    async def use(number: int) -> set[Any]:
        used = [await alent(pool) for _ in range(number)]
        for one in used:
            await exchange.aconnect(one, time.monotonic() + 20)
        for one in used:
            pool.take_back(one)
        return {*used}

    await use(20)
    for number in (3, 4, 2):
        assert len(store.client_list()) - before == 20
        await use(number)
    # It is time to look, for the first and the second time.
    pool._look_at_s = 0.0
    needed = await use(4)
    await use(3)
    pool._look_at_s = 0.0
    assert await use(4) == needed
    left = partial(wait_for, lambda: len(store.client_list()) - before == 4, "they are closed")
    await asyncio.to_thread(left)
    assert len(pool.idle) == 4
    assert pool.lent == 0


async def test_few_at_once_have_their_own(visitors: list[str]) -> None:
    assert await asyncio.gather(*map(read, visitors[:2])) == ["visitor 0", "visitor 1"]
    assert lines() == []


def test_pool_that_makes_requests_wait_shares_nothing(
    store: redis.Redis, settings: Any, visitors: list[str]
) -> None:
    location = settings.CACHES["sessions"]["LOCATION"]
    use_store(settings, location, CONNECTION_POOL_CLASS="redis.BlockingConnectionPool")

    async def go() -> None:
        assert len(await asyncio.gather(*(read(visitors[0]) for _ in range(20)))) == 20
        assert lines() == []

    asyncio.run(go())


async def test_read_is_never_behind_a_write(
    store: redis.Redis, visitors: list[str], settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 60.0
    _kept = await share()
    await write(visitors[0])
    store.client_pause(60_000, all=False)
    try:
        writing = asyncio.create_task(write(visitors[1]))
        await asyncio.to_thread(
            wait_for, lambda: store.info("clients")["blocked_clients"], "it is paused"
        )
        assert await asyncio.wait_for(read(visitors[0]), 20) == "visitor 0"
        assert not writing.done()
    finally:
        store.client_unpause()
    assert await writing == "visitor 1"


async def test_large_question_goes_alone(visitors: list[str]) -> None:
    _kept = await share()
    await read(visitors[0])
    (line,) = lines()
    await write_much(visitors[0])
    assert lines() == [line]


async def test_nothing_is_asked_behind_a_large_reply(visitors: list[str], settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_NEAR_CACHE_BYTES = 0
    large = await asyncio.to_thread(new_session, whose="large", it=random.randbytes(800_000).hex())
    _kept = await share()
    await read(visitors[0])
    (line,) = lines()
    loading = asyncio.create_task(read(large))
    while line.has_room(1) and not loading.done():
        await asyncio.sleep(0)
    assert not loading.done()
    assert await read(visitors[1]) == "visitor 1"
    assert len(lines()) == 2
    assert await loading == "large"


@pytest.mark.parametrize("loss", ["none", "scripts", "connections"])
async def test_shared_connections_leave_the_limit_as_it_is(
    store: redis.Redis, settings: Any, loss: str
) -> None:
    """As many requests at once are served as there may be connections."""
    location = settings.CACHES["sessions"]["LOCATION"]
    use_store(settings, location, CONNECTION_POOL_KWARGS={"max_connections": 8})
    keys = [await asyncio.to_thread(new_session, whose=f"visitor {n}") for n in range(8)]
    assert await asyncio.gather(*map(read, keys)) == (whose := [f"visitor {n}" for n in range(8)])
    assert lines()
    for _ in range(3):
        assert await asyncio.gather(*map(write, keys)) == whose
        if loss == "scripts":
            store.script_flush()
        elif loss == "connections":
            for client in store.client_list():
                if client["cmd"] == "ping":
                    store.client_kill_filter(_id=client["id"])
        await asyncio.gather(*map(write_much, keys))


def test_task_factory_may_be_an_old_one(visitors: list[str]) -> None:
    """Before Python 3.11 one took a loop and a coroutine."""

    async def go() -> None:
        loop = asyncio.get_running_loop()
        loop.set_task_factory(lambda loop, work: asyncio.Task(work, loop=loop))  # type: ignore[arg-type,misc]
        keys = [visitors[n % 4] for n in range(20)]
        reading = [asyncio.Task(read(key)) for key in keys]
        assert await asyncio.gather(*reading) == [f"visitor {n % 4}" for n in range(20)]
        assert lines()

    asyncio.run(go())


async def test_pool_that_is_over_makes_no_line(store: redis.Redis, visitors: list[str]) -> None:
    """A trip that is under way in a cluster may go on to its other nodes."""
    _kept = await share()
    left: Any = connections.apool()
    await read(visitors[0])
    left.end()
    trip = (plain("TIME"),)
    await asyncio.gather(*(sharing.aperform(trip, left, 15.0) for _ in range(4)))
    assert not any(line.is_open for line in left.lines)


def test_loop_that_ends_closes_what_was_shared(store: redis.Redis, visitors: list[str]) -> None:
    before = len(store.client_list())

    async def go() -> None:
        await asyncio.gather(*(write(visitors[n % 4]) for n in range(20)))
        assert lines()

    asyncio.run(go())
    wait_for(lambda: len(store.client_list()) <= before, "all are closed")


# Broken off.


def complete(loop: asyncio.AbstractEventLoop, work: Any) -> Any:
    """Run a loop until work is done; one that was broken off may have been told to stop."""
    work = asyncio.ensure_future(work, loop=loop)
    while not work.done():
        with contextlib.suppress(RuntimeError):
            loop.run_until_complete(work)
    return work.result()


def sweep(
    store: redis.Redis,
    keys: list[str],
    error: type[BaseException],
    step: int,
    *,
    until: str | None = None,
) -> tuple[int, list[str]]:
    """Let a signal's exception come before lines while three requests share a connection.

    Return how many lines there are, and what went wrong; ``until`` are words at which it suffices.
    """
    wrong: list[str] = []

    async def all_at_once(work: Callable[[str], Coroutine[Any, Any, str]]) -> list[Any]:
        return await asyncio.gather(*map(work, keys), return_exceptions=True)

    def once(at: int | None) -> int:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *args: None)
        try:
            _kept = loop.run_until_complete(share())
            # All lines are open.
            loop.run_until_complete(all_at_once(write))
            tasks = [loop.create_task(write(key)) for key in keys[:3]]
            together = asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(error), Lines(at, error, FILES) as counted:
                loop.run_until_complete(together)
            # At once, while some may still wait for what was lost.
            others = complete(loop, all_at_once(read))
            found = [complete(loop, together), others]
            found.append(complete(loop, all_at_once(write)))
            for answers in found:
                for number, answer in enumerate(answers):
                    if not is_right(answer, number):
                        wrong.append(f"before line {at} visitor {number} got {answer!r}")
            return counted.count
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()
            gc.collect(0)

    # What a broken-off loop has left open is collected here, and not in a later test: so no record
    # of a log may keep it.
    logging.disable()
    try:
        # Undisturbed, it is to get to each line, however slow the machine is.
        count = once(None)
        with override_settings(CLUSTERED_SESSIONS_STORE_TIMEOUT=0.3):
            for at in range(1, count + 1, step):
                once(at)
                if until is not None and any(until in one for one in wrong):
                    break
        gc.collect()
    finally:
        logging.disable(logging.NOTSET)
    for number, key in enumerate(keys):
        stored = b" ".join(store.hgetall(place(key).record).values())
        if set(re.findall(rb"visitor \d+", stored)) != {b"visitor %d" % number}:
            wrong.append(f"visitor {number} has {stored!r}")
    return count, wrong


@pytest.fixture
def no_near_cache(settings: Any) -> None:
    """Let each request read from the store."""
    settings.CLUSTERED_SESSIONS_NEAR_CACHE_BYTES = 0


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("no_near_cache")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("error", "step"),
    [
        (KeyboardInterrupt, 17),
        pytest.param(KeyboardInterrupt, 1, marks=pytest.mark.full),
        pytest.param(SoftLimit, 1, marks=pytest.mark.full),
    ],
)
def test_signal_before_any_line_mixes_no_replies(
    store: redis.Redis, visitors: list[str], error: type[BaseException], step: int
) -> None:
    visitors[1] = new_session(whose="visitor 1", n=0, it=random.randbytes(PIECES).hex())
    count, wrong = sweep(store, visitors, error, step)
    assert wrong == []
    assert count > 100


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("no_near_cache")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_without_marks_the_sweep_finds_mixed_replies(
    store: redis.Redis, visitors: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would show nothing."""

    class Unmarked(sharing._Question):
        def __init__(self, mark: bytes, *others: Any) -> None:
            super().__init__(ANY, *others)

    monkeypatch.setattr(sharing, "_Question", Unmarked)
    mixed = "got 'visitor"
    _, wrong = sweep(store, visitors, KeyboardInterrupt, 1, until=mixed)
    assert any(mixed in one for one in wrong)


async def test_cancellation_at_any_await_mixes_no_replies(visitors: list[str]) -> None:
    _kept = await share()
    awaits = Awaits()
    await awaits.run(write(visitors[0]))
    assert awaits.count
    for at in range(1, awaits.count + 1):
        cancelled = asyncio.create_task(Awaits(at).run(write(visitors[0])))
        others = await asyncio.gather(*map(write, visitors[1:]))
        assert others == [f"visitor {n}" for n in (1, 2, 3)]
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert await asyncio.gather(*map(read, visitors)) == [f"visitor {n}" for n in range(4)]
    # It went on all the time.
    assert len(lines()) == 2


async def test_what_is_cancelled_before_it_is_sent_is_never_sent(
    store: redis.Redis, proxy: CountingProxy, visitors: list[str]
) -> None:
    """Or a lock could be taken after it was given back."""
    _kept = await share()
    proxy.stall()
    cancelled = [asyncio.create_task(SessionStore(key).asave()) for key in visitors]
    await asyncio.to_thread(wait_for, lambda: proxy.requests, "it is connecting")
    for task in cancelled[:-1]:
        task.cancel()
    await asyncio.gather(*cancelled[:-1], return_exceptions=True)
    before = store.info("commandstats")["cmdstat_evalsha"]["calls"]
    proxy.resume()
    await cancelled[-1]
    assert store.info("commandstats")["cmdstat_evalsha"]["calls"] == before + 1


# Faults between a process and its store.


async def test_late_replies_to_the_cancelled_are_dropped(
    proxy: CountingProxy, visitors: list[str], settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 60.0
    _kept = await share()
    await read(visitors[0])
    (line,) = lines()
    proxy.reset()
    proxy.stall()
    tasks = [asyncio.create_task(read(key)) for key in visitors[1:]]
    await asyncio.to_thread(wait_for, lambda: proxy.requests, "all are asked")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    loading = asyncio.create_task(read(visitors[0]))
    await asyncio.sleep(0)
    proxy.resume()
    assert await loading == "visitor 0"
    assert line.is_open


async def test_silent_line_is_left_and_closed(
    proxy: CountingProxy, visitors: list[str], settings: Any
) -> None:
    # Half of it is waited for the line, and the rest is for a machine that stands still.
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 6.0
    _kept = await share()
    await read(visitors[0])
    (line,) = lines()
    proxy.swallow("replies", of=b"PING")
    # Over a connection of their own, after half of their time.
    found = await asyncio.gather(*map(read, visitors))
    assert found == [f"visitor {n}" for n in range(4)]
    assert not line.is_open


async def test_line_that_is_late_keeps_nothing_of_a_request(
    proxy: CountingProxy, visitors: list[str], settings: Any
) -> None:
    """Its error is over where the trip was repeated, and is not left for the collector."""
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 6.0
    _kept = await share()
    await read(visitors[0])
    proxy.swallow("replies", of=b"PING")

    async def view() -> Any:
        request = Request()
        assert await read(visitors[0]) == "visitor 0"
        return ref(request)

    with uncollected():
        gone = await asyncio.create_task(view())
        # The event loop lets go of the last task.
        await asyncio.sleep(0)
        assert gone() is None


@pytest.mark.parametrize("where", ["request", "reply", "half"])
async def test_line_that_is_cut_costs_nobody_its_session(
    proxy: CountingProxy, visitors: list[str], where: Any
) -> None:
    _kept = await share()
    await asyncio.gather(*map(write, visitors))
    for matching in (b"HGETALL", b"EVALSHA"):
        proxy.cut_next(where, matching=matching)
        found = await asyncio.gather(*map(write, visitors))
        assert found == [f"visitor {n}" for n in range(4)]


async def test_killed_line_costs_nobody_its_session(
    store: redis.Redis, visitors: list[str]
) -> None:
    await asyncio.gather(*(write(visitors[n % 4]) for n in range(40)))
    for _ in range(20):
        tasks = [asyncio.create_task(write(visitors[n % 4])) for n in range(40)]
        for _ in range(random.randrange(10)):
            await asyncio.sleep(0)
        for client in store.client_list():
            if client["cmd"] == "ping":
                store.client_kill_filter(_id=client["id"])
        assert await asyncio.gather(*tasks) == [f"visitor {n % 4}" for n in range(40)]


async def test_stopped_store_mixes_no_replies(
    store_server: StoreServer, visitors: list[str], settings: Any
) -> None:
    await asyncio.gather(*(write(visitors[n % 4]) for n in range(40)))
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 0.4
    tasks = [asyncio.create_task(read(visitors[n % 4])) for n in range(40)]
    await asyncio.sleep(0)
    store_server.pause()
    try:
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(is_right(one, n % 4) for n, one in enumerate(found))
        assert any(isinstance(one, SessionStoreUnavailable) for one in found)
    finally:
        store_server.resume()
    async with asyncio.timeout(20):
        while True:
            found = await asyncio.gather(*map(read, visitors), return_exceptions=True)
            assert all(is_right(one, n) for n, one in enumerate(found))
            if found == [f"visitor {n}" for n in range(4)]:
                break


async def test_nothing_is_sent_behind_what_the_system_does_not_take(
    store_server: StoreServer, store: redis.Redis, visitors: list[str]
) -> None:
    _kept = await share()
    await read(visitors[0])
    (line,) = lines()
    store_server.pause()
    try:
        question, deadline = [pack_command(("ECHO", "x" * 7000))], time.monotonic() + 20
        asked = []
        while line.is_open and len(asked) < 10_000:
            asked.append(asyncio.create_task(line.ask(question, deadline)))
            await asyncio.sleep(0)
    finally:
        store_server.resume()
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert {type(one) for one in found} == {redis.ConnectionError}
    # Each has an error of its own, for its traceback keeps what it has come through.
    assert len({id(one) for one in found}) == len(found)
    # The store has closed it without an error in what it was sent.
    assert await read(visitors[0]) == "visitor 0"


async def test_silent_line_is_left_if_all_are_cancelled(
    proxy: CountingProxy, visitors: list[str], settings: Any
) -> None:
    """Clients have less patience than the store is given, and a line has room for many."""
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 6.0
    settings.CLUSTERED_SESSIONS_NEAR_CACHE_BYTES = 0
    _kept = await share()
    await read(visitors[0])
    (line,) = lines()
    proxy.swallow("replies", of=b"PING")
    found = None
    async with asyncio.timeout(20):
        while found is None:
            with contextlib.suppress(TimeoutError):
                found = await asyncio.wait_for(read(visitors[0]), 0.1)
    assert found == "visitor 0"
    assert not line.is_open


async def test_what_leads_to_an_old_primary_is_left(server_binary: Path, settings: Any) -> None:
    """By an address that leads to the new one: no Sentinel says so, and a read learns nothing."""
    settings.CLUSTERED_SESSIONS_NEAR_CACHE_BYTES = 0
    with (
        StoreServer(binary=server_binary) as old,
        StoreServer(binary=server_binary) as new,
        CountingProxy(old.port) as address,
    ):
        use_store(settings, f"{address.url}/{DATABASE}")
        before, after = old.client(db=DATABASE), new.client(db=DATABASE)
        load_scripts(before)
        keys = [await asyncio.to_thread(new_session, whose=f"visitor {n}") for n in range(20)]
        await asyncio.gather(*map(write, keys))
        assert len(lines()) == 2
        after.replicaof("127.0.0.1", str(old.port))
        wait_for(lambda: after.info("replication")["master_link_status"] == "up", "it copies")
        wait_for(lambda: after.dbsize() == before.dbsize(), "it has all")
        address.upstream_port = new.port
        after.replicaof("no", "one")
        before.replicaof("127.0.0.1", str(new.port))
        whose = [f"visitor {n}" for n in range(20)]
        assert await asyncio.gather(*map(write, keys)) == whose
        reads, connected = before.info("commandstats")["cmdstat_hgetall"]["calls"], []
        for _ in range(3):
            assert await asyncio.gather(*map(write, keys)) == whose
            connected.append(address.connections)
        assert before.info("commandstats")["cmdstat_hgetall"]["calls"] == reads
        assert connected[1] == connected[2]


class NoEcho(CountingProxy):
    """Answers PING by itself, as some proxies do."""

    def __init__(self, upstream_port: int, answer: bytes) -> None:
        self.answer = answer
        super().__init__(upstream_port)

    def _pump_replies(self, link: Any) -> None:
        while data := link.receive(link.store):
            link.replied = True
            if not link.send(link.client, re.sub(rb"\$24\r\n[0-9a-f]{24}\r\n", self.answer, data)):
                break
        self._end(link)


@pytest.mark.parametrize(
    "answer",
    [b"+PONG\r\n", b"-ERR wrong number of arguments for 'ping' command\r\n", b"-BUSY wait\r\n"],
)
async def test_store_without_marks_refuses_nobody(
    store_server: StoreServer,
    store: redis.Redis,
    visitors: list[str],
    settings: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    answer: bytes,
) -> None:
    monkeypatch.setattr(sharing, "_has_warned", False)
    with NoEcho(store_server.port, answer) as proxy:
        use_store(settings, f"{proxy.url}/{DATABASE}")
        connected = []
        for _ in range(3):
            found = await asyncio.gather(*(write(visitors[n % 4]) for n in range(20)))
            assert found == [f"visitor {n % 4}" for n in range(20)]
            connected.append(proxy.connections)
    goes_on = b"BUSY" in answer
    assert (connected[1] == connected[2]) != goes_on
    assert len([one for one in caplog.messages if "share" in one]) == 1 - goes_on


class Unlike(Exception):  # noqa: N818
    """An error that cannot be copied by its arguments."""

    def __init__(self, *, why: str) -> None:
        super().__init__(why)


async def test_error_of_connecting_is_the_own_one(
    store: redis.Redis, visitors: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*args: Any, **options: Any) -> None:
        raise Unlike(why="no password to be had")

    _kept = await share()
    monkeypatch.setattr(exchange, "aconnect", fail)
    with pytest.raises(Unlike):
        await read(visitors[0])


class Mangler(CountingProxy):
    """Loses bytes of replies now and then."""

    def __init__(self, upstream_port: int, dice: random.Random) -> None:
        self.dice, self.is_on = dice, False
        super().__init__(upstream_port)

    def _pump_replies(self, link: Any) -> None:
        while data := link.receive(link.store):
            link.replied = True
            if self.is_on and self.dice.random() < 0.3:
                start, end = sorted(self.dice.choices(range(len(data) + 1), k=2))
                if self.dice.random() < 0.3:
                    start, end = 0, len(data)
                data = data[:start] + data[end:]
            if data and not link.send(link.client, data):
                break
        self._end(link)


async def test_mangled_replies_reach_nobody_else(
    store_server: StoreServer, store: redis.Redis, visitors: list[str], settings: Any
) -> None:
    """Own replies that are mangled within may be wrong; another one's come never."""
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 0.2
    settings.CLUSTERED_SESSIONS_NEAR_CACHE_BYTES = 0
    seed = random.randrange(1 << 32)
    print("seed", seed)
    keys = [await asyncio.to_thread(new_session, whose=f"visitor {n}") for n in range(20)]
    answered = lost = 0
    with Mangler(store_server.port, random.Random(seed)) as mangler:
        use_store(settings, f"{mangler.url}/{DATABASE}")
        _kept = await share()
        for _ in range(100):
            # Those that have their own are not meant here.
            mangler.is_on = bool(lines())
            asked = [
                line.ask([pack_command(("HGETALL", place(key).record))], time.monotonic() + 0.05)
                for line in lines()[:1]
                for key in keys
            ]
            found = await asyncio.gather(*asked, return_exceptions=True)
            for n, one in enumerate(found):
                if isinstance(one, BaseException):
                    lost += 1
                else:
                    answered += 1
                    said = re.findall(rb"visitor \d+", b" ".join(one[0]))
                    assert set(said) <= {b"visitor %d" % n}
            mangler.is_on = False
            await asyncio.gather(read(keys[0]), return_exceptions=True)
    assert answered
    assert lost


# By chance.


@pytest.mark.parametrize("count", [2000, pytest.param(20_000, marks=pytest.mark.full)])
async def test_two_hundred_sessions_are_never_mixed(
    proxy: CountingProxy, store: redis.Redis, settings: Any, count: int
) -> None:
    """Thousands of reads and writes at once, some cancelled, while connections are killed."""
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 20.0
    settings.CLUSTERED_SESSIONS_NEAR_CACHE_BYTES = 0
    load_scripts(store)
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    keys = [
        await asyncio.to_thread(new_session, whose=f"visitor {n}", it="x" * (n * n))
        for n in range(200)
    ]
    left = iter(range(count))
    shared = False

    async def use() -> None:
        nonlocal shared
        for at in left:
            # Those of the end may have been killed.
            shared = shared or bool(lines())
            number = dice.randrange(200)
            work = asyncio.create_task(dice.choice((read, read, write))(keys[number]))
            if dice.random() < 0.1:
                for _ in range(dice.randrange(8)):
                    await asyncio.sleep(0)
                work.cancel()
            if at % 500 == 499:
                for client in await asyncio.to_thread(store.client_list):
                    if client["cmd"] == "ping" and dice.random() < 0.5:
                        store.client_kill_filter(_id=client["id"])
            if at % 700 == 699:
                proxy.cut_next("half", matching=b"PING")
            with contextlib.suppress(asyncio.CancelledError):
                assert await work == f"visitor {number}"

    await asyncio.gather(*(use() for _ in range(100)))
    assert shared
    for number, key in enumerate(keys):
        stored = await SessionStore(key).aload()
        assert {stored["whose"], stored.get("written by", f"visitor {number}")} == {
            f"visitor {number}"
        }
