"""Current locks that are waited for or held for long, with their holders and waiters. Pure.

The cost grows with the number of such locks, not with the number of sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from django_clustered_sessions.protocol.commands.script_calls import CLOCK, milliseconds
from django_clustered_sessions.protocol.effects import Flow, batches, plain
from django_clustered_sessions.protocol.record import (
    BUCKETS,
    LOCK,
    Damaged,
    Lock,
    Locker,
    bucket_tag,
)

from .replies import PER_TRIP, undamaged


@dataclass(frozen=True, slots=True)
class HeldLock:
    """Lock that is held now; times in ms by the store's clock.

    ``session`` is the start of the session's public id, ``holder`` the name of the lock's holder.
    ``waiting`` are the waiters in the order of the queue.
    """

    session: str
    holder: str
    since_ms: int
    lease_end_ms: int
    waiting: Sequence[Locker]


@dataclass(frozen=True, slots=True)
class HeldLocks:
    """All such locks, longest held first; ``now_ms`` is the store's clock."""

    prefix: str
    now_ms: int
    locks: Sequence[HeldLock]


def collect_locks(prefix: str) -> Flow[HeldLocks]:
    """Collect the locks with their holders and waiters; ``prefix`` is the setting KEY_PREFIX.

    A lock is found once a request waits for it, or once its lease has been renewed. One whose lease
    is over is free, and listed only if a request waits for it.

    Raises SessionStoreUnavailable.
    """
    records, now_ms = [], 0
    for some in batches(range(BUCKETS), PER_TRIP):
        tags = [bucket_tag(prefix, bucket) for bucket in some]
        hash_keys = tuple(plain("HKEYS", key=f"{tag}:locks") for tag in tags)
        clock, *replies = yield (CLOCK, *hash_keys)
        now_ms = milliseconds(clock)
        records += [
            (tag, session_id.decode("utf-8", "replace"))
            for tag, ids in zip(tags, replies, strict=True)
            for session_id in undamaged(ids, ())
        ]
    found = []
    for batch in batches(records, PER_TRIP):
        clock, *replies = yield (
            CLOCK,
            *(
                call
                for tag, session_id in batch
                for call in (
                    plain("HGET", session_id, key=f"{tag}:locks"),
                    plain("HGET", LOCK, key=f"{tag}:{session_id}"),
                )
            ),
        )
        now_ms = milliseconds(clock)
        pairs = iter(replies)
        for (_, session_id), entries, lock in zip(batch, pairs, pairs, strict=True):
            if held := _held(session_id, entries, lock, now_ms):
                found.append(held)
    found.sort(key=lambda held: held.since_ms)
    return HeldLocks(prefix, now_ms, found)


def _held(session_id: str, entries: Any, lock: Any, now_ms: int) -> HeldLock | None:
    """Return a lock with holder and waiters, None if the lock is free."""
    try:
        found = Lock.parse(undamaged(lock, None) or b"")
        lockers = Locker.parse_all(undamaged(entries, None) or b"")
    except Damaged:
        return None
    # The lock was read after the queue; it may have been handed off to a waiter.
    places = [one.token for one in lockers]
    behind = lockers[places.index(found.token) + 1 :] if found.token in places else []
    waiting = [one for one in behind if one.waits_until_ms > now_ms]
    lease_end_ms = found.ends_ms(now_ms)
    if lease_end_ms <= now_ms and not waiting:
        return None
    return HeldLock(session_id[:12], found.name, found.since_ms, lease_end_ms, waiting)
