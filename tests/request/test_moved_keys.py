"""A page's parallel requests while one of them gives the session a new key: each is answered."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from django.contrib.auth import (
    SESSION_KEY,
    aupdate_session_auth_hash,
    login,
    update_session_auth_hash,
)
from django.contrib.auth.models import User
from django.contrib.sessions.middleware import SessionMiddleware
from django.http import HttpRequest, HttpResponse

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.middleware import ClusteredSessionMiddleware
from django_clustered_sessions.session import finish
from tests.gateways import GATEWAYS, Browser, place, records
from tests.pairs import pairwise

COOKIE = "sessionid"

pytestmark = pytest.mark.django_db


@pytest.fixture
def user(settings: Any) -> User:
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
    return User.objects.create(username="ada", password="md5$secret")


@pytest.fixture(params=GATEWAYS)
def browser(request: pytest.FixtureRequest, store: redis.Redis, settings: Any, user: User) -> Any:
    browser = Browser(settings, asgi=request.param == "asgi")
    browser.client.force_login(user)
    return browser


def page(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(request.user))


def cycle(request: HttpRequest) -> HttpResponse:
    request.session.cycle_key()
    return page(request)


def read_and_cycle(request: HttpRequest) -> HttpResponse:
    request.session.get("x")
    return cycle(request)


async def acycle(request: HttpRequest) -> HttpResponse:
    await request.session.acycle_key()
    return HttpResponse(str(await request.auser()))


def new_password(request: HttpRequest) -> HttpResponse:
    assert isinstance(request.user, User)
    request.user.set_password("another")
    request.user.save()
    update_session_auth_hash(request, request.user)
    return page(request)


async def anew_password(request: HttpRequest) -> HttpResponse:
    user = await request.auser()
    # Django 5.2's aupdate_session_auth_hash() reads it synchronously.
    request.user = user
    user.set_password("another")
    await user.asave()
    await aupdate_session_auth_hash(request, user)
    return HttpResponse(str(user))


@pairwise(
    browser=GATEWAYS,
    moves=[page, cycle, acycle, new_password, anew_password],
    use=["read", "change", "cycle"],
    every_request=[False, True],
    indirect=["browser"],
)
def test_parallel_request_goes_on_and_keeps_its_cookie(
    browser: Browser,
    store: redis.Redis,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    moves: Any,
    use: str,
    every_request: bool,
) -> None:
    """``page`` moves the session by itself, for its hash is from before a new SECRET_KEY."""
    settings.SESSION_SAVE_EVERY_REQUEST = every_request
    monkeypatch.setattr(finish, "LATE_S", 0.0)
    tab = browser.another_tab()
    key = browser.key
    if moves is page:
        settings.SECRET_KEY, settings.SECRET_KEY_FALLBACKS = "new" * 20, [settings.SECRET_KEY]

    def view(request: HttpRequest) -> HttpResponse:
        request.session.get("x")
        name = "" if moves is page else str(request.user)
        assert tab.visit(moves).content == b"ada"
        assert tab.key != key
        if use == "change":
            request.session["cart"] = ["tea"]
        elif use == "cycle":
            request.session.cycle_key()
        return HttpResponse(name or str(request.user))

    response = browser.visit(view)
    assert (response.status_code, response.content) == (200, b"ada")
    assert COOKIE not in response.cookies
    assert records(store) == [place(tab.key).record.encode()]
    stored = SessionStore(tab.key)
    assert stored.get("cart") == (["tea"] if use == "change" else None)
    assert tab.visit(page).content == b"ada"


class Derived(SessionMiddleware):
    """Django's session middleware, as a site may have changed it."""


@pytest.mark.parametrize("middleware", [SessionMiddleware, Derived])
@pytest.mark.parametrize("moves", [page, cycle])
def test_djangos_middleware_puts_no_old_key_over_a_new_one(
    browser: Browser, store: redis.Redis, settings: Any, moves: Any, middleware: type
) -> None:
    """It sets the cookie after each save, so the request is refused; what it wrote has landed."""
    name = f"{ClusteredSessionMiddleware.__module__}.{ClusteredSessionMiddleware.__name__}"
    stock = f"{middleware.__module__}.{middleware.__name__}"
    settings.MIDDLEWARE = [stock if path == name else path for path in settings.MIDDLEWARE]
    tab = browser.another_tab()
    if moves is page:
        settings.SECRET_KEY, settings.SECRET_KEY_FALLBACKS = "new" * 20, [settings.SECRET_KEY]

    def view(request: HttpRequest) -> HttpResponse:
        request.session["cart"] = ["tea"]
        assert tab.visit(moves).status_code == 200
        return HttpResponse()

    response = browser.visit(view)
    assert response.status_code == 400
    assert COOKIE not in response.cookies
    assert SessionStore(tab.key)["cart"] == ["tea"]
    assert tab.visit(page).content == b"ada"


def test_user_asked_for_after_a_new_password_ends_no_session(
    browser: Browser, store: redis.Redis
) -> None:
    """Django flushes the session whose hash is not the user's any more: that of before."""
    tab = browser.another_tab()

    def view(request: HttpRequest) -> HttpResponse:
        assert request.session[SESSION_KEY]
        assert tab.visit(new_password).status_code == 200
        return HttpResponse(str(request.user))

    response = browser.visit(view)
    assert (response.status_code, response.content) == (200, b"AnonymousUser")
    assert COOKIE not in response.cookies
    assert tab.visit(page).content == b"ada"


def test_request_that_moves_and_is_refused_tells_the_new_key(
    browser: Browser, store: redis.Redis, settings: Any
) -> None:
    """Another one that goes on under the new key may be the first to write."""
    settings.CLUSTERED_SESSIONS_ON_CONFLICT = "error"
    key = browser.key

    def move(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 1
        request.session.cycle_key()
        other = SessionStore(request.session.session_key)
        other["n"] = 2
        other.save()
        request.session["n"] = 3
        return HttpResponse()

    assert browser.visit(move).status_code == 409
    assert browser.key not in ("", key)
    assert browser.visit(page).content == b"ada"
    assert SessionStore(browser.key)["n"] == 2


def test_request_with_the_old_key_comes_too_late(browser: Browser, store: redis.Redis) -> None:
    tab = browser.another_tab()
    assert tab.visit(cycle).status_code == 200
    for view in (page, read_and_cycle):
        response = browser.visit(view)
        assert (response.status_code, response.content) == (200, b"AnonymousUser")
        assert COOKIE not in response.cookies
    assert tab.visit(page).content == b"ada"
    assert len(records(store)) == 1


@pytest.mark.parametrize("is_limited", [False, True])
def test_request_that_comes_too_late_can_log_in(
    browser: Browser, store: redis.Redis, settings: Any, user: User, is_limited: bool
) -> None:
    if is_limited:
        settings.CLUSTERED_SESSIONS_MAX_SESSIONS_PER_USER = 2
    tab = browser.another_tab()
    assert tab.visit(cycle).status_code == 200

    def log_in(request: HttpRequest) -> HttpResponse:
        login(request, user, "django.contrib.auth.backends.ModelBackend")
        return HttpResponse()

    assert browser.visit(log_in).status_code == 200
    assert browser.key != tab.key
    assert browser.visit(page).content == tab.visit(page).content == b"ada"
