"""Requests whose session gets a new key meanwhile go on in it, as long as it is the same user's.

Each as two objects: one that has loaded the session, and another that cycles its key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from django.contrib.auth import HASH_SESSION_KEY, SESSION_KEY
from django.contrib.sessions.backends.base import UpdateError

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.decorators import Access
from django_clustered_sessions.exceptions import SessionLockLost
from django_clustered_sessions.protocol.record import EndReason, session_id
from django_clustered_sessions.session import lock_scope
from django_clustered_sessions.session.request_policy import HEADER, Policy
from django_clustered_sessions.signals import session_ended
from tests.gateways import place, records
from tests.locking import Threads, free, new_session, outcome, seize, wait_for_queue

Do = Callable[..., Any]

OLD_TOMBSTONE = {b"m:end": b"rotated"}


@pytest.fixture(params=["sync", "async"])
def do(request: pytest.FixtureRequest, store: redis.Redis) -> Iterator[Do]:
    """Give ``do(session, method, ...)``, which calls it in its synchronous or asynchronous form."""
    with asyncio.Runner() as runner:

        def call(session: SessionStore, method: str, *arguments: Any) -> Any:
            if request.param == "async":
                return runner.run(getattr(session, f"a{method}")(*arguments))
            return getattr(session, method)(*arguments)

        yield call


@pytest.fixture
def key(store: redis.Redis) -> str:
    return new_session(n=1, **{SESSION_KEY: "1", HASH_SESSION_KEY: "first hash"})


def opened(key: str | None) -> SessionStore:
    session = SessionStore(key)
    assert session["n"] == 1
    return session


def cycled(key: str | None, **changes: Any) -> str:
    """Cycle a session's key as another request; return the new one."""
    session = opened(key)
    session.cycle_key()
    session.update(changes)
    session.save()
    return session.session_key or ""


def test_changes_land_in_the_successor(store: redis.Redis, do: Do, key: str) -> None:
    late = opened(key)
    new = cycled(key, theirs=2)
    late["mine"] = [1]
    late.increment("hits", 2)
    do(late, "save")
    late["mine"].append(2)
    do(late, "save")
    assert (late.session_key, late.state.has_moved_on, late.public_id) == (
        key,
        True,
        session_id(new),
    )
    values = SessionStore(new).load()
    assert (values["mine"], values["theirs"], values["hits"]) == ([1, 2], 2, 2)
    assert records(store) == [place(new).record.encode()]


def test_change_of_one_key_is_merged_in_the_successor(do: Do, key: str) -> None:
    late = opened(key)
    late["cart"] = {"tea": 1}
    new = cycled(key, cart={"cup": 1})
    do(late, "save")
    assert SessionStore(new)["cart"] == {"tea": 1, "cup": 1}


@pytest.mark.parametrize("changes", [False, True])
def test_wish_for_a_new_key_is_met(store: redis.Redis, do: Do, key: str, changes: bool) -> None:
    told: list[Any] = []

    def receive(**about: Any) -> None:
        told.append(about["reason"])

    late = opened(key)
    session_ended.connect(receive)
    try:
        new = cycled(key)
        if changes:
            late["mine"] = 1
        do(late, "cycle_key")
        late[HASH_SESSION_KEY] = "second hash"
        do(late, "save")
        do(late, "cycle_key")
    finally:
        session_ended.disconnect(receive)
    assert told == ["replaced"]
    assert late.session_key == key
    assert records(store) == [place(new).record.encode()]
    found = SessionStore(new)
    assert (found[HASH_SESSION_KEY], found.get("mine")) == ("second hash", 1 if changes else None)


def test_session_is_followed_over_some_moves(do: Do, key: str) -> None:
    early, late = opened(key), opened(key)
    new = cycled(key)
    early["a"] = 1
    do(early, "save")
    for _ in range(4):
        new = cycled(new)
    early["a"] = 2
    late["b"] = 1
    do(early, "save")
    do(late, "save")
    found = SessionStore(new)
    assert (found["a"], found["b"]) == (2, 1)


def test_use_of_a_moved_session_renews_the_successor(
    store: redis.Redis, settings: Any, do: Do, key: str
) -> None:
    late = opened(key)
    new = cycled(key)
    store.pexpire(place(new).record, 60_000)
    settings.SESSION_COOKIE_AGE *= 2
    late.state.renewed = False
    do(late, "save")
    assert store.pttl(place(new).record) > settings.SESSION_COOKIE_AGE * 900
    assert late.state.ended is None


def test_lock_is_taken_in_the_successor(store: redis.Redis, key: str) -> None:
    late = opened(key)
    late["mine"] = 1
    new = cycled(key, theirs=2)
    with late.lock():
        assert late["theirs"] == 2
        assert store.hexists(place(new).record, "m:lock")
        late["inside"] = 3
    assert not store.hexists(place(new).record, "m:lock")
    values = SessionStore(new).load()
    assert (values["mine"], values["inside"]) == (1, 3)


def test_commit_waits_for_the_lock_of_the_successor(
    store: redis.Redis, threads: Threads, key: str
) -> None:
    late = opened(key)
    new = cycled(key)
    token = seize(new)
    late["mine"] = 1
    saving = threads.start(late.save)
    wait_for_queue(store, new, 1)
    assert "mine" not in SessionStore(new)
    free(new, token)
    outcome(saving)
    assert SessionStore(new)["mine"] == 1


def test_lock_that_was_lost_is_lost_in_the_successor_too(store: redis.Redis, key: str) -> None:
    late = opened(key)
    with pytest.raises(SessionLockLost), late.lock():
        store.hdel(place(key).record, "m:lock")
        cycled(key)
        late["mine"] = 1


def test_request_inside_a_lock_goes_on_inside(store: redis.Redis, key: str) -> None:
    outer, inner = SessionStore(key), SessionStore(key)
    with outer.lock():
        inner.state.policy = Policy()
        inner.state.policy.lock_header = outer.lock_headers()[HEADER]
        assert inner["n"] == 1
        outer.cycle_key()
        inner["inside"] = 1
        inner.save()
        outer["outside"] = 2
    values = SessionStore(outer.session_key).load()
    assert (values["inside"], values["outside"]) == (1, 2)


class Locked(Policy):
    access = Access.LOCKED


def waiting(key: str) -> SessionStore:
    session = SessionStore(key)
    session.state.policy = Locked()
    session.get("n")
    session.run(lock_scope.close(session.state), "acommit()")
    return session


@pytest.mark.parametrize("changes", ["never", "before", "after"])
def test_waiter_goes_on_where_the_holder_moves_the_session(
    store: redis.Redis, threads: Threads, key: str, changes: str
) -> None:
    """And not where the holder changes the user, before the move or after it."""
    holder = SessionStore(key)
    with holder.lock():
        future = threads.start(waiting, key)
        wait_for_queue(store, key, 1)
        if changes == "before":
            holder[SESSION_KEY] = "2"
            holder.save()
        holder.cycle_key()
        if changes != "before":
            wait_for_queue(store, holder.session_key or "", 1)
        if changes == "after":
            holder[SESSION_KEY] = "2"
        holder["theirs"] = 2
    session = outcome(future)
    if changes == "never":
        assert (session.session_key, session.get("theirs")) == (key, 2)
    else:
        assert (session.session_key, session.state.ended) == (None, EndReason.ROTATED)
    assert not store.hexists(place(holder.session_key or "").record, "m:lock")


def test_waiter_of_an_anonymous_session_follows_no_login(
    store: redis.Redis, threads: Threads
) -> None:
    key = new_session(n=1)
    holder = SessionStore(key)
    with holder.lock():
        future = threads.start(waiting, key)
        wait_for_queue(store, key, 1)
        holder.cycle_key()
        holder[SESSION_KEY] = "1"
    session = outcome(future)
    assert (session.session_key, session.state.ended) == (None, EndReason.ROTATED)


def test_key_that_comes_late_is_worth_nothing(do: Do, key: str) -> None:
    never_loaded = SessionStore(key)
    new = cycled(key)
    assert do(never_loaded, "get", "n") is None
    assert (never_loaded.session_key, never_loaded.state.ended) == (None, EndReason.ROTATED)
    never_loaded["n"] = 2
    with pytest.raises(UpdateError):
        do(never_loaded, "save")
    unseen = SessionStore(key)
    unseen.clear()
    with pytest.raises(UpdateError):
        do(unseen, "save")
    assert opened(new)


def login(key: str) -> str:
    return cycled(key, **{SESSION_KEY: "1"})


def login_as_another(key: str) -> str:
    return cycled(key, **{SESSION_KEY: "2"})


def logout(key: str) -> str:
    session = opened(cycled(key))
    session.flush()
    return ""


@pytest.mark.parametrize(("user", "moves"), [(None, login), ("1", login_as_another), ("1", logout)])
@pytest.mark.parametrize("operation", ["save", "cycle_key", "lock"])
def test_nothing_crosses_a_login_or_a_logout(
    store: redis.Redis, user: str | None, moves: Callable[[str], str], operation: str
) -> None:
    key = new_session(n=1, **({SESSION_KEY: user} if user else {}))
    late = opened(key)
    new = moves(key)
    before = SessionStore(new).load() if new else {}
    late["mine"] = 1
    if operation == "cycle_key" and user is None:
        # Two clicks on "log in": a session of its own takes nothing from anybody.
        late.cycle_key()
        assert late.session_key not in (key, new)
    else:
        with pytest.raises(UpdateError):
            late.lock().__enter__() if operation == "lock" else getattr(late, operation)()
    assert (SessionStore(new).load() if new else {}) == before


def test_what_others_took_over_is_not_read_either(store: redis.Redis, key: str) -> None:
    late = opened(key)
    new = cycled(key)
    late["mine"] = 1
    late.save()
    other = SessionStore(new)
    other[SESSION_KEY] = "2"
    other.save()
    with pytest.raises(UpdateError), late.lock():
        pass
    assert not store.hexists(place(new).record, "m:lock")


def test_logout_ends_the_session_where_it_goes_on(store: redis.Redis, do: Do, key: str) -> None:
    late, moved_on = opened(key), opened(key)
    new = cycled(key)
    do(late, "flush")
    assert records(store) == []
    assert store.hget(place(new).record, "m:end") == b"flushed"
    assert (late.session_key, late.state.ended) == (None, None)
    moved_on["n"] = 2
    with pytest.raises(UpdateError):
        do(moved_on, "save")


def test_flush_with_the_hash_of_before_ends_nothing(do: Do, key: str) -> None:
    """Django does that where the password is another one."""
    late = opened(key)
    new = cycled(key, **{HASH_SESSION_KEY: "second hash"})
    do(late, "flush")
    assert (late.session_key, late.state.ended) == (None, EndReason.ROTATED)
    assert opened(new)[SESSION_KEY] == "1"


def test_tombstone_of_an_earlier_release_leads_nowhere(
    store: redis.Redis, do: Do, key: str
) -> None:
    late = opened(key)
    new = cycled(key)
    assert store.hgetall(place(key).record) == {
        **OLD_TOMBSTONE,
        b"m:next": session_id(new).encode(),
    }
    late["n"] = 2
    for wrong in (None, b"", b"not an id", session_id("nothing is there").encode()):
        store.hdel(place(key).record, "m:next")
        if wrong is not None:
            store.hset(place(key).record, "m:next", wrong)
        with pytest.raises(UpdateError, match="rotated"):
            do(late, "save")
    assert opened(new)


def test_registry_knows_the_session_that_has_moved_on(store: redis.Redis, key: str) -> None:
    late = opened(key)
    cycled(key)
    late["mine"] = 1
    late.save()
    assert [entry.is_current for entry in registry.sessions_of(1, current=late)] == [True]
    assert registry.end_sessions_of(1, keep=late) == 0


def test_login_again_after_a_move_has_a_key_of_its_own(
    store: redis.Redis, settings: Any, key: str
) -> None:
    """A user who cannot be read logs in where others have cycled the key."""
    settings.SESSION_SERIALIZER = "tests.serializers.PickleSerializer"
    late = SessionStore(key)
    assert SESSION_KEY not in late
    settings.SESSION_SERIALIZER = "django.contrib.sessions.serializers.JSONSerializer"
    new = cycled(key)
    late.cycle_key()
    assert late.session_key not in (None, key, new)
    late[SESSION_KEY] = "2"
    late.save()
    assert records(store) == [place(late.session_key or "").record.encode()]
    assert "n" not in SessionStore(late.session_key)
