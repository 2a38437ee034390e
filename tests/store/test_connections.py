"""Clients from the django-redis entry of CACHES, synchronous and asynchronous ones alike."""

from __future__ import annotations

import asyncio
import gc
import shutil
import socket
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import ref

import hiredis
import pytest
import redis
from asgiref.sync import async_to_sync
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.store import connections, exchange
from django_clustered_sessions.store.budget import Budget
from django_clustered_sessions.store.circuit_breaker import FAILURES
from django_clustered_sessions.store.entries import django_redis
from tests.conftest import DATABASE, require, store_binary, use_store
from tests.locking import BOUND_S
from tests.servers import CountingProxy, StoreServer, alent, free_port, lent, wait_for
from tests.topologies import Replicated

VALUES = {"cart": {"a": 1}}
SENTINEL = "django_redis.pool.SentinelConnectionFactory"


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def is_async(request: pytest.FixtureRequest) -> bool:
    is_async: bool = request.param
    return is_async


def nothing() -> None:
    """Do nothing."""


async def ause(while_open: Callable[[], Any]) -> Any:
    session = SessionStore()
    await session.aupdate(VALUES)
    await session.asave()
    assert await SessionStore(session.session_key).aload() == VALUES
    return while_open()


def use(is_async: bool, while_open: Callable[[], Any] = nothing) -> Any:
    """Save a session and load it again; return what ``while_open`` does, connections being open."""
    if is_async:
        return asyncio.run(ause(while_open))
    session = SessionStore()
    session.update(VALUES)
    session.save()
    assert SessionStore(session.session_key).load() == VALUES
    return while_open()


def databases(server: StoreServer, **options: Any) -> set[int]:
    """Return the databases that hold something."""
    with server.client(**options) as client:
        return {int(name.removeprefix("db")) for name in client.info("keyspace")}


# Where the store is.


def test_first_of_several_locations_is_used(
    store: redis.Redis, store_server: StoreServer, settings: Any, is_async: bool
) -> None:
    use_store(settings, f" {store_server.url}/{DATABASE} , redis://127.0.0.1:1/1 ")
    use(is_async)
    assert databases(store_server) == {DATABASE}


def test_unix_socket_leads_to_its_database(
    store: redis.Redis, store_server: StoreServer, settings: Any, is_async: bool
) -> None:
    use_store(settings, f"{store_server.unix_url}?db=7")
    before = connected(store)
    assert use(is_async, lambda: connected(store)) > before
    assert databases(store_server) == {7}


# Who asks.


@pytest.fixture(scope="module")
def guarded() -> Iterator[StoreServer]:
    with StoreServer("--requirepass", "se cret/1") as server:
        client = server.client(password="se cret/1")
        client.execute_command("ACL", "SETUSER", "app", "on", ">pa:ss", "~session:*", "+@all")
        yield server


@pytest.mark.parametrize(
    ("is_async", "location", "options"),
    [
        (False, "redis://:se%20cret%2F1@127.0.0.1:{port}/1", {}),
        (True, "redis://127.0.0.1:{port}/1", {"PASSWORD": "se cret/1"}),
        (True, "redis://app:pa%3Ass@127.0.0.1:{port}/1", {}),
        (False, "redis://127.0.0.1:{port}/1", {"USERNAME": "app", "PASSWORD": "pa:ss"}),
    ],
    ids=["sync, URL", "async, OPTIONS", "async, user in URL", "sync, user in OPTIONS"],
)
def test_credentials_are_presented(
    guarded: StoreServer, settings: Any, is_async: bool, location: str, options: dict[str, Any]
) -> None:
    use_store(settings, location.format(port=guarded.port), **options)
    root = guarded.client(password="se cret/1")
    users = use(is_async, lambda: [client["user"] for client in root.client_list()])
    assert ("app" in users) == ("app" in location or "app" in str(options))


@pytest.mark.parametrize(
    ("options", "word"),
    [({}, "NOAUTH"), ({"PASSWORD": "wrong"}, "WRONGPASS")],
    ids=["none", "wrong"],
)
def test_wrong_credentials_are_an_error_of_the_entry(
    guarded: StoreServer, settings: Any, is_async: bool, options: dict[str, Any], word: str
) -> None:
    use_store(settings, f"{guarded.url}/1", **options)
    with pytest.raises(SessionStoreUnavailable, match="CACHES entry") as caught:
        use(is_async)
    assert "wrong" not in str(caught.value).lower().replace("wrongpass", "")


# TLS.


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an authority, another one, and certificates of the first for server and client."""
    folder = tmp_path_factory.mktemp("tls")
    openssl = require(shutil.which("openssl"), "openssl")

    def run(*arguments: str) -> None:
        subprocess.run(
            [openssl, *arguments], cwd=folder, check=True, capture_output=True, timeout=60
        )

    def make(name: str, *more: str) -> None:
        new = ("req", "-x509", "-newkey", "rsa:2048", "-noenc", "-days", "2")
        run(*new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.crt", *more)

    for name in ("ca", "other"):
        # Python 3.13 wants a certificate to say what it is for.
        make(name, "-addext", "keyUsage=critical,keyCertSign,cRLSign")
    for name in ("server", "client"):
        extensions = (
            *("-addext", f"subjectAltName=IP:127.0.0.1,DNS:{name}"),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
            *("-addext", "authorityKeyIdentifier=keyid"),
        )
        make(name, "-CA", "ca.crt", "-CAkey", "ca.key", *extensions)
    return folder


@pytest.fixture(scope="module")
def tls_server(certificates: Path) -> Iterator[tuple[StoreServer, int]]:
    port = free_port()
    flags = (
        *("--tls-port", str(port), "--tls-ca-cert-file", str(certificates / "ca.crt")),
        *("--tls-cert-file", str(certificates / "server.crt")),
        *("--tls-key-file", str(certificates / "server.key"), "--tls-auth-clients", "yes"),
    )
    with StoreServer(*flags, binary=store_binary("redis")) as server:
        yield server, port


def tls_options(certificates: Path, authority: str = "ca") -> dict[str, Any]:
    return {
        "ssl_ca_certs": str(certificates / f"{authority}.crt"),
        "ssl_certfile": str(certificates / "client.crt"),
        "ssl_keyfile": str(certificates / "client.key"),
    }


@pytest.mark.full
def test_tls_connects_with_a_certificate(
    tls_server: tuple[StoreServer, int], certificates: Path, settings: Any, is_async: bool
) -> None:
    server, port = tls_server
    options = tls_options(certificates)
    use_store(settings, f"rediss://127.0.0.1:{port}/3", CONNECTION_POOL_KWARGS=options)
    use(is_async)
    assert databases(server) == {3}


@pytest.mark.full
def test_server_of_another_authority_is_refused(
    tls_server: tuple[StoreServer, int], certificates: Path, settings: Any, is_async: bool
) -> None:
    _, port = tls_server
    options = tls_options(certificates, "other")
    use_store(settings, f"rediss://127.0.0.1:{port}/3", CONNECTION_POOL_KWARGS=options)
    with pytest.raises(SessionStoreUnavailable, match="(?i)certificate"):
        use(is_async)


# Pools.


def test_connections_have_the_clients_name(
    store: redis.Redis, settings: Any, is_async: bool
) -> None:
    use_store(
        settings,
        settings.CACHES["sessions"]["LOCATION"],
        CONNECTION_POOL_KWARGS={"client_name": "sessions-of-shop"},
    )
    names = use(is_async, lambda: [client["name"] for client in store.client_list()])
    assert "sessions-of-shop" in names


def use_many(is_async: bool, times: int) -> None:
    """Use that many sessions at once: in threads, or in tasks of one event loop."""
    if is_async:

        async def many() -> None:
            await asyncio.gather(*(ause(nothing) for _ in range(times)))

        asyncio.run(many())
    else:
        with ThreadPoolExecutor(times) as executor:
            list(executor.map(use, [False] * times))


def test_blocking_pool_lets_requests_share_connections(
    store: redis.Redis, settings: Any, is_async: bool
) -> None:
    name = "redis.BlockingConnectionPool"
    location = settings.CACHES["sessions"]["LOCATION"]
    options = {"max_connections": 2, "client_name": "blocking"}
    use_store(settings, location, CONNECTION_POOL_CLASS=name, CONNECTION_POOL_KWARGS=options)
    before = store.info("stats")["total_connections_received"]
    use_many(is_async, 20)
    assert store.info("stats")["total_connections_received"] - before <= 2


@pytest.mark.parametrize("pool", ["redis.BlockingConnectionPool", "redis.ConnectionPool"])
def test_pool_without_a_connection_to_spare_opens_no_breaker(
    store: redis.Redis, settings: Any, is_async: bool, pool: str
) -> None:
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 0.1
    location = settings.CACHES["sessions"]["LOCATION"]
    options = {"max_connections": 1}
    use_store(settings, location, CONNECTION_POOL_CLASS=pool, CONNECTION_POOL_KWARGS=options)
    before = counters.counts["breaker_opened"]

    async def go() -> None:
        taken = await alent(connections.apool())
        for _ in range(FAILURES + 1):
            with pytest.raises(SessionStoreUnavailable, match="all 1 connections .*max_conn"):
                await ause(nothing)
        connections.apool().take_back(taken)
        settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 15.0
        await ause(nothing)

    if is_async:
        asyncio.run(go())
    else:
        taken = lent(connections.pool())
        for _ in range(FAILURES + 1):
            with pytest.raises(SessionStoreUnavailable, match="all 1 connections .*max_conn"):
                use(False)
        connections.pool().take_back(taken)
        settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 15.0
        use(False)
    assert counters.counts["breaker_opened"] == before


def test_wait_for_a_connection_leaves_its_exchange_time(
    store: redis.Redis, proxy: CountingProxy, settings: Any, is_async: bool
) -> None:
    """A connection that comes late is used, and not closed as one whose reply is late."""
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 8.0
    name = "redis.BlockingConnectionPool"
    options = {"max_connections": 1}
    use_store(
        settings,
        f"{proxy.url}/{DATABASE}",
        CONNECTION_POOL_CLASS=name,
        CONNECTION_POOL_KWARGS=options,
    )
    wait_s = 4.5

    def hold(pool: Any, connection: Any) -> None:
        proxy.reset()
        proxy.stall()
        pool.take_back(connection)
        threading.Timer(0.2, proxy.resume).start()

    async def go() -> None:
        await ause(nothing)
        pool: Any = connections.apool()
        connection = await alent(pool)
        asyncio.get_running_loop().call_later(wait_s, hold, pool, connection)
        await ause(nothing)

    if is_async:
        asyncio.run(go())
    else:
        use(False)
        pool: Any = connections.pool()
        threading.Timer(wait_s, hold, (pool, lent(pool))).start()
        use(False)
    assert proxy.connections == 0


@pytest.mark.parametrize("pool", ["redis.BlockingConnectionPool", "redis.ConnectionPool"])
def test_connection_that_is_lost_makes_room(store: redis.Redis, settings: Any, pool: str) -> None:
    """As where a signal's exception comes between the loan and its end."""
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 0.1
    location = settings.CACHES["sessions"]["LOCATION"]
    options = {"max_connections": 2}
    use_store(settings, location, CONNECTION_POOL_CLASS=pool, CONNECTION_POOL_KWARGS=options)
    for _ in range(5):
        lent(connections.pool())
        gc.collect()
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 15.0
    use(False)


@pytest.mark.parametrize("pool", ["redis.BlockingConnectionPool", "redis.ConnectionPool"])
def test_pool_that_is_over_counts_no_closed_connection(
    store: redis.Redis, settings: Any, is_async: bool, pool: str
) -> None:
    """A request may wait for one while settings change, or a node loses its slots."""
    location = settings.CACHES["sessions"]["LOCATION"]
    options = {"max_connections": 1}
    use_store(settings, location, CONNECTION_POOL_CLASS=pool, CONNECTION_POOL_KWARGS=options)

    async def go() -> None:
        await ause(nothing)
        left: Any = connections.apool()
        taken = await alent(left)
        left.end()
        left.take_back(taken)
        # No collection has come in between: here is one that refers to it.
        assert not taken.is_connected
        left.take_back(await alent(left))

    if is_async:
        asyncio.run(go())
    else:
        use(False)
        left: Any = connections.pool()
        taken = lent(left)
        left.end()
        left.take_back(taken)
        assert taken._sock is None
        left.take_back(lent(left))


async def test_changed_settings_refuse_none_that_waits(store: redis.Redis, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 20.0
    location = settings.CACHES["sessions"]["LOCATION"]
    name, options = "redis.BlockingConnectionPool", {"max_connections": 1}
    use_store(settings, location, CONNECTION_POOL_CLASS=name, CONNECTION_POOL_KWARGS=options)
    await ause(nothing)
    left: Any = connections.apool()
    taken = await alent(left)
    waiting = asyncio.create_task(ause(nothing))
    # Up to where it waits.
    await asyncio.sleep(0)
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 21.0
    assert connections.apool() is not left
    left.take_back(taken)
    await waiting


def test_asking_for_an_address_loses_no_connection(store: redis.Redis, settings: Any) -> None:
    location = settings.CACHES["sessions"]["LOCATION"]
    use_store(
        settings,
        "redis://127.0.0.1:1/1",
        CONNECTION_POOL_CLASS="redis.BlockingConnectionPool",
        CONNECTION_POOL_KWARGS={"max_connections": 1},
    )
    for _ in range(3):
        with pytest.raises(SessionStoreUnavailable, match="127.0.0.1:1"):
            connections.address()
    use_store(settings, location)
    assert connections.address() in location


@pytest.mark.full
def test_locks_work_over_a_small_blocking_pool(store: redis.Redis, settings: Any) -> None:
    """A request that waits for a lock takes no connection from the one that releases it."""
    location = settings.CACHES["sessions"]["LOCATION"]
    use_store(
        settings,
        location,
        CONNECTION_POOL_CLASS="redis.BlockingConnectionPool",
        CONNECTION_POOL_KWARGS={"max_connections": 3},
    )
    settings.CLUSTERED_SESSIONS_LOCK_MAX_WAITERS = 512
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 60
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 20
    session = SessionStore()
    session["n"] = 0
    session.save()

    def work(_: int) -> None:
        for _ in range(5):
            with SessionStore(session.session_key).lock() as locked:
                locked["n"] += 1

    with ThreadPoolExecutor(12) as executor:
        list(executor.map(work, range(12)))
    assert SessionStore(session.session_key)["n"] == 60


def test_threads_share_one_pool(store: redis.Redis) -> None:
    connections.working_pools.forget()
    start = threading.Barrier(8, timeout=BOUND_S)

    def pool(_: int) -> Any:
        start.wait()
        return connections.pool()

    with ThreadPoolExecutor(8) as executor:
        assert len(set(map(id, executor.map(pool, range(8))))) == 1
    use_many(False, 8)


def test_two_hundred_tasks_share_one_pool(store: redis.Redis, settings: Any) -> None:
    # A loop that has so much to do may look at a reply only after seconds.
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 60

    async def go() -> dict[str, Any]:
        shared = SessionStore()
        await shared.asave()

        async def count(number: int) -> None:
            session = SessionStore(shared.session_key)
            await session.aincrement("n")
            await session.aset(f"task {number}", number)
            await session.asave()

        pools = {id(connections.apool())}
        await asyncio.gather(*map(count, range(200)), *(ause(nothing) for _ in range(50)))
        assert pools == {id(connections.apool())}
        return await SessionStore(shared.session_key).aload()

    expected = {f"task {number}": number for number in range(200)} | {"n": 200}
    assert asyncio.run(go()) == expected


# Event loops.


def connected(store: redis.Redis) -> int:
    return int(store.info("clients")["connected_clients"])


@contextmanager
def no_socket_left(store: redis.Redis) -> Iterator[None]:
    """Hold that everything that is opened inside is closed again, and not by the collector."""
    connections.working_pools.forget()
    gc.collect()
    before = connected(store)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        yield
        wait_for(lambda: connected(store) <= before, "every connection is closed")
        gc.collect()
    assert connections.working_pools.by_loop == {}


def test_ended_loop_has_closed_its_connections(store: redis.Redis) -> None:
    with no_socket_left(store):
        for _ in range(30):
            asyncio.run(ause(nothing))


def test_loops_in_threads_have_pools_of_their_own(store: redis.Redis) -> None:
    start = threading.Barrier(6, timeout=BOUND_S)

    def in_a_loop(_: int) -> int:
        async def go() -> int:
            start.wait()
            await ause(nothing)
            start.wait()
            return id(connections.apool())

        return asyncio.run(go())

    with no_socket_left(store), ThreadPoolExecutor(6) as executor:
        assert len(set(executor.map(in_a_loop, range(6)))) == 6


def test_async_code_in_sync_code_closes_its_connections(store: redis.Redis) -> None:
    with no_socket_left(store):
        for _ in range(30):
            async_to_sync(ause)(nothing)


@pytest.mark.parametrize("pool", ["redis.BlockingConnectionPool", "redis.ConnectionPool"])
async def test_connection_keeps_nothing_of_its_first_request(
    store: redis.Redis, settings: Any, pool: str
) -> None:
    """A site may have the request in a context variable."""
    current: ContextVar[object] = ContextVar("current")
    use_store(settings, settings.CACHES["sessions"]["LOCATION"], CONNECTION_POOL_CLASS=pool)

    async def request() -> Any:
        request = threading.Event()
        current.set(request)
        await ause(nothing)
        return ref(request)

    gone = await asyncio.create_task(request())
    # The event loop drops the timers that were cancelled.
    await asyncio.sleep(0)
    assert connections.apool().idle  # type: ignore[union-attr]
    assert gone() is None


def test_thread_whose_connection_is_closed_connects_anew(
    store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by another thread that changes settings, right before the exchange."""
    exchanges, closed = exchange.exchange, []

    def close_before(connection: Any, *arguments: Any) -> list[Any]:
        if not closed:
            closed.append(connection)
            connection.disconnect()
        return exchanges(connection, *arguments)

    monkeypatch.setattr(exchange, "exchange", close_before)
    use(False)
    assert closed


@pytest.mark.parametrize("near_reads", ["checked", "tracked"])
async def test_changed_settings_close_a_loops_connections(
    store: redis.Redis, proxy: CountingProxy, settings: Any, near_reads: str
) -> None:
    """Not at the loop's end, which tests may share; what is under way goes on."""
    settings.CLUSTERED_SESSIONS_NEAR_READS = near_reads
    before = connected(store)
    for seconds in range(20, 25):
        await asyncio.gather(*(ause(nothing) for _ in range(8)))
        # To have a reply yet to come, each time.
        proxy.reset()
        proxy.stall()
        using = asyncio.create_task(ause(nothing))
        await asked(proxy)
        settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = float(seconds)
        connections.apool()
        proxy.resume()
        await using
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 25.0
    connections.apool()
    async with asyncio.timeout(BOUND_S):
        while connected(store) > before:
            await asyncio.sleep(0)
    assert len(connections.working_pools.by_loop) == 1


def test_failed_loop_has_closed_its_connections(store: redis.Redis) -> None:
    async def go() -> None:
        await ause(nothing)
        raise LookupError

    with no_socket_left(store), pytest.raises(LookupError):
        asyncio.run(go())


def test_loop_that_was_never_cleaned_up_is_forgotten(store: redis.Redis) -> None:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(ause(nothing))
    (left,) = (pool for pool, _ in connections.working_pools.by_loop.values())
    loop.run_until_complete(left.disconnect())
    loop.close()
    asyncio.run(ause(nothing))
    assert connections.working_pools.by_loop == {}


async def asked(proxy: CountingProxy) -> None:
    """Wait, without rest, until something was sent."""
    async with asyncio.timeout(BOUND_S):
        while not proxy.round_trips:
            await asyncio.sleep(0)


def test_cancelled_task_leaves_no_reply_for_the_next(
    store: redis.Redis, proxy: CountingProxy
) -> None:
    async def go() -> None:
        others, mine = SessionStore(), SessionStore()
        await others.aupdate({"whose": "others"})
        await mine.aupdate({"whose": "mine"})
        await others.asave()
        await mine.asave()
        for _ in range(2):
            proxy.reset()
            proxy.stall()
            task = asyncio.create_task(SessionStore(others.session_key).aload())
            await asked(proxy)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            loading = asyncio.create_task(SessionStore(mine.session_key).aload())
            await asyncio.sleep(0)
            proxy.resume()
            assert await loading == {"whose": "mine"}

    asyncio.run(go())


def test_task_cancelled_as_it_connects_leaves_no_connection(
    store: redis.Redis, proxy: CountingProxy
) -> None:
    async def go() -> None:
        for _ in range(2):
            await connections.apool().disconnect()
            proxy.reset()
            proxy.stall()
            task = asyncio.create_task(ause(nothing))
            await asked(proxy)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            using = asyncio.create_task(ause(nothing))
            await asyncio.sleep(0)
            proxy.resume()
            await using

    asyncio.run(go())
    assert {int(name.removeprefix("db")) for name in store.info("keyspace")} == {DATABASE}


# Time and repeats are the package's, not the entry's.

IMPATIENT = {
    "SOCKET_TIMEOUT": 300,
    "SOCKET_CONNECT_TIMEOUT": 300,
    "CONNECTION_POOL_KWARGS": {
        "socket_timeout": 300,
        "socket_connect_timeout": 300,
        "retry_on_timeout": True,
        "health_check_interval": 1,
        "decode_responses": True,
        "protocol": 3,
    },
}


@pytest.mark.full
def test_timeouts_follow_the_setting(
    store: redis.Redis, proxy: CountingProxy, settings: Any, is_async: bool
) -> None:
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 4.0
    use_store(settings, f"{proxy.url}/{DATABASE}", **IMPATIENT)

    async def go() -> None:
        await ause(nothing)
        proxy.stall()
        with pytest.raises(SessionStoreUnavailable):
            await ause(nothing)
        with pytest.raises(SessionStoreUnavailable):
            # On a new connection.
            await ause(nothing)
        proxy.resume()
        await ause(nothing)

    if is_async:
        asyncio.run(asyncio.wait_for(go(), BOUND_S))
        return
    use(False)
    proxy.stall()
    for _ in range(2):
        with pytest.raises(SessionStoreUnavailable):
            use(False)
    proxy.resume()
    use(False)


def test_connecting_is_tried_once(settings: Any, is_async: bool) -> None:
    """redis-py's own repeats are off: a server that hangs up is not called again and again."""
    accepted = 0
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            nonlocal accepted
            while True:
                try:
                    caller, _ = listener.accept()
                except OSError:
                    return
                accepted += 1
                caller.close()

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        use_store(settings, f"redis://127.0.0.1:{listener.getsockname()[1]}/1", **IMPATIENT)
        with pytest.raises(SessionStoreUnavailable):
            use(is_async)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(BOUND_S)
    assert accepted == 1


def test_new_connection_has_what_is_left_of_the_budget(settings: Any, is_async: bool) -> None:
    """To connect and to greet, and not all of STORE_TIMEOUT once more."""
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 60.0
    session = SessionStore("x" * 32)
    session.state.budget = Budget(0.3)
    # The kernel takes the call, and nobody answers.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        use_store(settings, f"redis://127.0.0.1:{listener.getsockname()[1]}/1")
        began_s = time.monotonic()
        with pytest.raises(SessionStoreUnavailable):
            if is_async:
                asyncio.run(session.aload())
            else:
                session.load()
        assert time.monotonic() - began_s < 30.0


def test_greeting_that_comes_bit_by_bit_is_left_in_time(settings: Any, is_async: bool) -> None:
    """Each bit is in time, and all of them together are not."""
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 0.5
    most, sent = 200, 0
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            nonlocal sent
            caller, _ = listener.accept()
            with caller, suppress(OSError):
                caller.sendall(b"+")
                while sent < most:
                    caller.sendall(b"O")
                    sent += 1
                    time.sleep(0.1)

        thread = threading.Thread(target=drip)
        thread.start()
        use_store(settings, f"redis://127.0.0.1:{listener.getsockname()[1]}/0")
        with pytest.raises(SessionStoreUnavailable):
            use(is_async)
        thread.join(BOUND_S)
    assert sent < most


def test_reply_that_comes_bit_by_bit_is_left_after_its_time() -> None:
    """There is always one more bit, and after the deadline too."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"$9999\r\n" + bytes(5000))
        connection: Any = SimpleNamespace(
            _sock=ours,
            reader=hiredis.Reader(notEnoughData=exchange.INCOMPLETE),
            buffer=bytearray(1),
            disconnect=nothing,
        )
        with pytest.raises(redis.TimeoutError):
            exchange.exchange(connection, [b"any"], time.monotonic() - 1.0)
        assert len(ours.recv(9999)) > 3000


def test_short_budget_does_not_stay_with_the_connection(
    store: redis.Redis, proxy: CountingProxy, is_async: bool, settings: Any
) -> None:
    """The next requests connect with their own budget, not with the rest of the first one's."""
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 30.0

    async def go() -> list[float]:
        await ause(nothing)
        proxy.cut_next("reply", matching=b"EVALSHA")
        await ause(nothing)
        pool: Any = connections.apool()
        return [c.socket_connect_timeout for c in pool.idle]

    if is_async:
        timeouts = asyncio.run(go())
    else:
        use(False)
        proxy.cut_next("reply", matching=b"EVALSHA")
        use(False)
        pool: Any = connections.pool()
        timeouts = [c.socket_connect_timeout for c in pool.idle]
    assert timeouts == [30.0]


# What cannot be.


def test_unknown_alias_is_improperly_configured(settings: Any, is_async: bool) -> None:
    settings.SESSION_CACHE_ALIAS = "shop"
    with pytest.raises(ImproperlyConfigured, match="'shop'"):
        use(is_async)


# Settings that change.


def test_changed_settings_lead_elsewhere(
    store: redis.Redis, store_server: StoreServer, is_async: bool
) -> None:
    def elsewhere(database: int) -> Any:
        location = f"{store_server.url}/{database}"
        return override_settings(
            CACHES={"other": {"BACKEND": django_redis.BACKEND, "LOCATION": location}},
            SESSION_CACHE_ALIAS="other",
        )

    async def go() -> None:
        for database in (3, 4):
            with elsewhere(database):
                await ause(nothing)

    if is_async:
        with no_socket_left(store):
            asyncio.run(go())
    else:
        for database in (3, 4):
            with elsewhere(database):
                use(False)
    assert databases(store_server) == {3, 4}
    use(is_async)
    assert databases(store_server) == {1, 3, 4}


# Sentinel.


@pytest.fixture
def topology() -> Iterator[Replicated]:
    """Run a primary, its replica, and a Sentinel that watches them."""
    with Replicated(sentinels=1) as started:
        yield started


def use_sentinel(settings: Any, *sentinels: StoreServer, **options: Any) -> None:
    addresses = [("127.0.0.1", sentinel.port) for sentinel in sentinels]
    options = {"CONNECTION_FACTORY": SENTINEL, "SENTINELS": addresses} | options
    use_store(settings, "redis://main/2", **options)


@pytest.mark.full
@pytest.mark.parametrize("pool", [None, "redis.sentinel.SentinelConnectionPool"])
def test_sentinel_names_the_primary(
    topology: Replicated, settings: Any, is_async: bool, pool: str | None
) -> None:
    options = {"CONNECTION_POOL_CLASS": pool} if pool else {}
    use_sentinel(settings, *topology.sentinels, **options)
    use(is_async)
    assert databases(topology.primary) == {2}


@pytest.mark.full
def test_loops_share_the_connection_to_the_sentinels(topology: Replicated, settings: Any) -> None:
    (sentinel,) = topology.sentinels
    use_sentinel(settings, sentinel)
    watched = sentinel.client()
    before = connected(watched)
    with no_socket_left(topology.primary.client()):
        for _ in range(5):
            asyncio.run(ause(nothing))
        # The watcher's.
        wait_for(lambda: connected(watched) <= before + 1, "the Sentinel is asked by one only")
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 2.5
    wait_for(lambda: connected(watched) <= before, "the Sentinel is not asked any more")


@pytest.mark.full
def test_hanging_sentinel_leaves_time_for_the_next(
    topology: Replicated, settings: Any, is_async: bool
) -> None:
    config = "sentinel deny-scripts-reconfig yes\n"
    # A third of it is waited for the one that hangs: the rest is for a machine that does, too.
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 3.0
    with StoreServer("--sentinel", config=config) as hanging:
        use_sentinel(settings, hanging, *topology.sentinels)
        hanging.pause()
        try:
            use(is_async)
        finally:
            hanging.resume()


@pytest.mark.full
def test_failover_needs_no_restart(topology: Replicated, settings: Any, is_async: bool) -> None:
    use_sentinel(settings, *topology.sentinels)

    async def awhen_promoted() -> None:
        await ause(nothing)
        topology.primary.kill()
        await asyncio.to_thread(topology.promoted)
        await ause(nothing)

    if is_async:
        asyncio.run(awhen_promoted())
    else:
        use(False)
        topology.primary.kill()
        topology.promoted()
        use(False)


@pytest.mark.full
def test_shared_connection_to_an_old_primary_is_left(topology: Replicated, settings: Any) -> None:
    """It is stopped, so that its connections stay open."""
    use_sentinel(settings, *topology.sentinels)

    async def all_at_once() -> set[Any]:
        await asyncio.gather(*(ause(nothing) for _ in range(20)))
        pool: Any = connections.apool()
        return {line for line in pool.lines if line.is_open}

    async def go() -> None:
        before = await all_at_once()
        assert before
        topology.primary.pause()
        try:
            await asyncio.to_thread(topology.promoted)
            after = await all_at_once()
        finally:
            topology.primary.resume()
        assert after
        assert not after & before

    asyncio.run(go())


@pytest.mark.full
@pytest.mark.parametrize("through", ["URL", "Sentinel"])
def test_connection_with_a_reply_outstanding_is_not_used_again(
    topology: Replicated, settings: Any, is_async: bool, through: str
) -> None:
    """Or the next request would take that reply, of another session, for its own."""
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 1.5
    if through == "Sentinel":
        use_sentinel(settings, *topology.sentinels)
    else:
        use_store(settings, f"{topology.primary.url}/2")
    raw = topology.primary.client()

    def waiting() -> int:
        return sum(client["cmd"] in ("eval", "evalsha") for client in raw.client_list())

    async def go() -> None:
        session = SessionStore()
        await session.aset("whose", "mine")
        await session.asave()
        await session.aset("a", 1)
        raw.client_pause(60_000, all=False)
        try:
            with pytest.raises(SessionStoreUnavailable):
                await session.asave()
            await asyncio.to_thread(wait_for, lambda: not waiting(), "it is closed")
            assert await SessionStore(session.session_key).aload() == {"whose": "mine"}
        finally:
            raw.client_unpause()

    def go_sync() -> None:
        session = SessionStore()
        session["whose"] = "mine"
        session.save()
        session["a"] = 1
        raw.client_pause(60_000, all=False)
        try:
            with pytest.raises(SessionStoreUnavailable):
                session.save()
            wait_for(lambda: not waiting(), "what was asked in vain is closed")
            assert SessionStore(session.session_key).load() == {"whose": "mine"}
        finally:
            raw.client_unpause()

    if is_async:
        asyncio.run(go())
    else:
        go_sync()
