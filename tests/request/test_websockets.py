"""Real servers and real sockets: what is logged out on one node is closed on the other.

The servers of the tests import this file too: ``daphne tests.request.test_websockets:application``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import django
import pytest
from django.conf import settings as django_settings
from django.contrib.auth.signals import user_logged_in
from django.http import HttpRequest, HttpResponse
from django.urls import path
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from tests.children import ROOT, bound
from tests.conftest import store_binary, use_store
from tests.servers import StoreServer, free_port, wait_for

# Two servers take seconds to start. What they show of the engine is shown without them, and in less
# time, by test_endings.py.
pytestmark = pytest.mark.full

#: How long what is to come may take on a slow machine, in seconds.
PATIENCE_S = 30.0

ANN = 7

# In the servers.


class Users:
    """One user, without a database."""

    def get_user(self, user_id: Any) -> Any:
        from django.contrib.auth.models import User

        return User(pk=user_id, username="ann")


def log_in(request: HttpRequest) -> HttpResponse:
    from django.contrib.auth import login

    login(request, Users().get_user(ANN), backend="tests.request.test_websockets.Users")
    return HttpResponse("in")


def log_out(request: HttpRequest) -> HttpResponse:
    from django.contrib.auth import logout

    logout(request)
    return HttpResponse("out")


def change_password(request: HttpRequest) -> HttpResponse:
    from django.contrib.auth import update_session_auth_hash

    update_session_auth_hash(request, request.user)
    return HttpResponse("changed")


def said(request: HttpRequest) -> HttpResponse:
    return HttpResponse(request.session.get("said", ""))


def ready(request: HttpRequest) -> HttpResponse:
    # Asks the store.
    return HttpResponse(f"ready {request.session.exists('x' * 32)}")


def make_application() -> Any:
    settings: Any = django_settings
    settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, "channels"]
    settings.AUTHENTICATION_BACKENDS = ["tests.request.test_websockets.Users"]
    pages = (log_in, log_out, change_password, said, ready)
    settings.ROOT_URLCONF = tuple(path(page.__name__, page) for page in pages)
    use_store(settings, os.environ["TEST_STORE"])
    django.setup()
    # It would want a database.
    user_logged_in.disconnect(dispatch_uid="update_last_login")

    from channels.auth import AuthMiddlewareStack
    from channels.generic.websocket import AsyncJsonWebsocketConsumer, JsonWebsocketConsumer
    from channels.routing import ProtocolTypeRouter, URLRouter
    from django.core.handlers.asgi import ASGIHandler

    from django_clustered_sessions.channels import EndsWithSession

    def note(what: str) -> None:
        with open(os.environ["TEST_NOTES"], "a") as notes:
            print(what, file=notes)

    class Async(AsyncJsonWebsocketConsumer):
        async def receive_json(self, content: Any) -> None:
            await self.scope["session"].aset("said", content)
            await self.scope["session"].asave()
            await self.send_json([self.scope["user"].username, content])

        async def disconnect(self, code: int) -> None:
            note(f"async {code}")

    class Sync(JsonWebsocketConsumer):
        def receive_json(self, content: Any) -> None:
            self.scope["session"]["said"] = content
            self.scope["session"].save()
            self.send_json([self.scope["user"].username, content])

        def disconnect(self, code: int) -> None:
            note(f"sync {code}")

    routes = [path("async", Async.as_asgi()), path("sync", Sync.as_asgi())]
    return ProtocolTypeRouter(
        {
            "http": ASGIHandler(),
            "websocket": AuthMiddlewareStack(EndsWithSession(URLRouter(routes))),
        }
    )


def __getattr__(name: str) -> Any:
    # Made where a server asks for it, and not in the test, which imports this file as well.
    if name == "application":
        return make_application()
    raise AttributeError(name)


# In the test.


class Refused(Exception):
    """A node has answered with an error, such as 503 while its store is away."""


class Node:
    """A real server on a port of its own; it may be killed and started anew."""

    def __init__(self, kind: str, store: str, notes: Path) -> None:
        self.kind, self.port = kind, free_port()
        self._notes = notes
        where = {
            "daphne": ("daphne", "-b", "127.0.0.1", "-p", str(self.port), "-v", "0"),
            "uvicorn": ("uvicorn", "--port", str(self.port), "--log-level", "warning"),
        }[kind]
        self._command = [sys.executable, "-m", *where, "tests.request.test_websockets:application"]
        if kind == "uvicorn":
            self._command += ["--lifespan", "off"]
        self._environment = os.environ | {
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            "PYTHONPATH": str(ROOT),
            "TEST_STORE": store,
            "TEST_NOTES": str(notes),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(bound(self._command), cwd=ROOT, env=self._environment)

    def wait(self) -> None:
        def answers() -> bool:
            assert self._process and self._process.poll() is None, f"{self.kind} did not start"
            with suppress(OSError, Refused):
                return self.get("ready")[0] == "ready False"
            return False

        wait_for(answers, f"{self.kind} answers", timeout_s=PATIENCE_S)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=PATIENCE_S)

    def get(self, page: str, key: str = "") -> tuple[str, str]:
        """Return a page's text, and the session key that it has set, or the one from before."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            headers = {"Cookie": f"sessionid={key}"} if key else {}
            connection.request("GET", f"/{page}", headers=headers)
            response = connection.getresponse()
            text = response.read().decode()
            if response.status != 200:
                raise Refused(text)
            cookie = response.getheader("Set-Cookie") or ""
            return text, cookie.partition("sessionid=")[2].partition(";")[0] or key
        finally:
            connection.close()

    def socket(self, route: str, key: str) -> ClientConnection:
        """Open a websocket, as a browser does that has the cookie."""
        url = f"ws://127.0.0.1:{self.port}/{route}"
        headers = {"Cookie": f"sessionid={key}", "Origin": f"http://127.0.0.1:{self.port}"}
        return connect(url, additional_headers=headers, open_timeout=PATIENCE_S)

    @property
    def notes(self) -> list[str]:
        """Return the lines that the consumers have written, in order."""
        return self._notes.read_text().splitlines() if self._notes.exists() else []


def say(socket: ClientConnection, what: str) -> list[str]:
    socket.send(json.dumps(what))
    answer: list[str] = json.loads(socket.recv(timeout=PATIENCE_S))
    return answer


def closed(socket: ClientConnection) -> tuple[int, str]:
    """Wait for the close frame; return its code and reason."""
    with pytest.raises(ConnectionClosed) as raised:
        socket.recv(timeout=PATIENCE_S)
    frame = raised.value.rcvd
    assert frame is not None
    return frame.code, frame.reason


@pytest.fixture(scope="module")
def server() -> Iterator[StoreServer]:
    """Run a store that keeps what it was told over a restart."""
    flags = ("--appendonly", "yes", "--appendfsync", "always")
    with StoreServer(*flags, binary=store_binary("valkey")) as started:
        yield started


@pytest.fixture(scope="module")
def nodes(server: StoreServer, tmp_path_factory: Any) -> Iterator[dict[str, Node]]:
    """Run one site on two nodes, each with a server of another kind."""
    folder = tmp_path_factory.mktemp("nodes")
    kinds = ("uvicorn", "daphne")
    started = {kind: Node(kind, f"{server.url}/1", folder / kind) for kind in kinds}
    try:
        for node in started.values():
            node.start()
        for node in started.values():
            node.wait()
        yield started
    finally:
        for node in started.values():
            node.kill()


@pytest.fixture(autouse=True)
def here(server: StoreServer, settings: Any) -> None:
    """Point the test's own settings at the nodes' store."""
    use_store(settings, f"{server.url}/1")


@pytest.mark.parametrize(
    ("one", "other", "route"), [("uvicorn", "daphne", "async"), ("daphne", "uvicorn", "sync")]
)
def test_logout_on_one_node_closes_the_socket_on_the_other(
    nodes: dict[str, Node], one: str, other: str, route: str
) -> None:
    a, b = nodes[one], nodes[other]
    _, key = a.get("log_in")
    with b.socket(route, key) as socket:
        assert say(socket, "hello") == ["ann", "hello"]
        assert a.get("said", key)[0] == "hello"
        a.get("log_out", key)
        # Daphne knows of no reasons.
        assert closed(socket) in [(4401, "flushed"), (4401, "")]
    wait_for(lambda: b.notes[-1:] == [f"{route} 4401"], "the consumer is told", timeout_s=30)


async def test_ending_a_users_sessions_closes_their_sockets(nodes: dict[str, Node]) -> None:
    keys = [nodes["uvicorn"].get("log_in")[1] for _ in range(3)]
    one, two, three = (nodes["daphne"].socket("async", key) for key in keys)
    with one, two, three:
        for socket in (one, two, three):
            say(socket, "hello")
        kept = SessionStore(keys[2])
        assert await registry.aend_sessions_of(ANN, keep=kept) >= 2
        assert {closed(one)[0], closed(two)[0]} == {4401}
        assert say(three, "still here") == ["ann", "still here"]
        await kept.aflush()
        assert closed(three)[0] == 4401


@pytest.mark.parametrize("kind", ["uvicorn", "daphne"])
def test_change_of_password_asks_the_client_to_come_back(nodes: dict[str, Node], kind: str) -> None:
    node = nodes[kind]
    _, before = node.get("log_in")
    with node.socket("async", before) as socket:
        _, key = node.get("change_password", before)
        assert key != before
        assert closed(socket)[0] == 4301
    # It was faster than the answer to the change, and has the old cookie.
    with node.socket("async", before) as socket:
        assert closed(socket)[0] == 4301
    with node.socket("async", key) as socket:
        assert say(socket, "again") == ["ann", "again"]


def test_socket_opens_again_on_a_server_that_was_killed(nodes: dict[str, Node]) -> None:
    node = nodes["uvicorn"]
    _, key = node.get("log_in")
    with node.socket("async", key) as socket:
        say(socket, "hello")
        node.kill()
        with pytest.raises(ConnectionClosed) as raised:
            socket.recv(timeout=PATIENCE_S)
        assert raised.value.rcvd is None
    node.start()
    node.wait()
    with node.socket("async", key) as socket:
        assert say(socket, "back") == ["ann", "back"]
        node.get("log_out", key)
        assert closed(socket)[0] == 4401


def test_store_that_is_stopped_closes_no_socket(
    nodes: dict[str, Node], server: StoreServer
) -> None:
    _, key = nodes["uvicorn"].get("log_in")
    with ExitStack() as stack:
        opening = (node.socket("async", key) for node in nodes.values())
        sockets = [stack.enter_context(socket) for socket in opening]
        for socket in sockets:
            say(socket, "hello")
        server.stop()
        for socket in sockets:
            # More than one look, each of which fails.
            with pytest.raises(TimeoutError):
                socket.recv(timeout=1.0)
        server.start()
        for node, socket in zip(nodes.values(), sockets, strict=True):
            node.wait()
            assert say(socket, "still here") == ["ann", "still here"]
        nodes["uvicorn"].get("log_out", key)
        assert [closed(socket)[0] for socket in sockets] == [4401, 4401]
