"""Measure this package beside what it replaces: one run, one Markdown report.

    pip install -e '.[embedded]' --group benchmark
    python -m benchmarks --output report.md --plot benchmark.svg

The hand-off of a contended lock has a benchmark of its own, ``python -m benchmarks.hand_off``,
and so has a store with up to a million sessions, ``python -m benchmarks.scale``.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

from . import at_once, behaviour, measuring, memory, project, scenarios, traffic
from .delay import DELAYS_MS, delayed, distance
from .engines import BASE, BareRoundTrips, Engine, NoSession, Requests, bundled_store, engines
from .measuring import store_clock
from .report import at_once_table, publish, scenario_table, surroundings, table
from .scenarios import Scenario
from .targets import COMPACT, DEFAULTS, TRIPS, Results, Target, targets

EXPLANATION: Final = f"""\
**What is timed** is one call of the session middleware with a request that is ready: middleware,
engine, client, the way to the store and back, and a view that uses the session as the scenario
says and makes an empty response. *Session code* is that less *no session*: the same view called
without a middleware, with a dict for a session. Everything runs in one thread of one process, on
connections that are open; garbage is collected between blocks only.

**A ratio** is the median of the ratios of the rounds, with the middle half of them in brackets; a
round's figure is the mean of its block of requests. In each round everything that is compared has
its block, in random order. *{BASE}* is `django.contrib.sessions.backends.cache` on django-redis as
it comes. *Bare round trips* are as many as ours has, by redis-py on a connection that is held: GET
and SETEX of a key with the same session, pickled.

**CPU**: of the client by `time.process_time`, of the store by the kernel's account of its process.
**Round trips and bytes** were counted by a proxy in a run of their own; statements to a database
count as round trips, those that begin and end a transaction too.

The hand-off of a lock is measured by `python -m benchmarks.hand_off`, many sessions by
`python -m benchmarks.scale`."""


class Size(NamedTuple):
    """How much is measured: rounds, requests of a block, sessions in turn.

    ``counted`` requests of each kind are counted by the proxy; ``additions`` are those of a thread.
    """

    rounds: int
    block: int
    sessions: int
    large_sessions: int
    at_once: tuple[int, ...]
    memory_sessions: int
    counted: int
    additions: int


FULL: Final = Size(60, 40, 1000, 60, (1, 50, 500), 5000, 9, 25)
QUICK: Final = Size(8, 20, 200, 40, (1, 50), 2000, 3, 25)


class Benchmark:
    """One run on one store."""

    def __init__(self, server: Any, size: Size) -> None:
        self.server = server
        self.size = size
        self.location = f"{server.url}/0"
        self.engines, self.missing = engines()
        self.on_store = [engine for engine in self.engines if not engine.has_database]
        self.results = Results()
        self._store_cpu = store_clock([server.process.pid])

    def near(self) -> None:
        """Measure every scenario beside the store."""
        for scenario in scenarios.ALL:
            progress(scenario.name)
            self.results.near[scenario.name] = self._measure(
                scenario, self.engines, self.location, self.size.rounds
            )

    def far(self, location: str, delay_ms: float) -> None:
        """Measure some scenarios through a delaying proxy."""
        found = self.results.far[delay_ms] = {}
        with project.store_at(location):
            for scenario in scenarios.FAR:
                progress(f"{scenario.name}, {delay_ms:g} ms from the store")
                found[scenario.name] = self._measure(
                    scenario, self.on_store, location, max(self.size.rounds // 4, 2)
                )

    def many_at_once(self) -> None:
        """Measure asynchronous requests."""
        for scenario in scenarios.ASYNC:
            for count in self.size.at_once:
                progress(f"{scenario.name}, ASGI, {count} at once")
                sessions = max(self.size.sessions, count)
                subjects = [
                    NoSession(scenario),
                    *self._requests(scenario, self.on_store, sessions),
                ]
                self.results.at_once[scenario.name, count] = at_once.measure(
                    subjects,
                    self._store_cpu,
                    rounds=max(self.size.rounds // 4, 2),
                    # More than begin at once after the pause in which the others had their turn.
                    block=max(self.size.block, 2 * count),
                    at_once=count,
                    sessions=sessions,
                )

    def count(self, proxy: Any) -> dict[str, list[str]]:
        """Count round trips and bytes; return rows of what else shows only through a proxy."""
        from django.test import override_settings

        progress("round trips, lost updates, a store that is away")
        # A copy serves the next request, also where the machine is slow.
        patient = override_settings(CLUSTERED_SESSIONS_NEAR_MAX_AGE=60.0)
        with project.store_at(f"{proxy.url}/0"), patient:
            for scenario in scenarios.ALL:
                self.results.traffic[scenario.name] = {
                    engine.name: traffic.count(engine, scenario, proxy, self.size.counted)
                    for engine in self.engines
                }
            updates = behaviour.THREADS * self.size.additions
            return {
                f"{updates} additions by {behaviour.THREADS} threads leave": [
                    str(behaviour.additions_left(engine, self.size.additions))
                    for engine in self.engines
                ],
                "store away, visitor logged in": [
                    behaviour.answer_without_store(engine, proxy) if engine.has_store else "-"
                    for engine in self.engines
                ],
            }

    def weigh(self, servers: dict[str, Any]) -> None:
        """Measure memory on servers of their own, by what those are started with."""
        progress("memory")
        for name, server in servers.items():
            self.results.memory[name] = memory.measure(
                self.on_store, server, self.size.memory_sessions
            )

    def _measure(
        self, scenario: Scenario, chosen: Sequence[Engine], location: str, rounds: int
    ) -> dict[str, measuring.Times]:
        sessions = self.size.large_sessions if scenario.is_large else self.size.sessions
        subjects: list[Any] = [
            NoSession(scenario),
            *self._requests(scenario, chosen, sessions),
        ]
        if scenario.floor:
            subjects.append(BareRoundTrips(scenario, location))
        block = min(self.size.block, sessions - measuring.UNCOUNTED)
        return measuring.measure(subjects, self._store_cpu, rounds=rounds, block=block)

    def _requests(
        self, scenario: Scenario, chosen: Sequence[Engine], sessions: int
    ) -> Iterator[Requests]:
        for engine in chosen:
            requests = Requests(engine, scenario, sessions)
            requests.see_all()
            yield requests


def sections(
    run: Benchmark, rows: dict[str, list[str]], pings_ms: Mapping[float, float]
) -> Iterator[str]:
    """Return the report, piece by piece; ``pings_ms`` are the times of a PING, by delay in ms."""
    found = run.results
    yield f"# Benchmark\n\n{surroundings()}"
    yield "".join(f"Left out: {reason}." for reason in run.missing)
    yield EXPLANATION
    yield "## Targets\n\n" + targets_table(list(targets(found)))
    yield "## Beside other engines\n\n" + overview(run, rows)
    for name, times in found.near.items():
        yield f"## {name}\n\n" + scenario_table(times, found.traffic[name])
    yield "## On a network\n\nThrough a delaying proxy, which stands for a network."
    for delay_ms, each in found.far.items():
        for name, times in each.items():
            yield (
                f"### {name}, {delay_ms:g} ms there and back\n\n"
                f"A bare PING takes {pings_ms[delay_ms]:.2f} ms.\n\n" + scenario_table(times, {})
            )
    yield (
        "## ASGI\n\nEach request is a task of its own with a thread of its own for synchronous "
        "code, as Django's handler runs it. Engines with a database are left out: what would be "
        "measured is a new connection to it for each thread. All others may open as many "
        "connections to the store as there are requests at once; by default redis-py refuses the "
        "101st, and django-redis passes that on."
    )
    for (name, count), times in found.at_once.items():
        yield f"### {name}, {count} at once\n\n" + at_once_table(times)


def targets_table(all_targets: Sequence[Target]) -> str:
    """Return the table of targets."""
    rows = [["", "target", "measured", "reached"]]
    for target in all_targets:
        rows.append(
            [
                target.name,
                f"{target.limit:g}",
                f"{target.measured:.3g}"
                if isinstance(target.measured, float)
                else str(target.measured),
                "yes" if target.is_reached else "**no**",
            ]
        )
    return table(rows)


def overview(run: Benchmark, more: dict[str, list[str]]) -> str:
    """Return what engines cost and do, an engine a column."""
    found = run.results
    names = [engine.name for engine in run.engines]
    rows = [["", *names]]
    for scenario in TRIPS:
        counted = found.traffic[scenario]
        rows.append([f"round trips: {scenario}", *(str(counted[name].trips) for name in names)])
    rows += [[what, *cells] for what, cells in more.items()]
    for server, contents in found.memory.items():
        for content, each in contents.items():
            cells = [f"{each[name]:.0f}" if name in each else "-" for name in names]
            rows.append([f"bytes: {content}, hash-max-listpack-value {server}", *cells])
    return table(rows)


def progress(what: str) -> None:
    """Say what is measured now."""
    print(f"measuring: {what}", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure engines.")
    parser.add_argument("--quick", action="store_true", help="a short run, and less sure")
    parser.add_argument("--output", type=Path, help="a file for the report as well")
    parser.add_argument("--plot", type=Path, help="a file for a plot, such as benchmark.svg")
    parser.add_argument("--rounds", type=int, help="rounds, two at least")
    parser.add_argument("--block", type=int, help="requests of each engine in a round")
    parser.add_argument("--sessions", type=int, help="sessions of each engine")
    parser.add_argument("--at-once", help="asynchronous requests at once: 1,50,500")
    return parser.parse_args(arguments)


def size_of(given: argparse.Namespace) -> Size:
    """Return how much is to be measured."""
    size = QUICK if given.quick else FULL
    if given.rounds:
        size = size._replace(rounds=given.rounds)
    if given.block:
        size = size._replace(block=given.block)
    if given.sessions:
        size = size._replace(
            sessions=given.sessions,
            large_sessions=min(given.sessions, size.large_sessions),
            memory_sessions=min(given.sessions * 5, size.memory_sessions),
            additions=min(given.sessions, size.additions),
        )
    if given.at_once:
        size = size._replace(at_once=tuple(int(count) for count in given.at_once.split(",")))
    return size


@contextmanager
def many_files() -> Iterator[None]:
    """Allow as many connections at once as the machine does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the report, draw the plot."""
    from tests.servers import CountingProxy, StoreServer, free_port

    given = parse(arguments)
    binary = bundled_store()
    if given.plot and find_spec("matplotlib") is None:
        raise SystemExit('--plot needs matplotlib, which the extra "benchmark" brings.')
    with (
        many_files(),
        tempfile.TemporaryDirectory() as folder,
        StoreServer("--hash-max-listpack-value", COMPACT, binary=binary) as server,
        StoreServer("--hash-max-listpack-value", COMPACT, binary=binary) as compact,
        StoreServer("--hash-max-listpack-value", DEFAULTS, binary=binary) as defaults,
    ):
        project.configure(f"{server.url}/0", f"{folder}/db.sqlite3")
        project.create_tables()
        run = Benchmark(server, size_of(given))
        run.near()
        run.many_at_once()
        pings_ms = {}
        for delay_ms in DELAYS_MS:
            port = free_port()
            with delayed(server.port, port, delay_ms):
                far = f"redis://127.0.0.1:{port}/0"
                pings_ms[delay_ms] = distance(far)
                run.far(far, delay_ms)
        with CountingProxy(server.port) as proxy:
            rows = run.count(proxy)
        run.weigh({DEFAULTS: defaults, COMPACT: compact})
        publish("\n\n".join(filter(None, sections(run, rows, pings_ms))), given.output)
    if given.plot:
        from .plot import draw

        draw(list(targets(run.results)), given.plot)


if __name__ == "__main__":
    main()
