"""Connection pools of our own, to what the entry of CACHES says that names the store.

One pool per process for synchronous use, one per event loop for asynchronous use; never those of
the cache, which have its timeouts and retries.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Final, TypeVar, cast

import redis
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.dispatch import receiver
from redis import asyncio as aioredis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from django_clustered_sessions.conf import conf
from django_clustered_sessions.protocol.effects import Asks, Wait

from . import exchange, greeting, pools, sentinel, tls
from .circuit_breaker import breakers
from .cluster import NodeAddress, Nodes, SlotMap
from .entries import reading
from .entries.entry import Entry, Kind, Pooling

#: The pools for both worlds.
_POOLS: Final[Mapping[Pooling, tuple[Any, Any]]] = {
    Pooling.REFUSING: (pools.Pool, pools.AsyncPool),
    Pooling.BLOCKING: (pools.BlockingPool, pools.AsyncBlockingPool),
}
_SENTINEL_POOLS: Final = (pools.SentinelPool, pools.AsyncSentinelPool)

#: Connections to an address: for each world, without TLS and with it.
_PLAIN: Final = (
    (greeting.Connection, greeting.SSLConnection),
    (aioredis.Connection, tls.AsyncSSLConnection),
)

#: Connections by a socket in the file system.
_UNIX: Final = (greeting.UnixConnection, aioredis.UnixDomainSocketConnection)

#: Connections to the primary that Sentinels name: for each world, without TLS and with it.
_WATCHED: Final = (
    (sentinel.WatchedConnection, sentinel.WatchedTLSConnection),
    (sentinel.AsyncWatchedConnection, sentinel.AsyncWatchedTLSConnection),
)

#: Connection options that are not the entry's to decide here: timeouts and repeats follow
#: CLUSTERED_SESSIONS_STORE_TIMEOUT, commands are packed here, and replies are read raw.
_OURS: Final = frozenset(
    {
        "cache",
        "cache_config",
        "cache_factory",
        "command_packer",
        "decode_responses",
        "health_check_interval",
        "is_master",
        "legacy_responses",
        "maint_notifications_config",
        "parser_class",
        "protocol",
        "queue_class",
        "retry",
        "retry_on_error",
        "retry_on_timeout",
        "socket_connect_timeout",
        "socket_timeout",
        "timeout",
    }
)

#: Options of synchronous connections alone: an asynchronous one cannot do what they ask for.
SYNC_ONLY: Final = frozenset(
    {
        "ssl_ocsp_context",
        "ssl_ocsp_expected_cert",
        "ssl_validate_ocsp",
        "ssl_validate_ocsp_stapled",
    }
)

#: Settings that a pool is built from.
_BUILT_FROM: Final = frozenset(
    {
        "CACHES",
        "CLUSTERED_SESSIONS_STORE_TIMEOUT",
        "DJANGO_REDIS_CONNECTION_FACTORY",
        "DJANGO_VALKEY_CONNECTION_FACTORY",
        "SESSION_CACHE_ALIAS",
    }
)

#: As many connections as there are requests at once; the entry may say fewer.
_UNLIMITED: Final = 2**31

#: As many connections as a blocking pool has where the entry does not say; redis-py's default.
_WAITED_FOR: Final = 50

#: Of a cluster, the pools of its nodes.
Pool = pools.Pool | Nodes
AsyncPool = pools.AsyncPool | Nodes

T = TypeVar("T")

_Where = tuple[asyncio.AbstractEventLoop, int]


class UnusableOption(ImproperlyConfigured):
    """An option of the entry, or its value, is nothing that a connection takes."""


def entry() -> Entry:
    """Return what the CACHES entry says that SESSION_CACHE_ALIAS names.

    Raises ImproperlyConfigured.
    """
    return reading.named(settings.CACHES, settings.SESSION_CACHE_ALIAS)


def is_cluster() -> bool:
    """Return whether two sessions may be on two servers, where no script can have both.

    Raises ImproperlyConfigured.
    """
    return isinstance(working_pools.pool(), Nodes)


@cache
def slot_map(start: tuple[NodeAddress, ...]) -> SlotMap:
    """Return the map of slots that all pools of this process share."""
    return SlotMap(start)


def _build(world: int, at: sentinel.Address | None = None) -> Any:
    """Build the pool of one world: synchronous (0) or asynchronous (1).

    ``at`` is a server that stands for the one that LOCATION or the Sentinels name.
    """
    found = entry()
    for foreign in found.foreign:
        if foreign.decides:
            raise ImproperlyConfigured(str(foreign))
    timeout_s = conf.store_timeout
    ours: dict[str, Any] = {
        "protocol": 2,
        "retry": (Retry, AsyncRetry)[world](NoBackoff(), 0),
        "socket_connect_timeout": timeout_s,
        # The asynchronous driver has a limit for each trip, and redis-py's would be one more for
        # each reply, and a task for each sending.
        "socket_timeout": None if world else timeout_s,
    }
    # None is a value like others: of some options, not to do what they would do otherwise.
    keywords = {
        name: value
        for name, value in found.keywords.items()
        if name not in _OURS and (name not in SYNC_ONLY or value or world == 0)
    } | ours
    if keywords.get("db"):
        # As text: hiredis ends the process where a signal's exception meets it packing a number.
        keywords["db"] = str(keywords["db"])
    pool_class = _POOLS[found.pooling][world]
    connection_class: Any = _PLAIN[world][found.is_tls]
    if at is not None:
        pool_class = pools.Pool
        keywords.pop("path", None)
        keywords["host"], keywords["port"] = at
    elif found.kind is Kind.SENTINEL:
        pool_class = _SENTINEL_POOLS[world]
        connection_class = _WATCHED[world][found.is_tls]
        keywords["watcher"] = _watcher(found, timeout_s)
    elif "path" in keywords:
        connection_class = _UNIX[world]
    if keywords.get("max_connections") is None:
        # redis-py's default is 100, and the task after that fails at once.
        is_blocking = issubclass(pool_class, pools.BlockingPool | pools.AsyncBlockingPool)
        keywords["max_connections"] = _WAITED_FOR if is_blocking else _UNLIMITED
    keywords["connection_class"] = connection_class
    with _named("The sessions' CACHES entry has, in its OPTIONS or in its LOCATION,"):
        built = pool_class(**keywords)
        # A pool takes whatever it is given, and its connections are made by requests.
        built.connection_class(**built.connection_kwargs)
    if found.kind is Kind.CLUSTER and at is None:
        # One node that hangs leaves time to ask another one.
        half = {"socket_connect_timeout": timeout_s / 2}
        keywords |= half if world else {**half, "socket_timeout": timeout_s / 2}
        return Nodes(
            slot_map(tuple(found.nodes)),
            lambda node: _with_breaker(pool_class(**keywords | node._asdict())),
        )
    return _with_breaker(built)


def _watcher(found: Entry, timeout_s: float) -> sentinel.SentinelWatcher:
    """Return the watcher of an entry's Sentinels."""
    # One that hangs leaves time to ask the next one, and the primary.
    share_s = timeout_s / (len(found.sentinels) + 1)
    asking = {
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),
        "socket_connect_timeout": share_s,
        "socket_timeout": share_s,
        **found.sentinel_keywords,
    }
    with _named("The options for Sentinels in the OPTIONS of the sessions' CACHES entry have"):
        redis.Redis(**asking)
    return sentinel.watcher(found.service, found.sentinels, asking)


@contextmanager
def _named(whose: str) -> Iterator[None]:
    """Name what redis-py refuses. Its text names an option, and no password."""
    try:
        yield
    except (TypeError, ValueError, redis.RedisError) as error:
        raise UnusableOption(f"{whose} an option that cannot be used: {error}") from error


def try_out() -> None:
    """Build what the entry says, for synchronous and for asynchronous use; connect to nothing.

    Raises ImproperlyConfigured.
    """
    _build(0)
    _build(1)


def _with_breaker(pool: Any) -> Any:
    """Give a pool the breaker of the node that its connections lead to."""
    to = pool.connection_kwargs
    if watcher := to.get("watcher"):
        name = watcher.service
    else:
        name = to.get("path") or f"{to.get('host', 'localhost')}:{to.get('port', 6379)}"
    pool.breaker = breakers.of(str(name))
    return pool


class _Pools:
    """The pools of this process, until a setting that they were built from changes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.sync: Pool | None = None
        self.by_loop: dict[_Where, tuple[AsyncPool, AsyncGenerator[None]]] = {}
        self._changes = 0

    def pool(self) -> Pool:
        with self._lock:
            self.sync = self.sync or _build(0)
            return self.sync

    def apool(self) -> AsyncPool:
        loop = asyncio.get_running_loop()
        where = (loop, self._changes)
        if where not in self.by_loop:
            for other in list(self.by_loop):
                if other[0].is_closed():
                    self.by_loop.pop(other, None)
                elif other[0] is loop:
                    # From before a change of settings.
                    left, _ = self.by_loop.pop(other)
                    _close_channels(left)
                    left.end()
            pool = _build(1)
            self.by_loop[where] = pool, self._close_with_loop(where, pool)
            _start(self.by_loop[where][1])
        return self.by_loop[where][0]

    async def _close_with_loop(self, where: _Where, pool: AsyncPool) -> AsyncGenerator[None]:
        """Wait for the event loop's end, and close the connections while it can still do that.

        A loop that ends closes the asynchronous generators that were started in it
        (``loop.shutdown_asyncgens()``, which ``asyncio.run`` and asgiref call). A weak
        dictionary by loop would not do: the connections hold their loop.
        """
        try:
            yield
        finally:
            # Not a pool that was left, and may be in use.
            if self.by_loop.pop(where, None):
                _close_channels(pool)
                for one in pool.pools if isinstance(pool, Nodes) else [pool]:
                    await one.disconnect()

    def forget(self) -> None:
        with self._lock:
            pool, self.sync = self.sync, None
            self._changes += 1
        if pool is not None:
            _close_channels(pool)
            pool.disconnect()


def _close_channels(pool: Any) -> None:
    """Close a pool's tracked connections, without waiting until nothing refers to the pool.

    A session that remembers an outage does, by the traceback of the error.
    """
    if pool.channels is not None:
        pool.channels.close()


def _start(generator: AsyncGenerator[None]) -> None:
    """Run a generator that does not wait before its first yield up to there, without a loop."""
    with suppress(StopIteration):
        anext(generator).__await__().send(None)


working_pools, waiting_pools = _Pools(), _Pools()


def _start_anew() -> None:
    """Leave all connections to the parent of a forked process.

    They are not even closed: under a running event loop that would take them out of the parent's.
    """
    global working_pools, waiting_pools
    _inherited.extend((working_pools, waiting_pools))
    working_pools, waiting_pools = _Pools(), _Pools()


_inherited: list[_Pools] = []
os.register_at_fork(after_in_child=_start_anew)


def _for(pool: T, step: Asks | None) -> T:
    # A mailbox is on one node of a cluster; where a trip goes is found out as it is sent.
    if isinstance(step, Wait) and isinstance(pool, Nodes):
        return cast(T, pool.pool(step))
    return pool


def pool(step: Asks | None = None) -> Pool:
    """Return this process's pool of connections to the store that a step of a flow asks.

    Raises ImproperlyConfigured.
    """
    pool = working_pools.sync or working_pools.pool()
    return _for(pool, step) if isinstance(step, Wait) else pool


def apool(step: Asks | None = None) -> AsyncPool:
    """Return the running event loop's pool. See pool()."""
    return _for(working_pools.apool(), step)


def waiting_pool(step: Asks | None = None) -> Pool:
    """Return the pool for waits for a lock, which starve no other trip of connections.

    As large as the other one. See pool().
    """
    return _for(waiting_pools.pool(), step)


def awaiting_pool(step: Asks | None = None) -> AsyncPool:
    """Return the running event loop's pool for waits. See waiting_pool()."""
    return _for(waiting_pools.apool(), step)


def pool_at(address: sentinel.Address) -> pools.Pool:
    """Return a new pool of connections to one server, a replica for example. See pool()."""
    built: pools.Pool = _build(0, address)
    return built


def watcher() -> sentinel.SentinelWatcher | None:
    """Return the watcher of the Sentinels, None without any. Raises ImproperlyConfigured."""
    found = pool()
    return None if isinstance(found, Nodes) else found.connection_kwargs.get("watcher")


def nodes() -> Mapping[NodeAddress, Sequence[tuple[int, int]]]:
    """Return a cluster's primaries, as far as this process knows, each with its ranges of slots.

    Empty where the store is no cluster. Raises ImproperlyConfigured.
    """
    found = pool()
    return found.slots if isinstance(found, Nodes) else {}


def node(key: str) -> NodeAddress | None:
    """Return the primary of a cluster that has a key, as far as this process knows.

    None where the store is no cluster. Raises ImproperlyConfigured.
    """
    found = pool()
    return found.node(key) if isinstance(found, Nodes) else None


def address() -> str:
    """Return where this process's connections lead: ``HOST:PORT`` or the path of a socket.

    Not for a cluster, whose ``nodes`` are several.

    Raises SessionStoreUnavailable, ImproperlyConfigured.
    """
    return exchange.address(pool(), conf.store_timeout)


@receiver(setting_changed)
def _on_setting_changed(*, setting: str, **kwargs: Any) -> None:
    if setting in _BUILT_FROM:
        working_pools.forget()
        waiting_pools.forget()
        slot_map.cache_clear()
        sentinel.forget()
        breakers.forget()
