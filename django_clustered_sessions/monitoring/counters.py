"""What this process counts, until a trip to the store takes it along.

Counting costs a request no round trip: once a second at most, the figures ride on a trip that
goes to the store anyway (``reporting``).
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

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
)

#: Those of which the largest counts, not the sum.
MAXIMA: Final = frozenset(
    {
        "lock_longest_wait_ms",
        "lock_longest_hold_ms",
        "lifetime_longest_ms",
        "store_longest_away_ms",
        "store_last_away_ms",
    }
)

#: Those of which the smallest counts; 0 is none yet.
MINIMA: Final = frozenset({"lifetime_shortest_ms"})

#: Those whose past is kept, in the order in which the store keeps them; new ones go to the end.
KEPT: Final = (
    "requests",
    "lock_waits",
    "lock_wait_ms",
    "store_errors",
    "created",
    "ended",
    "expired",
)

#: The counters of waits by their length: each with its upper bound in ms, in order.
WAITS: Final = tuple(
    (name, int(name.split("_")[3])) for name in NAMES if name.startswith("lock_waits_to_")
)

#: Figures ride along when those before are this old, in seconds.
INTERVAL_S: Final = 1.0

#: What is kept of the past is collected for so long before it rides along, in seconds; and how
#: many such spans a process keeps while the store is away: a day's.
PAST_INTERVAL_S: Final = 60.0
_MOST_PAST: Final = 24 * 60
#: How many go on one trip: after an outage of a day one request must not pay for all of them.
_PAST_PER_TRIP: Final = 60


class Past(NamedTuple):
    """What was counted within a minute: how long ago that began, in ms, and the counts of KEPT."""

    age_ms: int
    counts: tuple[int, ...]


def combine(name: str, one: int, other: int) -> int:
    """Return two counts of the same thing as one: their sum, or the extreme that it stands for."""
    if name in MAXIMA:
        return max(one, other)
    if name in MINIMA:
        return min(one, other) if one and other else one or other
    return one + other


class Counters:
    """A process's figures: counts since they last left for the store, and its clock's offset."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start anew, as a forked process must: what was counted is its parent's to report."""
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(NAMES, 0)
        self._left_at = float("-inf")
        #: Spans of the past: when each began, by a clock that never jumps, and its counts.
        self._past: deque[tuple[float, Counter[str]]] = deque(maxlen=_MOST_PAST)
        #: What the past has already of the counts that came back.
        self._known_to_past: Counter[str] = Counter()
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

    def ended(self, lifetimes_ms: Iterable[int | None]) -> None:
        """Count sessions that were ended, by how long they had lived; None where nobody knows."""
        for lifetime_ms in lifetimes_ms:
            self.add(ended=1)
            if lifetime_ms is not None:
                # 0 would be no minimum, and a store's clock may go back.
                lifetime_ms = max(lifetime_ms, 1)
                self.add(lifetimes=1, lifetime_ms=lifetime_ms)
                with self._lock:
                    for name in ("lifetime_shortest_ms", "lifetime_longest_ms"):
                        self._counts[name] = combine(name, self._counts[name], lifetime_ms)

    def away(self, away_s: float) -> None:
        """Note that a node of the store is away, or was until now: for so many seconds so far."""
        now_ms = round(time.time() * 1000) - self.clock_offset_ms
        self.maximum(store_longest_away_ms=round(away_s * 1000), store_last_away_ms=now_ms)

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
            self._remember()
            self._counts = dict.fromkeys(NAMES, 0)
            return counts

    def put_back(self, counts: Sequence[int]) -> None:
        """Take back counts that did not reach the store."""
        with self._lock:
            for name, count in zip(NAMES, counts, strict=False):
                self._counts[name] = combine(name, self._counts[name], count)
                if name in KEPT:
                    self._known_to_past[name] += count

    def _remember(self) -> None:
        """Add what is new to the span of the past that is under way."""
        if not self._past or self._left_at - self._past[-1][0] >= PAST_INTERVAL_S:
            self._past.append((self._left_at, Counter()))
        _, span = self._past[-1]
        for name in KEPT:
            span[name] += self._counts[name] - self._known_to_past[name]
        self._known_to_past.clear()

    def take_past(self, *, now: bool = False) -> Sequence[Past]:
        """Return the oldest spans of the past that have not left yet, when a minute is over.

        All of them for ``now``.
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
        """Take back spans that did not reach the store."""
        with self._lock:
            at = time.monotonic()
            for age_ms, counts in reversed(spans):
                if len(self._past) < _MOST_PAST:
                    span = Counter(dict(zip(KEPT, counts, strict=True)))
                    self._past.appendleft((at - age_ms / 1000, span))

    def observe_clock(self, store_ms: int, sent_s: float, received_s: float) -> None:
        """Measure the clock's offset by a reply: the store's time in ms, this node's in seconds."""
        self.clock_offset_ms = round((sent_s + received_s) * 500) - store_ms


counters = Counters()
os.register_at_fork(after_in_child=counters.clear)
