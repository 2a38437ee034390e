"""Measure what synchronous writes cost, and what is lost without them when a primary dies.

    pip install -e '.[embedded]' --group benchmark
    python -m benchmarks.sync_writes

Prints the tables of ``docs/sync-writes.md``. The cost is that of a commit of one key to a primary
with one replica on the same machine, with and without waiting for it, in turns; the ratio is the
median of the ratios of ``--rounds`` blocks.

For the loss, threads count in sessions of their own. Then the primary is killed, all that was still
on its way to the replica is dropped, as where a machine dies, and the replica is made the primary.
Lost is what a save had returned for and the replica does not have.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final, NamedTuple

import django
from django.conf import settings

THREADS: Final = 8
BLOCK: Final = 100
#: How far the replica is away, there and back, in ms; 0 is without a proxy.
DISTANCES_MS: Final = (0.0, 1.0, 10.0)


class Loss(NamedTuple):
    """What became of the writes of one round, and of the sessions that were ended."""

    acknowledged: int
    lost: int
    ended: int
    back: int


def configure() -> None:
    """Set Django up; each measurement names its store."""
    settings.configure(
        SECRET_KEY="for a benchmark",
        USE_TZ=True,
        INSTALLED_APPS=["django_clustered_sessions"],
        CLUSTERED_SESSIONS_NODE_NAME="benchmark",
    )
    django.setup()


@contextmanager
def stores(distance_ms: float) -> Iterator[tuple[Any, Any, Callable[[], None]]]:
    """Give a primary, its replica, and how to end the one with all that is on its way."""
    from django_clustered_sessions.embedded import bundled_binary
    from tests.servers import StoreServer, free_port, wait_for
    from tests.topologies import follows

    binary = bundled_binary()
    if binary is None:
        raise SystemExit("The benchmark needs the extra 'benchmark'.")
    with ExitStack() as stack:
        primary = stack.enter_context(StoreServer(binary=binary))
        port, dying = primary.port, [primary.process]
        if distance_ms:
            port = free_port()
            command = [sys.executable, "-m", "benchmarks.delay", str(primary.port), str(port)]
            proxy = subprocess.Popen(
                [*command, str(distance_ms)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            stack.enter_context(proxy)
            stack.callback(proxy.kill)
            assert proxy.stdout is not None
            proxy.stdout.readline()
            dying.insert(0, proxy)
        replica = StoreServer("--replicaof", f"127.0.0.1 {port}", binary=binary)
        stack.enter_context(replica)
        wait_for(lambda: follows(replica), "the replica follows", timeout_s=60.0)

        def die() -> None:
            for process in dying:
                process.kill()

        yield primary, replica, die


@contextmanager
def using(server: Any, replicas: int) -> Iterator[None]:
    """Let sessions be stored there, each write acknowledged by so many replicas."""
    from django.test import override_settings

    entry = {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": f"{server.url}/0"}
    with override_settings(CACHES={"default": entry}, CLUSTERED_SESSIONS_SYNC_REPLICAS=replicas):
        yield


def cost(rounds: int) -> list[tuple[float, float]]:
    """Return the time of a commit without and with waiting, in ms, for each round."""
    from django_clustered_sessions.backend import SessionStore

    found = []
    with stores(0.0) as (primary, _, _):
        for _ in range(rounds + 1):
            times = []
            for replicas in (0, 1):
                with using(primary, replicas):
                    session = SessionStore()
                    session.create()
                    started = time.perf_counter()
                    for number in range(BLOCK):
                        session["n"] = number
                        session.save()
                    times.append((time.perf_counter() - started) * 1000 / BLOCK)
            found.append((times[0], times[1]))
    # The first round connects, and makes the scripts known.
    return found[1:]


def loss(distance_ms: float, replicas: int, seconds: float) -> Loss:
    """Write for so long, kill the primary, and count on the replica."""
    from django_clustered_sessions.backend import SessionStore
    from django_clustered_sessions.exceptions import ClusteredSessionError

    is_over = threading.Event()
    counts: dict[str, int] = {}
    ended: list[str] = []

    def count() -> None:
        session = SessionStore()
        session.create()
        key = session.session_key or ""
        while not is_over.is_set():
            try:
                session.increment("hits")
                session.save()
                counts[key] = counts.get(key, 0) + 1
            except ClusteredSessionError:
                return

    def come_and_go() -> None:
        while not is_over.is_set():
            try:
                session = SessionStore()
                session.create()
                key = session.session_key or ""
                session.flush()
                ended.append(key)
            except ClusteredSessionError:
                return

    with stores(distance_ms) as (primary, replica, die):
        with using(primary, replicas):
            threads = [threading.Thread(target=count) for _ in range(THREADS - 1)]
            threads.append(threading.Thread(target=come_and_go))
            for thread in threads:
                thread.start()
            time.sleep(seconds)
            die()
            is_over.set()
            for thread in threads:
                thread.join()
        with replica.client() as client:
            client.replicaof("NO", "ONE")
        with using(replica, 0):
            lost = sum(
                max(count - int(SessionStore(key).get("hits", 0)), 0)
                for key, count in counts.items()
            )
            back = sum(SessionStore().exists(key) for key in ended)
    return Loss(sum(counts.values()), lost, len(ended), back)


def main() -> None:
    """Measure both, and print the tables."""
    parser = argparse.ArgumentParser(description="Measure synchronous writes.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--kills", type=int, default=5, help="primaries killed for each row")
    parser.add_argument("--seconds", type=float, default=1.0, help="of writing before each")
    parser.add_argument("--distances", type=float, nargs="+", default=DISTANCES_MS, metavar="MS")
    options = parser.parse_args()
    configure()
    times = cost(options.rounds)
    without, with_ = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = sorted(one / other for other, one in times)
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    print("| a commit | |\n|---|---|")
    print(f"| without waiting | {without:.2f} ms |\n| `SYNC_REPLICAS = 1` | {with_:.2f} ms |")
    print(f"| ratio | {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f}) |\n")
    print("| replica away | `SYNC_REPLICAS` | saves | lost | logouts | undone |")
    print("|---|---|---|---|---|---|")
    for distance_ms in options.distances:
        for replicas in (0, 1):
            found = [loss(distance_ms, replicas, options.seconds) for _ in range(options.kills)]
            saves, lost, ended, back = (sum(column) for column in zip(*found, strict=True))
            row = f"{distance_ms:g} ms | {replicas} | {saves:,} | {lost:,} | {ended:,} | {back:,}"
            print(f"| {row} |", flush=True)


if __name__ == "__main__":
    main()
