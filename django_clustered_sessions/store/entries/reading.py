"""Find the adapter for an entry of CACHES, and say what would do where there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, Final

from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

from . import django_cache, django_cachex, django_redis, django_valkey
from .entry import BadEntry, Entry

#: An adapter: what LOCATION, OPTIONS and the name of the backend's class say.
_Adapter = Callable[[Any, Mapping[str, Any], str], Entry]

#: Backends by the package that they are in and their own name: modules move inside of a package.
_ADAPTERS: Final[Mapping[tuple[str, str], _Adapter]] = {
    (package, name): module.read
    for package, module in (
        ("django", django_cache),
        ("django_cachex", django_cachex),
        ("django_redis", django_redis),
        ("django_valkey", django_valkey),
    )
    for name in module.BACKENDS
}

#: Where other backends of Django and of django-cachex keep what they are given.
_KEPT_IN: Final = {
    "DatabaseCache": "a table of the database",
    "DummyCache": "nothing at all",
    "FileBasedCache": "files",
    "LocMemCache": "the memory of one process",
    "PyLibMCCache": "memcached",
    "PyMemcacheCache": "memcached",
}


class NoEntry(ImproperlyConfigured):
    """SESSION_CACHE_ALIAS names no entry for Redis or Valkey."""


def named(caches: Mapping[str, Any], alias: str) -> Entry:
    """Return what the entry of that name says.

    Raises NoEntry, BadEntry.
    """
    found: Mapping[str, Any] | None = caches.get(alias)
    try:
        if found is not None and (entry := read(found)) is not None:
            return entry
    except BadEntry as error:
        raise BadEntry(
            f"{error} in the CACHES entry that SESSION_CACHE_ALIAS names, {alias!r}"
        ) from error
    usable = [name for name, one in caches.items() if _adapter(one) is not None]
    if nearest := get_close_matches(alias, usable, n=1, cutoff=0.0):
        advice = f"The nearest entry that would do is {nearest[0]!r}."
    else:
        advice = (
            "Name an entry of django-redis, django-valkey, django-cachex or Django's own "
            f"RedisCache, for example 'BACKEND': '{django_redis.BACKEND}', "
            "'LOCATION': 'redis://HOST:6379/1'."
        )
    what = "has no such entry" if found is None else _what_it_is(found)
    raise NoEntry(f"SESSION_CACHE_ALIAS is {alias!r}, and CACHES {what}. {advice}")


def read(entry: Mapping[str, Any]) -> Entry | None:
    """Return what an entry says, None where it is not for Redis or Valkey.

    Raises BadEntry.
    """
    if (found := _adapter(entry)) is None:
        return None
    adapter, backend = found
    return adapter(entry.get("LOCATION"), entry.get("OPTIONS") or {}, backend)


def _adapter(entry: Mapping[str, Any]) -> tuple[_Adapter, str] | None:
    """Return the adapter, and the name of the backend that it is for, of an entry."""
    backend = entry.get("BACKEND")
    if (place := _place(str(backend))) in _ADAPTERS:
        return _ADAPTERS[place], place[1]
    # A site's own subclass, perhaps.
    for place in _bases(backend):
        if place in _ADAPTERS:
            return _ADAPTERS[place], place[1]
    return None


def _place(dotted: str) -> tuple[str, str]:
    return dotted.partition(".")[0], dotted.rpartition(".")[2]


def _bases(backend: Any) -> list[tuple[str, str]]:
    try:
        found: Any = import_string(backend) if isinstance(backend, str) else backend
    except Exception:
        # Whatever a site's module raises, it is no backend.
        return []
    return [_place(f"{one.__module__}.{one.__name__}") for one in getattr(found, "__mro__", ())]


def _what_it_is(entry: Mapping[str, Any]) -> str:
    backend = entry.get("BACKEND")
    kept_in = next((_KEPT_IN[name] for _, name in _bases(backend) if name in _KEPT_IN), "")
    if kept_in:
        return f"has {backend!r} there, which keeps its values in {kept_in}"
    try:
        import_string(str(backend))
    except ImportError as error:
        return f"has {backend!r} there, which cannot be imported ({error})"
    return f"has {backend!r} there, which is not known to be for Redis or Valkey"
