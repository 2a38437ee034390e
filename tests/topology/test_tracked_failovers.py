"""Tracked reads over failovers by Sentinel: how long a former primary is believed.

Readers in a process of their own, eight threads and eight tasks, log each read. The test causes the
failover, and writes to the new primary.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from django_clustered_sessions.store.sentinel import BELIEVED_INTERVALS, INTERVAL_S
from tests.elsewhere import Elsewhere, started
from tests.locking import new_session
from tests.servers import StoreServer, wait_for
from tests.topologies import NAME, Replicated, is_primary
from tests.tracked_reader import Reader, Written, reading, too_old
from tests.variants import Variant

# A Sentinel in TILT takes half a minute to come back.
pytestmark = pytest.mark.timeout(300)

MAX_AGE_S: Final = 0.3
#: The age of a read at most: that of the Sentinels' word, and that of the copy.
BOUND_S: Final = BELIEVED_INTERVALS * INTERVAL_S + MAX_AGE_S
SESSIONS: Final = 4
DATABASE: Final = 1
USER, PASSWORD = "site", "secret"


class Site:
    """A primary with a replica and Sentinels, readers, and what was written."""

    def __init__(self, topology: Replicated, reader: Reader, keys: list[str]) -> None:
        self.topology, self.reader, self.keys = topology, reader, keys
        self.writes: list[Written] = []
        self._n = 1

    def write_at(self, server: StoreServer, times: int = 1) -> None:
        """Change all sessions on a server."""
        with started(f"redis://{USER}:{PASSWORD}@127.0.0.1:{server.port}/{DATABASE}") as elsewhere:
            for _ in range(times):
                self.write(elsewhere)

    def write(self, elsewhere: Elsewhere) -> None:
        """Change all sessions."""
        self._n += 1
        for key in self.keys:
            elsewhere.write(key, n=self._n)
            self.writes.append(Written(time.monotonic(), key, self._n))

    def settle(self) -> None:
        """Wait until all sessions were read when only what was written last may be found."""
        from_s = self.writes[-1].done_s + BOUND_S
        wait_for(
            lambda: {one.key for one in self.reader.found if one.began_s > from_s} >= {*self.keys},
            "all is read",
            timeout_s=60.0,
        )

    def violations(self) -> list[str]:
        """Return the reads that were too old."""
        self.settle()
        return too_old(self.reader.found, self.writes, BOUND_S)

    def replicated(self) -> None:
        """Wait until a failover loses none of what was written."""

        def has_all() -> bool:
            with self.topology.primary.client() as client:
                told = client.info("replication")
            return bool(told["slave0"]["offset"] == told["master_repl_offset"])

        wait_for(has_all, "the replica has all")


@contextmanager
def on_site(settings: Any, folder: Path, variant: Variant | None = None) -> Iterator[Site]:
    with Replicated(sentinels=3) as topology:
        topology.admit(USER, "on", f">{PASSWORD}", "~*", "+@all")
        topology.use(settings, DATABASE, user=f"{USER}:{PASSWORD}")
        keys = [new_session(n=1) for _ in range(SESSIONS)]
        with reading(
            folder,
            f"redis://{NAME}/{DATABASE}",
            keys,
            options=topology.options | {"USERNAME": USER, "PASSWORD": PASSWORD},
            variant=variant,
            NEAR_MAX_AGE=MAX_AGE_S,
            STORE_TIMEOUT=1.0,
        ) as reader:
            site = Site(topology, reader, keys)
            site.write_at(topology.primary)
            site.settle()
            site.replicated()
            yield site


# The failovers. Each returns when a replica is the primary for all Sentinels.


def by_kill(site: Site) -> StoreServer:
    site.topology.primary.kill()
    return site.topology.promoted()


def by_stop(site: Site) -> StoreServer:
    """It goes on as a primary afterwards, and no Sentinel has told it yet that it is none."""
    old = site.topology.primary
    old.pause()
    try:
        return site.topology.promoted()
    finally:
        old.resume()


def by_cut(site: Site) -> StoreServer:
    """It goes on as a primary for its clients, and nobody tells it that it is none."""
    site.topology.cut_off("hidden").close()
    return site.topology.promoted()


def by_order(site: Site) -> StoreServer:
    """It is made a replica by REPLICAOF."""
    (replica,) = site.topology.replicas
    with site.topology.sentinels[0].client() as client:
        client.execute_command("SENTINEL FAILOVER", NAME)
    wait_for(lambda: is_primary(replica), "the replica is promoted", timeout_s=80.0)
    return site.topology.promoted()


FAILOVERS: Final = {"kill": by_kill, "stop": by_stop, "cut off": by_cut, "REPLICAOF": by_order}


@pytest.mark.parametrize("name", FAILOVERS)
def test_age_is_bounded_over_a_failover(name: str, settings: Any, tmp_path: Path) -> None:
    with on_site(settings, tmp_path) as site:
        site.write_at(FAILOVERS[name](site), times=3)
        assert site.violations() == []


def a_cut_off_primary_answers(site: Site) -> None:
    site.write_at(by_cut(site))


def a_reader_stands_still_meanwhile(site: Site) -> None:
    """Its threads go on together: those that read, and the one that asks the Sentinels."""
    site.reader.process.send_signal(signal.SIGSTOP)
    try:
        site.write_at(by_cut(site))
        until_s = time.monotonic() + BOUND_S
        wait_for(lambda: time.monotonic() > until_s, "time goes by", timeout_s=2 * BOUND_S)
    finally:
        site.reader.process.send_signal(signal.SIGCONT)


#: Each with the schedule that finds it.
VARIANTS: Final[dict[str, tuple[Callable[[Site], None], Variant]]] = {
    "copies are kept when the Sentinels name another primary": (
        a_cut_off_primary_answers,
        Variant(
            "store.tracking",
            "return is_at_primary is None or is_at_primary()",
            "return True",
        ),
    ),
    "the last word of the Sentinels is believed for ever": (
        a_reader_stands_still_meanwhile,
        Variant(
            "store.sentinel",
            "return age_s <= BELIEVED_INTERVALS * INTERVAL_S or self._are_silent",
            "return True",
        ),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_schedule_keeps_the_bound(name: str, settings: Any, tmp_path: Path) -> None:
    schedule, _ = VARIANTS[name]
    with on_site(settings, tmp_path) as site:
        schedule(site)
        assert site.violations() == []


@pytest.mark.parametrize("name", VARIANTS)
def test_schedule_finds_the_variant(name: str, settings: Any, tmp_path: Path) -> None:
    schedule, variant = VARIANTS[name]
    with on_site(settings, tmp_path, variant) as site:
        schedule(site)
        assert site.violations() != []
