"""What this process counts, until a trip to the store takes it along.

Counting costs a request no round trip: once a second at most, the figures ride on a trip that
goes to the store anyway (``reporting``).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import Final

#: The counters, in the order in which the store keeps them; new ones go to the end.
NAMES: Final = (
    "requests",
    "loads",
    "commits",
    "fields_written",
    "fields_held",
    "conflicts_merged",
    "conflicts_overwritten",
    "created",
    "ended",
    "values_set_aside",
    "store_errors",
    "locks_acquired",
    "lock_waits",
    "lock_handoffs",
    "lock_wait_ms",
    "lock_timeouts",
    "lock_refusals",
    "locks_lost",
    "writes_refused",
    "lock_longest_wait_ms",
    "lock_longest_hold_ms",
    "lock_waits_to_1_ms",
    "lock_waits_to_2_ms",
    "lock_waits_to_5_ms",
    "lock_waits_to_10_ms",
    "lock_waits_to_20_ms",
    "lock_waits_to_50_ms",
    "lock_waits_to_100_ms",
    "lock_waits_to_200_ms",
    "lock_waits_to_500_ms",
    "lock_waits_to_1000_ms",
    "lock_waits_to_2000_ms",
    "lock_waits_to_5000_ms",
    "lock_waits_to_10000_ms",
    "near_hits",
    "near_bytes_saved",
    "sync_waits",
    "sync_shortfalls",
    "sync_wait_ms",
    "nonstop_trips",
    "local_reads",
    "breaker_opened",
)

#: Those of which the largest counts, not the sum.
MAXIMA: Final = frozenset({"lock_longest_wait_ms", "lock_longest_hold_ms"})

#: The counters of waits by their length: each with its upper bound in ms, in order.
WAITS: Final = tuple(
    (name, int(name.split("_")[3])) for name in NAMES if name.startswith("lock_waits_to_")
)

#: Figures ride along when those before are this old, in seconds.
INTERVAL_S: Final = 1.0


class Counters:
    """A process's figures: counts since they last left for the store, and its clock's offset."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start anew, as a forked process must: what was counted is its parent's to report."""
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(NAMES, 0)
        self._left_at = float("-inf")
        #: This node's clock less the store's, in ms, as last measured.
        self.clock_offset_ms = 0

    def add(self, **counts: int) -> None:
        """Count."""
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def maximum(self, **values: int) -> None:
        """Take the largest of these and what was there."""
        with self._lock:
            for name, value in values.items():
                self._counts[name] = max(self._counts[name], value)

    def waited(self, wait_ms: int) -> None:
        """Count a wait for a lock, by its length."""
        name = next((name for name, bound_ms in WAITS if wait_ms <= bound_ms), None)
        self.add(lock_waits=1, lock_wait_ms=wait_ms, **({name: 1} if name else {}))
        self.maximum(lock_longest_wait_ms=wait_ms)

    @property
    def are_due(self) -> bool:
        """Whether the counts have not left for long enough; `take` may have none all the same."""
        return time.monotonic() - self._left_at >= INTERVAL_S

    def take(self, *, now: bool = False) -> Sequence[int]:
        """Return the counts if they are due, and start anew; return nothing otherwise."""
        with self._lock:
            if not now and not self.are_due:
                return ()
            counts = tuple(self._counts.values())
            if not any(counts):
                return ()
            self._left_at = time.monotonic()
            self._counts = dict.fromkeys(NAMES, 0)
            return counts

    def put_back(self, counts: Sequence[int]) -> None:
        """Take back counts that did not reach the store."""
        taken = dict(zip(NAMES, counts, strict=False))
        self.add(**{name: count for name, count in taken.items() if name not in MAXIMA})
        self.maximum(**{name: count for name, count in taken.items() if name in MAXIMA})

    def observe_clock(self, store_ms: int, sent_s: float, received_s: float) -> None:
        """Measure the clock's offset by a reply: the store's time in ms, this node's in seconds."""
        self.clock_offset_ms = round((sent_s + received_s) * 500) - store_ms


counters = Counters()
os.register_at_fork(after_in_child=counters.clear)
