"""The sessions of the whole store, as flows: some buckets after another, or by deadline.

What a flow returns fits into memory, whatever the number of sessions: a bucket has a thousandth
of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Final, NamedTuple

from .commands import index
from .commands.index import Place
from .effects import Flow, batches
from .record import BUCKETS, ID_LENGTH, SessionKeys
from .user_index import Listed, looked_up, places_of

#: Sessions that one trip asks for.
_PER_TRIP: Final = 1000
#: Entries of each bucket that a trip asks for: for a page, and to go on from there.
FEW: Final = 3
MORE: Final = 16

#: The place behind which all sessions are.
FIRST_PLACE: Final = Place(2**53, 0, b"")


class Group(NamedTuple):
    """Some buckets, and the number of entries that they have."""

    buckets: Sequence[int]
    size: int


def groups(prefix: str) -> Flow[list[Group]]:
    """Return all buckets that have sessions, in groups for one trip each."""
    counts = yield tuple(index.counted(prefix, bucket) for bucket in range(BUCKETS))
    return _grouped(range(BUCKETS), map(index.parse_counted, counts))


def of_buckets(prefix: str, buckets: Sequence[int]) -> Flow[list[Listed]]:
    """Find the sessions of some buckets, in no order."""
    replies = yield tuple(index.listed(prefix, bucket) for bucket in buckets)
    ids = chain.from_iterable(map(index.parse_listed, replies))
    return (yield from listed(prefix, ids))


def starting_with(prefix: str, start: str) -> Flow[list[Listed]]:
    """Find the sessions whose public ids begin with ``start``, valid and of 2 characters or more.

    Two characters name the bucket.
    """
    keys = SessionKeys.of_id(prefix, start.ljust(ID_LENGTH, "A"))
    (reply,) = yield (index.listed_beside(keys),)
    ids = (one for one in index.parse_listed(reply) if one.startswith(start.encode()))
    return (yield from listed(prefix, ids))


def latest(prefix: str, after: Place, each: int) -> Flow[list[Place]]:
    """Return some of the places after that one, the next first; none if there are no more.

    ``each`` is the number of entries that are asked for in each bucket.
    """
    while True:
        calls = (index.latest(prefix, bucket, after.deadline_ms, each) for bucket in range(BUCKETS))
        replies = yield tuple(chain.from_iterable(calls))
        found: list[Place] = []
        # A bucket may have more at the last deadline that it told, and before.
        told_ms = 0
        for at, reply in enumerate(replies):
            places = index.parse_places(reply, at // 2)
            found += places
            if len(places) == each:
                told_ms = max(told_ms, places[-1].deadline_ms)
        sure = [place for place in found if place < after and place.deadline_ms > told_ms]
        if sure or not told_ms:
            return sorted(sure, reverse=True)
        # More sessions have the next deadline: those that a site lets expire at midnight, say.
        tied = yield from _at(prefix, told_ms, after)
        if tied:
            return tied
        # Before all that end earlier: no id has such a byte.
        after = Place(told_ms - 1, BUCKETS - 1, b"\xff")


def _at(prefix: str, deadline_ms: int, after: Place) -> Flow[list[Place]]:
    """Return some of the places at a deadline after that place, the next first."""
    first = after.bucket if after.deadline_ms == deadline_ms else BUCKETS - 1
    buckets = range(first, -1, -1)
    calls = (index.counted_at(prefix, bucket, deadline_ms) for bucket in buckets)
    counts = map(index.parse_counted, (yield tuple(chain.from_iterable(calls))))
    for group in _grouped(buckets, map(sum, zip(counts, counts, strict=True))):
        calls = (index.at(prefix, bucket, deadline_ms) for bucket in group.buckets)
        replies = yield tuple(chain.from_iterable(calls))
        found = chain.from_iterable(
            index.parse_places(reply, group.buckets[at // 2]) for at, reply in enumerate(replies)
        )
        if places := sorted((place for place in found if place < after), reverse=True):
            return places
    return []


def _grouped(buckets: Iterable[int], counts: Iterable[int]) -> list[Group]:
    """Return the buckets that have entries, in groups for one trip each."""
    groups: list[Group] = []
    some: list[int] = []
    total = 0
    for bucket, count in zip(buckets, counts, strict=True):
        if some and total + count > _PER_TRIP:
            groups.append(Group(some, total))
            some, total = [], 0
        if count:
            some.append(bucket)
            total += count
    return [*groups, Group(some, total)] if some else groups


def listed(prefix: str, ids: Iterable[bytes]) -> Flow[list[Listed]]:
    """Find the sessions with these public ids; leave out others."""
    found: list[Listed] = []
    for all_keys in batches(places_of(prefix, ids).values(), _PER_TRIP):
        found += (one for one in (yield from looked_up(all_keys)) if one)
    return found
