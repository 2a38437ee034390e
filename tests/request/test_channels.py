"""The engine under Channels' own session middleware, which saves by ``asave()`` on a response."""

from __future__ import annotations

import warnings

import pytest
from django.conf import settings as django_settings

from django_clustered_sessions.backend import SessionStore

with warnings.catch_warnings():
    # Channels' dependencies use what Python and asgiref are about to remove.
    warnings.simplefilter("ignore", DeprecationWarning)
    from channels.generic.http import AsyncHttpConsumer
    from channels.generic.websocket import AsyncJsonWebsocketConsumer
    from channels.sessions import SessionMiddlewareStack
    from channels.testing import HttpCommunicator, WebsocketCommunicator


#: How long what is to come may take on a slow machine, in seconds.
PATIENCE_S = 30


class Visits(AsyncHttpConsumer):
    """Count visits in the session."""

    async def handle(self, body):
        await self.scope["session"].aincrement("visits")
        await self.send_response(200, b"")


class Untouched(AsyncHttpConsumer):
    """Do not look at the session."""

    async def handle(self, body):
        await self.send_response(200, b"")


class Socket(AsyncJsonWebsocketConsumer):
    """Tell what is in the session, and add to it."""

    async def receive_json(self, content):
        session = self.scope["session"]
        await session.aset("said", content)
        await session.asave()
        await self.send_json({"visits": await session.aget("visits")})


def cookie_header(session_key):
    name = django_settings.SESSION_COOKIE_NAME
    return [(b"cookie", f"{name}={session_key}".encode())]


async def get(consumer, session_key=None):
    headers = cookie_header(session_key) if session_key else []
    communicator = HttpCommunicator(
        SessionMiddlewareStack(consumer.as_asgi()), "GET", "/", headers=headers
    )
    response = await communicator.get_response(timeout=PATIENCE_S)
    cookies = [value.decode() for name, value in response["headers"] if name == b"Set-Cookie"]
    return response["status"], cookies


async def test_consumer_makes_a_session_and_finds_it_again(store):
    status, (cookie,) = await get(Visits)
    assert status == 200
    assert "Max-Age=1209600" in cookie
    session_key = cookie.split(";")[0].split("=")[1]
    await get(Visits, session_key)
    assert await SessionStore(session_key).aget("visits") == 2


@pytest.mark.parametrize("expiry", [None, 0, 600])
async def test_untouched_session_slides_its_expiry(store, settings, expiry):
    settings.SESSION_SAVE_EVERY_REQUEST = True
    session = SessionStore()
    await session.aset_expiry(expiry)
    await session.asave()
    status, (cookie,) = await get(Untouched, session.session_key)
    assert status == 200
    assert ("Max-Age" in cookie) == (expiry != 0)
    if expiry:
        assert f"Max-Age={expiry}" in cookie


async def test_unknown_key_is_not_adopted(store):
    _, (cookie,) = await get(Visits, "a" * 32)
    assert "a" * 32 not in cookie
    assert not await SessionStore().aexists("a" * 32)


async def test_websocket_reads_and_writes_the_session(store):
    session = SessionStore()
    await session.aset("visits", 7)
    await session.asave()
    socket = WebsocketCommunicator(
        SessionMiddlewareStack(Socket.as_asgi()), "/", headers=cookie_header(session.session_key)
    )
    assert (await socket.connect(timeout=PATIENCE_S))[0]
    await socket.send_json_to({"hello": "there"})
    assert await socket.receive_json_from(timeout=PATIENCE_S) == {"visits": 7}
    await socket.disconnect(timeout=PATIENCE_S)
    assert await SessionStore(session.session_key).aget("said") == {"hello": "there"}
