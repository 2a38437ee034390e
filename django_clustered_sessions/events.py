"""What has happened to sessions, out of the buckets' streams in the store. Pure.

The script that changes a session writes the event, so neither is there without the other. Workers
take events for a time, and remove them once they are handled: what a worker did not finish in time
is taken by another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple

from .protocol.commands import event_stream
from .protocol.effects import Flow
from .protocol.record import BUCKETS, NOBODY, Damaged, EndReason, moment, user_tag

#: Buckets that one trip sweeps.
_PER_TRIP: Final = 64

_REASONS: Final[Mapping[str, str]] = {
    EndReason.FLUSHED: "logout",
    EndReason.ROTATED: "replaced",
}


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a session.

    ``id`` is the event's own, by which a handler knows one that it is given again. ``kind`` is
    ``"created"``, ``"ended"`` or ``"expired"``, ``time`` the store's, ``session_id`` the session's
    public id. ``user_id`` is the primary key, as a string, of who was logged in, None where nobody
    was; and of most sessions that expired, which the store had removed before: ``is_of`` still
    knows. ``reason`` is why it was ended: ``"logout"``, ``"deleted"``, ``"ended"`` by the registry,
    ``"replaced"`` by the session ``replaced_by``, or ``"limit"``; else None.
    """

    id: str
    kind: str
    session_id: str
    time: datetime
    user_id: str | None
    user_tag: str | None
    reason: str | None
    replaced_by: str | None

    def is_of(self, user_key: object) -> bool:
        """Return whether the user with this primary key was logged in."""
        return self.user_tag == user_tag(user_key).hex()


class StreamEntry(NamedTuple):
    """An event as it is in the stream of a bucket."""

    bucket: int
    id: bytes
    fields: dict[bytes, bytes]

    @property
    def user(self) -> bytes:
        """The field of the session that says who was logged in, empty where that is not known."""
        return self.fields.get(b"user", b"")

    def event(self, user_id: str | None) -> Event:
        """Return what happened; ``user_id`` is what ``user`` is decoded.

        Raises ValueError where it is nothing that a release has written.
        """
        texts = (self.id, self.fields.get(b"what", b""), self.fields.get(b"id", b""))
        id_, kind, session_id = (text.decode() for text in texts)
        if not kind or not session_id:
            raise ValueError(f"the entry {id_} of bucket {self.bucket:03x} is no event")
        tag = self.fields.get(b"tag", NOBODY)
        return Event(
            id=f"{self.bucket:03x}-{id_}",
            kind=kind,
            session_id=session_id,
            time=moment(int(id_.partition("-")[0])),
            user_id=user_id,
            user_tag=None if tag == NOBODY else tag.hex(),
            reason=reason_of(self.fields.get(b"why", b"").decode()) or None,
            replaced_by=self.fields.get(b"successor", b"").decode() or None,
        )


def reason_of(word: str) -> str:
    """Return how a tombstone's word for why a session ended is told; a later release's as it is."""
    return _REASONS.get(word, word)


def sweep(prefix: str, events_kept: int) -> Flow[int]:
    """Find all sessions that have expired, and write events of that; return how many.

    ``prefix`` is the setting KEY_PREFIX, ``events_kept`` as in Terms.
    """
    found = 0
    for first in range(0, BUCKETS, _PER_TRIP):
        some: Sequence[int] = range(first, min(first + _PER_TRIP, BUCKETS))
        while some:
            replies = yield tuple(
                event_stream.sweep(prefix, bucket, events_kept) for bucket in some
            )
            swept = list(map(event_stream.parse_sweep, replies))
            found += sum(swept)
            # Each takes some of them at a time.
            some = [bucket for bucket, count in zip(some, swept, strict=True) if count]
    return found


def waiting(prefix: str) -> Flow[list[int]]:
    """Return the buckets with events that are not finished, whether somebody has them or not."""
    replies = yield tuple(event_stream.events_waiting(prefix, bucket) for bucket in range(BUCKETS))
    return [at for at, count in enumerate(replies) if not isinstance(count, Damaged) and count]


def take(prefix: str, buckets: Sequence[int], most: int, lease_ms: int) -> Flow[list[StreamEntry]]:
    """Take events of each bucket, at most so many, to finish them within the lease."""
    replies = yield tuple(event_stream.take(prefix, bucket, most, lease_ms) for bucket in buckets)
    return [
        StreamEntry(bucket, *taken)
        for bucket, reply in zip(buckets, replies, strict=True)
        for taken in event_stream.parse_take(reply)
    ]


def finish(prefix: str, entries: Sequence[StreamEntry]) -> Flow[None]:
    """Remove events that were handled."""
    yield tuple(
        call for entry in entries for call in event_stream.finish(prefix, entry.bucket, entry.id)
    )


def give_back(prefix: str, entries: Sequence[StreamEntry], lease_ms: int) -> Flow[None]:
    """Let others take events that were taken under a lease and not handled."""
    yield tuple(
        event_stream.give_back(prefix, entry.bucket, entry.id, lease_ms) for entry in entries
    )
