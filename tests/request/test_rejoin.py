"""A store that comes back: service without a restart, nothing stale, and what is lost is told."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import logout
from django.http import HttpRequest, HttpResponse

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionLockLost, SessionStoreUnavailable
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.session import near_cache
from django_clustered_sessions.store.circuit_breaker import breakers
from tests.conftest import DATABASE, use_store
from tests.gateways import Browser, View, place
from tests.servers import CountingProxy, StoreServer, wait_for

COOKIE = "sessionid"


@pytest.fixture(params=["wsgi", "asgi"])
def browser(request: pytest.FixtureRequest, settings: Any) -> Browser:
    near_cache.near_cache.clear()
    return Browser(settings, asgi=request.param == "asgi")


@pytest.fixture
def server(server_binary: Path, settings: Any) -> Iterator[StoreServer]:
    """Give a store of the test's own, which keeps on disk what it has acknowledged."""
    with StoreServer(
        *("--appendonly", "yes", "--appendfsync", "always"), binary=server_binary
    ) as started:
        use_store(settings, f"{started.url}/{DATABASE}")
        yield started


in_full_under_asgi = pytest.mark.parametrize(
    "browser", ["wsgi", pytest.param("asgi", marks=pytest.mark.full)], indirect=True
)


def start_empty(server: StoreServer) -> None:
    """Start a store that was killed, without its data and without its scripts."""
    server.start()
    with server.client() as client:
        client.flushall()


def read(request: HttpRequest) -> HttpResponse:
    return HttpResponse(repr(request.session.get("n")))


async def aread(request: HttpRequest) -> HttpResponse:
    return HttpResponse(repr(await request.session.aget("n")))


def increment(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(request.session.increment("n")))


async def aincrement(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(await request.session.aincrement("n")))


def until_back(browser: Browser, view: View) -> Any:
    """Visit until the store is asked again; return the answer."""

    def answer() -> Any:
        response = browser.visit(view)
        return response if response.status_code != 503 else None

    return wait_for(answer, "the store is asked again", timeout_s=30)


# With its data.


@pytest.mark.full
def test_many_threads_and_tasks_are_back_without_a_restart(server: StoreServer) -> None:
    session = SessionStore()
    session["n"] = 1
    session.save()
    key = session.session_key
    stop = threading.Event()
    seen: list[set[str]] = []

    def note(mine: set[str], values: dict[str, Any] | None) -> None:
        mine.add("away" if values is None else f"{'back' if 'away' in mine else 'up'} {values}")

    def work() -> None:
        mine: set[str] = set()
        seen.append(mine)
        while not stop.is_set():
            values = None
            with suppress(SessionStoreUnavailable):
                values = SessionStore(key).load()
            note(mine, values)

    async def awork(mine: set[str]) -> None:
        while not stop.is_set():
            values = None
            with suppress(SessionStoreUnavailable):
                values = await SessionStore(key).aload()
            note(mine, values)
            await asyncio.sleep(0)

    async def all_of_them() -> None:
        mine: list[set[str]] = [set() for _ in range(8)]
        seen.extend(mine)
        await asyncio.gather(*map(awork, mine))

    workers = [threading.Thread(target=work) for _ in range(4)]
    workers.append(threading.Thread(target=lambda: asyncio.run(all_of_them())))
    for worker in workers:
        worker.start()
    try:
        for what in ("up {'n': 1}", "away", "back {'n': 1}"):
            if what == "away":
                server.kill()
            elif what.startswith("back"):
                server.start()
            wait_for(
                lambda what=what: len(seen) == 12 and all(what in mine for mine in seen),  # type: ignore[misc]
                f"all are {what}",
                timeout_s=30,
            )
    finally:
        stop.set()
        for worker in workers:
            worker.join(30)
    assert not any(worker.is_alive() for worker in workers)
    assert set().union(*seen) == {"up {'n': 1}", "away", "back {'n': 1}"}


@pytest.mark.each_server
@pytest.mark.parametrize(
    ("browser", "view"), [("wsgi", increment), ("asgi", aincrement)], indirect=["browser"]
)
def test_restarted_store_gets_its_scripts_again(
    browser: Browser, server: StoreServer, view: View
) -> None:
    assert browser.visit(view).content == b"1"
    server.kill()
    for _ in range(4):
        assert browser.visit(view).status_code == 503
    server.start()
    assert until_back(browser, view).content == b"2"
    assert browser.visit(read).content == b"2"


# With other data, or none.


@in_full_under_asgi
def test_older_data_is_what_counts(browser: Browser, server: StoreServer) -> None:
    browser.visit(increment)
    record = place(browser.key).record
    with server.client(db=DATABASE) as client:
        older = client.dump(record)
        browser.visit(increment)
        assert browser.visit(read).content == b"2"
        server.kill()
        assert browser.visit(read).status_code == 503
        server.start()
        client.restore(record, 1_000_000, older, replace=True)
    assert until_back(browser, read).content == b"1"
    assert browser.visit(aincrement).content == b"2"


@in_full_under_asgi
def test_another_store_is_what_counts(browser: Browser, server: StoreServer, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = "local_reads"
    browser.visit(increment)
    with server.client(db=DATABASE) as client, StoreServer(binary=server.binary) as other:
        record = place(browser.key).record
        browser.visit(increment)
        newer = client.dump(record)
        with other.client(db=DATABASE) as its:
            its.restore(record, 1_000_000, newer)
        with CountingProxy(server.port) as proxy:
            use_store(settings, f"{proxy.url}/{DATABASE}")
            browser.visit(read)
            proxy.refuse()
            for _ in range(4):
                assert browser.visit(read).content == b"2"
            with other.client(db=DATABASE) as its:
                its.hdel(record, "d:n")
                # The same record, written by somebody else: another version.
                meta = its.hget(record, "m:")
                its.hset(record, "m:", meta[:2] + b"12345678" + meta[10:])
            proxy.upstream_port = other.port
            proxy.accept()
            wait_for(
                lambda: browser.visit(read).content == b"None", "the other is asked", timeout_s=30
            )


@pytest.mark.parametrize(
    ("browser", "behaviour", "view"),
    [
        ("wsgi", "exception", read),
        ("asgi", "local_reads", aread),
        pytest.param("asgi", "exception", increment, marks=pytest.mark.full),
        pytest.param("wsgi", "noop", aread, marks=pytest.mark.full),
        pytest.param("asgi", "noop", read, marks=pytest.mark.full),
        pytest.param("wsgi", "local_reads", increment, marks=pytest.mark.full),
    ],
    indirect=["browser"],
)
def test_store_that_lost_its_data_logs_out_with_one_warning(
    browser: Browser,
    server: StoreServer,
    settings: Any,
    caplog: pytest.LogCaptureFixture,
    behaviour: str,
    view: View,
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = behaviour
    visitors = [browser, *(Browser(settings, asgi=browser.asgi) for _ in range(3))]
    for visitor in visitors:
        visitor.visit(increment)
    keys = [visitor.key for visitor in visitors]
    server.kill()
    for visitor in visitors:
        visitor.visit(read)
    start_empty(server)
    breakers.reset()
    caplog.clear()
    for visitor in visitors:
        response = visitor.visit(view)
        assert response.status_code == 200
        assert response.content == (b"1" if view is increment else b"None")
        # The old cookie goes, or a new session's takes its place.
        assert response.cookies[COOKIE].value != keys[0]
    (line,) = [line for line in caplog.messages if "knows nothing of session" in line]
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]
    assert not any(key in line for key in keys)


def test_end_of_a_session_is_told_as_no_loss(
    browser: Browser, server: StoreServer, caplog: pytest.LogCaptureFixture
) -> None:
    def log_out(request: HttpRequest) -> HttpResponse:
        logout(request)
        return HttpResponse()

    browser.visit(increment)
    tab = browser.another_tab()
    # On another node: this one goes on to have it at hand.
    known = near_cache.near_cache.get(place(browser.key).record)
    life = near_cache.near_cache.life(place(browser.key).record)
    browser.visit(log_out)
    assert known is not None
    near_cache.near_cache.clear()
    near_cache.near_cache.put(place(tab.key).record, known, 10**6, life)
    assert tab.visit(read).content == b"None"
    assert "knows nothing" not in caplog.text


# Locks from before.


def holding(key: str, then: Callable[[], None]) -> None:
    session = SessionStore(key)
    with session.lock():
        session["n"] = 99
        then()


async def aholding(key: str, then: Callable[[], None]) -> None:
    session = SessionStore(key)
    async with session.alock():
        await session.aset("n", 99)
        # Not in a thread: a store ends with the one that it was started from.
        then()


@pytest.mark.parametrize(
    "hold", [holding, lambda *args: asyncio.run(aholding(*args))], ids=["sync", "async"]
)
def test_lock_from_before_a_restart_is_lost(server: StoreServer, hold: Callable[..., None]) -> None:
    session = SessionStore()
    session["n"] = 1
    session.save()
    key = session.session_key or ""
    record = place(key).record
    with server.client(db=DATABASE) as client:
        older = client.dump(record)

    def lose() -> None:
        server.kill()
        server.start()
        with server.client(db=DATABASE) as client:
            client.flushall()
            client.restore(record, 1_000_000, older)

    before = counters.counts["writes_refused"]
    with pytest.raises(SessionLockLost):
        hold(key, lose)
    assert counters.counts["writes_refused"] == before + 1
    assert SessionStore(key).load() == {"n": 1}


def test_lock_that_the_store_still_has_is_kept(server: StoreServer) -> None:
    session = SessionStore()
    session["n"] = 1
    session.save()

    def restart() -> None:
        server.kill()
        server.start()

    holding(session.session_key or "", restart)
    assert SessionStore(session.session_key).load() == {"n": 99}
