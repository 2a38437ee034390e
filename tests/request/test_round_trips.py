"""Costs of a request: round trips to the store, counted between the two."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any

import pytest
import redis
from asgiref.sync import sync_to_async
from django.core.handlers.exception import convert_exception_to_response
from django.http import HttpRequest, HttpResponse
from django.test import AsyncRequestFactory, RequestFactory
from hiredis import pack_command

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.middleware import ClusteredSessionMiddleware
from django_clustered_sessions.monitoring import counters as counters_module
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol.commands import lock_queue
from django_clustered_sessions.session import finish, renewals
from django_clustered_sessions.session.near_cache import near_cache
from django_clustered_sessions.store import connections
from django_clustered_sessions.store.exchange import address, aread_alone
from tests.gateways import place
from tests.locking import BOUND_S, Threads, new_session, outcome, owner, seize, wait_for_sleepers
from tests.round_trips import (
    CASES,
    COOKIE,
    LOCKED_CASES,
    TRACKED_CASES,
    AsyncUse,
    Use,
    achange,
    acost,
    aread,
    change,
    cost,
    nothing,
    read,
    read_all,
    session_before,
    warm,
)
from tests.servers import CountingProxy, free_port

__all__ = ["warm"]

#: A request that saves each time does so in code that both halves share.
AWAITED = [case for case in CASES if not case.values[1] or case.id == "untouched, every request"]

#: What a lock adds is the same for every way to read, and for every way to change.
LOCKED_AWAITED = [
    case
    for case in LOCKED_CASES
    if case.id in ("read", "change", "first write", "login", "logout", "unknown cookie")
]


@pytest.mark.parametrize(("before", "every_request", "use", "_ause", "expected"), CASES)
def test_request_takes_that_many_round_trips(
    warm: CountingProxy,
    settings: Any,
    before: str | None,
    every_request: bool,
    use: Use,
    _ause: AsyncUse,
    expected: int,
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = every_request
    assert cost(warm, before, use) == (expected, 0)


@pytest.mark.parametrize(("before", "every_request", "use", "_ause", "expected"), CASES)
def test_encryption_takes_no_round_trip_more(
    warm: CountingProxy,
    settings: Any,
    before: str | None,
    every_request: bool,
    use: Use,
    _ause: AsyncUse,
    expected: int,
) -> None:
    settings.CLUSTERED_SESSIONS_ENCRYPTION_KEYS = ["01" * 32]
    settings.SESSION_SAVE_EVERY_REQUEST = every_request
    assert cost(warm, before, use) == (expected, 0)


@pytest.mark.parametrize(("before", "every_request", "_use", "ause", "expected"), AWAITED)
async def test_async_request_takes_that_many_round_trips(
    warm: CountingProxy,
    settings: Any,
    before: str | None,
    every_request: bool,
    _use: Use,
    ause: AsyncUse,
    expected: int,
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = every_request
    assert await acost(warm, before, ause) == (expected, 0)


@pytest.mark.parametrize(("before", "every_request", "use", "_ause", "expected"), LOCKED_CASES)
def test_locked_request_takes_that_many_round_trips(
    warm: CountingProxy,
    store: redis.Redis,
    settings: Any,
    before: str | None,
    every_request: bool,
    use: Use,
    _ause: AsyncUse,
    expected: int,
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    settings.SESSION_SAVE_EVERY_REQUEST = every_request
    assert cost(warm, before, use) == (expected, 0)
    assert store.keys("*:locks") == []


@pytest.mark.parametrize(("before", "every_request", "_use", "ause", "expected"), LOCKED_AWAITED)
async def test_async_locked_request_takes_that_many_round_trips(
    warm: CountingProxy,
    store: redis.Redis,
    settings: Any,
    before: str | None,
    every_request: bool,
    _use: Use,
    ause: AsyncUse,
    expected: int,
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    settings.SESSION_SAVE_EVERY_REQUEST = every_request
    assert await acost(warm, before, ause) == (expected, 0)
    assert store.keys("*:locks") == []


@pytest.fixture
def tracked(settings: Any) -> None:
    """Read without trips, however slow the machine is."""
    settings.CLUSTERED_SESSIONS_NEAR_READS = "tracked"
    settings.CLUSTERED_SESSIONS_NEAR_MAX_AGE = 60.0


@pytest.mark.usefixtures("tracked")
@pytest.mark.parametrize(("before", "use", "_ause", "expected"), TRACKED_CASES)
def test_tracked_request_takes_that_many_round_trips(
    warm: CountingProxy, before: str | None, use: Use, _ause: AsyncUse, expected: int
) -> None:
    # Opens the channel.
    cost(warm, "anonymous", read)
    assert cost(warm, before, use, reads_first=True) == (expected, 0)


@pytest.mark.usefixtures("tracked")
@pytest.mark.parametrize(("before", "_use", "ause", "expected"), TRACKED_CASES)
async def test_async_tracked_request_takes_that_many_round_trips(
    warm: CountingProxy, before: str | None, _use: Use, ause: AsyncUse, expected: int
) -> None:
    await acost(warm, "anonymous", aread)
    assert await acost(warm, before, ause, reads_first=True) == (expected, 0)


@pytest.mark.usefixtures("tracked")
@pytest.mark.parametrize(("use", "expected"), [(nothing, 1), (read, 0), (read_all, 0), (change, 1)])
def test_tracked_sliding_request_takes_no_more(
    warm: CountingProxy,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    use: Use,
    expected: int,
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = True
    # What is due leaves apart from the requests.
    monkeypatch.setattr(renewals.Batch, "add", lambda *arguments: None)
    cost(warm, "anonymous", read)
    assert cost(warm, "anonymous", use, reads_first=True) == (expected, 0)


@pytest.mark.usefixtures("tracked")
def test_locked_change_takes_two_round_trips_beside_a_copy(
    warm: CountingProxy, settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    assert cost(warm, "anonymous", change, reads_first=True) == (2, 0)


def test_idle_timeout_rides_on_a_locked_load(warm: CountingProxy, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = 600
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    assert cost(warm, "logged in", read) == (2, 0)


def warm_up_waiting() -> None:
    """Connect those who wait, too: it is a connection of its own."""
    address(connections.waiting_pool(), BOUND_S)


def test_waiting_costs_two_more(warm: CountingProxy, store: redis.Redis, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    # One slice of sleep is half of this: it is woken before.
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 40.0
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 20.0
    SessionStore().exists("x" * 32)
    warm_up_waiting()
    key = new_session(n=1)

    def view(request: HttpRequest) -> HttpResponse:
        change(request)
        return HttpResponse()

    request = RequestFactory().get("/")
    request.COOKIES = {COOKIE: key}
    token = seize(key)
    with Threads() as threads:
        warm.reset()
        visit = threads.start(ClusteredSessionMiddleware(view), request)
        wait_for_sleepers(store, 1)
        assert warm.round_trips == 2
        # Past the proxy, by a client of the test's own.
        let_go(store, key, token)
        assert outcome(visit).status_code == 200
    # The question that queued, the sleep, the load with the lock, and the commit.
    assert (warm.round_trips, warm.connections) == (4, 0)


async def test_waiting_costs_two_more_asynchronously(
    warm: CountingProxy, store: redis.Redis, settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 40.0
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 20.0
    await SessionStore().aexists("x" * 32)
    assert await aread_alone(connections.awaiting_pool(), pack_command(("PING",)), BOUND_S)
    key = await sync_to_async(new_session)(n=1)
    token = await sync_to_async(seize)(key)

    async def view(request: HttpRequest) -> HttpResponse:
        await achange(request)
        return HttpResponse()

    request = AsyncRequestFactory().get("/")
    request.COOKIES = {COOKIE: key}
    warm.reset()
    visit = asyncio.create_task(ClusteredSessionMiddleware(view)(request))
    await asyncio.to_thread(wait_for_sleepers, store, 1)
    let_go(store, key, token)
    assert (await asyncio.wait_for(visit, BOUND_S)).status_code == 200
    assert (warm.round_trips, warm.connections) == (4, 0)


def test_each_slice_of_a_wait_costs_two(
    warm: CountingProxy, store: redis.Redis, settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 0.2
    SessionStore().exists("x" * 32)
    warm_up_waiting()
    key = new_session(n=1)
    token = seize(key)

    def view(request: HttpRequest) -> HttpResponse:
        read(request)
        return HttpResponse()

    request = RequestFactory().get("/")
    request.COOKIES = {COOKIE: key}
    warm.reset()
    response = ClusteredSessionMiddleware(convert_exception_to_response(view))(request)
    assert response.status_code == 503
    # It queued, slept once and asked, and gave up its place.
    assert warm.round_trips == 4
    assert owner(store, key) == token


def test_lock_commit_and_save_of_a_view_cost_no_more(warm: CountingProxy) -> None:
    def by_lock(request: HttpRequest) -> None:
        with request.session.lock():
            change(request)

    def by_commit(request: HttpRequest) -> None:
        with request.session.lock():
            pass
        change(request)
        request.session.commit()

    def by_save(request: HttpRequest) -> None:
        change(request)
        request.session.save()
        request.session.modified = False

    for use, expected in ((by_lock, 2), (by_commit, 3), (by_save, 2)):
        assert cost(warm, "anonymous", use) == (expected, 0), use


def let_go(store: redis.Redis, key: str, token: str) -> None:
    """Give up a lock past the proxy."""
    where = place(key)
    call = lock_queue.release(where, token)
    store.evalsha(call.script.sha, len(call.keys), *call.keys, *call.arguments)


def test_late_answer_asks_before_it_sends_the_cookie(
    warm: CountingProxy, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = True
    monkeypatch.setattr(finish, "LATE_S", 0.0)
    for before in ("anonymous", "logged in"):
        request = RequestFactory().get("/")
        request.COOKIES = session_before(before)
        warm.reset()

        def view(request: HttpRequest) -> HttpResponse:
            read(request)
            return HttpResponse()

        assert COOKIE in ClusteredSessionMiddleware(view)(request).cookies
        assert warm.round_trips == 2


def test_idle_timeout_rides_on_the_load(warm: CountingProxy, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = 600
    assert cost(warm, "logged in", read) == (1, 0)


@pytest.mark.usefixtures("figures")
def test_counters_ride_along(warm: CountingProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters_module, "INTERVAL_S", 0.0)
    request = RequestFactory().get("/")
    request.COOKIES = session_before("anonymous")
    counters.add(requests=1)
    warm.reset()

    def view(request: HttpRequest) -> HttpResponse:
        read(request)
        return HttpResponse()

    ClusteredSessionMiddleware(view)(request)
    assert warm.round_trips == 1
    assert b":figures" in warm.requests[0]


@pytest.mark.usefixtures("figures")
def test_figures_that_are_refused_keep_nobody_from_reading(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that refuses writes reads all the same; the figures go with a later trip."""
    key = session_before("anonymous")["sessionid"]
    counters.drain(now=True)
    # As many as no other test of this process leaves behind.
    counters.add(writes_refused=12345)
    monkeypatch.setattr(counters_module, "INTERVAL_S", 0.0)
    store.config_set("min-replicas-to-write", 1)
    try:
        assert SessionStore(key).load()
    finally:
        store.config_set("min-replicas-to-write", 0)
    assert SessionStore(key).load()
    (figures,) = (store.hgetall(name) for name in store.keys("*:figures"))
    assert any(b" 12345 " in line for line in figures.values())


def test_forgotten_script_costs_one_more(warm: CountingProxy, store: Any) -> None:
    request = RequestFactory().get("/")
    request.COOKIES = session_before("anonymous")
    # Or the load would need a script as well.
    near_cache.clear()
    store.script_flush()
    warm.reset()

    def view(request: HttpRequest) -> HttpResponse:
        change(request)
        return HttpResponse()

    ClusteredSessionMiddleware(view)(request)
    assert warm.round_trips == 3


@pytest.mark.full
def test_import_and_start_open_no_connection() -> None:
    code = f"""
import socket

def refuse(*arguments):
    raise AssertionError("a connection was opened")

socket.socket.connect = refuse
import importlib, pkgutil
import django
from django.conf import settings
settings.configure(
    INSTALLED_APPS=[
        *("django.contrib.admin", "django.contrib.auth", "django.contrib.contenttypes"),
        *("django.contrib.messages", "django.contrib.sessions", "django_clustered_sessions"),
    ],
    SESSION_ENGINE="django_clustered_sessions.backend",
    SESSION_CACHE_ALIAS="sessions",
    CACHES={{
        "default": {{"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}},
        "sessions": {{
            "BACKEND": "django_redis.cache.RedisCache",
            "LOCATION": "redis://127.0.0.1:{free_port()}/1",
        }},
    }},
    MIDDLEWARE=["django_clustered_sessions.middleware.ClusteredSessionMiddleware"],
    ROOT_URLCONF=(),
)
django.setup()
import django_clustered_sessions as package
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
from django.core import checks
checks.run_checks()
from django.core.wsgi import get_wsgi_application
get_wsgi_application()
package.backend.SessionStore("x" * 32)
print("nothing was opened")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "DJANGO_SETTINGS_MODULE"},
        timeout=100,
    )
    assert done.stdout == "nothing was opened\n", done.stderr
