"""Cache and sessions of an entry meet in one database, as one user, whatever the package."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from django.core.cache import caches

from django_clustered_sessions.backend import SessionStore
from tests.entries import CACHEX, DJANGO, DJANGO_REDIS, OWN, VALKEY, use_entry
from tests.locking import new_session
from tests.servers import StoreServer

PASSWORD = "se cret/1"
AS_APP = "app:pa%3Ass@"
USER = {"username": "app", "password": "pa:ss"}


@pytest.fixture(scope="module")
def guarded() -> Iterator[StoreServer]:
    """Run a store that takes one user besides its own."""
    with StoreServer("--requirepass", PASSWORD) as server:
        client = server.client(password=PASSWORD)
        client.execute_command("ACL", "SETUSER", "app", "on", ">pa:ss", "~*", "&*", "+@all")
        yield server


#: A backend, a location, and OPTIONS; the database is 3, or 7 where OPTIONS say so.
ENTRIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "django-redis": (DJANGO_REDIS, "redis://{}/3", {"USERNAME": "app", "PASSWORD": "pa:ss"}),
    "Django": (DJANGO, "redis://{};redis://replica/3", {"db": 3, **USER}),
    "Django, URL": (OWN, f"redis://{AS_APP}{{}}/3", {}),
    "django-valkey": (VALKEY, "valkey://{}/3", {"CONNECTION_POOL_KWARGS": {**USER}}),
    "django-valkey, URL": (VALKEY, f"valkey://{AS_APP}{{}}/3", {}),
    "django-cachex": (CACHEX + "RedisCache", "redis://{};redis://replica/3", {"db": 3, **USER}),
    "django-cachex, Valkey": (CACHEX + "ValkeyCache", f"valkey://{AS_APP}{{}}/3", {}),
}


@pytest.mark.parametrize(("backend", "location", "options"), ENTRIES.values(), ids=ENTRIES)
def test_cache_and_sessions_meet_in_one_database(
    guarded: StoreServer, settings: Any, backend: str, location: str, options: dict[str, Any]
) -> None:
    root = guarded.client(password=PASSWORD, decode_responses=True)
    root.flushall()
    use_entry(settings, backend, location.format(f"127.0.0.1:{guarded.port}"), **options)
    caches["sessions"].set("of-the-cache", 1)

    async def keep() -> str:
        session = SessionStore()
        await session.aset("n", 1)
        await session.acreate()
        return str(session.session_key)

    for key in (new_session(n=1), asyncio.run(keep())):
        assert SessionStore(key).load() == {"n": 1}
    assert set(root.info("keyspace")) == {"db3"}
    # The other user is the test's own.
    others = [one for one in root.client_list() if one["user"] != "default"]
    assert {(one["user"], one["db"]) for one in others} == {("app", "3")}
    assert len(others) > 1
