"""The locks of this process: those it holds, the requests that wait, the renewal of leases.

One renewer per world: a thread for what was taken synchronously, a task of each event loop for
the rest. It starts with the first lock and ends when none was held for a while.
"""

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
from weakref import WeakSet

from django_clustered_sessions.conf import conf
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol.commands import lock_queue
from django_clustered_sessions.protocol.effects import Flow, Pause
from django_clustered_sessions.protocol.record import SessionKeys
from django_clustered_sessions.store import runner

logger = logging.getLogger("django_clustered_sessions.locks")

#: Leases are looked after so often at least, in seconds.
_TICK_S: Final = 0.25
#: A renewer ends after so many looks without a lock.
_IDLE_TICKS: Final = 40


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
    _held.set((*(other for other in _held.get() if other.is_held), grant))
    if not grant.is_inside:
        renewers.renewer().keep(grant)


def let_go(grant: Grant) -> None:
    """Take note that a lock is given up, or lost."""
    grant.is_held = False
    counters.maximum(lock_longest_hold_ms=round(grant.held_s * 1000))


def holds(keys: SessionKeys) -> bool:
    """Return whether this thread or task holds a session's lock: it would wait for itself."""
    return any(grant.is_held and grant.keys.record == keys.record for grant in _held.get())


class _Waiter:
    """A request that waits for the lock of the session with that record."""

    def __init__(self, record: str) -> None:
        self.record = record


class _WaitingRoom:
    """The requests of this process that wait, by session."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Weak: a request that is broken off at any line leaves no place taken.
        self._waiting: WeakSet[_Waiter] = WeakSet()

    def waiting(self, record: str) -> int:
        """Return how many wait for a session."""
        return sum(waiter.record == record for waiter in self._waiting)

    def is_full(self, keys: SessionKeys) -> bool:
        return self.waiting(keys.record) >= conf.lock_process_waiters

    @contextmanager
    def entered(self, keys: SessionKeys) -> Iterator[bool]:
        """Wait here; gives whether there was room."""
        waiter = _Waiter(keys.record)
        try:
            with self._lock:
                if has_room := not self.is_full(keys):
                    self._waiting.add(waiter)
            yield has_room
        finally:
            # Now, and not with the end of an exception that knows this frame.
            self._waiting.discard(waiter)


class Renewer:
    """Renews the leases of the locks of one world."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.grants: set[Grant] = set()
        self.is_running = False

    def keep(self, grant: Grant) -> None:
        with self._lock:
            self.grants.add(grant)
            starts, self.is_running = not self.is_running, True
        if starts:
            self.start()

    def start(self) -> None:
        threading.Thread(target=self._run, name="session-lock-renewer", daemon=True).start()

    def _run(self) -> None:
        runner.run(self.renewing())

    def renewing(self) -> Flow[None]:
        """Renew what is due, until there is nothing to look after any more."""
        idle = 0
        try:
            while idle < _IDLE_TICKS or not self._ends():
                yield Pause(min(conf.lock_lease / 4, _TICK_S))
                due = self._due()
                idle = 0 if self.grants else idle + 1
                if due:
                    yield from self._renewing(due)
        except BaseException:
            self.is_running = False
            raise

    def _ends(self) -> bool:
        """End, unless a lock has come since the last look."""
        with self._lock:
            self.is_running = bool(self.grants)
            return not self.is_running

    def _due(self) -> list[Grant]:
        now_s = time.monotonic()
        with self._lock:
            self.grants = {grant for grant in self.grants if grant.is_held}
            return [
                grant
                for grant in self.grants
                if (now_s - grant.renewed_at_s) * 4000 >= grant.lease_ms
            ]

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
            with self._lock:
                self.grants.discard(grant)


class AsyncRenewer(Renewer):
    """See Renewer; in a task of an event loop."""

    _task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._arun())

    async def _arun(self) -> None:
        await runner.arun(self.renewing())


class Renewers:
    """The renewers of this process: one for its threads, one for each event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sync = Renewer()
        self._async: dict[asyncio.AbstractEventLoop, AsyncRenewer] = {}

    def renewer(self) -> Renewer:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return self._sync
        if loop not in self._async:
            with self._lock:
                self._async = {o: r for o, r in self._async.items() if not o.is_closed()}
                self._async[loop] = AsyncRenewer()
        return self._async[loop]


waiting_room = _WaitingRoom()
renewers = Renewers()


def _start_anew() -> None:
    """Forget what the parent of a forked process holds: it is the parent's to renew."""
    global waiting_room, renewers
    waiting_room, renewers = _WaitingRoom(), Renewers()
    _held.set(())


os.register_at_fork(after_in_child=_start_anew)
