"""Who holds locks now, and who waits for them. Pure.

What is told grows with the locks that are held, not with the sessions.
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
    """A lock that is held now; times in ms by the store's clock.

    ``session`` is the start of the session's public id. ``holder`` is None where it came between
    the two questions. ``waiting`` are those who wait, in the order of their turns.
    """

    session: str
    holder: Locker | None
    since_ms: int
    lease_end_ms: int
    waiting: Sequence[Locker]


@dataclass(frozen=True, slots=True)
class HeldLocks:
    """All locks that are held, those held longest first, by the store's clock in ms."""

    prefix: str
    now_ms: int
    locks: Sequence[HeldLock]


def collect_locks(prefix: str) -> Flow[HeldLocks]:
    """Collect who holds locks and who waits for them, under the setting KEY_PREFIX.

    A lock whose lease is over is free for the taking, and told only while somebody waits for it.

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
    """Return who holds a lock and who waits for it, None where nobody holds it any more."""
    try:
        found = Lock.parse(undamaged(lock, None) or b"")
        lockers = Locker.parse_all(undamaged(entries, None) or b"")
    except Damaged:
        return None
    # The lock was read after them, and may have gone to one who waited.
    behind = iter(lockers)
    holder = next((one for one in behind if one.token == found.token), None)
    waiting = [one for one in behind if one.waits_until_ms > now_ms]
    lease_end_ms = found.ends_ms(now_ms)
    if lease_end_ms <= now_ms and not waiting:
        return None
    return HeldLock(session_id[:12], holder, found.since_ms, lease_end_ms, waiting)
