"""A block of ``lock()`` that fails, around something that cannot be taken back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import redis
from django.contrib.auth import HASH_SESSION_KEY, SESSION_KEY
from django.contrib.sessions.backends.base import UpdateError
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.decorators import session_no_touch
from tests.gateways import Browser, place
from tests.locking import new_session

USER = {SESSION_KEY: "1", HASH_SESSION_KEY: "0" * 64}


class Failed(Exception):
    pass


@pytest.fixture(params=["wsgi", "asgi"])
def browser(request: pytest.FixtureRequest, store: redis.Redis, settings: Any) -> Browser:
    browser = Browser(settings, asgi=request.param == "asgi")
    browser.key = new_session(**USER, n=1)
    return browser


@pytest.mark.parametrize("locking", ["off", "all"])
@pytest.mark.parametrize("changes", ["before", "never"])
def test_logout_in_a_block_that_fails_stays_one(
    browser: Browser, settings: Any, locking: str, changes: str
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = locking

    def view(request: HttpRequest) -> HttpResponse:
        session: Any = request.session
        if changes == "before":
            session["mine"] = 1
        try:
            with session.lock():
                session.flush()
                raise Failed
        except Failed:
            session["message"] = "sorry"
        return HttpResponse()

    old = browser.key
    browser.visit(view)
    assert browser.key != old and not SessionStore().exists(old)
    assert dict(SessionStore(browser.key).items()) == {"message": "sorry"}


def test_login_of_another_in_a_block_that_fails_brings_nobody_back(browser: Browser) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        session: Any = request.session
        try:
            with session.lock():
                session.flush()
                session.create()
                session[SESSION_KEY] = "2"
                raise Failed
        except Failed:
            session["message"] = "sorry"
        return HttpResponse()

    browser.visit(view)
    assert dict(SessionStore(browser.key).items()) == {"message": "sorry"}


@pytest.mark.parametrize("method", ["lock", "load"])
def test_ended_session_that_was_met_is_not_saved_anew(browser: Browser, method: str) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        session: Any = request.session
        assert session["n"] == 1
        session["mine"] = 1
        assert registry.end_session(session.public_id)
        if method == "load":
            assert session.load() == {}
        else:
            with pytest.raises(UpdateError), session.lock():
                pass
        session["message"] = "sorry"
        return HttpResponse()

    old = browser.key
    browser.visit(view)
    assert browser.key != old
    assert dict(SessionStore(browser.key).items()) == {"message": "sorry"}


def test_cleared_session_stays_cleared_if_a_block_fails(store: redis.Redis) -> None:
    session = SessionStore(new_session(**USER, n=1))
    session.clear()
    with pytest.raises(Failed), session.lock():
        session["inside"] = 1
        raise Failed
    assert dict(session.items()) == {}
    session["x"] = 1
    session.save()
    assert dict(SessionStore(session.session_key).items()) == {"x": 1}


def test_block_that_begins_after_the_response_is_written_and_released(
    browser: Browser, store: redis.Redis, settings: Any
) -> None:
    """Also where the request locks its session, which it had not used before."""
    settings.CLUSTERED_SESSIONS_LOCKING = "all"

    def view(request: HttpRequest) -> StreamingHttpResponse:
        def body() -> Any:
            session: Any = request.session
            with session.lock():
                session["late"] = 1
            yield b"x"

        return StreamingHttpResponse(body())

    response = browser.visit(view)
    assert response.getvalue() == b"x"
    assert SessionStore(browser.key)["late"] == 1
    assert store.hget(place(browser.key).record, "m:lock") is None


def test_new_key_is_told_though_the_block_around_it_fails(browser: Browser) -> None:
    @session_no_touch
    def view(request: HttpRequest) -> HttpResponse:
        session: Any = request.session
        try:
            with session.lock():
                session.cycle_key()
                raise Failed
        except Failed:
            return HttpResponse()

    old = browser.key
    browser.visit(view)
    assert browser.key != old
    assert SessionStore(browser.key)["n"] == 1


def pop(session: Any) -> None:
    session.pop("n")


def change_in_place(session: Any) -> None:
    session["cart"].append("jug")


def count(session: Any) -> None:
    session.increment("n")


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (pop, {"cart": ["tea"]}),
        (change_in_place, {"n": 1, "cart": ["tea", "jug"]}),
        (count, {"n": 2, "cart": ["tea"]}),
    ],
)
def test_failing_block_leaves_what_was_not_to_be_saved(
    browser: Browser, change: Callable[[Any], None], changed: dict[str, Any]
) -> None:
    """``modified = False`` before the block holds after it, until something else is changed."""
    browser.key = new_session(n=1, cart=["tea"])

    def view(request: HttpRequest) -> HttpResponse:
        session: Any = request.session
        change(session)
        session.modified = False
        with suppress(Failed), session.lock():
            session["inside"] = 1
            raise Failed
        assert dict(session.items()) == changed
        if request.GET:
            session["later"] = 1
        return HttpResponse()

    browser.visit(view)
    assert SessionStore(browser.key).load() == {"n": 1, "cart": ["tea"]}
    browser.visit(view, data={"later": 1})
    assert SessionStore(browser.key).load() == changed | {"later": 1}
