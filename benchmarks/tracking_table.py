"""Measure the store's memory for tracked reads: sessions times processes that have read them.

Run as:

    python -m benchmarks.tracking_table --sessions 1000000 --processes 3

The store is the benchmark's own, and gone afterwards. It is filled with logged-in sessions, which
one tracked connection after another reads, as each process of a site has one. A million sessions
take about a gigabyte, and some minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from . import filling, project
from .engines import bundled_store
from .memory import used
from .report import table

#: Sessions that are read on one trip.
_AT_ONCE = 1000


class Step(NamedTuple):
    """The tracking table after so many processes have read all sessions, by INFO of the store.

    ``items`` are its pairs of a key and a client, ``bytes`` its memory.
    """

    processes: int
    keys: int
    items: int
    bytes: int


def measure(server: Any, sessions: int, processes: int) -> Iterator[Step]:
    """Fill a store, and let one process more read all sessions in each step."""
    with server.client(socket_timeout=60.0) as store, ExitStack() as opened:
        # The table's default size is a million, and whatever is beyond it is dropped at once.
        store.config_set("tracking-table-max-keys", 0)
        filling.fill([store], range(sessions))
        before = used(store)
        for number in range(1, processes + 1):
            _read_all(opened.enter_context(_tracked(server)), sessions)
            figures = store.info()
            yield Step(
                number,
                figures["tracking_total_keys"],
                figures["tracking_total_items"],
                used(store) - before,
            )


def _tracked(server: Any) -> Any:
    # Nobody else uses its pool, so all that it sends goes over one connection.
    client = server.client(protocol=3, socket_timeout=60.0)
    client.execute_command("CLIENT", "TRACKING", "ON")
    return client


def _read_all(client: Any, sessions: int) -> None:
    from django_clustered_sessions.protocol.record import SessionKeys

    for first in range(0, sessions, _AT_ONCE):
        pipe = client.pipeline(transaction=False)
        for number in range(first, min(first + _AT_ONCE, sessions)):
            pipe.hget(SessionKeys.of("session", filling.session_key(number)).record, "m:")
        if None in pipe.execute():
            raise RuntimeError("a session is missing")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="Measure the memory of the tracking table.")
    parser.add_argument("--sessions", type=int, default=1_000_000, help="(default 1000000)")
    parser.add_argument("--processes", type=int, default=3, help="that have read each (default 3)")
    given = parser.parse_args(arguments)
    from tests.servers import StoreServer

    rows = [["processes", "sessions in the table", "MB", "bytes per session and process"]]
    with StoreServer(binary=bundled_store()) as server:
        project.configure(f"{server.url}/0", ":memory:")
        for step in measure(server, given.sessions, given.processes):
            rows.append(
                [
                    str(step.processes),
                    f"{step.keys:,}",
                    f"{step.bytes / 1e6:.1f}",
                    f"{step.bytes / step.items:.0f}",
                ]
            )
    print(table(rows))


if __name__ == "__main__":
    main()
