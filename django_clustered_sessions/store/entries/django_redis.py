"""django-redis: OPTIONS in capitals, and a connection factory for each kind of store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from django.conf import settings

from .entry import Entry, Foreign, Kind, build, locations, sharding

BACKEND: Final = "django_redis.cache.RedisCache"
PLAIN: Final = "django_redis.pool.ConnectionFactory"
SENTINEL: Final = "django_redis.pool.SentinelConnectionFactory"
#: Ours, for django-redis has none.
CLUSTER: Final = "django_clustered_sessions.cluster.ClusterConnectionFactory"

KINDS: Final = {PLAIN: Kind.SERVER, SENTINEL: Kind.SENTINEL, CLUSTER: Kind.CLUSTER}

#: Names of this package's backends.
BACKENDS: Final = ("RedisCache",)

_CLIENTS: Final = frozenset(
    {"redis.Redis", "redis.StrictRedis", "redis.client.Redis", "redis.client.StrictRedis"}
)


def read(location: Any, options: Mapping[str, Any], backend: str) -> Entry:
    """Return what an entry says.

    Raises BadEntry.
    """
    factory: Any = options.get("CONNECTION_FACTORY") or getattr(
        settings, "DJANGO_REDIS_CONNECTION_FACTORY", PLAIN
    )
    given = {"username": options.get("USERNAME"), **(options.get("CONNECTION_POOL_KWARGS") or {})}
    if given.get("password") is None:
        given["password"] = options.get("PASSWORD")
    return build(
        KINDS.get(factory, Kind.SERVER),
        locations(location, ","),
        given,
        cluster_is=f"CONNECTION_FACTORY in its OPTIONS is {CLUSTER!r}",
        pool_option="CONNECTION_POOL_CLASS",
        pool_class=options.get("CONNECTION_POOL_CLASS"),
        sentinels=options.get("SENTINELS"),
        sentinel_keywords=options.get("SENTINEL_KWARGS"),
        foreign=_foreign(factory, options),
    )


def _foreign(factory: str, options: Mapping[str, Any]) -> Iterator[Foreign]:
    if factory not in KINDS:
        yield Foreign("CONNECTION_FACTORY", factory)
    client = options.get("REDIS_CLIENT_CLASS")
    if client and client not in _CLIENTS:
        yield Foreign("REDIS_CLIENT_CLASS", client, decides=False)
    parser = options.get("PARSER_CLASS")
    if parser and not str(parser).startswith("redis."):
        yield Foreign("PARSER_CLASS", parser, decides=False)
    yield from sharding(options.get("CLIENT_CLASS"))
