"""What is asked of the store: one builder and one reply parser per script. Pure.

Times are ms; a reply's first two items are its status and the store's clock. A *trip* is a
tuple of calls that go to the store together and come back together: one round trip.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, NamedTuple, TypeVar

from .fields import Delta
from .record import Damaged, EndReason, Loaded, Mode, NewerFormat, Place
from .scripts import Script, script

T = TypeVar("T")

#: How long a tombstone is kept, in ms: longer than any request is in flight, and than a failover.
TOMBSTONE_MS: Final = 10 * 60 * 1000

#: How long one who waited for a lock has to take it once it is handed on, in ms.
CLAIM_MS: Final = 2000

#: How long a node may be silent before its figures join those of the former nodes, in ms.
SILENCE_MS: Final = 24 * 60 * 60 * 1000

#: Writes that users rely on. A renewed deadline is none.
_RELIED_ON: Final = frozenset({"create", "commit", "rotate", "end"})

#: Ages are cut to this, in ms (a century), so that every deadline fits the record.
_LONGEST_MS: Final = 100 * 365 * 24 * 60 * 60 * 1000

Argument = bytes | str | int


class Status(IntEnum):
    """First item of each script's reply, as ``lua/prelude.lua`` has it."""

    DONE = 1
    GONE = 0
    EXISTS = -1
    CONFLICT = -2
    TOO_LARGE = -3
    NEWER = -4
    INSIDE = 2
    HELD = -5
    FULL = -6
    LOST = -7


class Call(NamedTuple):
    """One command of a trip: a script with its keys, or a plain command (``script`` None)."""

    script: Script | None
    keys: tuple[str, ...]
    arguments: tuple[Argument, ...]


Trip = tuple[Call, ...]


class Everywhere(Trip):
    """One call to each primary of the store, without keys; its replies are one of each."""


@dataclass(frozen=True, slots=True)
class Wait:
    """A blocking read of the list ``mailbox``; its reply is whether there was something in it.

    None where the read failed, long before its time perhaps.
    """

    mailbox: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Pause:
    """A time in which nothing is asked."""

    seconds: float


#: What a flow asks of a store.
Asks = Trip | Wait

#: An operation as a generator: it yields what to ask, or how long to wait, and is sent the reply.
Flow = Generator[Trip | Wait | Pause, Any, T]


@dataclass(frozen=True, slots=True)
class Sync:
    """What a write waits for, and for how long, in ms: so many replicas, with ``fsync`` on disk.

    With ``fsync`` the primary's own disk as well.
    """

    replicas: int
    fsync: bool
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """Who has a write: so many replicas, and the primary's own disk, as far as that was asked.

    ``after_ms`` is how long that took, by the store's clock; ``problem`` is the store's own word
    where it does not tell.
    """

    replicas: int
    is_on_disk: bool
    after_ms: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Terms:
    """What the settings say about every write: times in ms, ``max_bytes`` in stored bytes.

    ``on_conflict`` is the setting: ``"merge"``, ``"overwrite"`` or ``"error"``.
    """

    default_age_ms: int
    idle_ms: int
    max_bytes: int
    replay_ms: int
    on_conflict: str


@dataclass(frozen=True, slots=True)
class Locking:
    """What the settings say about a lock; times in ms.

    ``wait_ms``: how long a request waits; ``lease_ms``: how long a silent holder keeps the lock;
    ``hold_ms``: how long a living one may. ``most`` may wait for one session, -1 for any number.
    ``name`` is who asks, as ``record.locker_name`` has it.
    """

    wait_ms: int
    lease_ms: int
    hold_ms: int
    most: int
    name: bytes


@dataclass(frozen=True, slots=True)
class Fence:
    """Under which lock a write is done: its token, None for no lock; and whether it ends then."""

    token: str | None = None
    release: bool = False


NO_LOCK: Final = Fence()


@dataclass(frozen=True, slots=True)
class Expiry:
    """How a session is to expire: mode, and its span in ms (ABSOLUTE: since the epoch)."""

    mode: Mode
    span_ms: int


@dataclass(frozen=True, slots=True)
class Alive:
    """The session is there and was written or renewed; times in ms by the store's clock.

    ``counters`` are the new values of what a commit added to, ``before`` is the version that the
    record had before it.
    """

    now_ms: int
    deadline_ms: int
    overwritten: int = 0
    counters: tuple[int, ...] = ()
    mode: Mode | None = None
    before: bytes = b""


@dataclass(frozen=True, slots=True)
class Gone:
    """There is no such session, and why."""

    now_ms: int
    reason: EndReason


@dataclass(frozen=True, slots=True)
class Exists:
    """The key is taken."""

    now_ms: int


@dataclass(frozen=True, slots=True)
class Conflict:
    """Others changed these fields since they were loaded; empty bytes stand for no value."""

    now_ms: int
    values: Mapping[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Taken:
    """The lock is the asker's, since then; ``inside``: it is the one of an outer request."""

    now_ms: int
    since_ms: int
    inside: bool = False


@dataclass(frozen=True, slots=True)
class Held:
    """Another has the lock, and since when.

    ``place`` is the asker's in the queue, from 1; 0 where it is not in it. ``waiting`` is how
    many wait where that are too many.
    """

    now_ms: int
    since_ms: int
    holder: str
    lease_left_ms: int = 0
    place: int = 0
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class Lost:
    """The lock was the asker's and is no more; ``holder`` has it now, empty if nobody."""

    now_ms: int
    since_ms: int
    holder: str


@dataclass(frozen=True, slots=True)
class TooLarge:
    """The session would have this many stored bytes."""

    now_ms: int
    size: int


def _scripted(name: str, keys: Iterable[str], *arguments: Argument) -> Call:
    return Call(script(name), tuple(keys), arguments)


def _plain(name: str, *keys: str, arguments: tuple[Argument, ...] = ()) -> Call:
    return Call(None, keys, (name, *arguments))


def _bounded(span_ms: int) -> int:
    return max(-_LONGEST_MS, min(span_ms, _LONGEST_MS))


def read(place: Place) -> Trip:
    """Ask for all fields of a record, and the store's clock.

    Not a script: a large record is much dearer through Lua.
    """
    return (_plain("HGETALL", place.record), _plain("TIME"))


def fetch(place: Place, version: bytes) -> Trip:
    """Ask for all fields of a record unless it has a version that is known; and for the clock.

    ``lua/fetch.lua``.
    """
    return (_scripted("fetch", (place.record,), version), _plain("TIME"))


def parse_read(replies: Sequence[Any]) -> tuple[dict[bytes, bytes] | bytes, int]:
    """Return the fields, or the meta field where nothing has changed; and the clock in ms."""
    fields, clock = replies
    if type(fields) is not dict and type(fields) is not bytes:
        flat = iter(_whole(fields))
        fields = dict(zip(flat, flat, strict=True))
    return fields, milliseconds(clock)


def exists(place: Place) -> Trip:
    """Ask whether a record has a meta field, which a tombstone has not."""
    return (_plain("HEXISTS", place.record, arguments=("m:",)),)


def create(
    place: Place,
    token: bytes,
    expiry: Expiry,
    fields: Sequence[tuple[bytes, bytes]],
    terms: Terms,
) -> Call:
    """Build ``lua/create.lua``; ``fields`` are pairs of field and value with its codec."""
    return _scripted(
        "create",
        (place.record, place.index),
        token,
        expiry.mode.value,
        _bounded_span(expiry),
        _bounded(terms.default_age_ms),
        terms.idle_ms,
        stored_size(fields),
        "",
        *(part for pair in fields for part in pair),
    )


def copy(place: Place, token: bytes, found: Loaded, terms: Terms) -> Call:
    """Build ``lua/create.lua`` for a session as it was found under another key."""
    meta = found.meta
    return _scripted(
        "create",
        (place.record, place.index),
        token,
        meta.mode.value,
        meta.span_ms,
        _bounded(terms.default_age_ms),
        terms.idle_ms,
        meta.size,
        meta.created_ms,
        *(part for pair in found.values.items() for part in pair),
    )


def commit(
    place: Place,
    token: bytes,
    expiry: Expiry | None,
    delta: Delta,
    terms: Terms,
    fence: Fence = NO_LOCK,
) -> Call:
    """Build ``lua/commit.lua``; without ``expiry`` the session's mode and span stay."""
    return _scripted(
        "commit",
        (place.record, place.index, place.locks),
        token,
        terms.replay_ms,
        _bounded(terms.default_age_ms),
        terms.idle_ms,
        terms.max_bytes,
        expiry.mode.value if expiry else "",
        _bounded_span(expiry) if expiry else 0,
        int(terms.on_conflict == "overwrite"),
        int(delta.cleared),
        *_fenced(fence),
        *(
            part
            for change in delta.changes
            for part in (change.operation.value, change.field, change.loaded, change.operand)
        ),
    )


def touch(place: Place, terms: Terms, *, always: bool = False) -> Call:
    """Build ``lua/touch.lua``; with ``always`` it is a write that a WAIT can follow."""
    return _scripted(
        "touch",
        (place.record, place.index),
        _bounded(terms.default_age_ms),
        terms.idle_ms,
        int(always),
    )


def end(place: Place, reason: EndReason) -> Call:
    """Build ``lua/end.lua``."""
    keys = (place.record, place.index, place.locks)
    return _scripted("end", keys, reason.value, TOMBSTONE_MS, CLAIM_MS)


def rotate(old: Place, new: Place, token: bytes, terms: Terms, fence: Fence = NO_LOCK) -> Call:
    """Build ``lua/rotate.lua``."""
    return _scripted(
        "rotate",
        (old.record, old.index, old.locks, new.record, new.index, new.locks),
        token,
        TOMBSTONE_MS,
        _bounded(terms.default_age_ms),
        terms.idle_ms,
        *_fenced(fence),
    )


def remove(place: Place) -> Trip:
    """Remove a copy whose key nobody has been told, without a trace."""
    return (
        _plain("DEL", place.record),
        _plain("ZREM", place.index, arguments=(place.id,)),
        _plain("HDEL", place.locks, arguments=(place.id,)),
    )


def leave(place: Place, token: bytes, version: bytes, fence: Fence = NO_LOCK) -> Call:
    """Build ``lua/leave.lua``; ``token`` is the copy's, ``version`` the one that was copied."""
    keys = (place.record, place.index, place.locks)
    lock = fence.token or ""
    return _scripted("leave", keys, token, version, TOMBSTONE_MS, lock, CLAIM_MS)


def acquire(place: Place, token: str, terms: Locking, wait_ms: int, inside: str = "") -> Call:
    """Build ``lua/acquire.lua``; ``inside`` is the token of an outer request's lock."""
    return _scripted(
        "acquire",
        (place.record, place.locks),
        token,
        terms.name,
        wait_ms,
        terms.lease_ms,
        CLAIM_MS,
        terms.most,
        inside,
        2 * terms.hold_ms + terms.wait_ms,
    )


def release(place: Place, token: str) -> Call:
    """Build ``lua/release.lua``."""
    keys = (place.record, place.locks, place.mailbox(token))
    return _scripted("release", keys, token, CLAIM_MS)


def renew(place: Place, token: str, lease_ms: int, hold_ms: int) -> Call:
    """Build ``lua/renew.lua``."""
    return _scripted("renew", (place.record,), token, lease_ms, hold_ms)


def _fenced(fence: Fence) -> tuple[Argument, ...]:
    return fence.token or "", int(fence.release), CLAIM_MS


def stats(figures: str, node: str, offset_ms: int, counts: Sequence[int | str]) -> Call:
    """Build ``lua/stats.lua``; ``"^3"`` among the counts: 3 at least."""
    return _scripted("stats", (figures,), node, offset_ms, SILENCE_MS, *counts)


def relied_on(trip: Trip) -> int | None:
    """Return the place in a trip of a write that users rely on, None where there is none."""
    return next((at for at, call in enumerate(trip) if _is_relied_on(call)), None)


def _is_relied_on(call: Call) -> bool:
    name = call.script.name if call.script else ""
    return name in _RELIED_ON or (name == "touch" and call.arguments[-1] == 1)


def acknowledge(sync: Sync) -> Trip:
    """Ask who has what this connection wrote, and then for the store's clock.

    Both go behind the write on its own trip: WAIT in a script is refused, and on another
    connection it asks about nothing.
    """
    if sync.fsync:
        wait = _plain("WAITAOF", arguments=(1, sync.replicas, sync.timeout_ms))
    else:
        wait = _plain("WAIT", arguments=(sync.replicas, sync.timeout_ms))
    return wait, _plain("TIME")


def is_acknowledgement(call: Call) -> bool:
    """Return whether a call asks who has a write: an error in reply says nothing of the write."""
    return call.script is None and call.arguments[0] in ("WAIT", "WAITAOF")


def parse_acknowledged(write: Call, reply: Any, waited: Any, clock: Any) -> Acknowledged | None:
    """Read the replies to a write and to ``acknowledge``; None where nothing was written."""
    if isinstance(reply, Exception) or not _has_written(write, reply):
        return None
    after_ms = milliseconds(clock) - reply[1]
    if isinstance(waited, Exception):
        return Acknowledged(0, False, after_ms, str(waited))
    on_disk, replicas = waited if isinstance(waited, list) else (0, waited)
    return Acknowledged(replicas, bool(on_disk), after_ms)


def _has_written(write: Call, reply: Sequence[Any]) -> bool:
    if reply[0] == Status.DONE:
        return True
    # A session that was ended before: its tombstone is written again.
    ends = write.script is not None and write.script.name == "end"
    return ends and reply[0] == Status.GONE and reply[2] != b""


def figures_beside(trip: Trip) -> str:
    """Return the key of the figures in the bucket that a trip goes to."""
    return trip[0].keys[0].rpartition(":")[0] + ":figures"


def stored_size(fields: Iterable[tuple[bytes, bytes]]) -> int:
    """Return how many bytes new fields take in the store, their versions included."""
    return sum(len(field) + 8 + len(value) for field, value in fields)


def _bounded_span(expiry: Expiry) -> int:
    if expiry.mode is Mode.ABSOLUTE:
        return max(0, min(expiry.span_ms, 2**48 - 1))
    return _bounded(expiry.span_ms)


def _whole(reply: Any) -> Any:
    """Return a reply, or raise what stands in its place."""
    if isinstance(reply, Exception):
        raise reply
    return reply


def _parse(reply: Any) -> tuple[Status, int, list[Any]]:
    try:
        status, now_ms, *rest = _whole(reply)
    except Damaged:
        return Status.GONE, 0, [b""]
    if status == Status.NEWER:
        raise NewerFormat
    return Status(status), now_ms, rest


def parse_exists(reply: Any) -> bool:
    """Return whether the session is there."""
    try:
        return bool(_whole(reply))
    except Damaged:
        return False


def parse_create(reply: Any) -> Alive | Exists:
    """Read the reply of ``create``."""
    status, now_ms, rest = _parse(reply)
    # A record that is damaged takes its key as well.
    return Alive(now_ms, rest[0]) if status is Status.DONE else Exists(now_ms)


def parse_commit(reply: Any) -> Alive | Gone | Conflict | TooLarge | Held | Lost:
    """Read the reply of ``commit``."""
    status, now_ms, rest = _parse(reply)
    match status:
        case Status.CONFLICT:
            pairs = iter(rest)
            return Conflict(now_ms, dict(zip(pairs, pairs, strict=True)))
        case Status.TOO_LARGE:
            return TooLarge(now_ms, rest[0])
        case Status.GONE:
            return Gone(now_ms, EndReason.of(rest[0]))
        case Status.HELD | Status.LOST:
            return _parse_refusal(status, now_ms, rest)
    deadline_ms, overwritten, counters, before = rest
    numbers = tuple(map(int, counters.split()))
    return Alive(now_ms, deadline_ms, overwritten, numbers, before=before)


def parse_touch(reply: Any) -> Alive | Gone:
    """Read the reply of ``touch``."""
    status, now_ms, rest = _parse(reply)
    if status is Status.GONE:
        return Gone(now_ms, EndReason.of(rest[0]))
    return Alive(now_ms, rest[0], mode=Mode(rest[1].decode()))


def parse_end(reply: Any) -> bool:
    """Return whether there was a session to end."""
    return _parse(reply)[0] is Status.DONE


def parse_rotate(reply: Any) -> Alive | Gone | Exists | Held | Lost:
    """Read the reply of ``rotate``."""
    status, now_ms, rest = _parse(reply)
    match status:
        case Status.GONE:
            return Gone(now_ms, EndReason.of(rest[0]))
        case Status.EXISTS:
            return Exists(now_ms)
        case Status.HELD | Status.LOST:
            return _parse_refusal(status, now_ms, rest)
    return Alive(now_ms, rest[0])


def parse_leave(reply: Any) -> Gone | Conflict | Held | Lost | None:
    """Read the reply of ``leave``; None: the session is no more under this key."""
    status, now_ms, rest = _parse(reply)
    match status:
        case Status.GONE:
            return Gone(now_ms, EndReason.of(rest[0]))
        case Status.CONFLICT:
            return Conflict(now_ms, {})
        case Status.HELD | Status.LOST:
            return _parse_refusal(status, now_ms, rest)
    return None


def parse_acquire(reply: Any) -> Taken | Held | Gone:
    """Read the reply of ``acquire``."""
    status, now_ms, rest = _parse(reply)
    match status:
        case Status.GONE:
            return Gone(now_ms, EndReason.of(rest[0]))
        case Status.HELD:
            since_ms, holder, left_ms, place = rest
            return Held(now_ms, since_ms, _text(holder), left_ms, place)
        case Status.FULL:
            since_ms, holder, waiting = rest
            return Held(now_ms, since_ms, _text(holder), waiting=waiting)
    return Taken(now_ms, rest[0], inside=status is Status.INSIDE)


def parse_release(reply: Any) -> int | None:
    """Return how long the lock was held, in ms; None where it was not the asker's."""
    status, now_ms, rest = _parse(reply)
    return now_ms - rest[0] if status is Status.DONE else None


def parse_renew(reply: Any) -> int | None:
    """Return how much is left of the lease, in ms; None where the lock was lost."""
    status, _, rest = _parse(reply)
    return rest[0] if status is Status.DONE else None


def _parse_refusal(status: Status, now_ms: int, rest: Sequence[Any]) -> Held | Lost:
    since_ms, holder = rest
    return (Held if status is Status.HELD else Lost)(now_ms, since_ms, _text(holder))


def milliseconds(clock: Sequence[bytes]) -> int:
    """Return the reply to TIME in ms."""
    seconds, microseconds = clock
    return int(seconds) * 1000 + int(microseconds) // 1000


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")
