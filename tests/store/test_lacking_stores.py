"""Stores that lack a command: sessions go on without it, or the check names what is off."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.checks.store import check_store
from tests.conftest import use_store
from tests.locking import new_session
from tests.servers import CountingProxy, StoreServer

pytestmark = pytest.mark.each_server

#: With it, a session is not read whole where a near copy of it is known.
LARGE = "".join(map(chr, Random(0).choices(range(33, 127), k=4000)))


def without(*commands: str, binary: Path) -> StoreServer:
    """Return a server without some commands."""
    flags = [word for command in commands for word in ("--rename-command", command, "")]
    # For the checks: the server is fine otherwise.
    return StoreServer(*flags, "--appendonly", "yes", binary=binary)


@pytest.fixture(scope="module")
def lacking(server_binary: Path) -> Iterator[StoreServer]:
    """Run a server that has one word for all scripts."""
    with without("EVALSHA_RO", "EVAL_RO", binary=server_binary) as server:
        yield server


@pytest.fixture
def proxy(lacking: StoreServer, settings: Any) -> Iterator[CountingProxy]:
    with CountingProxy(lacking.port) as between:
        use_store(settings, f"{between.url}/1")
        yield between


def words(proxy: CountingProxy) -> list[bytes]:
    """Return the words for scripts that only read, of each round trip."""
    known = (b"EVALSHA_RO", b"EVAL_RO", b"EVALSHA", b"EVAL")
    found = (next((word for word in known if word in request), b"") for request in proxy.requests)
    return [word for word in found if word]


def test_reads_go_by_the_word_that_the_store_has(proxy: CountingProxy) -> None:
    key = new_session(n=1, large=LARGE)
    proxy.reset()
    assert SessionStore(key)["n"] == 1
    assert words(proxy) == [b"EVALSHA_RO", b"EVAL"]
    proxy.reset()
    assert SessionStore(key)["n"] == 1
    assert words(proxy) == [b"EVALSHA"]


def test_asynchronous_reads_go_by_that_word_too(proxy: CountingProxy) -> None:
    key = new_session(n=1, large=LARGE)

    async def read_twice() -> list[list[bytes]]:
        sent = []
        for _ in range(2):
            proxy.reset()
            assert await SessionStore(key).aget("n") == 1
            sent.append(words(proxy))
        return sent

    assert asyncio.run(read_twice()) == [[b"EVALSHA_RO", b"EVAL"], [b"EVALSHA"]]


def test_a_write_beside_the_read_is_done_once(proxy: CountingProxy) -> None:
    key = new_session(n=1)
    session = SessionStore(key)
    with session.lock():
        session.increment("n")
    assert SessionStore(key).load() == {"n": 2}


def messages() -> dict[str, str]:
    return {str(message.id).rpartition(".")[2]: message.msg for message in check_store()}


def test_check_names_the_word_that_is_missing(lacking: StoreServer, settings: Any) -> None:
    use_store(settings, f"{lacking.url}/1")
    lacking.client().config_set("maxmemory-policy", "noeviction")
    assert messages() == {
        "I002": "The session store has no EVALSHA_RO: sessions are read by EVALSHA."
    }


def test_check_names_what_is_off(server_binary: Path, settings: Any) -> None:
    with without("XADD", "WAIT", binary=server_binary) as server:
        use_store(settings, f"{server.url}/1")
        assert "W022" not in messages()
        settings.CLUSTERED_SESSIONS_EVENTS_KEPT = 100
        assert messages()["W022"] == (
            "The session store has no XADD, and CLUSTERED_SESSIONS_EVENTS_KEPT is 100: what makes "
            "an event fails."
        )
        settings.CLUSTERED_SESSIONS_EVENTS_KEPT = 0
        settings.CLUSTERED_SESSIONS_SYNC_REPLICAS = 1
        assert "no WAIT, and CLUSTERED_SESSIONS_SYNC_REPLICAS is 1" in messages()["W022"]
