"""django-valkey: the words of django-redis, and clients and backends that imply the factory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from django.conf import settings

from .entry import Entry, Foreign, Kind, build, locations, sharding

CLUSTER: Final = "django_valkey.cluster_cache.cache.ClusterValkeyCache"

#: Names of this package's backends, and what they lead to by themselves.
BACKENDS: Final = {
    "ValkeyCache": Kind.SERVER,
    "AsyncValkeyCache": Kind.SERVER,
    "ClusterValkeyCache": Kind.CLUSTER,
}

#: By their own names: their modules have moved before.
_FACTORIES: Final = {
    "ConnectionFactory": Kind.SERVER,
    "AsyncConnectionFactory": Kind.SERVER,
    "SentinelConnectionFactory": Kind.SENTINEL,
    "AsyncSentinelConnectionFactory": Kind.SENTINEL,
    "ClusterConnectionFactory": Kind.CLUSTER,
}
_SENTINEL_CLIENTS: Final = frozenset({"SentinelClient", "AsyncSentinelClient"})


def read(location: Any, options: Mapping[str, Any], backend: str) -> Entry:
    """Return what an entry says.

    Raises BadEntry.
    """
    client = str(options.get("CLIENT_CLASS") or "")
    implied = Kind.SENTINEL if _is_one_of(client, _SENTINEL_CLIENTS) else BACKENDS[backend]
    factory = options.get("CONNECTION_FACTORY") or getattr(
        settings, "DJANGO_VALKEY_CONNECTION_FACTORY", None
    )
    is_foreign = factory is not None and not _is_one_of(factory, _FACTORIES)
    kind = implied
    if factory is not None and not is_foreign:
        kind = _FACTORIES[factory.rpartition(".")[2]]
    if kind is Kind.CLUSTER:
        # Its client is given the URL and these alone.
        given = dict(options.get("BASE_CLIENT_KWARGS") or {})
    else:
        given = {
            "password": options.get("PASSWORD"),
            **(options.get("CONNECTION_POOL_KWARGS") or {}),
        }
    foreign = [*_foreign(options)]
    if is_foreign:
        foreign.append(Foreign("CONNECTION_FACTORY", factory))
    return build(
        kind,
        locations(location, ","),
        given,
        cluster_is=f"BACKEND is {CLUSTER!r}",
        pool_option="CONNECTION_POOL_CLASS",
        pool_class=options.get("CONNECTION_POOL_CLASS"),
        sentinels=options.get("SENTINELS"),
        sentinel_keywords=options.get("SENTINEL_KWARGS"),
        foreign=foreign,
    )


def _is_one_of(dotted: Any, names: Any) -> bool:
    package, _, name = str(dotted).rpartition(".")
    return package.partition(".")[0] == "django_valkey" and name in names


def _foreign(options: Mapping[str, Any]) -> Iterator[Foreign]:
    for option in ("BASE_CLIENT_CLASS", "PARSER_CLASS", "PARSER_CLS"):
        named = options.get(option)
        if named and not str(named).startswith("valkey."):
            yield Foreign(option, named, decides=False)
    yield from sharding(options.get("CLIENT_CLASS"))
