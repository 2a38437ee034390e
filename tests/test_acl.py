"""The rules of docs/deploy-store.md: enough for everything, and not one command too many."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from django.core.management import CommandError, call_command

from django_clustered_sessions import checks, connections
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import ClusteredSessionError
from django_clustered_sessions.near import near_cache
from tests.conftest import use_store
from tests.locking import Threads, outcome, wait_for_queue
from tests.servers import StoreServer

pytestmark = pytest.mark.once

PAGE = (Path(__file__).parent.parent / "docs" / "deploy-store.md").read_text(encoding="utf-8")

#: The rule of who uses sessions, and what else who looks at statistics needs.
(RULE,) = re.findall(r"^ACL SETUSER site on .*(?:\n +.*)*", PAGE, re.MULTILINE)
(MORE,) = re.findall(r"^ACL SETUSER site (\+zcount.*)$", PAGE, re.MULTILINE)

COMMANDS = re.findall(r"\+\S+", RULE)
STATISTICS = MORE.split()


@pytest.fixture(scope="module")
def server(store_server: StoreServer) -> Iterator[StoreServer]:
    with StoreServer("--appendonly", "yes", binary=store_server.binary) as started:
        yield started


@pytest.fixture
def admin(server: StoreServer, settings: Any) -> Iterator[redis.Redis]:
    """Point the settings at the user ``site``; give a client that may do all, in an empty store."""
    use_store(settings, f"redis://site:secret@127.0.0.1:{server.port}/1")
    # So that each load renews.
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = 600
    # A lock that cannot be given up is waited for.
    settings.CLUSTERED_SESSIONS_LOCK_LEASE = 1.0
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 5.0
    with server.client(decode_responses=True) as client:
        client.flushall()
        client.script_flush()
        client.acl_log_reset()
        yield client


def allow(admin: redis.Redis, rule: str, *commands: str) -> None:
    """Give the user a password, the rule's keys, and these commands."""
    terms = re.sub(r"\+\S+", "", rule).replace(">PASSWORD", ">secret").split()
    admin.execute_command("ACL SETUSER", "site", "reset")
    admin.execute_command(*terms, *commands)
    # A user that is reset loses its connections, and the pool does not know yet.
    connections.pool().disconnect()
    connections.waiting_pool().disconnect()


def denied(admin: redis.Redis) -> set[str]:
    """Return which commands the user was denied, besides the client's name for itself."""
    return {entry["object"].lower() for entry in admin.acl_log()} - {"client|setinfo"}


def wait_for_a_lock(server: StoreServer, key: str) -> None:
    """Let a thread wait until it is woken; it has ended when this returns."""

    def wait() -> None:
        with SessionStore(key).lock() as waiter:
            waiter.increment("hits")

    with Threads() as threads, server.client(db=1) as raw:
        with SessionStore(key).lock():
            waiting = threads.start(wait)
            wait_for_queue(raw, key, 1)
        outcome(waiting)


def use_everything(server: StoreServer) -> None:
    """Do with sessions what a site can do."""
    session = SessionStore()
    session["n"], session["user"] = 1, "x" * 5000
    session.save()
    key = session.session_key
    session["n"] += 1
    session.increment("hits")
    del session["user"]
    session.save()
    SessionStore(key).load()
    near_cache.clear()
    assert SessionStore(key).load() == {"n": 2, "hits": 1}
    first, second = SessionStore(key), SessionStore(key)
    first["a"], second["b"] = 1, 2
    first["n"], second["n"] = 3, 4
    first.save()
    second.save()
    with SessionStore(key).lock() as locked:
        locked["n"] = 5
        locked.commit()
    wait_for_a_lock(server, key or "")
    assert session.exists(key)
    sliding = SessionStore(key)
    sliding.cycle_key()
    sliding.clear()
    sliding["n"] = 5
    sliding.save()
    asyncio.run(use_asynchronously(sliding.session_key))
    sliding.flush()
    assert not SessionStore().exists(key)


async def use_asynchronously(key: str | None) -> None:
    session = SessionStore(key)
    await session.aset("n", 6)
    await session.asave()
    async with session.alock():
        await session.aset("n", 7)


def look_at_everything() -> None:
    """Ask for statistics, locks and the checks of a deployment."""
    session = SessionStore()
    session["n"] = 1
    session.save()
    call_command("sessionstats", format="json", stdout=io.StringIO())
    call_command("sessionstats", locks=True, stdout=io.StringIO())
    assert checks.check_store() == []


def test_the_rule_is_enough(admin: redis.Redis, server: StoreServer) -> None:
    allow(admin, RULE, *COMMANDS)
    use_everything(server)
    assert denied(admin) == set()


def test_with_statistics(admin: redis.Redis) -> None:
    allow(admin, RULE, *COMMANDS, *STATISTICS)
    look_at_everything()
    assert denied(admin) == set()


@pytest.mark.parametrize("missing", COMMANDS)
def test_not_one_command_too_many(missing: str, admin: redis.Redis, server: StoreServer) -> None:
    allow(admin, RULE, *(command for command in COMMANDS if command != missing))
    with suppress(ClusteredSessionError, AssertionError):
        use_everything(server)
    assert missing[1:] in denied(admin)


@pytest.mark.parametrize("missing", STATISTICS)
def test_not_one_command_too_many_for_statistics(missing: str, admin: redis.Redis) -> None:
    granted = [command for command in (*COMMANDS, *STATISTICS) if command != missing]
    allow(admin, RULE, *granted)
    with suppress(CommandError, AssertionError):
        look_at_everything()
    assert missing[1:] in denied(admin)


def test_keys_of_others_are_out_of_reach(admin: redis.Redis, server: StoreServer) -> None:
    allow(admin, RULE, *COMMANDS, *STATISTICS)
    admin.set("cache:x", "secret")
    with server.client(username="site", password="secret") as site:
        for command in (("HGETALL", "cache:x"), ("EXISTS", "cache:x"), ("BLPOP", "cache:x", 1)):
            with pytest.raises(redis.exceptions.NoPermissionError):
                site.execute_command(*command)
        for command in (
            ("KEYS", "*"),
            ("FLUSHALL",),
            ("CONFIG", "SET", "save", ""),
            ("PUBLISH", "a", "b"),
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                site.execute_command(*command)
