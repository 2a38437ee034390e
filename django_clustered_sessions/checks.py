"""System checks; ``docs/checks.md`` lists them all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module
from typing import Any, Final, get_args
from urllib.parse import parse_qs, unquote, urlsplit

from django.apps import AppConfig
from django.conf import settings
from django.contrib.sessions.middleware import SessionMiddleware
from django.core.checks import CheckMessage, Error, Info, Warning
from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

from . import connections, drivers, statistics
from .backend import SessionStore
from .conf import (
    PREFIX,
    Locking,
    Nonstop,
    OnConflict,
    OnLockLost,
    OnReadOnlyChange,
    OnSyncShortfall,
    Settings,
    conf,
)
from .exceptions import SessionStoreUnavailable
from .middleware import ClusteredSessionMiddleware
from .replication import SHARE
from .statistics import StoreFacts

_OURS: Final = f"{ClusteredSessionMiddleware.__module__}.{ClusteredSessionMiddleware.__qualname__}"

#: Oldest supported release of each store.
OLDEST: Final = {"redis": (7, 0), "valkey": (7, 2)}

#: First release with WAITAOF, of both stores.
_WAITAOF: Final = (7, 2)

_CLIENT_CLASSES: Final = frozenset(
    {"redis.Redis", "redis.StrictRedis", "redis.client.Redis", "redis.client.StrictRedis"}
)
#: Bytes of a session are counted in 32 bits.
_MAX_BYTES: Final = 2**32 - 1
#: Renewals are written once a second at most, so a shorter idle timeout would cut people off.
_SHORTEST_IDLE_S: Final = 2

Rule = tuple[Callable[[Any], bool], str]


def _one_of(*allowed: str | None) -> Rule:
    return lambda value: value in allowed, "one of " + ", ".join(map(repr, allowed))


_SECONDS: Final[Rule] = (
    lambda value: _is_number(value) and value > 0,
    "a number of seconds above 0",
)
_HOW_MANY: Final[Rule] = (
    lambda value: _is_number(value) and isinstance(value, int) and value >= 0,
    "a whole number, 0 or more",
)

#: What each setting has to be: a test, and the same in words.
_RULES: Final[Mapping[str, Rule]] = {
    "KEY_PREFIX": (
        lambda value: isinstance(value, str) and bool(value) and not set(value) & set("{}"),
        "a string that is not empty and has no { or }",
    ),
    "ON_CONFLICT": _one_of(*get_args(OnConflict)),
    "STORE_TIMEOUT": _SECONDS,
    "MAX_BYTES": (
        lambda value: _is_number(value) and isinstance(value, int) and 0 < value <= _MAX_BYTES,
        f"a whole number of bytes from 1 to {_MAX_BYTES}",
    ),
    "IDLE_TIMEOUT": (
        lambda value: value is None or (_is_number(value) and value >= _SHORTEST_IDLE_S),
        f"None or a number of seconds, {_SHORTEST_IDLE_S} at least",
    ),
    "NEAR_CACHE_BYTES": _HOW_MANY,
    "LOCKING": _one_of(*get_args(Locking)),
    "LOCK_WAIT": _SECONDS,
    "LOCK_LEASE": _SECONDS,
    "LOCK_MAX_HOLD": _SECONDS,
    "LOCK_MAX_WAITERS": _HOW_MANY,
    "LOCK_PROCESS_WAITERS": _HOW_MANY,
    "ON_LOCK_LOST": _one_of(*get_args(OnLockLost)),
    "ON_READ_ONLY_CHANGE": _one_of(None, *get_args(OnReadOnlyChange)),
    "SYNC_REPLICAS": _HOW_MANY,
    "SYNC_FSYNC": (lambda value: isinstance(value, bool), "True or False"),
    "SYNC_TIMEOUT": _SECONDS,
    "ON_SYNC_SHORTFALL": _one_of(*get_args(OnSyncShortfall)),
    "NONSTOP": _one_of(*get_args(Nonstop)),
    "NODE_NAME": (
        lambda value: value is None or isinstance(value, str),
        "a string, or None for the name of the host",
    ),
}


def check_settings(
    app_configs: Sequence[AppConfig] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """Check what the settings say; nothing while SESSION_ENGINE is not this package's."""
    if not _is_our_engine():
        return []
    values = list(_values())
    return [
        *_middleware(),
        *_unknown_names(),
        *values,
        *_entry(buildable=not values),
        *_shared_database(),
        *([] if values else [*_idle_timeout(), *_locks(), *_sync_timeout(), *_nonstop()]),
        *_renewer(),
        *_serializer(),
    ]


def check_store(
    app_configs: Sequence[AppConfig] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """Ask the store, within STORE_TIMEOUT; nothing while the settings have errors."""
    if not _is_our_engine() or any(message.is_serious() for message in check_settings()):
        return []
    budget = drivers.Budget(conf.store_timeout)
    try:
        facts = drivers.run(statistics.store_facts(time.time), connections.pool, budget)
    except SessionStoreUnavailable as error:
        return [
            Warning(
                f"The session store could not be asked: {error}",
                hint="Run this check where the site runs, with the store up.",
                id="clustered_sessions.W006",
            )
        ]
    return [
        *_eviction(facts),
        *_persistence(facts),
        *_clock(facts),
        *_version(facts),
        *_sync(facts),
        *_topology(facts),
        *_isolation(facts),
    ]


def _is_our_engine() -> bool:
    try:
        engine = import_module(settings.SESSION_ENGINE).SessionStore
    except (ImportError, AttributeError):
        return False
    return issubclass(engine, SessionStore)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _middleware() -> Iterator[CheckMessage]:
    classes = {path: _imported(path) for path in settings.MIDDLEWARE}
    found = {
        path: cls
        for path, cls in classes.items()
        if isinstance(cls, type) and issubclass(cls, SessionMiddleware)
    }
    if not found:
        yield Warning(
            "SESSION_ENGINE is django_clustered_sessions.backend, and MIDDLEWARE has no session "
            "middleware: requests have no session.",
            hint=f"Add '{_OURS}' to MIDDLEWARE, before AuthenticationMiddleware.",
            id="clustered_sessions.W001",
        )
    for path, cls in found.items():
        if not issubclass(cls, ClusteredSessionMiddleware):
            yield Warning(
                f"MIDDLEWARE has {path}. Under it a store that is away is an error 500 instead of "
                "a 503 with Retry-After, sliding expiry costs a round trip of its own instead of "
                "riding on the load, each request under ASGI takes a hop to a thread, and no "
                "request is locked.",
                hint=f"Put '{_OURS}' in its place.",
                id="clustered_sessions.W002",
            )


def _imported(path: str) -> Any:
    try:
        return import_string(path)
    except ImportError:
        return None


def _unknown_names() -> Iterator[CheckMessage]:
    known = [PREFIX + name for name in _names()]
    for name in dir(settings):
        if name.startswith(PREFIX) and name not in known:
            nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
            yield Warning(
                f"There is no setting {name}; it has no effect.",
                hint=f"The nearest one is {nearest}.",
                id="clustered_sessions.W003",
            )


def _names() -> list[str]:
    return [
        name.upper() for name, kind in vars(Settings).items() if isinstance(kind, cached_property)
    ]


def _values() -> Iterator[CheckMessage]:
    for name, (is_right, wanted) in _RULES.items():
        if hasattr(settings, PREFIX + name):
            value = getattr(settings, PREFIX + name)
            if not is_right(value):
                yield Error(
                    f"{PREFIX}{name} is {value!r}.",
                    hint=f"It has to be {wanted}.",
                    id="clustered_sessions.E003",
                )


def _entry(*, buildable: bool) -> Iterator[CheckMessage]:
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
    problem = None
    if _factory(options) == connections.SENTINEL and not options.get("SENTINELS"):
        problem = "OPTIONS has no SENTINELS"
    else:
        try:
            connections.pool()
        except Exception as error:
            # Not its text, which may quote a password out of the URL.
            problem = f"LOCATION or OPTIONS cannot be used ({type(error).__name__})"
    if problem:
        yield Error(
            f"Sessions have no store: {problem} in the CACHES entry that SESSION_CACHE_ALIAS "
            f"names, {settings.SESSION_CACHE_ALIAS!r}.",
            hint="LOCATION is redis://HOST:6379/1, rediss://... or unix:///PATH?db=1, special "
            "characters of a password percent-encoded; SENTINELS is a list of (host, port).",
            id="clustered_sessions.E001",
        )


def _factory(options: Mapping[str, Any]) -> Any:
    return options.get("CONNECTION_FACTORY") or getattr(
        settings, "DJANGO_REDIS_CONNECTION_FACTORY", connections.PLAIN
    )


def _strange_classes(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if (factory := _factory(options)) not in connections.FACTORIES:
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
    sharding = options.get("CLIENT_CLASS")
    if sharding and str(sharding).endswith("ShardClient"):
        yield "CLIENT_CLASS", sharding
    connection = (options.get("CONNECTION_POOL_KWARGS") or {}).get("connection_class")
    if connection:
        yield "connection_class in CONNECTION_POOL_KWARGS", connection


def _shared_database() -> Iterator[CheckMessage]:
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
    given = {"db": 0, **options, **(options.get("CONNECTION_POOL_KWARGS") or {})}["db"]
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


def _idle_timeout() -> Iterator[CheckMessage]:
    idle, age = conf.idle_timeout, settings.SESSION_COOKIE_AGE
    if idle and idle > age:
        yield Warning(
            f"{PREFIX}IDLE_TIMEOUT ({idle} s) is larger than SESSION_COOKIE_AGE ({age} s), which "
            "ends every session before that.",
            hint="Raise SESSION_COOKIE_AGE, or leave the idle timeout out.",
            id="clustered_sessions.W005",
        )


def _locks() -> Iterator[CheckMessage]:
    if conf.lock_max_hold < conf.lock_lease:
        yield Error(
            f"{PREFIX}LOCK_MAX_HOLD ({conf.lock_max_hold} s) is shorter than {PREFIX}LOCK_LEASE "
            f"({conf.lock_lease} s).",
            hint="It has to be as long as the lease at least: a lease is renewed for so long.",
            id="clustered_sessions.E003",
        )
    if conf.locking != "off" and conf.lock_lease >= conf.lock_wait:
        yield Warning(
            f"{PREFIX}LOCK_LEASE ({conf.lock_lease} s) is not shorter than {PREFIX}LOCK_WAIT "
            f"({conf.lock_wait} s): where a process dies that holds a lock, those who wait for "
            "it give up before its lease ends.",
            hint="Make the lease shorter than the wait by a second or two.",
            id="clustered_sessions.W011",
        )
    if conf.on_lock_lost == "merge" and conf.on_conflict != "merge":
        yield Warning(
            f"{PREFIX}ON_LOCK_LOST is 'merge' and has no effect, for {PREFIX}ON_CONFLICT is "
            f"{conf.on_conflict!r}: who lost its lock is refused.",
            hint=f"Set {PREFIX}ON_CONFLICT to 'merge', or leave ON_LOCK_LOST out.",
            id="clustered_sessions.W013",
        )


def _sync_timeout() -> Iterator[CheckMessage]:
    if (conf.sync_replicas or conf.sync_fsync) and conf.sync_timeout > conf.store_timeout / 2:
        yield Warning(
            f"{PREFIX}SYNC_TIMEOUT ({conf.sync_timeout} s) is more than half of "
            f"{PREFIX}STORE_TIMEOUT ({conf.store_timeout} s): a write waits for "
            f"{SHARE * conf.store_timeout:g} s at most.",
            hint="Make it less, or STORE_TIMEOUT more.",
            id="clustered_sessions.W015",
        )


def _nonstop() -> Iterator[CheckMessage]:
    if conf.nonstop.startswith("local_reads") and not conf.near_cache_bytes:
        yield Error(
            f"{PREFIX}NONSTOP is {conf.nonstop!r}, and {PREFIX}NEAR_CACHE_BYTES is 0: there is "
            "nothing to read from while the store is away.",
            hint="Give the near cache some memory, or choose 'exception' or 'noop'.",
            id="clustered_sessions.E003",
        )


def _renewer() -> Iterator[CheckMessage]:
    try:
        uwsgi = import_module("uwsgi")
    except ImportError:
        return
    # Its options would not tell: later releases have threads unless they are told otherwise.
    if not getattr(uwsgi, "has_threads", True):
        yield Warning(
            "This uWSGI has no support for Python's threads: nothing sees to it that the leases "
            f"of locks are renewed, and a request that holds one for longer than {PREFIX}"
            "LOCK_LEASE may lose it.",
            hint="Set enable-threads = true in uWSGI's configuration.",
            id="clustered_sessions.W012",
        )


def _serializer() -> Iterator[CheckMessage]:
    try:
        serializer = import_string(settings.SESSION_SERIALIZER)()
        for value in ("x", 1, ["x", 1], None):
            stored = serializer.dumps(value)
            if not isinstance(stored, bytes) or serializer.loads(stored) != value:
                raise TypeError(f"{value!r} does not come back as it was")
    except Exception as error:
        yield Error(
            f"SESSION_SERIALIZER {settings.SESSION_SERIALIZER} cannot take single values: "
            f"{type(error).__name__}: {error}",
            hint="Each key of a session is serialised by itself: dumps() has to take any value, "
            "not only a dict, and return bytes that loads() reads.",
            id="clustered_sessions.E004",
        )


def _unchecked(what: str, why: str) -> CheckMessage:
    return Info(
        f"It could not be checked {what}: {why}.",
        hint="See to it in the settings of whoever runs the store, or let the store's user run "
        "INFO and CONFIG GET.",
        id="clustered_sessions.I001",
    )


def _eviction(facts: StoreFacts) -> Iterator[CheckMessage]:
    policy = facts.info.get("maxmemory_policy")
    if policy is None:
        yield _unchecked("whether the store evicts sessions", facts.why_no_info)
    elif policy != "noeviction":
        yield Warning(
            f"The session store's maxmemory-policy is {policy}: when it is full it drops "
            "sessions, and people are logged out.",
            hint="Set maxmemory-policy noeviction; volatile-... drops sessions too, for each has "
            "a time to live. Keep caches on a server of their own.",
            id="clustered_sessions.W007",
        )


def _persistence(facts: StoreFacts) -> Iterator[CheckMessage]:
    if facts.appendonly:
        return
    if facts.appendonly is None:
        yield _unchecked("whether the store keeps sessions on disk", facts.why_no_info)
    elif facts.save is None:
        yield _unchecked("whether the store keeps sessions on disk", facts.why_no_config)
    elif not facts.save:
        yield Warning(
            "The session store keeps nothing on disk: a restart ends every session.",
            hint="Set appendonly yes (a second's writes are lost at most), or save for snapshots.",
            id="clustered_sessions.W008",
        )


def _clock(facts: StoreFacts) -> Iterator[CheckMessage]:
    if abs(facts.clock_offset_ms) - facts.clock_error_ms > statistics.CLOCK_TOLERANCE_MS:
        yield Warning(
            f"This node's clock is {abs(facts.clock_offset_ms) / 1000:.1f} s "
            f"{'ahead of' if facts.clock_offset_ms > 0 else 'behind'} the session store's.",
            hint="Sessions follow the store's clock; let NTP set both all the same: browsers are "
            "told by this node's clock when the cookie ends.",
            id="clustered_sessions.W009",
        )


def _version(facts: StoreFacts) -> Iterator[CheckMessage]:
    if not facts.version:
        yield _unchecked("which version the store has", facts.why_no_info)
        return
    oldest = OLDEST[facts.product]
    if _is_older(facts, oldest):
        name = facts.product.capitalize()
        yield Warning(
            f"The session store is {name} {facts.version}.",
            hint=f"Use {name} {oldest[0]}.{oldest[1]} or newer.",
            id="clustered_sessions.W010",
        )


def _sync(facts: StoreFacts) -> Iterator[CheckMessage]:
    if not conf.sync_replicas and not conf.sync_fsync:
        return
    if not facts.info:
        yield _unchecked("whether the store can do synchronous writes", facts.why_no_info)
        return
    replicas = facts.number("connected_slaves") or 0
    if replicas < conf.sync_replicas:
        yield Warning(
            f"The session store has {replicas} replicas, and {PREFIX}SYNC_REPLICAS is "
            f"{conf.sync_replicas}: no write will be acknowledged.",
            hint="See to the replicas, or ask for fewer.",
            id="clustered_sessions.W014",
        )
    if conf.sync_fsync and (not facts.appendonly or _is_older(facts, _WAITAOF)):
        yield Warning(
            f"{PREFIX}SYNC_FSYNC is on, and the session store has no append-only file or is older "
            "than 7.2: no write will be acknowledged.",
            hint="Set appendonly yes on the primary and its replicas, or leave SYNC_FSYNC out.",
            id="clustered_sessions.W014",
        )


def _is_older(facts: StoreFacts, oldest: tuple[int, ...]) -> bool:
    parts = (facts.version or "").split(".")
    return all(map(str.isdigit, parts)) and tuple(map(int, parts)) < oldest


def _topology(facts: StoreFacts) -> Iterator[CheckMessage]:
    enabled = facts.info.get("cluster_enabled")
    if enabled is not None and (enabled == "1") != connections.is_cluster():
        yield Warning(
            "The session store is a node of a cluster, and the sessions' CACHES entry does not "
            "say so: sessions on other nodes cannot be reached."
            if enabled == "1"
            else "The sessions' CACHES entry is for a cluster, and the session store is none.",
            hint=f"CONNECTION_FACTORY in its OPTIONS is {connections.CLUSTER!r} for a cluster, "
            "and for no other store.",
            id="clustered_sessions.W019",
        )


def _isolation(facts: StoreFacts) -> Iterator[CheckMessage]:
    if connections.watcher() is None:
        return
    if facts.min_replicas is None:
        why = facts.why_no_config or "CONFIG GET does not tell"
        yield _unchecked("whether a primary without replicas takes writes", why)
    elif not facts.min_replicas:
        yield Warning(
            "The primary that the Sentinels name has min-replicas-to-write 0: one that is cut "
            "off from its replicas goes on taking writes, and what it took is lost when another "
            "is promoted.",
            hint="Set min-replicas-to-write 1 and min-replicas-max-lag 10 on each server.",
            id="clustered_sessions.W017",
        )
