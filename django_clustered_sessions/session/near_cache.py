"""The near cache: sessions that this process has read or written, as the store keeps them.

Nothing here is believed: a load asks the store on its one trip whether the version is still the
record's. Versions are random and compared for equality, so a store that came back empty, older,
or with another primary just has another version. Only while the store is away, and only where the
site wants it, a session is read from here alone, for as long as it lives by the store's clock.

With CLUSTERED_SESSIONS_NEAR_READS a session may have a *copy* beside it: the proof of when it was
the store's current one. ``near_reads`` decides how long that is good for.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from django_clustered_sessions.protocol.record import CachedSession, Loaded, step_ms

#: Memory of Python for a session, for one of its fields and for a copy, beside the bytes in it.
_SESSION_BYTES: Final = 600
_FIELD_BYTES: Final = 200
_COPY_BYTES: Final = 600

#: An ended session leaves a trace in the store for so long, less what clocks may differ; it must
#: have had so much life left; and no warning follows another for so long. Seconds.
_TRACE_S: Final = 500
_DOUBT_S: Final = 10
_QUIET_S: Final = 60
#: Number of ended sessions that are remembered.
ENDED: Final = 2000


class Renewal(NamedTuple):
    """The last renewal of a session's deadline: its time by the store's clock, and its ages.

    The deadline counts from ``at_ms``. The terms are opaque here.
    """

    at_ms: int
    options: Any


class Life(NamedTuple):
    """The expiry of a session, as the store last told it: its clock then, and this process's.

    ``mode`` is the record's, opaque here; ``renewal`` is the last one that this process knows of.
    """

    seen_at_s: float
    seen_ms: int
    deadline_ms: int
    mode: Any = None
    renewal: Renewal | None = None

    def left_s(self, now_s: float) -> float:
        """Return the seconds that it has left, by the store's clock."""
        return (self.deadline_ms - self.seen_ms) / 1000 - (now_s - self.seen_at_s)

    def is_renewed(self, now_s: float, options: object) -> bool:
        """Return whether the store would take another renewal for none, as it comes too early."""
        if self.renewal is None or self.renewal.options != options:
            return False
        since_ms = self.renewal.at_ms
        until_ms = since_ms + step_ms(self.deadline_ms - since_ms)
        return self.seen_ms + (now_s - self.seen_at_s) * 1000 < until_ms


class Copy(NamedTuple):
    """A session that was the store's current one at ``current_at_s``, by clock.now_s().

    ``now_ms`` was the store's clock at ``seen_at_s``. ``generation`` is the one of the channel that
    is told of changes; the copy is worth nothing once the channel has another. Without
    ``is_tracked`` the channel is not told of changes to this session.
    """

    found: Loaded
    now_ms: int
    seen_at_s: float
    current_at_s: float
    generation: object
    is_tracked: bool

    def is_before(self, other: Copy) -> bool:
        """Return whether another copy of the session was current later."""
        return self.generation is other.generation and self.current_at_s < other.current_at_s


@dataclass(eq=False, slots=True)
class _Kept:
    known: CachedSession
    size: int
    life: Life | None
    copy: Copy | None = None


class NearCache:
    """The sessions used last, by their records' keys, within a number of bytes."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self.ended_lately: OrderedDict[str, None] = OrderedDict()
        self.bytes = 0
        self._told_at_s = float("-inf")

    def get(self, record: str) -> CachedSession | None:
        """Return what is known of a session, and take note that it was used."""
        with self._lock:
            kept = self._kept.get(record)
            if kept is None:
                return None
            self._kept.move_to_end(record)
            return kept.known

    def life(self, record: str) -> Life | None:
        """Return when a session that is known expires, as far as that is known."""
        kept = self._kept.get(record)
        return kept.life if kept else None

    def copy(self, record: str) -> Copy | None:
        """Return the copy of a session, and take note that it was used."""
        with self._lock:
            kept = self._kept.get(record)
            if kept is None or kept.copy is None:
                return None
            self._kept.move_to_end(record)
            return kept.copy

    def put(
        self,
        record: str,
        known: CachedSession,
        limit: int,
        life: Life | None = None,
        copy: Copy | None = None,
    ) -> None:
        """Keep a session, unless a copy is kept that was current later than its ``copy``.

        Without a ``copy`` one of the same version stays, and without a ``life`` the one that is
        known. The sessions used longest ago are forgotten beyond ``limit`` bytes.
        """
        with self._lock:
            kept = self._kept.get(record)
            if copy is None:
                copy = kept.copy if kept and kept.known.version == known.version else None
            elif kept and kept.copy and copy.is_before(kept.copy):
                return
            if life is None and kept:
                life = kept.life
            size = memory(known) + (_COPY_BYTES if copy else 0)
            self._drop(record)
            if size > limit or record in self.ended_lately:
                return
            self._kept[record] = _Kept(known, size, life, copy)
            self.bytes += size
            while self.bytes > limit:
                self._drop(next(iter(self._kept)))

    def hold(self, record: str, copy: Copy, limit: int) -> None:
        """Keep a session as its copy has it. See put()."""
        known = CachedSession.of(copy.found.meta.version, copy.found.values, copy.found.past)
        self.put(record, known, limit, copy=copy)

    def invalidate(self, record: str) -> None:
        """Forget a session's copy that is tracked: the store has told that it has changed."""
        with self._lock:
            kept = self._kept.get(record)
            if kept and kept.copy and kept.copy.is_tracked:
                kept.copy = None

    def forget_copy(self, record: str) -> None:
        """Forget a session's copy: this process is about to write the session."""
        # One assignment, and none where there is nothing to forget: each write comes here.
        if (kept := self._kept.get(record)) and kept.copy:
            kept.copy = None

    def renew(self, record: str, life: Life) -> None:
        """Take note of when a session expires, if it is known."""
        if kept := self._kept.get(record):
            kept.life = life

    def misses(self, record: str, now_s: float) -> bool:
        """Return whether to tell that the store does not know a session that it has to know.

        It must have told of it so lately that an end of it would have left a trace there. Once a
        minute at most, for a store that lost one session has most likely lost many.
        """
        life = self.life(record)
        if life is None or now_s - self._told_at_s < _QUIET_S or life.left_s(now_s) < _DOUBT_S:
            return False
        if now_s - life.seen_at_s > _TRACE_S:
            return False
        self._told_at_s = now_s
        return True

    def end(self, record: str) -> None:
        """Evict, and reject later puts, so that a load in flight cannot cache it again."""
        with self._lock:
            self._drop(record)
            self.ended_lately[record] = None
            if len(self.ended_lately) > ENDED:
                self.ended_lately.popitem(last=False)

    def drop(self, record: str) -> None:
        """Forget a session."""
        with self._lock:
            self._drop(record)

    def _drop(self, record: str) -> None:
        if kept := self._kept.pop(record, None):
            self.bytes -= kept.size


def memory(known: CachedSession) -> int:
    """Return how many bytes of memory a session takes here, about."""
    return known.size + len(known.values) * _FIELD_BYTES + _SESSION_BYTES


near_cache = NearCache()
os.register_at_fork(after_in_child=near_cache.clear)
