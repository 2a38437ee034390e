"""The operations on all sessions of a user, as flows.

Each bucket's index knows its sessions' users, and is changed by the script that changes a session:
it is never behind. A user's sessions are spread over all buckets. One trip asks all buckets for
their numbers, and another asks those that have some for the sessions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Final, NamedTuple

from .commands import records, script_calls, users
from .effects import Flow, batches
from .record import (
    BUCKETS,
    FIRST,
    LAST,
    PAST,
    USER_FIELD,
    Damaged,
    EndReason,
    Meta,
    NewerFormat,
    SessionKeys,
    user_tag,
)
from .results import Ended

#: Sessions that one trip asks for.
_PER_TRIP: Final = 1000


class Listed(NamedTuple):
    """A session in the store: its place, its meta field, and the field with the key of its user.

    ``user`` is raw, empty without a user; so are ``first`` and ``last``, the address and browser
    that used it, and ``past``, see ``sealing``.
    """

    keys: SessionKeys
    meta: Meta
    user: bytes
    first: bytes
    last: bytes
    past: bytes


def of_user(prefix: str, user: str, events_kept: int) -> Flow[list[Listed]]:
    """Find all sessions of a user under the setting KEY_PREFIX, the last used first.

    Sessions of the index that the store does not have, such as evicted records, leave the index.
    ``events_kept`` as in WriteOptions.
    """
    tag = user_tag(user)
    buckets = range(BUCKETS)
    trips = (users.counted(prefix, bucket, tag) for bucket in buckets)
    told = iter((yield tuple(chain.from_iterable(trips))))
    asked = [one for one in buckets if users.parse_counted(next(told), next(told))]
    if not asked:
        return []
    replies = yield tuple(users.owned(prefix, bucket, tag) for bucket in asked)
    ids = (public_id for reply in replies for public_id in users.parse_owned(reply))
    found: list[Listed] = []
    for all_keys in batches(places_of(prefix, ids).values(), _PER_TRIP):
        listed = yield from looked_up(all_keys)
        mine = [one for one in listed if one and one.meta.user == tag]
        found += mine
        gone = {keys.id for keys in all_keys} - {one.keys.id for one in mine}
        if gone:
            lost = (keys for keys in all_keys if keys.id in gone)
            yield tuple(users.unlist(keys, tag, events_kept) for keys in lost)
    found.sort(key=lambda one: one.meta.seen_ms, reverse=True)
    return found


def places_of(prefix: str, ids: Iterable[bytes]) -> dict[bytes, SessionKeys]:
    """Return the place of each public id; skip others, which another program wrote."""
    all_keys: dict[bytes, SessionKeys] = {}
    for public_id in ids:
        with suppress(ValueError):
            all_keys[public_id] = SessionKeys.of_id(prefix, public_id.decode("ascii", "replace"))
    return all_keys


def one(keys: SessionKeys) -> Flow[Listed | None]:
    """Find one session."""
    (found,) = yield from looked_up([keys])
    return found


def looked_up(all_keys: Sequence[SessionKeys]) -> Flow[list[Listed | None]]:
    """Find some sessions, of any user; None for each that does not exist."""
    *replies, clock = yield records.described(all_keys, USER_FIELD, FIRST, LAST, PAST)
    now_ms = script_calls.milliseconds(clock)
    found: list[Listed | None] = []
    for keys, reply in zip(all_keys, replies, strict=True):
        try:
            if isinstance(reply, Exception):
                raise reply
            packed, *rest = reply
            meta = Meta.parse(packed or b"")
        except (Damaged, NewerFormat):
            found.append(None)
        else:
            is_alive = meta.deadline_ms > now_ms
            found.append(Listed(keys, meta, *(part or b"" for part in rest)) if is_alive else None)
    return found


def end(
    all_keys: Sequence[SessionKeys], reason: EndReason, events_kept: int
) -> Flow[list[tuple[SessionKeys, Ended]]]:
    """End sessions of one bucket on one trip; return those that existed.

    ``events_kept`` as in WriteOptions.
    """
    replies = yield tuple(records.end(keys, reason, events_kept) for keys in all_keys)
    found = zip(all_keys, map(records.parse_end, replies), strict=True)
    return [(keys, ended) for keys, ended in found if ended]


def by_bucket(all_keys: Iterable[SessionKeys]) -> Iterable[list[SessionKeys]]:
    """Return the places in groups that are on one node, wherever the store has its nodes."""
    buckets = defaultdict(list)
    for keys in all_keys:
        buckets[keys.index].append(keys)
    return buckets.values()
