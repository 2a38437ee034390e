"""The proxy is the judge in other tests, so it is judged here first."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from tests.servers import CountingProxy, StoreServer, free_port, raw_client, wait_for


@pytest.fixture
def client(proxy: CountingProxy) -> redis.Redis:
    client = raw_client(proxy.url, db=1)
    client.ping()
    proxy.reset()
    return client


def test_proxy_counts_one_round_trip_per_command(proxy: CountingProxy, client: redis.Redis) -> None:
    client.set("name", "value")
    assert client.get("name") == b"value"
    assert proxy.round_trips == 2
    assert b"GET" in proxy.requests[1]
    assert proxy.bytes_sent == sum(map(len, proxy.requests))
    assert proxy.bytes_received == len(b"+OK\r\n$5\r\nvalue\r\n")
    assert proxy.connections == 0


def test_proxy_counts_a_pipeline_once(proxy: CountingProxy, client: redis.Redis) -> None:
    with client.pipeline(transaction=False) as pipeline:
        for number in range(20):
            pipeline.incrby("counter", number)
        pipeline.execute()
    assert proxy.round_trips == 1


def test_proxy_counts_a_large_value_once(proxy: CountingProxy, client: redis.Redis) -> None:
    client.set("large", b"x" * 5_000_000)
    assert client.strlen("large") == 5_000_000
    assert proxy.round_trips == 2


def test_reply_is_lost_after_the_store_executed(
    proxy: CountingProxy, client: redis.Redis, store: redis.Redis
) -> None:
    proxy.cut_next("reply", matching=b"INCR")
    client.ping()
    with pytest.raises(redis.ConnectionError):
        client.incr("counter")
    assert store.get("counter") == b"1"
    assert client.incr("counter") == 2


def test_request_is_lost_before_the_store_sees_it(
    proxy: CountingProxy, client: redis.Redis, store: redis.Redis
) -> None:
    proxy.cut_next("request", times=2)
    for _ in range(2):
        with pytest.raises(redis.ConnectionError):
            client.incr("counter")
    assert store.get("counter") is None
    assert client.incr("counter") == 1


def test_reply_ends_half_way(proxy: CountingProxy, client: redis.Redis, store: redis.Redis) -> None:
    store.set("name", "value")
    proxy.cut_next("half", matching=b"GET")
    with pytest.raises(redis.ConnectionError):
        client.get("name")
    assert client.get("name") == b"value"


def test_stalled_reply_passes_later(
    proxy: CountingProxy, client: redis.Redis, store: redis.Redis
) -> None:
    proxy.stall()
    with ThreadPoolExecutor() as pool:
        reply = pool.submit(client.incr, "counter")
        wait_for(lambda: store.get("counter") == b"1", "the stalled command runs all the same")
        assert not reply.done()
        proxy.resume()
        assert reply.result(timeout=10) == 1


def test_open_connections_are_cut(proxy: CountingProxy) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as link:
        link.sendall(b"PING\r\n")
        assert link.recv(64) == b"+PONG\r\n"
        proxy.cut()
        assert link.recv(64) == b""
    assert raw_client(proxy.url).ping()


def test_connections_are_refused_and_accepted_again(proxy: CountingProxy) -> None:
    for _ in range(2):
        proxy.refuse()
        with pytest.raises(redis.ConnectionError, match="refused"):
            raw_client(proxy.url).ping()
        proxy.accept()
        assert raw_client(proxy.url).ping()


@pytest.mark.each_server
def test_server_lives_through_restart_pause_and_kill(server_binary: Path) -> None:
    with StoreServer("--appendonly", "yes", binary=server_binary) as server:
        server.client().set("name", "value")
        server.restart()
        assert server.client().get("name") == b"value"

        server.pause()
        with pytest.raises(redis.TimeoutError):
            server.client(socket_timeout=0.2).get("name")
        server.resume()
        assert server.client().get("name") == b"value"

        server.kill()
        with pytest.raises(redis.ConnectionError):
            server.client().get("name")
        server.start()
        assert raw_client(server.unix_url).get("name") == b"value"
    assert not server.folder.exists()


def test_bundled_server_runs_as_replica_and_sentinel() -> None:
    with (
        StoreServer() as primary,
        StoreServer("--replicaof", f"127.0.0.1 {primary.port}") as replica,
        StoreServer(
            "--sentinel", config=f"sentinel monitor main 127.0.0.1 {primary.port} 1\n"
        ) as sentinel,
    ):
        primary.client().set("name", "value")
        wait_for(lambda: replica.client().get("name") == b"value", "the replica follows")
        state = sentinel.client(decode_responses=True).execute_command("SENTINEL MASTER", "main")
        assert (state["ip"], state["port"]) == ("127.0.0.1", primary.port)


def test_server_with_a_password_is_ready_when_it_asks_for_it() -> None:
    with StoreServer("--requirepass", "secret") as server:
        with pytest.raises(redis.AuthenticationError):
            server.client().ping()
        assert server.client(password="secret").ping()


def test_ports_are_given_to_threads_at_once() -> None:
    with ThreadPoolExecutor(8) as threads:
        ports = list(threads.map(lambda _: free_port(), range(64)))
    assert len(set(ports)) == 64
