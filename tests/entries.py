"""Entries of CACHES for each package that sessions know, and the clients of their caches."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any, Final

import pytest
from django.core.cache import caches
from django.core.cache.backends.redis import RedisCache

from tests.conftest import require

DJANGO_REDIS: Final = "django_redis.cache.RedisCache"
DJANGO: Final = "django.core.cache.backends.redis.RedisCache"
VALKEY: Final = "django_valkey.cache.ValkeyCache"
VALKEY_CLUSTER: Final = "django_valkey.cluster_cache.cache.ClusterValkeyCache"
CACHEX: Final = "django_cachex.cache."
OWN: Final = "tests.entries.OwnCache"


class OwnCache(RedisCache):
    """A site's own backend."""


def use_entry(settings: Any, backend: str, location: Any, **options: Any) -> None:
    """Point the sessions at an entry; skip the test where its package is not to be had."""
    package = backend.partition(".")[0]
    if package == "django_cachex" and sys.version_info < (3, 12):
        pytest.skip("django-cachex needs Python 3.12, so the test extra has none")
    require(package if find_spec(package) else None, package)
    entry = {"BACKEND": backend, "LOCATION": location, "OPTIONS": options}
    settings.CACHES = settings.CACHES | {"sessions": entry}
    settings.SESSION_CACHE_ALIAS = "sessions"


def cache_client() -> Any:
    """Return the client that the cache of the sessions' entry writes with; it connects later."""
    cache: Any = caches["sessions"]
    if hasattr(cache, "get_client"):
        return cache.get_client(write=True)
    if hasattr(cache, "client"):
        # Of the whole process, by the URL alone.
        cache.client.connection_factory._pools.clear()
        return cache.client.get_client(write=True)
    # Django's, and django-cachex before 0.4.
    return cache._cache.get_client(write=True)
