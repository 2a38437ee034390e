"""Take a lock: on one trip where it is free, by a place in the store's queue where it is not.

A flow, as those of ``flows``. A lock that is free is taken on the trip of the load. Otherwise the
store has put the request into its queue, and it sleeps in a blocking read of two mailboxes, that of
the one before it and the session's, a slice at a time; after each slice, and after any doubt, it
asks whether the lock is its own. A lost wake-up costs one question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from django_clustered_sessions.exceptions import (
    SessionLockRefused,
    SessionLockTimeout,
    SessionStoreUnavailable,
)

from .commands import lock_queue
from .effects import Call, Flow, Trip, Wait
from .options import LockOptions
from .record import SessionKeys
from .results import Gone, Held, Taken

#: Delay of each place in the queue behind the one before it, after a lease that is over, in ms: the
#: first finds it over and gets the lock, and the others do not come all at once.
_STAGGER_MS: Final = 20


@dataclass(frozen=True, slots=True)
class Refusal:
    """Reason why waiting for a lock makes no sense, and advice."""

    error: type[SessionLockTimeout]
    why: str
    advice: str


class LockRequest(NamedTuple):
    """A request for a lock; ``slice_ms`` is the time that it sleeps at once.

    ``refusal`` returns None, or the reason why waiting makes no sense. ``waiting`` is entered for
    the time of the wait, and gives the same. ``inside`` is the token of the outer request's lock,
    or empty.
    """

    token: str
    options: LockOptions
    slice_ms: float
    refusal: Callable[[], Refusal | None]
    waiting: Callable[[], AbstractContextManager[Refusal | None]]
    inside: str = ""


class LockOutcome(NamedTuple):
    """The outcome of a request for a lock.

    ``waited_ms`` is the time of the wait, None without one; ``handed_on`` is True if the last
    holder gave the lock to this request. ``seen`` are the replies to the rest of the trip when the
    wait began.
    """

    found: Taken | Gone
    waited_ms: int | None = None
    handed_on: bool = False
    seen: Sequence[Any] = ()


def take(
    keys: SessionKeys, lock_request: LockRequest, then: Trip = ()
) -> Flow[tuple[LockOutcome, Sequence[Any]]]:
    """Take a session's lock, and ask ``then`` with it; return both replies.

    Where the session is gone there is no lock to take, and ``then`` was asked all the same.

    Raises SessionLockTimeout; SessionLockRefused where waiting makes no sense.
    """
    refusal = lock_request.refusal()
    wait_ms = 0 if refusal else lock_request.options.wait_ms
    reply, *rest = yield (_acquire(keys, lock_request, wait_ms), *then)
    found = lock_queue.parse_acquire(reply)
    if not isinstance(found, Held):
        return LockOutcome(found), rest
    if found.queue_position == 0:
        raise _refused(keys, lock_request, found, refusal)
    try:
        with lock_request.waiting() as refusal:
            if refusal:
                raise _refused(keys, lock_request, found, refusal)
            turn, replies = yield from _wait(keys, lock_request, found, then)
            return turn._replace(seen=rest), replies
    except SessionLockTimeout:
        # The place in the queue goes to the next.
        with suppress(SessionStoreUnavailable):
            yield (lock_queue.release(keys, lock_request.token),)
        raise


def _wait(
    keys: SessionKeys, lock_request: LockRequest, held: Held, then: Trip
) -> Flow[tuple[LockOutcome, Sequence[Any]]]:
    began_ms, slept_ms = held.now_ms, 0.0
    while True:
        # By the store's clock; a failover may set it back, so by the time slept as well.
        left_ms = lock_request.options.wait_ms - max(held.now_ms - began_ms, slept_ms)
        if left_ms <= 0:
            raise _timeout(keys, lock_request, held)
        lease_ms = max(held.lease_left_ms, 0) + held.queue_position * _STAGGER_MS
        nap_ms = min(left_ms, lease_ms, lock_request.slice_ms)
        if held.queue_position > 1:
            # A waiter before it may have died: then a lock that goes on over its head wakes nobody,
            # and is to be taken while it is still this one's. The same holds from when its wait is
            # over, also of one that lives.
            nap_ms = min(nap_ms, lock_queue.CLAIM_MS / 2, held.before_left_ms)
        mailboxes = keys.mailbox(held.before), keys.ended_mailbox
        woken = yield Wait(mailboxes, nap_ms / 1000)
        if woken is False:
            slept_ms += nap_ms
            left_ms -= nap_ms
        # One that was woken has the lock, most likely, and loads on the same trip.
        trip = (_acquire(keys, lock_request, round(left_ms)), *(then if woken else ()))
        reply, *rest = yield trip
        found = lock_queue.parse_acquire(reply)
        if not isinstance(found, Held):
            if then and not woken:
                rest = yield then
            return LockOutcome(found, found.now_ms - began_ms, bool(woken)), rest
        if found.queue_position == 0:
            raise (
                _timeout(keys, lock_request, found)
                if left_ms <= 0
                else _refused(keys, lock_request, found)
            )
        held = found


def _acquire(keys: SessionKeys, lock_request: LockRequest, wait_ms: int) -> Call:
    return lock_queue.acquire(
        keys, lock_request.token, lock_request.options, wait_ms, lock_request.inside
    )


def _refused(
    keys: SessionKeys, lock_request: LockRequest, held: Held, refusal: Refusal | None = None
) -> SessionLockTimeout:
    if refusal is None:
        if not lock_request.options.wait_ms:
            return _timeout(keys, lock_request, held)
        refusal = Refusal(
            SessionLockRefused,
            f"{held.waiting} requests wait for it already",
            "CLUSTERED_SESSIONS_LOCK_MAX_WAITERS says how many may.",
        )
    return refusal.error(keys.id, held.holder, _age_s(held), refusal.why, refusal.advice)


def _timeout(keys: SessionKeys, lock_request: LockRequest, held: Held) -> SessionLockTimeout:
    return SessionLockTimeout(
        keys.id,
        held.holder,
        _age_s(held),
        f"waited {lock_request.options.wait_ms / 1000:.1f} s in vain",
        "Make that view faster, or let it commit() before its slow part. Where a view calls its "
        "own site, give the call session.lock_headers().",
    )


def _age_s(held: Held) -> float:
    return (held.now_ms - held.since_ms) / 1000
