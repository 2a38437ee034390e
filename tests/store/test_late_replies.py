"""Replies that come too late, or never: nobody takes them for another one's, or counts twice."""

from __future__ import annotations

import time
from typing import Any

import pytest
import redis
from hiredis import pack_command

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.protocol.effects import Wait
from django_clustered_sessions.store import connections, drivers
from django_clustered_sessions.store.exchange import aexchange
from tests.gateways import load_scripts
from tests.servers import CountingProxy, alent, wait_for

pytestmark = pytest.mark.each_server


async def test_a_late_reply_to_a_waiter_is_not_the_next_ones(
    store: redis.Redis, proxy: CountingProxy
) -> None:
    """It waits beyond its time while replies are held back; then the next one waits in vain."""
    pool: Any = connections.awaiting_pool
    connection = await alent(pool())
    await connection.connect()
    pool().take_back(connection)
    proxy.stall()
    assert not await drivers.arest(Wait("nobody writes", 0.01), pool)
    proxy.resume()
    store.rpush("somebody writes", 1)
    assert await drivers.arest(Wait("somebody writes", 5.0), pool)
    assert not await drivers.arest(Wait("nobody writes", 0.01), pool)


async def test_a_connection_whose_reply_is_late_is_closed(
    store: redis.Redis, proxy: CountingProxy
) -> None:
    pool: Any = connections.apool()
    connection = await alent(pool)
    await connection.connect()
    proxy.stall()
    with pytest.raises(TimeoutError):
        await aexchange(connection, [pack_command(("PING",))], time.monotonic() + 0.01)
    assert not connection.is_connected
    proxy.resume()
    pool.take_back(connection)


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
    session.save()
    assert (session["n"], SessionStore(session.session_key)["n"]) == (2, 2)
