"""What the workers keep their sessions in, and what happens to that while they work."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from random import Random
from typing import Any, Protocol

from django_clustered_sessions import connections
from tests.conftest import DATABASE
from tests.topologies import NAME, Replicated

from .plan import Plan
from .proxy import CuttingProxy

#: About so many seconds pass between two faults of a primary.
PEACE_S = 6.0


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

    A new replica comes for each that was killed, so that there is always one to take over.
    """

    def __init__(self, plan: Plan, topology: Replicated) -> None:
        self.counts: Counter[str] = Counter()
        self._dice = Random(f"{plan.seed} stores")
        self._topology = topology

    async def start(self) -> Mapping[str, Any]:
        return self.entry()

    def entry(self) -> Mapping[str, Any]:
        sentinels = [("127.0.0.1", sentinel.port) for sentinel in self._topology.sentinels]
        options = {"CONNECTION_FACTORY": connections.SENTINEL, "SENTINELS": sentinels}
        return {"LOCATION": f"redis://{NAME}/{DATABASE}", "OPTIONS": options}

    def cut(self) -> None:
        """Do nothing: nobody is on the way."""

    async def torment(self) -> None:
        faults: list[str] = []
        while True:
            await asyncio.sleep(self._dice.uniform(0.5, 1.5) * PEACE_S)
            faults = faults or self._dice.sample(("kill", "stop"), 2)
            await asyncio.to_thread(self._fail_over, faults.pop())
            self.counts["failovers"] += 1

    def _fail_over(self, fault: str) -> None:
        was_primary = self._topology.primary
        if fault == "kill":
            was_primary.kill()
        else:
            was_primary.pause()
        try:
            self._topology.take_over()
        finally:
            if fault == "stop":
                was_primary.resume()
        if fault == "kill":
            self._topology.add_replica()

    async def close(self) -> None:
        """Do nothing: the topology is its owner's."""


def _location(port: int) -> Mapping[str, Any]:
    return {"LOCATION": f"redis://127.0.0.1:{port}/{DATABASE}"}
