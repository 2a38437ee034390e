"""Subclasses of SessionStore that read the session to answer what Django asks of them."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import redis
from django.conf import settings
from django.contrib.sessions.backends.base import SessionBase
from django.http import HttpRequest, HttpResponse

from django_clustered_sessions.backend import SessionStore as Base
from tests.gateways import GATEWAYS, Browser, place, records
from tests.locking import new_session

#: Seconds of a session's life, and of one whose user wants to be remembered.
SHORT, LONG = 600, 6000


class SessionStore(Base):
    """A site's own: its values decide how long it lives, and whether it is one at all."""

    def get_session_cookie_age(self) -> int:
        return LONG if self.get("remember") else SHORT

    #: How often that was asked with the values at hand.
    answers = 0

    def is_empty(self) -> bool:
        values = set(self.keys())
        SessionStore.answers += bool(values)
        return values <= {"language"}


@pytest.fixture(params=GATEWAYS)
def browser(request: pytest.FixtureRequest, store: redis.Redis, settings: Any) -> Browser:
    settings.SESSION_ENGINE = __name__
    settings.SESSION_COOKIE_AGE = 60
    return Browser(settings, asgi=request.param == "asgi")


async def read(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(await request.session.aget("n")))


async def untouched(request: HttpRequest) -> HttpResponse:
    return HttpResponse("untouched")


async def cycle(request: HttpRequest) -> HttpResponse:
    await request.session.acycle_key()
    return HttpResponse()


def age(session_key: str) -> float:
    """Return the seconds that the store gives a session."""
    session = Base(session_key)
    session.expires_at()
    assert session.left_s is not None
    return session.left_s


@pytest.mark.parametrize("view", [read, untouched])
@pytest.mark.parametrize(
    "renewing", [{"SESSION_SAVE_EVERY_REQUEST": True}, {"CLUSTERED_SESSIONS_IDLE_TIMEOUT": 9000}]
)
@pytest.mark.parametrize("remember", [True, False])
def test_age_that_depends_on_values_is_renewed(
    browser: Browser, settings: Any, renewing: dict[str, Any], remember: bool, view: Any
) -> None:
    browser.key = new_session(n=1, remember=remember)
    for name, value in renewing.items():
        setattr(settings, name, value)
    response = browser.visit(view)
    assert response.status_code == 200
    expected = LONG if remember else SHORT
    assert age(browser.key) == pytest.approx(expected, abs=20)
    assert response.cookies["sessionid"]["max-age"] == pytest.approx(expected, abs=20)


def test_age_that_depends_on_values_stays_at_a_new_key(browser: Browser) -> None:
    browser.key = old = new_session(n=1, remember=True)
    assert browser.visit(cycle).status_code == 200
    assert browser.key != old
    assert age(browser.key) == pytest.approx(LONG, abs=20)


def test_session_that_is_empty_by_its_values_loses_its_cookie(browser: Browser) -> None:
    browser.key = new_session(language="en")
    assert browser.visit(untouched).cookies["sessionid"].value == ""


def test_session_is_asked_once_whether_it_is_empty(
    browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser.key = new_session(language="en", n=1)
    monkeypatch.setattr(SessionStore, "answers", 0)
    browser.visit(read)
    assert SessionStore.answers == 1


def test_session_that_is_not_empty_by_its_values_stays(
    browser: Browser, store: redis.Redis
) -> None:
    browser.key = new_session(language="en", n=1)
    response = browser.visit(untouched)
    assert (response.status_code, bool(response.cookies)) == (200, False)
    assert records(store) == [place(browser.key).record.encode()]


def test_age_that_was_patched_in_counts(store: redis.Redis) -> None:
    """As by a test of a site, by a package when it is ready, or for one session."""
    with patch.object(SessionBase, "get_session_cookie_age", return_value=LONG):
        assert age(new_session(n=1)) == pytest.approx(LONG, abs=20)
    with patch.object(Base, "get_session_cookie_age", return_value=LONG):
        assert age(new_session(n=1)) == pytest.approx(LONG, abs=20)
    session: Any = Base()
    session.get_session_cookie_age = lambda: LONG
    session.create()
    assert age(session.session_key) == pytest.approx(LONG, abs=20)


def test_emptiness_that_was_patched_in_counts(browser: Browser, settings: Any) -> None:
    settings.SESSION_ENGINE = "django_clustered_sessions.backend"
    browser.key = new_session(n=1)
    with patch.object(Base, "is_empty", return_value=True):
        assert browser.visit(untouched).cookies["sessionid"].value == ""


def test_setting_of_django_that_was_assigned_counts(
    store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``settings`` itself has it at once, and the cookie with it."""
    new_session(n=1)
    monkeypatch.setattr(settings, "SESSION_COOKIE_AGE", LONG)
    assert age(new_session(n=1)) == pytest.approx(LONG, abs=20)
