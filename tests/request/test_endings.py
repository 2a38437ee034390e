"""Websockets under Channels' own stacks, and what becomes of them when their session ends."""

from __future__ import annotations

import asyncio
import gc
import re
import threading
import time
import warnings
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis
from django.conf import settings as django_settings
from django.contrib.auth.models import AnonymousUser
from django.contrib.sessions.backends.signed_cookies import SessionStore as OtherStore
from django.core.exceptions import ImproperlyConfigured

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.channels import EndsWithSession, endings
from django_clustered_sessions.protocol import flows
from django_clustered_sessions.protocol.record import EndReason, SessionKeys
from tests.clusters import ClusterServers
from tests.conftest import store_binary
from tests.pages import page
from tests.servers import CountingProxy

with warnings.catch_warnings():
    # Channels' dependencies use what Python and asgiref are about to remove.
    warnings.simplefilter("ignore", DeprecationWarning)
    from channels.consumer import AsyncConsumer
    from channels.exceptions import StopConsumer
    from channels.generic.websocket import (
        AsyncJsonWebsocketConsumer,
        AsyncWebsocketConsumer,
        JsonWebsocketConsumer,
        WebsocketConsumer,
    )
    from channels.sessions import SessionMiddlewareStack
    from channels.testing import WebsocketCommunicator

#: How long what is to come may take on a slow machine, in seconds.
PATIENCE_S = 30

#: What the sockets of a test were told, in order.
Told = list[Any]


class _Records:
    """Write down what the application is told."""

    told: Told


class Async(_Records, AsyncWebsocketConsumer):
    async def disconnect(self, code: int) -> None:
        self.told.append(code)


class AsyncJson(_Records, AsyncJsonWebsocketConsumer):
    async def disconnect(self, code: int) -> None:
        self.told.append(code)


class Sync(_Records, WebsocketConsumer):
    def disconnect(self, code: int) -> None:
        self.told.append(code)


class SyncJson(_Records, JsonWebsocketConsumer):
    def disconnect(self, code: int) -> None:
        self.told.append(code)


class Bare(_Records, AsyncConsumer):
    async def websocket_connect(self, message: Any) -> None:
        await self.send({"type": "websocket.accept"})

    async def websocket_disconnect(self, message: Any) -> None:
        self.told.append(message["code"])
        raise StopConsumer


class Obedient(Async):
    """Do with its session what its client says, and say when it is done."""

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        if text_data == "shut":
            await self.close(code=4000)
            return
        await getattr(self, text_data or "")(self.scope["session"])
        await self.send(text_data="done")

    async def look(self, session: SessionStore) -> None:
        await session.aget("n")

    async def save(self, session: SessionStore) -> None:
        await session.aset("n", 7)
        await session.asave()

    async def log_in(self, session: SessionStore) -> None:
        await session.acycle_key()
        await session.asave()

    async def log_out(self, session: SessionStore) -> None:
        await session.aflush()


class Busy(Async):
    """Do not come back from a message until the test says so."""

    may_go: asyncio.Event

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        self.told.append("busy")
        await self.may_go.wait()
        await self.send(text_data="too late")


def loading(app: Any) -> Any:
    """Load the session first, as Channels' AuthMiddleware does to find the user."""

    async def loaded(scope: Any, receive: Any, send: Any) -> None:
        await scope["session"].aget("_auth_user_id")
        await app(scope | {"user": AnonymousUser()}, receive, send)

    return loaded


@pytest.fixture
def told() -> Told:
    return []


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Have the sessions looked for often; gives when each look was over."""
    monkeypatch.setattr(endings, "INTERVAL_S", 0.02)
    done: list[float] = []
    look = endings.Watcher.look

    async def noted(watcher: Any) -> None:
        await look(watcher)
        done.append(time.monotonic())

    monkeypatch.setattr(endings.Watcher, "look", noted)
    return done


async def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        await asyncio.sleep(0.005)


async def some_more(looks: list[float]) -> None:
    """Wait until whatever there is to see has been seen, twice over."""
    enough = len(looks) + 4
    await until(lambda: len(looks) >= enough, "sessions are looked for")


async def new_key(**values: Any) -> str:
    session = SessionStore()
    await session.aupdate(values or {"n": 1})
    await session.acreate()
    assert session.session_key is not None
    return session.session_key


@asynccontextmanager
async def opened(
    consumer: Any,
    told: Told,
    key: str | None,
    stack: Callable[[Any], Any] = lambda app: app,
    middleware: Any = EndsWithSession,
    **attributes: Any,
) -> AsyncIterator[WebsocketCommunicator]:
    """Open a socket with that cookie, and close it in the end."""
    own = type(consumer.__name__, (consumer,), {"told": told, **attributes})
    app = SessionMiddlewareStack(stack(middleware(own.as_asgi())))
    name = django_settings.SESSION_COOKIE_NAME
    headers = [(b"cookie", f"{name}={key}".encode())] if key else []
    socket = WebsocketCommunicator(app, "/", headers=headers)
    assert (await socket.connect(timeout=PATIENCE_S))[0]
    try:
        yield socket
    finally:
        await socket.disconnect(timeout=PATIENCE_S)


async def do(socket: WebsocketCommunicator, what: str) -> None:
    await socket.send_to(text_data=what)
    assert await socket.receive_from(timeout=PATIENCE_S) == "done"


async def closed(socket: WebsocketCommunicator) -> tuple[int, str]:
    """Wait for the close, and for the application to end; return code and reason."""
    message = await socket.receive_output(timeout=PATIENCE_S)
    assert message["type"] == "websocket.close"
    await socket.wait(timeout=PATIENCE_S)
    return message["code"], message["reason"]


async def is_open(socket: WebsocketCommunicator) -> bool:
    return not socket.future.done() and await socket.receive_nothing(timeout=0)


@pytest.mark.parametrize("consumer", [Async, AsyncJson, Sync, SyncJson, Bare])
async def test_logout_elsewhere_closes_the_socket_of_any_consumer(
    store: redis.Redis, told: Told, looks: list[float], consumer: Any
) -> None:
    key = await new_key()
    async with opened(consumer, told, key) as socket:
        await some_more(looks)
        assert await is_open(socket)
        await SessionStore(key).aflush()
        assert await closed(socket) == (4401, "flushed")
    assert told == [4401]


async def test_deleted_session_closes_its_socket(
    store: redis.Redis, told: Told, looks: list[float]
) -> None:
    key = await new_key()
    async with opened(Async, told, key) as socket:
        await some_more(looks)
        await SessionStore().adelete(key)
        assert await closed(socket) == (4401, "deleted")


@pytest.mark.parametrize("how", ["expires", "is lost", "is damaged"])
async def test_session_that_is_no_more_closes_its_socket(
    store: redis.Redis, told: Told, looks: list[float], how: str
) -> None:
    key = await new_key()
    record = SessionKeys.of("session", key).record
    async with opened(Async, told, key) as socket:
        await some_more(looks)
        match how:
            case "expires":
                store.pexpire(record, 1)
            case "is lost":
                store.flushall()
            case "is damaged":
                store.set(record, "not a hash")
        assert await closed(socket) == (4401, "expired")


async def test_login_elsewhere_has_a_code_of_its_own(
    store: redis.Redis, told: Told, looks: list[float]
) -> None:
    key = await new_key()
    async with opened(Async, told, key) as socket:
        await SessionStore(key).acycle_key()
        assert await closed(socket) == (4301, "rotated")
    assert told == [4301]


async def test_codes_can_be_changed(store: redis.Redis, told: Told, looks: list[float]) -> None:
    class Mine(EndsWithSession):
        ended_code = 4999
        moved_code = 4998

    key, other = await new_key(), await new_key()
    async with (
        opened(Async, told, key, middleware=Mine) as one,
        opened(Async, told, other, middleware=Mine) as two,
    ):
        await some_more(looks)
        await SessionStore(key).aflush()
        assert await closed(one) == (4999, "flushed")
        await SessionStore(other).acycle_key()
        assert await closed(two) == (4998, "rotated")


async def test_login_by_the_socket_itself_leaves_it_open(
    store: redis.Redis, told: Told, looks: list[float]
) -> None:
    key = await new_key()
    async with opened(Obedient, told, key) as socket:
        sessions = watched_sessions()
        await some_more(looks)
        await do(socket, "log_in")
        await some_more(looks)
        assert await is_open(socket)
        (moved,) = (session.session_key for session in sessions)
        assert moved not in (None, key)
        await SessionStore(moved).aflush()
        assert await closed(socket) == (4401, "flushed")


async def test_login_by_the_socket_is_no_end_before_its_reply(
    store: redis.Redis, told: Told, looks: list[float]
) -> None:
    """The store has moved the session already, and the socket's session does not know it yet."""
    key = await new_key()
    async with opened(Obedient, told, key):
        (watch,) = watches()
        place = watch.keys()
        assert place is not None
        told_ends: list[EndReason] = []
        watch.on_end = told_ends.append
        watch.learn(place, None)
        watch.learn(place, EndReason.ROTATED)
        assert told_ends == []
        watch._session._session_key = await new_key()
        watch.learn(place, EndReason.ROTATED)
        await some_more(looks)
        assert told_ends == []
        watch._session._session_key = key


async def test_logout_by_the_socket_itself_closes_it(
    store: redis.Redis, told: Told, looks: list[float]
) -> None:
    async with opened(Obedient, told, await new_key()) as socket:
        await do(socket, "look")
        await do(socket, "log_out")
        assert await closed(socket) == (4401, "flushed")


@pytest.mark.parametrize("stack", [loading, lambda app: app], ids=["loaded", "not loaded"])
async def test_logout_before_the_first_look_closes_the_socket(
    store: redis.Redis, told: Told, looks: list[float], stack: Any
) -> None:
    """The application may have found a user in the session, and nobody has looked for it yet."""
    key = await new_key()
    async with opened(Obedient, told, key, stack) as socket:
        if stack is not loading:
            await do(socket, "look")
        await SessionStore(key).aflush()
        assert await closed(socket) == (4401, "flushed")


@pytest.mark.parametrize("stack", [loading, lambda app: app], ids=["loaded", "not loaded"])
async def test_cookie_of_a_session_that_is_no_more_ends_nothing(
    store: redis.Redis, told: Told, looks: list[float], stack: Any
) -> None:
    key = await new_key()
    await SessionStore(key).aflush()
    async with opened(Async, told, key, stack) as socket:
        await some_more(looks)
        assert await is_open(socket)


@pytest.mark.parametrize(
    ("stack", "first"),
    [(loading, None), (lambda app: app, None), (lambda app: app, "look")],
    ids=["loaded", "not loaded", "looked at"],
)
async def test_cookie_from_before_a_login_is_sent_back(
    store: redis.Redis,
    told: Told,
    looks: list[float],
    monkeypatch: pytest.MonkeyPatch,
    stack: Any,
    first: str | None,
) -> None:
    may_look, look = asyncio.Event(), endings.Watcher.look

    async def once_opened(watcher: Any) -> None:
        await may_look.wait()
        await look(watcher)

    monkeypatch.setattr(endings.Watcher, "look", once_opened)
    key = await new_key()
    await SessionStore(key).acycle_key()
    async with opened(Obedient, told, key, stack) as socket:
        if first:
            await do(socket, first)
        may_look.set()
        assert await closed(socket) == (4301, "rotated")


async def test_socket_without_a_session_asks_for_nothing(
    store: redis.Redis, proxy: CountingProxy, told: Told, looks: list[float]
) -> None:
    async with opened(Obedient, told, None) as socket:
        (session,) = watched_sessions()
        await some_more(looks)
        assert proxy.round_trips == 0
        await do(socket, "save")
        await some_more(looks)
        assert await is_open(socket)
        await SessionStore().adelete(session.session_key)
        assert await closed(socket) == (4401, "deleted")


async def test_what_a_socket_writes_is_there_and_makes_no_orphans(
    store: redis.Redis, told: Told, looks: list[float]
) -> None:
    key = await new_key()
    async with opened(Obedient, told, key) as socket, opened(Obedient, told, None) as other:
        await do(other, "look")
        await do(socket, "save")
        await some_more(looks)
    assert await SessionStore(key).aget("n") == 7
    beside = (b":index", b":figures", b":history", b"writes")
    records = {name.decode() for name in store.scan_iter() if not name.endswith(beside)}
    assert records == {SessionKeys.of("session", key).record}


@pytest.mark.parametrize("fault", [pytest.param("silent", marks=pytest.mark.full), "gone"])
async def test_outage_ends_no_session(
    store: redis.Redis,
    proxy: CountingProxy,
    told: Told,
    looks: list[float],
    settings: Any,
    fault: str,
) -> None:
    key = await new_key()
    async with opened(Async, told, key) as socket:
        await some_more(looks)
        settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 0.2
        await some_more(looks)
        proxy.stall() if fault == "silent" else proxy.refuse()
        await some_more(looks)
        assert await is_open(socket)
        proxy.resume() if fault == "silent" else proxy.accept()
        settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 15.0
        await some_more(looks)
        assert await is_open(socket)
        await SessionStore(key).aflush()
        assert await closed(socket) == (4401, "flushed")


async def test_error_of_ours_does_not_end_the_looking(
    store: redis.Redis,
    told: Told,
    looks: list[float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("a mistake")

    key = await new_key()
    async with opened(Async, told, key) as socket:
        await some_more(looks)
        with monkeypatch.context() as patched:
            patched.setattr(flows, "ends", broken)
            await until(lambda: "a mistake" in caplog.text, "it is told")
        assert await is_open(socket)
        await SessionStore(key).aflush()
        assert await closed(socket) == (4401, "flushed")


async def test_busy_consumer_does_not_keep_its_client(
    store: redis.Redis, told: Told, looks: list[float]
) -> None:
    key, may_go = await new_key(), asyncio.Event()
    async with opened(Busy, told, key, may_go=may_go) as socket:
        await socket.send_to(text_data="go")
        await until(lambda: told, "the consumer is busy")
        await some_more(looks)
        await SessionStore(key).aflush()
        assert (await socket.receive_output(timeout=PATIENCE_S))["code"] == 4401
        # What comes too late is neither handed to the consumer nor sent to the client.
        await socket.send_to(text_data="again")
        assert told == ["busy"]
        may_go.set()
        await socket.wait(timeout=PATIENCE_S)
        assert told == ["busy", 4401]
        assert await socket.receive_nothing(timeout=0)


async def test_socket_that_its_application_closed_is_left_alone(
    store: redis.Redis, told: Told, looks: list[float]
) -> None:
    key = await new_key()
    async with opened(Obedient, told, key) as socket:
        await socket.send_to(text_data="shut")
        assert (await socket.receive_output(timeout=PATIENCE_S))["code"] == 4000
        assert watches() == []
        await SessionStore(key).aflush()
        assert await socket.receive_nothing(timeout=0)
    assert told == [1000]


class Server:
    """The server's side of one socket, as an application that is no consumer sees it."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Any] = asyncio.Queue()
        self.sent: list[Any] = []
        self.error: Exception | None = None
        self.may_send = asyncio.Event()
        self.may_send.set()

    async def receive(self) -> Any:
        message = await self.messages.get()
        if isinstance(message, Exception):
            raise message
        return message

    async def send(self, message: Any) -> None:
        await self.may_send.wait()
        self.sent.append(message["type"])
        if self.error is not None:
            raise self.error


async def test_application_that_asks_once_more_is_told_once_more(
    store: redis.Redis, looks: list[float]
) -> None:
    session, server, seen = SessionStore(await new_key()), Server(), []
    server.messages.put_nowait({"type": "websocket.connect"})

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(await receive())
        await send({"type": "websocket.accept"})
        seen.extend([await receive(), await receive()])
        await send({"type": "websocket.send", "text": "too late"})

    running = asyncio.ensure_future(
        EndsWithSession(app)({"type": "websocket", "session": session}, server.receive, server.send)
    )
    await some_more(looks)
    await SessionStore(session.session_key).aflush()
    # The client was faster, and the server says so in its own way.
    server.error = RuntimeError("already closed")
    await asyncio.wait_for(running, PATIENCE_S)
    bye = {"type": "websocket.disconnect", "code": 4401, "reason": "flushed"}
    assert seen == [{"type": "websocket.connect"}, bye, bye]
    assert server.sent == ["websocket.accept", "websocket.close"]


async def test_message_at_the_moment_of_the_end_is_not_handed_on(
    store: redis.Redis, looks: list[float]
) -> None:
    """And the server is not told that all is done before the close is sent.

    A socket that was not accepted yet is accepted first: a refused handshake tells no code.
    """
    session, server, seen = SessionStore(await new_key()), Server(), []
    server.messages.put_nowait({"type": "websocket.connect"})

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([await receive(), await receive()])

    running = asyncio.ensure_future(
        EndsWithSession(app)({"type": "websocket", "session": session}, server.receive, server.send)
    )
    await some_more(looks)
    (watch,) = watches()
    server.may_send.clear()
    server.messages.put_nowait({"type": "websocket.receive", "text": "too late"})
    watch.end(EndReason.FLUSHED)
    await until(lambda: len(seen) == 2, "the application is told")
    assert seen[1] == {"type": "websocket.disconnect", "code": 4401, "reason": "flushed"}
    assert not (await asyncio.wait([running], timeout=0))[0]
    server.may_send.set()
    await asyncio.wait_for(running, PATIENCE_S)
    assert server.sent == ["websocket.accept", "websocket.close"]


async def test_timeout_of_the_server_is_passed_on(store: redis.Redis, looks: list[float]) -> None:
    session, server = SessionStore(await new_key()), Server()
    server.messages.put_nowait({"type": "websocket.connect"})
    server.messages.put_nowait(TimeoutError("the server's own"))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await receive()

    middleware = EndsWithSession(app)
    with pytest.raises(TimeoutError, match="the server's own"):
        await middleware({"type": "websocket", "session": session}, server.receive, server.send)
    assert endings.watchers == {}


async def test_what_is_no_websocket_is_passed_on() -> None:
    passed = []

    async def app(*arguments: Any) -> None:
        passed.append(arguments)

    arguments: Any = ({"type": "http"}, object(), object())
    await EndsWithSession(app)(*arguments)
    assert passed == [arguments]


@pytest.mark.parametrize(
    ("scope", "what"),
    [({}, "is missing"), ({"session": OtherStore()}, "is django.contrib.sessions.backends")],
)
async def test_scope_without_a_session_of_this_engine_is_refused(scope: Any, what: str) -> None:
    server = Server()
    with pytest.raises(ImproperlyConfigured, match=what):
        await EndsWithSession(server.send)(
            {"type": "websocket", **scope}, server.receive, server.send
        )
    assert server.sent == []


def test_codes_and_reasons_are_documented() -> None:
    rows = re.findall(r"^\| .* \| `(\d+)` \| `(\w+)` \|$", page("channels.md"), re.MULTILINE)
    codes = {EndReason.ROTATED: EndsWithSession.moved_code}
    assert sorted(rows) == sorted(
        (str(codes.get(reason, EndsWithSession.ended_code)), reason.value or "expired")
        for reason in EndReason
    )


def watches() -> list[endings.Watch]:
    """Return what the running event loop looks after."""
    watcher = endings.watchers.get(asyncio.get_running_loop())
    return list(watcher.watches) if watcher else []


def watched_sessions() -> list[SessionStore]:
    return [watch._session for watch in watches()]


async def test_many_sockets_share_a_look(
    store: redis.Redis, proxy: CountingProxy, looks: list[float]
) -> None:
    ended: list[tuple[int, EndReason]] = []
    sessions = [SessionStore(await new_key()) for _ in range(endings.BATCH + 10)]
    # Several tabs of one browser.
    sockets = [*enumerate(sessions), *enumerate(sessions[:100])]
    proxy.reset()
    for at, session in sockets:
        endings.start(
            endings.Watch(session, lambda reason, at=at: ended.append((at, reason)))  # type: ignore[misc]
        )
    await until(lambda: looks, "they are looked for")
    assert proxy.round_trips == 2 * len(looks)
    assert sum(request.count(b"HEXISTS") for request in proxy.requests) == len(sessions) * len(
        looks
    )
    for session in sessions[:3]:
        await SessionStore(session.session_key).aflush()
    await until(lambda: len(ended) >= 6, "those that ended are told")
    assert sorted(at for at, _ in ended) == [0, 0, 1, 1, 2, 2]
    assert {reason for _, reason in ended} == {EndReason.FLUSHED}
    for watch in watches():
        endings.stop(watch)


async def test_nothing_stays_behind_of_the_last_socket(
    store: redis.Redis, told: Told, looks: list[float]
) -> None:
    before = asyncio.all_tasks()
    key = await new_key()
    async with opened(Async, told, key):
        await some_more(looks)
        async with opened(Async, told, await new_key()):
            (watcher,) = endings.watchers.values()
        assert not watcher.task.done()
        (kept,) = watches()
        watched = weakref.ref(kept)
        del kept
    assert endings.watchers == {}
    await until(lambda: asyncio.all_tasks() == before, "its task ends")
    del watcher
    gc.collect()
    assert watched() is None
    # And the next one starts it anew.
    async with opened(Async, told, key) as socket:
        await some_more(looks)
        await SessionStore(key).aflush()
        assert await closed(socket) == (4401, "flushed")


def test_event_loops_of_one_process_look_each_for_themselves(
    store: redis.Redis, looks: list[float]
) -> None:
    outcomes: list[Any] = []

    async def one() -> None:
        told: Told = []
        key = await new_key()
        async with opened(Async, told, key, loading) as socket:
            await asyncio.to_thread(together.wait, PATIENCE_S)
            await SessionStore(key).aflush()
            outcomes.append((await closed(socket), told))

    together = threading.Barrier(3)
    threads = [threading.Thread(target=asyncio.run, args=(one(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert outcomes == [((4401, "flushed"), [4401])] * 3
    assert endings.watchers == {}


def test_closed_loop_with_open_sockets_is_forgotten(store: redis.Redis, looks: list[float]) -> None:
    async def begin() -> None:
        endings.start(endings.Watch(SessionStore(), lambda reason: None))

    asyncio.run(begin())
    assert [loop.is_closed() for loop in endings.watchers] == [True]

    async def begin_and_leave() -> None:
        watch = endings.Watch(SessionStore(), lambda reason: None)
        endings.start(watch)
        assert [*endings.watchers] == [asyncio.get_running_loop()]
        endings.stop(watch)

    asyncio.run(begin_and_leave())
    assert endings.watchers == {}


@pytest.mark.full
async def test_cluster_node_that_is_away_holds_up_no_other(
    settings: Any, looks: list[float]
) -> None:
    with ClusterServers(binary=store_binary("valkey")) as servers:
        servers.use(settings)
        keys = [await new_key() for _ in range(48)]
        ended: list[str] = []
        for key in keys:
            endings.start(endings.Watch(SessionStore(key), lambda _, key=key: ended.append(key)))  # type: ignore[misc]
        await some_more(looks)
        at = {key: servers.owner(SessionKeys.of("session", key).record) for key in keys}
        away = at[keys[0]]
        assert len(set(map(id, at.values()))) == 3
        # The others answer in half of it, also after the machine stood still.
        settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 4.0
        away.pause()
        try:
            there = [key for key in keys if at[key] is not away]
            for key in there[:2]:
                await SessionStore(key).aflush()
            await until(lambda: len(ended) >= 2, "those on the others are told")
            assert sorted(ended) == sorted(there[:2])
        finally:
            away.resume()
        settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 15.0
        await SessionStore(keys[0]).aflush()
        await until(lambda: len(ended) >= 3, "so are those on the one that is back")
        assert ended[2:] == [keys[0]]
        for watch in watches():
            endings.stop(watch)
