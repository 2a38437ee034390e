"""From where sessions are used: what is kept of it, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from django.contrib.auth import login, logout
from django.contrib.auth.models import User
from django.http import HttpRequest, HttpResponse
from django.test import AsyncRequestFactory, RequestFactory

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.middleware import ClusteredSessionMiddleware
from django_clustered_sessions.protocol.record import FIRST, LAST, SessionKeys
from django_clustered_sessions.session.client_info import Client
from tests.clusters import ClusterServers
from tests.servers import StoreServer, wait_for

BACKEND = "django.contrib.auth.backends.ModelBackend"
ANN, BOB = User(pk=1, username="ann"), User(pk=2, username="bob")


@pytest.fixture
def tracking(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.CLUSTERED_SESSIONS_TRACK_CLIENTS = True
    monkeypatch.setattr(User, "save", lambda self, **kwargs: None)


View = Callable[[HttpRequest], Any]


def visit(view: View, peer: str, key: str | None = None, agent: str = "Fox/1") -> str | None:
    """Make a request under the middleware and return the key of its session afterwards."""
    request = RequestFactory(REMOTE_ADDR=peer, HTTP_USER_AGENT=agent).get("/")
    return _answered(request, view, key)


def _answered(request: HttpRequest, view: View, key: str | None) -> str | None:
    if key:
        request.COOKIES["sessionid"] = key

    def get_response(request: HttpRequest) -> HttpResponse:
        view(request)
        return HttpResponse()

    response = ClusteredSessionMiddleware(get_response)(request)
    assert response.status_code == 200
    cookie = response.cookies.get("sessionid")
    return cookie.value if cookie else key


def log_in(request: HttpRequest, user: User = ANN) -> None:
    login(request, user, backend=BACKEND)


def change(request: HttpRequest) -> None:
    request.session["n"] = request.session.get("n", 0) + 1


def used(user: User = ANN) -> tuple[Client | None, Client | None]:
    (entry,) = registry.sessions_of(user)
    return entry.first, entry.last


def test_first_and_last_client_of_a_user_are_kept(store: redis.Redis, tracking: None) -> None:
    key = visit(change, "192.0.2.1", agent="Old")
    assert fields(store, key) == set(), "of nobody nothing is kept"
    key = visit(log_in, "192.0.2.2", key)
    assert used() == (Client("192.0.2.2", "Fox/1"), Client("192.0.2.2", "Fox/1"))
    visit(change, "2001:db8::3", key, "Bär/2\x00\r\n" + "x" * 5000)
    first, last = used()
    assert first == Client("192.0.2.2", "Fox/1")
    assert last == Client("2001:db8::3", ("Bär/2   " + "x" * 5000)[:200])
    visit(lambda request: request.session.get("n"), "192.0.2.4", key)
    assert used() == (first, last), "a read writes nothing"


def fields(store: redis.Redis, key: str | None) -> set[bytes]:
    return {FIRST, LAST} & set(store.hkeys(SessionKeys.of("session", key or "").record))


def test_renewal_tells_of_a_client_as_well(
    store: redis.Redis, tracking: None, settings: Any
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = True
    key = visit(log_in, "192.0.2.1")
    begun = store.time()[0]
    wait_for(lambda: store.time()[0] > begun + 1, "the next second")
    visit(lambda request: request.session.get("n"), "192.0.2.2", key)
    first, last = used()
    assert first and last and (first.address, last.address) == ("192.0.2.1", "192.0.2.2")


def test_client_under_asgi_is_kept(store: redis.Redis, tracking: None) -> None:
    key = visit(log_in, "192.0.2.1")

    async def view(request: HttpRequest) -> HttpResponse:
        await request.session.aset("n", 1)
        return HttpResponse()

    request = AsyncRequestFactory().get("/", headers={"user-agent": "Async/1"})
    request.COOKIES["sessionid"] = key or ""
    asyncio.run(ClusteredSessionMiddleware(view)(request))
    assert used()[1] == Client("127.0.0.1", "Async/1")


def test_new_key_keeps_clients_and_a_new_user_does_not(store: redis.Redis, tracking: None) -> None:
    key = visit(log_in, "192.0.2.1")
    key = visit(lambda request: request.session.cycle_key(), "192.0.2.2", key)
    first, _ = used()
    assert first and first.address == "192.0.2.1"

    def switch(request: HttpRequest) -> None:
        request.session["_auth_user_id"] = "2"

    visit(switch, "192.0.2.3", key)
    first, last = used(BOB)
    assert first == last == Client("192.0.2.3", "Fox/1")
    visit(lambda request: request.session.pop("_auth_user_id"), "192.0.2.4", key)
    assert fields(store, key) == set()


def test_clients_go_with_the_session(store: redis.Redis, tracking: None) -> None:
    key = visit(log_in, "192.0.2.1")
    assert fields(store, key) == {FIRST, LAST}

    def leave(request: HttpRequest) -> None:
        request.user = ANN
        logout(request)

    visit(leave, "192.0.2.1", key)
    assert fields(store, key) == set()
    assert not any(b"192.0.2.1" in (store.dump(name) or b"") for name in store.scan_iter())


def test_write_outside_a_request_changes_no_client(store: redis.Redis, tracking: None) -> None:
    key = visit(log_in, "192.0.2.1")
    session = SessionStore(key)
    session["n"] = 1
    session.save()
    assert used()[1] == Client("192.0.2.1", "Fox/1")


def test_nothing_is_kept_or_told_where_it_is_off(
    store: redis.Redis, tracking: None, settings: Any
) -> None:
    key = visit(log_in, "192.0.2.1")
    settings.CLUSTERED_SESSIONS_TRACK_CLIENTS = False
    visit(change, "192.0.2.2", key)
    assert used() == (None, None)
    other = visit(lambda request: log_in(request, BOB), "192.0.2.3")
    assert fields(store, other) == set()
    settings.CLUSTERED_SESSIONS_TRACK_CLIENTS = True
    assert used(BOB) == (None, None)
    visit(change, "192.0.2.4", other)
    assert used(BOB) == (Client("192.0.2.4", "Fox/1"),) * 2


@pytest.fixture
def cluster(store_server: StoreServer, settings: Any) -> Iterator[ClusterServers]:
    with ClusterServers(binary=store_server.binary) as servers:
        servers.use(settings)
        yield servers


@pytest.mark.full
def test_new_key_on_a_cluster_keeps_clients(cluster: ClusterServers, tracking: None) -> None:
    key = visit(log_in, "192.0.2.1")
    for number in range(3):
        key = visit(change, "192.0.2.2", key)
        key = visit(lambda request: request.session.get("n"), f"192.0.2.{number}", key)
        before = used()
        session = SessionStore(key)
        session.get("n")
        session.cycle_key()
        key = session.session_key
        assert used() == before
        assert before[0] and before[0].address == "192.0.2.1"
