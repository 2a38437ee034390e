"""Requests on sessions of several stores: each request gets the connections of its session's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any
from unittest import mock

from . import filling, project
from .engines import LOCKED, Engine, Requests
from .scenarios import Scenario


class Primaries:
    """Some stores, each with a pool of connections; the package uses that of the one ``chosen``."""

    def __init__(self, servers: Sequence[Any]) -> None:
        from django_clustered_sessions.store import connections

        self.pools = []
        for server in servers:
            with project.store_at(f"{server.url}/0"):
                self.pools.append(connections.pool())
                # So that the change back does not close it.
                connections.working_pools.sync = None
        self.chosen = self.pools[0]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Have the package use these connections for a while."""
        from django_clustered_sessions.store import connections

        with mock.patch.object(connections, "pool", lambda step: self.chosen):
            yield

    def close(self) -> None:
        """Close all connections."""
        for pool in self.pools:
            pool.disconnect()


class OnPrimaries(Requests):
    """Requests on filled-in sessions with these numbers; a bucket is on one of ``pools``."""

    def __init__(
        self,
        engine: Engine,
        scenario: Scenario,
        primaries: Primaries,
        pools: Sequence[Any],
        numbers: Sequence[int],
    ) -> None:
        super().__init__(engine, scenario, 0)
        self.name = f"{scenario.name}, locked" if engine.name == LOCKED else scenario.name
        self._primaries = primaries
        self._pools = pools
        self._sessions = len(numbers)
        self._numbered = cycle([filling.session_key(number) for number in numbers])

    def prepare(self, count: int) -> list[Any]:
        """Return requests, each with its primary's connections."""
        self._primaries.chosen = self._pools[0]
        if self.scenario.consumes:
            return [(self._pools[0], request) for request in super().prepare(count)]
        keys = list(islice(self._numbered, count))
        self._keys = iter(keys)
        pools = [self._pools[filling.server_of(key, len(self._pools))] for key in keys]
        return list(zip(pools, super().prepare(count), strict=True))

    def run(self, request: Any) -> Any:
        """Answer a request with the connections that it came with."""
        self._primaries.chosen, its_request = request
        return super().run(its_request)
