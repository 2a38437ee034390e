"""Find, count and limit the sessions of one user."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from django_clustered_sessions.protocol.effects import Call, Trip, plain
from django_clustered_sessions.protocol.options import kept_per_bucket
from django_clustered_sessions.protocol.record import Damaged, SessionKeys, bucket_tag, claims_key

from .script_calls import Status, parse, scripted


def counted(prefix: str, bucket: int, user: bytes) -> Trip:
    """Ask a bucket for its number of sessions of a user, by tag, and of users; and its index too.

    Two plain commands take the store a quarter of the time that ``owned`` does.
    """
    tag = bucket_tag(prefix, bucket)
    return (
        plain("HMGET", user, "", key=f"{tag}:users"),
        plain("ZCOUNT", 0, "+inf", key=f"{tag}:index"),
    )


def parse_counted(counts: Any, listed: Any) -> bool:
    """Return whether ``owned`` has sessions to find in the bucket, or a count to mend."""
    if isinstance(counts, Damaged) or isinstance(listed, Damaged):
        return True
    of_user, of_all = counts
    return of_user is not None or (of_all or b"0") != b"%d" % listed


def owned(prefix: str, bucket: int, user: bytes) -> Call:
    """Build ``lua/owned.lua`` for a user's tag and one bucket under the setting KEY_PREFIX."""
    tag = bucket_tag(prefix, bucket)
    return scripted("owned", (f"{tag}:index", f"{tag}:users"), user)


def parse_owned(reply: Any) -> list[bytes]:
    """Return the public ids of the sessions that ``owned`` found in its bucket, none for damage."""
    status, _, rest = parse(reply)
    return rest if status is Status.DONE else []


def unlist(keys: SessionKeys, user: bytes, events_kept: int) -> Call:
    """Build ``lua/unlist.lua``; ``user`` is the tag of the user to whom the session belonged.

    ``events_kept`` as in WriteOptions.
    """
    named = (keys.record, keys.index, keys.users, keys.events)
    return scripted("unlist", named, user, kept_per_bucket(events_kept))


def claim(
    prefix: str,
    user: bytes,
    public_id: str,
    most: int,
    lapse_ms: int,
    counting: Sequence[str] = (),
    others: Iterable[bytes] = (),
) -> Call:
    """Build ``lua/claim.lua`` for a user's tag under the setting KEY_PREFIX.

    ``counting`` are the ids of other sessions that count, ``others`` of those that do not.
    """
    keys = (claims_key(prefix, user),)
    return scripted("claim", keys, public_id, most, lapse_ms, len(counting), *counting, *others)


def parse_claim(reply: Any) -> list[bytes] | None:
    """Return the ids of the claims that stand in the way: none if it is claimed.

    None for damage.
    """
    status, _, rest = parse(reply)
    return None if status is Status.GONE else rest


def unclaim(prefix: str, user: bytes, public_id: str) -> Call:
    """Give a claim back."""
    return plain("ZREM", public_id, key=claims_key(prefix, user))


def forget_claims(prefix: str, user: bytes) -> Call:
    """Remove all claims of a user."""
    return plain("DEL", key=claims_key(prefix, user))
