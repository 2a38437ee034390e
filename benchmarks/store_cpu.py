"""Measure the store's CPU time for each request, beside Django's cache engine on django-redis.

    pip install -e .[benchmark]
    python -m benchmarks.store_cpu

Prints two tables: one request at a time, with a gap after each trip as long as a process needs to
go on (the store's processor has forgotten the script by then), and many connections at once. The
trips are those of the package, made by its own builders, and sent without the rest of it: what a
request costs the process is not measured here. Each kind of request has sessions of its own, which
take turns: a session that is written a hundred times a second is nobody's.

**CPU** is the kernel's account of the store's process, reading and writing sockets included;
**commands** is the store's own account of the commands alone. All are measured in one run, in
turns; ratios are those of the same rounds, with the middle half in brackets.
"""

from __future__ import annotations

import argparse
import pickle
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from random import sample
from statistics import median
from typing import Any, Final

import hiredis

from django_clustered_sessions.protocol.changes import Change, Changes, Operation
from django_clustered_sessions.protocol.commands import lock_queue, records
from django_clustered_sessions.protocol.effects import Call
from django_clustered_sessions.protocol.options import (
    NO_LOCK,
    Expiry,
    Fence,
    LockOptions,
    WriteOptions,
)
from django_clustered_sessions.protocol.record import NOBODY, Ages, Mode, SessionKeys

from . import measuring
from .engines import bundled_store
from .measuring import Times, store_clock
from .report import table

GAP_S: Final = 0.0002
AT_ONCE: Final = 50
AGE_MS: Final = 14 * 24 * 3600 * 1000
WRITING: Final = WriteOptions(Ages(AGE_MS), 1 << 20, 4000, "merge")
LOCKING: Final = LockOptions(10_000, 8000, 120_000, 16, b"web-1 POST shop/cart/<int:item>/")
USER: Final = b"user tag"
SESSION: Final = {
    "_auth_user_id": "12345",
    "_auth_user_backend": "django.contrib.auth.backends.ModelBackend",
    "_auth_user_hash": "8f" * 32,
    "cart": {"tea": 2, "milk": 1, "sugar": 3},
    "visits": 12,
}
FIELDS: Final = [(b"d:" + name.encode(), b"s" + repr(SESSION[name]).encode()) for name in SESSION]

#: The trips of a request, each a list of commands; it is sent the replies.
Trips = Generator[list[tuple[Any, ...]], list[Any], None]


def command(call: Call) -> tuple[Any, ...]:
    """Return a call as the words that are sent."""
    if call.script is None:
        name, *rest = call.arguments
        return (name, *call.keys, *rest)
    name, sha = call.script.by_sha
    return (name, sha, len(call.keys), *call.keys, *call.arguments)


def token() -> bytes:
    """Return a new version."""
    return secrets.token_bytes(8)


class Visitor:
    """One of our sessions, as its visitor's next request finds it."""

    def __init__(self) -> None:
        self.keys = SessionKeys.of("session", secrets.token_hex(16))
        self.version = self.field_version = token()

    def stored(self, user: bytes = USER) -> Trips:
        """Store the session, as the first write of a new one does."""
        yield [command(_create(self.keys, self.version, user))]

    def read(self) -> Trips:
        yield [*map(command, records.read(self.keys))]

    def read_near(self) -> Trips:
        yield [*map(command, records.fetch(self.keys, self.version))]

    def sliding(self) -> Trips:
        touch = records.touch(self.keys, WRITING)
        yield [*map(command, (touch, *records.read(self.keys)))]

    def change(self) -> Trips:
        yield from self.read()
        yield [self._commit(NO_LOCK)]

    def count(self) -> Trips:
        yield from self.read()
        self.version = token()
        increment = Change(Operation.ADD, b"d:hits", b"", b"1")
        yield [command(_commit(self.keys, self.version, increment, NO_LOCK))]

    def locked_change(self) -> Trips:
        owner = secrets.token_hex(8)
        take = lock_queue.acquire(self.keys, owner, LOCKING, 10_000)
        yield [*map(command, (take, *records.read(self.keys)))]
        yield [self._commit(Fence(owner, release=True))]

    def locked_read(self) -> Trips:
        owner = secrets.token_hex(8)
        take = lock_queue.acquire(self.keys, owner, LOCKING, 10_000)
        yield [*map(command, (take, *records.read(self.keys)))]
        yield [command(lock_queue.release(self.keys, owner))]

    def create(self) -> Trips:
        yield from Visitor().stored(NOBODY)

    def login(self) -> Trips:
        visitor, new = Visitor(), SessionKeys.of("session", secrets.token_hex(16))
        yield from visitor.stored(NOBODY)
        yield [*map(command, records.read(visitor.keys))]
        yield [command(records.rotate(visitor.keys, new, token(), WRITING))]
        field = Change(Operation.SET, b"d:_auth_user_id", visitor.version, b"s'12345'")
        commit = _commit(new, token(), field, NO_LOCK, user=USER)
        yield [command(commit)]

    def _commit(self, fence: Fence) -> tuple[Any, ...]:
        loaded, self.version = self.field_version, token()
        self.field_version = self.version
        field = Change(Operation.SET, b"d:visits", loaded, b"s13")
        return command(_commit(self.keys, self.version, field, fence))


def _create(keys: SessionKeys, version: bytes, user: bytes) -> Call:
    return records.create(keys, version, Expiry(Mode.DEFAULT, 0), FIELDS, WRITING, user)


def _commit(
    keys: SessionKeys, version: bytes, field: Change, fence: Fence, user: bytes = b""
) -> Call:
    return records.commit(keys, version, None, Changes((field,), False), WRITING, fence, user)


class CacheEngineVisitor:
    """The same with the commands of Django's cache engine on django-redis."""

    def __init__(self) -> None:
        self.key = f":1:django.contrib.sessions.cache{secrets.token_hex(16)}"
        self.value = pickle.dumps(SESSION, pickle.HIGHEST_PROTOCOL)

    def _set(self, *how: str) -> list[tuple[Any, ...]]:
        return [("SET", self.key, self.value, "PX", AGE_MS, *how)]

    def stored(self) -> Trips:
        yield [("EXISTS", self.key)]
        yield self._set("NX")

    def read(self) -> Trips:
        yield [("GET", self.key)]

    def change(self) -> Trips:
        yield [("GET", self.key)]
        yield [("GET", self.key)]
        yield self._set("XX")

    def create(self) -> Trips:
        yield from CacheEngineVisitor().stored()

    def login(self) -> Trips:
        visitor, new = CacheEngineVisitor(), CacheEngineVisitor()
        yield from visitor.stored()
        yield [("GET", visitor.key)]
        yield from new.stored()
        yield [("DEL", visitor.key)]
        yield [("GET", new.key)]
        yield new._set("XX")


#: A kind of request: how the cache engine does it, and how we do.
KINDS: Final[dict[str, tuple[Any, dict[str, Any]]]] = {
    "read": (CacheEngineVisitor.read, {"": Visitor.read, "by fetch.lua": Visitor.read_near}),
    "sliding read": (CacheEngineVisitor.change, {"": Visitor.sliding}),
    "change": (
        CacheEngineVisitor.change,
        {"": Visitor.change, "locked": Visitor.locked_change, "counter": Visitor.count},
    ),
    "locked read": (CacheEngineVisitor.read, {"": Visitor.locked_read}),
    "create": (CacheEngineVisitor.create, {"": Visitor.create}),
    "create and login": (CacheEngineVisitor.login, {"": Visitor.login}),
}


class Line:
    """A connection; nothing of a client's own beside a socket and hiredis."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._socket = socket.create_connection(address)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = hiredis.Reader()

    def send(self, trip: Sequence[tuple[Any, ...]]) -> None:
        self._socket.sendall(b"".join(map(hiredis.pack_command, trip)))

    def receive(self, count: int) -> list[Any]:
        """Return so many replies. Raises the first that is an error."""
        replies: list[Any] = []
        while len(replies) < count:
            while (reply := self._reader.gets()) is False:
                self._reader.feed(self._socket.recv(1 << 16))
            if isinstance(reply, Exception):
                raise reply
            replies.append(reply)
        return replies


def one_by_one(lines: Sequence[Line], requests: Sequence[Trips], gap_s: float) -> Counter[str]:
    """Do requests one after the other on one connection; return the commands by name."""
    line, sent = lines[0], Counter[str]()
    for request in requests:
        trip = next(request, None)
        while trip:
            sent.update(words[0] for words in trip)
            line.send(trip)
            replies = line.receive(len(trip))
            until = time.perf_counter() + gap_s
            # Busy, as a process is that goes on with its request.
            while time.perf_counter() < until:
                pass
            trip = _next(request, replies)
    return sent


def at_once(lines: Sequence[Line], requests: Sequence[Trips], gap_s: float) -> Counter[str]:
    """Do requests, as many at once as there are connections; return the commands by name."""
    sent, left = Counter[str](), list(requests)
    while left:
        now, left = left[: len(lines)], left[len(lines) :]
        trips = [(line, request, next(request)) for line, request in zip(lines, now, strict=False)]
        while trips:
            for line, _, trip in trips:
                sent.update(words[0] for words in trip)
                line.send(trip)
            answered = [(line, one, line.receive(len(trip))) for line, one, trip in trips]
            following = [(line, one, _next(one, replies)) for line, one, replies in answered]
            trips = [(line, one, trip) for line, one, trip in following if trip]
    return sent


def _next(request: Trips, replies: list[Any]) -> list[tuple[Any, ...]] | None:
    try:
        return request.send(replies)
    except StopIteration:
        return None


def commands_us(line: Line, sent: Counter[str]) -> float:
    """Return the store's time in these commands since CONFIG RESETSTAT, as it says."""
    line.send([("INFO", "commandstats")])
    total = 0.0
    for row in line.receive(1)[0].decode().split():
        name, _, figures = row.partition(":")
        count = sent[name.removeprefix("cmdstat_").upper()]
        if count:
            total += count * float(figures.split("usec_per_call=")[1].split(",")[0])
    return total


def measure(
    address: tuple[str, int],
    cpu: Callable[[], float],
    how: Callable[[Sequence[Line], Sequence[Trips], float], Counter[str]],
    rounds: int,
    block: int,
    sessions: int,
) -> dict[tuple[str, str | None], Times]:
    """Measure every kind of request in turns: (kind, which of ours, None for the engine).

    ``wall`` has the store's own account of the commands, in us.
    """
    lines = [Line(address) for _ in range(AT_ONCE)]
    subjects: dict[tuple[str, str | None], Iterator[Trips]] = {}
    for kind, (theirs, ours) in KINDS.items():
        subjects[kind, None] = _in_turns(lines, CacheEngineVisitor, theirs, sessions)
        for name, each in ours.items():
            subjects[kind, name] = _in_turns(lines, Visitor, each, sessions)
    found = {subject: Times() for subject in subjects}
    for number in range(-2, rounds):
        for subject in sample(list(subjects), len(subjects)):
            requests = [next(subjects[subject]) for _ in range(block)]
            lines[0].send([("CONFIG", "RESETSTAT")])
            lines[0].receive(1)
            before_us = cpu()
            sent = how(lines, requests, GAP_S)
            after_us = cpu()
            if number >= 0:
                found[subject].store_cpu.append((after_us - before_us) / block)
                found[subject].wall.append(commands_us(lines[0], sent) / block)
    return found


def _in_turns(lines: Sequence[Line], visitor: Any, request: Any, sessions: int) -> Iterator[Trips]:
    visitors = [visitor() for _ in range(sessions)]
    at_once(lines, [each.stored() for each in visitors], 0.0)
    return (request(each) for each in cycle(visitors))


def report(found: dict[tuple[str, str | None], Times]) -> str:
    """Return a Markdown table: a row for each of ours, beside the engine's."""
    head = ["", "commands (us)", "engine's", "ratio", "CPU (us)", "engine's", "ratio"]
    rows = [head]
    for (kind, name), times in found.items():
        if name is not None:
            theirs = found[kind, None]
            row = [f"{kind}, {name}" if name else kind]
            for ours_us, theirs_us in (
                (times.wall, theirs.wall),
                (times.store_cpu, theirs.store_cpu),
            ):
                row += [f"{median(ours_us):.1f}", f"{median(theirs_us):.1f}"]
                row.append(str(measuring.ratio(ours_us, theirs_us)))
            rows.append(row)
    change, locked = found["change", ""], found["change", "locked"]
    lock = measuring.ratio(locked.store_cpu, change.store_cpu)
    commands = measuring.ratio(locked.wall, change.wall)
    return f"{table(rows)}\n\nLocked beside unlocked change: commands {commands}, CPU {lock}."


def main() -> None:
    """Start a store, load the scripts, measure, and print both tables."""
    from django_clustered_sessions.protocol.scripts import script
    from tests.servers import StoreServer

    parser = argparse.ArgumentParser(description="Measure the store's CPU time for each request.")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--block", type=int, default=100, help="requests of a kind in a round")
    parser.add_argument("--sessions", type=int, default=3000, help="sessions for each kind")
    parser.add_argument("--server", type=Path, help="a store's program in place of the bundled one")
    options = parser.parse_args()
    with StoreServer(binary=options.server or bundled_store()) as server, server.client() as store:
        for name in ("fetch", "touch", "create", "commit", "rotate", "acquire", "release"):
            store.script_load(script(name).source)
        cpu = store_clock([server.process.pid])
        with measuring.no_garbage():
            for title, how in ((f"gaps of {GAP_S * 1e6:.0f} us", one_by_one), ("at once", at_once)):
                print(f"\n{title}\n")
                sizes = options.rounds, options.block, options.sessions
                found = measure(("127.0.0.1", server.port), cpu, how, *sizes)
                print(report(found))


if __name__ == "__main__":
    main()
