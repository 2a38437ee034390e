"""What is asked of the store: one builder and one reply parser per script. Pure.

Times are ms; a reply's first two items are its status and the store's clock. A *trip* is a
tuple of calls that go to the store together and come back together: one round trip.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from .fields import Delta
from .record import Damaged, EndReason, Mode, NewerFormat, Place
from .scripts import Script, script

#: How long a tombstone is kept, in ms: longer than any request is in flight, and than a failover.
TOMBSTONE_MS: Final = 10 * 60 * 1000

#: How long a node may be silent before its figures join those of the former nodes, in ms.
SILENCE_MS: Final = 24 * 60 * 60 * 1000

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


@dataclass(frozen=True, slots=True)
class Call:
    """One command of a trip: a script with its keys, or a plain command (``script`` None)."""

    script: Script | None
    keys: tuple[str, ...]
    arguments: tuple[Argument, ...]


Trip = tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Terms:
    """What the settings say about every write: times in ms, ``max_bytes`` in stored bytes.

    ``overwrite``: write over what others changed. Otherwise merge with it, and give up at the
    conflict number ``attempts``.
    """

    default_age_ms: int
    idle_ms: int
    max_bytes: int
    replay_ms: int
    overwrite: bool
    attempts: int


@dataclass(frozen=True, slots=True)
class Expiry:
    """How a session is to expire: mode, and its span in ms (ABSOLUTE: since the epoch)."""

    mode: Mode
    span_ms: int


@dataclass(frozen=True, slots=True)
class Alive:
    """The session is there and was written or renewed; times in ms by the store's clock.

    ``counters`` are the new values of what a commit added to.
    """

    now_ms: int
    deadline_ms: int
    overwritten: int = 0
    counters: tuple[int, ...] = ()
    mode: Mode | None = None


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


def parse_read(replies: Sequence[Any]) -> tuple[dict[bytes, bytes], int]:
    """Return the fields and the store's clock in ms."""
    fields, (seconds, microseconds) = replies
    if not isinstance(fields, Mapping):
        flat = iter(_whole(fields))
        fields = dict(zip(flat, flat, strict=True))
    return dict(fields), int(seconds) * 1000 + int(microseconds) // 1000


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
        *(part for pair in fields for part in pair),
    )


def commit(place: Place, token: bytes, expiry: Expiry | None, delta: Delta, terms: Terms) -> Call:
    """Build ``lua/commit.lua``; without ``expiry`` the session's mode and span stay."""
    return _scripted(
        "commit",
        (place.record, place.index),
        token,
        terms.replay_ms,
        _bounded(terms.default_age_ms),
        terms.idle_ms,
        terms.max_bytes,
        expiry.mode.value if expiry else "",
        _bounded_span(expiry) if expiry else 0,
        int(terms.overwrite),
        int(delta.cleared),
        *(
            part
            for change in delta.changes
            for part in (change.operation.value, change.field, change.loaded, change.operand)
        ),
    )


def touch(place: Place, terms: Terms) -> Call:
    """Build ``lua/touch.lua``."""
    return _scripted(
        "touch", (place.record, place.index), _bounded(terms.default_age_ms), terms.idle_ms
    )


def end(place: Place, reason: EndReason) -> Call:
    """Build ``lua/end.lua``."""
    return _scripted("end", (place.record, place.index), reason.value, TOMBSTONE_MS)


def rotate(old: Place, new: Place, token: bytes, terms: Terms) -> Call:
    """Build ``lua/rotate.lua``."""
    return _scripted(
        "rotate",
        (old.record, old.index, new.record, new.index),
        token,
        TOMBSTONE_MS,
        _bounded(terms.default_age_ms),
        terms.idle_ms,
    )


def stats(figures: str, node: str, offset_ms: int, counts: Sequence[int]) -> Call:
    """Build ``lua/stats.lua``."""
    return _scripted("stats", (figures,), node, offset_ms, SILENCE_MS, *counts)


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


def parse_commit(reply: Any) -> Alive | Gone | Conflict | TooLarge:
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
    deadline_ms, overwritten, counters = rest
    return Alive(now_ms, deadline_ms, overwritten, tuple(map(int, counters.split())))


def parse_touch(reply: Any) -> Alive | Gone:
    """Read the reply of ``touch``."""
    status, now_ms, rest = _parse(reply)
    if status is Status.GONE:
        return Gone(now_ms, EndReason.of(rest[0]))
    return Alive(now_ms, rest[0], mode=Mode(rest[1].decode()))


def parse_end(reply: Any) -> bool:
    """Return whether there was a session to end."""
    return _parse(reply)[0] is Status.DONE


def parse_rotate(reply: Any) -> Alive | Gone | Exists:
    """Read the reply of ``rotate``."""
    status, now_ms, rest = _parse(reply)
    match status:
        case Status.GONE:
            return Gone(now_ms, EndReason.of(rest[0]))
        case Status.EXISTS:
            return Exists(now_ms)
    return Alive(now_ms, rest[0])
