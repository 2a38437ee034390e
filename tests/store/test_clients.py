"""From where sessions are used: whose word counts, what is kept, and for how long."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from django.contrib.auth import login, logout
from django.contrib.auth.models import User
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, HttpResponse
from django.test import AsyncRequestFactory, RequestFactory
from hypothesis import given
from hypothesis import strategies as st

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.checks.settings import check_settings
from django_clustered_sessions.middleware import ClusteredSessionMiddleware
from django_clustered_sessions.protocol.record import FIRST, LAST, Place
from django_clustered_sessions.session import clients
from django_clustered_sessions.session.clients import Client
from tests.clusters import ClusterServers
from tests.servers import StoreServer, wait_for

BACKEND = "django.contrib.auth.backends.ModelBackend"
ANN, BOB = User(pk=1, username="ann"), User(pk=2, username="bob")

#: Addresses of the site's proxies, of a client, and one that the client made up.
CDN, BALANCER, CLIENT, LIE = "198.51.100.7", "10.0.0.5", "203.0.113.9", "192.0.2.66"
NETWORKS = ["198.51.100.0/24", "10.0.0.0/8"]


def address(peer: str | None, forwarded: str | None = None) -> str:
    """Return the address of a client by its peer and the header."""
    meta = {} if peer is None else {"REMOTE_ADDR": peer}
    return Client.of(
        meta if forwarded is None else {**meta, "HTTP_X_FORWARDED_FOR": forwarded}
    ).address


@pytest.mark.parametrize("peer", [CLIENT, "2001:db8::7", "", None])
def test_without_proxies_nobodys_word_counts(peer: str | None) -> None:
    assert address(peer, LIE) == address(peer) == (peer or "")


@pytest.mark.parametrize(
    ("proxies", "peer", "forwarded", "expected"),
    [
        # As it should be; and with what the client had put there.
        (NETWORKS, BALANCER, f"{CLIENT}, {CDN}", CLIENT),
        (NETWORKS, BALANCER, f"{LIE}, {CLIENT}, {CDN}", CLIENT),
        (NETWORKS, BALANCER, f"{CDN}, {BALANCER}, {CLIENT}, {CDN}", CLIENT),
        (NETWORKS, BALANCER, f'"{LIE}, {CLIENT}, {CDN}', CLIENT),
        (NETWORKS, BALANCER, f"for={LIE};x, junk, \xff, {CLIENT}, {CDN}", CLIENT),
        (NETWORKS, BALANCER, f"2001:db8::7, {CDN}", "2001:db8::7"),
        (NETWORKS, BALANCER, f"[2001:DB8::7]:443, {CDN}:80", "2001:db8::7"),
        # Past the content network, past all, or without the header.
        (NETWORKS, BALANCER, f"{LIE}, {CLIENT}", BALANCER),
        (NETWORKS, CLIENT, f"{LIE}, {CDN}", CLIENT),
        (NETWORKS, CLIENT, f"{LIE}, {CDN}, {BALANCER}", CLIENT),
        (NETWORKS, BALANCER, None, BALANCER),
        (NETWORKS, BALANCER, "", BALANCER),
        # The last one speaks through a unix socket.
        (["127.0.0.1"], "", CLIENT, CLIENT),
        (["127.0.0.1"], None, f"{LIE}, {CLIENT}", CLIENT),
        (NETWORKS, None, f"{CLIENT}, {CDN}", ""),
        (("2001:db8:1::/48",), "2001:db8:1::1", CLIENT, CLIENT),
        (["10.0.0.5"], "10.0.0.51", LIE, "10.0.0.51"),
        (1, BALANCER, f"{LIE}, {CLIENT}", CLIENT),
        (2, BALANCER, f"{LIE}, {CLIENT}, {CDN}", CLIENT),
        (2, BALANCER, CLIENT, BALANCER),
        (1, None, CLIENT, CLIENT),
    ],
)
def test_behind_proxies_their_word_counts_alone(
    settings: Any, proxies: Any, peer: str | None, forwarded: str | None, expected: str
) -> None:
    settings.CLUSTERED_SESSIONS_TRUSTED_PROXIES = proxies
    assert check_settings() == []
    assert address(peer, forwarded) == expected


def test_without_the_library_proxies_are_refused(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.CLUSTERED_SESSIONS_TRUSTED_PROXIES = 1
    monkeypatch.setitem(sys.modules, "python_ipware", None)
    with pytest.raises(ImproperlyConfigured, match="clients"):
        address(BALANCER, CLIENT)


@given(st.text(), st.text())
def test_whatever_a_browser_says_is_kept_short_and_printable(agent: str, peer: str) -> None:
    client = Client.of({"HTTP_USER_AGENT": agent * 50, "REMOTE_ADDR": peer})
    assert len(client.user_agent) <= 200 and client.user_agent.isprintable()
    assert len(client.pack()) <= 1200
    if agent.isprintable() and agent == agent.strip() and len(agent) * 50 <= 200:
        assert client.user_agent == agent * 50
    if peer.isascii() and len(peer) <= 64:
        assert Client.parse(client.pack()) == client


@pytest.mark.parametrize("stored", [b"", b"[]", b"{", b"\xff", b'["1"]', b"7", b"[1,2,3]"])
def test_damage_is_nobody(stored: bytes) -> None:
    assert Client.parse(stored) is None


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


def test_first_and_last(store: redis.Redis, tracking: None) -> None:
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
    return {FIRST, LAST} & set(store.hkeys(Place.of("session", key or "").record))


def test_a_renewal_tells_as_well(store: redis.Redis, tracking: None, settings: Any) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = True
    key = visit(log_in, "192.0.2.1")
    begun = store.time()[0]
    wait_for(lambda: store.time()[0] > begun + 1, "the next second")
    visit(lambda request: request.session.get("n"), "192.0.2.2", key)
    first, last = used()
    assert first and last and (first.address, last.address) == ("192.0.2.1", "192.0.2.2")


def test_under_asgi(store: redis.Redis, tracking: None) -> None:
    key = visit(log_in, "192.0.2.1")

    async def view(request: HttpRequest) -> HttpResponse:
        await request.session.aset("n", 1)
        return HttpResponse()

    request = AsyncRequestFactory().get("/", headers={"user-agent": "Async/1"})
    request.COOKIES["sessionid"] = key or ""
    asyncio.run(ClusteredSessionMiddleware(view)(request))
    assert used()[1] == Client("127.0.0.1", "Async/1")


def test_a_new_key_keeps_them_and_a_new_user_does_not(store: redis.Redis, tracking: None) -> None:
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


def test_they_go_with_the_session(store: redis.Redis, tracking: None) -> None:
    key = visit(log_in, "192.0.2.1")
    assert fields(store, key) == {FIRST, LAST}

    def leave(request: HttpRequest) -> None:
        request.user = ANN
        logout(request)

    visit(leave, "192.0.2.1", key)
    assert fields(store, key) == set()
    assert not any(b"192.0.2.1" in (store.dump(name) or b"") for name in store.scan_iter())


def test_what_is_no_request_changes_none(store: redis.Redis, tracking: None) -> None:
    key = visit(log_in, "192.0.2.1")
    session = SessionStore(key)
    session["n"] = 1
    session.save()
    assert used()[1] == Client("192.0.2.1", "Fox/1")


def test_off_nothing_is_kept_and_nothing_told(
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
def test_on_a_cluster_a_new_key_keeps_them(cluster: ClusterServers, tracking: None) -> None:
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


def test_the_setting_is_read_anew(settings: Any) -> None:
    assert clients._proxies.reader is None
    settings.CLUSTERED_SESSIONS_TRUSTED_PROXIES = 1
    assert clients._proxies.reader is not None
