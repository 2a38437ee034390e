"""Values of one user never reach another one, whatever a release can read of them.

Two releases share a session: one reads pickled values, the other JSON, and both read counters.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import redis
from django.contrib.auth import SESSION_KEY, update_session_auth_hash
from django.contrib.auth.models import User
from django.contrib.sessions.backends.base import UpdateError
from django.http import HttpRequest

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.session.near_cache import near_cache
from tests.gateways import place, records
from tests.logins import alog_in, log_in

PICKLE = "tests.serializers.PickleSerializer"
JSON = "django.contrib.sessions.serializers.JSONSerializer"
ANN, BOB = User(pk=1, username="ann"), User(pk=2, username="bob")


@pytest.fixture(autouse=True)
def _releases(store: redis.Redis, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(User, "save", lambda *_, **__: None)
    settings.SESSION_SERIALIZER = JSON


@pytest.fixture
def key() -> str:
    """Give the key of Ann's session, as the release before this one has it."""
    session = log_in(ANN)
    session["address"] = "Ann's"
    session.increment("unpaid", 7)
    session.save()
    return session.session_key or ""


@pytest.fixture
def new_release(key: str, settings: Any) -> None:
    """Be a node of the release that cannot read Ann's session."""
    settings.SESSION_SERIALIZER = PICKLE
    near_cache.clear()


def log_in_async(user: User, session: SessionStore) -> SessionStore:
    return asyncio.run(alog_in(user, session))


def by_hand(user: User, session: SessionStore) -> SessionStore:
    session[SESSION_KEY] = str(user.pk)
    session.save()
    return session


def by_update(user: User, session: SessionStore) -> SessionStore:
    session.update({"address": "new", SESSION_KEY: str(user.pk)})
    assert session.pop("address") == "new"
    session.save()
    return session


def under_a_lock(user: User, session: SessionStore) -> SessionStore:
    with session.lock():
        return log_in(user, session)


WAYS = [log_in, log_in_async, by_hand, by_update, under_a_lock]


def seen(session_key: str | None) -> dict[str, Any]:
    """Return what is in a session beside what Django keeps of the user."""
    near_cache.clear()
    return {
        name: value for name, value in SessionStore(session_key).load().items() if name[0] != "_"
    }


def in_store(store: redis.Redis, session_key: str | None) -> set[bytes]:
    fields = store.hkeys(place(session_key or "").record)
    return {name for name in fields if name.startswith(b"d:") and not name.startswith(b"d:_")}


@pytest.mark.usefixtures("new_release")
@pytest.mark.parametrize("is_limited", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_next_user_gets_nothing_of_an_unreadable_one(
    store: redis.Redis, settings: Any, key: str, way: Callable[..., SessionStore], is_limited: bool
) -> None:
    if is_limited:
        settings.CLUSTERED_SESSIONS_MAX_SESSIONS_PER_USER = 3
    session = way(BOB, SessionStore(key))
    assert session.get("unpaid") is session.get("address") is None
    assert session[SESSION_KEY] == "2"
    assert in_store(store, session.session_key) == set()
    assert seen(session.session_key) == {}
    settings.SESSION_SERIALIZER = JSON
    assert seen(session.session_key) == {}
    assert [len(registry.sessions_of(pk)) for pk in (1, 2)] == [0, 1]


@pytest.mark.usefixtures("new_release")
@pytest.mark.parametrize("way", WAYS)
def test_user_who_comes_back_has_it_all_again(
    settings: Any, key: str, way: Callable[..., SessionStore]
) -> None:
    session = SessionStore(key)
    assert SESSION_KEY not in session
    session = way(ANN, session)
    kept = {"unpaid": 7} if way is by_update else {"address": "Ann's", "unpaid": 7}
    assert seen(session.session_key) == {"unpaid": 7}
    del session[SESSION_KEY]
    session = by_hand(ANN, SessionStore(session.session_key))
    settings.SESSION_SERIALIZER = JSON
    assert seen(session.session_key) == kept


@pytest.mark.usefixtures("new_release")
def test_first_user_gets_nothing_back_from_the_second(settings: Any, key: str) -> None:
    bobs = log_in(BOB, SessionStore(key))
    settings.SESSION_SERIALIZER = JSON
    anns = log_in(ANN, SessionStore(bobs.session_key))
    assert seen(anns.session_key) == {}


@pytest.mark.usefixtures("new_release")
def test_unreadable_user_moves_along_to_a_new_key(settings: Any, key: str) -> None:
    settings.CLUSTERED_SESSIONS_MAX_SESSIONS_PER_USER = 3
    session = SessionStore(key)
    assert session.get("unpaid") == 7
    session.cycle_key()
    copy = SessionStore(session.session_key)
    copy.get("unpaid")
    copy.create()
    settings.SESSION_SERIALIZER = JSON
    for one in (session, copy):
        assert seen(one.session_key) == {"address": "Ann's", "unpaid": 7}
        assert SessionStore(one.session_key)[SESSION_KEY] == "1"
    assert len(registry.sessions_of(1)) == 2


@pytest.mark.usefixtures("new_release")
def test_new_password_keeps_what_cannot_be_read(settings: Any, key: str) -> None:
    request = HttpRequest()
    request.session, request.user = SessionStore(key), ANN  # type: ignore[assignment]
    update_session_auth_hash(request, ANN)
    request.session.save()
    settings.SESSION_SERIALIZER = JSON
    assert seen(request.session.session_key) == {"address": "Ann's", "unpaid": 7}


@pytest.mark.usefixtures("new_release")
def test_clear_leaves_nothing_of_an_unreadable_user(store: redis.Redis, key: str) -> None:
    session = SessionStore(key)
    assert session.get("unpaid") == 7
    session.clear()
    session.cycle_key()
    assert in_store(store, session.session_key) == set()
    assert registry.sessions_of(1) == []


@pytest.mark.usefixtures("new_release")
def test_failed_lock_block_gives_an_unreadable_user_back(settings: Any, key: str) -> None:
    session = SessionStore(key)
    with pytest.raises(ZeroDivisionError), session.lock():
        session[SESSION_KEY] = "2"
        assert "unpaid" not in session
        raise ZeroDivisionError
    assert session["unpaid"] == 7
    session["n"] = b"1"
    session.save()
    settings.SESSION_SERIALIZER = JSON
    assert seen(key) == {"address": "Ann's", "unpaid": 7}


@pytest.mark.parametrize("name", [None, "2"], ids=["nobody", "somebody"])
def test_what_cannot_be_read_stays_behind(store: redis.Redis, key: str, name: str | None) -> None:
    """Other readable values are the view's to keep if the user can be read, as in Django."""
    store.hset(place(key).record, "d:odd", b"8 bytes.?of another release")
    session = SessionStore(key)
    if name is None:
        del session[SESSION_KEY]
    else:
        session[SESSION_KEY] = name
    session["new"] = 1
    session.save()
    kept = {"address": "Ann's", "unpaid": 7, "new": 1}
    assert (seen(key), seen(session.session_key)) == (kept, kept)
    assert b"d:odd" not in in_store(store, key)
    session.increment("unpaid")
    session.save()
    assert seen(key)["unpaid"] == 8


def test_visitors_own_goes_along_when_they_log_in(settings: Any) -> None:
    session = SessionStore()
    session["cart"] = ["tea"]
    session.save()
    settings.SESSION_SERIALIZER = PICKLE
    near_cache.clear()
    session = log_in(ANN, SessionStore(session.session_key))
    near_cache.clear()
    settings.SESSION_SERIALIZER = JSON
    assert seen(session.session_key) == {"cart": ["tea"]}


@pytest.mark.parametrize("is_readable", [True, False])
@pytest.mark.parametrize("way", [by_hand, log_in])
def test_late_write_of_the_first_user_reaches_nobody(
    settings: Any, key: str, way: Callable[..., SessionStore], is_readable: bool
) -> None:
    late = [SessionStore(key) for _ in range(3)]
    for one in late:
        assert one["unpaid"] == 7
    if not is_readable:
        settings.SESSION_SERIALIZER = PICKLE
    near_cache.clear()
    session = way(BOB, SessionStore(key))
    settings.SESSION_SERIALIZER = JSON
    before = seen(session.session_key)
    late[0].increment("unpaid")
    late[1]["address"] = "Ann's new one"
    for one in late[:2]:
        with pytest.raises(UpdateError, match="rotated" if way is by_hand else None):
            one.save()
    with pytest.raises(UpdateError), late[2].lock():
        pass
    assert seen(session.session_key) == before


def test_login_of_the_loser_takes_nothing_of_the_winner(store: redis.Redis) -> None:
    anonymous = SessionStore()
    anonymous["n"] = 1
    anonymous.save()
    key = anonymous.session_key
    bobs = SessionStore(key)
    assert bobs["n"] == 1
    anns = SessionStore(key)
    anns.update({SESSION_KEY: "1", "address": "Ann's"})
    anns.save()
    bobs[SESSION_KEY] = "2"
    bobs.save()
    assert SessionStore(key)[SESSION_KEY] == "2"
    assert seen(key) == {"n": 1}
    assert len(records(store)) == 1
