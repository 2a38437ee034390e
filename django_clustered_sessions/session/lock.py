"""One session object's part in its session's lock: asked for, held, given up, or lost."""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

from django_clustered_sessions.conf import conf
from django_clustered_sessions.exceptions import (
    SessionLockLost,
    SessionLockRefused,
    SessionLockTimeout,
    SessionStoreUnavailable,
)
from django_clustered_sessions.monitoring.counters import WAITS, counters
from django_clustered_sessions.protocol import flows
from django_clustered_sessions.protocol.effects import Flow
from django_clustered_sessions.protocol.locks import LockOutcome, LockRequest, Refusal
from django_clustered_sessions.protocol.options import NO_LOCK, Fence, LockOptions
from django_clustered_sessions.protocol.record import SessionKeys, locker_name
from django_clustered_sessions.protocol.results import Gone

from . import leases
from .leases import Grant
from .request_policy import Policy, read_header

logger = logging.getLogger("django_clustered_sessions.locks")

#: Longer names of ``lock(name)`` are cut, in characters.
LONGEST_NAME: Final = 100


class SessionLock:
    """One session object's hold on its session's lock."""

    #: The lock, as far as this object knows.
    grant: Grant | None = None
    #: The name that ``lock()`` was given, as it is shown, while it asks.
    name: str = ""
    #: The keys and token of a lock, or of a place in its queue, that was asked for or given up
    #: and not answered yet.
    asked: tuple[SessionKeys, str] | None = None

    def request(self, keys: SessionKeys, policy: Policy, *, capped: bool) -> LockRequest:
        """Return how to ask for the lock; not ``capped``: for a write that has to be done."""
        options = LockOptions(
            wait_ms=round(conf.lock_wait * 1000),
            lease_ms=round(conf.lock_lease * 1000),
            hold_ms=round(conf.lock_max_hold * 1000),
            most=conf.lock_max_waiters if capped else -1,
            name=locker_name(conf.node_name, self._purpose(policy)),
        )
        token = secrets.token_hex(8)

        def refusal() -> Refusal | None:
            # From here on it may be in the store's queue.
            self.asked = keys, token
            return _refusal(keys, capped)

        return LockRequest(
            token,
            options,
            slice_ms=conf.store_timeout * 500,
            refusal=refusal,
            waiting=partial(_waiting, keys, capped),
            inside=policy.lock_header and read_header(policy.lock_header, keys.id),
        )

    def _purpose(self, policy: Policy) -> str:
        """Return what the lock is for: the route, or the process outside a request; and a name."""
        if route := policy.route:
            return f"{route} {self.name}"
        return f"{self.name} (pid {os.getpid()}, {threading.current_thread().name})"

    def take(self, keys: SessionKeys, lock_request: LockRequest, turn: LockOutcome | None) -> None:
        """Take what came of asking; nothing, if the session is gone."""
        if turn is None or isinstance(turn.found, Gone):
            self.asked = None
            return
        is_inside = turn.found.inside
        self.grant = Grant(
            keys,
            lock_request.inside if is_inside else lock_request.token,
            lock_request.options.name.decode("utf-8", "replace"),
            lock_request.options.lease_ms,
            lock_request.options.hold_ms,
            is_inside,
        )
        leases.hold(self.grant)
        self.count(turn)

    def count(self, turn: LockOutcome) -> None:
        """Count a lock that was taken, for a single write too."""
        self.asked = None
        counters.add(locks_acquired=1, lock_handoffs=int(turn.handed_on))
        if turn.waited_ms is not None:
            counters.measure(WAITS, turn.waited_ms)

    def fence(self, *, release: bool = False) -> Fence:
        """Return under which lock to write; with ``release`` it ends then."""
        grant = self.grant
        return Fence(grant.token, release and not grant.is_inside) if grant else NO_LOCK

    def move(self, keys: SessionKeys) -> None:
        """Take note that the session has another key, and the lock with it."""
        self.asked = None
        if self.grant:
            self.grant.keys = keys

    def let_go(self) -> None:
        """Take note that the lock is given up."""
        self.asked = None
        if self.grant:
            leases.let_go(self.grant)
            self.grant = None

    def lose(self) -> None:
        """Take note that the lock, if there was one, went to another request."""
        if self.grant:
            counters.add(locks_lost=1)
            self.let_go()

    def releasing(self) -> Flow[None]:
        """Give up the lock, or the place in its queue, if there is one.

        Until the store has answered, that is in doubt: where this is broken off, it is done again.
        """
        grant = self.grant
        if grant and not grant.is_inside:
            self.asked = grant.keys, grant.token
        asked = self.asked
        if grant:
            # Not renewed from here on, whatever comes.
            leases.let_go(grant)
            self.grant = None
        if asked is None:
            return
        keys, token = asked
        try:
            held_ms = yield from flows.release(keys, token)
        except SessionStoreUnavailable as error:
            # Nothing is lost by it but time: its lease will end.
            level = logging.DEBUG if error.is_told else logging.WARNING
            logger.log(level, "session %s: the lock could not be released: %s", keys.id[:12], error)
        else:
            # Given up before, by a trip whose reply was lost, or ended with its session.
            if grant and held_ms is None and not grant.is_leased:
                counters.add(locks_lost=1)
        self.asked = None

    def not_locked(self, error: SessionLockTimeout, policy: Policy) -> SessionLockTimeout:
        """Count, log and return the error of a request that asked in vain."""
        self.asked = None
        is_refusal = isinstance(error, SessionLockRefused)
        counters.add(**{"lock_refusals" if is_refusal else "lock_timeouts": 1})
        logger.warning("%s: %s", policy.route or self.name or "outside a request", error)
        return error

    def refused(self, error: SessionLockLost) -> SessionLockLost:
        """Count, log and return the error of one whose write came after its lock was lost."""
        grant = self.grant
        if grant:
            logger.error(
                "session %s: a write by %s was refused: its lock (lease %.1f s, held for %.1f s) "
                "went to %s",
                grant.keys.id[:12],
                grant.name,
                grant.lease_ms / 1000,
                grant.held_s,
                error.holder or "a request that is over",
            )
        counters.add(writes_refused=1)
        self.lose()
        return error


def shown(name: str) -> str:
    """Return the name that ``lock()`` was given as it is shown: on one line, and not too long."""
    return "".join(one if one.isprintable() else " " for one in name[:LONGEST_NAME])


def _refusal(keys: SessionKeys, capped: bool) -> Refusal | None:
    """Return why waiting for a session's lock makes no sense in this process, if so."""
    if leases.holds(keys):
        return Refusal(
            SessionLockTimeout,
            "this thread or task holds the lock itself, through another session object",
            "Use that object: request.session in a view.",
        )
    return _crowded() if capped and leases.waiting_room.is_full(keys) else None


@contextmanager
def _waiting(keys: SessionKeys, capped: bool) -> Iterator[Refusal | None]:
    """Wait for a session's lock; gives why that makes no sense, if so."""
    if not capped:
        yield None
        return
    with leases.waiting_room.entered(keys) as has_room:
        yield None if has_room else _crowded()


def _crowded() -> Refusal:
    return Refusal(
        SessionLockRefused,
        f"{conf.lock_process_waiters} requests of this process wait for it already",
        "An eighth of CLUSTERED_SESSIONS_LOCK_MAX_WAITERS may wait in one process.",
    )
