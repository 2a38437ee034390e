"""Events of sessions, read from the buckets' streams in the store. Pure.

The script that changes a session writes the event, so neither exists without the other. Workers
claim events under a lease, and remove them once they are handled. An event whose lease is over is
claimed by another worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple

from .protocol.commands import event_stream
from .protocol.effects import Flow
from .protocol.record import BUCKETS, NOBODY, Damaged, EndReason, moment, user_tag

#: Buckets swept on one round trip.
_PER_TRIP: Final = 64

_REASONS: Final[Mapping[str, str]] = {
    EndReason.FLUSHED: "logout",
    EndReason.ROTATED: "replaced",
}


@dataclass(frozen=True, slots=True)
class Event:
    """Event of a session.

    ``id`` identifies the event; a repeated delivery has the same one. ``kind`` is ``"created"``,
    ``"ended"`` or ``"expired"``, ``time`` is by the store's clock, ``session_id`` is the session's
    public id. ``user_id`` is the primary key of the logged-in user as a string; None if nobody was
    logged in, and for most expired sessions, because the store had removed them before: ``is_of``
    still works for these. ``reason`` of an end is ``"logout"``, ``"deleted"``, ``"ended"`` (by the
    registry), ``"replaced"`` (by the session ``replaced_by``) or ``"limit"``; else None.
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
    """Event as stored in the stream of a bucket."""

    bucket: int
    id: bytes
    fields: dict[bytes, bytes]

    @property
    def user(self) -> bytes:
        """The session's stored user field, b"" if unknown."""
        return self.fields.get(b"user", b"")

    @property
    def session_id(self) -> str:
        """The session's public id, as far as it is one."""
        return self.fields.get(b"id", b"").decode("ascii", "replace")

    def event(self, user_id: str | None) -> Event:
        """Return the event; ``user_id`` is ``user`` decoded.

        Raises ValueError if no release can have written the entry.
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
    """Return the public name of a tombstone's reason; that of a later release unchanged."""
    return _REASONS.get(word, word)


def sweep(prefix: str, events_kept: int) -> Flow[int]:
    """Find all expired sessions and write their events; return how many there were.

    ``prefix`` is the setting KEY_PREFIX, ``events_kept`` as in WriteOptions.
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
            # One call sweeps a limited number of sessions of its bucket.
            some = [bucket for bucket, count in zip(some, swept, strict=True) if count]
    return found


def waiting(prefix: str) -> Flow[list[int]]:
    """Return the buckets with unfinished events, claimed or not."""
    replies = yield tuple(event_stream.events_waiting(prefix, bucket) for bucket in range(BUCKETS))
    return [at for at, count in enumerate(replies) if not isinstance(count, Damaged) and count]


def claim(prefix: str, buckets: Sequence[int], most: int, lease_ms: int) -> Flow[list[StreamEntry]]:
    """Claim at most ``most`` events of each bucket, to finish them within the lease."""
    replies = yield tuple(event_stream.take(prefix, bucket, most, lease_ms) for bucket in buckets)
    return [
        StreamEntry(bucket, *taken)
        for bucket, reply in zip(buckets, replies, strict=True)
        for taken in event_stream.parse_take(reply)
    ]


def finish(prefix: str, entries: Sequence[StreamEntry]) -> Flow[None]:
    """Remove handled events."""
    yield tuple(
        call for entry in entries for call in event_stream.finish(prefix, entry.bucket, entry.id)
    )


def release(prefix: str, entries: Sequence[StreamEntry], lease_ms: int) -> Flow[None]:
    """Release claimed events that were not handled, so that other workers claim them."""
    yield tuple(
        event_stream.give_back(prefix, entry.bucket, entry.id, lease_ms) for entry in entries
    )
