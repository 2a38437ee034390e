"""Checks that a history must pass despite all faults: each violation is a line of text.

Every write appends its operation's id to a list and counts itself in the same write. The final list
in the store thus shows each write, its number of executions and its predecessors.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .history import History, Operation
from .plan import LOCK_WAIT, STORE_TIMEOUT

#: Seconds that a step may take beyond its waits and STORE_TIMEOUT, because machines are busy.
SLACK_S = 3.0

#: Seconds before the end of its wait in which a waiter may have left the queue already.
BRINK_S = 0.5

#: Answers that mean that nothing was written.
NOTHING = ("lost", "refused", "timeout", "away", "dropped")


def check(
    history: History, *, may_lose: bool = False, max_age_s: float = 0.0, role_s: float = 0.0
) -> list[str]:
    """Return all violations of a history.

    A read without a lock found what was the store's at some moment of the ``max_age_s`` before it,
    or later. A server that is no primary any more may be read ``role_s`` longer, under a lock too.

    Stores that ``may_lose`` unacknowledged writes must still have each acknowledged one, once and
    whole. There, reads may have returned lost writes, and places in queues may be lost.
    """
    logs: dict[tuple[str, str], list[Operation]] = {}
    for operation in history.operations.values():
        if operation.kind != "blind":
            logs.setdefault((operation.session, operation.log), []).append(operation)
    found = [*history.errors, *_waits(history), *_tokens(history)]
    for (session, log), operations in logs.items():
        final: list[str] = history.final[session].get(log, [])
        name = f"session {session[:8]} {log!r}"
        checked = Log(name, final, operations, max_age_s, role_s)
        found += checked.landed_as_told()
        if may_lose:
            found += checked.reads_of_what_may_be_lost()
            continue
        found += checked.reads()
        if log == "log":
            found += checked.exclusive(history.operations)
            found += checked.served_in_order(history)
    for session, data in history.final.items():
        found += _counters(session, data, history.operations)
    return found


@dataclass
class Log:
    """List in a session, and the operations that appended to it or read it."""

    name: str
    final: list[str]
    operations: list[Operation]
    max_age_s: float = 0.0
    role_s: float = 0.0

    def __post_init__(self) -> None:
        self.at = {one: at for at, one in enumerate(self.final)}

    def landed(self) -> list[Operation]:
        """Return the operations whose writes are in the list, in its order."""
        known = [operation for operation in self.operations if operation.id in self.at]
        return sorted(known, key=lambda operation: self.at[operation.id])

    def landed_as_told(self) -> Iterator[str]:
        """Check that no acknowledged write is lost, none is repeated, and no refused one landed."""
        for one, times in Counter(self.final).items():
            if times > 1:
                yield f"{self.name}: {one} was written {times} times"
        for operation in self.operations:
            has_landed = operation.id in self.at
            if operation.sent_s and operation.answer == "ok" and not has_landed:
                yield f"{self.name}: acknowledged and not there: {operation}"
            if has_landed and (operation.answer in NOTHING or not operation.sent_s):
                yield f"{self.name}: answered {operation.answer!r} and yet written: {operation}"

    def reads(self) -> Iterator[str]:
        """Check that reads found a prefix of the list with all writes acknowledged before.

        Without a lock, those may be missing that were acknowledged within the age that is allowed.
        """
        running, prefixes = hashlib.sha1(), [hashlib.sha1().hexdigest()]
        for one in self.final:
            running.update(f"{one}\n".encode())
            prefixes.append(running.hexdigest())
        acknowledged = sorted(
            (operation.done_s or 0.0, self.at[operation.id])
            for operation in self.operations
            if operation.answer == "ok" and operation.id in self.at
        )
        at, least = 0, 0
        for reader in sorted(self.operations, key=self.must_know_s):
            while at < len(acknowledged) and acknowledged[at][0] < self.must_know_s(reader):
                least = max(least, acknowledged[at][1] + 1)
                at += 1
            seen = reader.seen
            if seen is None:
                continue
            if seen.length >= len(prefixes) or seen.digest != prefixes[seen.length]:
                yield f"{self.name}: found what is no beginning of the list: {reader}"
            elif seen.length < least:
                yield f"{self.name}: found {seen.length} of {least} acknowledged: {reader}"

    def reads_of_what_may_be_lost(self) -> Iterator[str]:
        """Check that reads found all writes acknowledged before, among others that may be lost.

        Those count, too, that no replica had: what is there at the end was not lost.
        """
        acknowledged = sorted(
            (operation.done_s or 0.0, operation.id)
            for operation in self.operations
            if operation.answer in ("ok", "short") and operation.id in self.at
        )
        at, known = 0, set[str]()
        for reader in sorted(self.operations, key=self.must_know_s):
            while at < len(acknowledged) and acknowledged[at][0] < self.must_know_s(reader):
                known.add(acknowledged[at][1])
                at += 1
            if reader.seen is not None and (missed := known.difference(reader.seen.ids)):
                yield (
                    f"{self.name}: too old, without {len(missed)} of {len(known)} acknowledged: "
                    f"{reader}"
                )

    def must_know_s(self, reader: Operation) -> float:
        """Return up to when a read has to find all writes that were acknowledged, in seconds."""
        return reader.began_s - self.role_s - (0.0 if reader.is_locked else self.max_age_s)

    def exclusive(self, operations: dict[str, Operation]) -> Iterator[str]:
        """Check that no other write came between the read and the write of a lock's holder."""
        counts = [0]
        for one in self.final:
            counts.append(counts[-1] + (one in operations and operations[one].is_locked))
        for operation in self.operations:
            seen, at = operation.seen, self.at.get(operation.id)
            if seen is None:
                continue
            if operation.is_locked and at is not None and at != seen.length:
                between = self.final[seen.length : at]
                yield f"{self.name}: not alone, {between} came between: {operation}"
            if seen.length < len(counts) and (seen.n, seen.hits) != (
                counts[seen.length],
                seen.length,
            ):
                yield f"{self.name}: found half of a write: {operation}"

    def served_in_order(self, history: History) -> Iterator[str]:
        """Check that a queued operation got the lock before any operation that began later."""
        served = [operation for operation in self.landed() if operation.is_locked]
        earliest, first = math.inf, None
        for later in reversed(served):
            if later.began_s > earliest:
                yield f"{self.name}: overtaken: {first} by: {later}"
            if later.queued_s and later.queued_s < earliest and _could_claim(later, history):
                earliest, first = later.queued_s, later


def _could_claim(waiter: Operation, history: History) -> bool:
    """Return whether a waiter's process never stalled and its wait was not about to end."""
    took_s = waiter.took_s or math.inf
    return took_s - waiter.began_s < LOCK_WAIT - BRINK_S and not _stalled(
        waiter, waiter.began_s, took_s, history
    )


def _stalled(operation: Operation, began_s: float, ended_s: float, history: History) -> bool:
    stalls = [*history.stalls.get(operation.worker, ()), *history.stalls.get("driver", ())]
    return any(stall.meets(began_s, ended_s) for stall in stalls)


def _waits(history: History) -> Iterator[str]:
    """Check that no step waits beyond the bound, neither to read nor to write."""
    bound_s = LOCK_WAIT + STORE_TIMEOUT + SLACK_S
    for operation in history.operations.values():
        points = (operation.began_s, operation.took_s, operation.sent_s, operation.done_s)
        known = [point for point in points if point]
        for began_s, ended_s in zip(known, known[1:], strict=False):
            if ended_s - began_s > bound_s and not _stalled(operation, began_s, ended_s, history):
                yield f"waited {ended_s - began_s:.1f} s: {operation}"


def _tokens(history: History) -> Iterator[str]:
    """Check that each lock had a fencing token of its own."""
    locked = [operation.token for operation in history.operations.values() if operation.token]
    for token, times in Counter(locked).items():
        if times > 1:
            yield f"{times} operations held a lock with the same token: {token}"
    for operation in history.operations.values():
        if operation.is_locked and operation.took_s and not operation.token:
            yield f"had no lock: {operation}"


def _counters(
    session: str, data: dict[str, Any], operations: dict[str, Operation]
) -> Iterator[str]:
    """Check that the counters counted each write once."""
    log: Iterable[str] = data["log"]
    locked = sum(one in operations and operations[one].is_locked for one in log)
    expected = {"n": locked, "hits": len(data["log"])}
    for name, count in expected.items():
        if data[name] != count:
            yield f"session {session[:8]} {name!r}: {data[name]} of {count} writes"
    blind = [
        operation.answer
        for operation in operations.values()
        if operation.kind == "blind" and operation.session == session and operation.sent_s
    ]
    least = blind.count("ok")
    most = least + sum(map(blind.count, ("unknown", "short", "")))
    if not least <= data["blind"] <= most:
        yield f"session {session[:8]} 'blind': {data['blind']}, and not {least} to {most}"
