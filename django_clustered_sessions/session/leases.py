"""The locks of this process: those it holds, the requests that wait, the renewal of leases."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final
from weakref import WeakSet, WeakValueDictionary

from django_clustered_sessions.conf import conf
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol.commands import lock_queue
from django_clustered_sessions.protocol.effects import Flow
from django_clustered_sessions.protocol.record import SessionKeys

from .background import Background, Worlds

logger = logging.getLogger("django_clustered_sessions.locks")

#: Leases are looked after so often at least, in seconds.
_TICK_S: Final = 0.25


@dataclass(eq=False, slots=True)
class Grant:
    """A lock that this process holds. Times in ms, except where the name says s.

    ``keys`` changes with the session's key. ``is_inside``: it is an outer request's, which alone
    renews and releases it.
    """

    keys: SessionKeys
    token: str
    name: str
    lease_ms: int
    hold_ms: int
    is_inside: bool = False
    is_held: bool = True
    taken_at_s: float = field(default_factory=time.monotonic)
    renewed_at_s: float = field(default_factory=time.monotonic)
    leased_until_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.leased_until_s = self.taken_at_s + self.lease_ms / 1000

    @property
    def pace_s(self) -> float:
        """Seconds after which the lease is renewed: a quarter of it."""
        return self.lease_ms / 4000

    @property
    def is_leased(self) -> bool:
        """True if no other can have been given the lock, as far as this process knows."""
        return time.monotonic() < self.leased_until_s

    @property
    def held_s(self) -> float:
        """For how long it has been held."""
        return time.monotonic() - self.taken_at_s


#: The locks that this thread or task holds, or the one that started it.
_held: ContextVar[tuple[Grant, ...]] = ContextVar("clustered_sessions_held", default=())


def hold(grant: Grant) -> None:
    """Take note that this thread or task has a lock, and keep its lease up."""
    _held.set((*[other for other in _held.get() if other.is_held], grant))
    if not grant.is_inside:
        renewers.here().keep(grant)


def let_go(grant: Grant) -> None:
    """Take note that a lock is given up, or lost."""
    grant.is_held = False
    counters.maximum(lock_longest_hold_ms=round(grant.held_s * 1000))


def holds(keys: SessionKeys) -> bool:
    """Return whether this thread or task holds a session's lock: it would wait for itself."""
    return keys.record in [grant.keys.record for grant in _held.get() if grant.is_held]


class _Waiter:
    """A request that waits for a lock."""


class _WaitingRoom:
    """The requests of this process that wait, by session."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Weak: a request that is broken off at any line leaves no place taken. By session, so that
        # they are counted without a walk through a set that other threads change.
        self._queues: WeakValueDictionary[str, WeakSet[_Waiter]] = WeakValueDictionary()

    def waiting(self, record: str) -> int:
        """Return how many wait for a session."""
        queue = self._queues.get(record)
        return 0 if queue is None else len(queue)

    def is_full(self, keys: SessionKeys) -> bool:
        return self.waiting(keys.record) >= conf.lock_process_waiters

    @contextmanager
    def entered(self, keys: SessionKeys) -> Iterator[bool]:
        """Wait here; gives whether there was room."""
        waiter, queue = _Waiter(), WeakSet[_Waiter]()
        try:
            with self._lock:
                queue = self._queues.setdefault(keys.record, queue)
                if has_room := not self.is_full(keys):
                    queue.add(waiter)
            yield has_room
        finally:
            # Now, and not with the end of an exception that knows this frame.
            queue.discard(waiter)


class Renewer(Background):
    """Renews the leases of the locks of one world, each at the pace of its own lease."""

    name = "session-lock-renewer"
    interval_s = _TICK_S

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        super().__init__(loop)
        self.grants: set[Grant] = set()

    @property
    def has_work(self) -> bool:
        """See Background.has_work."""
        return bool(self.grants)

    def keep(self, grant: Grant) -> None:
        """Renew the lease of a lock until it is given up, lost, or held for too long."""
        with self.lock:
            self.grants.add(grant)
            self.interval_s = min(self.interval_s, grant.pace_s)
        self.start()

    def round(self) -> Flow[None]:
        """Renew the leases of which a quarter has passed."""
        now_s = time.monotonic()
        with self.lock:
            self.grants = {grant for grant in self.grants if grant.is_held}
            if self.grants:
                self.interval_s = min(_TICK_S, *(grant.pace_s for grant in self.grants))
            due = [grant for grant in self.grants if now_s - grant.renewed_at_s >= grant.pace_s]
        if due:
            yield from self._renewing(due)

    def stopped(self) -> None:
        """Let the leases end: the tasks that held the locks have ended with their loop."""

    def _renewing(self, due: list[Grant]) -> Flow[None]:
        all_keys = [grant.keys for grant in due]
        try:
            replies = yield tuple(
                lock_queue.renew(grant.keys, grant.token, grant.lease_ms, grant.hold_ms)
                for grant in due
            )
        except SessionStoreUnavailable as error:
            level = logging.DEBUG if error.is_told else logging.WARNING
            logger.log(level, "the leases of %d locks could not be renewed: %s", len(due), error)
            return
        for grant, keys, reply in zip(due, all_keys, replies, strict=True):
            left_ms = lock_queue.parse_renew(reply)
            grant.renewed_at_s = time.monotonic()
            grant.leased_until_s = grant.renewed_at_s + (left_ms or 0) / 1000
            if not grant.is_held or grant.keys is not keys:
                # It was given up, or has moved to another key, while this was under way.
                continue
            if left_ms is None:
                # Counted by the request, which has yet to find out.
                problem = "has lost its lock: it was silent for longer than its lease"
            elif left_ms <= 0:
                problem = "has had its lock for longer than CLUSTERED_SESSIONS_LOCK_MAX_HOLD"
            else:
                continue
            logger.warning(
                "session %s: %s %s, held for %.1f s",
                *(keys.id[:12], grant.name, problem, grant.held_s),
            )
            with self.lock:
                self.grants.discard(grant)


waiting_room = _WaitingRoom()
renewers = Worlds(Renewer)


def _start_anew() -> None:
    """Forget what the parent of a forked process holds, and those that wait there."""
    global waiting_room
    waiting_room = _WaitingRoom()
    _held.set(())


os.register_at_fork(after_in_child=_start_anew)
