"""Read the index of a bucket: its sessions by deadline, those without a user below zero."""

from __future__ import annotations

from typing import Any, NamedTuple

from django_clustered_sessions.protocol.effects import Call, Trip, plain
from django_clustered_sessions.protocol.record import (
    ID_LENGTH,
    Damaged,
    SessionKeys,
    bucket_tag,
)


class Place(NamedTuple):
    """Place of a session among all by deadline: that one in ms, its bucket, and its public id."""

    deadline_ms: int
    bucket: int
    id: bytes


def counted(prefix: str, bucket: int) -> Call:
    """Ask for the number of entries of a bucket."""
    return plain("ZCOUNT", "-inf", "+inf", key=_index(prefix, bucket))


def parse_counted(reply: Any) -> int:
    """Return the number, 0 for damage."""
    return 0 if isinstance(reply, Damaged) else int(reply)


def listed(prefix: str, bucket: int) -> Call:
    """Ask for all entries of a bucket."""
    return plain("ZRANGE", 0, -1, key=_index(prefix, bucket))


def listed_beside(keys: SessionKeys) -> Call:
    """Ask for all entries of the bucket of a session."""
    return plain("ZRANGE", 0, -1, key=keys.index)


def parse_listed(reply: Any) -> list[bytes]:
    """Return the public ids, none for damage."""
    return [] if isinstance(reply, Damaged) else [member[:ID_LENGTH] for member in reply]


def latest(prefix: str, bucket: int, until_ms: int, most: int) -> Trip:
    """Ask for the last entries of a bucket up to a deadline, ``most`` with and without a user."""
    key, limited = _index(prefix, bucket), ("BYSCORE", "LIMIT", 0, most, "WITHSCORES")
    return (
        plain("ZRANGE", until_ms, 1, "REV", *limited, key=key),
        plain("ZRANGE", -until_ms, -1, *limited, key=key),
    )


def counted_at(prefix: str, bucket: int, deadline_ms: int) -> Trip:
    """Ask for the number of entries of a bucket at a deadline, with and without a user."""
    key = _index(prefix, bucket)
    return tuple(plain("ZCOUNT", at, at, key=key) for at in (deadline_ms, -deadline_ms))


def at(prefix: str, bucket: int, deadline_ms: int) -> Trip:
    """Ask for the entries of a bucket at a deadline, with and without a user."""
    key = _index(prefix, bucket)
    return tuple(
        plain("ZRANGE", at, at, "BYSCORE", "WITHSCORES", key=key)
        for at in (deadline_ms, -deadline_ms)
    )


def parse_places(reply: Any, bucket: int) -> list[Place]:
    """Return the places of a bucket in the order of the reply, none for damage."""
    if isinstance(reply, Damaged):
        return []
    flat = iter(reply)
    return [
        Place(abs(int(score)), bucket, member[:ID_LENGTH])
        for member, score in zip(flat, flat, strict=True)
    ]


def _index(prefix: str, bucket: int) -> str:
    return f"{bucket_tag(prefix, bucket)}:index"
