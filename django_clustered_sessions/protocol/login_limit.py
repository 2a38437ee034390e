"""Limit the sessions in which a user is logged in: a login claims to be one of them, as flows.

Sessions that have the user are counted where they are, in the buckets' indexes. A login that is not
written yet, and a session that moves to another key, have a claim at one place for each user. A
claim outlasts every look at the indexes that began before the session was written, so that a count
misses none: each is in the index, or among the claims, or in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from django_clustered_sessions.exceptions import SessionLimitReached

from . import user_index
from .commands import users
from .effects import Flow
from .record import NOBODY, SessionKeys, user_tag
from .user_index import Listed

#: Time that a look at a user's sessions may be relied on, in seconds.
LOOK_S: Final = 10.0
#: Time after a claim in which the write of the login may begin, in seconds.
FRESH_S: Final = 30.0
#: Looks at the indexes by a login of a process that stands still after each look.
_LOOKS: Final = 3


@dataclass(frozen=True, slots=True)
class Limit:
    """Most sessions of a user, whether the oldest make room, and a claim's life in ms.

    ``events_kept`` as in WriteOptions.
    """

    most: int
    ends_oldest: bool
    lapse_ms: int
    events_kept: int = 0


def lapse_ms(wait_s: float, trip_s: float) -> int:
    """Return the time that a claim has to last, in ms.

    ``wait_s`` is the longest wait of a write for a lock, ``trip_s`` the longest time of a trip.
    """
    return round((FRESH_S + wait_s + LOOK_S + 3 * trip_s) * 1000)


def claim(
    keys: SessionKeys,
    prefix: str,
    user: str,
    limit: Limit,
    end: Callable[[Sequence[SessionKeys]], Flow[None]],
    clock: Callable[[], float],
) -> Flow[None]:
    """Claim for the session at ``keys``, which has to be there, that the user may log in.

    Where the limit is reached, the oldest sessions are ended by ``end`` if that is the policy. A
    login that is not written yet is ended only where nothing else is left. ``clock`` tells seconds.

    Raises SessionLimitReached.
    """
    tag = user_tag(user)
    for _ in range(_LOOKS):
        looked_s = clock()
        found = yield from user_index.of_user(prefix, user, limit.events_kept)
        counting = _by_age(tag, (one for one in found if one.keys.id != keys.id))
        ended: list[bytes] = []
        nothing: list[bytes] = []
        while clock() - looked_s < LOOK_S:
            surplus = len(counting) + 1 - limit.most
            if surplus > 0:
                # Another user's session counts, for it may be about to change hands, and stays.
                mine = [one.keys for one in counting if one.meta.user in (tag, NOBODY)]
                if not limit.ends_oldest or surplus > len(mine):
                    raise SessionLimitReached(limit.most)
                oldest = mine[:surplus]
                yield from end(oldest)
                ended += (one.id.encode() for one in oldest)
                counting = [one for one in counting if one.keys not in oldest]
                # One that had moved before its end came is behind one of these claims by now.
                nothing.clear()
            known = [one.keys.id for one in counting]
            options = keys.id, limit.most, limit.lapse_ms
            (reply,) = yield (users.claim(prefix, tag, *options, known, [*ended, *nothing]),)
            unknown = users.parse_claim(reply)
            if unknown is None:
                # Another program damaged it.
                yield (users.forget_claims(prefix, tag),)
                continue
            if not unknown:
                return
            # Written, or moved, since this one looked; on their way in; or no more.
            ids = [*(one.encode() for one in known), *nothing, *unknown]
            counting = _by_age(tag, (yield from _there(prefix, ids)))
            here = {one.keys.id.encode() for one in counting}
            nothing = [one for one in ids if one not in here]
    raise SessionLimitReached(limit.most)


def _by_age(tag: bytes, found: Iterable[Listed]) -> list[Listed]:
    """Sort sessions by when the user logged in; last come those without the user, as they are."""
    return sorted(found, key=lambda one: one.meta.created_ms if one.meta.user == tag else math.inf)


def _there(prefix: str, ids: Iterable[bytes]) -> Flow[list[Listed]]:
    """Find those of some sessions that exist at one moment, so that one that moves is found once.

    Two equal reads have found the sessions that existed between them: no place is used twice.
    """
    all_keys = list(user_index.places_of(prefix, ids).values())
    before: list[SessionKeys] | None = None
    while True:
        found = [one for one in (yield from user_index.looked_up(all_keys)) if one]
        now = [one.keys for one in found]
        if now == before:
            return found
        before = now


def keep(new: SessionKeys, prefix: str, user: bytes, limit: Limit) -> Flow[None]:
    """Claim that a session which moves to ``new`` stays that of a user, by tag.

    A look at the indexes meanwhile may find it in neither bucket.
    """
    yield (users.claim(prefix, user, new.id, 0, limit.lapse_ms),)


def give_back(keys: SessionKeys, prefix: str, user: str) -> Flow[None]:
    """Give up the claim of a login that will not be written."""
    yield (users.unclaim(prefix, user_tag(user), keys.id),)
