"""In how many sessions a user may be logged in: a login's claim to be one of them, as flows.

Sessions that have the user are counted where they are, in the buckets' indexes. What those do not
have yet, a login that is not written and a session that moves to another key, has a claim at one
place for each user, which outlasts every look at the indexes that began before it was written. So
nobody who counts misses one: it is in the index, or among the claims, or in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from django_clustered_sessions.exceptions import SessionLimitReached

from . import commands, user_index
from .effects import Flow
from .record import NOBODY, SessionKeys, user_tag
from .user_index import Listed

#: How long a look at a user's sessions may be relied on, in seconds.
_LOOK_S: Final = 10.0
#: How long after a claim the login may begin to be written, in seconds.
FRESH_S: Final = 30.0
#: So often a login looks anew where others log in as the same user.
_ROUNDS: Final = 20


@dataclass(frozen=True, slots=True)
class Limit:
    """How many sessions a user may have, whether the oldest make room, and a claim's life in ms.

    ``events_kept`` as in Terms.
    """

    most: int
    ends_oldest: bool
    lapse_ms: int
    events_kept: int = 0


def lapse_ms(wait_s: float, trip_s: float) -> int:
    """Return how long a claim has to last, in ms.

    ``wait_s`` is how long a write may wait for a lock, ``trip_s`` how long a trip may take.
    """
    return round((FRESH_S + wait_s + _LOOK_S + 3 * trip_s) * 1000)


def claim(
    keys: SessionKeys,
    prefix: str,
    user: str,
    limit: Limit,
    end: Callable[[Sequence[SessionKeys]], Flow[None]],
    clock: Callable[[], float],
) -> Flow[None]:
    """Claim for the session at ``place``, which has to be there, that the user may log in.

    Where the limit is reached, the oldest sessions are ended by ``end`` if that is the policy. A
    login that is not written yet is ended only where nothing else is left. ``clock`` tells seconds.

    Raises SessionLimitReached.
    """
    tag = user_tag(user)
    for _ in range(_ROUNDS):
        looked_s = clock()
        found = yield from user_index.of_user(prefix, user, limit.events_kept)
        found.sort(key=lambda one: one.meta.created_ms)
        counting = [one.keys for one in found if one.keys.id != keys.id]
        others: list[bytes] = []
        kept: list[str] = []
        while clock() - looked_s < _LOOK_S:
            surplus = max(len(counting) + len(kept) + 1 - limit.most, 0)
            if surplus:
                if not limit.ends_oldest or surplus > len(counting):
                    raise SessionLimitReached(limit.most)
                yield from end(counting[:surplus])
                others += (ended.id.encode() for ended in counting[:surplus])
                del counting[:surplus]
            known = [*(counted.id for counted in counting), *kept]
            options = keys.id, limit.most, limit.lapse_ms
            (reply,) = yield (commands.claim(prefix, tag, *options, known, others),)
            unknown = commands.parse_claim(reply)
            if unknown is None:
                # Damage by somebody else.
                yield (commands.forget_claims(prefix, tag),)
                continue
            if not unknown:
                return
            seen = yield from _seen(prefix, unknown)
            if any(one and one.meta.user == tag for one in seen.values()):
                # Written, or moved, since this one looked.
                break
            # Another user's session counts, for it may be about to change hands, and is not ended.
            mine = [one for one in seen.values() if one and one.meta.user == NOBODY]
            counting += (one.keys for one in mine)
            kept += (one.keys.id for one in seen.values() if one and one not in mine)
            others += (public_id for public_id, one in seen.items() if one is None)
    raise SessionLimitReached(limit.most)


def _seen(prefix: str, ids: Sequence[bytes]) -> Flow[dict[bytes, Listed | None]]:
    """Find what is behind claims; nothing: it was ended, or has expired."""
    all_keys = user_index.places_of(prefix, ids)
    found = yield from user_index.looked_up(list(all_keys.values()))
    return dict.fromkeys(ids) | dict(zip(all_keys, found, strict=True))


def keep(new: SessionKeys, prefix: str, user: bytes, limit: Limit) -> Flow[None]:
    """Claim that a session which moves to ``new`` stays that of a user, by tag.

    Who looks at the indexes meanwhile may find it in neither bucket.
    """
    yield (commands.claim(prefix, user, new.id, 0, limit.lapse_ms),)


def give_back(keys: SessionKeys, prefix: str, user: str) -> Flow[None]:
    """Give up the claim of a login that will not be written."""
    yield (commands.unclaim(prefix, user_tag(user), keys.id),)
