"""What goes on in the store: how many sessions, what each node has counted, who holds locks. Pure.

Nothing here grows with the number of sessions: they are counted by the buckets' indexes, and
measured one small trip after the other. What is told of locks grows with those that are held.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice
from random import Random
from typing import Any, Final, TypeVar

from .commands import Argument, Call, Everywhere, Flow, Trip, milliseconds
from .counters import MAXIMA, NAMES, WAITS
from .exceptions import SessionStoreUnavailable
from .record import BUCKETS, LOCK, META, Damaged, Lock, Locker, Meta, NewerFormat, bucket_tag

T = TypeVar("T")

#: Version of what ``document()`` and ``locks_document()`` return.
FORMAT: Final = 1

#: Clocks further apart than this are reported, in ms.
CLOCK_TOLERANCE_MS: Final = 1000

#: Upper bounds of the classes of remaining life, in seconds; the last class has none.
LIVES_S: Final = (60, 600, 3600, 6 * 3600, 86400, 7 * 86400, 14 * 86400, 30 * 86400)

#: Buckets, pages of an index, or sessions that one trip asks for.
_PER_TRIP: Final = 64
#: Sessions in a page of an index.
_PAGE: Final = 64

#: How INFO names a replica.
_REPLICA: Final = re.compile(r"slave\d+")

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Refused:
    """The store does not do what it was asked; its reason in words."""

    why: str


@dataclass(frozen=True, slots=True)
class Clock:
    """A store host's clock in ms, this node's less that, and how wrong the latter may be."""

    now_ms: int
    offset_ms: int
    error_ms: int

    def ahead_of(self, other: Clock) -> tuple[int, int]:
        """Return by how much it is ahead of another host's, and how wrong that may be, in ms."""
        return other.offset_ms - self.offset_ms, self.error_ms + other.error_ms


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """What the store says of itself: its clock in ms, INFO, and some of CONFIG.

    INFO is the first primary's of a cluster, and ``others`` are those of the other ones.
    ``clock_offset_ms`` is this node's clock less the store's, right to ``clock_error_ms``. Where
    the store refuses, ``info`` is empty, or ``save`` and ``min_replicas`` are None, and the
    reasons are given.
    """

    now_ms: int
    clock_offset_ms: int
    clock_error_ms: int
    info: Mapping[str, str]
    save: str | None
    why_no_info: str = "INFO does not tell"
    why_no_config: str = ""
    others: Sequence[Mapping[str, str]] = ()
    min_replicas: int | None = None

    @property
    def clock(self) -> Clock:
        """Its clock beside this node's."""
        return Clock(self.now_ms, self.clock_offset_ms, self.clock_error_ms)

    @property
    def product(self) -> str:
        """``"valkey"`` or ``"redis"``, which is also what anything else calls itself."""
        return "valkey" if "valkey_version" in self.info else "redis"

    @property
    def version(self) -> str | None:
        """The server's version."""
        return self.info.get(f"{self.product}_version")

    @property
    def role(self) -> str | None:
        """``"primary"`` or ``"replica"``."""
        roles = {"master": "primary", "slave": "replica"}
        return roles.get(self.info.get("role", ""))

    @property
    def appendonly(self) -> bool | None:
        """Whether the store writes an append-only file."""
        enabled = self.info.get("aof_enabled")
        return None if enabled is None else enabled == "1"

    def number(self, name: str) -> int | None:
        """Return a whole number out of INFO, summed over all primaries."""
        found = [info.get(name, "") for info in (self.info, *self.others)]
        return sum(map(int, found)) if all(map(str.isdigit, found)) else None

    @property
    def primaries(self) -> int | None:
        """How many servers share the sessions."""
        return 1 + len(self.others) if self.info else None


@dataclass(slots=True)
class Distribution:
    """How often each value occurs: as large as there are different values."""

    seen: Counter[int] = field(default_factory=Counter)

    def add(self, value: int) -> None:
        """Take one more value."""
        self.seen[value] += 1

    @property
    def count(self) -> int:
        """How many values there are."""
        return self.seen.total()

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(value * count for value, count in self.seen.items())

    def summary(self) -> dict[str, int] | None:
        """Return least, median, 95th percentile (both by nearest rank), largest and mean."""
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
    """What one node has reported: when last (ms, the store's clock), its clock's offset (ms)."""

    name: str
    reported_ms: int = 0
    clock_offset_ms: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, line: bytes) -> None:
        """Take in what it has reported to one bucket; ``lua/stats.lua`` has the format."""
        try:
            reported_ms, clock_offset_ms, *counts = map(int, line.split())
        except ValueError:
            # Not what stats.lua writes; the other figures are good.
            return
        if reported_ms > self.reported_ms:
            self.reported_ms, self.clock_offset_ms = reported_ms, clock_offset_ms
        _combine(self.counts, dict(zip(NAMES, counts, strict=False)))


@dataclass(slots=True)
class Bucket:
    """One bucket's index: its key, and how many sessions it has."""

    index: str
    logged_in: int
    anonymous: int

    def pages(self) -> Iterator[Page]:
        """Cut the sessions, without those that have expired, into ranges of ranks."""
        for count, start in ((self.anonymous, 0), (self.logged_in, -self.logged_in)):
            for first in range(0, count, _PAGE):
                yield Page(self.index, start + first, start + min(first + _PAGE, count) - 1)

    def rank(self, number: int) -> int:
        """Return the rank in the index of the bucket's session ``number``, from 0 on."""
        # Between the two kinds are those that have expired and not yet left the index.
        return number if number < self.anonymous else number - self.anonymous - self.logged_in


@dataclass(frozen=True, slots=True)
class Page:
    """Ranks of an index, both ends included; a negative one counts from the end."""

    index: str
    first: int
    last: int


@dataclass(slots=True)
class Replica:
    """A replica as its primary sees it; ``lag_s``: seconds since it was last heard of.

    ``clock`` is None where it could not be asked.
    """

    host: str
    port: int
    state: str
    lag_bytes: int
    lag_s: int
    clock: Clock | None = None

    @property
    def address(self) -> str:
        """Where it is."""
        return f"{self.host}:{self.port}"


@dataclass(slots=True)
class Primary:
    """A server that holds sessions, and its replicas; None where it does not tell them.

    ``slots`` are the ranges of slots that a Cluster's primary has, both ends included.
    """

    address: str
    role: str | None
    clock: Clock
    replicas: Sequence[Replica] | None
    slots: Sequence[tuple[int, int]] | None = None


@dataclass(frozen=True, slots=True)
class Sentinels:
    """The Sentinels: how many the entry names, how many of these answer, and what they know.

    ``known`` is how many there are by their own account, ``quorum`` how many have to find the
    primary down; None where none answers.
    """

    service: str
    named: int
    answering: int
    known: int | None
    quorum: int | None


@dataclass(slots=True)
class Statistics:
    """The whole cluster's figures. Sizes and memory are bytes."""

    prefix: str
    store: StoreFacts
    exact: bool
    logged_in: int = 0
    anonymous: int = 0
    unreadable: int = 0
    sizes: Distribution = field(default_factory=Distribution)
    #: Sessions by remaining life, in the classes of LIVES_S.
    lives: list[int] = field(default_factory=lambda: [0] * (len(LIVES_S) + 1))
    #: None where the store does not tell.
    memory: Distribution | None = None
    index_memory: int = 0
    nodes: dict[str, Node] = field(default_factory=dict)
    former: Node = field(default_factory=lambda: Node(""))
    #: One for a single store, and several for a Cluster.
    primaries: Sequence[Primary] = ()
    sentinels: Sentinels | None = None

    @property
    def total(self) -> int:
        """How many sessions there are."""
        return self.logged_in + self.anonymous

    @property
    def counts(self) -> Counter[str]:
        """What all nodes have counted, those that are no more included."""
        counts = self.former.counts.copy()
        for node in self.nodes.values():
            _combine(counts, node.counts)
        return counts

    @property
    def record_memory(self) -> int | None:
        """Memory of all records, estimated from those that were measured."""
        if self.memory is None or (self.total and not self.memory.count):
            return None
        return round(self.memory.total * self.total / self.memory.count) if self.total else 0


@dataclass(frozen=True, slots=True)
class HeldLock:
    """A lock that is held now; times in ms by the store's clock.

    ``session`` is the start of the session's public id. ``holder`` is None where it came between
    the two questions. ``waiting`` are those who wait, in the order of their turns.
    """

    session: str
    holder: Locker | None
    since_ms: int
    lease_end_ms: int
    waiting: Sequence[Locker]


@dataclass(frozen=True, slots=True)
class HeldLocks:
    """All locks that are held, those held longest first, by the store's clock in ms."""

    prefix: str
    now_ms: int
    locks: Sequence[HeldLock]


def clock(node: Callable[[], float]) -> Flow[Clock]:
    """Ask a server for its time; ``node`` gives this node's in seconds.

    Raises SessionStoreUnavailable.
    """
    yield (_call("TIME"),)
    # The second answer, so that the time to connect is not taken for a wrong clock.
    sent_s = node()
    (time,) = yield (_call("TIME"),)
    received_s = node()
    now_ms = milliseconds(time)
    return Clock(
        now_ms,
        round((sent_s + received_s) * 500) - now_ms,
        math.ceil(abs(received_s - sent_s) * 500),
    )


def store_facts(node: Callable[[], float]) -> Flow[StoreFacts]:
    """Ask the store about itself; ``node`` gives this node's time in seconds.

    Raises SessionStoreUnavailable where it does not even tell its time.
    """
    time = yield from clock(node)
    facts: dict[str, Any] = {"info": {}, "save": None}
    match (yield from _unless_refused(Everywhere((_call("INFO"),)))):
        case Refused(why):
            facts["why_no_info"] = why
        case [bytes() as first, *others]:
            facts["info"], facts["others"] = _parse_info(first), list(map(_parse_info, others))
    asked = _call("CONFIG", "GET", "save", "min-replicas-to-write")
    match (yield from _unless_refused((asked,))):
        case Refused(why):
            facts["why_no_config"] = why
        case [reply]:
            words = iter(reply)
            told = {name.decode(): value.decode() for name, value in zip(words, words, strict=True)}
            facts["save"] = told.get("save")
            least = told.get("min-replicas-to-write", "")
            facts["min_replicas"] = int(least) if least.isdigit() else None
            facts["why_no_config"] = "" if told else "CONFIG GET does not tell"
    return StoreFacts(time.now_ms, time.offset_ms, time.error_ms, **facts)


def primary(address: str, facts: StoreFacts) -> Primary:
    """Return a server with the replicas that it has by its own account."""
    replicas = None
    sent = facts.number("master_repl_offset")
    if sent is not None:
        lines = (value for name, value in facts.info.items() if _REPLICA.fullmatch(name))
        replicas = [_replica(line, sent) for line in lines]
    return Primary(address, facts.role, facts.clock, replicas)


def sentinels(service: str, states: Sequence[Mapping[str, Any] | None]) -> Sentinels:
    """Sum up what each Sentinel knows of a service; None where one did not tell."""
    told = [state for state in states if state is not None]
    known = max((state["num-other-sentinels"] + 1 for state in told), default=None)
    quorum = told[0]["quorum"] if told else None
    return Sentinels(service, len(states), len(told), known, quorum)


def _replica(line: str, sent: int) -> Replica:
    """Read INFO's line of a replica; ``sent`` is how far the primary itself is."""
    told = dict(word.partition("=")[::2] for word in line.split(","))
    behind, lag_s = sent - int(told["offset"]), int(told["lag"])
    return Replica(told["ip"], int(told["port"]), told["state"], max(behind, 0), lag_s)


def collect(
    prefix: str,
    node: Callable[[], float],
    *,
    sample: int | None,
    random: Random,
    progress: Progress = lambda done, of: None,
) -> Flow[Statistics]:
    """Collect the figures of all sessions under the setting KEY_PREFIX.

    ``sample`` sessions are measured, chosen evenly over the buckets; all for None.
    ``progress`` is told how many are done.

    Raises SessionStoreUnavailable.
    """
    store = yield from store_facts(node)
    figures = Statistics(prefix, store, exact=False)
    probe = yield from _unless_refused((_memory_of(_index(prefix, 0)),))
    figures.memory = None if isinstance(probe, Refused) else Distribution()
    buckets = yield from _count(figures)
    if sample is None or sample >= figures.total:
        pages: Iterator[Page] = chain.from_iterable(bucket.pages() for bucket in buckets)
        of, figures.exact = figures.total, True
    else:
        pages = _sampled(buckets, _spread(figures.total, sample, random))
        of = sample
    done = 0
    for some in _batches(pages, _PER_TRIP):
        replies = yield tuple(_call("ZRANGE", at.first, at.last, key=at.index) for at in some)
        records = (
            page.index.removesuffix("index") + session_id.decode("utf-8", "replace")
            for page, ids in zip(some, replies, strict=True)
            for session_id in _or(ids, ())
        )
        for batch in _batches(records, _PER_TRIP):
            yield from _measure(figures, batch)
            done += len(batch)
            progress(done, of)
    return figures


def collect_locks(prefix: str) -> Flow[HeldLocks]:
    """Collect who holds locks and who waits for them, under the setting KEY_PREFIX.

    A lock whose lease is over is free for the taking, and told only while somebody waits for it.

    Raises SessionStoreUnavailable.
    """
    records, now_ms = [], 0
    for some in _batches(range(BUCKETS), _PER_TRIP):
        tags = [bucket_tag(prefix, bucket) for bucket in some]
        hash_keys = tuple(_call("HKEYS", key=f"{tag}:locks") for tag in tags)
        clock, *replies = yield (_call("TIME"), *hash_keys)
        now_ms = milliseconds(clock)
        records += [
            (tag, session_id.decode("utf-8", "replace"))
            for tag, ids in zip(tags, replies, strict=True)
            for session_id in _or(ids, ())
        ]
    found = []
    for batch in _batches(records, _PER_TRIP):
        clock, *replies = yield (
            _call("TIME"),
            *(
                call
                for tag, session_id in batch
                for call in (
                    _call("HGET", session_id, key=f"{tag}:locks"),
                    _call("HGET", LOCK, key=f"{tag}:{session_id}"),
                )
            ),
        )
        now_ms = milliseconds(clock)
        pairs = iter(replies)
        for (_, session_id), entries, lock in zip(batch, pairs, pairs, strict=True):
            if held := _held(session_id, entries, lock, now_ms):
                found.append(held)
    found.sort(key=lambda held: held.since_ms)
    return HeldLocks(prefix, now_ms, found)


def locks_document(held: HeldLocks) -> dict[str, Any]:
    """Return who holds and who waits as ``docs/sessionstats.md`` describes it, ready for JSON."""
    return {
        "format": FORMAT,
        "time_ms": held.now_ms,
        "key_prefix": held.prefix,
        "held_locks": [
            {
                "session": lock.session,
                "holder": lock.holder and lock.holder.name,
                "since_ms": lock.since_ms,
                "lease_left_ms": lock.lease_end_ms - held.now_ms,
                "waiting": [
                    {"place": place, "name": waiter.name, "since_ms": waiter.since_ms}
                    for place, waiter in enumerate(lock.waiting, 1)
                ],
            }
            for lock in held.locks
        ],
    }


def near_hit_ratio(counts: Counter[str]) -> float | None:
    """Return which share of the loads was at hand in the near cache; None before any load."""
    return round(counts["near_hits"] / counts["loads"], 4) if counts["loads"] else None


def acknowledged_after_ms(counts: Counter[str]) -> float | None:
    """Return after how long the replicas had a write, in ms: the mean; None where none had one."""
    count = counts["sync_waits"] - counts["sync_shortfalls"]
    return round(counts["sync_wait_ms"] / count, 2) if count else None


def waits(counts: Counter[str]) -> dict[str, int] | None:
    """Return how long waits for locks took, in ms: p50, p95, p99, max and mean; None for none.

    Waits are counted by classes, so the first three are the upper bounds of classes, and no more
    than the longest wait.
    """
    count, longest_ms = counts["lock_waits"], counts["lock_longest_wait_ms"]
    if not count:
        return None
    up_to = list(accumulate(counts[name] for name, _ in WAITS))
    found = {}
    for name, percent in (("p50", 50), ("p95", 95), ("p99", 99)):
        rank = math.ceil(percent * count / 100)
        bounds = (bound for (_, bound), ranks in zip(WAITS, up_to, strict=True) if ranks >= rank)
        found[name] = min(next(bounds, longest_ms), longest_ms)
    return {**found, "max": longest_ms, "mean": round(counts["lock_wait_ms"] / count)}


def document(figures: Statistics) -> dict[str, Any]:
    """Return the figures as ``docs/sessionstats.md`` describes them, ready for JSON."""
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
        "locks": {"waited_ms": waits(figures.counts)},
        "near_cache": {"hit_ratio": near_hit_ratio(figures.counts)},
        "sync": {"acknowledged_after_ms": acknowledged_after_ms(figures.counts)},
        "nodes": [
            {
                "name": node.name,
                "reported_ms": node.reported_ms,
                "clock_offset_ms": node.clock_offset_ms,
                "counters": _named(node.counts),
                "locks": {"waited_ms": waits(node.counts)},
            }
            for _, node in sorted(figures.nodes.items())
        ],
        "former_nodes": {
            "counters": _named(figures.former.counts),
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
    """Yield each server whose clock is surely a second ahead of or behind the first one's.

    And by how much it is ahead, in ms.
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


def _combine(counts: Counter[str], more: Mapping[str, int]) -> None:
    """Add to counts; of those that are maxima, the larger one counts."""
    for name, count in more.items():
        counts[name] = max(counts[name], count) if name in MAXIMA else counts[name] + count


def _held(session_id: str, entries: Any, lock: Any, now_ms: int) -> HeldLock | None:
    """Return who holds a lock and who waits for it, None where nobody holds it any more."""
    try:
        found = Lock.parse(_or(lock, None) or b"")
        lockers = Locker.parse_all(_or(entries, None) or b"")
    except Damaged:
        return None
    # The lock was read after them, and may have gone to one who waited.
    behind = iter(lockers)
    holder = next((one for one in behind if one.token == found.token), None)
    waiting = [one for one in behind if one.waits_until_ms > now_ms]
    if found.lease_end_ms <= now_ms and not waiting:
        return None
    return HeldLock(session_id[:12], holder, found.since_ms, found.lease_end_ms, waiting)


def _call(*words: Argument, key: str | None = None) -> Call:
    return Call(None, () if key is None else (key,), words)


def _memory_of(key: str) -> Call:
    return _call("MEMORY USAGE", key=key)


def _unless_refused(trip: Trip) -> Flow[Any]:
    try:
        return (yield trip)
    except SessionStoreUnavailable as error:
        return Refused(str(error))


def _parse_info(reply: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in reply.decode("utf-8", "replace").splitlines())
    return {name: value for name, colon, value in lines if colon}


def _count(figures: Statistics) -> Flow[list[Bucket]]:
    """Ask each bucket how many sessions it has, and for its nodes' figures."""
    buckets = []
    now_ms, with_memory = figures.store.now_ms, figures.memory is not None
    for some in _batches(range(BUCKETS), _PER_TRIP):
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
            anonymous, logged_in = (_or(next(replies), 0) for _ in range(2))
            buckets.append(Bucket(_index(figures.prefix, bucket), logged_in, anonymous))
            figures.logged_in += logged_in
            figures.anonymous += anonymous
            _add_figures(figures, _or(next(replies), ()))
            if with_memory:
                figures.index_memory += next(replies) or 0
    return buckets


def _index(prefix: str, bucket: int) -> str:
    return f"{bucket_tag(prefix, bucket)}:index"


def _about_bucket(prefix: str, bucket: int, now_ms: int, with_memory: bool) -> Iterator[Call]:
    index = _index(prefix, bucket)
    yield _call("ZCOUNT", "-inf", f"(-{now_ms}", key=index)
    yield _call("ZCOUNT", f"({now_ms}", "+inf", key=index)
    yield _call("HGETALL", key=f"{bucket_tag(prefix, bucket)}:figures")
    if with_memory:
        yield _memory_of(index)


def _add_figures(figures: Statistics, lines: Sequence[bytes]) -> None:
    flat = iter(lines)
    for name, line in zip(flat, flat, strict=True):
        text = name.decode("utf-8", "replace")
        node = figures.nodes.setdefault(text, Node(text)) if text else figures.former
        node.add(line)


def _spread(total: int, sample: int, random: Random) -> Iterator[int]:
    """Choose one number at random out of each of ``sample`` equal parts of range(total)."""
    for part in range(sample):
        yield random.randrange(part * total // sample, (part + 1) * total // sample)


def _sampled(buckets: Iterable[Bucket], numbers: Iterable[int]) -> Iterator[Page]:
    """Return where the sessions with these numbers, which rise, are: a page for each."""
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
                    _call("HGET", META, key=record),
                    *([_memory_of(record)] if with_memory else ()),
                )
            )
        )
    )
    for _ in records:
        packed = next(replies)
        memory = next(replies) if with_memory else None
        if packed is None:
            # It ended meanwhile, or an eviction took it.
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


def _or(reply: Any, instead: Any) -> Any:
    """Return a reply, or something else instead of damage: a key of another type."""
    return instead if isinstance(reply, Damaged) else reply


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    upcoming = iter(items)
    while batch := list(islice(upcoming, size)):
        yield batch
