"""Table of uses of a session and their round trips, shared by several tests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth import alogin, alogout, login, logout
from django.contrib.auth.models import User
from django.http import HttpRequest, HttpResponse
from django.test import AsyncRequestFactory, RequestFactory

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.middleware import ClusteredSessionMiddleware
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.session import finish, leases
from tests.gateways import load_scripts
from tests.servers import CountingProxy

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


#: Columns: the session before (None, anonymous, logged in, or an unknown cookie), whether every
#: request saves, the use, its async twin, round trips.
CASES = [
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

#: Like CASES, under CLUSTERED_SESSIONS_LOCKING = "all".
LOCKED_CASES = [
    pytest.param(None, False, read, aread, 0, id="no cookie, read"),
    pytest.param(None, True, nothing, anothing, 0, id="no cookie, every request"),
    pytest.param("anonymous", False, nothing, anothing, 0, id="untouched"),
    pytest.param("anonymous", True, nothing, anothing, 1, id="untouched, every request"),
    # One more round trip releases the lock.
    pytest.param("anonymous", False, read, aread, 2, id="read"),
    pytest.param("logged in", True, read, aread, 2, id="read, every request"),
    pytest.param("anonymous", True, read_all, aread_all, 2, id="read all, every request"),
    # A write releases the lock on its own trip.
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


#: Like CASES, with CLUSTERED_SESSIONS_NEAR_READS = "tracked", where the process has read it before.
TRACKED_CASES = [
    pytest.param(None, read, aread, 0, id="no cookie, read"),
    pytest.param("anonymous", nothing, anothing, 0, id="untouched"),
    pytest.param("anonymous", read, aread, 0, id="read"),
    pytest.param("logged in", read_all, aread_all, 0, id="read all"),
    pytest.param("anonymous", change, achange, 1, id="change"),
    pytest.param("anonymous", change_in_place, achange_in_place, 1, id="change in place"),
    pytest.param("anonymous", increment, aincrement, 1, id="increment"),
    pytest.param("anonymous", set_expiry, aset_expiry, 1, id="set expiry"),
    pytest.param(None, change, achange, 1, id="first write"),
    pytest.param("anonymous", log_in, alog_in, 2, id="login"),
    pytest.param("logged in", log_out, alog_out, 1, id="logout"),
    pytest.param("nobody's", read, aread, 1, id="unknown cookie"),
]


@pytest.fixture
def warm(proxy: CountingProxy, store: Any, monkeypatch: pytest.MonkeyPatch) -> CountingProxy:
    """Load all scripts, connect, and report the counters; replace the database."""

    async def asave(*args: Any, **kwargs: Any) -> None:
        pass

    # No response is late here, so that a slow machine adds no trips.
    monkeypatch.setattr(finish, "LATE_S", float("inf"))
    # A login saves its time to the database.
    monkeypatch.setattr(User, "save", lambda *args, **kwargs: None)
    monkeypatch.setattr(User, "asave", asave)
    load_scripts(store)
    # Round trips that renew a lease do not belong to the request.
    monkeypatch.setattr(leases.Renewer, "keep", lambda self, grant: None)
    counters.drain(now=True)
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


def cost(
    warm: CountingProxy, before: str | None, use: Use, *, reads_first: bool = False
) -> tuple[int, int]:
    """Return the round trips and the new connections of a request with this use.

    With ``reads_first`` another request has read the session a moment ago.
    """

    def view(request: HttpRequest) -> HttpResponse:
        use(request)
        return HttpResponse()

    request = RequestFactory().get("/")
    request.COOKIES = session_before(before)
    if reads_first:
        SessionStore(request.COOKIES.get(COOKIE)).get("n")
    warm.reset()
    assert ClusteredSessionMiddleware(view)(request).status_code == 200
    return warm.round_trips, warm.connections


async def acost(
    warm: CountingProxy, before: str | None, use: AsyncUse, *, reads_first: bool = False
) -> tuple[int, int]:
    """See cost(); for an async request."""

    async def view(request: HttpRequest) -> HttpResponse:
        await use(request)
        return HttpResponse()

    request = AsyncRequestFactory().get("/")
    request.COOKIES = await sync_to_async(session_before)(before)
    # Opens the connection of this event loop.
    await SessionStore().aexists("x" * 32)
    if reads_first:
        await SessionStore(request.COOKIES.get(COOKIE)).aget("n")
    warm.reset()
    assert (await ClusteredSessionMiddleware(view)(request)).status_code == 200
    return warm.round_trips, warm.connections
