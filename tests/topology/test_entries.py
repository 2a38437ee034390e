"""Entries of each package that lead to a cluster, to the primary of Sentinels, or through TLS."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from django.core.cache import caches

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.checks.settings import check_settings
from django_clustered_sessions.checks.store import check_store
from django_clustered_sessions.store import connections
from django_clustered_sessions.store.entries import django_redis
from tests.clusters import ClusterServers, ask
from tests.conftest import store_binary
from tests.entries import CACHEX, DJANGO, DJANGO_REDIS, VALKEY, VALKEY_CLUSTER, use_entry
from tests.locking import new_session
from tests.pages import block
from tests.servers import StoreServer
from tests.topologies import NAME, Replicated
from tests.topology.test_tls import Certificate, TLSStoreServer, issue

USER = {"username": "app", "password": "pa:ss"}


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return issue(tmp_path_factory.mktemp("ca"), "ca")


@pytest.fixture(scope="module")
def own(ca: Certificate) -> Certificate:
    return issue(ca.path.parent, "server", ca)


def use() -> None:
    """Set a key of the cache; create sessions in both worlds, and load them."""
    caches["sessions"].set("of-the-cache", 1)
    assert caches["sessions"].get("of-the-cache") == 1

    async def keep() -> str:
        session = SessionStore()
        await session.aset("n", 1)
        await session.acreate()
        return str(session.session_key)

    for key in (new_session(n=1), asyncio.run(keep())):
        assert SessionStore(key).load() == {"n": 1}
    assert check_settings() == []


def kept(*servers: StoreServer, db: int = 0) -> list[bool]:
    """Return whether the servers have keys of the cache, and keys of sessions."""
    found = []
    for server in servers:
        with server.client(db=db) as client:
            found += client.keys("*")
    return [any(part in key for key in found) for part in (b"of-the-cache", b"session:{")]


# TLS.


def tls_options(backend: str, ca: Certificate) -> dict[str, Any]:
    trust = {"ssl_ca_certs": str(ca.path)}
    is_nested = backend in (DJANGO_REDIS, VALKEY)
    return {"CONNECTION_POOL_KWARGS": trust} if is_nested else trust


@pytest.fixture(scope="module")
def tls(ca: Certificate, own: Certificate) -> Iterator[StoreServer]:
    with TLSStoreServer(ca=ca, own=own, binary=store_binary("redis")) as server:
        yield server


@pytest.mark.parametrize(
    ("backend", "scheme"),
    [
        (DJANGO_REDIS, "rediss"),
        (DJANGO, "rediss"),
        (VALKEY, "valkeys"),
        (CACHEX + "RedisCache", "rediss"),
        (CACHEX + "ValkeyCache", "valkeys"),
    ],
)
def test_cache_and_sessions_speak_tls(
    tls: StoreServer, ca: Certificate, settings: Any, backend: str, scheme: str
) -> None:
    tls.client().flushall()
    location = f"{scheme}://127.0.0.1:{tls.port}/3"
    use_entry(settings, backend, location, **tls_options(backend, ca))
    use()
    assert kept(tls, db=3) == [True, True]


# Sentinels.


@pytest.fixture(scope="module")
def watched() -> Iterator[Replicated]:
    with Replicated(sentinels=1) as topology:
        topology.admit("app", "on", ">pa:ss", "~*", "&*", "+@all")
        yield topology


WATCHED: dict[str, tuple[str, dict[str, Any]]] = {
    "django-redis": (
        DJANGO_REDIS,
        {"CONNECTION_FACTORY": django_redis.SENTINEL, "CONNECTION_POOL_KWARGS": {**USER}},
    ),
    "django-valkey, client": (
        VALKEY,
        {
            "CLIENT_CLASS": "django_valkey.client.SentinelClient",
            "CONNECTION_FACTORY": "django_valkey.pool.SentinelConnectionFactory",
            "CONNECTION_POOL_KWARGS": {**USER},
        },
    ),
    "django-valkey, factory": (
        VALKEY,
        {
            "CONNECTION_FACTORY": "django_valkey.pool.SentinelConnectionFactory",
            "CONNECTION_POOL_KWARGS": {**USER},
        },
    ),
    "django-cachex": (CACHEX + "RedisSentinelCache", {**USER}),
    "django-cachex, Valkey": (CACHEX + "ValkeySentinelCache", {**USER}),
}


@pytest.mark.parametrize(("backend", "options"), WATCHED.values(), ids=WATCHED)
def test_cache_and_sessions_ask_the_same_sentinels(
    watched: Replicated, settings: Any, backend: str, options: dict[str, Any]
) -> None:
    watched.primary.client().flushall()
    addresses = [("127.0.0.1", sentinel.port) for sentinel in watched.sentinels]
    name = "sentinels" if backend.startswith(CACHEX) else "SENTINELS"
    scheme = "valkey" if "Valkey" in backend else "redis"
    use_entry(settings, backend, f"{scheme}://{NAME}/3", **options, **{name: addresses})
    caches["sessions"].set("of-the-cache", 1)
    assert SessionStore(new_session(n=1)).load() == {"n": 1}
    assert kept(watched.primary, db=3) == [True, True]
    users = {one["user"] for one in watched.primary.client().client_list() if one["db"] == "3"}
    assert "app" in users


@pytest.mark.parametrize("package", ["django_valkey", "django_cachex"])
def test_documented_entries_lead_to_the_primary(
    watched: Replicated, settings: Any, package: str
) -> None:
    watched.admit("site", "on", ">...", "~*", "&*", "+@all")
    text = block("deploy-store.md", f"{package}.cache")
    port = watched.sentinels[0].port
    text = re.sub(r"\(\"sentinel-1.*\)", f'("127.0.0.1", {port})', text)
    found: dict[str, Any] = {"CACHES": {}}
    exec(re.sub(r" +\(\"sentinel-\d.*\),\n", "", text), found)
    entry = found["CACHES"]["sessions"]
    use_entry(settings, entry["BACKEND"], entry["LOCATION"], **entry["OPTIONS"])
    watched.primary.client().flushall()
    use()
    assert kept(watched.primary, db=1) == [True, True]


# Clusters.


@pytest.fixture(scope="module")
def cluster(server_binary: Path) -> Iterator[ClusterServers]:
    with ClusterServers(binary=server_binary) as servers:
        yield servers


CLUSTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "django-redis": (DJANGO_REDIS, {"CONNECTION_FACTORY": django_redis.CLUSTER}),
    "django-valkey": (VALKEY_CLUSTER, {}),
    "django-cachex": (CACHEX + "RedisClusterCache", {}),
    "django-cachex, Valkey": (CACHEX + "ValkeyClusterCache", {}),
}


@pytest.mark.parametrize(("backend", "options"), CLUSTERS.values(), ids=CLUSTERS)
def test_cache_and_sessions_are_in_one_cluster(
    cluster: ClusterServers, settings: Any, backend: str, options: dict[str, Any]
) -> None:
    cluster.flush()
    scheme = "valkey" if "Valkey" in backend else "redis"
    locations = [f"{scheme}://127.0.0.1:{server.port}" for server in cluster.primaries]
    use_entry(settings, backend, locations, **options)
    use()
    assert kept(*cluster.primaries) == [True, True]
    assert len(connections.nodes()) == len(cluster.primaries)


@pytest.fixture(scope="module")
def tls_cluster(ca: Certificate, own: Certificate) -> Iterator[ClusterServers]:
    server = partial(TLSStoreServer, "--tls-cluster", "yes", ca=ca, own=own)
    with ClusterServers(binary=store_binary("redis"), server=server) as servers:
        yield servers


CLUSTERS_BY_TLS: dict[str, tuple[str, str, Callable[..., dict[str, Any]]]] = {
    "django-redis": (
        DJANGO_REDIS,
        "rediss",
        lambda **trust: {
            "CONNECTION_FACTORY": django_redis.CLUSTER,
            "CONNECTION_POOL_KWARGS": trust,
        },
    ),
    "django-valkey": (VALKEY_CLUSTER, "valkeys", lambda **trust: {"BASE_CLIENT_KWARGS": trust}),
    "django-cachex": (CACHEX + "RedisClusterCache", "rediss", dict),
    "django-cachex, Valkey": (CACHEX + "ValkeyClusterCache", "valkeys", dict),
}


@pytest.mark.parametrize(
    ("backend", "scheme", "options"), CLUSTERS_BY_TLS.values(), ids=CLUSTERS_BY_TLS
)
def test_cache_and_sessions_are_in_one_cluster_by_tls(
    tls_cluster: ClusterServers,
    ca: Certificate,
    settings: Any,
    backend: str,
    scheme: str,
    options: Callable[..., dict[str, Any]],
) -> None:
    tls_cluster.flush()
    location = f"{scheme}://127.0.0.1:{tls_cluster.primaries[0].port}"
    use_entry(settings, backend, location, **options(ssl_ca_certs=str(ca.path)))
    if backend.startswith(CACHEX) and sys.version_info < (3, 14):
        pytest.skip("the newest django-cachex for this Python takes no scheme for a cluster")
    use()
    assert kept(*tls_cluster.primaries) == [True, True]


# Databases of a cluster.


def selects(cluster: ClusterServers) -> int:
    """Return how often a database was selected, on all primaries."""
    stats = [ask(server, "INFO", "commandstats").decode() for server in cluster.primaries]
    return sum("cmdstat_select:" in one for one in stats)


def test_no_database_of_a_cluster_is_selected(cluster: ClusterServers, settings: Any) -> None:
    cluster.use(settings)
    for server in cluster.primaries:
        ask(server, "CONFIG RESETSTAT")
    key = new_session(n=1)
    assert SessionStore(key).load() == {"n": 1}
    assert selects(cluster) == 0


def test_numbered_database_of_a_cluster_is_selected_if_asked(settings: Any) -> None:
    server = partial(StoreServer, "--cluster-databases", "4")
    with ClusterServers(binary=store_binary("valkey"), server=server) as servers:
        location = f"redis://127.0.0.1:{servers.primaries[0].port}/3"
        use_entry(settings, DJANGO_REDIS, location, CONNECTION_FACTORY=django_redis.CLUSTER)
        key = new_session(n=1)
        assert SessionStore(key).load() == {"n": 1}
        assert kept(*servers.primaries, db=3)[1]
        assert not kept(*servers.primaries)[1]


def test_sessions_need_nothing_that_serverless_stores_refuse(
    tls_cluster: ClusterServers, ca: Certificate, settings: Any
) -> None:
    """TLS, a cluster, no administration, and neither SELECT nor CONFIG nor WAIT."""
    refused = ("-@admin", "-select", "-config", "-wait")
    for server in tls_cluster.primaries:
        ask(server, "ACL SETUSER", "app", "on", ">pa:ss", "~*", "&*", "+@all", *refused)
    tls_cluster.flush()
    location = f"valkeys://app:pa%3Ass@127.0.0.1:{tls_cluster.primaries[0].port}"
    trust = {"ssl_ca_certs": str(ca.path)}
    use_entry(settings, VALKEY_CLUSTER, location, BASE_CLIENT_KWARGS=trust)
    use()
    session = SessionStore(new_session(n=1))
    with session.lock():
        session.increment("n")
    session.cycle_key()
    assert SessionStore(session.session_key).load() == {"n": 2}
    session.flush()
    assert {message.id for message in check_store()} <= {"clustered_sessions.I001"}
    refused_words = set()
    for server in tls_cluster.primaries:
        with server.client(decode_responses=True) as client:
            refused_words |= {entry["object"] for entry in client.acl_log()}
    assert refused_words <= {"config|get"}
