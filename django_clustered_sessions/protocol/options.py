"""Options of a write, a lock or an expiry. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

from .record import LATEST_MS, Mode, milliseconds_of

#: Ages are cut to this, in ms (a century), so that every deadline fits the record.
_LONGEST_MS: Final = 100 * 365 * 24 * 60 * 60 * 1000


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """Number of replicas that a write waits for, with ``fsync`` on disk, and the longest wait.

    With ``fsync`` the primary's own disk as well.
    """

    replicas: int
    fsync: bool
    timeout_ms: int


class WriteOptions(NamedTuple):
    """Settings for every write: times in ms, ``max_bytes`` in stored bytes.

    ``on_conflict`` is the setting: ``"merge"``, ``"overwrite"`` or ``"error"``. ``client`` is the
    address and browser that use the session, empty where they are not kept. ``events_kept`` is the
    number of events that the store keeps for workers, 0 for none.
    """

    default_age_ms: int
    idle_ms: int
    absolute_ms: int
    max_bytes: int
    replay_ms: int
    on_conflict: str
    client: bytes = b""
    events_kept: int = 0

    @property
    def ages(self) -> tuple[int, int, int]:
        """Default age, idle and absolute timeout in ms, as scripts want them: 0 for no timeout."""
        return bounded(self.default_age_ms), self.idle_ms, self.absolute_ms


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
