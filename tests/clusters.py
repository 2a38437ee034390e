"""Clusters of real servers on loopback, for tests of redirections, resharding and failover."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import redis
from redis.crc import key_slot

from django_clustered_sessions.store.entries import django_redis
from tests.conftest import use_store
from tests.servers import StoreServer, wait_for

SLOTS: Final = 16384

#: Silence in ms after which nodes take another one for down: by default, and in tests that wait
#: for it.
PATIENT_MS: Final = 30_000
IMPATIENT_MS: Final = 1000


class ClusterServers:
    """Cluster of ``primaries`` that share the slots, and ``replicas`` of the first primary.

    ``binary`` is the program of every server, ``server`` makes one. A node considers another down
    after ``node_timeout_ms`` of silence: however long the machine stalls, that happens only in
    tests that wait for it. Use as a context manager.
    """

    def __init__(
        self,
        *,
        primaries: int = 3,
        replicas: int = 0,
        binary: Path | None = None,
        node_timeout_ms: int = PATIENT_MS,
        server: Callable[..., StoreServer] = StoreServer,
    ) -> None:
        self._server = server
        self._numbers = primaries, replicas
        self._binary = binary
        self._flags = (
            *("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"),
            *("--cluster-node-timeout", str(node_timeout_ms)),
            # So that a replica may take over right after its first synchronisation.
            *("--cluster-replica-validity-factor", "0", "--repl-ping-replica-period", "1"),
        )
        self._started = ExitStack()

    def __enter__(self) -> ClusterServers:
        primaries, replicas = self._numbers
        with self._started:
            self.primaries = [self._start() for _ in range(primaries)]
            self.replicas = [self._start() for _ in range(replicas)]
            for number, server in enumerate(self.primaries):
                begin, end = number * SLOTS // primaries, (number + 1) * SLOTS // primaries - 1
                ask(server, "CLUSTER SET-CONFIG-EPOCH", number + 1)
                ask(server, "CLUSTER ADDSLOTSRANGE", begin, end)
            wait_for(self._have_met, "all nodes know all", timeout_s=30)
            for number, replica in enumerate(self.replicas):
                ask(replica, "CLUSTER REPLICATE", node_id(self.primaries[number]))
            self.settle()
            self._started = self._started.pop_all()
        return self

    def __exit__(self, *args: object) -> None:
        self._started.close()

    @property
    def servers(self) -> Sequence[StoreServer]:
        """The servers, primaries first."""
        return [*self.primaries, *self.replicas]

    def use(self, settings: Any, *ports: int, scheme: str = "redis", **options: Any) -> None:
        """Point the settings at the cluster; the start-up nodes are the primaries, or ``ports``."""
        ports = ports or tuple(server.port for server in self.primaries)
        location = ",".join(f"{scheme}://127.0.0.1:{port}" for port in ports)
        use_store(settings, location, CONNECTION_FACTORY=django_redis.CLUSTER, **options)

    def owner(self, key: str) -> StoreServer:
        """Return the server that has a key's slot, as a running server reports it."""
        slot = key_slot(key.encode())
        for server in self.servers:
            if server.process is None:
                continue
            for first, last, (_, port, *_), *_ in ask(server, "CLUSTER SLOTS"):
                if first <= slot <= last:
                    return next(one for one in self.servers if one.port == port)
        raise AssertionError("nobody has that slot")

    def client(self, key: str) -> redis.Redis:
        """Return a raw client of the server that has a key."""
        return self.owner(key).client()

    def take_over(self, lost: StoreServer) -> None:
        """Wait until a replica has replaced a primary that is down, and note it as the primary."""
        it = lost.port
        found = wait_for(lambda: self._successor(it), "a replica has taken over", timeout_s=30)
        self.primaries = [found if one is lost else one for one in self.primaries]
        self.replicas = [lost if one is found else one for one in self.replicas]

    def settle(self) -> None:
        """Wait until every replica follows its primary and the cluster state is ok."""
        for replica in self.replicas:
            wait_for(lambda one=replica: _follows(one), "a replica follows", timeout_s=30)
        for server in self.servers:
            wait_for(lambda one=server: self._is_ok(one), "the cluster is up", timeout_s=30)

    def _successor(self, port: int) -> StoreServer | None:
        """Return a replica with slots, once no server reports slots at ``port``."""
        up = [server for server in self.servers if server.process is not None]
        maps = [ask(server, "CLUSTER SLOTS") for server in up]
        owners = [{node[1] for _, _, node, *_ in one} for one in maps]
        if any(port in ports or len(ports) < len(self.primaries) for ports in owners):
            return None
        return next((one for one in self.replicas if one.port in owners[0]), None)

    def flush(self) -> None:
        """Empty all primaries."""
        for server in self.primaries:
            ask(server, "FLUSHALL")

    def stored(self) -> set[str]:
        """Return the keys of all records on the primaries, and no other keys."""
        found = {key.decode() for server in self.primaries for key in ask(server, "KEYS", "*")}
        beside = (":index", ":figures", ":history", ":evenwrites", ":oddwrites")
        return {key for key in found if not key.endswith(beside)}

    @contextmanager
    def moving(self, slot: int, source: StoreServer, target: StoreServer) -> Iterator[None]:
        """Open a slot between two primaries for migration; assign it to the target at the end."""
        ask(target, "CLUSTER SETSLOT", slot, "IMPORTING", node_id(source))
        ask(source, "CLUSTER SETSLOT", slot, "MIGRATING", node_id(target))
        try:
            yield
        finally:
            self.migrate(slot, source, target)
            for server in (target, source, *self.primaries):
                ask(server, "CLUSTER SETSLOT", slot, "NODE", node_id(target))

    def migrate(
        self, slot: int, source: StoreServer, target: StoreServer, *only: str
    ) -> Sequence[bytes]:
        """Move the keys of an open slot, or ``only`` some; return the moved keys."""
        moved: list[bytes] = []
        while keys := only or ask(source, "CLUSTER GETKEYSINSLOT", slot, 10):
            ask(source, "MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "REPLACE", "KEYS", *keys)
            moved += keys
            if only:
                break
        return moved

    def move(self, slot: int, source: StoreServer, target: StoreServer) -> None:
        """Move a slot from one primary to another, with its keys."""
        with self.moving(slot, source, target):
            pass

    @cached_property
    def can_move_at_once(self) -> bool:
        """True if the servers have CLUSTER MIGRATESLOTS, as Valkey from 9 on."""
        return any(b"MIGRATESLOTS" in line for line in ask(self.primaries[0], "CLUSTER HELP"))

    def move_at_once(self, slot: int, source: StoreServer, target: StoreServer) -> None:
        """Move a slot atomically, with its keys: clients never see it half moved."""
        target_id = node_id(target)
        ask(source, "CLUSTER MIGRATESLOTS SLOTSRANGE", slot, slot, "NODE", target_id)

        def has_it(server: StoreServer) -> bool:
            slots = ask(server, "CLUSTER SLOTS")
            return any(a <= slot <= b and node[1] == target.port for a, b, node, *_ in slots)

        for server in self.primaries:
            wait_for(lambda one=server: has_it(one), "the slot has moved", timeout_s=30)

    def _start(self) -> StoreServer:
        return self._started.enter_context(self._server(*self._flags, binary=self._binary))

    def _have_met(self) -> bool:
        """Let all nodes meet the first, repeatedly; return whether all know each other.

        A node drops a CLUSTER MEET whose target does not answer within a second.
        """
        known = ask(self.primaries[0], "CLUSTER NODES")
        for server in self.servers[1:]:
            if b":%d@" % server.port not in known:
                ask(self.primaries[0], "CLUSTER MEET", "127.0.0.1", server.port)
        return all(map(self._knows_all, self.servers))

    def _knows_all(self, server: StoreServer) -> bool:
        nodes = ask(server, "CLUSTER NODES")
        return len(nodes.splitlines()) == len(self.servers) and b"handshake" not in nodes

    def _is_ok(self, server: StoreServer) -> bool:
        info = ask(server, "CLUSTER INFO")
        return b"cluster_state:ok" in info and b"cluster_slots_ok:16384" in info


def ask(server: StoreServer, command: str, *arguments: Any) -> Any:
    """Return a server's raw reply to a command."""
    with server.client() as client:
        client.response_callbacks.clear()
        return client.execute_command(*command.split(), *arguments)


def node_id(server: StoreServer) -> bytes:
    """Return the node ID of a server in its cluster."""
    found: bytes = ask(server, "CLUSTER MYID")
    return found


def _follows(server: StoreServer) -> bool:
    return b"master_link_status:up" in ask(server, "INFO", "replication")
