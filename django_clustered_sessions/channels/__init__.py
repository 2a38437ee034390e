"""Websockets that end with their session: an ASGI middleware, for Channels and without it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, cast

from django.core.exceptions import ImproperlyConfigured

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.protocol.record import EndReason

from . import endings
from .endings import Watch

logger = logging.getLogger("django_clustered_sessions")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

#: Messages by which an application ends a socket itself.
_LAST: Final = frozenset({"websocket.close", "websocket.http.response.start"})


class EndsWithSession:
    """Close a websocket within a second of the end of its session, whichever node ended it.

    Wrap it in the middleware that puts the session into the scope: Channels'
    ``SessionMiddlewareStack`` or ``AuthMiddlewareStack``. The client receives a close with the
    code. The application receives ``websocket.disconnect`` with the same code, and messages that
    it sends later are dropped.

    A store outage ends no session.
    """

    #: Close code for an ended session: logout, expiry, or ended by staff or another device.
    ended_code: int = 4401
    #: Close code for a session whose key was cycled, as by a login: the client is to connect anew,
    #: with the new cookie.
    moved_code: int = 4301

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Run the application for one connection; pass other protocols than websockets on.

        Raises ImproperlyConfigured if the scope has no session of this engine.
        """
        if scope["type"] != "websocket":
            await self.app(scope, receive, send)
            return
        session = scope.get("session")
        if not isinstance(session, SessionStore):
            found = f"is {type(session).__module__}'s" if session is not None else "is missing"
            raise ImproperlyConfigured(
                "EndsWithSession needs a session of django_clustered_sessions.backend in its "
                f"scope, and that {found}. Put it inside of SessionMiddlewareStack or "
                "AuthMiddlewareStack, and set SESSION_ENGINE."
            )
        socket = _Socket(session, receive, send, self._code)
        try:
            await self.app(scope, socket.receive, socket.send)
        finally:
            await socket.leave()

    def _code(self, reason: EndReason) -> int:
        return self.moved_code if reason is EndReason.ROTATED else self.ended_code


class _Socket:
    """One websocket between server and application, until its session ends."""

    def __init__(
        self,
        session: SessionStore,
        receive: Receive,
        send: Send,
        code: Callable[[EndReason], int],
    ) -> None:
        self._receive, self._send, self._code = receive, send, code
        self._watch = Watch(session, self._end)
        self._is_begun = self._is_accepted = False
        #: Message that the application receives once the session has ended.
        self._farewell: Message | None = None
        self._closing: asyncio.Task[None] | None = None
        self._patience: asyncio.Timeout | None = None

    async def receive(self) -> Message:
        """Return the client's next message; once the session has ended, a disconnect."""
        if not self._is_begun:
            # An application may rely on ``websocket.connect`` coming first.
            message = await self._receive()
            self._is_begun = True
            endings.start(self._watch)
            return message
        next_one = None if self._farewell else await self._receive_until_end()
        return next_one or cast(Message, self._farewell)

    async def _receive_until_end(self) -> Message | None:
        try:
            async with asyncio.timeout(None) as patience:
                self._patience = patience
                message = await self._receive()
        except TimeoutError:
            if patience.expired():
                return None
            raise
        finally:
            self._patience = None
        if message["type"] == "websocket.disconnect":
            endings.stop(self._watch)
        return None if self._farewell else message

    async def send(self, message: Message) -> None:
        """Pass the application's messages on until the session has ended."""
        if self._farewell is not None:
            return
        if message["type"] in _LAST:
            endings.stop(self._watch)
        self._is_accepted = self._is_accepted or message["type"] == "websocket.accept"
        await self._send(message)

    async def leave(self) -> None:
        """Stop watching the session, and wait until the close is sent."""
        endings.stop(self._watch)
        if self._closing is not None:
            await self._closing

    def _end(self, reason: EndReason) -> None:
        end = {"code": self._code(reason), "reason": reason.value or "expired"}
        self._farewell = {"type": "websocket.disconnect", **end}
        # In a task: the client gets the close also while the application is busy.
        loop = asyncio.get_running_loop()
        self._closing = loop.create_task(self._close({"type": "websocket.close", **end}))
        if self._patience is not None:
            self._patience.reschedule(loop.time())

    async def _close(self, message: Message) -> None:
        try:
            if not self._is_accepted:
                # A refused handshake is a 403, and tells the client no code.
                await self._send({"type": "websocket.accept"})
            await self._send(message)
        except Exception as error:
            # Servers raise different errors if the client has disconnected first.
            logger.debug("a websocket was closed before its session's end: %r", error)
