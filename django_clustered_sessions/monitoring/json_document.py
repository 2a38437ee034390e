"""Statistics as JSON, with the values derived from counts. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, Final

from django_clustered_sessions.monitoring.counters import AGES, NAMES, WAITS, Histogram

from .held_locks import HeldLocks
from .server_info import CLOCK_TOLERANCE_MS, Clock, Primary
from .statistics import LIVES_S, Statistics

#: Version of the formats of ``document()`` and ``locks_document()``.
FORMAT: Final = 1


def locks_document(held: HeldLocks) -> dict[str, Any]:
    """Return the locks for JSON, in the format of ``docs/sessionstats-json.md``."""
    return {
        "format": FORMAT,
        "time_ms": held.now_ms,
        "key_prefix": held.prefix,
        "held_locks": [
            {
                "session": lock.session,
                "holder": lock.holder,
                "since_ms": lock.since_ms,
                "lease_left_ms": lock.lease_end_ms - held.now_ms,
                "waiting": [
                    {"place": position, "name": waiter.name, "since_ms": waiter.since_ms}
                    for position, waiter in enumerate(lock.waiting, 1)
                ],
            }
            for lock in held.locks
        ],
    }


def lifetimes(counts: Counter[str]) -> dict[str, int] | None:
    """Return min, mean and max lifetime of ended sessions in ms; None without any."""
    count = counts["lifetimes"]
    if not count:
        return None
    return {
        "min": counts["lifetime_shortest_ms"],
        "mean": round(counts["lifetime_ms"] / count),
        "max": counts["lifetime_longest_ms"],
    }


def near_hit_ratio(counts: Counter[str]) -> float | None:
    """Return the share of loads that the near cache answered; None before any load."""
    return round(counts["near_hits"] / counts["loads"], 4) if counts["loads"] else None


def acknowledged_after_ms(counts: Counter[str]) -> float | None:
    """Return the mean time in ms until replicas acknowledged a write; None without any."""
    count = counts["sync_waits"] - counts["sync_shortfalls"]
    return round(counts["sync_wait_ms"] / count, 2) if count else None


def waits(counts: Counter[str]) -> dict[str, int] | None:
    """Return the lengths of waits for locks. See _summary()."""
    return _summary(counts, WAITS)


def ages(counts: Counter[str]) -> dict[str, int] | None:
    """Return the ages of sessions that were read without a trip. See _summary()."""
    return _summary(counts, AGES)


def _summary(counts: Counter[str], durations: Histogram) -> dict[str, int] | None:
    """Return p50, p95, p99, max and mean of a histogram in ms; None if it is empty.

    The percentiles are upper bounds of classes, capped by the longest duration.
    """
    count, longest_ms = counts[durations.number], counts[durations.longest_ms]
    if not count:
        return None
    bounds_ms = durations.bounds_ms
    up_to = list(accumulate(counts[name] for name in durations.classes))
    found = {}
    for name, percent in (("p50", 50), ("p95", 95), ("p99", 99)):
        rank = math.ceil(percent * count / 100)
        fit = (bound_ms for bound_ms, ranks in zip(bounds_ms, up_to, strict=True) if ranks >= rank)
        found[name] = min(next(fit, longest_ms), longest_ms)
    return {**found, "max": longest_ms, "mean": round(counts[durations.total_ms] / count)}


def document(figures: Statistics) -> dict[str, Any]:
    """Return the statistics for JSON, in the format of ``docs/sessionstats-json.md``."""
    store, memory = figures.store, figures.memory
    records = figures.record_memory
    return {
        "format": FORMAT,
        "time_ms": store.now_ms,
        "key_prefix": figures.prefix,
        "sessions": {
            "total": figures.total,
            "logged_in": figures.logged_in,
            "anonymous": figures.anonymous,
        },
        "users": figures.users
        and {
            "logged_in": figures.users.users,
            "most_sessions": list(figures.users.most_sessions),
        },
        "measured": {
            "sessions": figures.sizes.count,
            "unreadable": figures.unreadable,
            "exact": figures.exact,
        },
        "stored_bytes": figures.sizes.summary(),
        "remaining_life": [
            {"up_to_s": up_to, "sessions": count}
            for up_to, count in zip((*LIVES_S, None), figures.lives, strict=True)
        ],
        "memory_bytes": {
            "record": memory.summary() if memory else None,
            "records": records,
            "indexes": None if memory is None else figures.index_memory,
            "total": None if records is None else records + figures.index_memory,
        },
        "counters": _named(figures.counts),
        "lifetimes_ms": lifetimes(figures.counts),
        "locks": {"waited_ms": waits(figures.counts)},
        "near_cache": {
            "hit_ratio": near_hit_ratio(figures.counts),
            "read_age_ms": ages(figures.counts),
        },
        "sync": {"acknowledged_after_ms": acknowledged_after_ms(figures.counts)},
        "nodes": [
            {
                "name": node.name,
                "reported_ms": node.reported_ms,
                "clock_offset_ms": node.clock_offset_ms,
                "counters": _named(node.counts),
                "lifetimes_ms": lifetimes(node.counts),
                "locks": {"waited_ms": waits(node.counts)},
            }
            for _, node in sorted(figures.nodes.items())
        ],
        "former_nodes": {
            "counters": _named(figures.former.counts),
            "lifetimes_ms": lifetimes(figures.former.counts),
            "locks": {"waited_ms": waits(figures.former.counts)},
        },
        "store": {
            "product": store.product if store.version else None,
            "version": store.version,
            "role": store.role,
            "primaries": store.primaries,
            "replicas": store.number("connected_slaves"),
            "used_memory_bytes": store.number("used_memory"),
            "maxmemory_bytes": store.number("maxmemory"),
            "eviction_policy": store.info.get("maxmemory_policy"),
            "appendonly": store.appendonly,
            "save": store.save,
        },
        "topology": {
            "primaries": [_primary_document(one, figures) for one in figures.primaries],
            "sentinels": figures.sentinels
            and {
                "service": figures.sentinels.service,
                "named": figures.sentinels.named,
                "answering": figures.sentinels.answering,
                "known": figures.sentinels.known,
                "quorum": figures.sentinels.quorum,
            },
        },
    }


def clocks_apart(figures: Statistics) -> Iterator[tuple[str, int]]:
    """Yield each server whose clock surely differs by a second or more from the first one's.

    Each comes with the ms that its clock is ahead.
    """
    for one in figures.primaries:
        for address, clock in (
            (one.address, one.clock),
            *((replica.address, replica.clock) for replica in one.replicas or ()),
        ):
            if clock is not None:
                ahead_ms, error_ms = clock.ahead_of(figures.primaries[0].clock)
                if abs(ahead_ms) - error_ms > CLOCK_TOLERANCE_MS:
                    yield address, ahead_ms


def _primary_document(one: Primary, figures: Statistics) -> dict[str, Any]:
    return {
        "address": one.address,
        "role": one.role,
        "slots": one.slots and [list(slots) for slots in one.slots],
        **_clock_document(one.clock, figures),
        "replicas": None
        if one.replicas is None
        else [
            {
                "address": replica.address,
                "state": replica.state,
                "lag_bytes": replica.lag_bytes,
                "lag_s": replica.lag_s,
                **_clock_document(replica.clock, figures),
            }
            for replica in one.replicas
        ],
    }


def _clock_document(clock: Clock | None, figures: Statistics) -> dict[str, Any]:
    told = clock.ahead_of(figures.primaries[0].clock) if clock else (None, None)
    return dict(zip(("clock_ahead_ms", "clock_error_ms"), told, strict=True))


def _named(counts: Counter[str]) -> dict[str, int]:
    return {name: counts[name] for name in NAMES}
