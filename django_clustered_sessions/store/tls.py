"""Connections that share a TLS context; redis-py's synchronous ones make one each.

To make one takes as long as many handshakes. It is made anew where a file that it was made of has
changed: certificates are renewed while a process runs.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any, Final

import redis
from redis import asyncio as aioredis

logger = logging.getLogger("django_clustered_sessions.store")

#: Options of connections that are files.
_FILES: Final = ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_ca_path")

#: The contexts of this process by the options of their connections, with the state of the files.
_made: dict[bytes, tuple[object, ssl.SSLContext]] = {}
# Another thread of the parent may have been using one.
os.register_at_fork(after_in_child=_made.clear)


def shared(connection: Any, make: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    """Return the context of all connections with a connection's options, made if there is none.

    Where files have changed and cannot be read, as between the two halves of a renewal, the one
    from before is good for another connection.

    Raises OSError, and what ``make`` raises.
    """
    # No password in a local: a traceback would show it.
    name, files = _made_of(connection.tls_options)
    made = _made.get(name)
    if made is None or made[0] != files:
        try:
            made = _made[name] = files, make()
        except OSError as error:
            if made is None:
                raise
            logger.warning(
                "the TLS files of the session store have changed and cannot be used, so those from "
                "before are: %s",
                error,
            )
    return made[1]


def _made_of(options: Mapping[str, Any]) -> tuple[bytes, object]:
    """Return a digest of the options of TLS, and the state of the files among them."""
    options = {name: value for name, value in sorted(options.items()) if name.startswith("ssl_")}
    # Before they are read: a file that changes meanwhile is read once more.
    paths = [*(options.get(name) for name in _FILES), ssl.get_default_verify_paths().cafile]
    return sha256(repr(options).encode()).digest(), [_state(path) for path in paths]


def _state(path: Any) -> object:
    try:
        state = os.stat(path) if path else None
    except OSError:
        # To make a context of it tells why.
        return None
    return state and (state.st_ino, state.st_size, state.st_mtime_ns)


class SSLConnection(redis.SSLConnection):
    """A synchronous connection. One that asks for OCSP has a context of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tls_options = options
        self._has_own = self.ssl_validate_ocsp or self.ssl_validate_ocsp_stapled

    def _connect(self) -> Any:
        if not self._has_own:
            # Before the time of each step is taken.
            self._context = shared(self, self._make)
        return super()._connect()  # type: ignore[no-untyped-call]

    def _wrap_socket_with_ssl(self, sock: Any) -> Any:
        if self._has_own:
            return super()._wrap_socket_with_ssl(sock)  # type: ignore[no-untyped-call]
        return self._context.wrap_socket(sock, server_hostname=self.host)

    def _make(self) -> ssl.SSLContext:
        # Without a handshake, as the socket leads nowhere.
        with socket.socket() as sock, super()._wrap_socket_with_ssl(sock) as wrapped:  # type: ignore[no-untyped-call]
            context: ssl.SSLContext = wrapped.context
        return context


class AsyncSSLConnection(aioredis.SSLConnection):
    """An asynchronous connection."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tls_options = options

    def _connection_arguments(self) -> Mapping[str, Any]:
        self.ssl_context.context = None
        self.ssl_context.context = shared(self, self.ssl_context.get)
        return super()._connection_arguments()
