"""Results of operations. Pure; times are ms, ``now_ms`` is the store's clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .record import EndReason, Mode


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """Copies of a write: the number of replicas, and the primary's own disk if that was asked.

    ``after_ms`` is the time until then, by the store's clock; ``problem`` is the store's error
    where it cannot tell.
    """

    replicas: int
    is_on_disk: bool
    after_ms: int
    problem: str = ""


class Alive(NamedTuple):
    """The session is there and was written or renewed; times in ms by the store's clock.

    ``counters`` are the new values of the counters that a commit added to, ``before`` is the
    version that the record had before it. ``swept`` is the number of expired sessions that a
    creation took out of the index.
    """

    now_ms: int
    deadline_ms: int
    overwritten: int = 0
    counters: tuple[int, ...] = ()
    mode: Mode | None = None
    before: bytes = b""
    swept: int = 0


@dataclass(frozen=True, slots=True)
class Gone:
    """No such session exists, for a reason.

    ``counters`` are the new values of the counters that a commit added to which had landed before
    the session moved to another key; None where it has not landed.
    """

    now_ms: int
    reason: EndReason
    counters: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """The session was ended; its life was so long, in ms, None where it does not tell.

    ``user`` is the field with the key of the user, or empty.
    """

    lifetime_ms: int | None
    user: bytes


@dataclass(frozen=True, slots=True)
class Exists:
    """The key is taken."""

    now_ms: int


@dataclass(frozen=True, slots=True)
class Conflict:
    """Others changed these fields since they were loaded; empty bytes stand for no value."""

    now_ms: int
    values: Mapping[bytes, bytes]


class Taken(NamedTuple):
    """The request has the lock, since then; ``inside``: it is the lock of an outer request."""

    now_ms: int
    since_ms: int
    inside: bool = False


@dataclass(frozen=True, slots=True)
class Held:
    """Another request has the lock, since then.

    ``queue_position`` is this request's, from 1; 0 where it is not in the queue. ``before`` is the
    token of the one before it there, the holder or a waiter; its lease, or its wait, has
    ``before_left_ms`` left. ``waiting`` is the number of waiters where it is at its limit.
    """

    now_ms: int
    since_ms: int
    holder: str
    lease_left_ms: int = 0
    queue_position: int = 0
    waiting: int = 0
    before: str = ""
    before_left_ms: int = 0


@dataclass(frozen=True, slots=True)
class Lost:
    """The request has lost the lock; ``holder`` has it now, empty if none."""

    now_ms: int
    since_ms: int
    holder: str


@dataclass(frozen=True, slots=True)
class TooLarge:
    """The session would have this many stored bytes."""

    now_ms: int
    size: int
