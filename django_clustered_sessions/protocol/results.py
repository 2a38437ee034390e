"""What an operation comes to. Pure; times are ms, ``now_ms`` is the store's clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .record import EndReason, Mode


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """Who has a write: so many replicas, and the primary's own disk, as far as that was asked.

    ``after_ms`` is how long that took, by the store's clock; ``problem`` is the store's own word
    where it does not tell.
    """

    replicas: int
    is_on_disk: bool
    after_ms: int
    problem: str = ""


class Alive(NamedTuple):
    """The session is there and was written or renewed; times in ms by the store's clock.

    ``counters`` are the new values of what a commit added to, ``before`` is the version that the
    record had before it. ``swept`` is how many expired sessions a creation took out of the index.
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
    """There is no such session, and why."""

    now_ms: int
    reason: EndReason


@dataclass(frozen=True, slots=True)
class Ended:
    """The session was ended; how long it had lived, in ms, None where it does not tell.

    ``user`` is the field that says who was logged in, or empty.
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
    """The lock is the asker's, since then; ``inside``: it is the one of an outer request."""

    now_ms: int
    since_ms: int
    inside: bool = False


@dataclass(frozen=True, slots=True)
class Held:
    """Another has the lock, and since when.

    ``queue_position`` is the asker's, from 1; 0 where it is not in it. ``waiting`` is how
    many wait where that are too many.
    """

    now_ms: int
    since_ms: int
    holder: str
    lease_left_ms: int = 0
    queue_position: int = 0
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class Lost:
    """The lock was the asker's and is no more; ``holder`` has it now, empty if nobody."""

    now_ms: int
    since_ms: int
    holder: str


@dataclass(frozen=True, slots=True)
class TooLarge:
    """The session would have this many stored bytes."""

    now_ms: int
    size: int
