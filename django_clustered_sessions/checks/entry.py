"""Checks of the entry of CACHES that names the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning
from django.core.exceptions import ImproperlyConfigured

from django_clustered_sessions.store import connections
from django_clustered_sessions.store.entries import django_cache, reading
from django_clustered_sessions.store.entries.entry import BadEntry, Foreign


def store_entry(*, buildable: bool) -> Iterator[CheckMessage]:
    """Check the entry; ``buildable``: a pool can be made of it, as far as other settings go."""
    try:
        found = connections.entry()
    except BadEntry as error:
        yield _unusable(str(error))
        return
    except ImproperlyConfigured as error:
        yield Error(
            f"Sessions have no store: {error}",
            hint="Point SESSION_CACHE_ALIAS at an entry for Redis or Valkey, best one of its own.",
            id="clustered_sessions.E001",
        )
        return
    strange = list(found.foreign)
    strange += [
        Foreign(name, found.keywords[name])
        for name in sorted(connections.SYNC_ONLY & found.keywords.keys())
        if found.keywords[name]
    ]
    for one in strange:
        yield Error(f"{one}.", hint=one.advice, id="clustered_sessions.E002")
    if strange or not buildable:
        return
    try:
        connections.try_out()
    except connections.UnusableOption as error:
        yield Error(
            f"Sessions have no store: {error}",
            hint="What OPTIONS and the query of LOCATION hand to connections are options of "
            "redis-py's; ssl_... are for TLS only, which is LOCATION rediss:// or valkeys://.",
            id="clustered_sessions.E001",
        )
    except Exception as error:
        # Not its text, which may quote a password out of the URL.
        yield _unusable(
            f"LOCATION or OPTIONS cannot be used ({type(error).__name__}) in the CACHES entry that "
            f"SESSION_CACHE_ALIAS names, {settings.SESSION_CACHE_ALIAS!r}"
        )


def _unusable(problem: str) -> CheckMessage:
    return Error(
        f"Sessions have no store: {problem}.",
        hint="LOCATION is redis://HOST:6379/1, rediss://..., valkey://..., valkeys://... or "
        "unix:///PATH?db=1, special characters of a password percent-encoded; Sentinels are a "
        "list of (host, port).",
        id="clustered_sessions.E001",
    )


def shared_database() -> Iterator[CheckMessage]:
    """Warn where a cache that may be cleared is in the sessions' database."""
    alias = settings.SESSION_CACHE_ALIAS
    ours = _database(settings.CACHES.get(alias, {}))
    if ours is None:
        return
    sharing = [
        name
        for name, entry in settings.CACHES.items()
        if name != alias and _database(entry) == ours
    ]
    if alias == "default":
        sharing.insert(0, "default")
    for name in sharing:
        yield Warning(
            f"Sessions are in the same database as the cache {name!r}: its clear() ends every "
            "session.",
            hint="Give sessions an entry of CACHES with a database of their own, better still a "
            "server of their own, and name it in SESSION_CACHE_ALIAS.",
            id="clustered_sessions.W004",
        )


def _database(entry: Mapping[str, Any]) -> tuple[str, int, int] | None:
    """Return host or socket, port, and number of an entry's database; None if not Redis."""
    try:
        # Of a backend that is not known, what its LOCATION says.
        found = reading.read(entry) or django_cache.read(entry.get("LOCATION"), {}, "")
        keywords = {"host": "localhost", "port": 6379, **found.keywords}
        number = int(keywords.get("db") or 0)
    except (BadEntry, TypeError, ValueError):
        return None
    if "path" in keywords:
        return keywords["path"], 0, number
    host = found.service or keywords["host"]
    return "localhost" if host in ("127.0.0.1", "::1") else host, keywords["port"], number
