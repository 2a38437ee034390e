"""Measure a trip to the store beside the same bytes on a bare socket.

    python -m benchmarks.trip
    python -m benchmarks.trip --rounds 200

The trip is that of a plain read, HGETALL of a small record and TIME, on the bundled store, in one
process and over connections that are open. Beside it the same bytes go over a socket, and the reply
into hiredis, with no code between; under asyncio over a transport with a protocol of a few lines,
and over the streams of asyncio. The blocks take turns, so that a busy machine slows all of them.
The table has the median of the ratios of the rounds, their quartiles in brackets, of the time and
of the processor time of this process.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import hiredis

from . import project
from .engines import OURS, bundled_store, engines
from .report import table
from .scenarios import LOGGED_IN

BLOCK: Final = 100
SECONDS: Final = 2.0

#: Time and processor time of a block, in seconds.
Took = tuple[float, float]


def timed(ask: Callable[[], Any]) -> Took:
    """Return what a block of calls takes."""
    began, used = time.perf_counter(), time.process_time()
    for _ in range(BLOCK):
        ask()
    return time.perf_counter() - began, time.process_time() - used


async def atimed(ask: Callable[[], Awaitable[Any]]) -> Took:
    """See timed()."""
    began, used = time.perf_counter(), time.process_time()
    for _ in range(BLOCK):
        await ask()
    return time.perf_counter() - began, time.process_time() - used


def bare_socket(address: tuple[str, int], data: bytes, count: int) -> Callable[[], list[Any]]:
    """Return a function that sends bytes and reads so many replies, and does nothing else."""
    connection, reader = socket.create_connection(address), hiredis.Reader()
    connection.settimeout(SECONDS)
    buffer = bytearray(64 * 1024)

    def ask() -> list[Any]:
        connection.sendall(data)
        found: list[Any] = []
        while len(found) < count:
            reader.feed(buffer, 0, connection.recv_into(buffer))
            while (reply := reader.gets()) is not False:
                found.append(reply)
        return found

    return ask


class BareProtocol(asyncio.Protocol):
    """A protocol that collects replies, and does nothing else."""

    def __init__(self) -> None:
        self.reader = hiredis.Reader()
        self.found: list[Any] = []
        self.count = 0
        self.waiter: asyncio.Future[list[Any]] | None = None

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        self.reader.feed(data)
        while (reply := self.reader.gets()) is not False:
            self.found.append(reply)
        if self.waiter is not None and len(self.found) >= self.count:
            self.waiter.set_result(self.found)


async def bare_protocol(
    address: tuple[str, int], data: bytes, count: int
) -> Callable[[], Awaitable[list[Any]]]:
    """See bare_socket(); over a transport of the event loop."""
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_connection(BareProtocol, *address)

    async def ask() -> list[Any]:
        protocol.found, protocol.count, protocol.waiter = [], count, loop.create_future()
        transport.write(data)
        return await protocol.waiter

    return ask


async def bare_streams(
    address: tuple[str, int], data: bytes, count: int
) -> Callable[[], Awaitable[list[Any]]]:
    """See bare_socket(); over the streams of asyncio."""
    incoming, outgoing = await asyncio.open_connection(*address)
    reader = hiredis.Reader()

    async def ask() -> list[Any]:
        outgoing.write(data)
        found: list[Any] = []
        while len(found) < count:
            reader.feed(await incoming.read(64 * 1024))
            while (reply := reader.gets()) is not False:
                found.append(reply)
        return found

    return ask


def ratio(own: Sequence[Took], other: Sequence[Took]) -> list[str]:
    """Return the ratios of time and of processor time, as cells of a table."""
    cells = []
    for which in (0, 1):
        ratios = [one[which] / two[which] for one, two in zip(own, other, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
    return cells


def measure(address: tuple[str, int], rounds: int) -> Mapping[str, list[str]]:
    """Return for each comparison the ratio of the package's trip to the bare one."""
    from django.conf import settings

    from django_clustered_sessions.conf import conf
    from django_clustered_sessions.protocol.commands import records
    from django_clustered_sessions.protocol.record import SessionKeys
    from django_clustered_sessions.store import connections
    from django_clustered_sessions.store.attempt import pack
    from django_clustered_sessions.store.exchange import aperform, perform

    key = next(one for one in engines()[0] if one.name == OURS).save(LOGGED_IN)
    assert settings.configured
    trip = records.read(SessionKeys.of(conf.key_prefix, key))
    pool: Any = connections.pool()
    data, count = b"".join(pack(trip, pool)), len(trip)
    bare = bare_socket(address, data, count)
    blocks: dict[str, list[Took]] = {"own": [], "socket": []}
    for _ in range(rounds):
        blocks["own"].append(timed(lambda: perform(trip, pool, SECONDS)))
        blocks["socket"].append(timed(bare))

    async def under_asyncio() -> None:
        apool: Any = connections.apool()
        others = {
            "protocol": await bare_protocol(address, data, count),
            "streams": await bare_streams(address, data, count),
        }
        for name in ("async", *others):
            blocks[name] = []
        for _ in range(rounds):
            blocks["async"].append(await atimed(lambda: aperform(trip, apool, SECONDS)))
            for name, ask in others.items():
                blocks[name].append(await atimed(ask))

    asyncio.run(under_asyncio())
    return {
        "socket": ratio(blocks["own"], blocks["socket"]),
        "asyncio, protocol": ratio(blocks["async"], blocks["protocol"]),
        "asyncio, streams": ratio(blocks["async"], blocks["streams"]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="Measure a trip beside bare sockets.")
    parser.add_argument("--rounds", type=int, default=100, help="blocks of each (default 100)")
    given = parser.parse_args(arguments)
    from tests.servers import StoreServer

    with StoreServer(binary=bundled_store()) as server:
        # Database 0, so that a bare socket need not be told.
        project.configure(f"{server.url}/0", ":memory:")
        found = measure(("127.0.0.1", server.port), given.rounds)
    rows = [["a trip beside", "time", "processor time"]]
    print(table(rows + [[name, *cells] for name, cells in found.items()]))


if __name__ == "__main__":
    main()
