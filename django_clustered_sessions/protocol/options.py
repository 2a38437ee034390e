"""Options of a write, a lock or an expiry. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from struct import Struct
from typing import Any, Final, NamedTuple

from .record import BUCKETS, LATEST_MS, Ages, Mode, milliseconds_of

#: Ages are cut to this, in ms (a century), so that every deadline fits the record.
_LONGEST_MS: Final = 100 * 365 * 24 * 60 * 60 * 1000


_OPTIONS: Final = Struct(">6q?")


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """Number of replicas that a write waits for, with ``fsync`` on disk, and the longest wait.

    With ``fsync`` the primary's own disk as well.
    """

    replicas: int
    fsync: bool
    timeout_ms: int


class WriteOptions(NamedTuple):
    """Settings for every write: times in ms, bounded, and ``max_bytes`` in stored bytes.

    ``on_conflict`` is the setting: ``"merge"``, ``"overwrite"`` or ``"error"``. ``client`` is the
    address and browser that use the session, empty where they are not kept. ``events_kept`` is the
    number of events that the store keeps for workers, 0 for none.
    """

    ages: Ages
    max_bytes: int
    replay_ms: int
    on_conflict: str
    client: bytes = b""
    events_kept: int = 0

    @property
    def packed(self) -> bytes:
        """One argument of scripts, as ``lua/write.lua`` has it."""
        return _OPTIONS.pack(
            self.replay_ms,
            *self.ages,
            self.max_bytes,
            kept_per_bucket(self.events_kept),
            self.on_conflict == "overwrite",
        )


class LockOptions(NamedTuple):
    """Settings for a lock: the longest times, in ms.

    ``wait_ms``: of a wait; ``lease_ms``: of a lock whose holder is silent; ``hold_ms``: of a lock
    in all. ``most`` requests may wait for one session, -1 for any number. ``name`` is the
    requester's, as ``record.locker_name`` makes it.
    """

    wait_ms: int
    lease_ms: int
    hold_ms: int
    most: int
    name: bytes


class Fence(NamedTuple):
    """The lock of a write: its token, None for no lock; and whether the write releases it."""

    token: str | None = None
    release: bool = False


NO_LOCK: Final = Fence()


@dataclass(frozen=True, slots=True)
class Expiry:
    """The expiry of a session: mode, and its span in ms (ABSOLUTE: since the epoch)."""

    mode: Mode
    span_ms: int

    @classmethod
    def of(cls, value: Any) -> Expiry:
        """Read a value of ``_session_expiry``, as Django keeps it.

        Raises ValueError or TypeError for one that is neither a number nor a date.
        """
        if value is None:
            return cls(Mode.DEFAULT, 0)
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return cls(Mode.ABSOLUTE, min(milliseconds_of(value), LATEST_MS))
        try:
            return cls(Mode.SLIDING, round(value * 1000)) if value else cls(Mode.BROWSER, 0)
        except ArithmeticError as error:
            raise ValueError(f"{value!r} is no number of seconds: {error}") from error

    @property
    def bounded_ms(self) -> int:
        """Span, cut so that the deadline fits the record."""
        if self.mode is Mode.ABSOLUTE:
            return max(0, min(self.span_ms, 2**48 - 1))
        return bounded(self.span_ms)


def bounded(span_ms: int) -> int:
    """Return a span of time, cut so that a deadline after it fits the record; in ms."""
    return max(-_LONGEST_MS, min(span_ms, _LONGEST_MS))


@cache
def kept_per_bucket(events_kept: int) -> int:
    """Return how many events a bucket has to keep for all to keep that many, 0 for none.

    That is more than its share: sessions are spread over the buckets at random.
    """
    share = events_kept / BUCKETS
    return math.ceil(share + 4 * math.sqrt(share) + 4) if events_kept else 0
