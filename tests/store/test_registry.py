"""The index of users follows every login and logout, and is never behind."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from django.contrib.auth import alogin, login, logout
from django.contrib.auth.models import AnonymousUser, User
from django.core.exceptions import SynchronousOnlyOperation
from django.http import HttpRequest
from hypothesis import given
from hypothesis import strategies as st

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.protocol.record import (
    BUCKETS,
    NOBODY,
    SessionKeys,
    session_id,
    user_tag,
)
from tests.servers import wait_for

ANN, BOB = User(pk=1, username="ann"), User(pk=2, username="bob")


def logged_in(user: User, session: SessionStore | None = None) -> SessionStore:
    """Return a session in which ``user`` has logged in, saved."""
    request = HttpRequest()
    request.session = session or SessionStore()
    login(request, user, backend="django.contrib.auth.backends.ModelBackend")
    request.session.save()
    return request.session


def public_id(session: Any) -> str:
    return session_id(session.session_key)


def ids(user: User) -> set[str]:
    """Return the ids of a user's sessions, and see to it that the counts are right."""
    entries = registry.sessions_of(user)
    assert registry.count_of(user) == len(entries)
    assert {entry.user_id for entry in entries} <= {str(user.pk)}
    return {entry.id for entry in entries}


def tick(store: Any) -> None:
    """Wait for the store's next millisecond."""
    now_ms = milliseconds(store.time())
    wait_for(lambda: milliseconds(store.time()) != now_ms, "the clock")


def milliseconds(clock: tuple[int, int]) -> int:
    return clock[0] * 1000 + clock[1] // 1000


def counts(store: Any) -> dict[bytes, int]:
    """Return how many sessions the buckets count for each user's tag."""
    found: dict[bytes, int] = {}
    for key in store.scan_iter("session:*:users"):
        for tag, count in store.hgetall(key).items():
            found[tag] = found.get(tag, 0) + int(count)
    return found


@pytest.fixture(autouse=True)
def _signals_without_a_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logging in also writes the time into the user's row; there is none here."""
    monkeypatch.setattr(User, "save", lambda self, **kwargs: None)

    async def asave(self: User, **kwargs: Any) -> None: ...

    monkeypatch.setattr(User, "asave", asave)


def test_sessions_of_a_user_are_listed(store: Any) -> None:
    first, second, other = logged_in(ANN), logged_in(ANN), logged_in(BOB)
    SessionStore().save()
    assert ids(ANN) == {public_id(first), public_id(second)}
    assert ids(BOB) == {public_id(other)}
    assert counts(store) == {b"": 3, user_tag(1): 2, user_tag(2): 1}
    entries = registry.sessions_of(1, current=first)
    assert [entry.id for entry in entries if entry.is_current] == [public_id(first)]
    for entry in entries:
        assert entry.created <= entry.last_seen < entry.expires
        assert entry.created.tzinfo is not None
        assert str(first.session_key) not in repr(entry)


def test_every_way_to_log_in_is_seen(store: Any) -> None:
    by_item = SessionStore()
    by_item["_auth_user_id"] = "1"
    by_item.save()
    by_update = SessionStore()
    by_update.save()
    by_update.update({"_auth_user_id": "1", "x": 1})
    by_update.save()
    at_once = SessionStore("a" * 32)
    at_once.setdefault("_auth_user_id", "1")
    at_once.save(must_create=True)

    async def by_aset() -> SessionStore:
        session = SessionStore()
        await session.aset("_auth_user_id", "1")
        await session.asave()
        return session

    async def by_alogin() -> SessionStore:
        request = HttpRequest()
        request.session = SessionStore()
        await alogin(request, ANN, backend="django.contrib.auth.backends.ModelBackend")
        await request.session.asave()
        return request.session

    sessions = [by_item, by_update, at_once, asyncio.run(by_aset()), asyncio.run(by_alogin())]
    assert ids(ANN) == {public_id(session) for session in sessions}


def test_every_way_out_is_seen(store: Any) -> None:
    flushed, deleted, popped, cleared, other = (logged_in(ANN) for _ in range(5))
    request = HttpRequest()
    request.session, request.user = flushed, ANN
    logout(request)
    SessionStore().delete(deleted.session_key)
    popped.pop("_auth_user_id")
    popped.save()
    cleared.clear()
    cleared.save()
    logged_in(BOB, other)
    assert ids(ANN) == set()
    assert ids(BOB) == {public_id(other)}
    assert counts(store) == {b"": 1, user_tag(2): 1}


def test_a_session_stays_listed_under_its_new_key(store: Any) -> None:
    session = logged_in(ANN)
    (before,) = registry.sessions_of(ANN)
    session.cycle_key()
    (entry,) = registry.sessions_of(ANN)
    assert entry.id == public_id(session) != before.id
    assert entry.created == before.created


def test_write_during_a_login_is_that_users(store: Any) -> None:
    session = SessionStore()
    session.save()
    early = SessionStore(session.session_key)
    early.load()
    session["_auth_user_id"] = "1"
    session.save()
    early["x"] = 1
    early.save()
    assert ids(ANN) == {public_id(session)}


def test_expired_session_is_not_listed(store: Any) -> None:
    session = logged_in(ANN)
    session.set_expiry(1)
    session.save()
    place = SessionKeys.of("session", session.session_key or "")
    wait_for(lambda: not store.exists(place.record), "it has expired")
    assert ids(ANN) == set()
    # Whoever creates a session in the bucket sweeps it out.
    for _ in range(BUCKETS * 20):
        if not store.exists(place.users):
            break
        _create_in(place, store)
    assert counts(store) == {}


def _create_in(place: SessionKeys, store: Any) -> None:
    """Create a session in the bucket of ``place``."""
    while True:
        session = SessionStore()
        key = session.state.new_key().value
        if SessionKeys.of("session", key).index == place.index:
            session._session_key = key
            session.save(must_create=True)
            return


def test_the_life_of_a_session_begins_anew_with_a_login(store: Any) -> None:
    session = SessionStore()
    session.save()
    created = registry.find(public_id(session)).created  # type: ignore[union-attr]
    tick(store)
    session["_auth_user_id"] = "1"
    session.save()
    tick(store)
    begun = registry.find(public_id(session)).created  # type: ignore[union-attr]
    assert begun > created
    session["x"] = 1
    session.save()
    entry = registry.find(public_id(session), current=session)
    assert entry and entry.created == begun and entry.user_id == "1" and entry.is_current
    assert entry.last_seen > begun


def test_ended_session_is_no_more(store: Any) -> None:
    session, other = logged_in(ANN), logged_in(ANN)
    in_flight = SessionStore(session.session_key)
    in_flight.load()
    assert registry.end_session(public_id(session)) is True
    assert registry.end_session(public_id(session)) is False
    assert registry.find(public_id(session)) is None
    assert SessionStore(session.session_key).load() == {}
    assert ids(ANN) == {public_id(other)}


def test_all_sessions_of_a_user_are_ended_but_one(store: Any) -> None:
    mine, *others = (logged_in(ANN) for _ in range(4))
    bobs = logged_in(BOB)
    assert registry.end_sessions_of(ANN, keep=mine) == 3
    assert ids(ANN) == {public_id(mine)}
    assert all(SessionStore(session.session_key).load() == {} for session in others)
    assert registry.end_sessions_of(ANN) == 1
    assert registry.end_sessions_of(ANN) == 0
    assert ids(ANN) == set() and ids(BOB) == {public_id(bobs)}


def test_session_that_moves_during_a_look_is_ended_all_the_same(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged_in(ANN)
    look, looks = registry.listed_of, []

    def missing(user: str) -> Any:
        looks.append(user)
        found = yield from look(user)
        return [] if len(looks) == 1 else found

    monkeypatch.setattr(registry, "listed_of", missing)
    assert registry.end_sessions_of(ANN) == 1
    assert looks == ["1"] * 3


def test_twins_do_the_same(store: Any) -> None:
    mine, other, third = (logged_in(ANN) for _ in range(3))

    async def main() -> None:
        assert len(await registry.asessions_of(ANN)) == await registry.acount_of(ANN) == 3
        assert await registry.aend_session(public_id(other))
        entry = await registry.afind(public_id(third))
        assert entry and entry.id == public_id(third)
        assert await registry.aend_sessions_of(ANN, keep=public_id(mine)) == 1
        with pytest.raises(SynchronousOnlyOperation, match="aend_session"):
            registry.end_sessions_of(ANN)

    asyncio.run(main())
    assert ids(ANN) == {public_id(mine)}


@pytest.mark.parametrize("bad", ["", "x", "a" * 44, "ä" * 43, "a" * 42 + "\n", "../" * 14])
def test_what_is_no_id_is_refused(store: Any, bad: str) -> None:
    for call in (registry.end_session, registry.find):
        with pytest.raises(ValueError, match="no session's public id"):
            call(bad)


def test_nothing_is_ended_for_an_id_to_keep_that_is_none(store: Any) -> None:
    session = logged_in(ANN)
    with pytest.raises(ValueError, match="no session's public id"):
        registry.end_sessions_of(ANN, keep=session.session_key)
    assert ids(ANN) == {public_id(session)}


@pytest.mark.parametrize("user", [None, AnonymousUser(), User()])
def test_who_is_nobody_has_no_sessions(store: Any, user: Any) -> None:
    with pytest.raises(ValueError, match="no primary key"):
        registry.end_sessions_of(user)


def test_id_that_nobody_has_finds_nothing(store: Any) -> None:
    assert registry.find("a" * 43) is None
    assert registry.end_session("a" * 43) is False


@given(st.text())
def test_an_id_leads_to_its_sessions_place(key: str) -> None:
    assert SessionKeys.of_id("session", session_id(key)) == SessionKeys.of("session", key)


def test_a_record_that_is_gone_leaves_the_index(store: Any) -> None:
    evicted, other = logged_in(ANN), logged_in(ANN)
    store.delete(SessionKeys.of("session", evicted.session_key or "").record)
    assert ids(ANN) == {public_id(other)}
    assert counts(store) == {b"": 1, user_tag(1): 1}


@pytest.mark.parametrize("damage", ["no users", "wrong count", "junk in index", "foreign user"])
def test_an_index_that_was_damaged_by_hand_heals(store: Any, damage: str) -> None:
    session = logged_in(ANN)
    place = SessionKeys.of("session", session.session_key or "")
    match damage:
        case "no users":
            store.delete(place.users)
        case "wrong count":
            store.hset(place.users, mapping={"": 7, "tagoften": 4})
        case "junk in index":
            store.zadd(place.index, {"junk": 9e15, place.id + "otheruse": 9e15})
        case "foreign user":
            store.zadd(place.index, {place.id.encode() + user_tag(2): 9e15})
    assert ids(ANN) == {public_id(session)}
    assert ids(BOB) == set()
    if damage != "junk in index":
        assert counts(store) == {b"": 1, user_tag(1): 1}


def test_index_that_is_none_hides_no_other_buckets_sessions(store: Any) -> None:
    session = logged_in(ANN)
    bucket = SessionKeys.of("session", session.session_key or "").index
    store.set("session:{000}:index" if "{000}" not in bucket else "session:{001}:index", "text")
    assert ids(ANN) == {public_id(session)}
    assert registry.end_sessions_of(ANN) == 1


def test_member_of_the_index_that_is_no_id_hides_no_session(store: Any) -> None:
    session = logged_in(ANN)
    place = SessionKeys.of("session", session.session_key or "")
    store.zadd(place.index, {b"?" * 43 + user_tag(1): 9e15})
    assert ids(ANN) == {public_id(session)}


def test_session_missing_in_the_index_comes_back_with_a_write(store: Any, settings: Any) -> None:
    session = logged_in(ANN)
    place = SessionKeys.of("session", session.session_key or "")
    store.delete(place.index, place.users)
    assert ids(ANN) == set()
    # As if a second had passed: until then no write moves the deadline.
    settings.SESSION_COOKIE_AGE += 1
    session["x"] = 1
    session.save()
    assert ids(ANN) == {public_id(session)}
    assert counts(store) == {b"": 1, user_tag(1): 1}


def test_nobodys_tag_is_no_users() -> None:
    assert user_tag("") != NOBODY


def test_many_sessions_of_one_user_are_ended(store: Any) -> None:
    for _ in range(300):
        session = SessionStore()
        session["_auth_user_id"] = "1"
        session.save()
    assert registry.count_of(1) == 300
    assert registry.end_sessions_of(1, keep=session) == 299


def test_a_full_store_logs_out_everywhere(store: Any) -> None:
    """Ending sessions makes room if the memory is full."""
    sessions = [logged_in(ANN) for _ in range(3)]
    store.config_set("maxmemory", "1")
    try:
        assert len(registry.sessions_of(ANN)) == 3
        assert registry.end_sessions_of(ANN) == 3
    finally:
        store.config_set("maxmemory", "0")
    assert all(SessionStore(session.session_key).load() == {} for session in sessions)
