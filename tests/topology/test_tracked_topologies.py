"""Tracked reads by TLS and unix socket, beside Sentinels, and on a cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.crc import key_slot

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.session.near_cache import near_cache
from django_clustered_sessions.store import tracking
from tests.clusters import IMPATIENT_MS, ClusterServers, ask, node_id
from tests.conftest import use_store
from tests.elsewhere import started
from tests.gateways import place
from tests.locking import Threads, new_session, outcome
from tests.servers import StoreServer, wait_for
from tests.topologies import Replicated
from tests.topology.test_tls import Certificate, ca, server_certificate, tls

__all__ = ["ca", "server_certificate", "tls"]

# A Sentinel in TILT takes half a minute to come back.
pytestmark = pytest.mark.timeout(300)

#: A bound that no test comes to.
LONG_S = 60.0
MAX_AGE_S = 0.3


@pytest.fixture(autouse=True)
def tracked(settings: Any) -> None:
    near_cache.clear()
    settings.CLUSTERED_SESSIONS_NEAR_READS = "tracked"
    settings.CLUSTERED_SESSIONS_NEAR_MAX_AGE = LONG_S


def read(key: str) -> Any:
    return SessionStore(key).get("n")


def is_free(key: str) -> bool:
    """Return whether a read costs no trip."""
    before = counters.counts["near_reads"]
    read(key)
    return counters.counts["near_reads"] > before


async def ais_free(key: str) -> bool:
    """See is_free()."""
    before = counters.counts["near_reads"]
    await SessionStore(key).aget("n")
    return counters.counts["near_reads"] > before


def a_change_is_told(url: str) -> None:
    key = new_session(n=1, large="x" * 200_000)
    with started(url) as elsewhere:
        assert read(key) == 1
        assert is_free(key)
        elsewhere.write(key, n=2)
        wait_for(lambda: read(key) == 2, "the change is seen")

        async def go() -> None:
            assert not await ais_free(key)
            assert await ais_free(key)
            await asyncio.to_thread(elsewhere.write, key, n=3)
            until_s = time.monotonic() + 10
            while await SessionStore(key).aget("n") != 3:
                assert time.monotonic() < until_s

        asyncio.run(go())


def test_change_is_told_by_tls(tls: StoreServer, ca: Certificate, settings: Any) -> None:
    use_store(settings, f"{tls.url}/1", CONNECTION_POOL_KWARGS={"ssl_ca_certs": str(ca.path)})
    a_change_is_told(f"unix://{tls.unix_url.partition('://')[2].partition('?')[0]}?db=1")


@pytest.mark.each_server
def test_change_is_told_by_a_unix_socket(store_server: StoreServer, settings: Any) -> None:
    with StoreServer("--requirepass", "secret", binary=store_server.binary) as server:
        use_store(settings, f"{server.unix_url}?db=1", PASSWORD="secret")
        a_change_is_told(f"redis://:secret@127.0.0.1:{server.port}/1")


# Sentinel.


def test_primary_that_was_cut_off_is_not_believed(settings: Any) -> None:
    """It answers as before: nothing but the Sentinels tells that it is none any more."""
    with Replicated(sentinels=3) as topology:
        topology.admit("site", "on", ">secret", "~*", "+@all")
        topology.use(settings, 1, user="site:secret")
        key = new_session(n=1)
        wait_for(lambda: has(topology.replicas[0], key), "the replica has it")
        read(key)
        assert is_free(key)
        topology.cut_off("hidden")
        promoted = topology.promoted()
        write_at(promoted, key)
        wait_for(lambda: read(key) == 2, "the new primary is read", timeout_s=30.0)
        wait_for(lambda: is_free(key), "it tracks, too")


def has(server: StoreServer, key: str) -> bool:
    with server.client(db=1) as client:
        return bool(client.exists(place(key).record))


def write_at(server: StoreServer, key: str) -> None:
    with started(f"redis://site:secret@127.0.0.1:{server.port}/1") as elsewhere:
        elsewhere.write(key, n=2)


# A cluster.


@pytest.fixture(scope="module")
def servers(server_binary: Path) -> Iterator[ClusterServers]:
    with ClusterServers(binary=server_binary) as started:
        yield started


@pytest.fixture
def cluster(servers: ClusterServers, settings: Any) -> ClusterServers:
    servers.flush()
    servers.use(settings)
    return servers


def overwrite(record: str, client: redis.Redis, other: str) -> None:
    """Give a record the values of another one, as a write past this process would."""
    client.restore(record, 0, client.dump(other) or b"", replace=True)


@pytest.mark.each_server
def test_each_node_of_a_cluster_tells(cluster: ClusterServers) -> None:
    # Of random keys so many may be on two nodes.
    keys: list[str] = []
    while {cluster.owner(place(key).record) for key in keys} != {*cluster.primaries}:
        keys += [new_session(n=1) for _ in range(4)]
    for key in keys:
        wait_for(partial(is_free, key), "it is tracked")
    for key in keys:
        with cluster.client(place(key).record) as client:
            client.delete(place(key).record)
    wait_for(lambda: not any(read(key) for key in keys), "all ends are told")


@pytest.mark.each_server
@pytest.mark.parametrize("is_atomic", [False, True], ids=["MIGRATE", "MIGRATESLOTS"])
def test_slot_that_moves_away_and_back_brings_no_copy_back(
    cluster: ClusterServers, is_atomic: bool
) -> None:
    if is_atomic and not cluster.can_move_at_once:
        pytest.skip("Valkey moves slots atomically from 9 on")
    move = cluster.move_at_once if is_atomic else cluster.move
    key = new_session(n=1)
    record = place(key).record
    slot, home = key_slot(record.encode()), cluster.owner(record)
    target = next(one for one in cluster.primaries if one is not home)
    wait_for(lambda: is_free(key), "it is tracked")
    for source, other in ((home, target), (target, home)):
        move(slot, source, other)
        with other.client() as client:
            write = SessionStore(key)
            write["n"] = write["n"] + 1
            write.save()
            assert client.exists(record)
        assert read(key) == write["n"]
        wait_for(lambda: is_free(key), "it is tracked again")
        assert read(key) == write["n"]


def test_thread_that_rests_while_it_doubts_lets_no_other_believe(
    cluster: ClusterServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has seen that slots have moved, and another thread comes before it has drawn the line."""
    key = new_session(n=1)
    home, slot = cluster.owner(place(key).record), key_slot(place(key).record.encode())
    target, *_ = (one for one in cluster.primaries if one is not home)
    wait_for(lambda: is_free(key), "it is tracked")
    doubt, found = tracking.Channel.doubt, list[bool]()

    def rests(channel: tracking.Channel) -> None:
        if not found:
            found.append(False)
            with Threads() as threads:
                found[0] = outcome(threads.start(is_free, key))
        doubt(channel)

    monkeypatch.setattr(tracking.Channel, "doubt", rests)
    # A slot without any session beside that one's, so no node tells that it has moved.
    ours = next(
        (first, last)
        for first, last, node, *_ in ask(home, "CLUSTER SLOTS")
        if first <= slot <= last
    )
    cluster.move(next(one for one in range(ours[0], ours[1]) if one != slot), home, target)
    wait_for(lambda: read(key) and found, "the move is noticed", timeout_s=20.0)
    assert found == [False]


@pytest.mark.each_server
def test_slot_that_another_node_takes_is_noticed(
    cluster: ClusterServers, server_binary: Path
) -> None:
    """A node of a higher epoch has it, and the one that had it tells nothing."""
    key = new_session(n=1)
    record = place(key).record
    slot, home = key_slot(record.encode()), cluster.owner(record)
    target = next(one for one in cluster.primaries if one is not home)
    wait_for(lambda: is_free(key), "it is tracked")
    with home.client() as before, target.client() as after:
        dumped = before.dump(record) or b""
        ask(target, "CLUSTER SETSLOT", slot, "IMPORTING", node_id(home))
        after.execute_command("ASKING")
        pipeline = after.pipeline(transaction=False)
        pipeline.execute_command("ASKING")
        pipeline.execute_command("RESTORE", record, 0, dumped, "REPLACE")
        pipeline.execute_command("ASKING")
        pipeline.execute_command("DEL", record)
        pipeline.execute()
        ask(target, "CLUSTER SETSLOT", slot, "NODE", node_id(target))
        ask(target, "CLUSTER BUMPEPOCH")
        wait_for(lambda: cluster.owner(record) is target, "it is the other node's")
    wait_for(lambda: read(key) is None, "it is seen", timeout_s=20.0)


@pytest.mark.each_server
def test_node_without_a_majority_is_not_believed(settings: Any, server_binary: Path) -> None:
    settings.CLUSTERED_SESSIONS_NEAR_MAX_AGE = MAX_AGE_S
    # A half of it is for the nodes that stand still.
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 3.0
    with ClusterServers(binary=server_binary, node_timeout_ms=IMPATIENT_MS) as servers:
        servers.use(settings)
        key = new_session(n=1)
        wait_for(lambda: is_free(key), "it is tracked")
        home = servers.owner(place(key).record)
        for other in servers.primaries:
            if other is not home:
                other.pause()
        try:

            def is_served() -> bool:
                try:
                    return bool(read(key))
                except SessionStoreUnavailable:
                    return False

            # A read may fail before, as one of the others is asked for the map of slots.
            wait_for(
                lambda: b"cluster_state:fail" in ask(home, "CLUSTER INFO"),
                "the node has no majority",
                timeout_s=30.0,
            )
            wait_for(lambda: not is_served(), "it is not served any more", timeout_s=30.0)
            assert not is_served()
        finally:
            for other in servers.primaries:
                other.resume()
        wait_for(is_served, "the cluster is back", timeout_s=30.0)
