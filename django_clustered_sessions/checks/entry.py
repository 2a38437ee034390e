"""Checks of the entry of CACHES that names the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning
from django.core.exceptions import ImproperlyConfigured

from django_clustered_sessions.store import connections

_CLIENT_CLASSES: Final = frozenset(
    {"redis.Redis", "redis.StrictRedis", "redis.client.Redis", "redis.client.StrictRedis"}
)

_SCHEMES: Final = ("redis://", "rediss://", "unix://")


def store_entry(*, buildable: bool) -> Iterator[CheckMessage]:
    """Check the entry; ``buildable``: a pool can be made of it, as far as other settings go."""
    try:
        options = connections.entry().get("OPTIONS", {})
    except ImproperlyConfigured as error:
        yield Error(
            f"Sessions have no store: {error}",
            hint="Point SESSION_CACHE_ALIAS at an entry of django-redis, best one of its own.",
            id="clustered_sessions.E001",
        )
        return
    strange = list(_strange_classes(options))
    for name, value in strange:
        yield Error(
            f"{name} of the sessions' CACHES entry is {value!r}, which this package cannot use "
            "both synchronously and asynchronously.",
            hint="Leave it out, or name one of django-redis' or redis' own; docs/settings.md has "
            "the list. Other entries of CACHES are not concerned.",
            id="clustered_sessions.E002",
        )
    if strange or not buildable:
        return
    problem = why = None
    if connections.factory(options) == connections.SENTINEL and not options.get("SENTINELS"):
        problem = "OPTIONS has no SENTINELS"
    elif not connections.url(connections.entry()).startswith(_SCHEMES):
        problem = f"LOCATION begins with none of {', '.join(_SCHEMES)}"
    else:
        try:
            connections.try_out()
        except connections.UnusableOption as error:
            why = str(error)
        except Exception as error:
            # Not its text, which may quote a password out of the URL.
            problem = f"LOCATION or OPTIONS cannot be used ({type(error).__name__})"
    if why:
        yield Error(
            f"Sessions have no store: {why}",
            hint="CONNECTION_POOL_KWARGS and the query of LOCATION are options of redis-py's "
            "connections; ssl_... are for TLS only, which is LOCATION rediss://.",
            id="clustered_sessions.E001",
        )
    if problem:
        yield Error(
            f"Sessions have no store: {problem} in the CACHES entry that SESSION_CACHE_ALIAS "
            f"names, {settings.SESSION_CACHE_ALIAS!r}.",
            hint="LOCATION is redis://HOST:6379/1, rediss://... or unix:///PATH?db=1, special "
            "characters of a password percent-encoded; SENTINELS is a list of (host, port).",
            id="clustered_sessions.E001",
        )


def _strange_classes(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if (factory := connections.factory(options)) not in connections.FACTORIES:
        yield "CONNECTION_FACTORY", factory
    pool = options.get("CONNECTION_POOL_CLASS")
    if pool and pool not in connections.POOLS:
        yield "CONNECTION_POOL_CLASS", pool
    client = options.get("REDIS_CLIENT_CLASS")
    if client and client not in _CLIENT_CLASSES:
        yield "REDIS_CLIENT_CLASS", client
    parser = options.get("PARSER_CLASS")
    if parser and not str(parser).startswith("redis."):
        yield "PARSER_CLASS", parser
    cache_client = options.get("CLIENT_CLASS")
    if cache_client and str(cache_client).endswith("ShardClient"):
        yield "CLIENT_CLASS", cache_client
    pool_options = options.get("CONNECTION_POOL_KWARGS") or {}
    if "connection_class" in pool_options:
        yield "connection_class in CONNECTION_POOL_KWARGS", pool_options["connection_class"]
    for name in connections.SYNC_ONLY & pool_options.keys():
        if pool_options[name]:
            yield f"{name} in CONNECTION_POOL_KWARGS", pool_options[name]


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
    if not isinstance(entry.get("LOCATION"), str | list | tuple):
        return None
    options = entry.get("OPTIONS", {})
    given = {"db": 0, **options, **(options.get("CONNECTION_POOL_KWARGS") or {})}["db"] or 0
    try:
        url = urlsplit(connections.url(entry))
        asked = parse_qs(url.query).get("db")
        if url.scheme == "unix":
            return unquote(url.path), 0, int(asked[0] if asked else given)
        if url.scheme in ("redis", "rediss", "valkey", "valkeys"):
            host = url.hostname or "localhost"
            host = "localhost" if host in ("127.0.0.1", "::1") else host
            return host, url.port or 6379, int(asked[0] if asked else url.path[1:] or given)
    except ValueError:
        pass
    return None
