"""Synchronous connections that connect and greet by one deadline.

redis-py bounds each step of it: the way to each address of a name, the handshake of TLS, each
reception. A store that drips its greeting, or a name with many addresses, would take several times
as long.
"""

from __future__ import annotations

import math
import time
from typing import Any

import redis

from . import tls
from .errors import SHORTEST_S


def _bounded(attribute: str) -> Any:
    """Return a property: a limit of redis-py's for a step, and no more than is left of the time."""

    def get(connection: Any) -> float | None:
        return _least(getattr(connection, attribute), connection.greeted_by_s)

    def put(connection: Any, seconds: float | None) -> None:
        setattr(connection, attribute, seconds)

    return property(get, put)


class Timely:
    """Connect and greet by ``greeted_by_s``, of time.monotonic(). For a connection of redis-py."""

    greeted_by_s: float = math.inf
    socket_connect_timeout = _bounded("_socket_connect_timeout")
    socket_timeout = _bounded("_socket_timeout")
    _sock: Any

    def connect(self) -> None:
        """Connect and greet. Raises redis-py's errors."""
        super().connect()  # type: ignore[misc]
        if isinstance(self._sock, _Timed):
            self._sock = self._sock.socket

    def _connect(self) -> Any:
        return _Timed(super()._connect(), self.greeted_by_s)  # type: ignore[misc]


class Connection(Timely, redis.Connection):
    """See Timely; over TCP."""


class SSLConnection(Timely, tls.SSLConnection):
    """See Timely; over TLS."""


class UnixConnection(Timely, redis.UnixDomainSocketConnection):
    """See Timely; by a socket in the file system."""


class _Timed:
    """A socket that receives until a deadline. All else is the socket's."""

    def __init__(self, socket: Any, deadline: float) -> None:
        self.socket, self._deadline = socket, deadline

    def __getattr__(self, name: str) -> Any:
        return getattr(self.socket, name)

    def recv_into(self, *arguments: Any) -> int:
        """Receive. Raises TimeoutError."""
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the greeting is not over in time")
        self.socket.settimeout(_least(self.socket.gettimeout(), self._deadline))
        return int(self.socket.recv_into(*arguments))


def _least(seconds: float | None, deadline: float) -> float | None:
    if deadline == math.inf:
        return seconds
    left_s = max(deadline - time.monotonic(), SHORTEST_S)
    return left_s if seconds is None else min(seconds, left_s)
