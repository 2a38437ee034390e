"""The Django site that is measured, and how it is pointed at another store or engine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Final
from urllib.parse import urlsplit

import django
from django.conf import settings
from django.core.signals import setting_changed

PICKLE, JSON, OURS = "pickle", "json", "sessions"
#: Cache backends of others, by the entry of CACHES that is given to each that is installed.
BACKENDS: Final = {
    "RedisCache": "django.core.cache.backends.redis.RedisCache",
    "django-cachex": "django_cachex.cache.RedisCache",
    "django-vcache": "django_vcache.backend.ValkeyCache",
}
#: As many connections as requests at once: redis-py refuses the 101st otherwise.
CONNECTIONS: Final = "?max_connections=10000"
POSTGRES: Final = os.environ.get("BENCHMARK_POSTGRES_URL", "")


def configure(location: str, database: str) -> None:
    """Set Django up with the store at ``location`` and an SQLite file at ``database``.

    The environment variable BENCHMARK_POSTGRES_URL names a PostgreSQL to use instead of SQLite,
    as ``postgres://USER:PASSWORD@HOST:PORT/DATABASE``.
    """
    settings.configure(
        SECRET_KEY="for a benchmark",
        ALLOWED_HOSTS=["*"],
        USE_TZ=True,
        ROOT_URLCONF="benchmarks.views",
        INSTALLED_APPS=[
            "django.contrib.auth",
            "django.contrib.contenttypes",
            "django.contrib.sessions",
            "django_clustered_sessions",
        ],
        DATABASES={"default": _postgres() if POSTGRES else _sqlite(database)},
        CACHES=_caches(location),
        SESSION_CACHE_ALIAS=OURS,
        SESSION_ENGINE="django_clustered_sessions.backend",
        SESSION_REDIS={"url": f"{location}{CONNECTIONS}", "socket_timeout": 10.0},
        LOGGING={"version": 1, "disable_existing_loggers": True},
    )
    django.setup()
    from django.contrib.auth import user_logged_in

    # A login is to be measured, not the statement that notes its time.
    user_logged_in.disconnect(dispatch_uid="update_last_login")


def create_tables() -> None:
    """Make the tables of the engines that use a database."""
    from django.core.management import call_command

    call_command("migrate", verbosity=0)


def database_name() -> str:
    """Return what the engines that use a database run on."""
    return "PostgreSQL" if POSTGRES else "SQLite"


@contextmanager
def store_at(location: str) -> Iterator[None]:
    """Let every engine use the store at another address for a while."""
    from django.test import override_settings

    with override_settings(CACHES=_caches(location)):
        _point_redis_sessions_at(f"{location}{CONNECTIONS}")
        yield
    _point_redis_sessions_at(settings.SESSION_REDIS["url"])


def change(values: Mapping[str, Any]) -> None:
    """Change settings between two blocks of requests, and leave every connection open.

    So nobody hears that another alias of the same store is used now: on such a signal connections
    are closed.
    """
    for name, value in values.items():
        if getattr(settings, name, None) != value:
            setattr(settings, name, value)
            if name != "SESSION_CACHE_ALIAS":
                setting_changed.send(sender=None, setting=name, value=value, enter=True)


def _caches(location: str) -> dict[str, Any]:
    redis = {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": f"{location}{CONNECTIONS}"}
    as_json = {"SERIALIZER": "django_redis.serializers.json.JSONSerializer"}
    return {
        "default": redis,
        PICKLE: redis,
        JSON: redis | {"OPTIONS": as_json},
        OURS: redis,
        **{
            name: {"BACKEND": backend, "LOCATION": location}
            for name, backend in BACKENDS.items()
            if is_installed(backend)
        },
    }


def is_installed(backend: str) -> bool:
    """Return whether the package of a cache backend is installed."""
    return find_spec(backend.partition(".")[0]) is not None


def _sqlite(database: str) -> dict[str, Any]:
    return {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": database,
        "OPTIONS": {"timeout": 30, "transaction_mode": "IMMEDIATE"},
    }


def _postgres() -> dict[str, Any]:
    url = urlsplit(POSTGRES)
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": url.path.lstrip("/"),
        "USER": url.username or "",
        "PASSWORD": url.password or "",
        "HOST": url.hostname or "",
        "PORT": url.port or "",
    }


def _point_redis_sessions_at(location: str) -> None:
    """Do by hand what django-redis-sessions does once, at its import."""
    if find_spec("redis_sessions") is None:
        return
    from redis_sessions import session
    from redis_sessions import settings as its_settings

    its_settings.SESSION_REDIS_URL = location
    session.RedisServer._RedisServer__redis.clear()
