"""Options that connection pools take from an entry of CACHES; nothing is connected here."""

from __future__ import annotations

import asyncio
import math
import queue
import ssl
import time
from typing import Any

import pytest
import redis
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings
from django_redis.pool import get_connection_factory
from redis import asyncio as aioredis
from redis.cache import CacheConfig

from django_clustered_sessions.checks.settings import check_settings
from django_clustered_sessions.store import connections, greeting
from django_clustered_sessions.store.entries import django_redis
from django_clustered_sessions.store.errors import SHORTEST_S
from django_clustered_sessions.store.pools import AsyncBlockingPool, BlockingPool
from tests.conftest import use_store

URL = "redis://127.0.0.1:1/5"


def pools() -> list[Any]:
    """Return the pool for synchronous use, and that of an event loop."""

    async def apool() -> Any:
        return connections.apool()

    return [connections.pool(), asyncio.run(apool())]


def taken(*names: str) -> list[Any]:
    """Return these options of the connections, which have to be the same in both pools."""
    one, other = ([pool.connection_kwargs.get(name) for name in names] for pool in pools())
    assert one == other
    return one


def kinds(*classes: type) -> bool:
    """Return whether the connections of both pools are of these classes."""
    found = [pool.connection_class for pool in pools()]
    return all(map(issubclass, found, classes))


# Where the store is.


@pytest.mark.parametrize(
    "location",
    [
        URL,
        f"{URL},redis://other:2/2",
        f" {URL} , redis://other:2/2 ",
        [URL, "redis://other:2/2"],
        (URL, "redis://other:2/2"),
    ],
    ids=["one", "several", "spaces", "list", "tuple"],
)
def test_first_location_is_the_primary(settings: Any, location: Any) -> None:
    use_store(settings, location)
    assert taken("host", "port", "db") == ["127.0.0.1", 1, "5"]


@pytest.mark.parametrize(
    ("location", "database"),
    [
        ("redis://127.0.0.1:1", None),
        ("redis://127.0.0.1:1/5", "5"),
        ("redis://127.0.0.1:1?db=6", "6"),
        ("unix:///run/store.sock", None),
        ("unix:///run/store.sock?db=7", "7"),
    ],
)
def test_database_is_that_of_the_url(settings: Any, location: str, database: str | None) -> None:
    use_store(settings, location)
    assert taken("db") == [database]


def test_unix_socket_is_connected_to(settings: Any) -> None:
    use_store(settings, "unix:///run/store.sock")
    assert taken("path", "host") == ["/run/store.sock", None]
    assert kinds(redis.UnixDomainSocketConnection, aioredis.UnixDomainSocketConnection)


@pytest.mark.parametrize(
    "made", [greeting.Connection, greeting.SSLConnection, greeting.UnixConnection]
)
def test_each_step_of_connecting_has_what_is_left_of_the_time(made: Any) -> None:
    """As for each address of a name, and for the handshake of TLS."""
    connection = made(socket_connect_timeout=4.0, socket_timeout=3.0)
    limits = "socket_connect_timeout", "socket_timeout"
    connection.greeted_by_s = time.monotonic() - 1.0
    assert [getattr(connection, limit) for limit in limits] == [SHORTEST_S, SHORTEST_S]
    connection.greeted_by_s = time.monotonic() + 2.0
    assert all(SHORTEST_S <= getattr(connection, limit) <= 2.0 for limit in limits)
    connection.greeted_by_s = math.inf
    assert [getattr(connection, limit) for limit in limits] == [4.0, 3.0]


# Who asks.


@pytest.mark.parametrize(
    ("location", "options", "expected"),
    [
        ("redis://:se%20cret%2F1@db:1/1", {}, [None, "se cret/1"]),
        ("redis://db:1/1", {"PASSWORD": "se cret/1"}, [None, "se cret/1"]),
        ("redis://app:pa%3Ass@db:1/1", {}, ["app", "pa:ss"]),
        ("redis://db:1/1", {"USERNAME": "app", "PASSWORD": "pa:ss"}, ["app", "pa:ss"]),
        (
            "redis://db:1/1",
            {"CONNECTION_POOL_KWARGS": {"username": "app", "password": "pa:ss"}},
            ["app", "pa:ss"],
        ),
        # What is said more narrowly counts.
        (
            "redis://app:pa%3Ass@db:1/1",
            {"USERNAME": "x", "CONNECTION_POOL_KWARGS": {"password": "y"}},
            ["app", "pa:ss"],
        ),
        (
            "redis://db:1/1",
            {"PASSWORD": "x", "CONNECTION_POOL_KWARGS": {"password": "y"}},
            [None, "y"],
        ),
    ],
    ids=[
        "password in the URL",
        "password in OPTIONS",
        "user in the URL",
        "user in OPTIONS",
        "user of the pool",
        "URL wins",
        "pool wins over OPTIONS",
    ],
)
def test_credentials_are_found_wherever_they_are(
    settings: Any, location: str, options: dict[str, Any], expected: list[str | None]
) -> None:
    use_store(settings, location, **options)
    assert taken("username", "password") == expected


def test_tls_takes_its_certificates_from_the_pool_options(settings: Any) -> None:
    given = {"ssl_ca_certs": "ca.crt", "ssl_certfile": "me.crt", "ssl_keyfile": "me.key"}
    use_store(settings, "rediss://db:1/3", CONNECTION_POOL_KWARGS=given)
    assert kinds(redis.SSLConnection, aioredis.SSLConnection)
    assert taken(*given) == list(given.values())


# What a cache of the same entry takes.


SENTINEL_OPTIONS: dict[str, Any] = {
    "CONNECTION_FACTORY": django_redis.SENTINEL,
    "SENTINELS": [("127.0.0.1", 1)],
}
BLOCKING = {"CONNECTION_POOL_CLASS": "redis.BlockingConnectionPool"}
TLS_URL = URL.replace("redis", "rediss")


def of_pool(**options: Any) -> dict[str, Any]:
    return {"CONNECTION_POOL_KWARGS": options}


#: A location and OPTIONS that a cache takes.
TAKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "no verification": (TLS_URL, of_pool(ssl_cert_reqs=None)),
    "no verification, by the URL": (f"{TLS_URL}?ssl_cert_reqs=none", {}),
    "host name unchecked": (f"{TLS_URL}?ssl_check_hostname=no", {}),
    "no OCSP": (TLS_URL, of_pool(ssl_validate_ocsp=False, ssl_ocsp_context=None)),
    "no library's name": (URL, of_pool(lib_name=None, lib_version=None)),
    "nothing said": (
        URL,
        of_pool(username=None, client_name=None, db=None, socket_timeout=None, encoding="latin-1"),
    ),
    "any number of connections": (URL, of_pool(max_connections=None)),
    "a queue": (URL, BLOCKING | of_pool(queue_class=queue.Queue)),
    "what redis-py caches": (URL, of_pool(protocol=3, cache_config=CacheConfig())),
    "a packer": (URL, of_pool(command_packer=None)),
    "Sentinel": ("redis://main/1", SENTINEL_OPTIONS),
    "Sentinel with TLS": (
        "redis://main/1",
        SENTINEL_OPTIONS | of_pool(ssl=True, ssl_cert_reqs=None, check_connection=True),
    ),
    "Sentinel's own options": (
        "redis://main/1?is_master=1",
        SENTINEL_OPTIONS | {"SENTINEL_KWARGS": {"ssl": True, "ssl_cert_reqs": None}},
    ),
    "no options of Sentinel": ("redis://main/1", SENTINEL_OPTIONS | {"SENTINEL_KWARGS": None}),
}
# Before, redis-py filled such a pool with 2**31 places first.
if int(redis.__version__.split(".")[0]) >= 8:
    TAKEN["any number, waited for"] = (
        URL,
        BLOCKING | of_pool(max_connections=None, timeout=None),
    )

#: A location and OPTIONS that no cache takes, and which option it is.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "TLS by an option": (URL, of_pool(ssl=True), "'ssl'"),
    "TLS by an option, waited for": (URL, BLOCKING | of_pool(ssl=True), "'ssl'"),
    "verification without TLS": (f"{URL}?ssl_cert_reqs=none", {}, "'ssl_cert_reqs'"),
    "a word that is no verification": (f"{TLS_URL}?ssl_cert_reqs=never", {}, "never"),
    "typing error": (URL, of_pool(sokcet_keepalive=True), "'sokcet_keepalive'"),
    "host of a socket": ("unix:///run/store.sock", of_pool(host="db"), "'host'"),
    "certificate of a socket": ("unix:///s.sock", of_pool(ssl_ca_certs="ca"), "'ssl_ca_certs'"),
    "no number": (URL, of_pool(max_connections="ten"), "max_connections"),
    "Sentinel's typing error": ("redis://main/1", SENTINEL_OPTIONS | of_pool(sll=True), "'sll'"),
    "typing error for Sentinels": (
        "redis://main/1",
        SENTINEL_OPTIONS | {"SENTINEL_KWARGS": {"sll": True}},
        "'sll'",
    ),
}


def cache_connection(location: str, options: dict[str, Any]) -> Any:
    """Return a connection of django-redis' cache of such an entry."""
    factory = get_connection_factory(dict(options))
    pool = factory.get_connection_pool(factory.make_connection_params(location))
    return pool.make_connection()


@pytest.mark.filterwarnings("ignore:.*lib_name:DeprecationWarning")
@pytest.mark.parametrize(("location", "options"), TAKEN.values(), ids=TAKEN)
def test_what_a_cache_takes_sessions_take(
    settings: Any, location: str, options: dict[str, Any]
) -> None:
    assert cache_connection(location, options)
    use_store(settings, location, **options)
    for pool in pools():
        assert pool.make_connection()
    assert check_settings() == []


@pytest.mark.parametrize(("location", "options", "name"), REFUSED.values(), ids=REFUSED)
def test_what_no_cache_takes_is_named(
    settings: Any, location: str, options: dict[str, Any], name: str
) -> None:
    with pytest.raises((TypeError, ValueError, redis.RedisError)):
        cache_connection(location, options)
    use_store(settings, location, PASSWORD="secret/x", **options)
    refuses(name)
    (message,) = check_settings()
    assert message.id == "clustered_sessions.E001"
    assert name in message.msg
    assert message.hint
    assert "secret" not in str(message)


def test_ocsp_is_refused_for_both_worlds(settings: Any) -> None:
    use_store(settings, TLS_URL, **of_pool(ssl_validate_ocsp=True))
    (message,) = check_settings()
    assert message.id == "clustered_sessions.E002"
    assert "ssl_validate_ocsp" in message.msg


@pytest.mark.parametrize("location", [URL, "rediss://db:1/3"])
def test_cluster_has_its_options_tried_too(settings: Any, location: str) -> None:
    use_store(settings, location, CONNECTION_FACTORY=django_redis.CLUSTER, **of_pool(ssl=True))
    refuses("'ssl'")
    (message,) = check_settings()
    assert "'ssl'" in message.msg


def test_password_is_that_of_the_cache(settings: Any) -> None:
    options = {"PASSWORD": "x"} | of_pool(password=None)
    use_store(settings, URL, **options)
    assert taken("password") == [cache_connection(URL, options).password] == ["x"]


def test_none_is_told_to_connections(settings: Any) -> None:
    use_store(settings, TLS_URL, **of_pool(ssl_cert_reqs=None))
    one, other = (pool.make_connection() for pool in pools())
    assert one.cert_reqs == other.ssl_context.cert_reqs == ssl.CERT_NONE
    use_store(settings, "redis://main/1", **SENTINEL_OPTIONS, **of_pool(ssl=True))
    for pool in pools():
        assert issubclass(pool.connection_class, (redis.SSLConnection, aioredis.SSLConnection))
    use_store(settings, "redis://main/1", **SENTINEL_OPTIONS, **of_pool(ssl=False))
    for pool in pools():
        assert not issubclass(pool.connection_class, (redis.SSLConnection, aioredis.SSLConnection))


# Pools.


@pytest.mark.parametrize(
    "name", ["redis.BlockingConnectionPool", "redis.connection.BlockingConnectionPool"]
)
def test_blocking_pool_has_a_twin_of_the_same_size(settings: Any, name: str) -> None:
    use_store(
        settings,
        URL,
        CONNECTION_POOL_CLASS=name,
        CONNECTION_POOL_KWARGS={"max_connections": 2, "timeout": None},
    )
    one, other = pools()
    assert type(one) is BlockingPool
    assert type(other) is AsyncBlockingPool
    assert [pool.max_connections for pool in (one, other)] == [2, 2]


@pytest.mark.parametrize("name", [None, "redis.ConnectionPool", "redis.connection.ConnectionPool"])
def test_pool_has_no_bound_of_its_own(settings: Any, name: str | None) -> None:
    use_store(settings, URL, **({"CONNECTION_POOL_CLASS": name} if name else {}))
    assert min(pool.max_connections for pool in pools()) > 1_000_000
    use_store(settings, URL, CONNECTION_POOL_KWARGS={"max_connections": 3})
    assert [pool.max_connections for pool in pools()] == [3, 3]


def test_time_and_repeats_are_not_the_entrys_to_decide(settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 1.5
    impatient = {
        "socket_timeout": 300,
        "socket_connect_timeout": 300,
        "retry_on_timeout": True,
        "health_check_interval": 1,
        "decode_responses": True,
        "protocol": 3,
        "client_name": "sessions-of-shop",
    }
    use_store(
        settings,
        URL,
        SOCKET_TIMEOUT=300,
        SOCKET_CONNECT_TIMEOUT=300,
        CONNECTION_POOL_KWARGS=impatient,
    )
    assert taken("socket_connect_timeout", "protocol", "client_name") == [
        *(1.5, 2, "sessions-of-shop")
    ]
    assert taken("retry_on_timeout", "health_check_interval", "decode_responses") == [None] * 3
    sync, other = (pool.connection_kwargs for pool in pools())
    # The asynchronous driver has a limit for each trip.
    assert (sync["socket_timeout"], other["socket_timeout"]) == (1.5, None)
    assert sync["retry"].get_retries() == other["retry"].get_retries() == 0


# What cannot be.

WRONG: dict[str, Any] = {
    "another backend": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"},
    "no location": {"BACKEND": django_redis.BACKEND},
    "no URL": {"BACKEND": django_redis.BACKEND, "LOCATION": "127.0.0.1:6379"},
    "pool class": {
        "BACKEND": django_redis.BACKEND,
        "LOCATION": "redis://127.0.0.1:1/1",
        "OPTIONS": {"CONNECTION_POOL_CLASS": "shop.pools.Pool"},
    },
    "pool of Sentinel without its factory": {
        "BACKEND": django_redis.BACKEND,
        "LOCATION": "redis://127.0.0.1:1/1",
        "OPTIONS": {"CONNECTION_POOL_CLASS": "redis.sentinel.SentinelConnectionPool"},
    },
    "Sentinel without its pool": {
        "BACKEND": django_redis.BACKEND,
        "LOCATION": "redis://primary/1",
        "OPTIONS": {
            "CONNECTION_FACTORY": django_redis.SENTINEL,
            "CONNECTION_POOL_CLASS": "redis.ConnectionPool",
            "SENTINELS": [("127.0.0.1", 1)],
        },
    },
    "factory": {
        "BACKEND": django_redis.BACKEND,
        "LOCATION": "redis://127.0.0.1:1/1",
        "OPTIONS": {"CONNECTION_FACTORY": "shop.pools.Factory"},
    },
}


@pytest.mark.parametrize("entry", WRONG.values(), ids=WRONG.keys())
def test_entry_that_cannot_be_used_is_refused(settings: Any, entry: dict[str, Any]) -> None:
    settings.CACHES = settings.CACHES | {"sessions": entry}
    refuses("CACHES")


def refuses(why: str) -> None:
    """Hold that neither pool is to be had, for a reason."""

    async def apool() -> Any:
        return connections.apool()

    for get in (connections.pool, lambda: asyncio.run(apool())):
        with pytest.raises(ImproperlyConfigured, match=why):
            get()


def test_unknown_alias_is_improperly_configured(settings: Any) -> None:
    settings.SESSION_CACHE_ALIAS = "shop"
    refuses("'shop'")


def test_factory_for_all_caches_counts(settings: Any) -> None:
    settings.DJANGO_REDIS_CONNECTION_FACTORY = "shop.pools.Factory"
    refuses(r"shop\.pools\.Factory")


# Settings that change.


def test_changed_settings_make_new_pools(settings: Any) -> None:
    use_store(settings, URL)
    found = []
    for port in (2, 3):
        location = f"redis://127.0.0.1:{port}/1"
        with override_settings(
            CACHES={"other": {"BACKEND": django_redis.BACKEND, "LOCATION": location}},
            SESSION_CACHE_ALIAS="other",
        ):
            found += taken("port")
    assert [*found, *taken("port")] == [2, 3, 1]
