"""Counters of this process, until it reports them to the store.

Counting costs a request no round trip: at most once a second, the counts join a trip that goes to
the store anyway.
"""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

#: Names of the counters in the order of the stored format; new ones go to the end.
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
    "expired",
    "lifetimes",
    "lifetime_ms",
    "lifetime_shortest_ms",
    "lifetime_longest_ms",
    "node_hops",
    "takeovers_asked",
    "takeovers",
    "takeovers_failed",
    "takeover_values_lost",
    "store_longest_away_ms",
    "store_last_away_ms",
    "near_reads",
    "near_longest_age_ms",
    "near_invalidations",
    "near_leases_lost",
    "near_age_ms",
    "near_ages_to_10_ms",
    "near_ages_to_25_ms",
    "near_ages_to_50_ms",
    "near_ages_to_100_ms",
    "near_ages_to_250_ms",
    "near_ages_to_500_ms",
    "near_ages_to_1000_ms",
    "near_ages_to_2500_ms",
    "near_ages_to_5000_ms",
    "near_ages_to_10000_ms",
    "near_ages_to_30000_ms",
    "near_ages_to_60000_ms",
)

#: Counters that are combined by the maximum instead of the sum.
MAXIMA: Final = frozenset(
    {
        "lock_longest_wait_ms",
        "lock_longest_hold_ms",
        "lifetime_longest_ms",
        "store_longest_away_ms",
        "store_last_away_ms",
        "near_longest_age_ms",
    }
)

#: Counters that are combined by the minimum; 0 means none yet.
MINIMA: Final = frozenset({"lifetime_shortest_ms"})

#: Counters with a history, in the order of the stored format; new ones go to the end.
KEPT: Final = (
    "requests",
    "lock_waits",
    "lock_wait_ms",
    "store_errors",
    "created",
    "ended",
    "expired",
)


class Histogram(NamedTuple):
    """Names of the counters of durations: their number, sum and maximum, and the classes by length.

    ``bounds_ms`` are the upper bounds of ``classes``, in order. Longer ones are in no class.
    """

    number: str
    total_ms: str
    longest_ms: str
    classes: Sequence[str]
    bounds_ms: Sequence[int]


def _histogram(number: str, total_ms: str, longest_ms: str, prefix: str) -> Histogram:
    classes = [name for name in NAMES if name.startswith(prefix)]
    bounds_ms = [int(name.removeprefix(prefix).removesuffix("_ms")) for name in classes]
    return Histogram(number, total_ms, longest_ms, classes, bounds_ms)


#: Waits for locks, and ages of the sessions that were read without a trip.
WAITS: Final = _histogram("lock_waits", "lock_wait_ms", "lock_longest_wait_ms", "lock_waits_to_")
AGES: Final = _histogram("near_reads", "near_age_ms", "near_longest_age_ms", "near_ages_to_")

#: Seconds between two reports.
INTERVAL_S: Final = 1.0

#: Length in seconds of a span of the history, which is reported when it is over, and the number of
#: spans that a process keeps during an outage: a day's.
PAST_INTERVAL_S: Final = 60.0
_MOST_PAST: Final = 24 * 60
#: Spans on one trip: after an outage of a day, no single request should report all of them.
_PAST_PER_TRIP: Final = 60


class Past(NamedTuple):
    """Span of the history: the age of its start in ms, and the counts of KEPT in its minute."""

    age_ms: int
    counts: tuple[int, ...]


def combine(name: str, one: int, other: int) -> int:
    """Combine two counts of one counter: return their sum, maximum or minimum."""
    if name in MAXIMA:
        return max(one, other)
    if name in MINIMA:
        return min(one, other) if one and other else one or other
    return one + other


class Counters:
    """Counters of a process since its last report, and its clock's offset."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Reset all; a forked process must, because its parent reports the counts so far."""
        self._lock = threading.Lock()
        self.counts = dict.fromkeys(NAMES, 0)
        self.left_at = float("-inf")
        #: Spans of the history: start by the monotonic clock, and counts.
        self._past: deque[tuple[float, Counter[str]]] = deque(maxlen=_MOST_PAST)
        #: Part of the counts put back that the history has already.
        self._known_to_past: Counter[str] = Counter()
        #: This node's clock less the store's, in ms, as last measured.
        self.clock_offset_ms = 0

    def add(self, **counts: int) -> None:
        """Add to counters."""
        with self._lock:
            for name, count in counts.items():
                self.counts[name] += count

    def maximum(self, **values: int) -> None:
        """Raise counters to these values if they are lower."""
        with self._lock:
            for name, value in values.items():
                self.counts[name] = max(self.counts[name], value)

    def measure(self, durations: Histogram, ms: int) -> None:
        """Count a duration in its histogram."""
        at = bisect_left(durations.bounds_ms, ms)
        with self._lock:
            counts = self.counts
            counts[durations.number] += 1
            counts[durations.total_ms] += ms
            if at < len(durations.classes):
                counts[durations.classes[at]] += 1
            if ms > counts[durations.longest_ms]:
                counts[durations.longest_ms] = ms

    def ended(self, lifetimes_ms: Iterable[int | None]) -> None:
        """Count ended sessions with their lifetimes; None for an unknown one."""
        for lifetime_ms in lifetimes_ms:
            self.add(ended=1)
            if lifetime_ms is not None:
                # 0 means no minimum, and a store's clock may step back.
                lifetime_ms = max(lifetime_ms, 1)
                self.add(lifetimes=1, lifetime_ms=lifetime_ms)
                with self._lock:
                    for name in ("lifetime_shortest_ms", "lifetime_longest_ms"):
                        self.counts[name] = combine(name, self.counts[name], lifetime_ms)

    def away(self, away_s: float) -> None:
        """Note an outage of a store node, present or just over, and its length so far."""
        now_ms = round(time.time() * 1000) - self.clock_offset_ms
        self.maximum(store_longest_away_ms=round(away_s * 1000), store_last_away_ms=now_ms)

    @property
    def are_due(self) -> bool:
        """True if the last report is old enough; `drain` may still find nothing to report."""
        return time.monotonic() - self.left_at >= INTERVAL_S

    def drain(self, *, now: bool = False) -> Sequence[int]:
        """Return and reset the counts if they are due; return () otherwise."""
        with self._lock:
            if not now and not self.are_due:
                return ()
            counts = tuple(self.counts.values())
            if not any(counts):
                return ()
            self.left_at = time.monotonic()
            self._remember()
            self.counts = dict.fromkeys(NAMES, 0)
            return counts

    def put_back(self, counts: Sequence[int]) -> None:
        """Restore counts that did not reach the store."""
        with self._lock:
            for name, count in zip(NAMES, counts, strict=False):
                self.counts[name] = combine(name, self.counts[name], count)
                if name in KEPT:
                    self._known_to_past[name] += count

    def _remember(self) -> None:
        """Add the new counts to the current span of the history."""
        if not self._past or self.left_at - self._past[-1][0] >= PAST_INTERVAL_S:
            self._past.append((self.left_at, Counter()))
        _, span = self._past[-1]
        for name in KEPT:
            span[name] += self.counts[name] - self._known_to_past[name]
        self._known_to_past.clear()

    def drain_past(self, *, now: bool = False) -> Sequence[Past]:
        """Return the oldest unreported spans of the history if the first minute is over.

        With ``now``, returns all of them.
        """
        with self._lock:
            at = time.monotonic()
            if not self._past or not (now or at - self._past[0][0] >= PAST_INTERVAL_S):
                return ()
            number = len(self._past) if now else min(len(self._past), _PAST_PER_TRIP)
            spans = (self._past.popleft() for _ in range(number))
            return tuple(
                Past(round((at - began) * 1000), tuple(counts[name] for name in KEPT))
                for began, counts in spans
                if any(counts.values())
            )

    def put_back_past(self, spans: Sequence[Past]) -> None:
        """Restore spans that did not reach the store."""
        with self._lock:
            at = time.monotonic()
            for age_ms, counts in reversed(spans):
                if len(self._past) < _MOST_PAST:
                    span = Counter(dict(zip(KEPT, counts, strict=True)))
                    self._past.appendleft((at - age_ms / 1000, span))


counters = Counters()
os.register_at_fork(after_in_child=counters.clear)
