"""Who is logged in where: the operations on all sessions of a user, as flows.

Each bucket's index knows its sessions' users, and is changed by the script that changes a session:
it is never behind. A user's sessions are spread over all buckets. These are asked on one trip which
have some, and those on another for the sessions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Final, NamedTuple

from . import commands
from .fields import USER_FIELD
from .outcomes import Ended
from .record import BUCKETS, FIRST, LAST, Damaged, EndReason, Meta, NewerFormat, Place, user_tag
from .steps import Flow, batches

#: Sessions that one trip asks for.
_PER_TRIP: Final = 1000


class Listed(NamedTuple):
    """A session in the store: its place, its meta field, and the field that says who is logged in.

    ``user`` is raw, empty where nobody is; so is from where it was used, ``first`` and ``last``.
    """

    place: Place
    meta: Meta
    user: bytes
    first: bytes
    last: bytes


def of_user(prefix: str, user: str, events_kept: int) -> Flow[list[Listed]]:
    """Find all sessions of a user under the setting KEY_PREFIX, the last used first.

    What the index has and the store has not, such as evicted records, leaves the index.
    ``events_kept`` as in Terms.
    """
    tag = user_tag(user)
    buckets = range(BUCKETS)
    trips = (commands.counted(prefix, bucket, tag) for bucket in buckets)
    told = iter((yield tuple(chain.from_iterable(trips))))
    asked = [one for one in buckets if commands.parse_counted(next(told), next(told))]
    if not asked:
        return []
    replies = yield tuple(commands.owned(prefix, bucket, tag) for bucket in asked)
    ids = (public_id for reply in replies for public_id in commands.parse_owned(reply))
    found: list[Listed] = []
    for places in batches(places_of(prefix, ids).values(), _PER_TRIP):
        listed = yield from looked_up(places)
        mine = [one for one in listed if one and one.meta.user == tag]
        found += mine
        gone = {place.id for place in places} - {one.place.id for one in mine}
        if gone:
            lost = (place for place in places if place.id in gone)
            yield tuple(commands.unlist(place, tag, events_kept) for place in lost)
    found.sort(key=lambda one: one.meta.seen_ms, reverse=True)
    return found


def places_of(prefix: str, ids: Iterable[bytes]) -> dict[bytes, Place]:
    """Return the place of each public id, without those that are none: somebody else wrote them."""
    places: dict[bytes, Place] = {}
    for public_id in ids:
        with suppress(ValueError):
            places[public_id] = Place.of_id(prefix, public_id.decode("ascii", "replace"))
    return places


def one(place: Place) -> Flow[Listed | None]:
    """Find one session."""
    (found,) = yield from looked_up([place])
    return found


def looked_up(places: Sequence[Place]) -> Flow[list[Listed | None]]:
    """Find some sessions, whoever is logged in there; None for each that is not there."""
    *replies, clock = yield commands.described(places, USER_FIELD, FIRST, LAST)
    now_ms = commands.milliseconds(clock)
    found: list[Listed | None] = []
    for place, reply in zip(places, replies, strict=True):
        try:
            if isinstance(reply, Exception):
                raise reply
            packed, *rest = reply
            meta = Meta.parse(packed or b"")
        except (Damaged, NewerFormat):
            found.append(None)
        else:
            is_alive = meta.deadline_ms > now_ms
            found.append(Listed(place, meta, *(part or b"" for part in rest)) if is_alive else None)
    return found


def end(
    places: Sequence[Place], reason: EndReason, events_kept: int
) -> Flow[list[tuple[Place, Ended]]]:
    """End sessions of one bucket on one trip; return those that there were.

    ``events_kept`` as in Terms.
    """
    replies = yield tuple(commands.end(place, reason, events_kept) for place in places)
    found = zip(places, map(commands.parse_end, replies), strict=True)
    return [(place, ended) for place, ended in found if ended]


def by_bucket(places: Iterable[Place]) -> Iterable[list[Place]]:
    """Return the places in groups that are on one node, wherever the store has its nodes."""
    buckets = defaultdict(list)
    for place in places:
        buckets[place.index].append(place)
    return buckets.values()
