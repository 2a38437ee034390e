"""Copies and pickles of a session: they know what it knew, and hold nothing that it held."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import redis
from django.contrib.sessions.backends.base import UpdateError
from django.http import HttpRequest, HttpResponse

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.decorators import session_locked
from django_clustered_sessions.exceptions import SessionLockTimeout
from tests.gateways import Browser, place
from tests.locking import new_session

Copy = Callable[[Any], Any]


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


WAYS = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": pickled}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@pytest.fixture(params=["wsgi", "asgi"])
def browser(request: pytest.FixtureRequest, store: redis.Redis, settings: Any) -> Browser:
    return Browser(settings, asgi=request.param == "asgi")


class Tenants(SessionStore):
    """A site's own, which knows something more."""

    tenant = ""

    def is_empty(self) -> bool:
        return set(self.keys()) <= {"language"}


@each_way
def test_copy_has_what_a_subclass_adds(store: redis.Redis, way: Copy) -> None:
    session = Tenants(new_session(n=1))
    session.tenant = "t1"
    other = way(session)
    assert (other.tenant, other["n"]) == ("t1", 1)


def test_subclass_says_when_a_session_is_empty(store: redis.Redis, browser: Browser) -> None:
    browser.key = new_session(language="en")

    def view(request: HttpRequest) -> HttpResponse:
        request.session = Tenants(request.session.session_key)
        return HttpResponse(request.session["language"])

    response = browser.visit(view)
    assert response.content == b"en"
    assert response.cookies["sessionid"].value == ""


@each_way
@pytest.mark.parametrize(
    "serializer",
    [
        "django.contrib.sessions.serializers.JSONSerializer",
        "django_clustered_sessions.serializers.MsgspecSerializer",
        "tests.serializers.PickleSerializer",
    ],
)
def test_copy_knows_what_the_session_knew(
    store: redis.Redis, settings: Any, way: Copy, serializer: str
) -> None:
    settings.SESSION_SERIALIZER = serializer
    session = SessionStore(new_session(n=1, cart={"tea": 1}, gone=1, unread=[1]))
    session["cart"]["tea"] = 2
    session["new"] = [1]
    session.increment("n", 2)
    del session["gone"]
    other = way(session)
    assert other.modified
    assert other.session_key == session.session_key
    expected = {"n": 3, "cart": {"tea": 2}, "new": [1], "unread": [1]}
    assert dict(other.items()) == expected
    other["mine"] = 1
    other.save()
    assert SessionStore(session.session_key).load() == {**expected, "mine": 1}
    # The original has its own changes still, and its own count.
    assert "mine" not in session
    session.save()
    assert SessionStore(session.session_key).load() == {**expected, "mine": 1, "n": 5}


@pytest.mark.parametrize("way", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_deep_copy_shares_no_value(store: redis.Redis, way: Copy) -> None:
    session = SessionStore(new_session(cart={"tea": 1}))
    assert not session.modified and session["cart"] == {"tea": 1}
    other = way(session)
    assert not other.modified
    other["cart"]["tea"] = 2
    assert other.modified and not session.modified
    assert session["cart"] == {"tea": 1}


@each_way
def test_copy_does_not_hold_the_lock(store: redis.Redis, way: Copy) -> None:
    session = SessionStore(new_session(n=1))
    with session.lock():
        session["n"] = 2
        other = way(session)
        assert not other.is_locked
        assert other.lock_headers() == {}
        assert session.is_locked
        other["note"] = 1
        with pytest.raises(SessionLockTimeout):
            other.save()
        with pytest.raises(SessionLockTimeout), other.lock():
            pass
        assert store.hexists(place(session.session_key).record, "m:lock")
        del other
        other = way(session)
    assert not store.hexists(place(session.session_key).record, "m:lock")
    with other.lock():
        assert other.is_locked and not session.is_locked
        assert other["n"] == 2


@each_way
def test_copy_of_what_was_not_loaded_loads_itself(store: redis.Redis, way: Copy) -> None:
    key = new_session(n=1)
    other = way(SessionStore(key))
    assert not other.accessed
    assert other["n"] == 1
    other = way(SessionStore())
    assert other.is_empty()
    other["n"] = 1
    other.save()
    assert SessionStore(other.session_key).load() == {"n": 1}


@each_way
def test_copy_asks_the_store_how_long_it_lives(store: redis.Redis, way: Copy) -> None:
    session = SessionStore(new_session(n=1))
    session.set_expiry(timedelta(seconds=300))
    session.save()
    other = way(session)
    assert other.expires_at() == session.expires_at()
    assert 290 < other.get_expiry_age() <= 300


@each_way
def test_copy_of_an_ended_session_brings_nothing_back(store: redis.Redis, way: Copy) -> None:
    session = SessionStore(new_session(n=1))
    session["n"] = 2
    other = way(session)
    session.flush()
    with pytest.raises(UpdateError):
        other.save()
    assert SessionStore(other.session_key).load() == {}


@each_way
def test_copy_of_what_the_store_owes_loads_anew(
    store: redis.Redis, settings: Any, way: Copy
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = "noop"
    caches, key = settings.CACHES, new_session(n=1)
    settings.CACHES = caches | {
        "sessions": caches["sessions"] | {"LOCATION": "redis://127.0.0.1:1"}
    }
    session = SessionStore(key)
    session.tolerate_outage()
    assert session.get("n") is None
    settings.CACHES = caches
    assert way(session)["n"] == 1


def test_request_is_copied_with_its_session(browser: Browser) -> None:
    def change(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 1
        # Django lets nobody copy its own; in a middleware before the view there is none yet.
        request.resolver_match = None
        other = copy.deepcopy(request)
        other.session["n"] = 2
        return HttpResponse(f"{request.session['n']} {pickled(other.session)['n']}")

    assert browser.visit(change).content == b"1 2"
    assert browser.visit(session_locked(change)).content == b"1 2"
    assert SessionStore(browser.key).load() == {"n": 1}
    with SessionStore(browser.key).lock():
        pass
