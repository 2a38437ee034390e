"""What each request takes of the stores' CPU when sessions are divided among k primaries.

    pip install -e '.[embedded]' --group benchmark
    python -m benchmarks.capacity

Connections to a cluster are not there yet, so the sessions are divided here, by the same hash tag
that a cluster divides them by. ``docs/capacity.md`` works out larger clusters.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, Final

from django_clustered_sessions.protocol.record import BUCKETS

from . import filling, measuring, project
from .engines import LOCKED, OURS, bundled_store, engines
from .measuring import Times, store_clock
from .primaries import OnPrimaries, Primaries
from .report import publish, surroundings, table
from .scenarios import CHANGE, READ, SLIDING

COUNTS: Final = (1, 3)
SESSIONS: Final = 1000
#: Sizes of clusters that are worked out, in primaries.
CLUSTERS: Final = (1, 3, 6, 12, 24)
#: How much of its one core a primary may be in use.
BUSY: Final = 0.6
NOTES: Final = f"""\
Worked out from the CPU time at k = {COUNTS[-1]}: each primary has a core of its own and is busy for
{BUSY:.0%} of the time, and the fullest one is the limit."""


def measure(groups: Sequence[Sequence[Any]], rounds: int, block: int) -> list[dict[str, Times]]:
    """Fill each group of servers, and measure on all groups in turn."""
    ours = {engine.name: engine for engine in engines()[0] if engine.is_ours}
    servers = [server for group in groups for server in group]
    primaries = Primaries(servers)
    clock = store_clock([server.process.pid for server in servers])
    pools, subjects = iter(primaries.pools), []
    for group in groups:
        with ExitStack() as stack:
            filling.fill(
                [stack.enter_context(server.client()) for server in group], range(SESSIONS)
            )
        its_pools = [next(pools) for _ in group]
        for engine, scenario in (
            (ours[OURS], READ),
            (ours[OURS], SLIDING),
            (ours[OURS], CHANGE),
            (ours[LOCKED], CHANGE),
        ):
            subject = OnPrimaries(engine, scenario, primaries, its_pools, range(SESSIONS))
            subject.name = f"{len(group)}:{subject.name}"
            subjects.append(subject)
    with primaries.in_use():
        for subject in subjects:
            subject.see_all()
        found = measuring.measure(subjects, clock, rounds=rounds, block=block)
    primaries.close()
    return [
        {name.partition(":")[2]: times for name, times in found.items() if name[0] == str(len(g))}
        for g in groups
    ]


def report(found: Sequence[dict[str, Times]]) -> str:
    """Return the table in Markdown."""
    first, last = found[0], found[-1]
    rows = [["CPU of all primaries per request (us)", *(f"k = {k}" for k in COUNTS), "ratio"]]
    for name in first:
        cells = [f"{median(times[name].store_cpu):.1f}" for times in found]
        rows.append(
            [name, *cells, str(measuring.ratio(last[name].store_cpu, first[name].store_cpu))]
        )
    return table(rows)


def capacity(found: Sequence[dict[str, Times]]) -> str:
    """Return what clusters of several sizes could answer, worked out, in Markdown."""
    cpu_us = {name: median(times.store_cpu) for name, times in found[-1].items()}
    cpu_us["9 sliding reads, 1 change"] = 0.9 * cpu_us[SLIDING.name] + 0.1 * cpu_us[CHANGE.name]
    rows = [["requests per second", *(f"k = {primaries}" for primaries in CLUSTERS)]]
    shares = [fullest(primaries) for primaries in CLUSTERS]
    rows.append(["share of the fullest primary", *(f"{share:.1%}" for share in shares)])
    for name, us in cpu_us.items():
        rows.append([name, *(f"{BUSY * 1e6 / us / share:,.0f}" for share in shares)])
    return table(rows)


def fullest(primaries: int) -> float:
    """Return the share of all sessions that the primary with the most buckets has."""
    buckets = Counter(filling.primary_of(bucket, primaries) for bucket in range(BUCKETS))
    return max(buckets.values()) / BUCKETS


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure with each number of primaries, print the table."""
    parser = argparse.ArgumentParser(description="Measure the stores' CPU per request.")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--block", type=int, default=60, help="requests of each kind in a round")
    parser.add_argument("--output", type=Path, help="a file for the table as well")
    given = parser.parse_args(arguments)
    from tests.servers import StoreServer

    binary = bundled_store()
    with ExitStack() as stack:
        groups = [
            [stack.enter_context(StoreServer(binary=binary)) for _ in range(count)]
            for count in COUNTS
        ]
        project.configure(f"{groups[0][0].url}/0", ":memory:")
        found = measure(groups, given.rounds, given.block)
    tables = ("## Capacity", surroundings(), report(found), NOTES, capacity(found))
    publish("\n\n".join(tables), given.output)


if __name__ == "__main__":
    main()
