"""An entry of CACHES is read as the package reads it that it is for; nothing is connected here."""

from __future__ import annotations

import asyncio
import sys
from traceback import format_exception
from typing import Any

import pytest
import redis
import valkey
from django.core.exceptions import ImproperlyConfigured

from django_clustered_sessions.checks.settings import check_settings
from django_clustered_sessions.store import connections
from django_clustered_sessions.store.cluster import NodeAddress
from django_clustered_sessions.store.entries import django_redis
from django_clustered_sessions.store.entries.entry import Kind, Pooling
from tests.entries import (
    CACHEX,
    DJANGO,
    DJANGO_REDIS,
    OWN,
    VALKEY,
    VALKEY_CLUSTER,
    cache_client,
    use_entry,
)

URL = "redis://127.0.0.1:1/5"
TLS_URL = "rediss://127.0.0.1:1/5"
OTHER = "redis://other:2/2"
USER = {"username": "app", "password": "pa:ss"}
CERTIFICATES = {"ssl_ca_certs": "ca.crt", "ssl_certfile": "me.crt", "ssl_keyfile": "me.key"}
SENTINELS = [("10.0.0.1", 26379), ("10.0.0.2", 26379)]


def of_pool(**options: Any) -> dict[str, Any]:
    return {"CONNECTION_POOL_KWARGS": options}


#: A backend, a location and OPTIONS that its cache takes: one server.
SERVERS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "django-redis": (DJANGO_REDIS, f"{URL},{OTHER}", {"USERNAME": "app", "PASSWORD": "pa:ss"}),
    "django-redis, TLS": (DJANGO_REDIS, TLS_URL, of_pool(**CERTIFICATES)),
    "Django": (DJANGO, URL, {}),
    "Django, list": (DJANGO, [URL, OTHER], {}),
    "Django, commas": (DJANGO, f"{URL},{OTHER}", {}),
    "Django, semicolons": (DJANGO, f"{URL};{OTHER}", {}),
    "Django, options": (DJANGO, "redis://127.0.0.1:1", {"db": 7, **USER, "client_name": "shop"}),
    "Django, URL wins": (DJANGO, "redis://ada:x@127.0.0.1:1/5", {"db": 7, **USER}),
    "Django, TLS": (DJANGO, TLS_URL, {**CERTIFICATES, "ssl_cert_reqs": None}),
    "Django, socket": (DJANGO, "unix:///run/store.sock?db=7", {}),
    "Django's subclass": (OWN, f"{URL};{OTHER}", {"db": 7}),
    "django-valkey": (VALKEY, "valkey://127.0.0.1:1/5", {"PASSWORD": "pa:ss"}),
    "django-valkey, list": (VALKEY, [URL, OTHER], of_pool(**USER, db=7)),
    "django-valkey, commas": (VALKEY, f"{URL},{OTHER}", of_pool(password=None) | {"PASSWORD": "x"}),
    "django-valkey, user": (VALKEY, URL, {"USERNAME": "not read", "PASSWORD": "x"}),
    "django-valkey, TLS": (VALKEY, "valkeys://app:x@127.0.0.1:1/5", of_pool(**CERTIFICATES)),
    "django-valkey, socket": (VALKEY, "unix:///run/store.sock?db=7", {}),
    "django-cachex": (CACHEX + "RedisCache", f"{URL};{OTHER}", {**USER}),
    "django-cachex, list": (CACHEX + "RedisCache", [URL, OTHER], {"db": 7, "max_connections": 3}),
    "django-cachex, Valkey": (CACHEX + "ValkeyCache", "valkey://app:x@127.0.0.1:1/5", {}),
    "django-cachex, TLS": (CACHEX + "ValkeyCache", "valkeys://127.0.0.1:1/5", {**CERTIFICATES}),
    "django-cachex, its own options": (
        CACHEX + "RedisCache",
        URL,
        {
            "serializer": "django_cachex.serializers.pickle.PickleSerializer",
            "compressor": "django_cachex.compressors.zlib.ZlibCompressor",
        },
    ),
}

#: What a connection leads to, and by whom.
COMPARED = (
    *("host", "port", "path", "db", "username", "password", "client_name"),
    *("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs"),
)


def pools() -> list[Any]:
    """Return the pool for synchronous use, and that of an event loop."""

    async def apool() -> Any:
        return connections.apool()

    return [connections.pool(), asyncio.run(apool())]


@pytest.mark.parametrize(("backend", "location", "options"), SERVERS.values(), ids=SERVERS)
def test_sessions_connect_to_what_the_cache_connects_to(
    settings: Any, backend: str, location: Any, options: dict[str, Any]
) -> None:
    use_entry(settings, backend, location, **options)
    cache = cache_client().connection_pool
    of_cache = [str(cache.connection_kwargs.get(name) or "") for name in COMPARED]
    tls = (redis.SSLConnection, valkey.SSLConnection)
    for pool in pools():
        assert [str(pool.connection_kwargs.get(name) or "") for name in COMPARED] == of_cache
        is_tls = "SSL" in pool.connection_class.__name__
        assert is_tls == issubclass(cache.connection_class, tls) == connections.entry().is_tls
    assert check_settings() == []


#: A backend and OPTIONS that name a pool.
POOLS: dict[str, tuple[str, dict[str, Any], Pooling]] = {
    "Django, name": (DJANGO, {"pool_class": "redis.BlockingConnectionPool"}, Pooling.BLOCKING),
    "Django, class": (DJANGO, {"pool_class": redis.BlockingConnectionPool}, Pooling.BLOCKING),
    "Django, plain": (DJANGO, {"pool_class": redis.ConnectionPool}, Pooling.REFUSING),
    "django-valkey": (
        VALKEY,
        {"CONNECTION_POOL_CLASS": "valkey.BlockingConnectionPool"},
        Pooling.BLOCKING,
    ),
    "django-valkey, plain": (
        VALKEY,
        {"CONNECTION_POOL_CLASS": "valkey.connection.ConnectionPool"},
        Pooling.REFUSING,
    ),
    "django-cachex": (
        CACHEX + "ValkeyCache",
        {"pool_class": "valkey.connection.BlockingConnectionPool"},
        Pooling.BLOCKING,
    ),
    "django-cachex, class": (
        CACHEX + "RedisCache",
        {"pool_class": redis.BlockingConnectionPool},
        Pooling.BLOCKING,
    ),
}


@pytest.mark.parametrize(("backend", "options", "pooling"), POOLS.values(), ids=POOLS)
def test_pool_class_and_its_size_are_taken(
    settings: Any, backend: str, options: dict[str, Any], pooling: Pooling
) -> None:
    size = of_pool(max_connections=3) if backend == VALKEY else {"max_connections": 3}
    use_entry(settings, backend, URL, **options, **size)
    assert isinstance(cache_client().connection_pool.max_connections, int)
    assert connections.entry().pooling is pooling
    assert [pool.max_connections for pool in pools()] == [3, 3]
    assert check_settings() == []


SENTINEL_CLIENT = "django_valkey.client.SentinelClient"
SENTINEL_FACTORY = "django_valkey.pool.SentinelConnectionFactory"

#: A backend, a location and OPTIONS that name Sentinels.
WATCHED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "django-redis": (
        DJANGO_REDIS,
        "redis://main/5",
        {"CONNECTION_FACTORY": django_redis.SENTINEL, "SENTINELS": SENTINELS},
    ),
    "django-valkey, client": (
        VALKEY,
        "valkey://main/5",
        {"CLIENT_CLASS": SENTINEL_CLIENT, "SENTINELS": SENTINELS},
    ),
    "django-valkey, factory": (
        VALKEY,
        "valkey://main/5?is_master=1",
        {"CONNECTION_FACTORY": SENTINEL_FACTORY, "SENTINELS": SENTINELS},
    ),
    "django-cachex": (CACHEX + "RedisSentinelCache", "redis://main/5", {"sentinels": SENTINELS}),
    "django-cachex, Valkey": (
        CACHEX + "ValkeySentinelCache",
        "valkey://main/5",
        {"sentinels": SENTINELS, "sentinel_kwargs": {}},
    ),
}


@pytest.mark.parametrize(("backend", "location", "options"), WATCHED.values(), ids=WATCHED)
def test_sentinels_are_those_that_the_cache_asks(
    settings: Any, backend: str, location: str, options: dict[str, Any]
) -> None:
    use_entry(settings, backend, location, **options)
    cache = cache_client().connection_pool
    asked = [
        (
            one.connection_pool.connection_kwargs["host"],
            one.connection_pool.connection_kwargs["port"],
        )
        for one in cache.sentinel_manager.sentinels
    ]
    found = connections.entry()
    assert (found.kind, found.service, list(found.sentinels)) == (
        *(Kind.SENTINEL, cache.service_name, asked),
    )
    assert [pool.connection_kwargs["db"] for pool in pools()] == ["5", "5"]
    assert check_settings() == []


CLUSTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "django-redis": (DJANGO_REDIS, {"CONNECTION_FACTORY": django_redis.CLUSTER}),
    "django-valkey": (VALKEY_CLUSTER, {"BASE_CLIENT_KWARGS": {**USER}}),
    "django-cachex": (CACHEX + "RedisClusterCache", {**USER, "require_full_coverage": True}),
    "django-cachex, Valkey": (CACHEX + "ValkeyClusterCache", {"read_from_replicas": True, **USER}),
}


@pytest.mark.parametrize(("backend", "options"), CLUSTERS.values(), ids=CLUSTERS)
def test_nodes_of_a_cluster_are_those_of_the_location(
    settings: Any, backend: str, options: dict[str, Any]
) -> None:
    use_entry(settings, backend, ["redis://a:1", "redis://b:2"], **options)
    found = connections.entry()
    assert (found.kind, found.nodes) == (Kind.CLUSTER, (NodeAddress("a", 1), NodeAddress("b", 2)))
    if backend != DJANGO_REDIS:
        assert found.keywords["username"] == "app"
    assert check_settings() == []


@pytest.mark.parametrize(
    "named", [DJANGO_REDIS, VALKEY, CACHEX + "ValkeyCache", CACHEX + "RedisCache"]
)
def test_entry_is_read_without_its_package(
    settings: Any, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    use_entry(settings, named, URL)
    monkeypatch.setitem(sys.modules, named.partition(".")[0], None)
    assert [pool.connection_kwargs["port"] for pool in pools()] == [1, 1]


NAMED = ("host", "port", "db", "username", "password")

# What the newest django-cachex has besides; it needs Python 3.14.


@pytest.mark.parametrize(
    ("location", "options", "expected"),
    [
        ("redis://ada:x@db:1/5", {}, ["db", 1, "5", "ada", "x", False]),
        ("valkey://db:1/5", {"db": 7, "use_tls": True}, ["db", 1, "7", None, None, True]),
        ("valkeys://ada:x@db:1", {**USER, "ssl": False}, ["db", 1, None, "app", "pa:ss", False]),
        ("valkeys://db:1/0", {"request_timeout": 9}, ["db", 1, 0, None, None, True]),
    ],
)
def test_glide_has_its_own_words(
    settings: Any, location: str, options: dict[str, Any], expected: list[Any]
) -> None:
    use_entry(settings, CACHEX + "ValkeyGlideCache", location, **options)
    for pool in pools():
        found = [pool.connection_kwargs.get(name) for name in COMPARED if name in NAMED]
        assert [*found, "SSL" in pool.connection_class.__name__] == expected
    assert check_settings() == []


def test_cachex_options_win_over_its_url(settings: Any) -> None:
    use_entry(settings, CACHEX + "ValkeyCache", "redis://ada:x@db:1/5", **USER, tracking=False)
    for pool in pools():
        assert [pool.connection_kwargs[name] for name in USER] == ["app", "pa:ss"]


def test_cachex_keeps_the_case_of_a_primarys_name(settings: Any) -> None:
    use_entry(settings, CACHEX + "ValkeySentinelCache", "redis://a:b@Main/5", sentinels=SENTINELS)
    assert connections.entry().service == "Main"


# What cannot be.

REFUSED: dict[str, tuple[str, Any, dict[str, Any], str, str]] = {
    "typing error, Django": (DJANGO, URL, {"sokcet_keepalive": True}, "E001", "'sokcet_keepalive'"),
    "Django's own option": (DJANGO, URL, {"MAX_ENTRIES": 9}, "E001", "'MAX_ENTRIES'"),
    "typing error, django-valkey": (VALKEY, URL, of_pool(sokcet=1), "E001", "'sokcet'"),
    "typing error, django-cachex": (CACHEX + "RedisCache", URL, {"sokcet": 1}, "E001", "'sokcet'"),
    "no scheme": (DJANGO, "127.0.0.1:1", {}, "E001", "LOCATION begins with none of redis://"),
    "no location": (VALKEY, "", {}, "E001", "LOCATION begins with none of redis://"),
    "no Sentinels": (CACHEX + "RedisSentinelCache", URL, {}, "E001", "OPTIONS has no sentinels"),
    "Sentinels as text": (
        CACHEX + "RedisSentinelCache",
        "redis://main/1",
        {"sentinels": ["10.0.0.1:26379"]},
        "E001",
        "sentinels is no list of (host, port)",
    ),
    "no service": (
        VALKEY,
        "redis:///1",
        {"CLIENT_CLASS": SENTINEL_CLIENT, "SENTINELS": SENTINELS},
        "E001",
        "does not name the primary",
    ),
    "node by a socket": (VALKEY_CLUSTER, "unix:///s", {}, "E001", "a node without redis://"),
    "bad port": (DJANGO, "redis://:secret/x@127.0.0.1/1", {}, "E001", "LOCATION"),
    "bad URL of Sentinels": (
        CACHEX + "RedisSentinelCache",
        "redis://:secret[@primary/1",
        {"sentinels": SENTINELS},
        "E001",
        "LOCATION is no good URL",
    ),
    "bad port of a node": (
        VALKEY_CLUSTER,
        "redis://a:1,redis://:secret/x@b:2",
        {},
        "E001",
        "a node without redis://",
    ),
    "pool, Django": (DJANGO, URL, {"pool_class": "site.Pool"}, "E002", "pool_class"),
    "pool of another kind": (
        DJANGO,
        URL,
        {"pool_class": "redis.sentinel.SentinelConnectionPool"},
        "E002",
        "SentinelConnectionPool",
    ),
    "connection, Django": (DJANGO, URL, {"connection_class": "site.C"}, "E002", "connection_class"),
    "factory": (VALKEY, URL, {"CONNECTION_FACTORY": "site.Factory"}, "E002", "site.Factory"),
}


@pytest.mark.parametrize(
    ("backend", "location", "options", "id_", "why"), REFUSED.values(), ids=REFUSED
)
def test_what_cannot_be_is_named_by_check_and_by_use(
    settings: Any, backend: str, location: Any, options: dict[str, Any], id_: str, why: str
) -> None:
    use_entry(settings, backend, location, **options)
    (message,) = check_settings()
    assert message.id == f"clustered_sessions.{id_}"
    assert why in message.msg
    assert message.hint
    assert "secret" not in str(message)
    with pytest.raises(ImproperlyConfigured, match="CACHES") as caught:
        pools()
    assert why in str(caught.value)
    assert "secret" not in "".join(format_exception(caught.value))


#: Classes that sessions do without.
UNUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "Django's parser": (DJANGO, {"parser_class": "site.Parser"}),
    "django-valkey's client": (VALKEY, {"BASE_CLIENT_CLASS": "site.Client"}),
    "django-valkey's shards": (VALKEY, {"CLIENT_CLASS": "django_valkey.client.ShardClient"}),
    "django-cachex' parser": (CACHEX + "RedisCache", {"parser_class": "site.Parser"}),
}


@pytest.mark.parametrize("package", ["django_redis", "django_valkey"])
def test_client_that_shards_is_told_what_to_do(settings: Any, package: str) -> None:
    """It is one of the entry's own package, so to name one of those is no advice."""
    backend = {"django_redis": django_redis.BACKEND, "django_valkey": VALKEY}[package]
    use_entry(settings, backend, URL, CLIENT_CLASS=f"{package}.client.ShardClient")
    (message,) = check_settings()
    assert "servers that know nothing of each other" in message.msg
    assert "cluster.md" in str(message.hint) and "one of the package" not in str(message.hint)


@pytest.mark.parametrize(("backend", "options"), UNUSED.values(), ids=UNUSED)
def test_class_that_sessions_do_without_is_checked(
    settings: Any, backend: str, options: dict[str, Any]
) -> None:
    use_entry(settings, backend, URL, **options)
    (message,) = check_settings()
    assert message.id == "clustered_sessions.E002"
    assert next(iter(options)) in message.msg
    assert connections.pool()


OTHERS: dict[str, tuple[str, str]] = {
    "locmem": ("django.core.cache.backends.locmem.LocMemCache", "the memory of one process"),
    "memcached": ("django.core.cache.backends.memcached.PyMemcacheCache", "memcached"),
    "db": ("django.core.cache.backends.db.DatabaseCache", "a table of the database"),
    "file": ("django.core.cache.backends.filebased.FileBasedCache", "files"),
    "not installed": ("no.such.Cache", "which cannot be imported (No module named 'no')"),
    "no cache": ("json.JSONDecoder", "not known to be for Redis or Valkey"),
}


@pytest.mark.parametrize(("backend", "what"), OTHERS.values(), ids=OTHERS)
def test_another_backend_is_told_what_it_is(settings: Any, backend: str, what: str) -> None:
    settings.CACHES = {"default": {"BACKEND": backend, "LOCATION": "x"}}
    settings.SESSION_CACHE_ALIAS = "default"
    (message,) = check_settings()
    assert message.id == "clustered_sessions.E001"
    assert f"'{backend}' there" in message.msg
    assert what in message.msg
    assert "django-redis, django-valkey, django-cachex or Django's own RedisCache" in message.msg
    with pytest.raises(ImproperlyConfigured, match="SESSION_CACHE_ALIAS"):
        connections.pool()
