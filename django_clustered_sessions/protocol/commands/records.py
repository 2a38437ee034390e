"""Read, write, move and end one session's record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from struct import Struct
from typing import Any, Final, cast

from django_clustered_sessions.protocol.changes import Changes
from django_clustered_sessions.protocol.effects import Argument, Call, Trip, plain
from django_clustered_sessions.protocol.options import (
    NO_LOCK,
    Expiry,
    Fence,
    WriteOptions,
    bounded,
    kept_per_bucket,
)
from django_clustered_sessions.protocol.record import (
    NEXT,
    NOBODY,
    PAST,
    Damaged,
    EndReason,
    Loaded,
    Mode,
    SessionKeys,
)
from django_clustered_sessions.protocol.results import (
    Alive,
    Conflict,
    Ended,
    Exists,
    Gone,
    Held,
    Lost,
    TooLarge,
)

from . import lock_queue, users
from .script_calls import CLOCK, Status, milliseconds, parse, scripted, whole

#: ``lua/commit.lua``, behind the options: release, time for the next holder, clear, mode, span.
_COMMIT: Final = Struct(">?q?cq")

#: Life of a tombstone, in ms: longer than any request is in flight, and than a failover.
TOMBSTONE_MS: Final = 10 * 60 * 1000


def read(keys: SessionKeys) -> Trip:
    """Ask for all fields of a record, and the store's clock.

    Not a script: reading a large record through Lua takes much longer.
    """
    return Call(None, (keys.record,), ("HGETALL",)), CLOCK


def fetch(keys: SessionKeys, version: bytes) -> Trip:
    """Ask for all fields of a record unless it has a version that is known; and for the clock.

    ``lua/fetch.lua``.
    """
    return (scripted("fetch", (keys.record,), version), CLOCK)


def parse_read(replies: Sequence[Any]) -> tuple[dict[bytes, bytes] | bytes, int]:
    """Return the fields, or the meta field where nothing has changed; and the clock in ms."""
    fields, clock = replies
    if isinstance(fields, Exception):
        raise fields
    if type(fields) is not dict and type(fields) is not bytes:
        flat = iter(fields)
        fields = dict(zip(flat, flat, strict=True))
    return fields, milliseconds(clock)


def look(keys: SessionKeys) -> Trip:
    """Ask for a record's meta field, which a tombstone does not have, and the store's clock."""
    return (plain("HGET", "m:", key=keys.record), CLOCK)


def parse_look(replies: Sequence[Any]) -> tuple[bytes | None, int]:
    """Return the meta field, None where there is none; and the clock in ms."""
    packed, clock = replies
    return whole(packed), milliseconds(clock)


def described(all_keys: Iterable[SessionKeys], *fields: bytes) -> Trip:
    """Ask for the meta field and others of some records, and then for the store's clock."""
    return (
        *(plain("HMGET", "m:", *fields, key=keys.record) for keys in all_keys),
        CLOCK,
    )


def exists(keys: SessionKeys) -> Trip:
    """Ask whether a record has a meta field, which a tombstone does not have."""
    return (plain("HEXISTS", "m:", key=keys.record),)


def parse_exists(reply: Any) -> bool:
    """Return whether the session is there."""
    try:
        return bool(whole(reply))
    except Damaged:
        return False


def why(keys: SessionKeys) -> Call:
    """Ask for the reason for which a session has ended."""
    return plain("HGET", "m:end", key=keys.record)


def parse_why(reply: Any) -> EndReason:
    """Read the reply of ``why``."""
    try:
        return EndReason.of(whole(reply) or b"")
    except Damaged:
        return EndReason.UNKNOWN


def whereabouts(keys: SessionKeys) -> Trip:
    """Ask whether a session is there, and otherwise for the id under which it goes on."""
    return (plain("HMGET", "m:", NEXT, PAST, key=keys.record),)


def parse_whereabouts(reply: Any) -> tuple[bytes, str, bytes]:
    """Return the meta field, the public id under which it goes on, its past; empty for none."""
    try:
        packed, public_id, past = whole(reply)
    except Damaged:
        return b"", "", b""
    return packed or b"", (public_id or b"").decode("ascii", "replace"), past or b""


def create(
    keys: SessionKeys,
    token: bytes,
    expiry: Expiry,
    fields: Sequence[tuple[bytes, bytes]],
    options: WriteOptions,
    user: bytes = NOBODY,
) -> Call:
    """Build ``lua/create.lua``; ``fields`` are pairs of field and value with its codec."""
    return scripted(
        "create",
        (keys.record, keys.index, keys.users, keys.events),
        token,
        expiry.mode.value,
        expiry.bounded_ms,
        options.packed,
        stored_size(fields),
        "",
        user,
        options.client,
        *(part for pair in fields for part in pair),
    )


def copy(
    keys: SessionKeys, token: bytes, found: Loaded, options: WriteOptions, past: bytes = b""
) -> Call:
    """Build ``lua/create.lua`` for a session as it was found under another key.

    ``past`` is its new past, empty for the one that was found.
    """
    meta = found.meta
    past = past or found.past
    return scripted(
        "create",
        (keys.record, keys.index, keys.users, keys.events),
        token,
        meta.mode.value,
        meta.span_ms,
        options.packed,
        meta.size,
        meta.created_ms,
        meta.user,
        b"",
        *((PAST, past) if past else ()),
        *(part for pair in found.clients.items() for part in pair),
        *(part for pair in found.values.items() for part in pair),
    )


def parse_create(reply: Any) -> Alive | Exists:
    """Read the reply of ``create``."""
    status, now_ms, rest = parse(reply)
    # A record that is damaged takes its key as well.
    return Alive(now_ms, rest[0], swept=rest[1]) if status is Status.DONE else Exists(now_ms)


def stored_size(fields: Iterable[tuple[bytes, bytes]]) -> int:
    """Return the number of bytes that new fields take in the store, their versions included."""
    return sum(len(field) + 8 + len(value) for field, value in fields)


def adopt(
    keys: SessionKeys,
    token: bytes,
    expiry: Expiry,
    fields: Sequence[tuple[bytes, bytes]],
    options: WriteOptions,
    user: bytes,
    left_ms: int,
    memory_ms: int,
) -> Call:
    """Build ``lua/adopt.lua``; ``fields`` are pairs of field and value with its codec."""
    return scripted(
        "adopt",
        (keys.record, keys.index, keys.users, keys.moved, keys.events),
        token,
        expiry.mode.value,
        expiry.bounded_ms,
        options.packed,
        stored_size(fields),
        user,
        bounded(left_ms),
        bounded(memory_ms),
        *(part for pair in fields for part in pair),
    )


def adopted(keys: SessionKeys) -> Trip:
    """Ask whether a session was taken over from another engine, and whether it is there."""
    return (plain("ZSCORE", keys.id, key=keys.moved), *exists(keys))


def parse_adopted(replies: Sequence[Any]) -> tuple[bool, bool]:
    """Return whether a session was taken over, and whether it is there."""
    was_moved, is_here = replies
    return whole(was_moved) is not None, parse_exists(is_here)


def commit(
    keys: SessionKeys,
    token: bytes,
    expiry: Expiry | None,
    changes: Changes,
    options: WriteOptions,
    fence: Fence = NO_LOCK,
    user: bytes = b"",
    whose: bytes = b"",
) -> Call:
    """Build ``lua/commit.lua``; without ``expiry`` the session's mode and span stay.

    ``user`` is the tag of the new user, empty for no change; ``whose`` is the tag of the user to
    whom the session has to belong, empty for any.
    """
    mode, span_ms = (expiry.mode.value, expiry.bounded_ms) if expiry else ("-", 0)
    own = _COMMIT.pack(fence.release, lock_queue.CLAIM_MS, changes.cleared, mode.encode(), span_ms)
    tags = b"%c%b%c%b" % (len(user), user, len(whose), whose)
    return scripted(
        "commit",
        (
            keys.record,
            keys.index,
            keys.locks,
            keys.users,
            keys.events,
            *keys.writes,
            keys.ended_mailbox,
            *((keys.mailbox(fence.token),) if fence.token else ()),
        ),
        token,
        fence.token or "",
        options.packed + own + tags + options.client,
        *cast(Iterable[Argument], chain.from_iterable(changes.fields)),
    )


def parse_commit(reply: Any) -> Alive | Gone | Conflict | TooLarge | Held | Lost:
    """Read the reply of ``commit``."""
    status, now_ms, rest = parse(reply)
    match status:
        case Status.CONFLICT:
            pairs = iter(rest)
            return Conflict(now_ms, dict(zip(pairs, pairs, strict=True)))
        case Status.TOO_LARGE:
            return TooLarge(now_ms, rest[0])
        case Status.GONE:
            reason, *landed = rest
            counters = tuple(map(int, landed[0].split())) if landed else None
            return Gone(now_ms, EndReason.of(reason), counters)
        case Status.HELD | Status.LOST:
            return lock_queue.parse_refusal(status, now_ms, rest)
    deadline_ms, overwritten, counters, before = rest
    numbers = tuple(map(int, counters.split()))
    return Alive(now_ms, deadline_ms, overwritten, numbers, before=before)


def touch(keys: SessionKeys, options: WriteOptions, *, always: bool = False) -> Call:
    """Build ``lua/touch.lua``; with ``always`` it is a write that a WAIT can follow."""
    return scripted(
        "touch",
        (keys.record, keys.index, keys.users, keys.events),
        options.packed,
        int(always),
        options.client,
    )


def parse_touch(reply: Any) -> Alive | Gone:
    """Read the reply of ``touch``."""
    status, now_ms, rest = parse(reply)
    if status is Status.GONE:
        return Gone(now_ms, EndReason.of(rest[0]))
    return Alive(now_ms, rest[0], mode=Mode(rest[1].decode()))


def end(keys: SessionKeys, reason: EndReason, events_kept: int) -> Call:
    """Build ``lua/end.lua``; ``events_kept`` as in WriteOptions."""
    named = (*_all(keys), keys.events, keys.ended_mailbox)
    kept = kept_per_bucket(events_kept)
    return scripted("end", named, reason.value, TOMBSTONE_MS, lock_queue.CLAIM_MS, kept)


def parse_end(reply: Any) -> Ended | None:
    """Read the reply of ``end``; None: there was no session to end."""
    status, now_ms, rest = parse(reply)
    if status is not Status.DONE:
        return None
    created_ms, user = rest
    return Ended(now_ms - created_ms if created_ms else None, user)


def rotate(
    old: SessionKeys,
    new: SessionKeys,
    token: bytes,
    options: WriteOptions,
    fence: Fence = NO_LOCK,
    past: bytes = b"",
) -> Call:
    """Build ``lua/rotate.lua``; ``past`` is the session's new past, empty to leave it."""
    return scripted(
        "rotate",
        (*_all(old), *_all(new), old.events, old.ended_mailbox, *old.writes),
        token,
        TOMBSTONE_MS,
        options.packed,
        *lock_queue.fenced(fence),
        past,
    )


def parse_rotate(reply: Any) -> Alive | Gone | Exists | Held | Lost:
    """Read the reply of ``rotate``."""
    status, now_ms, rest = parse(reply)
    match status:
        case Status.GONE:
            return Gone(now_ms, EndReason.of(rest[0]))
        case Status.EXISTS:
            return Exists(now_ms)
        case Status.HELD | Status.LOST:
            return lock_queue.parse_refusal(status, now_ms, rest)
    return Alive(now_ms, rest[0])


def rekey(keys: SessionKeys, fields: Mapping[bytes, tuple[bytes, bytes]]) -> Call:
    """Build ``lua/rekey.lua``; ``fields`` have their bytes as they were read, and the new ones."""
    flat = (part for field, pair in fields.items() for part in (field, *pair))
    return scripted("rekey", (keys.record,), *flat)


def parse_rekey(reply: Any) -> int:
    """Return the number of fields that were written; 0 also where the session is gone.

    Raises NewerFormat.
    """
    status, _, rest = parse(reply)
    return int(rest[0]) if status is Status.DONE else 0


def leave(
    keys: SessionKeys,
    token: bytes,
    version: bytes,
    successor: SessionKeys,
    options: WriteOptions,
    fence: Fence = NO_LOCK,
) -> Call:
    """Build ``lua/leave.lua``; ``version`` was copied to the place ``successor`` with ``token``."""
    return scripted(
        "leave",
        (*_all(keys), keys.events, keys.ended_mailbox, *keys.writes),
        token,
        version,
        TOMBSTONE_MS,
        fence.token or "",
        lock_queue.CLAIM_MS,
        successor.id,
        kept_per_bucket(options.events_kept),
        options.replay_ms,
    )


def parse_leave(reply: Any) -> Gone | Conflict | Held | Lost | None:
    """Read the reply of ``leave``; None: the session has left this key."""
    status, now_ms, rest = parse(reply)
    match status:
        case Status.GONE:
            return Gone(now_ms, EndReason.of(rest[0]))
        case Status.CONFLICT:
            return Conflict(now_ms, {})
        case Status.HELD | Status.LOST:
            return lock_queue.parse_refusal(status, now_ms, rest)
    return None


def remove(keys: SessionKeys, user: bytes) -> Trip:
    """Remove a copy of a user's session, before its key was given to a client, without a trace."""
    return (
        plain("DEL", key=keys.record),
        # No event told of its beginning.
        users.unlist(keys, user, 0),
        plain("HDEL", keys.id, key=keys.locks),
    )


def _all(keys: SessionKeys) -> tuple[str, str, str, str]:
    return keys.record, keys.index, keys.locks, keys.users
