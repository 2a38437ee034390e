"""The middleware in whole requests, under WSGI and ASGI: Django's contract, and beyond."""

from __future__ import annotations

import asyncio
import gc
import inspect
import re
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from http.cookies import Morsel
from typing import Any

import asgiref.sync
import pytest
import redis
from django.contrib import admin, messages
from django.contrib.auth import alogin, authenticate, login, logout
from django.contrib.auth.models import User
from django.contrib.sessions.backends.base import UpdateError
from django.core.exceptions import SynchronousOnlyOperation
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, StreamingHttpResponse
from django.middleware.csrf import get_token
from django.test import AsyncClient, AsyncRequestFactory, RequestFactory
from django.urls import path

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.middleware import ClusteredSessionMiddleware
from django_clustered_sessions.session import finish
from tests.gateways import GATEWAYS, Browser, View, on, place, records
from tests.pairs import pairwise
from tests.servers import CountingProxy

COOKIE = "sessionid"
STOCK = "django.contrib.sessions.middleware.SessionMiddleware"
OURS = "django_clustered_sessions.middleware.ClusteredSessionMiddleware"


@pytest.fixture(params=GATEWAYS)
def browser(request: pytest.FixtureRequest, store: redis.Redis, settings: Any) -> Browser:
    return Browser(settings, asgi=request.param == "asgi")


def untouched(request: HttpRequest) -> HttpResponse:
    return HttpResponse("untouched")


def read(request: HttpRequest) -> HttpResponse:
    return HttpResponse(repr(request.session.get("n")))


def write(request: HttpRequest) -> HttpResponse:
    request.session["n"] = 1
    return HttpResponse("written")


def flush(request: HttpRequest) -> HttpResponse:
    request.session.flush()
    return HttpResponse()


async def aread(request: HttpRequest) -> HttpResponse:
    return HttpResponse(repr(await request.session.aget("n")))


async def awrite(request: HttpRequest) -> HttpResponse:
    await request.session.aset("n", 1)
    return HttpResponse("written")


def answering(status: int) -> View:
    def view(request: HttpRequest) -> HttpResponse:
        request.session["n"] = status
        return HttpResponse(status=status)

    return view


def cookie_of(response: Any) -> Morsel[str]:
    return response.cookies[COOKIE]


def is_deletion(morsel: Morsel[str]) -> bool:
    return morsel.value == "" and morsel["max-age"] == 0


# What Django's middleware does.


def test_session_that_nobody_touches_changes_nothing(browser: Browser) -> None:
    for cookie in ("", "x" * 32):
        if cookie:
            browser.key = cookie
        response = browser.visit(untouched)
        assert not response.has_header("Vary")
        assert not response.cookies


@pytest.mark.parametrize("view", [write, awrite])
def test_written_session_is_stored_and_its_cookie_set(
    browser: Browser, store: redis.Redis, view: View
) -> None:
    response = browser.visit(view)
    assert response.headers["Vary"] == "Cookie"
    assert SessionStore(browser.key).load() == {"n": 1}
    assert records(store) == [place(browser.key).record.encode()]


@on(("wsgi", read), ("asgi", aread))
def test_read_session_varies_by_cookie_and_sets_none(browser: Browser, view: View) -> None:
    browser.visit(write)
    response = browser.visit(view)
    assert response.content == b"1"
    assert response.headers["Vary"] == "Cookie"
    assert COOKIE not in response.cookies


def test_saving_every_request_varies_by_cookie_if_nobody_read(
    browser: Browser, settings: Any
) -> None:
    # CVE-2026-35192: a shared cache handed one visitor's new cookie to the next.
    browser.visit(write)
    settings.SESSION_SAVE_EVERY_REQUEST = True
    response = browser.visit(untouched)
    assert cookie_of(response).value == browser.key
    assert response.headers["Vary"] == "Cookie"


def test_deleted_cookie_varies_by_cookie_though_nobody_read(browser: Browser) -> None:
    browser.key = "short"
    response = browser.visit(untouched)
    assert is_deletion(cookie_of(response))
    assert response.headers["Vary"] == "Cookie"


def test_vary_of_the_view_stays(browser: Browser) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 1
        return HttpResponse(headers={"Vary": "Accept-Language"})

    assert browser.visit(view).headers["Vary"] == "Accept-Language, Cookie"


def test_cookie_has_the_attributes_of_the_settings(browser: Browser, settings: Any) -> None:
    settings.SESSION_COOKIE_NAME = "basket"
    settings.SESSION_COOKIE_DOMAIN = ".example.com"
    settings.SESSION_COOKIE_PATH = "/shop/"
    settings.SESSION_COOKIE_SECURE = True
    settings.SESSION_COOKIE_HTTPONLY = True
    settings.SESSION_COOKIE_SAMESITE = "Strict"
    morsel = browser.visit(write).cookies["basket"]
    assert morsel["domain"] == ".example.com"
    assert morsel["path"] == "/shop/"
    assert morsel["secure"] is True
    assert morsel["httponly"] is True
    assert morsel["samesite"] == "Strict"

    morsel = browser.visit(flush).cookies["basket"]
    assert is_deletion(morsel)
    assert morsel["domain"] == ".example.com"
    assert morsel["path"] == "/shop/"
    assert morsel["samesite"] == "Strict"


def test_cookie_may_be_open_to_scripts_and_plain_http(browser: Browser, settings: Any) -> None:
    settings.SESSION_COOKIE_SECURE = settings.SESSION_COOKIE_HTTPONLY = False
    morsel = cookie_of(browser.visit(write))
    assert not morsel["secure"]
    assert not morsel["httponly"]


def test_max_age_is_the_sites_age(browser: Browser, settings: Any) -> None:
    settings.SESSION_COOKIE_AGE = 1234
    assert cookie_of(browser.visit(write))["max-age"] == 1234


def test_max_age_follows_the_stores_remaining_time(browser: Browser, store: redis.Redis) -> None:
    def end_at(request: HttpRequest) -> HttpResponse:
        seconds, _ = store.time()
        request.session.set_expiry(datetime.fromtimestamp(seconds + 500, UTC))
        return HttpResponse()

    first = cookie_of(browser.visit(end_at))
    assert 490 < first["max-age"] <= 500
    # Another node's clock is no matter: the record says how long it is good for.
    remaining_ms = store.pttl(place(browser.key).record)
    again = cookie_of(browser.visit(write))
    assert 0 <= remaining_ms - (again["max-age"] - 1) * 1000 < 10_000
    assert again["expires"]


@on(("wsgi", untouched), ("asgi", untouched), ("wsgi", read), ("asgi", aread))
def test_every_request_slides_the_deadline_by_the_setting(
    browser: Browser, store: redis.Redis, settings: Any, view: View
) -> None:
    settings.SESSION_COOKIE_AGE = 1000
    browser.visit(write)
    record = place(browser.key).record
    settings.SESSION_COOKIE_AGE = 5000
    browser.visit(view)
    assert store.ttl(record) <= 1000
    settings.SESSION_SAVE_EVERY_REQUEST = True
    assert cookie_of(browser.visit(view))["max-age"] == 5000
    assert store.ttl(record) > 4900


@on(("wsgi", False), ("asgi", True), name="every_request")
def test_cookie_ends_with_the_browser_by_the_setting(
    browser: Browser, settings: Any, every_request: bool
) -> None:
    settings.SESSION_EXPIRE_AT_BROWSER_CLOSE = True
    settings.SESSION_SAVE_EVERY_REQUEST = every_request
    for view in (write, untouched) if every_request else (write,):
        morsel = cookie_of(browser.visit(view))
        assert morsel["max-age"] == ""
        assert morsel["expires"] == ""


@on(("wsgi", False), ("asgi", True), name="setting")
def test_cookie_ends_with_the_browser_as_the_session_says(
    browser: Browser, settings: Any, setting: bool
) -> None:
    settings.SESSION_EXPIRE_AT_BROWSER_CLOSE = setting
    settings.SESSION_SAVE_EVERY_REQUEST = True

    def decide(request: HttpRequest) -> HttpResponse:
        request.session.set_expiry(300 if setting else 0)
        return HttpResponse()

    for view in (decide, untouched, read, write):
        assert (cookie_of(browser.visit(view))["max-age"] == "") is not setting, view


@on(("wsgi", 200), ("asgi", 302), ("wsgi", 404), ("asgi", 499), name="status")
def test_answers_below_500_save(browser: Browser, status: int) -> None:
    assert browser.visit(answering(status)).status_code == status
    assert SessionStore(browser.key).load() == {"n": status}


@on(("wsgi", 500), ("asgi", 500), ("asgi", 503), name="status")
def test_answers_from_500_discard_what_changed(browser: Browser, status: int) -> None:
    browser.visit(write)
    response = browser.visit(answering(status))
    assert COOKIE not in response.cookies
    assert browser.visit(read).content == b"1"


def test_error_in_the_view_discards_what_changed(browser: Browser, store: redis.Redis) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 2
        raise ZeroDivisionError

    assert browser.visit(view).status_code == 500
    assert records(store) == []
    browser.visit(write)
    assert browser.visit(view).status_code == 500
    assert browser.visit(read).content == b"1"


def test_flushed_session_takes_its_cookie_along(browser: Browser, store: redis.Redis) -> None:
    browser.visit(write)
    response = browser.visit(flush)
    assert is_deletion(cookie_of(response))
    assert response.headers["Vary"] == "Cookie"
    assert records(store) == []


def test_flushed_session_with_new_data_is_a_new_one(browser: Browser, store: redis.Redis) -> None:
    def renew(request: HttpRequest) -> HttpResponse:
        request.session.flush()
        request.session["n"] = 2
        return HttpResponse()

    browser.visit(write)
    before = browser.key
    browser.visit(renew)
    assert browser.key != before
    assert records(store) == [place(browser.key).record.encode()]


def test_emptied_session_stays(browser: Browser, store: redis.Redis) -> None:
    def empty(request: HttpRequest) -> HttpResponse:
        del request.session["n"]
        return HttpResponse()

    browser.visit(write)
    response = browser.visit(empty)
    assert cookie_of(response).value == browser.key
    assert records(store) == [place(browser.key).record.encode()]
    assert SessionStore(browser.key).load() == {}


@pairwise(
    browser=GATEWAYS,
    every_request=[False, True],
    at_browser_close=[False, True],
    view=[untouched, read, aread],
    indirect=["browser"],
)
def test_forged_cookie_creates_nothing_and_goes(
    browser: Browser,
    store: redis.Redis,
    settings: Any,
    every_request: bool,
    at_browser_close: bool,
    view: View,
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = every_request
    settings.SESSION_EXPIRE_AT_BROWSER_CLOSE = at_browser_close
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = 60
    browser.key = "forged" * 5
    response = browser.visit(view)
    assert records(store) == []
    if every_request or view is not untouched:
        assert is_deletion(cookie_of(response))


@on(("wsgi", False), ("asgi", True), name="every_request")
def test_forged_cookie_is_never_adopted(
    browser: Browser, settings: Any, every_request: bool
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = every_request
    browser.key = "forged" * 5
    response = browser.visit(write)
    assert cookie_of(response).value not in ("", "forged" * 5)


# A session that ends, or moves, while a request is under way.


@on(("wsgi", False), ("asgi", True), name="every_request")
def test_session_ended_during_the_request_is_a_400(
    browser: Browser, store: redis.Redis, settings: Any, every_request: bool
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = every_request

    def view(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 2
        SessionStore().delete(request.session.session_key)
        return HttpResponse()

    browser.visit(write)
    response = browser.visit(view)
    assert response.status_code == 400
    assert COOKIE not in response.cookies
    assert records(store) == []


def test_session_ended_while_a_request_reads_is_no_error(
    browser: Browser, store: redis.Redis
) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        n = request.session["n"]
        SessionStore().delete(request.session.session_key)
        return HttpResponse(repr(n))

    browser.visit(write)
    assert browser.visit(view).content == b"1"
    assert records(store) == []


def save_in_view(request: HttpRequest) -> HttpResponse:
    request.session["n"] = 2
    SessionStore().delete(request.session.session_key)
    request.session.save()
    return HttpResponse()


async def asave_in_view(request: HttpRequest) -> HttpResponse:
    await request.session.aset("n", 2)
    await SessionStore().adelete(request.session.session_key)
    await request.session.asave()
    return HttpResponse()


@on(("wsgi", save_in_view), ("asgi", asave_in_view))
def test_ended_session_that_the_view_saves_is_a_400(
    browser: Browser, store: redis.Redis, view: View
) -> None:
    browser.visit(write)
    assert browser.visit(view).status_code == 400
    assert records(store) == []


def test_logout_in_one_tab_is_not_undone_by_the_other(browser: Browser, store: redis.Redis) -> None:
    browser.visit(write)
    tab = browser.another_tab()

    def slow(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 2
        assert is_deletion(cookie_of(tab.visit(flush)))
        return HttpResponse()

    assert browser.visit(slow).status_code == 400
    assert records(store) == []
    assert is_deletion(cookie_of(browser.visit(read)))


@pairwise(
    browser=GATEWAYS,
    every_request=[False, True],
    view=[untouched, read, aread, write, awrite],
    indirect=["browser"],
)
def test_request_with_the_key_before_a_login_changes_no_cookie(
    browser: Browser, store: redis.Redis, settings: Any, every_request: bool, view: View
) -> None:
    browser.visit(write)
    late = browser.another_tab()
    SessionStore(browser.key).cycle_key()
    settings.SESSION_SAVE_EVERY_REQUEST = every_request
    response = late.visit(view)
    assert COOKIE not in response.cookies
    assert response.status_code == (400 if view in (write, awrite) else 200)
    assert len(records(store)) == 1


@pairwise(
    browser=GATEWAYS,
    every_request=[False, True],
    touch=[untouched, read, write],
    indirect=["browser"],
)
def test_request_whose_session_moves_meanwhile_changes_no_cookie(
    browser: Browser,
    store: redis.Redis,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    every_request: bool,
    touch: View,
) -> None:
    browser.visit(write)
    monkeypatch.setattr(finish, "LATE_S", 0.0)
    settings.SESSION_SAVE_EVERY_REQUEST = every_request

    def view(request: HttpRequest) -> HttpResponse:
        response = touch(request)
        SessionStore(browser.key).cycle_key()
        if touch is write:
            request.session["n"] = 2
        return response

    response = browser.visit(view)
    assert COOKIE not in response.cookies
    assert response.status_code == (400 if touch is write else 200)
    assert len(records(store)) == 1


class Held:
    """Something that an answer has open until it is closed."""

    is_closed = False

    def __iter__(self) -> Iterator[bytes]:
        yield b"body"

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.django_db  # to close an answer is to end the request, and its database connections
def test_answer_that_a_503_replaces_is_closed_with_it(proxy: CountingProxy) -> None:
    held = Held()

    def view(request: HttpRequest) -> Any:
        request.session["n"] = 1
        proxy.refuse()
        return StreamingHttpResponse(held)

    response = ClusteredSessionMiddleware(view)(RequestFactory().get("/"))
    assert response.status_code == 503
    assert not held.is_closed
    response.close()
    assert held.is_closed


# Logging in and out.


@pytest.fixture
def user(db: None, settings: Any) -> User:
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
    return User.objects.create_user("ada", password="analytical")


def log_in(request: HttpRequest) -> HttpResponse:
    login(request, authenticate(request, username="ada", password="analytical"))
    return HttpResponse()


async def alog_in(request: HttpRequest) -> HttpResponse:
    user = await User.objects.aget(username="ada")
    await alogin(request, user, "django.contrib.auth.backends.ModelBackend")
    return HttpResponse()


def log_out(request: HttpRequest) -> HttpResponse:
    logout(request)
    return HttpResponse()


def who(request: HttpRequest) -> HttpResponse:
    return HttpResponse(f"{request.user} {sorted(request.session.get('cart', {}))}")


def fill_cart(request: HttpRequest) -> HttpResponse:
    request.session.setdefault("cart", {})["tea"] = 1
    return HttpResponse()


@on(("wsgi", log_in), ("asgi", log_in), ("asgi", alog_in))
def test_login_moves_the_session_to_a_new_key_with_its_cart(
    browser: Browser, store: redis.Redis, user: User, view: View
) -> None:
    browser.visit(fill_cart)
    before = browser.key
    browser.visit(view)
    assert browser.key not in ("", before)
    assert records(store) == [place(browser.key).record.encode()]
    assert browser.visit(who).content == b"ada ['tea']"
    response = browser.visit(log_out)
    assert is_deletion(cookie_of(response))
    assert records(store) == []
    assert browser.visit(who).content == b"AnonymousUser []"


def test_login_keeps_values_that_this_release_cannot_read(
    browser: Browser, store: redis.Redis, user: User
) -> None:
    browser.visit(fill_cart)
    foreign = b"versions?from a later release"
    store.hset(place(browser.key).record, "d:later", foreign)
    browser.visit(who)
    browser.visit(log_in)
    assert store.hget(place(browser.key).record, "d:later") == foreign


def test_login_without_a_session_makes_one(
    browser: Browser, store: redis.Redis, user: User
) -> None:
    browser.visit(log_in)
    assert browser.visit(who).content == b"ada []"
    assert len(records(store)) == 1


def test_login_as_somebody_else_takes_nothing_over(
    browser: Browser, store: redis.Redis, user: User
) -> None:
    browser.visit(log_in)
    browser.visit(fill_cart)
    other = User.objects.create_user("eve")

    def view(request: HttpRequest) -> HttpResponse:
        login(request, other, "django.contrib.auth.backends.ModelBackend")
        return HttpResponse()

    before = browser.key
    browser.visit(view)
    assert browser.key != before
    assert browser.visit(who).content == b"eve []"
    assert len(records(store)) == 1


@on(("wsgi", False), ("asgi", True), name="in_between")
def test_two_clicks_on_log_in_both_log_in_with_the_cart(
    browser: Browser, user: User, in_between: bool
) -> None:
    browser.visit(fill_cart)
    tab = browser.another_tab()

    def second(request: HttpRequest) -> HttpResponse:
        request.session["cart"]
        if in_between:
            request.session["cart"]["cup"] = 1
        tab.visit(log_in)
        return log_in(request)

    assert browser.visit(second).status_code == 200
    assert tab.visit(who).content == b"ada ['tea']"
    expected = b"ada ['cup', 'tea']" if in_between else b"ada ['tea']"
    assert browser.visit(who).content == expected
    assert tab.key != browser.key


def test_login_into_a_session_that_was_ended_is_no_login(
    browser: Browser, store: redis.Redis, user: User
) -> None:
    browser.visit(fill_cart)

    def view(request: HttpRequest) -> HttpResponse:
        request.session["cart"]
        SessionStore().delete(request.session.session_key)
        return log_in(request)

    assert browser.visit(view).status_code == 400
    assert records(store) == []


def test_login_page_of_the_admin_works(browser: Browser, settings: Any, user: User) -> None:
    user.is_staff = user.is_superuser = True
    user.save()
    settings.ROOT_URLCONF = (path("admin/", admin.site.urls),)
    page = "/admin/auth/user/"
    credentials = {"username": "ada", "password": "analytical", "next": page}
    assert browser.request(page).status_code == 302
    assert browser.request("/admin/login/", "post", data=credentials).headers["Location"] == page
    assert "analytical" not in browser.request(page).content.decode()
    assert browser.request(page).context["user"].get_username() == "ada"
    browser.request("/admin/logout/", "post")
    assert browser.request(page).status_code == 302


# Parts of Django that keep things in the session.


def test_messages_are_shown_once(browser: Browser, settings: Any) -> None:
    settings.MESSAGE_STORAGE = "django.contrib.messages.storage.session.SessionStorage"

    def say(request: HttpRequest) -> HttpResponse:
        messages.info(request, "added to the cart")
        return HttpResponse()

    def show(request: HttpRequest) -> HttpResponse:
        return HttpResponse(", ".join(map(str, messages.get_messages(request))))

    for _ in range(2):
        browser.visit(say)
    assert browser.visit(show).content == b"added to the cart, added to the cart"
    assert browser.visit(show).content == b""


def test_csrf_token_in_the_session_is_checked(browser: Browser, settings: Any) -> None:
    settings.CSRF_USE_SESSIONS = True
    settings.MIDDLEWARE = [*settings.MIDDLEWARE, "django.middleware.csrf.CsrfViewMiddleware"]
    browser.client.handler.enforce_csrf_checks = True

    def form(request: HttpRequest) -> HttpResponse:
        return HttpResponse(get_token(request))

    token = browser.visit(form).content.decode()
    assert browser.visit(write, "post", data={}).status_code == 403
    response = browser.visit(write, "post", data={"csrfmiddlewaretoken": token})
    assert response.status_code == 200
    assert browser.visit(read).content == b"1"


# What a site does to its sessions.


def test_request_without_a_session_passes(browser: Browser) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        del request.session
        return HttpResponse("passed")

    assert browser.visit(view).content == b"passed"


def test_session_that_the_view_replaced_is_the_one_that_counts(
    browser: Browser, store: redis.Redis
) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        request.session = SessionStore()
        request.session["n"] = 2
        return HttpResponse()

    browser.visit(write)
    before = browser.key
    browser.visit(view)
    assert browser.key != before
    assert browser.visit(read).content == b"2"
    assert SessionStore(before).load() == {"n": 1}


def test_body_is_streamed_after_the_session_was_saved(browser: Browser, store: redis.Redis) -> None:
    def view(request: HttpRequest) -> StreamingHttpResponse:
        request.session["n"] = 1

        def body() -> Iterator[bytes]:
            yield repr(SessionStore(request.session.session_key).load()).encode()

        async def abody() -> AsyncIterator[bytes]:
            yield repr(await SessionStore(request.session.session_key).aload()).encode()

        return StreamingHttpResponse(abody() if browser.asgi else body())

    response = browser.visit(view)
    assert response.getvalue() == b"{'n': 1}" if not browser.asgi else True
    assert SessionStore(browser.key).load() == {"n": 1}


class Stamping(ClusteredSessionMiddleware):
    """A site's own middleware, in the way that Django's documentation of 1.10 shows."""

    def process_request(self, request: HttpRequest) -> None:
        super().process_request(request)
        request.stamped = True

    def process_response(self, request: HttpRequest, response: Any) -> Any:
        response = super().process_response(request, response)
        response["X-Stamp"] = str(request.stamped)
        return response


@on(("wsgi", write), ("asgi", write), ("asgi", awrite))
def test_subclass_with_its_own_hooks_has_them_called(
    browser: Browser, settings: Any, view: View
) -> None:
    settings.MIDDLEWARE = [f"{__name__}.Stamping"]
    assert browser.visit(view)["X-Stamp"] == "True"
    assert browser.visit(aread).content == b"1"


# A view that puts another session into the request.


@pytest.mark.parametrize("change", [True, False])
def test_session_put_into_the_request_is_saved(
    browser: Browser, settings: Any, store: redis.Redis, change: bool
) -> None:
    """And the lock of the one that was there is free."""
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    settings.SESSION_SAVE_EVERY_REQUEST = True
    browser.visit(write)
    old = place(browser.key).record

    def replace(request: HttpRequest) -> HttpResponse:
        assert request.session["n"] == 1
        assert store.hget(old, "m:lock")
        request.session = SessionStore(request.session.session_key)
        if change:
            request.session["n"] = 2
        return HttpResponse()

    response = browser.visit(replace)
    assert (response.status_code, cookie_of(response).value) == (200, browser.key)
    assert store.hget(old, "m:lock") is None
    assert SessionStore(browser.key)["n"] == (2 if change else 1)


@pytest.mark.parametrize("end", ["answer", "error", "interrupt"])
def test_lock_of_a_session_that_is_taken_away_is_free(
    browser: Browser, settings: Any, store: redis.Redis, end: str
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    browser.visit(write)

    def take_away(request: HttpRequest) -> HttpResponse:
        assert request.session["n"] == 1
        request.session = None if end == "answer" else SessionStore()
        if end == "interrupt":
            raise KeyboardInterrupt
        if end == "error":
            raise ValueError
        return HttpResponse()

    browser.client.raise_request_exception = False
    with suppress(KeyboardInterrupt):
        browser.visit(take_away)
    assert store.hget(place(browser.key).record, "m:lock") is None


# Other engines, and Django's own middleware.

ENGINES = "django.contrib.sessions.backends."


def raise_update_error(request: HttpRequest) -> HttpResponse:
    raise UpdateError


@pytest.mark.django_db
# Under ASGI only a database tells that it is asked outside of a thread.
@on(("wsgi", "signed_cookies"), ("wsgi", "cache"), ("asgi", "db"), ("asgi", "file"), name="engine")
def test_other_engines_behave_as_under_djangos_middleware(
    browser: Browser, settings: Any, engine: str, tmp_path: Any
) -> None:
    settings.SESSION_ENGINE = ENGINES + engine
    settings.SESSION_CACHE_ALIAS = "default"
    settings.SESSION_FILE_PATH = str(tmp_path)
    views = (read, write, awrite, read, aread, answering(500), raise_update_error, flush, read)
    seen = []
    for path_ in (OURS, STOCK):
        settings.MIDDLEWARE = [path_]
        visitor = Browser(settings, asgi=browser.asgi)
        responses = [visitor.visit(view) for view in views]
        seen.append(
            [
                (
                    response.status_code,
                    response.get("Vary"),
                    bool(response.cookies) and bool(cookie_of(response).value),
                    response.content if response.status_code == 200 else None,
                )
                for response in responses
            ]
        )
    assert seen[0] == seen[1]


def test_engine_works_under_djangos_own_middleware(
    browser: Browser, settings: Any, store: redis.Redis, user: User
) -> None:
    settings.MIDDLEWARE = [STOCK, *settings.MIDDLEWARE[1:]]
    browser.visit(fill_cart)
    before = browser.key
    browser.visit(log_in)
    assert browser.key != before
    assert browser.visit(who).content == b"ada ['tea']"
    settings.SESSION_SAVE_EVERY_REQUEST = True
    assert cookie_of(browser.visit(untouched)).value == browser.key
    assert is_deletion(cookie_of(browser.visit(log_out)))
    assert records(store) == []


# Without a thread.


async def test_asynchronous_request_never_leaves_its_thread(
    store: redis.Redis, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = True
    hops: list[object] = []
    hop = asgiref.sync.SyncToAsync.__call__

    async def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        hops.append(self.func)
        return await hop(self, *args, **kwargs)

    async def end(request: HttpRequest) -> HttpResponse:
        await request.session.aflush()
        return HttpResponse()

    async def mutate(request: HttpRequest) -> HttpResponse:
        (await request.session.aget("cart", {}))["tea"] = 1
        await request.session.acycle_key()
        await request.session.aset_expiry(100)
        assert 90 < await request.session.aget_expiry_age() <= 100
        return HttpResponse()

    monkeypatch.setattr(asgiref.sync.SyncToAsync, "__call__", counting)
    cookies: dict[str, str] = {}
    for view in (awrite, aread, mutate, end):
        middleware = ClusteredSessionMiddleware(view)
        request = AsyncRequestFactory().get("/")
        request.COOKIES = dict(cookies)
        response = await middleware(request)
        assert response.status_code == 200
        cookies = {COOKIE: cookie_of(response).value}
    assert hops == []
    # And the counter counts: a synchronous view under ASGI does leave the thread.
    settings.ROOT_URLCONF = (path("", write),)
    await AsyncClient().get("/")
    assert hops


#: What asks the store, and what to await instead.
TWINS: dict[str, tuple[Callable[[SessionStore], Any], str]] = {
    "[]": (lambda session: session["n"], "aget()"),
    "in": (lambda session: "n" in session, "aget()"),
    "get": (lambda session: session.get("n"), "aget()"),
    "set": (lambda session: session.__setitem__("n", 1), "aset()"),
    "keys": (lambda session: session.keys(), 'the "a" twin of what was called'),
    "get_expiry_age": (lambda session: session.get_expiry_age(), 'the "a" twin'),
    "set_expiry": (lambda session: session.set_expiry(5), 'the "a" twin'),
    "increment": (lambda session: session.increment("n"), "aincrement()"),
    "pop": (lambda session: session.pop("n"), "apop()"),
    "load": (lambda session: session.load(), "aload()"),
    "save": (lambda session: session.save(), "asave()"),
    "create": (lambda session: session.create(), "acreate()"),
    "cycle_key": (lambda session: session.cycle_key(), "acycle_key()"),
    "flush": (lambda session: session.flush(), "aflush()"),
    "delete": (lambda session: session.delete("x" * 32), "adelete()"),
    "exists": (lambda session: session.exists("x" * 32), "aexists()"),
    "expires_at": (lambda session: session.expires_at(), "aexpires_at()"),
    "lock": (lambda session: session.lock().__enter__(), "alock()"),
}


@pytest.mark.parametrize("name", TWINS)
async def test_synchronous_use_on_an_event_loop_names_its_twin(
    store: redis.Redis, name: str
) -> None:
    use, twin = TWINS[name]
    with pytest.raises(SynchronousOnlyOperation) as caught:
        use(SessionStore("x" * 32))
    assert re.search(r"await request\.session\.a\w+\(", str(caught.value))
    assert twin in str(caught.value)
    for named in re.findall(r"\b(a\w+)\(\)", str(caught.value)):
        assert inspect.iscoroutinefunction(getattr(SessionStore, named)) or named == "alock"


async def test_session_that_a_twin_has_loaded_is_used_without(store: redis.Redis) -> None:
    """The advice holds: the same call does not meet the same error again."""
    stored = SessionStore()
    await stored.aset("n", 1)
    await stored.acreate()
    session = SessionStore(stored.session_key)
    with pytest.raises(SynchronousOnlyOperation, match="once one of them has loaded the session"):
        session["n"]
    await session.aget("anything")
    assert session["n"] == 1
    assert session.increment("n") == 2
    session["m"] = session.get_expiry_age()


def test_request_costs_no_connection_before_its_session_is_used(settings: Any) -> None:
    # The settings of the tests name a port that refuses.
    middleware = ClusteredSessionMiddleware(untouched)
    request = RequestFactory().get("/", HTTP_COOKIE=f"{COOKIE}={'x' * 32}")
    assert middleware(request).status_code == 200


def test_redirect_after_a_change_keeps_it(browser: Browser) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 1
        return HttpResponseRedirect("/")

    browser.visit(view)
    assert browser.visit(read).content == b"1"


async def test_cancelled_request_leaves_no_reply_for_the_next(store: redis.Redis) -> None:
    one, two = SessionStore(), SessionStore()
    for number, session in enumerate((one, two)):
        await session.aset("n", number)
        await session.acreate()

    async def load(session: SessionStore) -> Any:
        return await SessionStore(session.session_key).aget("n")

    for turns in range(30):
        task = asyncio.create_task(load(one))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await load(two) == 1


@pytest.mark.parametrize("locking", ["off", "all"])
@pytest.mark.parametrize("view", [read, write, flush])
def test_request_ends_with_its_answer(
    store: redis.Redis, settings: Any, view: View, locking: str
) -> None:
    """Not when Python looks for cycles: what was uploaded with it would stay until then."""
    settings.CLUSTERED_SESSIONS_LOCKING = locking
    session = SessionStore()
    session["n"] = 0
    session.save()
    answer = ClusteredSessionMiddleware(view)
    request = RequestFactory(headers={"cookie": f"{COOKIE}={session.session_key}"}).get("/")
    gc.disable()
    try:
        answer(request)
        gone = weakref.ref(request), weakref.ref(request.session)
        del request
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("locking", ["off", "all"])
async def test_asynchronous_request_ends_with_its_answer(
    store: redis.Redis, settings: Any, locking: str
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = locking
    session = SessionStore()
    await session.aset("n", 0)
    await session.asave()
    answer = ClusteredSessionMiddleware(awrite)
    factory = AsyncRequestFactory(headers={"cookie": f"{COOKIE}={session.session_key}"})
    request = factory.get("/")
    gc.disable()
    try:
        await answer(request)
        gone = weakref.ref(request), weakref.ref(request.session)
        del request
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


def test_app_that_is_not_installed_is_told_in_the_log(
    browser: Browser, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> list[str]:
        # Not all messages: in development mode a loop on a busy machine complains of slow steps.
        ours = [record for record in caplog.records if record.name == "django_clustered_sessions"]
        return [record.getMessage() for record in ours]

    assert browser.visit(write).status_code == 200
    assert told() == []
    settings.INSTALLED_APPS = [
        app for app in settings.INSTALLED_APPS if app != "django_clustered_sessions"
    ]
    another = browser.another_tab()
    assert another.visit(read).status_code == 200
    assert another.visit(read).status_code == 200
    (line,) = told()
    assert line.startswith("django_clustered_sessions is not in INSTALLED_APPS")
    assert "add it there" in line
