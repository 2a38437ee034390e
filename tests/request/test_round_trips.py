"""What a request may cost: round trips to the store, counted between the two."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import redis
from asgiref.sync import sync_to_async
from django.contrib.auth import alogin, alogout, login, logout
from django.contrib.auth.models import User
from django.core.handlers.exception import convert_exception_to_response
from django.http import HttpRequest, HttpResponse
from django.test import AsyncRequestFactory, RequestFactory

from django_clustered_sessions import counters as counters_module
from django_clustered_sessions import middleware
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.counters import counters
from django_clustered_sessions.middleware import ClusteredSessionMiddleware
from django_clustered_sessions.protocol import commands
from django_clustered_sessions.session import holding
from django_clustered_sessions.session.near import near_cache
from django_clustered_sessions.store import connections
from tests.gateways import load_scripts, place
from tests.locking import Threads, new_session, outcome, owner, seize, wait_for_sleepers
from tests.servers import CountingProxy, free_port

COOKIE = "sessionid"
BACKEND = "django.contrib.auth.backends.ModelBackend"

Use = Callable[[HttpRequest], None]
AsyncUse = Callable[[HttpRequest], Awaitable[None]]


ADA = User(pk=1, username="ada", password="md5$secret")


def nothing(request: HttpRequest) -> None:
    pass


async def anothing(request: HttpRequest) -> None:
    pass


def read(request: HttpRequest) -> None:
    request.session.get("n")


async def aread(request: HttpRequest) -> None:
    await request.session.aget("n")


def read_all(request: HttpRequest) -> None:
    session = request.session
    session.get("n"), "m" in session, dict(session.items())
    session.get_expiry_age(), session.get_expiry_date(), session.get_expire_at_browser_close()


async def aread_all(request: HttpRequest) -> None:
    session = request.session
    await session.aget("n"), await session.ahas_key("m"), dict(await session.aitems())
    await session.aget_expiry_age(), await session.aget_expiry_date()
    await session.aget_expire_at_browser_close()


def change(request: HttpRequest) -> None:
    request.session["n"] = request.session.get("n", 0) + 1


async def achange(request: HttpRequest) -> None:
    await request.session.aset("n", await request.session.aget("n", 0) + 1)


def change_in_place(request: HttpRequest) -> None:
    request.session["cart"]["tea"] = 1


async def achange_in_place(request: HttpRequest) -> None:
    (await request.session.aget("cart"))["tea"] = 1


def increment(request: HttpRequest) -> None:
    request.session.increment("hits")


async def aincrement(request: HttpRequest) -> None:
    await request.session.aincrement("hits")


def set_expiry(request: HttpRequest) -> None:
    request.session.set_expiry(100)


async def aset_expiry(request: HttpRequest) -> None:
    await request.session.aset_expiry(100)


def log_in(request: HttpRequest) -> None:
    login(request, ADA, BACKEND)


async def alog_in(request: HttpRequest) -> None:
    await alogin(request, ADA, BACKEND)


def log_out(request: HttpRequest) -> None:
    read(request)
    logout(request)


async def alog_out(request: HttpRequest) -> None:
    await aread(request)
    await alogout(request)


# What is there before: None, an anonymous session, a logged-in one, or a cookie of nobody's.
CASES = [
    # before, every request saves, use, asynchronous use, round trips
    pytest.param(None, False, read, aread, 0, id="no cookie, read"),
    pytest.param(None, True, nothing, anothing, 0, id="no cookie, every request"),
    pytest.param("anonymous", False, nothing, anothing, 0, id="untouched"),
    pytest.param("anonymous", True, nothing, anothing, 1, id="untouched, every request"),
    pytest.param("anonymous", False, read, aread, 1, id="read"),
    pytest.param("logged in", True, read, aread, 1, id="read, every request"),
    pytest.param("anonymous", True, read, aread, 1, id="read, anonymous, every request"),
    pytest.param("anonymous", False, read_all, aread_all, 1, id="read all"),
    pytest.param("logged in", True, read_all, aread_all, 1, id="read all, every request"),
    pytest.param("anonymous", False, change, achange, 2, id="change"),
    pytest.param("anonymous", True, change, achange, 2, id="change, every request"),
    pytest.param("anonymous", False, change_in_place, achange_in_place, 2, id="change in place"),
    pytest.param("anonymous", False, increment, aincrement, 2, id="increment"),
    pytest.param("anonymous", False, set_expiry, aset_expiry, 2, id="set expiry"),
    pytest.param(None, False, change, achange, 1, id="first write"),
    pytest.param(None, False, increment, aincrement, 1, id="first write, increment"),
    pytest.param(None, True, change, achange, 1, id="first write, every request"),
    pytest.param(None, False, log_in, alog_in, 2, id="login without a session"),
    pytest.param("anonymous", False, log_in, alog_in, 3, id="login"),
    pytest.param("anonymous", True, log_in, alog_in, 3, id="login, every request"),
    pytest.param("logged in", False, log_out, alog_out, 2, id="logout"),
    pytest.param("logged in", True, log_out, alog_out, 2, id="logout, every request"),
    pytest.param("nobody's", False, read, aread, 1, id="unknown cookie"),
    pytest.param("nobody's", True, nothing, anothing, 1, id="unknown cookie, every request"),
]


LOCKED_CASES = [
    # before, every request saves, use, asynchronous use, round trips
    pytest.param(None, False, read, aread, 0, id="no cookie, read"),
    pytest.param(None, True, nothing, anothing, 0, id="no cookie, every request"),
    pytest.param("anonymous", False, nothing, anothing, 0, id="untouched"),
    pytest.param("anonymous", True, nothing, anothing, 1, id="untouched, every request"),
    # One more gives up the lock.
    pytest.param("anonymous", False, read, aread, 2, id="read"),
    pytest.param("logged in", True, read, aread, 2, id="read, every request"),
    pytest.param("anonymous", True, read_all, aread_all, 2, id="read all, every request"),
    # Otherwise it is given up along with the write.
    pytest.param("anonymous", False, change, achange, 2, id="change"),
    pytest.param("anonymous", True, change, achange, 2, id="change, every request"),
    pytest.param("anonymous", False, change_in_place, achange_in_place, 2, id="change in place"),
    pytest.param("anonymous", False, increment, aincrement, 2, id="increment"),
    pytest.param("anonymous", False, set_expiry, aset_expiry, 2, id="set expiry"),
    pytest.param(None, False, change, achange, 1, id="first write"),
    pytest.param(None, True, change, achange, 1, id="first write, every request"),
    pytest.param(None, False, log_in, alog_in, 2, id="login without a session"),
    pytest.param("anonymous", False, log_in, alog_in, 3, id="login"),
    pytest.param("anonymous", True, log_in, alog_in, 3, id="login, every request"),
    pytest.param("logged in", False, log_out, alog_out, 2, id="logout"),
    pytest.param("logged in", True, log_out, alog_out, 2, id="logout, every request"),
    pytest.param("nobody's", False, read, aread, 1, id="unknown cookie"),
]


@pytest.fixture
def warm(proxy: CountingProxy, store: Any, monkeypatch: pytest.MonkeyPatch) -> CountingProxy:
    """Load all scripts, connect, and let the counters have reported; do without a database."""

    async def asave(*args: Any, **kwargs: Any) -> None:
        pass

    # However slow the machine is, no answer here is late.
    monkeypatch.setattr(middleware, "LATE_S", float("inf"))
    # A login notes when it was.
    monkeypatch.setattr(User, "save", lambda *args, **kwargs: None)
    monkeypatch.setattr(User, "asave", asave)
    load_scripts(store)
    # The renewer's trips are not the request's.
    monkeypatch.setattr(holding._Renewer, "keep", lambda self, grant: None)
    counters.take(now=True)
    SessionStore().exists("x" * 32)
    proxy.reset()
    return proxy


def session_before(before: str | None) -> dict[str, str]:
    if before is None:
        return {}
    if before == "nobody's":
        return {COOKIE: "x" * 32}
    session = SessionStore()
    session.update({"n": 1, "cart": {}})
    if before == "logged in":
        session.update({"_auth_user_id": "1", "_auth_user_backend": BACKEND})
    session.create()
    return {COOKIE: session.session_key or ""}


@pytest.mark.parametrize(("before", "every_request", "use", "ause", "expected"), CASES)
def test_round_trips(
    warm: CountingProxy,
    settings: Any,
    before: str | None,
    every_request: bool,
    use: Use,
    ause: AsyncUse,
    expected: int,
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = every_request

    def view(request: HttpRequest) -> HttpResponse:
        use(request)
        return HttpResponse()

    request = RequestFactory().get("/")
    request.COOKIES = session_before(before)
    warm.reset()
    assert ClusteredSessionMiddleware(view)(request).status_code == 200
    assert (warm.round_trips, warm.connections) == (expected, 0)


@pytest.mark.parametrize(("before", "every_request", "use", "ause", "expected"), CASES)
async def test_round_trips_asynchronously(
    warm: CountingProxy,
    settings: Any,
    before: str | None,
    every_request: bool,
    use: Use,
    ause: AsyncUse,
    expected: int,
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = every_request

    async def view(request: HttpRequest) -> HttpResponse:
        await ause(request)
        return HttpResponse()

    request = AsyncRequestFactory().get("/")
    request.COOKIES = await sync_to_async(session_before)(before)
    await SessionStore().aexists("x" * 32)
    warm.reset()
    assert (await ClusteredSessionMiddleware(view)(request)).status_code == 200
    assert (warm.round_trips, warm.connections) == (expected, 0)


@pytest.mark.parametrize(("before", "every_request", "use", "ause", "expected"), LOCKED_CASES)
def test_round_trips_of_a_locked_request(
    warm: CountingProxy,
    store: redis.Redis,
    settings: Any,
    before: str | None,
    every_request: bool,
    use: Use,
    ause: AsyncUse,
    expected: int,
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    test_round_trips(warm, settings, before, every_request, use, ause, expected)
    assert store.keys("*:locks") == []


@pytest.mark.parametrize(("before", "every_request", "use", "ause", "expected"), LOCKED_CASES)
async def test_round_trips_of_a_locked_request_asynchronously(
    warm: CountingProxy,
    store: redis.Redis,
    settings: Any,
    before: str | None,
    every_request: bool,
    use: Use,
    ause: AsyncUse,
    expected: int,
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    await test_round_trips_asynchronously(
        warm, settings, before, every_request, use, ause, expected
    )
    assert store.keys("*:locks") == []


def test_idle_timeout_rides_on_a_locked_load(warm: CountingProxy, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = 600
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    test_round_trips(warm, settings, "logged in", False, read, aread, 2)


def warm_up_waiting() -> None:
    """Connect those who wait, too: it is a connection of its own."""
    connection = connections.waiting_pool().get_connection()
    connection.connect()
    connections.waiting_pool().release(connection)


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
    connection = await connections.awaiting_pool().get_connection()
    await connections.awaiting_pool().release(connection)
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
    assert (await asyncio.wait_for(visit, 20)).status_code == 200
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


def test_explicit_lock_and_early_commit(warm: CountingProxy) -> None:
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

        def view(request: HttpRequest, use: Use = use) -> HttpResponse:
            use(request)
            return HttpResponse()

        request = RequestFactory().get("/")
        request.COOKIES = session_before("anonymous")
        warm.reset()
        assert ClusteredSessionMiddleware(view)(request).status_code == 200
        assert warm.round_trips == expected, use


def let_go(store: redis.Redis, key: str, token: str) -> None:
    """Give up a lock past the proxy."""
    where = place(key)
    call = commands.release(where, token)
    store.evalsha(call.script.sha, len(call.keys), *call.keys, *call.arguments)


def test_late_answer_of_an_anonymous_session_asks_before_it_sends_the_cookie(
    warm: CountingProxy, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = True
    monkeypatch.setattr(middleware, "LATE_S", 0.0)
    for before, expected in (("anonymous", 2), ("logged in", 1)):
        request = RequestFactory().get("/")
        request.COOKIES = session_before(before)
        warm.reset()

        def view(request: HttpRequest) -> HttpResponse:
            read(request)
            return HttpResponse()

        assert COOKIE in ClusteredSessionMiddleware(view)(request).cookies
        assert warm.round_trips == expected


def test_idle_timeout_rides_on_the_load(warm: CountingProxy, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = 600
    request = RequestFactory().get("/")
    request.COOKIES = session_before("logged in")
    warm.reset()

    def view(request: HttpRequest) -> HttpResponse:
        read(request)
        return HttpResponse()

    ClusteredSessionMiddleware(view)(request)
    assert warm.round_trips == 1


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
def test_figures_that_the_store_does_not_take_keep_nobody_from_reading(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that refuses writes reads all the same; the figures go with a later trip."""
    key = session_before("anonymous")["sessionid"]
    counters.take(now=True)
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


def test_script_that_the_store_has_forgotten_costs_one_more(
    warm: CountingProxy, store: Any
) -> None:
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
    )
    assert done.stdout == "nothing was opened\n", done.stderr
