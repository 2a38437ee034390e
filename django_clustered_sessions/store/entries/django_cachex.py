"""django-cachex: a backend for each driver and kind of store, and OPTIONS in small letters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from .entry import Entry, Foreign, Kind, build, dotted, locations, parsed

CLUSTER: Final = "django_cachex.cache.ValkeyClusterCache"

#: Names of this package's backends.
BACKENDS: Final = {
    "RedisCache": Kind.SERVER,
    "RedisSentinelCache": Kind.SENTINEL,
    "RedisClusterCache": Kind.CLUSTER,
    "ValkeyCache": Kind.SERVER,
    "ValkeySentinelCache": Kind.SENTINEL,
    "ValkeyClusterCache": Kind.CLUSTER,
    "ValkeyGlideCache": Kind.SERVER,
    "ValkeyGlideClusterCache": Kind.CLUSTER,
}

#: Options that are the cache's, not a connection's.
_OF_CACHE: Final = frozenset(
    {
        "CULL_FREQUENCY",
        "MAX_ENTRIES",
        "async_pool_class",
        "compressor",
        "ignore_exceptions",
        "log_ignored_exceptions",
        "parser_class",
        "pool_class",
        "reverse_key_function",
        "sentinel_kwargs",
        "sentinels",
        "serializer",
        "stampede_prevention",
        "tracking",
    }
)

#: What valkey-glide's connections take; it has no others.
_OF_GLIDE: Final = ("username", "password", "db", "client_name")


def read(location: Any, options: Mapping[str, Any], backend: str) -> Entry:
    """Return what an entry says.

    Raises BadEntry.
    """
    kind = BACKENDS[backend]
    urls = locations(location, ";,")
    given = {name: options[name] for name in options.keys() - _OF_CACHE}
    over_url = {name: given[name] for name in ("username", "password") if given.get(name)}
    if backend.startswith("ValkeyGlide"):
        given = {name: given[name] for name in _OF_GLIDE if given.get(name) is not None}
        over_url = given
        is_tls = options.get("use_tls", options.get("ssl"))
        if is_tls is not None:
            scheme = "rediss" if is_tls else "redis"
            urls = [f"{scheme}://{url.partition('://')[2]}" for url in urls]
    if kind is Kind.SENTINEL and parsed(urls) and (netloc := urlsplit(urls[0]).netloc):
        # As it is written: a URL's host is in small letters, the name of a primary need not be.
        over_url = {**over_url, "host": netloc.rpartition("@")[2].partition(":")[0]}
    return build(
        kind,
        urls,
        given,
        cluster_is=f"BACKEND is {CLUSTER!r} or its twin for another driver",
        pool_option="pool_class",
        pool_class=options.get("pool_class"),
        over_url=over_url,
        sentinels=options.get("sentinels"),
        sentinel_option="sentinels",
        sentinel_keywords=options.get("sentinel_kwargs"),
        foreign=_foreign(options),
    )


def _foreign(options: Mapping[str, Any]) -> list[Foreign]:
    parser = options.get("parser_class")
    if parser is None or dotted(parser).startswith(("redis.", "valkey.")):
        return []
    return [Foreign("parser_class", parser, decides=False)]
