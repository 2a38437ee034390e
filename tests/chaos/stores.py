"""Stores of the workers' sessions, and the faults of the stores during a run."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from random import Random
from typing import Any, Protocol

from redis.crc import key_slot

from django_clustered_sessions.protocol.record import SessionKeys
from django_clustered_sessions.store.entries import django_redis
from tests.clusters import ClusterServers
from tests.conftest import DATABASE
from tests.topologies import NAME, Replicated

from .plan import Plan
from .proxy import CuttingProxy

#: Mean number of seconds between two faults of a primary.
PEACE_S = 4.0

#: User with the rights of clients, while the default user is locked out.
USER, PASSWORD = "site", "secret"


class Stores(Protocol):
    """Stores of a run; ``counts`` has the number of each fault."""

    counts: Counter[str]

    async def start(self) -> Mapping[str, Any]:
        """Start; return the workers' entry of CACHES."""

    def entry(self) -> Mapping[str, Any]:
        """Return an entry of CACHES for direct connections without faults."""

    def cut(self) -> None:
        """Cut all connections, if that is possible."""

    async def torment(self) -> None:
        """Cause the plan's faults of the stores until cancelled."""

    async def close(self) -> None:
        """Stop causing faults."""


class Single:
    """Single store that never fails, behind a proxy that cuts."""

    def __init__(self, plan: Plan, port: int) -> None:
        self.counts: Counter[str] = Counter()
        self._port = port
        self._proxy = CuttingProxy(port, Random(f"{plan.seed} proxy"), plan.faults.cut)

    async def start(self) -> Mapping[str, Any]:
        return _location(await self._proxy.start())

    def entry(self) -> Mapping[str, Any]:
        return _location(self._port)

    def cut(self) -> None:
        self._proxy.cut_all()

    async def torment(self) -> None:
        """Do nothing: the proxy causes the faults."""

    async def close(self) -> None:
        await self._proxy.close()
        self.counts["cuts"] = self._proxy.cuts


class Failing:
    """Primary with replicas under Sentinels; it is killed, stopped or cut off until a failover.

    A primary that is cut off from Sentinels and replicas serves its clients beyond the failover.
    Each killed server is replaced by a new replica, so that one can always take over.
    """

    def __init__(self, plan: Plan, topology: Replicated) -> None:
        self.counts: Counter[str] = Counter()
        self._dice = Random(f"{plan.seed} stores")
        self._topology, self._rivalry_s = topology, plan.rivalry_s
        self._faults = plan.faults.of_primary
        self._admit()

    async def start(self) -> Mapping[str, Any]:
        return self.entry()

    def _admit(self) -> None:
        self._topology.admit(USER, "on", f">{PASSWORD}", "~*", "+@all")

    def entry(self) -> Mapping[str, Any]:
        options = self._topology.options | {"USERNAME": USER, "PASSWORD": PASSWORD}
        return {"LOCATION": f"redis://{NAME}/{DATABASE}", "OPTIONS": options}

    def cut(self) -> None:
        """Do nothing: nobody is on the way."""

    async def torment(self) -> None:
        # First, so that short runs have two primaries at once too.
        faults = ["cut off"]
        while True:
            await asyncio.sleep(self._dice.uniform(0.5, 1.5) * PEACE_S)
            faults = faults or self._dice.sample(self._faults, len(self._faults))
            fault = faults.pop()
            await asyncio.to_thread(self._fail_over, fault)
            self.counts["failovers"] += 1
            self.counts["cut off"] += fault == "cut off"
            if fault == "kill":
                # Not in that thread, because a store ends with the thread that starts it.
                self._topology.add_replica()
                self._admit()

    def _fail_over(self, fault: str) -> None:
        was_primary = self._topology.primary
        if fault == "kill":
            was_primary.kill()
        elif fault == "stop":
            was_primary.pause()
        else:
            past_it = self._topology.cut_off("hidden")
        try:
            self._topology.take_over()
            if fault == "cut off":
                # The length of this state is the fault itself.
                time.sleep(self._rivalry_s)
        finally:
            if fault == "stop":
                was_primary.resume()
            elif fault == "cut off":
                past_it.execute_command("ACL SETUSER", "default", "nopass")
                past_it.close()
        if fault != "kill":
            # Sentinels need eight seconds to demote it, and would promote it unchanged until then.
            self._topology.demote(was_primary)

    async def close(self) -> None:
        """Do nothing: the owner of the topology closes it."""


class _OnCluster:
    """Cluster with faults."""

    def __init__(self, plan: Plan, servers: ClusterServers) -> None:
        self.counts: Counter[str] = Counter()
        self._dice = Random(f"{plan.seed} stores")
        self._plan, self._servers = plan, servers

    async def start(self) -> Mapping[str, Any]:
        return self.entry()

    def entry(self) -> Mapping[str, Any]:
        nodes = [f"redis://127.0.0.1:{server.port}" for server in self._servers.primaries]
        return {"LOCATION": nodes, "OPTIONS": {"CONNECTION_FACTORY": django_redis.CLUSTER}}

    def cut(self) -> None:
        """Do nothing: nobody is on the way."""

    async def close(self) -> None:
        """Do nothing: the owner of the servers closes them."""


class Moving(_OnCluster):
    """Cluster in which the slot of a session moves to another primary from time to time."""

    async def torment(self) -> None:
        began_s = time.monotonic()
        while True:
            era = int((time.monotonic() - began_s) // self._plan.era_s)
            # The first session has most of the work.
            record = SessionKeys.of(
                "session", self._plan.key(era, self._dice.choice((0, 0, 1)))
            ).record
            await asyncio.to_thread(self._move, record)
            self.counts["moves"] += 1
            await asyncio.sleep(self._dice.uniform(0.2, 1.0))

    def _move(self, record: str) -> None:
        owner = self._servers.owner(record)
        others = [one for one in self._servers.primaries if one is not owner]
        moves = [self._servers.move]
        if self._servers.can_move_at_once:
            moves.append(self._servers.move_at_once)
        move = self._dice.choice(moves)
        move(key_slot(record.encode()), owner, self._dice.choice(others))


class FailingNodes(_OnCluster):
    """Cluster in which a primary is killed from time to time, and comes back as a replica."""

    async def torment(self) -> None:
        while True:
            await asyncio.sleep(self._dice.uniform(0.5, 1.5) * PEACE_S / 2)
            lost = self._dice.choice(self._servers.primaries)
            lost.kill()
            taking_over = asyncio.create_task(asyncio.to_thread(self._servers.take_over, lost))
            try:
                await asyncio.shield(taking_over)
            finally:
                # It has nothing on disk: before the failover it would return as an empty primary.
                await taking_over
                # Not in that thread, because a store ends with the thread that starts it.
                lost.start()
            self.counts["failovers"] += 1
            await asyncio.to_thread(self._servers.settle)


def _location(port: int) -> Mapping[str, Any]:
    return {"LOCATION": f"redis://127.0.0.1:{port}/{DATABASE}"}
