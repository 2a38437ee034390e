"""Fill stores with more and more sessions, and measure what becomes slower: nothing should.

    pip install -e '.[embedded]' --group benchmark
    python -m benchmarks.scale --sessions 1000,10000,100000,1000000

Each number of sessions has a store of its own, so that all are measured in one run, in turns; the
stores are the benchmark's own, and gone afterwards. A million sessions take about half a gigabyte.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, Final

from django_clustered_sessions import registry

from . import filling, measuring, memory, project
from .engines import LOCKED, OURS, bundled_store, engines
from .measuring import Times, store_clock
from .primaries import OnPrimaries, Primaries
from .report import publish, surroundings, table
from .scenarios import CHANGE, LOGIN, READ, SLIDING

#: Sessions that the requests go to, chosen from all over a store.
SAMPLE: Final = 1000
NOTES: Final = """\
Times are medians of the rounds' means, ratios those of the same rounds, with the middle half in
brackets. Memory is what the store says it uses, less what it used when empty and what its
connections take. `sessionstats` is a process of its own, from its start to its end, Python and
Django included; its peak memory is that of the whole process. One user has ten
sessions among them, which are listed and ended again and again."""
_STATISTICS: Final = """
import sys
from pathlib import Path
from benchmarks import project
project.configure(sys.argv[1], ":memory:")
from django.core.management import call_command
call_command("sessionstats", format="json")
status = Path("/proc/self/status")
if status.exists():
    print(status.read_text().split("VmHWM:")[1].split()[0], file=sys.stderr)
"""


@dataclass
class Step:
    """What was measured with ``sessions`` in a store; memory in bytes per session."""

    sessions: int
    memory: float
    memory_of_cache_engine: float
    statistics_s: float
    statistics_bytes: float
    counted: int
    listing: list[float]
    ending: list[float]
    times: dict[str, Times] = field(default_factory=dict)


def filled(server: Any, size: int) -> Step:
    """Fill a store, weigh the sessions and have them counted."""
    numbers = range(size)
    with server.client(socket_timeout=60.0) as client:
        theirs = memory_of(client, filling.fill_like_cache_engine, client, numbers)
        ours = memory_of(client, filling.fill, [client], numbers)
        statistics = run_statistics(f"{server.url}/0")
        with project.store_at(f"{server.url}/0"):
            listing, ending = one_users(client, size)
    return Step(size, ours / size, theirs / size, *statistics, listing, ending)


def one_users(client: Any, size: int, rounds: int = 15) -> tuple[list[float], list[float]]:
    """Return the times of listing a user's ten sessions, and of ending them, in ms."""
    listing, ending = [], []
    for turn in range(rounds):
        first = size + turn * 10
        filling.fill([client], range(first, first + 10), user="somebody")
        started = time.perf_counter()
        found = registry.sessions_of("somebody")
        listed = time.perf_counter()
        ended = registry.end_sessions_of("somebody")
        if (len(found), ended) != (10, 10):
            raise RuntimeError(f"{len(found)} sessions were listed and {ended} ended, not 10")
        ending.append((time.perf_counter() - listed) * 1000)
        listing.append((listed - started) * 1000)
    return listing, ending


def memory_of(client: Any, fill: Callable[..., None], *arguments: Any) -> int:
    """Return the bytes that a store has more after ``fill``, which finds it empty."""
    client.execute_command("FLUSHALL", "SYNC")
    before = memory.used(client)
    fill(*arguments)
    return memory.used(client) - before


def run_statistics(location: str) -> tuple[float, float, int]:
    """Run sessionstats in a process; return its seconds, its largest memory, and its count."""
    before = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _STATISTICS, location], capture_output=True, text=True, check=True
    )
    took_s = time.perf_counter() - before
    kibibytes = done.stderr.split()
    peak = float(kibibytes[-1]) * 1024 if kibibytes else float("nan")
    return took_s, peak, json.loads(done.stdout)["sessions"]["total"]


def measure(steps: Sequence[Step], servers: Sequence[Any], rounds: int, block: int) -> None:
    """Measure requests on all stores in turn."""
    ours = {engine.name: engine for engine in engines()[0] if engine.is_ours}
    primaries = Primaries(servers)
    subjects = []
    for step, pool in zip(steps, primaries.pools, strict=True):
        numbers = Random(4).sample(range(step.sessions), min(SAMPLE, step.sessions))
        for engine, scenario in (
            (ours[OURS], READ),
            (ours[OURS], SLIDING),
            (ours[OURS], CHANGE),
            (ours[LOCKED], CHANGE),
            (ours[OURS], LOGIN),
        ):
            subject = OnPrimaries(engine, scenario, primaries, [pool], numbers)
            subject.name = f"{step.sessions}:{subject.name}"
            subjects.append(subject)
    clock = store_clock([server.process.pid for server in servers])
    with primaries.in_use():
        for subject in subjects:
            subject.see_all()
        found = measuring.measure(subjects, clock, rounds=rounds, block=block)
    primaries.close()
    for step in steps:
        for name, times in found.items():
            size, _, scenario_name = name.partition(":")
            if int(size) == step.sessions:
                step.times[scenario_name] = times


def report(steps: Sequence[Step]) -> str:
    """Return the table in Markdown."""
    first = steps[0].times
    rows = [["sessions", *(f"{step.sessions:,}" for step in steps)]]
    for name, base in first.items():
        each = [step.times[name] for step in steps]
        rows += [
            [f"{name} (us)", *(f"{median(times.wall):.0f}" for times in each)],
            ["beside the first", *(str(measuring.ratio(times.wall, base.wall)) for times in each)],
            ["store CPU (us)", *(f"{median(times.store_cpu):.1f}" for times in each)],
        ]
    rows += [
        ["bytes per session, index included", *(f"{step.memory:.0f}" for step in steps)],
        ["bytes, Django's cache engine", *(f"{step.memory_of_cache_engine:.0f}" for step in steps)],
        ["ratio", *(f"{step.memory / step.memory_of_cache_engine:.2f}" for step in steps)],
        ["list a user's sessions (ms)", *(f"{median(step.listing):.1f}" for step in steps)],
        ["end a user's sessions (ms)", *(f"{median(step.ending):.1f}" for step in steps)],
        ["sessionstats (s)", *(f"{step.statistics_s:.2f}" for step in steps)],
        ["sessionstats, peak memory (MB)", *(f"{s.statistics_bytes / 1e6:.0f}" for s in steps)],
        ["sessionstats counted", *(f"{step.counted:,}" for step in steps)],
    ]
    return table(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill, measure, print the table."""
    parser = argparse.ArgumentParser(description="Measure with more and more sessions.")
    parser.add_argument("--sessions", default="1000,10000,100000,1000000", metavar="N,N,...")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--block", type=int, default=40, help="requests of each kind in a round")
    parser.add_argument("--output", type=Path, help="a file for the table as well")
    given = parser.parse_args(arguments)
    from tests.servers import StoreServer

    binary = bundled_store()
    sizes = [int(size) for size in given.sessions.split(",")]
    with ExitStack() as stack:
        servers = [stack.enter_context(StoreServer(binary=binary)) for _ in sizes]
        project.configure(f"{servers[0].url}/0", ":memory:")
        steps = []
        for server, size in zip(servers, sizes, strict=True):
            print(f"filling: {size:,} sessions", file=sys.stderr, flush=True)
            steps.append(filled(server, size))
        measure(steps, servers, given.rounds, given.block)
    publish("\n\n".join(("## Scale", surroundings(), report(steps), NOTES)), given.output)


if __name__ == "__main__":
    main()
