"""The operations on a session: each a generator, written once for sync and async.

A flow yields a trip, what to ask the store in one round trip, and is sent the replies;
``drivers`` has the two loops that run one. Clock, token and random keys come in as arguments,
so a flow can be tested without a store, reply by reply. The shape is that of ``httpx``'s
authentication flows.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from . import commands
from .commands import Alive, Call, Conflict, Exists, Expiry, Gone, Terms, TooLarge, Trip
from .exceptions import SessionConflict, SessionTooLarge
from .fields import Delta, Fields
from .record import EndReason, Loaded, Place

T = TypeVar("T")
Flow = Generator[Trip, Sequence[Any], T]


@dataclass(frozen=True, slots=True)
class Read:
    """What a load found: the session, or why there is none, and the store's clock in ms."""

    found: Loaded | EndReason
    now_ms: int


@dataclass(frozen=True, slots=True)
class Committed:
    """A commit that landed: what is known of the session now, and what it took.

    ``merged`` are the fields that others had changed too.
    """

    alive: Alive
    delta: Delta
    merged: int


def load(place: Place, terms: Terms | None = None) -> Flow[Read]:
    """Read a session; with ``terms``, renew its deadline on the same trip.

    Raises Damaged where the record cannot be understood, NewerFormat where it must not be.
    """
    trip = commands.read(place)
    if terms:
        trip = (commands.touch(place, terms), *trip)
    replies = yield trip
    fields, now_ms = commands.parse_read(replies[-2:])
    found = Loaded.parse(fields)
    if isinstance(found, Loaded) and found.meta.deadline_ms <= now_ms:
        # It expired between the two commands of this trip.
        found = EndReason.UNKNOWN
    return Read(found, now_ms)


def exists(place: Place) -> Flow[bool]:
    """Return whether there is such a session."""
    (reply,) = yield commands.exists(place)
    return commands.parse_exists(reply)


def touch(place: Place, terms: Terms) -> Flow[Alive | Gone]:
    """Renew a session's deadline."""
    (reply,) = yield (commands.touch(place, terms),)
    return commands.parse_touch(reply)


def create(
    place: Place,
    fields: Sequence[tuple[bytes, bytes]],
    expiry: Expiry,
    terms: Terms,
    token: bytes,
) -> Flow[Alive | Exists]:
    """Create a session with ``fields`` where there is none, and none was ended.

    Raises SessionTooLarge.
    """
    size = commands.stored_size(fields)
    if size > terms.max_bytes:
        raise SessionTooLarge(place.id, size, terms.max_bytes)
    (reply,) = yield (commands.create(place, token, expiry, fields, terms),)
    return commands.parse_create(reply)


def commit(
    place: Place,
    fields: Fields,
    expiry_of: Callable[[Fields], Expiry],
    terms: Terms,
    token_of: Callable[[Delta], bytes],
) -> Flow[Committed | Gone]:
    """Write what changed in ``fields`` into a session that exists.

    What others changed meanwhile is merged, and the merge is what ``fields`` has afterwards.
    With nothing to write, the deadline is renewed. ``token_of`` gives the token for a delta.

    Raises SessionTooLarge; SessionConflict after ``terms.attempts`` conflicts in a row.
    """
    conflicts = merged = 0
    while True:
        delta = fields.delta()
        if not delta:
            alive = yield from touch(place, terms)
            return alive if isinstance(alive, Gone) else Committed(alive, delta, merged)
        expiry = expiry_of(fields) if delta.expiry_changed else None
        token = token_of(delta)
        (reply,) = yield (commands.commit(place, token, expiry, delta, terms),)
        match commands.parse_commit(reply):
            case Gone() as gone:
                return gone
            case TooLarge(size=size):
                raise SessionTooLarge(place.id, size, terms.max_bytes)
            case Conflict(values=theirs):
                # To add to what is no counter in the store is no conflict: it is given the sum.
                if not theirs.keys() <= delta.sums:
                    conflicts += 1
                    merged += len(theirs)
                if conflicts == terms.attempts:
                    raise SessionConflict(place.id, [_readable(field) for field in theirs])
                fields.rebase(theirs)
            case Alive() as alive:
                fields.written(delta, token, list(alive.counters))
                return Committed(alive, delta, merged)


def rotate(old: Place, new: Place, terms: Terms, token: bytes) -> Flow[Alive | Gone | Exists]:
    """Move a session to a new key, with everything that the store holds of it.

    Raw values move inside the store, those included that this release cannot read.
    """
    (reply,) = yield (commands.rotate(old, new, token, terms),)
    return commands.parse_rotate(reply)


def end(place: Place, reason: EndReason) -> Flow[bool]:
    """End a session for good; return whether there was one."""
    (reply,) = yield (commands.end(place, reason),)
    return commands.parse_end(reply)


def _readable(field: bytes) -> str:
    return field[2:].decode("utf-8", "replace")


class Rider(Protocol):
    """Who may send one more call along with a flow's first trip."""

    def board(self, trip: Trip) -> Call | None:
        """Return the call that is to ride along, or None."""

    def lost(self) -> None:
        """Take note that a trip did not arrive, as far as anybody knows."""


def riding(flow: Flow[T], rider: Rider) -> Flow[T]:
    """Run ``flow`` and let one more call ride on its first trip; its reply is of no interest.

    The passenger goes first: where a script is not known to the store, the driver repeats a trip
    from the first call that failed, so what came before is not done twice.
    """
    try:
        trip = next(flow)
        passenger = rider.board(trip)
        while True:
            try:
                replies = yield (passenger, *trip) if passenger else trip
            except Exception as error:
                rider.lost()
                trip = flow.throw(error)
            else:
                trip = flow.send(replies[1:] if passenger else replies)
            passenger = None
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
