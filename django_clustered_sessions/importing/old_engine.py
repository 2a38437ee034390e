"""The engine that the site used before: list, read and delete its sessions."""

from __future__ import annotations

import os
import pickle
import re
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib import import_module
from typing import Any, Final, NamedTuple

from django.conf import settings
from django.contrib.sessions.backends import cache, cached_db, db, file
from django.contrib.sessions.backends.base import SessionBase
from django.core.cache import InvalidCacheBackendError, caches
from django.core.exceptions import ImproperlyConfigured, SuspiciousOperation
from django.utils import timezone
from django.utils.encoding import force_str

from django_clustered_sessions.conf import PREFIX, conf
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.protocol.effects import Flow, OutsideCall
from django_clustered_sessions.protocol.record import HiddenKey, milliseconds_of

#: Longest session key that a file or cache can hold.
_LONGEST_KEY: Final = 200

#: Session keys that Django made; a Redis database may hold other entries beside them.
_KEY: Final = re.compile(r"[a-z0-9]{8,}")

#: Errors that mean an unreadable session; any other means that the old engine has failed.
_UNREADABLE: Final = (
    *(ArithmeticError, AttributeError, EOFError, ImportError, LookupError, RecursionError),
    *(TypeError, ValueError, pickle.PickleError, zlib.error),
)

#: Serialisers of django-redis whose data cannot run code.
_DATA_ONLY: Final = ("django_redis.serializers.json.", "django_redis.serializers.msgpack.")


class Pickled(ImproperlyConfigured):
    """Error: the old engine stores pickles, and no setting allows to read them."""


class NotListed(ImproperlyConfigured):
    """Error: the old engine cannot list its sessions."""


class Unreadable(Exception):
    """Error: a session of the old engine cannot be read."""


class Found(NamedTuple):
    """Session in the old engine: its values and its expiry."""

    values: Mapping[Any, Any]
    until: datetime


def engine() -> type[SessionBase]:
    """Return the class of the engine that the setting MIGRATE_FROM names.

    Raises ImproperlyConfigured if it cannot be used, Pickled if it may not.
    """
    path = conf.migrate_from
    try:
        found: type[SessionBase] = import_module(str(path)).SessionStore
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ImproperlyConfigured(
            f"{PREFIX}MIGRATE_FROM is {path!r}, which is no session engine: {error}"
        ) from error
    if any(parent.__module__ == "django_clustered_sessions.backend" for parent in found.__mro__):
        raise ImproperlyConfigured(
            f"{PREFIX}MIGRATE_FROM is {path!r}, the engine that sessions are to be moved into"
        )
    if issubclass(found, db.SessionStore):
        try:
            found.get_model_class()
        except RuntimeError as error:
            raise ImproperlyConfigured(f"{PREFIX}MIGRATE_FROM: {error}") from error
    if issubclass(found, cache.SessionStore | cached_db.SessionStore):
        is_cache = issubclass(found, cache.SessionStore)
        # cached_db is read from its database, whose values are signed and not pickled.
        if not _is_data_only(_cache()) and is_cache and not conf.migrate_pickle:
            raise Pickled(
                f"the cache {_alias()!r} holds sessions as pickles, as far as its "
                "settings tell: whoever can write to it runs code in the processes that read them"
            )
    return found


def _alias() -> str:
    return conf.migrate_cache or settings.SESSION_CACHE_ALIAS


def _cache() -> Any:
    try:
        return caches[_alias()]
    except InvalidCacheBackendError as error:
        raise ImproperlyConfigured(
            f"{PREFIX}MIGRATE_FROM has its sessions in the cache {_alias()!r}, and CACHES has no "
            "such entry"
        ) from error


def _is_data_only(of: Any) -> bool:
    options: Any = settings.CACHES[_alias()].get("OPTIONS", {})
    return hasattr(of, "pttl") and str(options.get("SERIALIZER", "")).startswith(_DATA_ONLY)


def store_of(key: HiddenKey | None) -> Any:
    """Return a session object of the old engine. Raises as ``engine``."""
    found = engine()
    store: Any = found(key.value if key else None)
    if issubclass(found, cache.SessionStore | cached_db.SessionStore):
        store._cache = _cache()
    # The engines for files and cookies replace an unreadable session by a new one.
    store.create = lambda: None
    return store


def ask(call: Callable[[], Any], twin: Callable[[], Awaitable[Any]] | None = None) -> Flow[Any]:
    """Call the old engine: return or raise the outcome of ``call``."""
    reply = yield OutsideCall(call, twin)
    if isinstance(reply, Exception):
        raise reply
    return reply


def look(key: HiddenKey) -> Flow[Found | None]:
    """Look a session up in the old engine; return None if there is none, or an empty one.

    Raises SessionStoreUnavailable if the old engine fails, and Unreadable.
    """
    if not (key.value.isascii() and key.value.isprintable()):
        # Databases and caches raise different errors for such keys.
        return None
    store = store_of(key)
    try:
        found = yield from _reader(store)(store, key)
        if found is None or not found.values or milliseconds_of(found.until) <= time.time() * 1000:
            return None
        return Found(dict(found.values), found.until)
    except _UNREADABLE as error:
        raise Unreadable(f"{type(error).__name__}: {redacted(key, error)}") from error
    except Exception as error:
        raise unavailable(error, key) from error


def unavailable(error: Exception, key: HiddenKey | None = None) -> SessionStoreUnavailable:
    """Return the error to raise if the old engine fails."""
    return SessionStoreUnavailable(
        f"the session engine {conf.migrate_from}, which sessions are taken over from, cannot be "
        f"asked: {type(error).__name__}: {redacted(key, error)}"
    )


def redacted(key: HiddenKey | None, error: Exception) -> str:
    """Return an error's text without the session key that may be in it."""
    return str(error).replace(key.value, "...") if key else str(error)


_Reader = Callable[[Any, HiddenKey], Flow[Found | None]]


def _reader(store: Any) -> _Reader:
    if isinstance(store, db.SessionStore):
        return _from_database
    if isinstance(store, cache.SessionStore):
        return _from_cache
    if isinstance(store, file.SessionStore):
        return _from_file
    return _from_redis_sessions if _is_redis_sessions(store) else _from_any


def _from_database(store: Any, key: HiddenKey) -> Flow[Found | None]:
    row = yield from ask(store._get_session_from_db, store._aget_session_from_db)
    return Found(store.decode(row.session_data), row.expire_date) if row else None


def _from_cache(store: Any, key: HiddenKey) -> Flow[Found | None]:
    # The engine's load() treats an unreachable cache as one without this session.
    if len(key.value) > _LONGEST_KEY:
        return None
    # No variable holds the cache key, which contains the session key: tracebacks show variables.
    values = yield from ask(
        lambda: store._cache.get(store.cache_key), lambda: store._cache.aget(store.cache_key)
    )
    if not values:
        return None
    left_ms = yield from ask(partial(_left_ms, store))
    return Found(values, _until(store, values, left_ms))


def _left_ms(store: Any) -> int | None:
    """Return the remaining ms of a session's cache entry, None if unknown."""
    of = store._cache
    if hasattr(of, "pttl"):
        left_ms = of.pttl(store.cache_key)
    elif hasattr(getattr(of, "_cache", None), "get_client"):
        # Django's own Redis backend has no method for it, but its client has.
        client = of._cache.get_client(store.cache_key)
        left_ms = client.pttl(of.make_and_validate_key(store.cache_key))
    else:
        return None
    return None if left_ms is None or left_ms < 0 else left_ms


def _from_file(store: Any, key: HiddenKey) -> Flow[Found | None]:
    if len(key.value) > _LONGEST_KEY:
        return None
    try:
        saved = yield from ask(store._last_modification)
    except (FileNotFoundError, SuspiciousOperation):
        return None
    values = yield from ask(store.load, store.aload)
    expiry = values.get("_session_expiry")
    return Found(values, store.get_expiry_date(modification=saved, expiry=expiry))


def _is_redis_sessions(store: Any) -> bool:
    return hasattr(store, "server") and hasattr(store, "get_real_stored_key")


def _from_redis_sessions(store: Any, key: HiddenKey) -> Flow[Found | None]:
    # The engine's load() treats an unreachable store as one without this session.
    stored = yield from ask(lambda: store.server.get(store.get_real_stored_key(key.value)))
    if stored is None:
        return None
    left_ms = yield from ask(lambda: store.server.pttl(store.get_real_stored_key(key.value)))
    values = store.decode(force_str(stored))
    return Found(values, _until(store, values, None if left_ms < 0 else left_ms))


def _from_any(store: Any, key: HiddenKey) -> Flow[Found | None]:
    values = yield from ask(store.load, store.aload)
    return Found(values, _until(store, values, None)) if store.session_key else None


def _until(store: Any, values: Mapping[Any, Any], left_ms: int | None) -> datetime:
    """Return a session's expiry; if unknown, that of a session saved now."""
    if left_ms is not None:
        return datetime.now(UTC) + timedelta(milliseconds=left_ms)
    until: datetime = store.get_expiry_date(expiry=values.get("_session_expiry"))
    return until


def keys() -> Iterator[str]:
    """Yield the session keys of the old engine, possibly some more than once.

    Raises NotListed if it cannot list them, and SessionStoreUnavailable if it fails.
    """
    listed = _keys(store_of(None))
    try:
        yield from listed
    except ImproperlyConfigured:
        raise
    except Exception as error:
        raise unavailable(error) from error


def _keys(store: Any) -> Iterator[str]:
    is_cache = isinstance(store, cache.SessionStore)
    if isinstance(store, db.SessionStore):
        return _keys_in_database(store.model)
    if isinstance(store, file.SessionStore):
        return _keys_of_files(store)
    if is_cache and hasattr(store._cache, "iter_keys"):
        return _keys_in_cache(store)
    if _is_redis_sessions(store) and not _is_sharded():
        return _keys_of_redis_sessions(store)
    raise NotListed(
        f"{conf.migrate_from} does not tell which sessions it has"
        + (f" in the cache {_alias()!r}" if is_cache else "")
        + ": each is taken over when its owner comes"
    )


def count() -> int | None:
    """Return the number of sessions in the old engine, None if it has no quick count.

    Raises SessionStoreUnavailable.
    """
    store = store_of(None)
    if not isinstance(store, db.SessionStore):
        return None
    try:
        found: int = store.model.objects.filter(expire_date__gt=timezone.now()).count()
    except Exception as error:
        raise unavailable(error) from error
    return found


def _keys_in_database(model: Any) -> Iterator[str]:
    last = ""
    while True:
        some = model.objects.filter(session_key__gt=last, expire_date__gt=timezone.now())
        page = list(some.order_by("session_key").values_list("session_key", flat=True)[:1000])
        if not page:
            return
        yield from page
        last = page[-1]


def _keys_of_files(store: Any) -> Iterator[str]:
    with os.scandir(store.storage_path) as entries:
        names = (entry.name for entry in entries if entry.name.startswith(store.file_prefix))
        for name in names:
            if _KEY.fullmatch(key := name.removeprefix(store.file_prefix)):
                yield key


def _keys_in_cache(store: Any) -> Iterator[str]:
    prefix = store.cache_key_prefix
    for name in store._cache.iter_keys(f"{prefix}*"):
        # The cache keys of cached_db begin with the same prefix.
        if _KEY.fullmatch(key := name.removeprefix(prefix)):
            yield key


def _is_sharded() -> bool:
    """Return whether django-redis-sessions has sessions on several servers."""
    return bool(getattr(settings, "SESSION_REDIS", {}).get("POOL"))


def _keys_of_redis_sessions(store: Any) -> Iterator[str]:
    prefix = store.get_real_stored_key("")
    for name in store.server.scan_iter(match=f"{prefix}*", count=1000):
        if _KEY.fullmatch(key := force_str(name).removeprefix(prefix)):
            yield key
