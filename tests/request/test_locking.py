"""Locking in whole requests, under WSGI and ASGI: modes, decorators, headers, caps, errors."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from inspect import iscoroutinefunction
from typing import Any

import pytest
import redis
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.middleware.csrf import get_token
from django.template import engines
from django.test import AsyncClient, AsyncRequestFactory, Client, RequestFactory, override_settings
from django.urls import path
from django.utils.decorators import method_decorator
from django.views import View as ClassBasedView
from redis import asyncio as aioredis

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.decorators import (
    session_locked,
    session_no_touch,
    session_read_only,
    session_unlocked,
)
from django_clustered_sessions.exceptions import (
    SessionLockLost,
    SessionLockTimeout,
    SessionReadOnly,
)
from django_clustered_sessions.middleware import ClusteredSessionMiddleware
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.session import leases, lock
from django_clustered_sessions.session.request_policy import HEADER, write_header
from tests.gateways import GATEWAYS, Browser, View, on, place, records
from tests.locking import (
    BOUND_S,
    ELSEWHERE,
    Threads,
    claim,
    free,
    new_session,
    new_token,
    outcome,
    owner,
    queue,
    seize,
    wait_for_queue,
    wait_for_sleepers,
)
from tests.pairs import pairwise
from tests.servers import wait_for

COOKIE = "sessionid"
OURS = "django_clustered_sessions.middleware.ClusteredSessionMiddleware"
HERE = "tests.request.test_locking."

Decorator = Callable[[View], View]


@pytest.fixture(autouse=True)
def patience(settings: Any) -> None:
    """Let a slow machine take its time: nothing here is to end by a bound that is not said."""
    # Not the 15 s of all tests: whose turn went unheard asks again after half of it.
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 5.0
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = BOUND_S
    settings.CLUSTERED_SESSIONS_NODE_NAME = "web-1"


@pytest.fixture(params=GATEWAYS)
def browser(request: pytest.FixtureRequest, store: redis.Redis, settings: Any) -> Browser:
    """Visit with the cookie of a session that is stored: ``n`` is 0, ``cart`` an empty list."""
    found = Browser(settings, asgi=request.param == "asgi")
    found.key = new_session(n=0, cart=[])
    return found


def halves(view: View, aview: View) -> pytest.MarkDecorator:
    """Return a mark for a view that is written twice, each half on the gateway of its kind."""
    return on(("wsgi", view), ("asgi", aview))


def waiting_here(key: str) -> int:
    """Return how many of this process wait for a session's lock."""
    return leases.waiting_room.waiting(place(key).record)


def stored(key: str) -> dict[str, Any]:
    return SessionStore(key).load()


def is_locked(request: HttpRequest) -> HttpResponse:
    request.session.get("n")
    return HttpResponse(repr(request.session.is_locked))


async def ais_locked(request: HttpRequest) -> HttpResponse:
    await request.session.aget("n")
    return HttpResponse(repr(request.session.is_locked))


def untouched(request: HttpRequest) -> HttpResponse:
    return HttpResponse("untouched")


def change(request: HttpRequest) -> HttpResponse:
    request.session["n"] = 1
    request.session["cart"].append("tea")
    return HttpResponse(repr(request.session.is_locked))


async def achange(request: HttpRequest) -> HttpResponse:
    await request.session.aset("n", 1)
    (await request.session.aget("cart")).append("tea")
    return HttpResponse(repr(request.session.is_locked))


def flush(request: HttpRequest) -> HttpResponse:
    request.session.flush()
    return HttpResponse()


CHANGED = {"n": 1, "cart": ["tea"]}
UNCHANGED = {"n": 0, "cart": []}


class Toucher:
    """A middleware that uses the session before the view is resolved."""

    sync_capable, async_capable = True, False

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> Any:
        request.session.get("n")
        return self.get_response(request)


class LateToucher(Toucher):
    """One that stands outside of the session's and looks at it once all is done."""

    def __call__(self, request: HttpRequest) -> Any:
        response = self.get_response(request)
        response.headers["X-N"] = repr(request.session.get("n"))
        return response


class Swallower(Toucher):
    """One that makes something of every error."""

    def __call__(self, request: HttpRequest) -> Any:
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse:
        return HttpResponse("never mind")


# Who locks.


# The whole table is in tests/unit/test_request_policy.py.
SAID = {
    "off": ("post", False),
    "write": ("post", True),
    "all": ("get", True),
}


@pairwise(browser=GATEWAYS, view=[is_locked, ais_locked], mode=SAID, indirect=["browser"])
def test_setting_says_who_locks(
    browser: Browser, settings: Any, store: redis.Redis, view: View, mode: str
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = mode
    method, locks = SAID[mode]
    assert browser.visit(view, method).content == repr(locks).encode()
    assert owner(store, browser.key) == ""
    assert store.keys("*:locks") == []


def test_session_that_nobody_touches_is_not_locked(
    browser: Browser, settings: Any, store: redis.Redis
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    key = browser.key
    token = seize(key)
    for cookie in (key, ""):
        browser.key = cookie
        assert browser.visit(untouched).content == b"untouched"
    assert [entry.token for entry in queue(store, key)] == [token]


def test_readers_wait_for_nobody(browser: Browser, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "write"
    seize(browser.key)
    assert browser.visit(is_locked).content == b"False"


@pytest.mark.parametrize("view", [change, achange])
def test_locked_request_writes_and_releases(
    browser: Browser, settings: Any, store: redis.Redis, view: View
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    assert browser.visit(view).content == b"True"
    assert stored(browser.key) == CHANGED
    assert owner(store, browser.key) == ""
    assert store.keys("*:locks") == []


def test_new_session_of_a_locked_request_is_stored(
    browser: Browser, settings: Any, store: redis.Redis
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"

    def view(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 1
        return HttpResponse()

    browser.key = ""
    browser.visit(view)
    assert stored(browser.key) == {"n": 1}
    assert owner(store, browser.key) == ""


def test_locked_requests_come_one_after_the_other(
    browser: Browser, settings: Any, threads: Threads
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    settings.CLUSTERED_SESSIONS_LOCK_MAX_WAITERS = 64
    settings.ROOT_URLCONF = (path("", count),)

    def visit(tab: Browser) -> list[int]:
        return [tab.request("/").status_code for _ in range(5)]

    visits = [threads.start(visit, browser.another_tab()) for _ in range(6)]
    assert {status for visit in visits for status in outcome(visit)} == {200}
    assert stored(browser.key)["n"] == 30


def count(request: HttpRequest) -> HttpResponse:
    request.session["n"] += 1
    return HttpResponse()


def hidden(decorate: Decorator) -> Decorator:
    """Put a decorator around, which shows nothing of what it decorates."""

    def around(view: View) -> View:
        marked = decorate(view)

        async def aother(request: HttpRequest) -> Any:
            return await marked(request)

        return aother if iscoroutinefunction(view) else lambda request: marked(request)

    return around


def class_based(decorate: Decorator) -> Decorator:
    def around(view: View) -> View:
        @method_decorator(decorate, name="dispatch")
        class Page(ClassBasedView):
            def get(self, request: HttpRequest) -> Any:
                return view(request)

            post = get

        return Page.as_view()

    return around


def class_based_method(decorate: Decorator) -> Decorator:
    def around(view: View) -> View:
        class Page(ClassBasedView):
            @method_decorator(decorate)
            def get(self, request: HttpRequest) -> Any:
                return view(request)

            post = get

        return Page.as_view()

    return around


def class_based_method_as_it_is(decorate: Decorator) -> Decorator:
    """Decorate a method without ``method_decorator``: the decorator gets the instance first."""

    def around(view: View) -> View:
        class Page(ClassBasedView):
            @decorate
            def get(self, request: HttpRequest) -> Any:
                return view(request)

            post = get

        return Page.as_view()

    return around


def async_class_based(decorate: Decorator) -> Decorator:
    def around(view: View) -> View:
        @method_decorator(decorate, name="dispatch")
        class Page(ClassBasedView):
            async def get(self, request: HttpRequest) -> Any:
                return await ais_locked(request)

            post = get

        return Page.as_view()

    return around


def plain(decorate: Decorator) -> Decorator:
    return decorate


FORMS: dict[str, tuple[Callable[[Decorator], Decorator], View]] = {
    "function": (plain, is_locked),
    "async": (plain, ais_locked),
    "hidden": (hidden, is_locked),
    "hidden async": (hidden, ais_locked),
    "class": (class_based, is_locked),
    "method": (class_based_method, is_locked),
    "method as it is": (class_based_method_as_it_is, is_locked),
    "async class": (async_class_based, ais_locked),
}

#: What each decorator says under each setting is in tests/unit/test_request_policy.py.
MARKS: dict[str, tuple[str, Decorator, bool]] = {
    "locked": ("off", session_locked, True),
    "unlocked": ("all", session_unlocked, False),
    "read only": ("all", session_read_only, False),
}


@pairwise(browser=GATEWAYS, form=FORMS, mark=["locked", "read only"], indirect=["browser"])
def test_view_says_otherwise(
    browser: Browser, settings: Any, store: redis.Redis, form: str, mark: str
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING, decorate, locks = MARKS[mark]
    around, view = FORMS[form]
    page = around(decorate)(view)
    for method in ("get", "post"):
        assert browser.visit(page, method).content == repr(locks).encode()
    assert owner(store, browser.key) == ""


@pairwise(browser=GATEWAYS, form=[plain, class_based], mark=MARKS, indirect=["browser"])
def test_middleware_that_touches_first_finds_the_views_mark(
    browser: Browser, settings: Any, form: Callable[[Decorator], Decorator], mark: str
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING, decorate, locks = MARKS[mark]
    settings.MIDDLEWARE = [OURS, HERE + "Toucher"]
    if not locks:
        # It would wait, in vain.
        settings.CLUSTERED_SESSIONS_LOCK_WAIT = 0.2
        seize(browser.key)
    assert browser.visit(form(decorate)(is_locked)).content == repr(locks).encode()


@halves(change, achange)
def test_hidden_mark_takes_the_lock_when_the_view_begins(
    browser: Browser, settings: Any, store: redis.Redis, view: View
) -> None:
    settings.MIDDLEWARE = [OURS, HERE + "Toucher"]
    assert browser.visit(hidden(session_locked)(view)).content == b"True"
    assert stored(browser.key) == CHANGED
    assert owner(store, browser.key) == ""


@halves(change, achange)
def test_hidden_mark_gives_up_the_lock_when_the_view_begins(
    browser: Browser, settings: Any, store: redis.Redis, view: View
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    settings.MIDDLEWARE = [OURS, HERE + "Toucher"]
    assert browser.visit(hidden(session_read_only)(view)).content == b"False"
    assert stored(browser.key) == UNCHANGED
    assert browser.visit(hidden(session_unlocked)(view)).content == b"False"
    assert stored(browser.key) == CHANGED


def test_csrf_token_in_the_session_is_no_reason_to_lock(browser: Browser, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    settings.CSRF_USE_SESSIONS = True
    settings.MIDDLEWARE = [OURS, "django.middleware.csrf.CsrfViewMiddleware"]
    browser.client.handler.enforce_csrf_checks = True

    def form(request: HttpRequest) -> HttpResponse:
        return HttpResponse(get_token(request))

    token = browser.visit(form).content.decode()
    assert browser.visit(is_locked, "post").status_code == 403
    for view, locks in ((is_locked, b"True"), (session_read_only(is_locked), b"False")):
        response = browser.visit(view, "post", headers={"X-CSRFToken": token})
        assert response.content == locks
    seize(browser.key)
    assert browser.visit(session_read_only(is_locked)).content == b"False"


# Views that only read.


@pairwise(
    browser=GATEWAYS,
    form=[plain, hidden, class_based],
    touched_first=[False, True],
    mode=["off", "all"],
    indirect=["browser"],
)
def test_change_by_a_view_that_only_reads_is_refused_and_logged(
    browser: Browser,
    settings: Any,
    caplog: pytest.LogCaptureFixture,
    form: Callable[[Decorator], Decorator],
    touched_first: bool,
    mode: str,
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = mode
    settings.MIDDLEWARE = [OURS, *([HERE + "Toucher"] if touched_first else [])]
    settings.ROOT_URLCONF = (path("page/<str:secret>/", with_secret(form(session_read_only))),)
    response = browser.request("/page/hunter2/")
    assert response.status_code == 200
    assert stored(browser.key) == UNCHANGED
    (line,) = [r.getMessage() for r in caplog.records if "session_read_only" in r.getMessage()]
    assert "GET /page/<str:secret>/" in line
    assert "hunter2" not in line


def with_secret(decorate: Decorator) -> View:
    view = decorate(change)

    def page(request: HttpRequest, secret: str) -> Any:
        return view(request)

    page.__dict__.update(vars(view))
    return page


@halves(change, achange)
def test_change_by_a_read_only_view_is_an_error_in_development(
    browser: Browser, settings: Any, view: View
) -> None:
    settings.DEBUG = True
    browser.client.raise_request_exception = True
    with pytest.raises(SessionReadOnly, match="marked session_read_only"):
        browser.visit(session_read_only(view))
    assert stored(browser.key) == UNCHANGED


def test_view_that_only_reads_creates_no_session(browser: Browser, store: redis.Redis) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 1
        return HttpResponse()

    SessionStore(browser.key).flush()
    browser.key = ""
    response = browser.visit(session_read_only(view))
    assert response.status_code == 200
    assert COOKIE not in response.cookies
    assert records(store) == []


def test_view_that_only_reads_may_log_out(browser: Browser, store: redis.Redis) -> None:
    response = browser.visit(session_read_only(flush))
    assert response.status_code == 200
    assert response.cookies[COOKIE].value == ""
    assert records(store) == []


# Views that are no use of the session.


RENEWS = {"SESSION_SAVE_EVERY_REQUEST": True, "CLUSTERED_SESSIONS_IDLE_TIMEOUT": 3000}

NO_TOUCH: dict[str, Decorator] = {
    "function": session_no_touch,
    "class": class_based(session_no_touch),
    "outside": lambda view: session_no_touch(session_read_only(view)),
    "inside": lambda view: session_read_only(session_no_touch(view)),
    "hidden": lambda view: hidden(session_no_touch)(session_locked(view)),
}


def lifetime(store: redis.Redis, key: str) -> tuple[Any, Any]:
    record = place(key).record
    return store.hget(record, "m:"), store.pexpiretime(record)


@pairwise(
    browser=GATEWAYS,
    renews=RENEWS,
    touched_first=[False, True],
    decorate=NO_TOUCH,
    view=[untouched, is_locked],
    indirect=["browser"],
)
def test_view_that_does_not_touch_renews_nothing(
    browser: Browser,
    settings: Any,
    store: redis.Redis,
    renews: str,
    touched_first: bool,
    decorate: str,
    view: View,
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    settings.SESSION_COOKIE_AGE = 5000
    setattr(settings, renews, RENEWS[renews])
    page = NO_TOUCH[decorate](view)
    if touched_first and hasattr(page, "clustered_session"):
        settings.MIDDLEWARE = [OURS, HERE + "Toucher"]
    before = lifetime(store, browser.key)
    response = browser.visit(page)
    assert response.status_code == 200
    assert COOKIE not in response.cookies
    assert lifetime(store, browser.key) == before
    # And without the mark it is a use.
    assert COOKIE in browser.visit(is_locked).cookies
    assert lifetime(store, browser.key) != before


BOTH_MARKS: dict[str, Decorator] = {
    "no touch inside": lambda view: session_read_only(session_no_touch(view)),
    "no touch outside": lambda view: session_no_touch(session_read_only(view)),
    "no touch hidden": lambda view: hidden(session_no_touch)(session_read_only(view)),
    "read only hidden": lambda view: session_no_touch(hidden(session_read_only)(view)),
}


@on(*zip(GATEWAYS * 2, BOTH_MARKS, strict=True), name="marks")
def test_marks_add_up(
    browser: Browser, settings: Any, caplog: pytest.LogCaptureFixture, marks: str
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = True
    decorate = BOTH_MARKS[marks]
    assert COOKIE not in browser.visit(decorate(untouched)).cookies
    browser.visit(decorate(change))
    assert stored(browser.key) == UNCHANGED
    assert "session_read_only" in caplog.text


# When the lock is another's.


def visiting(threads: Threads, browser: Browser, method: str = "get") -> Future[Any]:
    return threads.start(browser.another_tab().request, "/", method)


@halves(change, achange)
def test_request_waits_for_its_turn(
    browser: Browser, settings: Any, store: redis.Redis, threads: Threads, view: View
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    settings.ROOT_URLCONF = (path("", view),)
    token = seize(browser.key)
    visit = visiting(threads, browser)
    wait_for_queue(store, browser.key, 1)
    wait_for_sleepers(store, 1)
    free(browser.key, token)
    assert outcome(visit).content == b"True"
    assert stored(browser.key) == CHANGED


def test_wait_is_bounded(
    browser: Browser, settings: Any, store: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 0.2
    token = seize(browser.key)
    response = browser.visit(change)
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) > 0
    assert COOKIE not in response.cookies
    assert stored(browser.key) == UNCHANGED
    assert [entry.token for entry in queue(store, browser.key)] == [token]
    assert ELSEWHERE in caplog.text
    assert browser.key not in caplog.text


def test_one_waiter_too_many_for_the_session_is_refused_at_once(
    browser: Browser, settings: Any, store: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    settings.CLUSTERED_SESSIONS_LOCK_MAX_WAITERS = 1
    tokens = [seize(browser.key), new_token()]
    claim(browser.key, tokens[1])
    response = browser.visit(change)
    assert response.status_code == 429
    assert int(response.headers["Retry-After"]) > 0
    assert [entry.token for entry in queue(store, browser.key)] == tokens
    assert stored(browser.key) == UNCHANGED
    assert "1 requests wait for it already" in caplog.text


def test_one_waiter_too_many_for_the_process_is_refused_at_once(
    browser: Browser,
    settings: Any,
    store: redis.Redis,
    threads: Threads,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    settings.ROOT_URLCONF = (path("", count),)
    token = seize(browser.key)
    waiting = []
    for number in (1, 2):
        waiting.append(visiting(threads, browser))
        wait_for_queue(store, browser.key, number)
        # The process counts it once the store has answered.
        wait_for(lambda: waiting_here(browser.key) == len(waiting), "it counts")
    response = browser.request("/")
    assert response.status_code == 429
    assert int(response.headers["Retry-After"]) > 0
    assert "2 requests of this process wait for it already" in caplog.text
    assert "An eighth of CLUSTERED_SESSIONS_LOCK_MAX_WAITERS may wait" in caplog.text
    assert len(queue(store, browser.key)) == 3
    # It counts for each session alone.
    other = browser.another_tab()
    other.key = new_session(n=0)
    assert other.request("/").status_code == 200
    free(browser.key, token)
    assert [outcome(visit).status_code for visit in waiting] == [200, 200]
    assert stored(browser.key)["n"] == 2
    assert not waiting_here(browser.key)


def test_template_that_swallows_the_refusal_is_replaced(browser: Browser, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    settings.CLUSTERED_SESSIONS_LOCK_MAX_WAITERS = 0
    template = engines["django"].from_string(
        "{% if request.session.user %}in{% else %}out{% endif %}"
    )

    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse(template.render({"request": request}))

    assert browser.visit(view).content == b"out"
    seize(browser.key)
    response = browser.visit(view)
    assert response.status_code == 429
    assert "Retry-After" in response.headers
    settings.CLUSTERED_SESSIONS_LOCK_MAX_WAITERS = 1
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 0.1
    assert browser.visit(view).status_code == 503


def test_one_who_was_told_that_it_is_locked_does_not_wait_again(
    browser: Browser, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 0.1
    seize(browser.key)
    waits = []
    monkeypatch.setattr(
        counters, "add", lambda **counts: waits.append(counts.get("lock_timeouts", 0))
    )

    def view(request: HttpRequest) -> HttpResponse:
        for _ in range(3):
            with pytest.raises(SessionLockTimeout):
                request.session["n"]
        return HttpResponse()

    assert browser.visit(view).status_code == 503
    assert sum(waits) == 1


# Writers without a lock.


@halves(change, achange)
def test_unlocked_change_waits_for_the_holder_outside_the_caps(
    browser: Browser, settings: Any, store: redis.Redis, threads: Threads, view: View
) -> None:
    settings.CLUSTERED_SESSIONS_LOCK_MAX_WAITERS = 0
    settings.ROOT_URLCONF = (path("", view),)
    token = seize(browser.key)
    visit = visiting(threads, browser)
    wait_for_queue(store, browser.key, 1)
    assert stored(browser.key) == UNCHANGED
    free(browser.key, token)
    assert outcome(visit).content == b"False"
    assert stored(browser.key) == CHANGED
    assert owner(store, browser.key) == ""


def test_unlocked_change_that_waits_in_vain_is_a_503(
    browser: Browser, settings: Any, store: redis.Redis
) -> None:
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 0.1
    token = seize(browser.key)
    response = browser.visit(change)
    assert response.status_code == 503
    assert "Retry-After" in response.headers
    assert stored(browser.key) == UNCHANGED
    assert [entry.token for entry in queue(store, browser.key)] == [token]


def test_logout_does_not_wait_and_the_holder_gets_a_400(
    browser: Browser, settings: Any, store: redis.Redis
) -> None:
    tab = browser.another_tab()

    def slow(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 1
        assert request.session.is_locked
        settings.ROOT_URLCONF = (path("", session_unlocked(flush)),)
        assert tab.request("/").cookies[COOKIE].value == ""
        return HttpResponse()

    response = browser.visit(session_locked(slow))
    assert response.status_code == 400
    assert records(store) == []
    assert store.keys("*:locks") == []


def test_request_that_waits_for_a_session_that_ends_has_none(
    browser: Browser, settings: Any, store: redis.Redis, threads: Threads
) -> None:
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 10 * BOUND_S
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 5 * BOUND_S
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    settings.ROOT_URLCONF = (path("", is_locked),)
    seize(browser.key)
    visit = visiting(threads, browser)
    wait_for_queue(store, browser.key, 1)
    wait_for_sleepers(store, 1)
    SessionStore(browser.key).flush()
    response = outcome(visit)
    assert response.content == b"False"
    assert response.cookies[COOKIE].value == ""


def test_renewal_by_every_request_does_not_wait(
    browser: Browser, settings: Any, store: redis.Redis
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = True
    settings.SESSION_COOKIE_AGE = 5000
    token = seize(browser.key)
    for view in (untouched, is_locked):
        assert browser.visit(view).cookies[COOKIE]["max-age"] == 5000
    assert [entry.token for entry in queue(store, browser.key)] == [token]


# A lock that was lost.


def lose(store: redis.Redis, key: str) -> str:
    """Give a session's lock to a request elsewhere; return its token."""
    free(key, owner(store, key))
    return seize(key)


def test_write_without_its_lock_is_a_409_and_logs_the_route(
    browser: Browser, settings: Any, store: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = []

    @session_locked
    def view(request: HttpRequest, secret: str) -> HttpResponse:
        response = change(request)
        tokens.append(lose(store, browser.key))
        return response

    settings.ROOT_URLCONF = (path("page/<str:secret>/", view),)
    response = browser.request("/page/hunter2/")
    assert response.status_code == 409
    assert COOKIE not in response.cookies
    assert stored(browser.key) == UNCHANGED
    assert owner(store, browser.key) == tokens[0]
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("django_clustered")]
    (line,) = [line for line in lines if "was refused" in line]
    assert "web-1 GET /page/<str:secret>/" in line
    assert "lease 8.0 s" in line
    assert ELSEWHERE in line
    assert "hunter2" not in "".join(lines)
    assert browser.key not in caplog.text


def test_view_that_swallows_the_loss_gets_a_409(browser: Browser, store: redis.Redis) -> None:
    @session_locked
    def view(request: HttpRequest) -> HttpResponse:
        change(request)
        lose(store, browser.key)
        with pytest.raises(SessionLockLost):
            request.session.save()
        request.session["m"] = 1
        return HttpResponse("all is well")

    response = browser.visit(view)
    assert response.status_code == 409
    assert stored(browser.key) == UNCHANGED


def test_middleware_that_swallows_the_loss_gets_a_409(
    browser: Browser, settings: Any, store: redis.Redis
) -> None:
    settings.MIDDLEWARE = [OURS, HERE + "Swallower"]

    @session_locked
    def view(request: HttpRequest) -> HttpResponse:
        change(request)
        lose(store, browser.key)
        request.session.save()
        return HttpResponse()

    response = browser.visit(view)
    assert response.status_code == 409
    assert stored(browser.key) == UNCHANGED


# A view that calls its own site.


def call(
    browser: Browser, url: str, headers: dict[str, str] | None = None, method: str = "post"
) -> Any:
    """Send a request for the same session, as a program does that has only its cookie."""
    client = Client(raise_request_exception=False)
    client.cookies[COOKIE] = browser.key
    return getattr(client, method)(url, headers=headers or {})


def inner(request: HttpRequest) -> HttpResponse:
    request.session["cart"].append("inner")
    request.session["inner"] = True
    return HttpResponse(repr(request.session.is_locked))


NESTED: dict[str, Callable[..., Any]] = {
    "same thread": lambda threads, *arguments: call(*arguments),
    "another thread": lambda threads, *arguments: outcome(threads.start(call, *arguments)),
}


@pairwise(
    browser=GATEWAYS,
    nested=NESTED,
    decorate=[plain, session_locked],
    indirect=["browser"],
)
def test_nested_request_runs_under_the_same_lock(
    browser: Browser,
    settings: Any,
    store: redis.Redis,
    threads: Threads,
    nested: str,
    decorate: Decorator,
) -> None:
    @session_locked
    def outer(request: HttpRequest) -> HttpResponse:
        request.session["cart"].append("outer")
        mine = owner(store, browser.key)
        response = NESTED[nested](threads, browser, "/inner/", request.session.lock_headers())
        assert response.status_code == 200
        # It could not give up what is not its own, and what it wrote is there.
        assert owner(store, browser.key) == mine
        assert stored(browser.key)["cart"] == ["inner"]
        return HttpResponse(response.content)

    settings.ROOT_URLCONF = (path("", outer), path("inner/", decorate(inner)))
    assert browser.request("/").content == b"True"
    assert stored(browser.key) == {"n": 0, "cart": ["inner", "outer"], "inner": True}
    assert owner(store, browser.key) == ""
    assert store.keys("*:locks") == []


async def test_nested_request_runs_under_the_same_lock_asynchronously(
    store: redis.Redis, settings: Any
) -> None:
    key = await asyncio.to_thread(new_session, n=0, cart=[])

    @session_locked
    async def outer(request: HttpRequest) -> HttpResponse:
        (await request.session.aget("cart")).append("outer")
        client = AsyncClient()
        client.cookies[COOKIE] = key
        response = await client.get("/inner/", headers=request.session.lock_headers())
        return HttpResponse(response.content)

    @session_locked
    async def ainner(request: HttpRequest) -> HttpResponse:
        (await request.session.aget("cart")).append("inner")
        await request.session.acommit()
        return HttpResponse(repr(owner(store, key) != ""))

    settings.ROOT_URLCONF = (path("", outer), path("inner/", ainner))
    client = AsyncClient()
    client.cookies[COOKIE] = key
    assert (await client.get("/")).content == b"True"
    assert (await SessionStore(key).aload())["cart"] == ["inner", "outer"]
    assert owner(store, key) == ""


def test_nested_request_cannot_release(browser: Browser, settings: Any, store: redis.Redis) -> None:
    @session_locked
    def outer(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 1
        mine = owner(store, browser.key)
        for url in ("/commit/", "/lock/", "/error/"):
            call(browser, url, request.session.lock_headers())
            assert owner(store, browser.key) == mine
        return HttpResponse()

    @session_locked
    def commits(request: HttpRequest) -> HttpResponse:
        request.session["commits"] = 1
        request.session.commit()
        return HttpResponse()

    def locks(request: HttpRequest) -> HttpResponse:
        with request.session.lock():
            request.session["locks"] = 1
        return HttpResponse()

    @session_locked
    def fails(request: HttpRequest) -> HttpResponse:
        request.session["fails"] = 1
        raise ZeroDivisionError

    settings.ROOT_URLCONF = (
        path("", outer),
        path("commit/", commits),
        path("lock/", locks),
        path("error/", fails),
    )
    assert browser.request("/").status_code == 200
    assert stored(browser.key) == {"n": 1, "cart": [], "commits": 1, "locks": 1}
    assert owner(store, browser.key) == ""


def test_nested_request_without_the_header_is_refused_at_once(
    browser: Browser, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    @session_locked
    def outer(request: HttpRequest, secret: str) -> HttpResponse:
        request.session["n"] = 1
        # In another thread it would wait until its time is over.
        response = call(browser, "/inner/")
        assert "Retry-After" in response.headers
        return HttpResponse(str(response.status_code))

    settings.ROOT_URLCONF = (path("outer/<str:secret>/", outer), path("inner/", count_locked))
    assert browser.request("/outer/hunter2/").content == b"503"
    assert stored(browser.key) == {"n": 1, "cart": []}
    lines = [r.getMessage() for r in caplog.records if r.name == "django_clustered_sessions.locks"]
    assert "web-1 GET /outer/<str:secret>/" in lines[0]
    assert re.search(r"for \d+\.\d s", lines[0])
    assert "hunter2" not in "".join(lines)


count_locked = session_locked(count)


def test_nested_request_in_a_thread_is_told_of_the_header(
    browser: Browser, settings: Any, threads: Threads, caplog: pytest.LogCaptureFixture
) -> None:
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 0.2

    @session_locked
    def outer(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 5
        response = outcome(threads.start(call, browser, "/inner/"))
        assert "Retry-After" in response.headers
        return HttpResponse(str(response.status_code))

    settings.ROOT_URLCONF = (path("", outer), path("inner/", count_locked))
    assert browser.request("/").content == b"503"
    assert "give the call session.lock_headers()" in caplog.text
    assert stored(browser.key)["n"] == 5


# What comes here is a call by WSGI, whatever the browser's gateway is.
@on(("wsgi", "forged"), ("wsgi", "ended"), name="header")
def test_header_that_is_not_this_locks_is_useless(
    browser: Browser, settings: Any, store: redis.Redis, header: str
) -> None:
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 0.1
    settings.ROOT_URLCONF = (path("inner/", count_locked),)
    ended = seize(browser.key)
    free(browser.key, ended)
    token = seize(browser.key)
    its_id = place(browser.key).id
    good = write_header(its_id, token)[HEADER]
    value = {
        "forged": token,
        "ended": write_header(its_id, ended)[HEADER],
    }[header]
    assert call(browser, "/inner/", {HEADER: value}).status_code == 503
    assert stored(browser.key)["n"] == 0
    # And the good one is good, for as long as the lock is held.
    assert call(browser, "/inner/", {HEADER: good}).status_code == 200
    assert stored(browser.key)["n"] == 1
    assert owner(store, browser.key) == token


@on(("wsgi", True), ("wsgi", False), name="is_held")
def test_header_of_a_lock_that_has_ended_makes_no_view_lock(
    browser: Browser, settings: Any, store: redis.Redis, is_held: bool
) -> None:
    """A request that takes no lock never waits to read."""
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 0.1

    def look(request: HttpRequest) -> HttpResponse:
        n = request.session["n"]
        return HttpResponse(f"{n} {request.session.is_locked} {owner(store, browser.key)}")

    settings.ROOT_URLCONF = (path("inner/", look),)
    ended = seize(browser.key)
    header = write_header(place(browser.key).id, ended)
    joined = call(browser, "/inner/", header).content.decode()
    assert joined == f"0 True {ended}"
    free(browser.key, ended)
    now = seize(browser.key) if is_held else ""
    assert call(browser, "/inner/", header).content.decode() == f"0 False {now}"
    assert owner(store, browser.key) == now


def test_there_is_no_header_without_a_lock(store: redis.Redis) -> None:
    session = SessionStore(new_session())
    assert session.lock_headers() == {}
    with session.lock():
        assert list(session.lock_headers()) == [HEADER]
    assert session.lock_headers() == {}


# lock().


def test_lock_loads_afresh_with_what_was_not_saved_yet_on_top(store: redis.Redis) -> None:
    key = new_session(n=0, cart=["a"], gone=1)
    session = SessionStore(key)
    session["mine"] = 1
    session["cart"].append("mine")
    del session["gone"]
    other = SessionStore(key)
    other["n"] = 5
    other["cart"] += ["theirs"]
    other.save()
    with session.lock():
        assert session["n"] == 5
        assert session["mine"] == 1
        assert "gone" not in session
        session["n"] += 1
    assert stored(key) == {"n": 6, "cart": ["a", "theirs", "mine"], "mine": 1}
    assert not session.is_locked
    assert owner(store, key) == ""


def fails_inside(request: HttpRequest) -> HttpResponse:
    session = request.session
    session["before"] = 1
    session["cart"].append("before")
    with pytest.raises(ZeroDivisionError), session.lock():
        session["inside"] = 1
        session["cart"].append("inside")
        session["n"] = 99
        del session["before"]
        raise ZeroDivisionError
    assert not session.is_locked
    return HttpResponse()


async def afails_inside(request: HttpRequest) -> HttpResponse:
    session = request.session
    await session.aset("before", 1)
    (await session.aget("cart")).append("before")
    with pytest.raises(ZeroDivisionError):
        async with session.alock():
            await session.aset("inside", 1)
            (await session.aget("cart")).append("inside")
            await session.aset("n", 99)
            await session.apop("before")
            raise ZeroDivisionError
    assert not session.is_locked
    return HttpResponse()


@halves(fails_inside, afails_inside)
def test_exception_drops_what_changed_inside_and_keeps_the_rest(
    browser: Browser, store: redis.Redis, view: View
) -> None:
    assert browser.visit(view).status_code == 200
    assert stored(browser.key) == {"n": 0, "cart": ["before"], "before": 1}
    assert owner(store, browser.key) == ""


def test_exception_keeps_what_was_saved_inside(store: redis.Redis) -> None:
    session = SessionStore(new_session(n=0))
    assert session["n"] == 0
    with suppress(ZeroDivisionError), session.lock():
        session["n"] = 1
        session.save()
        session["n"] = 2
        raise ZeroDivisionError
    assert session["n"] == 1


def test_outermost_exit_of_a_lock_entered_again_releases(store: redis.Redis) -> None:
    key = new_session(n=0)
    session = SessionStore(key)
    with session.lock():
        mine = owner(store, key)
        session["outer"] = 1
        with session.lock():
            session["n"] += 1
        assert owner(store, key) == mine
        assert stored(key) == {"n": 0}
        with pytest.raises(ZeroDivisionError), session.lock():
            session["n"] += 1
            raise ZeroDivisionError
        assert owner(store, key) == mine
        assert session["n"] == 1
    assert stored(key) == {"n": 1, "outer": 1}
    assert owner(store, key) == ""


@on(("wsgi", "off"), ("asgi", "all"), name="mode")
def test_lock_in_a_view_that_has_it_already_is_the_requests(
    browser: Browser, settings: Any, store: redis.Redis, mode: str
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = mode

    def view(request: HttpRequest) -> HttpResponse:
        request.session.get("n")
        with request.session.lock():
            request.session["n"] = 1
        return HttpResponse(repr(bool(owner(store, browser.key))))

    assert browser.visit(view).content == repr(mode == "all").encode()
    assert stored(browser.key)["n"] == 1
    assert owner(store, browser.key) == ""


def creates_by_lock(request: HttpRequest) -> HttpResponse:
    with request.session.lock():
        request.session["n"] = 1
    return HttpResponse()


async def acreates_by_lock(request: HttpRequest) -> HttpResponse:
    async with request.session.alock():
        await request.session.aset("n", 1)
    return HttpResponse()


@halves(creates_by_lock, acreates_by_lock)
def test_session_without_a_key_is_created_and_gets_its_cookie(
    browser: Browser, store: redis.Redis, view: View
) -> None:
    browser.key = ""
    response = browser.visit(view)
    assert response.cookies[COOKIE].value
    assert response.headers["Vary"] == "Cookie"
    assert stored(browser.key) == {"n": 1}
    assert owner(store, browser.key) == ""


def test_second_object_in_the_same_thread_fails_at_once(store: redis.Redis) -> None:
    key = new_session()
    with SessionStore(key).lock():
        for use in (take_lock, write_unlocked):
            with pytest.raises(SessionLockTimeout, match="holds the lock itself"):
                use(key)
        assert len(queue(store, key)) == 1
    take_lock(key)


def take_lock(key: str) -> None:
    with SessionStore(key).lock():
        pass


def write_unlocked(key: str) -> None:
    session = SessionStore(key)
    session["m"] = 1
    session.save()


async def test_second_object_in_the_same_task_fails_at_once(store: redis.Redis) -> None:
    key = await asyncio.to_thread(new_session)

    async def take() -> None:
        async with SessionStore(key).alock():
            pass

    async with SessionStore(key).alock():
        with pytest.raises(SessionLockTimeout, match="holds the lock itself"):
            await take()
        # So does a task that it starts: it may wait for that.
        with pytest.raises(SessionLockTimeout, match="holds the lock itself"):
            await asyncio.create_task(take())
        assert len(queue(store, key)) == 1
    await take()
    # A task of its own is another's affair, and waits.
    has_lock, may_go = asyncio.Event(), asyncio.Event()

    async def keep() -> None:
        async with SessionStore(key).alock():
            has_lock.set()
            await may_go.wait()

    keeping = asyncio.create_task(keep())
    await asyncio.wait_for(has_lock.wait(), BOUND_S)
    taking = asyncio.create_task(take())
    await asyncio.to_thread(wait_for_queue, store, key, 1)
    may_go.set()
    await asyncio.wait_for(asyncio.gather(keeping, taking), BOUND_S)


def test_error_of_lock_that_the_view_lets_through_is_a_503(
    browser: Browser, settings: Any, store: redis.Redis
) -> None:
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 0.1
    token = seize(browser.key)
    response = browser.visit(creates_by_lock)
    assert response.status_code == 503
    assert "Retry-After" in response.headers
    assert [entry.token for entry in queue(store, browser.key)] == [token]
    settings.CLUSTERED_SESSIONS_LOCK_MAX_WAITERS = 0
    assert browser.visit(creates_by_lock).status_code == 429


def test_view_may_go_on_where_lock_was_in_vain(browser: Browser, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 0.1
    seize(browser.key)

    def view(request: HttpRequest) -> HttpResponse:
        try:
            with request.session.lock():
                raise AssertionError
        except SessionLockTimeout as error:
            return HttpResponse(error.holder)

    response = browser.visit(view)
    assert (response.status_code, response.content.decode()) == (200, ELSEWHERE)


# The end of a request.


@on(("wsgi", "commit"), ("asgi", "acommit"), name="method")
def test_commit_lets_the_next_one_in_while_the_view_goes_on(
    browser: Browser, settings: Any, store: redis.Redis, threads: Threads, method: str
) -> None:
    def go_on(request: HttpRequest) -> HttpResponse:
        assert not request.session.is_locked
        assert owner(store, browser.key) == ""
        assert outcome(threads.start(call, browser, "/inner/")).content == b"True"
        request.session["later"] = 1
        request.session["cart"].append("later")
        return HttpResponse()

    @session_locked
    def first(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 1
        request.session["cart"].append("first")
        request.session.commit()
        return go_on(request)

    @session_locked
    async def afirst(request: HttpRequest) -> HttpResponse:
        await request.session.aset("n", 1)
        (await request.session.aget("cart")).append("first")
        await request.session.acommit()
        return await asyncio.to_thread(go_on, request)

    settings.ROOT_URLCONF = (
        path("", first if method == "commit" else afirst),
        path("inner/", session_locked(inner)),
    )
    assert browser.request("/").status_code == 200
    assert stored(browser.key) == {
        "n": 1,
        "cart": ["first", "inner", "later"],
        "inner": True,
        "later": 1,
    }


def test_commit_of_a_new_session_sets_its_cookie(browser: Browser) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 1
        request.session.commit()
        return HttpResponse(request.session.session_key)

    browser.key = ""
    response = browser.visit(session_locked(view))
    assert response.cookies[COOKIE].value == response.content.decode()
    assert stored(browser.key) == {"n": 1}


def test_commit_of_nothing_gives_up_the_lock(browser: Browser, store: redis.Redis) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        request.session["n"]
        request.session.commit()
        return HttpResponse(repr(owner(store, browser.key)))

    response = browser.visit(session_locked(view))
    assert response.content == b"''"
    assert COOKIE not in response.cookies


def streaming(request: HttpRequest, piece: Callable[[], bytes]) -> StreamingHttpResponse:
    def pieces() -> Iterator[bytes]:
        yield piece()

    async def apieces() -> AsyncIterator[bytes]:
        yield await asyncio.to_thread(piece)

    is_asgi = hasattr(request, "scope")
    return StreamingHttpResponse(apieces() if is_asgi else pieces())


def body(response: Any) -> bytes:
    if not response.is_async:
        return b"".join(response)

    async def collect() -> bytes:
        return b"".join([piece async for piece in response])

    return asyncio.run(collect())


def test_stream_is_committed_and_released_before_its_first_byte(
    browser: Browser, store: redis.Redis
) -> None:
    def view(request: HttpRequest) -> StreamingHttpResponse:
        change(request)
        return streaming(
            request, lambda: repr((stored(browser.key), owner(store, browser.key))).encode()
        )

    response = browser.visit(session_locked(view))
    assert body(response) == repr((CHANGED, "")).encode()


def test_stream_that_uses_the_session_first_takes_no_lock(
    browser: Browser, settings: Any, store: redis.Redis
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"

    def view(request: HttpRequest) -> StreamingHttpResponse:
        return streaming(request, lambda: is_locked(request).content)

    assert body(browser.visit(view)) == b"False"
    assert owner(store, browser.key) == ""


def test_outer_middleware_that_looks_afterwards_takes_no_lock(
    browser: Browser, settings: Any, store: redis.Redis
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    settings.MIDDLEWARE = [HERE + "LateToucher", OURS]
    assert browser.visit(untouched).headers["X-N"] == "0"
    assert owner(store, browser.key) == ""


@on(("wsgi", 500), ("asgi", 503), name="status")
def test_answer_from_500_on_releases_and_writes_nothing(
    browser: Browser, store: redis.Redis, status: int
) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        change(request)
        return HttpResponse(status=status)

    assert browser.visit(session_locked(view)).status_code == status
    assert stored(browser.key) == UNCHANGED
    assert owner(store, browser.key) == ""
    assert store.keys("*:locks") == []


def test_error_releases_and_writes_nothing(browser: Browser, store: redis.Redis) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        change(request)
        raise ZeroDivisionError

    assert browser.visit(session_locked(view)).status_code == 500
    assert stored(browser.key) == UNCHANGED
    assert owner(store, browser.key) == ""


def test_error_of_the_save_releases(browser: Browser, settings: Any, store: redis.Redis) -> None:
    settings.CLUSTERED_SESSIONS_MAX_BYTES = 100

    def too_large(request: HttpRequest) -> HttpResponse:
        request.session["n"] = "x" * 1000
        return HttpResponse()

    def unserialisable(request: HttpRequest) -> HttpResponse:
        request.session["n"] = object()
        return HttpResponse()

    for view in (too_large, unserialisable):
        assert browser.visit(session_locked(view)).status_code == 500
        assert stored(browser.key) == UNCHANGED
        assert owner(store, browser.key) == ""


def test_worker_that_is_told_to_stop_releases(store: redis.Redis) -> None:
    key = new_session(**UNCHANGED)

    @session_locked
    def view(request: HttpRequest) -> HttpResponse:
        change(request)
        assert owner(store, key)
        raise SystemExit

    request = RequestFactory().get("/")
    request.COOKIES = {COOKIE: key}
    request.urlconf = (path("", view),)
    with pytest.raises(SystemExit):
        ClusteredSessionMiddleware(view)(request)
    assert stored(key) == UNCHANGED
    assert owner(store, key) == ""


# A client that leaves, under ASGI.


def arequest(key: str, view: View) -> Any:
    request = AsyncRequestFactory().get("/")
    request.COOKIES = {COOKIE: key}
    request.urlconf = (path("", view),)
    return request


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, BOUND_S)


class Subclass(ClusteredSessionMiddleware):
    """One with a hook of its own, for which Django takes a thread."""

    def process_request(self, request: HttpRequest) -> None:
        super().process_request(request)


@pytest.mark.parametrize("middleware", [ClusteredSessionMiddleware, Subclass])
async def test_request_whose_client_leaves_gives_up_its_lock(
    store: redis.Redis, middleware: Any
) -> None:
    key = await asyncio.to_thread(new_session, **UNCHANGED)
    has_lock = asyncio.Event()

    @session_locked
    async def view(request: HttpRequest) -> HttpResponse:
        await achange(request)
        has_lock.set()
        await asyncio.Event().wait()
        raise AssertionError

    task = asyncio.create_task(middleware(view)(arequest(key, view)))
    await asyncio.wait_for(has_lock.wait(), BOUND_S)
    assert owner(store, key)
    await cancel(task)
    assert owner(store, key) == ""
    assert await SessionStore(key).aload() == UNCHANGED


async def test_request_whose_client_leaves_gives_up_its_place(store: redis.Redis) -> None:
    key = await asyncio.to_thread(new_session)
    token = seize(key)
    view = session_locked(ais_locked)
    task = asyncio.create_task(ClusteredSessionMiddleware(view)(arequest(key, view)))
    await asyncio.to_thread(wait_for_queue, store, key, 1)
    await asyncio.to_thread(wait_for_sleepers, store, 1)
    assert waiting_here(key) == 1
    await cancel(task)
    assert [entry.token for entry in queue(store, key)] == [token]
    # Though somebody may still look at what became of the task.
    assert task.cancelled()
    assert not waiting_here(key)


async def test_write_whose_client_leaves_gives_up_its_place(store: redis.Redis) -> None:
    key = await asyncio.to_thread(new_session, **UNCHANGED)
    token = seize(key)
    task = asyncio.create_task(ClusteredSessionMiddleware(achange)(arequest(key, achange)))
    await asyncio.to_thread(wait_for_queue, store, key, 1)
    await asyncio.to_thread(wait_for_sleepers, store, 1)
    await cancel(task)
    assert [entry.token for entry in queue(store, key)] == [token]
    assert await SessionStore(key).aload() == UNCHANGED


async def test_cancellation_while_a_connection_is_made_is_kept(
    store: redis.Redis, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11's wait_for forgets that it was cancelled where its work was just done."""
    # Not even a slice of the wait is within bounds.
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 10 * BOUND_S
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 5 * BOUND_S
    key = await asyncio.to_thread(new_session, **UNCHANGED)
    token = seize(key)
    do = aioredis.Connection.connect
    lost: list[asyncio.Task[Any]] = []

    async def forgetful(self: Any, *arguments: Any, **options: Any) -> Any:
        done = await do(self, *arguments, **options)
        if asyncio.current_task() is task and not lost:
            lost.append(task)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        return done

    monkeypatch.setattr(aioredis.Connection, "connect", forgetful)
    task = asyncio.create_task(ClusteredSessionMiddleware(achange)(arequest(key, achange)))
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, BOUND_S)
    assert lost == [task]
    assert [entry.token for entry in queue(store, key)] == [token]
    assert await SessionStore(key).aload() == UNCHANGED


@pytest.mark.full  # closing gave up its place, so that the thread asks again after half the timeout
async def test_thread_whose_client_has_left_gives_up_its_lock(store: redis.Redis) -> None:
    key = await asyncio.to_thread(new_session, **UNCHANGED)
    token = seize(key)
    went_on = asyncio.Event()
    loop = asyncio.get_running_loop()

    @session_locked
    def view(request: HttpRequest) -> HttpResponse:
        try:
            return change(request)
        finally:
            loop.call_soon_threadsafe(went_on.set)

    async def in_a_thread(request: HttpRequest) -> HttpResponse:
        return await asyncio.to_thread(view, request)

    task = asyncio.create_task(ClusteredSessionMiddleware(in_a_thread)(arequest(key, view)))
    await asyncio.to_thread(wait_for_queue, store, key, 1)
    await asyncio.to_thread(wait_for_sleepers, store, 1)
    await cancel(task)
    # The thread knows nothing of it, and gets its turn.
    free(key, token)
    await asyncio.wait_for(went_on.wait(), BOUND_S)
    await asyncio.to_thread(wait_for, lambda: owner(store, key) == "", "the lock to be free")
    assert await SessionStore(key).aload() == UNCHANGED


# Elsewhere than in a request.


def test_session_outside_a_request_is_never_locked_by_itself(
    store: redis.Redis, settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    key = new_session(n=0)
    session = SessionStore(key)
    session["n"] += 1
    assert not session.is_locked
    assert owner(store, key) == ""
    session.save()
    with session.lock():
        assert owner(store, key)
    assert stored(key) == {"n": 1}


def test_settings_may_be_overridden(browser: Browser) -> None:
    for mode in ("all", "off", "write", "all"):
        with override_settings(CLUSTERED_SESSIONS_LOCKING=mode):
            locks = repr(mode == "all").encode()
            assert browser.visit(is_locked).content == locks
    assert browser.visit(is_locked).content == b"False"


@pytest.mark.parametrize("mode", ["off", "write"])
def test_session_of_djangos_test_client_meets_the_requests(
    store: redis.Redis, settings: Any, mode: str
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = mode
    settings.ROOT_URLCONF = (path("", count),)
    client = Client()
    session = client.session
    session["n"] = 1
    session.save()
    client.post("/")
    assert client.session["n"] == 2


def test_locks_have_a_logger_of_their_own() -> None:
    assert lock.logger is logging.getLogger("django_clustered_sessions.locks")
