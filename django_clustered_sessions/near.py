"""The near cache: sessions that this process has read or written, as the store keeps them.

Nothing here is believed: a load asks the store on its one trip whether the version is still the
record's. Versions are random and compared for equality, so a store that came back empty, older,
or with another primary just has another version.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from itertools import chain
from typing import Final, NamedTuple

#: What Python takes for a session and for one of its fields, beside the bytes in it.
_SESSION_BYTES: Final = 600
_FIELD_BYTES: Final = 200


class Known(NamedTuple):
    """A session's values, raw by field, and the version of the record that they are."""

    version: bytes
    values: Mapping[bytes, bytes]

    @property
    def size(self) -> int:
        """How many bytes of memory this takes, about."""
        parts = chain(self.values, self.values.values())
        return sum(map(len, parts)) + len(self.values) * _FIELD_BYTES + _SESSION_BYTES


class NearCache:
    """The sessions used last, by their records' keys, within a number of bytes."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[Known, int]] = OrderedDict()
        self.bytes = 0

    def get(self, record: str) -> Known | None:
        """Return what is known of a session, and take note that it was used."""
        with self._lock:
            found = self._known.get(record)
            if found is None:
                return None
            self._known.move_to_end(record)
            return found[0]

    def put(self, record: str, known: Known, limit: int) -> None:
        """Keep a session; forget those used longest ago beyond ``limit`` bytes."""
        size = known.size
        with self._lock:
            self._drop(record)
            if size > limit:
                return
            self._known[record] = known, size
            self.bytes += size
            while self.bytes > limit:
                self._drop(next(iter(self._known)))

    def drop(self, record: str) -> None:
        """Forget a session."""
        with self._lock:
            self._drop(record)

    def _drop(self, record: str) -> None:
        _, size = self._known.pop(record, (None, 0))
        self.bytes -= size


near_cache = NearCache()
os.register_at_fork(after_in_child=near_cache.clear)
