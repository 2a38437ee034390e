"""History of the last hours, for charts: counts of the nodes, and the number of sessions.

The nodes report their counts by slots of five minutes, along with trips that go to the store
anyway (``lua/stats.lua``). Past numbers of sessions are computed backwards from the current one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import zip_longest
from typing import Any, Final

from django_clustered_sessions.conf import conf
from django_clustered_sessions.monitoring.counters import KEPT
from django_clustered_sessions.protocol.commands.script_calls import CLOCK, milliseconds
from django_clustered_sessions.protocol.commands.statistics import SLOT_MS, SLOTS
from django_clustered_sessions.protocol.effects import Call, Flow, plain
from django_clustered_sessions.protocol.record import BUCKETS, Damaged, bucket_tag, moment
from django_clustered_sessions.store import runner

#: Span of time whose counts are one number.
SLOT: Final = timedelta(milliseconds=SLOT_MS)

#: Greatest age of the history, in hours.
LONGEST_HOURS: Final = SLOTS * SLOT_MS // 3_600_000

#: Version of what ``document()`` returns.
FORMAT: Final = 1

#: Buckets read on one round trip.
_PER_TRIP: Final = 64


@dataclass(frozen=True, slots=True)
class Row:
    """Counts of one node in the five minutes from ``start`` on, by the store's clock.

    The numbers mean the same as the counters of these names (``docs/sessionstats.md``).
    """

    start: datetime
    node: str
    requests: int = 0
    lock_waits: int = 0
    lock_wait_ms: int = 0
    store_errors: int = 0
    created: int = 0
    ended: int = 0
    expired: int = 0


@dataclass(frozen=True, slots=True)
class Level:
    """Number of sessions at a time; None if unknown."""

    at: datetime
    sessions: int | None


@dataclass(frozen=True, slots=True)
class History:
    """Last hours: a row for each slot and node with counts, oldest first.

    ``starts`` are all slots, with and without rows; the last is the current one. ``levels`` has
    the number of sessions at the start of each, and ``now``.
    """

    now: datetime
    hours: int
    starts: Sequence[datetime]
    rows: Sequence[Row]
    levels: Sequence[Level]

    @property
    def nodes(self) -> list[str]:
        """The names of the nodes with counts."""
        return sorted({row.node for row in self.rows})

    def counted(self, name: str) -> dict[str, list[int]]:
        """Return one counter of each node over ``starts``; ``name`` is an attribute of Row."""
        position = {start: number for number, start in enumerate(self.starts)}
        found = {node: [0] * len(self.starts) for node in self.nodes}
        for row in self.rows:
            found[row.node][position[row.start]] = getattr(row, name)
        return found


def recent(hours: int = LONGEST_HOURS) -> History:
    """Return the history of the last hours, 24 at most.

    Raises SessionStoreUnavailable; ValueError if ``hours`` is not 1 to 24.
    """
    _check(hours)
    return runner.run(collect(conf.key_prefix, hours))


async def arecent(hours: int = LONGEST_HOURS) -> History:
    """See recent()."""
    _check(hours)
    return await runner.arun(collect(conf.key_prefix, hours))


def _check(hours: int) -> None:
    if not 1 <= hours <= LONGEST_HOURS:
        raise ValueError(f"history goes back 1 to {LONGEST_HOURS} hours, not {hours!r}")


def collect(prefix: str, hours: int) -> Flow[History]:
    """Collect the history of all nodes; ``prefix`` is the setting KEY_PREFIX."""
    (time,) = yield (CLOCK,)
    now_ms = milliseconds(time)
    alive, sums = 0, dict[bytes, list[int]]()
    for first in range(0, BUCKETS, _PER_TRIP):
        tags = [bucket_tag(prefix, bucket) for bucket in range(first, first + _PER_TRIP)]
        replies = iter((yield tuple(call for tag in tags for call in _about(tag, now_ms))))
        for told, anonymous, logged_in in zip(replies, replies, replies, strict=True):
            alive += sum(0 if isinstance(n, Damaged) else n for n in (anonymous, logged_in))
            _add(sums, () if isinstance(told, Damaged) else told)
    counts = _counts(sums)
    last = now_ms // SLOT_MS
    slots = range(last - hours * 3_600_000 // SLOT_MS + 1, last + 1)
    return History(
        moment(now_ms),
        hours,
        [_start(slot) for slot in slots],
        [
            Row(_start(slot), node, **counts[slot, node])
            for slot, node in sorted(counts)
            if slot in slots
        ],
        [*_levels(slots, alive, counts), Level(moment(now_ms), alive)],
    )


def _about(tag: str, now_ms: int) -> tuple[Call, ...]:
    index = f"{tag}:index"
    return (
        plain("HGETALL", key=f"{tag}:history"),
        plain("ZCOUNT", "-inf", f"(-{now_ms}", key=index),
        plain("ZCOUNT", f"({now_ms}", "+inf", key=index),
    )


def _add(sums: dict[bytes, list[int]], told: Sequence[bytes]) -> None:
    """Add the history of one bucket; ``lua/stats.lua`` has the format."""
    flat = iter(told)
    for name, line in zip(flat, flat, strict=True):
        try:
            numbers = list(map(int, line.split()))
        except ValueError:
            # A line that stats.lua did not write is damaged; the others are still valid.
            continue
        before = sums.get(name, ())
        sums[name] = list(map(sum, zip_longest(before, numbers, fillvalue=0)))


def _counts(sums: Mapping[bytes, Sequence[int]]) -> dict[tuple[int, str], Counter[str]]:
    """Return the counts of KEPT by slot and node."""
    counts = {}
    for name, numbers in sums.items():
        slot, _, node = name.decode("utf-8", "replace").partition(" ")
        if slot.isdecimal():
            counts[int(slot), node] = Counter(dict(zip(KEPT, numbers, strict=False)))
    return counts


def _levels(
    slots: Sequence[int], alive: int, counts: Mapping[tuple[int, str], Counter[str]]
) -> list[Level]:
    """Compute past levels back from now: subtract created sessions, add ended and expired ones."""
    change: Counter[int] = Counter()
    for (slot, _), of in counts.items():
        change[slot] += of["created"] - of["ended"] - of["expired"]
    first_known = min(change, default=slots[-1] + 1)
    levels = []
    for slot in reversed(slots):
        alive -= change[slot]
        levels.append(Level(_start(slot), max(alive, 0) if slot >= first_known else None))
    return levels[::-1]


def _start(slot: int) -> datetime:
    return moment(slot * SLOT_MS)


def document(history: History) -> dict[str, Any]:
    """Return the history as ``docs/sessionstats-json.md`` describes it, ready for JSON."""
    return {
        "format": FORMAT,
        "time_ms": _ms(history.now),
        "hours": history.hours,
        "slot_ms": SLOT_MS,
        "sessions": [
            {"at_ms": _ms(level.at), "sessions": level.sessions} for level in history.levels
        ],
        "slots": [
            {
                "start_ms": _ms(row.start),
                "node": row.node,
                **{name: getattr(row, name) for name in KEPT},
            }
            for row in history.rows
        ],
    }


def _ms(at: datetime) -> int:
    return round(at.timestamp() * 1000)
