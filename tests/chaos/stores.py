"""What the workers keep their sessions in, and what happens to that while they work."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from random import Random
from typing import Any, Protocol

from redis.crc import key_slot

from django_clustered_sessions.protocol.record import SessionKeys
from django_clustered_sessions.store import connections
from tests.clusters import ClusterServers
from tests.conftest import DATABASE
from tests.topologies import NAME, Replicated

from .plan import ERA_S, Plan
from .proxy import CuttingProxy

#: About so many seconds pass between two faults of a primary.
PEACE_S = 4.0

#: So long a primary that is cut off has clients while another one is the primary, in seconds:
#: they ask the Sentinels each second.
RIVALRY_S = 2.0

#: Who has clients' rights where the default user is shut out.
USER, PASSWORD = "site", "secret"


class Stores(Protocol):
    """One or several stores; ``counts`` has what happened to them, and how often."""

    counts: Counter[str]

    async def start(self) -> Mapping[str, Any]:
        """Return what the workers' entry in CACHES is to say."""

    def entry(self) -> Mapping[str, Any]:
        """Return what an entry in CACHES says that nothing happens to on the way."""

    def cut(self) -> None:
        """Cut all connections, where that is possible."""

    async def torment(self) -> None:
        """Do to the stores what the plan has for them, until cancelled."""

    async def close(self) -> None:
        """Leave the stores alone."""


class Single:
    """One store that runs all the time, behind a proxy that cuts."""

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
        """Do nothing: the proxy does."""

    async def close(self) -> None:
        await self._proxy.close()
        self.counts["cuts"] = self._proxy.cuts


class Failing:
    """A primary with replicas under Sentinels; it is killed, or stopped until another took over.

    Or it is cut off from Sentinels and replicas, and goes on serving clients until after that. A
    new replica comes for each that was killed, so that there is always one to take over.
    """

    def __init__(self, plan: Plan, topology: Replicated) -> None:
        self.counts: Counter[str] = Counter()
        self._dice = Random(f"{plan.seed} stores")
        self._topology = topology
        self._admit()

    async def start(self) -> Mapping[str, Any]:
        return self.entry()

    def _admit(self) -> None:
        self._topology.admit(USER, "on", f">{PASSWORD}", "~*", "+@all")

    def entry(self) -> Mapping[str, Any]:
        sentinels = [("127.0.0.1", sentinel.port) for sentinel in self._topology.sentinels]
        options = {"CONNECTION_FACTORY": connections.SENTINEL, "SENTINELS": sentinels}
        options |= {"USERNAME": USER, "PASSWORD": PASSWORD}
        return {"LOCATION": f"redis://{NAME}/{DATABASE}", "OPTIONS": options}

    def cut(self) -> None:
        """Do nothing: nobody is on the way."""

    async def torment(self) -> None:
        # A short run has it too: there are two primaries at once.
        faults = ["cut off"]
        while True:
            await asyncio.sleep(self._dice.uniform(0.5, 1.5) * PEACE_S)
            faults = faults or self._dice.sample(("kill", "stop", "cut off"), 3)
            fault = faults.pop()
            await asyncio.to_thread(self._fail_over, fault)
            self.counts["failovers"] += 1
            self.counts["cut off"] += fault == "cut off"
            if fault == "kill":
                # Not in that thread: a store ends with the one that it was started from.
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
                # How long it lasts is the point.
                time.sleep(RIVALRY_S)
        finally:
            if fault == "stop":
                was_primary.resume()
            elif fault == "cut off":
                past_it.execute_command("ACL SETUSER", "default", "nopass")
                past_it.close()
        if fault != "kill":
            # The Sentinels take eight seconds for it, and would promote it as it is until then.
            self._topology.demote(was_primary)

    async def close(self) -> None:
        """Do nothing: the topology is its owner's."""


class _OnCluster:
    """A cluster that something happens to."""

    def __init__(self, plan: Plan, servers: ClusterServers) -> None:
        self.counts: Counter[str] = Counter()
        self._dice = Random(f"{plan.seed} stores")
        self._plan, self._servers = plan, servers

    async def start(self) -> Mapping[str, Any]:
        return self.entry()

    def entry(self) -> Mapping[str, Any]:
        nodes = [f"redis://127.0.0.1:{server.port}" for server in self._servers.primaries]
        return {"LOCATION": nodes, "OPTIONS": {"CONNECTION_FACTORY": connections.CLUSTER}}

    def cut(self) -> None:
        """Do nothing: nobody is on the way."""

    async def close(self) -> None:
        """Do nothing: the servers are their owner's."""


class Moving(_OnCluster):
    """A cluster; every now and then the slot of a session moves to another primary."""

    async def torment(self) -> None:
        began_s = time.monotonic()
        while True:
            era = int((time.monotonic() - began_s) // ERA_S)
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
        self._servers.move(key_slot(record.encode()), owner, self._dice.choice(others))


class FailingNodes(_OnCluster):
    """A cluster; every now and then a primary is killed, and comes back as a replica."""

    async def torment(self) -> None:
        while True:
            await asyncio.sleep(self._dice.uniform(0.5, 1.5) * PEACE_S / 2)
            lost = self._dice.choice(self._servers.primaries)
            lost.kill()
            taking_over = asyncio.create_task(asyncio.to_thread(self._servers.take_over, lost))
            try:
                await asyncio.shield(taking_over)
            finally:
                # It keeps nothing on disk: back too soon, it would be an empty primary.
                await taking_over
                # Not in that thread: a store ends with the one that it was started from.
                lost.start()
            self.counts["failovers"] += 1
            await asyncio.to_thread(self._servers.settle)


def _location(port: int) -> Mapping[str, Any]:
    return {"LOCATION": f"redis://127.0.0.1:{port}/{DATABASE}"}
