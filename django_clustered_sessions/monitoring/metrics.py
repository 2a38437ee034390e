"""Statistics as metrics for monitoring, independent of the exporting library. Pure.

They come from the store and cover all nodes. Labels are names of nodes, addresses of servers and
kinds only; no label names a session or user.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from django_clustered_sessions.monitoring.counters import (
    AGES,
    MAXIMA,
    MINIMA,
    NAMES,
    WAITS,
    Histogram,
)

from .statistics import Node, Statistics

#: Prefix of all names.
PREFIX: Final = "clustered_sessions"

Kind = Literal["counter", "gauge", "histogram"]

#: Counters exported in another form, as histograms. The number of reads without a trip is exported
#: as a counter too, as the loads are, of which they are a part.
_IN_HISTOGRAMS: Final = frozenset(
    {WAITS.number, WAITS.total_ms, *WAITS.classes, AGES.total_ms, *AGES.classes}
)

_HELP: Final = {
    "requests": "Requests that passed the middleware.",
    "loads": "Sessions loaded.",
    "commits": "Saves that wrote something.",
    "fields_written": "Session keys that commits wrote or removed.",
    "fields_held": "Session keys that the written sessions had.",
    "conflicts_merged": "Session keys changed by two requests at once, and merged.",
    "conflicts_overwritten": "Session keys changed by two requests at once, and overwritten.",
    "created": "Sessions created.",
    "ended": "Sessions ended before their expiry.",
    "values_set_aside": "Values that could not be read.",
    "store_errors": "Operations that failed because the store was away or refused.",
    "locks_acquired": "Locks taken.",
    "lock_handoffs": "Locks handed off by the previous holder.",
    "lock_timeouts": "Requests that gave up waiting for a lock.",
    "lock_refusals": "Requests refused because too many waited for a lock.",
    "locks_lost": "Locks that went to another request while their holder worked.",
    "writes_refused": "Commits refused because their lock was lost.",
    "lock_longest_wait_ms": "The longest wait for a lock ever.",
    "lock_longest_hold_ms": "The longest time ever that a lock was held.",
    "near_hits": "Loads of a session that the near cache had unchanged.",
    "near_bytes_saved": "Stored bytes not sent because the near cache had them.",
    "sync_waits": "Writes that waited for replicas.",
    "sync_shortfalls": "Writes that too few replicas acknowledged.",
    "sync_wait_ms": "Time that acknowledged writes waited for replicas.",
    "nonstop_trips": "Operations refused at once because the store was away.",
    "local_reads": "Sessions read from the near cache alone while the store was away.",
    "breaker_opened": "Times that a process found the store away.",
    "expired": "Sessions that ended by time, as found when they left the index.",
    "lifetimes": "Ended sessions whose lifetime is known.",
    "lifetime_ms": "Lifetimes of ended sessions together.",
    "lifetime_shortest_ms": "The shortest lifetime ever of a session that was ended.",
    "lifetime_longest_ms": "The longest lifetime ever of a session that was ended.",
    "node_hops": "Commits to a session that another node had written last.",
    "takeovers_asked": "Sessions looked up in the old engine.",
    "takeovers": "Sessions taken over from the old engine.",
    "takeovers_failed": "Sessions of the old engine that could not be read or asked for.",
    "takeover_values_lost": "Values that were left behind in the old engine.",
    "store_longest_away_ms": "The longest time ever that the store was away.",
    "store_last_away_ms": "Time when the store was last found away, by its clock, since the epoch.",
    "near_reads": "Sessions read without a round trip.",
    "near_longest_age_ms": "The longest age ever of the proof that such a session was the store's.",
    "near_invalidations": "Sessions that the store told to have changed.",
    "near_leases_lost": "Tracked connections lost, with all that was read over them.",
}


class Sample(NamedTuple):
    """Number with its labels; for a histogram the sum as number, and the cumulated classes."""

    labels: tuple[str, ...]
    number: float
    classes: Sequence[tuple[str, float]] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """Metric: its full name without the suffixes of its kind, the names of its labels, its samples.

    ``unit`` is ``"seconds"`` or ``"bytes"``, and then the name ends with it, or empty.
    """

    name: str
    kind: Kind
    help: str
    unit: str
    labels: tuple[str, ...]
    samples: Callable[[Statistics], Iterator[Sample]]


def families() -> Iterator[Family]:
    """Yield all metrics in the order of the output."""
    yield _gauge("sessions", "Sessions in the store.", _sessions, labels=("kind",))
    yield _gauge(
        "memory_bytes",
        "Memory of indexes and records; that of records is estimated from a sample.",
        _memory,
        labels=("of",),
    )
    for name in NAMES:
        if name not in _IN_HISTOGRAMS:
            yield _of_counter(name)
    yield _histogram("lock_wait_seconds", "Waits for locks that were acquired.", WAITS)
    yield _histogram(
        "near_age_seconds",
        "Ages of the proof that a session read without a round trip was the store's.",
        AGES,
    )
    yield _gauge("node_reported_timestamp_seconds", "Time of a node's last report.", _reported)
    yield _gauge("node_clock_offset_seconds", "A node's clock less the store's.", _offset)
    yield _gauge("store_memory_bytes", "Memory that the store uses.", _used, labels=())
    yield _gauge("store_memory_limit_bytes", "Memory that the store may use.", _limit, labels=())
    yield _gauge("store_replicas", "Replicas that the store has.", _replicas, labels=())


def _gauge(
    name: str,
    help: str,
    samples: Callable[[Statistics], Iterator[Sample]],
    labels: tuple[str, ...] = ("node",),
) -> Family:
    unit = next((unit for unit in ("seconds", "bytes") if name.endswith(f"_{unit}")), "")
    return Family(f"{PREFIX}_{name}", "gauge", help, unit, labels, samples)


def _of_counter(name: str) -> Family:
    is_extreme, is_time = name in MAXIMA | MINIMA, name.endswith("_ms")
    shown = f"{name.removesuffix('_ms')}_seconds" if is_time else name
    unit, scale = ("seconds", 1000) if is_time else ("", 1)

    def samples(figures: Statistics) -> Iterator[Sample]:
        for node in _nodes(figures):
            # 0 means not measured yet, not a time of 0 s.
            if node.counts[name] or not is_extreme:
                yield Sample((node.name,), node.counts[name] / scale)

    kind: Kind = "gauge" if is_extreme else "counter"
    return Family(f"{PREFIX}_{shown}", kind, _HELP[name], unit, ("node",), samples)


def _histogram(name: str, help: str, durations: Histogram) -> Family:
    def samples(figures: Statistics) -> Iterator[Sample]:
        for node in _nodes(figures):
            total_s = node.counts[durations.total_ms] / 1000
            yield Sample((node.name,), total_s, _classes(node.counts, durations))

    return Family(f"{PREFIX}_{name}", "histogram", help, "seconds", ("node",), samples)


def _classes(counts: Counter[str], durations: Histogram) -> list[tuple[str, float]]:
    found, below = [], 0
    for name, bound_ms in zip(durations.classes, durations.bounds_ms, strict=True):
        below += counts[name]
        found.append((str(bound_ms / 1000), float(below)))
    return [*found, ("+Inf", float(max(counts[durations.number], below)))]


def _nodes(figures: Statistics) -> Iterator[Node]:
    """Yield the current nodes, without the sum of former nodes, which would look recent."""
    for _, node in sorted(figures.nodes.items()):
        yield node


def _sessions(figures: Statistics) -> Iterator[Sample]:
    yield Sample(("logged_in",), figures.logged_in)
    yield Sample(("anonymous",), figures.anonymous)


def _memory(figures: Statistics) -> Iterator[Sample]:
    if figures.memory is not None:
        yield Sample(("indexes",), figures.index_memory)
    if figures.record_memory is not None:
        yield Sample(("records",), figures.record_memory)


def _reported(figures: Statistics) -> Iterator[Sample]:
    for node in _nodes(figures):
        yield Sample((node.name,), node.reported_ms / 1000)


def _offset(figures: Statistics) -> Iterator[Sample]:
    for node in _nodes(figures):
        yield Sample((node.name,), node.clock_offset_ms / 1000)


def _used(figures: Statistics) -> Iterator[Sample]:
    if (number := figures.store.number("used_memory")) is not None:
        yield Sample((), number)


def _limit(figures: Statistics) -> Iterator[Sample]:
    # 0 means that there is no limit, not one of 0 bytes.
    if number := figures.store.number("maxmemory"):
        yield Sample((), number)


def _replicas(figures: Statistics) -> Iterator[Sample]:
    if (number := figures.store.number("connected_slaves")) is not None:
        yield Sample((), number)
