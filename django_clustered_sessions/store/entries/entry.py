"""The meaning of an entry of CACHES, whichever package it is for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, NamedTuple

from django.core.exceptions import ImproperlyConfigured
from redis.connection import SSLConnection, parse_url

from django_clustered_sessions.store.cluster import NodeAddress

#: Schemes of a LOCATION, and what redis-py calls them.
SCHEMES: Final = {
    "redis": "redis",
    "rediss": "rediss",
    "valkey": "redis",
    "valkeys": "rediss",
    "unix": "unix",
}

#: Options of the cluster clients of redis-py and valkey-py that sessions have no use for.
_OF_CLUSTER_CLIENTS: Final = frozenset(
    {
        "cluster_error_retry_attempts",
        "connection_error_retry_attempts",
        "dynamic_startup_nodes",
        "load_balancing_strategy",
        "policy_resolver",
        "read_from_replicas",
        "reinitialize_steps",
        "require_full_coverage",
        "startup_nodes",
    }
)

#: Options of the caches inside of valkey-py's clients.
_OF_CLIENT_CACHES: Final = frozenset(
    {
        "cache_allow_list",
        "cache_deny_list",
        "cache_enabled",
        "cache_max_size",
        "cache_policy",
        "cache_ttl",
        "client_cache",
    }
)


class BadEntry(ImproperlyConfigured):
    """An entry for Redis or Valkey does not say where the store is."""


class Kind(Enum):
    """A kind of store, and so of the way to it."""

    SERVER = "one server"
    SENTINEL = "the primary that Sentinels name"
    CLUSTER = "the nodes of a cluster"


class Pooling(Enum):
    """A pool's treatment of a borrower for whom no connection is left."""

    REFUSING = "refused"
    BLOCKING = "waits"


class Foreign(NamedTuple):
    """A class that OPTIONS names and sessions cannot use; without it they may not connect.

    One that does not decide on the connection is only checked.
    """

    option: str
    value: Any
    decides: bool = True
    which: str = "this package cannot use both synchronously and asynchronously"
    advice: str = (
        "Leave it out, or name one of the package that the entry is for, of redis' or of valkey's "
        "own; docs/caches.md has the list. Other entries of CACHES are not concerned."
    )

    def __str__(self) -> str:
        return f"{self.option} of the sessions' CACHES entry is {self.value!r}, which {self.which}"


def sharding(client: Any) -> Iterator[Foreign]:
    """Give what is wrong with a CLIENT_CLASS, as django-redis and django-valkey have it."""
    if client and str(client).endswith("ShardClient"):
        yield Foreign(
            "CLIENT_CLASS",
            client,
            decides=False,
            which="spreads keys over servers that know nothing of each other",
            advice="Leave it out, and name one server, in an entry of CACHES for sessions alone. "
            "For several servers use a cluster: docs/cluster.md.",
        )


@dataclass(frozen=True)
class Entry:
    """The store that an entry names, and the way to it.

    ``keywords`` are those of a redis-py connection and of its pool, and may be wrong ones:
    ``host`` and ``port`` or ``path``, ``db``, ``username``, ``password``, ``max_connections``,
    ``ssl_...`` and more. ``nodes`` are the start-up nodes of a cluster, ``service`` is what the
    Sentinels call the primary, ``sentinels`` are their hosts and ports, and ``sentinel_keywords``
    those of a connection to them. ``cluster_is`` says how such an entry names a cluster.
    """

    kind: Kind
    keywords: Mapping[str, Any] = field(repr=False)
    is_tls: bool
    cluster_is: str
    pooling: Pooling = Pooling.REFUSING
    nodes: Sequence[NodeAddress] = ()
    service: str = ""
    sentinels: Sequence[tuple[str, int]] = ()
    sentinel_keywords: Mapping[str, Any] = field(default_factory=dict, repr=False)
    foreign: Sequence[Foreign] = ()


#: The pool classes of redis-py and valkey-py that exist for both worlds, by their dotted names.
_POOLINGS: Final = {
    f"{package}{module}.{name}": pooling
    for package in ("redis", "redis.asyncio", "valkey", "valkey.asyncio")
    for module in ("", ".connection")
    for name, pooling in (
        ("ConnectionPool", Pooling.REFUSING),
        ("BlockingConnectionPool", Pooling.BLOCKING),
    )
}
_SENTINEL_POOLS: Final = frozenset(
    f"{package}.sentinel.SentinelConnectionPool"
    for package in ("redis", "redis.asyncio", "valkey", "valkey.asyncio")
)


def locations(location: Any, separators: str) -> list[str]:
    """Return the URLs of a LOCATION, the primary's first."""
    found = re.split(f"[{separators}]", location) if isinstance(location, str) else location or ()
    return [str(one).strip() for one in found if str(one).strip()]


def parsed(urls: Sequence[str]) -> dict[str, Any]:
    """Return the keywords of a connection that the first URL has.

    Raises BadEntry.
    """
    scheme, _, rest = (urls[0] if urls else "").partition("://")
    if scheme.lower() not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise BadEntry(f"LOCATION begins with none of {known}")
    try:
        return dict(parse_url(f"{SCHEMES[scheme.lower()]}://{rest}"))  # type: ignore[no-untyped-call]
    except ValueError:
        # Without the cause, whose text may quote a password out of the URL.
        raise BadEntry("LOCATION is no good URL") from None


def dotted(named: Any) -> str:
    """Return the dotted name of a class that OPTIONS has by name or as itself."""
    return f"{named.__module__}.{named.__qualname__}" if isinstance(named, type) else str(named)


def build(
    kind: Kind,
    urls: Sequence[str],
    options: Mapping[str, Any],
    *,
    cluster_is: str,
    pool_option: str,
    pool_class: Any = None,
    over_url: Mapping[str, Any] | None = None,
    sentinels: Iterable[tuple[str, int]] | None = None,
    sentinel_option: str = "SENTINELS",
    sentinel_keywords: Mapping[str, Any] | None = None,
    foreign: Iterable[Foreign] = (),
) -> Entry:
    """Return the entry of some URLs and connection options; those in ``over_url`` beat the URL's.

    Raises BadEntry.
    """
    of_url = parsed(urls)
    made_by = of_url.pop("connection_class", None)
    is_tls = made_by is not None and issubclass(made_by, SSLConnection)
    beside = [*foreign]
    if (own := options.get("connection_class")) is not None:
        beside.append(Foreign("connection_class in OPTIONS", own))
    keywords = {**options, **of_url, **(over_url or {})}
    keywords = {name: keywords[name] for name in keywords.keys() - _OF_CLIENT_CACHES}
    keywords.pop("connection_class", None)
    pooling, misfit = _pooling(kind, pool_option, pool_class)
    beside += misfit
    nodes: Sequence[NodeAddress] = ()
    service = ""
    watchers: Sequence[tuple[str, int]] = ()
    if kind is Kind.SENTINEL:
        if not sentinels:
            raise BadEntry(f"OPTIONS has no {sentinel_option}")
        try:
            watchers = tuple((str(host), int(port)) for host, port in sentinels)
        except (TypeError, ValueError) as error:
            raise BadEntry(f"{sentinel_option} is no list of (host, port)") from error
        if not (service := keywords.pop("host", "")):
            raise BadEntry("LOCATION does not name the primary as the Sentinels do")
        # Options of redis-py's connections by Sentinels, where others have the scheme for TLS.
        is_tls = bool(keywords.pop("ssl", False)) or is_tls
        for name in ("port", "is_master", "check_connection"):
            keywords.pop(name, None)
    if kind is Kind.CLUSTER:
        try:
            nodes = tuple(map(NodeAddress.of, urls))
        except ValueError:
            # As above.
            raise BadEntry("LOCATION has a node without redis://HOST:PORT") from None
        keywords = {name: keywords[name] for name in keywords.keys() - _OF_CLUSTER_CLIENTS}
    return Entry(
        kind,
        keywords,
        is_tls,
        cluster_is,
        pooling,
        nodes,
        service,
        watchers,
        sentinel_keywords or {},
        tuple(beside),
    )


def _pooling(kind: Kind, option: str, named: Any) -> tuple[Pooling, list[Foreign]]:
    """Return what the pool class says; and itself, where it does not go with the kind of store."""
    name = dotted(named) if named else None
    is_known = name in _SENTINEL_POOLS if kind is Kind.SENTINEL else name in _POOLINGS
    misfit = [Foreign(option, named)] if name and not is_known else []
    return _POOLINGS.get(name or "", Pooling.REFUSING), misfit
