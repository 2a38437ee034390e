"""Statistics of the store: number and size of sessions, and the counters of each node. Pure.

Memory does not grow with the number of sessions: the buckets' indexes count them, and sessions are
measured in many small trips.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from itertools import chain
from random import Random
from typing import Final

from django_clustered_sessions.monitoring.counters import NAMES, combine
from django_clustered_sessions.protocol.effects import Call, Flow, batches, plain
from django_clustered_sessions.protocol.record import (
    BUCKETS,
    ID_LENGTH,
    META,
    Damaged,
    Meta,
    NewerFormat,
    bucket_tag,
)

from .replies import PER_TRIP, undamaged
from .server_info import Primary, Refused, Sentinels, StoreFacts, store_facts, unless_refused

#: Upper bounds of the classes of remaining life, in seconds; one more class has no bound.
LIVES_S: Final = (60, 600, 3600, 6 * 3600, 86400, 7 * 86400, 14 * 86400, 30 * 86400)

#: Buckets whose users are read on one round trip: at a million sessions, each has a thousand.
_USERS_PER_TRIP: Final = 8

#: Sessions in a page of an index.
_PAGE: Final = 64

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Distribution:
    """Distribution of values; its memory grows with the number of different values."""

    seen: Counter[int] = field(default_factory=Counter)

    def add(self, value: int) -> None:
        """Add a value."""
        self.seen[value] += 1

    @property
    def count(self) -> int:
        """The number of values."""
        return self.seen.total()

    @property
    def total(self) -> int:
        """The sum of the values."""
        return sum(value * count for value, count in self.seen.items())

    def summary(self) -> dict[str, int] | None:
        """Return minimum, median and 95th percentile (by nearest rank), maximum and mean."""
        if not self.seen:
            return None
        return {
            "min": min(self.seen),
            "median": self._quantile(0.5),
            "p95": self._quantile(0.95),
            "max": max(self.seen),
            "mean": round(self.total / self.count),
        }

    def _quantile(self, share: float) -> int:
        left = math.ceil(share * self.count)
        for value in sorted(self.seen):
            left -= self.seen[value]
            if left <= 0:
                return value
        raise AssertionError("the shares add up to one")


@dataclass(slots=True)
class Node:
    """Report of one node: time of the last one by the store's clock, its clock's offset, in ms."""

    name: str
    reported_ms: int = 0
    clock_offset_ms: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, line: bytes) -> None:
        """Add the node's report to one bucket; ``lua/stats.lua`` has the format."""
        try:
            reported_ms, clock_offset_ms, *counts = map(int, line.split())
        except ValueError:
            # A line that stats.lua did not write is damaged; the others are still valid.
            return
        if reported_ms > self.reported_ms:
            self.reported_ms, self.clock_offset_ms = reported_ms, clock_offset_ms
        _combine(self.counts, dict(zip(NAMES, counts, strict=False)))


@dataclass(slots=True)
class Bucket:
    """Index of one bucket: its key, and its numbers of sessions."""

    index: str
    logged_in: int
    anonymous: int

    def pages(self) -> Iterator[Page]:
        """Divide the sessions, without expired ones, into ranges of ranks."""
        for count, start in ((self.anonymous, 0), (self.logged_in, -self.logged_in)):
            for first in range(0, count, _PAGE):
                yield Page(self.index, start + first, start + min(first + _PAGE, count) - 1)

    def rank(self, number: int) -> int:
        """Return the rank in the index of the bucket's session ``number``, counted from 0."""
        # Expired sessions that are still in the index lie between the two kinds.
        return number if number < self.anonymous else number - self.anonymous - self.logged_in


@dataclass(frozen=True, slots=True)
class Page:
    """Range of ranks in an index, both ends included; negative ranks count from the end."""

    index: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Users:
    """Number of logged-in users, and the session counts of the users with most sessions."""

    users: int
    most_sessions: Sequence[int]


@dataclass(slots=True)
class Statistics:
    """Statistics of the whole cluster. Sizes and memory are bytes."""

    prefix: str
    store: StoreFacts
    exact: bool
    logged_in: int = 0
    anonymous: int = 0
    unreadable: int = 0
    sizes: Distribution = field(default_factory=Distribution)
    #: Sessions by remaining life, in the classes of LIVES_S.
    lives: list[int] = field(default_factory=lambda: [0] * (len(LIVES_S) + 1))
    #: None if the store does not report it.
    memory: Distribution | None = None
    index_memory: int = 0
    nodes: dict[str, Node] = field(default_factory=dict)
    former: Node = field(default_factory=lambda: Node(""))
    #: One for a single store, and several for a Cluster.
    primaries: Sequence[Primary] = ()
    sentinels: Sentinels | None = None
    #: None unless requested.
    users: Users | None = None

    @property
    def total(self) -> int:
        """The number of sessions."""
        return self.logged_in + self.anonymous

    @property
    def counts(self) -> Counter[str]:
        """The counts of all nodes, former nodes included."""
        counts = self.former.counts.copy()
        for node in self.nodes.values():
            _combine(counts, node.counts)
        return counts

    @property
    def record_memory(self) -> int | None:
        """The memory of all records, estimated from the measured ones."""
        if self.memory is None or (self.total and not self.memory.count):
            return None
        return round(self.memory.total * self.total / self.memory.count) if self.total else 0


def collect(
    prefix: str,
    node: Callable[[], float],
    *,
    sample: int | None,
    random: Random,
    top_users: int = 0,
    progress: Progress = lambda done, of: None,
) -> Flow[Statistics]:
    """Collect the statistics of all sessions; ``prefix`` is the setting KEY_PREFIX.

    ``sample`` sessions are measured, chosen evenly over the buckets; with None all. ``top_users``
    is the number of users with most sessions to count. ``progress`` is called with the numbers
    measured and to measure.

    Raises SessionStoreUnavailable.
    """
    store = yield from store_facts(node)
    figures = Statistics(prefix, store, exact=False)
    probe = yield from unless_refused((_memory_of(_index(prefix, 0)),))
    figures.memory = None if isinstance(probe, Refused) else Distribution()
    buckets = yield from _count(figures)
    if top_users:
        figures.users = yield from top_users_of(prefix, top_users)
    if sample is None or sample >= figures.total:
        pages: Iterator[Page] = chain.from_iterable(bucket.pages() for bucket in buckets)
        of, figures.exact = figures.total, True
    else:
        pages = _sampled(buckets, _spread(figures.total, sample, random))
        of = sample
    done = 0
    for some in batches(pages, PER_TRIP):
        replies = yield tuple(plain("ZRANGE", at.first, at.last, key=at.index) for at in some)
        records = (
            page.index.removesuffix("index") + member[:ID_LENGTH].decode("utf-8", "replace")
            for page, ids in zip(some, replies, strict=True)
            for member in undamaged(ids, ())
        )
        for batch in batches(records, PER_TRIP):
            yield from _measure(figures, batch)
            done += len(batch)
            progress(done, of)
    return figures


def _combine(counts: Counter[str], more: Mapping[str, int]) -> None:
    """Add counts to others; maxima and minima are combined as such."""
    for name, count in more.items():
        counts[name] = combine(name, counts[name], count)


def _memory_of(key: str) -> Call:
    return plain("MEMORY USAGE", key=key)


def _count(figures: Statistics) -> Flow[list[Bucket]]:
    """Ask each bucket for its numbers of sessions and its nodes' counts."""
    buckets = []
    now_ms, with_memory = figures.store.now_ms, figures.memory is not None
    for some in batches(range(BUCKETS), PER_TRIP):
        replies = iter(
            (
                yield tuple(
                    call
                    for bucket in some
                    for call in _about_bucket(figures.prefix, bucket, now_ms, with_memory)
                )
            )
        )
        for bucket in some:
            anonymous, logged_in = (undamaged(next(replies), 0) for _ in range(2))
            buckets.append(Bucket(_index(figures.prefix, bucket), logged_in, anonymous))
            figures.logged_in += logged_in
            figures.anonymous += anonymous
            _add_figures(figures, undamaged(next(replies), ()))
            if with_memory:
                figures.index_memory += next(replies) or 0
    return buckets


def top_users_of(prefix: str, most: int) -> Flow[Users]:
    """Count users by their sessions, in the memory of two numbers for each entry."""
    # Parts by the first byte of a user's tag: all entries of a user are in one part, and a part's
    # Counter is small.
    parts = [array("Q") for _ in range(256)]
    for some in batches(range(BUCKETS), _USERS_PER_TRIP):
        tags = [bucket_tag(prefix, bucket) for bucket in some]
        for told in (yield tuple(plain("HGETALL", key=f"{tag}:users") for tag in tags)):
            flat = iter(undamaged(told, ()))
            for user, count in zip(flat, flat, strict=True):
                # The empty name stands for all users of the bucket.
                if len(user) == 8 and count.isdigit():
                    parts[user[0]].extend((int.from_bytes(user), int(count)))
    users, largest = 0, list[int]()
    for part in parts:
        sessions: Counter[int] = Counter()
        for user, count in zip(part[::2], part[1::2], strict=True):
            sessions[user] += count
        users += len(sessions)
        largest = nlargest(most, chain(largest, sessions.values()))
    return Users(users, largest)


def _index(prefix: str, bucket: int) -> str:
    return f"{bucket_tag(prefix, bucket)}:index"


def _about_bucket(prefix: str, bucket: int, now_ms: int, with_memory: bool) -> Iterator[Call]:
    index = _index(prefix, bucket)
    yield plain("ZCOUNT", "-inf", f"(-{now_ms}", key=index)
    yield plain("ZCOUNT", f"({now_ms}", "+inf", key=index)
    yield plain("HGETALL", key=f"{bucket_tag(prefix, bucket)}:figures")
    if with_memory:
        yield _memory_of(index)


def _add_figures(figures: Statistics, lines: Sequence[bytes]) -> None:
    flat = iter(lines)
    for name, line in zip(flat, flat, strict=True):
        text = name.decode("utf-8", "replace")
        node = figures.nodes.setdefault(text, Node(text)) if text else figures.former
        node.add(line)


def _spread(total: int, sample: int, random: Random) -> Iterator[int]:
    """Yield a random number from each of ``sample`` equal parts of range(total)."""
    for part in range(sample):
        yield random.randrange(part * total // sample, (part + 1) * total // sample)


def _sampled(buckets: Iterable[Bucket], numbers: Iterable[int]) -> Iterator[Page]:
    """Yield a page for each session of these numbers, which must rise."""
    upcoming = iter(buckets)
    bucket, before = next(upcoming), 0
    for number in numbers:
        while number - before >= bucket.anonymous + bucket.logged_in:
            before += bucket.anonymous + bucket.logged_in
            bucket = next(upcoming)
        rank = bucket.rank(number - before)
        yield Page(bucket.index, rank, rank)


def _measure(figures: Statistics, records: Sequence[str]) -> Flow[None]:
    with_memory = figures.memory is not None
    replies = iter(
        (
            yield tuple(
                call
                for record in records
                for call in (
                    plain("HGET", META, key=record),
                    *([_memory_of(record)] if with_memory else ()),
                )
            )
        )
    )
    for _ in records:
        packed = next(replies)
        memory = next(replies) if with_memory else None
        if packed is None:
            # The session ended meanwhile, or was evicted.
            continue
        try:
            if isinstance(packed, Damaged):
                raise packed
            meta = Meta.parse(packed)
        except (Damaged, NewerFormat):
            figures.unreadable += 1
            continue
        figures.sizes.add(meta.size)
        left_s = (meta.deadline_ms - figures.store.now_ms) / 1000
        figures.lives[sum(left_s > up_to for up_to in LIVES_S)] += 1
        if figures.memory is not None and memory:
            figures.memory.add(memory)
