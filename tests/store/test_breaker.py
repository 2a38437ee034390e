"""A store that comes and goes opens the breaker and closes it; one that refuses does not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import redis

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.store import circuit_breaker as module
from django_clustered_sessions.store import connections
from django_clustered_sessions.store.circuit_breaker import FAILURES
from tests.conftest import use_store
from tests.gateways import load_scripts
from tests.servers import CountingProxy, wait_for

KEY = "x" * 32


def ask() -> None:
    SessionStore().exists(KEY)


async def aask() -> None:
    await SessionStore().aexists(KEY)


def lose(proxy: CountingProxy) -> None:
    """Make the store refuse until the breaker has opened."""
    proxy.refuse()
    for _ in range(FAILURES):
        with pytest.raises(SessionStoreUnavailable):
            ask()


@pytest.fixture
def slow_probes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let no probe through until the function that this gives is called."""
    monkeypatch.setattr(module, "FIRST_PROBE_S", 3600.0)

    def hurry() -> None:
        for breaker in module.breakers.nodes.values():
            breaker.probe_at_s = 0.0

    return hurry


def test_open_breaker_opens_no_connection(
    proxy: CountingProxy, slow_probes: Callable[[], None]
) -> None:
    ask()
    lose(proxy)
    proxy.accept()
    proxy.reset()
    for _ in range(20):
        with pytest.raises(SessionStoreUnavailable, match="was not asked"):
            ask()
        with pytest.raises(SessionStoreUnavailable, match="was not asked"):
            asyncio.run(aask())
    assert (proxy.connections, proxy.round_trips) == (0, 0)
    slow_probes()
    ask()
    assert proxy.connections == 1
    asyncio.run(aask())


def test_changed_settings_begin_with_a_closed_breaker(
    proxy: CountingProxy, slow_probes: Callable[[], None], settings: Any
) -> None:
    lose(proxy)
    proxy.accept()
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 3
    ask()


def test_store_that_is_back_is_asked_again(proxy: CountingProxy) -> None:
    lose(proxy)
    proxy.accept()

    def is_back() -> bool:
        with suppress(SessionStoreUnavailable):
            ask()
            return True
        return False

    wait_for(is_back, "the store is asked again", timeout_s=30)
    for _ in range(10):
        ask()


def test_threads_and_tasks_share_what_was_seen(
    proxy: CountingProxy, slow_probes: Callable[[], None]
) -> None:
    """An asynchronous view under WSGI has an event loop of its own, and would find out anew."""
    proxy.refuse()
    for _ in range(FAILURES):
        with pytest.raises(SessionStoreUnavailable):
            asyncio.run(aask())
    errors: list[str] = []

    def try_() -> None:
        try:
            ask()
        except SessionStoreUnavailable as error:
            errors.append(str(error))

    thread = threading.Thread(target=try_)
    thread.start()
    thread.join(30)
    assert len(errors) == 1
    assert "was not asked" in errors[0]


def test_silent_store_gets_one_probe(
    proxy: CountingProxy,
    slow_probes: Callable[[], None],
    settings: Any,
) -> None:
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 30
    ask()
    lose(proxy)
    proxy.stall()
    proxy.accept()
    proxy.reset()
    slow_probes()
    probe = threading.Thread(target=ask)
    probe.start()
    wait_for(lambda: proxy.connections, "the probe is on its way", timeout_s=30)
    for _ in range(10):
        with pytest.raises(SessionStoreUnavailable, match="was not asked"):
            ask()
    assert proxy.connections == 1
    proxy.resume()
    probe.join(30)
    ask()


def test_waits_for_locks_open_no_breaker(store: redis.Redis, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 0.05
    load_scripts(store)
    session = SessionStore()
    session.create()
    with session.lock():
        key = session.session_key

        def wait() -> None:
            with suppress(Exception), SessionStore(key).lock():
                pass

        for _ in range(FAILURES + 1):
            thread = threading.Thread(target=wait)
            thread.start()
            thread.join(30)
        assert not connections.pool().breaker.is_open  # type: ignore[attr-defined]
    assert SessionStore(key).exists(key)


def test_full_store_opens_no_breaker(store: redis.Redis) -> None:
    store.config_set("maxmemory", "1")
    try:
        for _ in range(FAILURES * 2):
            with pytest.raises(SessionStoreUnavailable, match="maxmemory"):
                SessionStore().create()
        ask()
    finally:
        store.config_set("maxmemory", "0")


def test_exhausted_pool_opens_no_breaker(store: redis.Redis, settings: Any) -> None:
    use_store(
        settings,
        settings.CACHES["sessions"]["LOCATION"],
        CONNECTION_POOL_KWARGS={"max_connections": 1},
    )
    lent = connections.pool().get_connection()
    for _ in range(FAILURES * 2):
        with pytest.raises(SessionStoreUnavailable, match="all 1 connections"):
            ask()
    connections.pool().release(lent)
    ask()
