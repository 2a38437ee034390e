"""The near cache: sessions that this process has read or written, as the store keeps them.

Nothing here is believed: a load asks the store on its one trip whether the version is still the
record's. Versions are random and compared for equality, so a store that came back empty, older,
or with another primary just has another version. Only while the store is away, and only where the
site wants it, a session is read from here alone, for as long as it lives by the store's clock.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from itertools import chain
from typing import Any, Final, NamedTuple

#: What Python takes for a session and for one of its fields, beside the bytes in it.
_SESSION_BYTES: Final = 600
_FIELD_BYTES: Final = 200

#: How long an ended session leaves a trace in the store, less what clocks may differ; how much
#: life it must have had left; and how long after a warning there is no other; in seconds.
_TRACE_S: Final = 500
_DOUBT_S: Final = 10
_QUIET_S: Final = 60
#: How many ended sessions are remembered.
_ENDED: Final = 2000


class Known(NamedTuple):
    """A session's values, raw by field, and the version of the record that they are."""

    version: bytes
    values: Mapping[bytes, bytes]

    @property
    def size(self) -> int:
        """How many bytes of memory this takes, about."""
        parts = chain(self.values, self.values.values())
        return sum(map(len, parts)) + len(self.values) * _FIELD_BYTES + _SESSION_BYTES


class Life(NamedTuple):
    """When a session expires, as the store last said: its clock then, and this process's.

    ``mode`` is the record's, opaque here.
    """

    seen_at_s: float
    seen_ms: int
    deadline_ms: int
    mode: Any = None

    def left_s(self, now_s: float) -> float:
        """Return the seconds that it has left, by the store's clock."""
        return (self.deadline_ms - self.seen_ms) / 1000 - (now_s - self.seen_at_s)


class NearCache:
    """The sessions used last, by their records' keys, within a number of bytes."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[Known, int]] = OrderedDict()
        self._lives: dict[str, Life] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()
        self.bytes = 0
        self._told_at_s = float("-inf")

    def get(self, record: str) -> Known | None:
        """Return what is known of a session, and take note that it was used."""
        with self._lock:
            found = self._known.get(record)
            if found is None:
                return None
            self._known.move_to_end(record)
            return found[0]

    def life(self, record: str) -> Life | None:
        """Return when a session that is known expires, as far as that is known."""
        return self._lives.get(record)

    def put(self, record: str, known: Known, limit: int, life: Life | None = None) -> None:
        """Keep a session; forget those used longest ago beyond ``limit`` bytes."""
        size = known.size
        with self._lock:
            self._drop(record)
            if size > limit or record in self._ended:
                return
            self._known[record] = known, size
            if life:
                self._lives[record] = life
            self.bytes += size
            while self.bytes > limit:
                self._drop(next(iter(self._known)))

    def renew(self, record: str, life: Life) -> None:
        """Take note of when a session expires, if it is known."""
        with self._lock:
            if record in self._known:
                self._lives[record] = life

    def misses(self, record: str, now_s: float) -> bool:
        """Return whether to tell that the store does not know a session that it has to know.

        It must have told of it so lately that an end of it would have left a trace there. Once a
        minute at most, for a store that lost one session has most likely lost many.
        """
        life = self._lives.get(record)
        if life is None or now_s - self._told_at_s < _QUIET_S or life.left_s(now_s) < _DOUBT_S:
            return False
        if now_s - life.seen_at_s > _TRACE_S:
            return False
        self._told_at_s = now_s
        return True

    def end(self, record: str) -> None:
        """Forget a session that is no more, also for who has just loaded it and comes late."""
        with self._lock:
            self._drop(record)
            self._ended[record] = None
            if len(self._ended) > _ENDED:
                self._ended.popitem(last=False)

    def drop(self, record: str) -> None:
        """Forget a session."""
        with self._lock:
            self._drop(record)

    def _drop(self, record: str) -> None:
        _, size = self._known.pop(record, (None, 0))
        self._lives.pop(record, None)
        self.bytes -= size


near_cache = NearCache()
os.register_at_fork(after_in_child=near_cache.clear)
