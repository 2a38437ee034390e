"""Signals about sessions, sent where it happens, once the store has it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from django.contrib.auth import login, logout
from django.contrib.auth.models import AnonymousUser, User
from django.http import HttpRequest, HttpResponse
from django.test import AsyncRequestFactory, RequestFactory

from django_clustered_sessions import registry, signals
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionNotReplicated, SessionStoreUnavailable
from django_clustered_sessions.management.commands.sessionevents import Worker
from django_clustered_sessions.middleware import ClusteredSessionMiddleware
from django_clustered_sessions.protocol.record import SessionKeys, session_id
from django_clustered_sessions.signals import session_created, session_ended, session_expired
from tests.gateways import wait_for_replicas
from tests.servers import CountingProxy, wait_for

pytestmark = pytest.mark.usefixtures("no_databases")

SIGNALS = {"created": session_created, "ended": session_ended, "expired": session_expired}


class Receiver:
    """Remembers what it was told."""

    def __init__(self, store: redis.Redis) -> None:
        self._store = store
        self.heard: list[tuple[Any, ...]] = []

    def created(self, sender: Any, session_id: str, user_id: str | None, **kwargs: Any) -> None:
        # Whoever is told finds it in the store.
        assert registry.find(session_id) is not None
        self.heard.append(("created", session_id, user_id))

    def ended(self, sender: Any, session_id: str, **about: Any) -> None:
        assert sender is SessionStore
        assert registry.find(session_id) is None
        told = (about["user_id"], about["reason"], about["replaced_by"])
        self.heard.append(("ended", session_id, *told))

    def expired(self, sender: Any, session_id: str, **about: Any) -> None:
        assert about["event"].session_id == session_id
        self.heard.append(("expired", session_id, about["user_id"]))


@pytest.fixture
def receiver(store: redis.Redis) -> Iterator[Receiver]:
    found = Receiver(store)
    for name, signal in SIGNALS.items():
        signal.connect(getattr(found, name), weak=False, dispatch_uid="test")
    yield found
    for signal in SIGNALS.values():
        signal.disconnect(dispatch_uid="test")


def public_id(session: Any) -> str:
    return session_id(session.session_key)


def saved(user: object = None) -> SessionStore:
    session = SessionStore()
    if user is not None:
        session["_auth_user_id"] = str(user)
    session.save()
    return session


def test_session_is_told_of_from_login_to_logout(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(User, "save", lambda self, **kwargs: None)
    request = HttpRequest()
    request.session, request.user = saved(), AnonymousUser()
    first = public_id(request.session)
    login(request, User(pk=7), backend="django.contrib.auth.backends.ModelBackend")
    request.session.save()
    second = public_id(request.session)
    request.session.cycle_key()
    third = public_id(request.session)
    logout(request)
    assert receiver.heard == [
        ("created", first, None),
        ("ended", first, None, "replaced", second),
        ("ended", second, "7", "replaced", third),
        ("ended", third, "7", "logout", None),
    ]


def test_receivers_of_a_twin_are_called_in_a_thread(receiver: Receiver, store: redis.Redis) -> None:
    """Receivers ask the store, so they are called in a thread."""

    async def main() -> list[str]:
        session = SessionStore()
        await session.aset("_auth_user_id", "7")
        await session.asave()
        first = public_id(session)
        await session.acycle_key()
        second = public_id(session)
        await session.aflush()
        return [first, second]

    first, second = asyncio.run(main())
    assert receiver.heard == [
        ("created", first, "7"),
        ("ended", first, "7", "replaced", second),
        ("ended", second, "7", "logout", None),
    ]


def test_session_that_somebody_else_ends_is_told_of(receiver: Receiver) -> None:
    deleted, ended, *all_of_them = (saved(7) for _ in range(4))
    receiver.heard.clear()
    SessionStore().delete(deleted.session_key)
    SessionStore().delete(deleted.session_key)
    assert registry.end_session(public_id(ended))
    assert not registry.end_session(public_id(ended))
    assert asyncio.run(registry.aend_sessions_of(7)) == 2
    assert receiver.heard[:2] == [
        ("ended", public_id(deleted), "7", "deleted", None),
        ("ended", public_id(ended), "7", "ended", None),
    ]
    assert set(receiver.heard[2:]) == {
        ("ended", public_id(session), "7", "ended", None) for session in all_of_them
    }


def test_what_is_not_stored_is_not_told(receiver: Receiver) -> None:
    session = SessionStore()
    session.set_expiry(-1)
    session.save()
    SessionStore("x" * 32).flush()
    assert receiver.heard == []


def test_an_expiry_is_told_by_the_worker(
    receiver: Receiver, store: redis.Redis, settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_EVENTS_KEPT = 1000
    session = saved(7)
    session.set_expiry(1)
    session.save()
    record = SessionKeys.of("session", session.session_key or "").record
    wait_for(lambda: not store.exists(record), "it has expired")
    assert receiver.heard == [("created", public_id(session), "7")]
    Worker(lambda event: None, 60).run(once=True)
    assert receiver.heard[1:] == [("expired", public_id(session), None)]


def test_an_expiry_that_a_receiver_fails_on_is_told_again(
    receiver: Receiver, store: redis.Redis, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings.CLUSTERED_SESSIONS_EVENTS_KEPT = 1000
    session = saved()
    session.set_expiry(-1)
    session.save()

    def fail(**kwargs: Any) -> None:
        raise ValueError("not now")

    session_expired.connect(fail, dispatch_uid="fails")
    try:
        failing = Worker(lambda event: None, 60)
        failing.run(once=True)
        assert failing.failures == 1
    finally:
        session_expired.disconnect(dispatch_uid="fails")
    assert store.xlen(SessionKeys.of("session", session.session_key or "").events) == 1


@pytest.mark.parametrize("is_async", [False, True])
def test_a_receiver_that_fails_disturbs_no_request(
    receiver: Receiver, caplog: pytest.LogCaptureFixture, is_async: bool
) -> None:
    def fail(**kwargs: Any) -> None:
        raise ValueError("no such mail server")

    async def afail(**kwargs: Any) -> None:
        raise ValueError("no such other server")

    def view(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 1
        return HttpResponse("fine")

    async def aview(request: HttpRequest) -> HttpResponse:
        await request.session.aset("n", 1)
        return HttpResponse("fine")

    for number, one in enumerate((fail, afail)):
        session_created.connect(one, dispatch_uid=f"fails {number}")
    try:
        if is_async:
            middleware: Any = ClusteredSessionMiddleware(aview)
            response = asyncio.run(middleware(AsyncRequestFactory().get("/")))
        else:
            response = ClusteredSessionMiddleware(view)(RequestFactory().get("/"))
    finally:
        for number in range(2):
            session_created.disconnect(dispatch_uid=f"fails {number}")
    assert (response.status_code, response.content) == (200, b"fine")
    assert response.cookies["sessionid"].value
    assert [name for name, *_ in receiver.heard] == ["created"]
    assert "no such mail server" in caplog.text and "no such other server" in caplog.text


def test_a_receiver_may_use_sessions(store: redis.Redis) -> None:
    made: list[SessionStore] = []

    def make_one_more(**kwargs: Any) -> None:
        if len(made) < 3:
            made.append(SessionStore())
            made[-1].save()

    session_created.connect(make_one_more, dispatch_uid="test")
    try:
        saved()
    finally:
        session_created.disconnect(dispatch_uid="test")
    assert len({session.session_key for session in made}) == 3


def test_session_on_too_few_replicas_is_told_of(
    receiver: Receiver, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.CLUSTERED_SESSIONS_SYNC_REPLICAS = 1
    wait_for_replicas(monkeypatch, 0.01)
    session = SessionStore()
    with pytest.raises(SessionNotReplicated):
        session.create()
    created = public_id(session)
    with pytest.raises(SessionNotReplicated):
        registry.end_session(created)
    assert receiver.heard == [("created", created, None), ("ended", created, None, "ended", None)]


def test_what_the_store_does_not_confirm_is_not_told(
    receiver: Receiver, proxy: CountingProxy
) -> None:
    session = saved()
    receiver.heard.clear()
    proxy.refuse()
    for operation in (SessionStore().save, session.flush, session.cycle_key):
        with pytest.raises(SessionStoreUnavailable):
            operation()
    assert receiver.heard == []


def test_without_receivers_nothing_is_noted(
    store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals.PendingSignals, "created", None)
    monkeypatch.setattr(signals.PendingSignals, "ended", None)
    session = saved(7)
    session.cycle_key()
    session.flush()
    saved(7)
    assert registry.end_sessions_of(7) == 1


def test_session_that_has_to_make_room_is_told_of(receiver: Receiver, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_MAX_SESSIONS_PER_USER = 1
    settings.CLUSTERED_SESSIONS_EVENTS_KEPT = 1000
    ids = []
    for _ in range(2):
        session = SessionStore()
        session["_auth_user_id"] = "1"
        session.save()
        ids.append(session_id(session.session_key or ""))
    assert receiver.heard.count(("ended", ids[0], "1", "limit", None)) == 1
    handled: list[Any] = []
    Worker(handled.append, 60).run(once=True)
    told = [(event.kind, event.session_id, event.reason) for event in handled]
    assert told.count(("ended", ids[0], "limit")) == 1
