"""Replies that come too late, or never: nobody takes them for another one's, or counts twice."""

from __future__ import annotations

import asyncio
import socketserver
import threading
import time
from typing import Any

import pytest
import redis
from django.contrib.auth import HASH_SESSION_KEY, SESSION_KEY
from hiredis import pack_command

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.protocol.effects import Wait
from django_clustered_sessions.store import connections, drivers
from django_clustered_sessions.store.budget import Budget
from django_clustered_sessions.store.exchange import aconnect, aexchange, connect, exchange
from tests.conftest import use_store
from tests.gateways import load_scripts
from tests.servers import CountingProxy, alent, deadline_s, lent, wait_for

pytestmark = pytest.mark.each_server


async def test_a_late_reply_to_a_waiter_is_not_the_next_ones(
    store: redis.Redis, proxy: CountingProxy
) -> None:
    """It waits beyond its time while replies are held back; then the next one waits in vain."""
    pool: Any = connections.awaiting_pool
    connection = await alent(pool())
    await aconnect(connection, deadline_s())
    pool().take_back(connection)
    proxy.stall()
    assert not await drivers.arest(Wait(("nobody writes",), 0.01), pool)
    proxy.resume()
    store.rpush("somebody writes", 1)
    assert await drivers.arest(Wait(("somebody writes",), 5.0), pool)
    assert not await drivers.arest(Wait(("nobody writes",), 0.01), pool)


async def test_a_connection_whose_reply_is_late_is_closed(
    store: redis.Redis, proxy: CountingProxy
) -> None:
    pool: Any = connections.apool()
    connection = await alent(pool)
    await aconnect(connection, deadline_s())
    proxy.stall()
    with pytest.raises(redis.TimeoutError):
        await aexchange(connection, [pack_command(("PING",))], time.monotonic() + 0.01)
    assert not connection.is_connected
    proxy.resume()
    pool.take_back(connection)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_connection_with_a_reply_too_many_is_not_used_again(
    settings: Any, is_async: bool
) -> None:
    """As from a proxy that has mixed up its connections."""

    class Twice(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while word := self.rfile.readline().strip():
                # The words of commands come each in a line of its own.
                if word in (b"CLIENT", b"SELECT"):
                    self.wfile.write(b"+OK\r\n")
                elif word == b"PING":
                    self.wfile.write(b"+MINE\r\n+OF_ANOTHER\r\n")

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    ping = [pack_command(("PING",))]

    async def go() -> None:
        connection = await alent(connections.apool())
        await aconnect(connection, deadline_s())
        assert await aexchange(connection, ping, deadline_s()) == [b"MINE"]
        await aconnect(connection, deadline_s())
        assert await aexchange(connection, ping, deadline_s()) == [b"MINE"]

    with Server(("127.0.0.1", 0), Twice) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            use_store(settings, f"redis://127.0.0.1:{server.server_address[1]}/1")
            if is_async:
                asyncio.run(go())
            else:
                connection = lent(connections.pool())
                for _ in range(2):
                    connect(connection, deadline_s())
                    assert exchange(connection, ping, deadline_s()) == [b"MINE"]
                connection.disconnect()
        finally:
            server.shutdown()


@pytest.mark.full
def test_a_count_is_known_however_late_its_save_is_repeated(
    store: redis.Redis, proxy: CountingProxy, settings: Any
) -> None:
    """A view saves again after an outage, later than a write may be replayed."""
    load_scripts(store)
    session = SessionStore()
    session["a"] = 1
    session.create()
    session.increment("n", 2)
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 1.0
    proxy.cut_next("reply", times=2, matching=b"EVALSHA")
    with pytest.raises(SessionStoreUnavailable):
        session.save()
    began = store.time()

    def is_past() -> bool:
        seconds, microseconds = store.time()
        return (seconds - began[0]) * 1000 + (microseconds - began[1]) / 1000 > 2100

    wait_for(is_past, "the store's clock is past the window")
    # The window is short for the setting's sake; the machine may stand still.
    session.state.budget = Budget(15.0)
    session.save()
    assert (session["n"], SessionStore(session.session_key)["n"]) == (2, 2)


def test_a_write_is_not_done_again_in_the_successor(
    store: redis.Redis, proxy: CountingProxy
) -> None:
    """It has landed without an answer before another request of the user cycled the key."""
    load_scripts(store)
    session = SessionStore()
    session.update({SESSION_KEY: "1", HASH_SESSION_KEY: "hash", "list": []})
    session.create()
    session.increment("n", 2)
    session["list"].append(1)
    proxy.cut_next("reply", times=2, matching=b"EVALSHA")
    with pytest.raises(SessionStoreUnavailable):
        session.save()
    other = SessionStore(session.session_key)
    assert other["n"] == 2
    other.cycle_key()
    session.save()
    stored = SessionStore(other.session_key)
    assert (session["n"], session["list"]) == (stored["n"], stored["list"]) == (2, [1])
