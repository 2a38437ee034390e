"""What is asked of the store: one builder and one reply parser per script. Pure.

Times are ms; a reply's first two items are its status and the store's clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from enum import IntEnum
from functools import cache
from typing import Any, Final

from .effects import Argument, Call, Trip, plain
from .options import NO_LOCK, Expiry, Fence, LockOptions, SyncOptions, WriteOptions, bounded
from .record import (
    BUCKETS,
    NEXT,
    NOBODY,
    Damaged,
    EndReason,
    Loaded,
    Mode,
    NewerFormat,
    SessionKeys,
    bucket_tag,
    claims_key,
)
from .results import (
    Acknowledged,
    Alive,
    Conflict,
    Ended,
    Exists,
    Gone,
    Held,
    Lost,
    Taken,
    TooLarge,
)
from .scripts import script
from .session_data import Changes

#: How long a tombstone is kept, in ms: longer than any request is in flight, and than a failover.
TOMBSTONE_MS: Final = 10 * 60 * 1000

#: How long one who waited for a lock has to take it once it is handed on, in ms.
CLAIM_MS: Final = 2000

#: How long a node may be silent before its figures join those of the former nodes, in ms.
SILENCE_MS: Final = 24 * 60 * 60 * 1000

#: The history of the figures: how long each of its slots is, in ms, and how many are kept: a day's.
SLOT_MS: Final = 5 * 60 * 1000

SLOTS: Final = 24 * 12

#: Writes that users rely on. A renewed deadline is none.
_RELIED_ON: Final = frozenset({"create", "commit", "rotate", "leave", "end"})

#: Which argument of a touch says that it is written in any case.
_ALWAYS: Final = 4


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


_STATUSES: Final = {status.value: status for status in Status}


def _scripted(name: str, keys: Iterable[str], *arguments: Argument) -> Call:
    return Call(script(name), tuple(keys), arguments)


#: Asks for the store's clock; ``milliseconds`` reads the reply.
CLOCK: Final = plain("TIME")


def read(keys: SessionKeys) -> Trip:
    """Ask for all fields of a record, and the store's clock.

    Not a script: a large record is much dearer through Lua.
    """
    return (plain("HGETALL", key=keys.record), CLOCK)


def fetch(keys: SessionKeys, version: bytes) -> Trip:
    """Ask for all fields of a record unless it has a version that is known; and for the clock.

    ``lua/fetch.lua``.
    """
    return (_scripted("fetch", (keys.record,), version), CLOCK)


def parse_read(replies: Sequence[Any]) -> tuple[dict[bytes, bytes] | bytes, int]:
    """Return the fields, or the meta field where nothing has changed; and the clock in ms."""
    fields, clock = replies
    if type(fields) is not dict and type(fields) is not bytes:
        flat = iter(_whole(fields))
        fields = dict(zip(flat, flat, strict=True))
    return fields, milliseconds(clock)


def look(keys: SessionKeys) -> Trip:
    """Ask for a record's meta field, which a tombstone has not, and the store's clock."""
    return (plain("HGET", "m:", key=keys.record), CLOCK)


def parse_look(replies: Sequence[Any]) -> tuple[bytes | None, int]:
    """Return the meta field, None where there is none; and the clock in ms."""
    packed, clock = replies
    return _whole(packed), milliseconds(clock)


def exists(keys: SessionKeys) -> Trip:
    """Ask whether a record has a meta field, which a tombstone has not."""
    return (plain("HEXISTS", "m:", key=keys.record),)


def why(keys: SessionKeys) -> Call:
    """Ask why a session that is no more has ended."""
    return plain("HGET", "m:end", key=keys.record)


def whereabouts(keys: SessionKeys) -> Trip:
    """Ask whether a session is there, and otherwise where it goes on."""
    return (plain("HMGET", "m:", NEXT, key=keys.record),)


def parse_whereabouts(reply: Any) -> tuple[bytes, str]:
    """Return the meta field and the public id under which it goes on, each empty for none."""
    try:
        packed, public_id = _whole(reply)
    except Damaged:
        return b"", ""
    return packed or b"", (public_id or b"").decode("ascii", "replace")


def create(
    keys: SessionKeys,
    token: bytes,
    expiry: Expiry,
    fields: Sequence[tuple[bytes, bytes]],
    options: WriteOptions,
    user: bytes = NOBODY,
) -> Call:
    """Build ``lua/create.lua``; ``fields`` are pairs of field and value with its codec."""
    return _scripted(
        "create",
        (keys.record, keys.index, keys.users, keys.events),
        token,
        expiry.mode.value,
        expiry.bounded_ms,
        *options.ages,
        _per_bucket(options.events_kept),
        stored_size(fields),
        "",
        user,
        options.client,
        *(part for pair in fields for part in pair),
    )


def copy(keys: SessionKeys, token: bytes, found: Loaded, options: WriteOptions) -> Call:
    """Build ``lua/create.lua`` for a session as it was found under another key."""
    meta = found.meta
    return _scripted(
        "create",
        (keys.record, keys.index, keys.users, keys.events),
        token,
        meta.mode.value,
        meta.span_ms,
        *options.ages,
        _per_bucket(options.events_kept),
        meta.size,
        meta.created_ms,
        meta.user,
        b"",
        *(part for pair in found.clients.items() for part in pair),
        *(part for pair in found.values.items() for part in pair),
    )


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
    return _scripted(
        "adopt",
        (keys.record, keys.index, keys.users, _moved(keys), keys.events),
        token,
        expiry.mode.value,
        expiry.bounded_ms,
        *options.ages,
        _per_bucket(options.events_kept),
        stored_size(fields),
        user,
        bounded(left_ms),
        bounded(memory_ms),
        *(part for pair in fields for part in pair),
    )


def adopted(keys: SessionKeys) -> Trip:
    """Ask whether a session was taken over from another engine, and whether it is there."""
    return (plain("ZSCORE", keys.id, key=_moved(keys)), *exists(keys))


def parse_adopted(replies: Sequence[Any]) -> tuple[bool, bool]:
    """Return whether a session was taken over, and whether it is there."""
    was_moved, is_here = replies
    return _whole(was_moved) is not None, parse_exists(is_here)


def _moved(keys: SessionKeys) -> str:
    return f"{keys.index.removesuffix('index')}moved"


def described(all_keys: Iterable[SessionKeys], *fields: bytes) -> Trip:
    """Ask for the meta field and others of some records, and then for the store's clock."""
    return (
        *(plain("HMGET", "m:", *fields, key=keys.record) for keys in all_keys),
        CLOCK,
    )


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

    ``user`` is the tag of the user where that changes, ``whose`` of whose session it has to be.
    """
    return _scripted(
        "commit",
        (*_all(keys), keys.events, *keys.writes),
        token,
        options.replay_ms,
        *options.ages,
        _per_bucket(options.events_kept),
        options.max_bytes,
        expiry.mode.value if expiry else "",
        expiry.bounded_ms if expiry else 0,
        int(options.on_conflict == "overwrite"),
        int(changes.cleared),
        *_fenced(fence),
        user,
        options.client,
        whose,
        *(
            part
            for change in changes.fields
            for part in (change.operation.value, change.field, change.loaded, change.operand)
        ),
    )


def touch(keys: SessionKeys, options: WriteOptions, *, always: bool = False) -> Call:
    """Build ``lua/touch.lua``; with ``always`` it is a write that a WAIT can follow."""
    return _scripted(
        "touch",
        (keys.record, keys.index, keys.users, keys.events),
        *options.ages,
        _per_bucket(options.events_kept),
        int(always),
        options.client,
    )


def end(keys: SessionKeys, reason: EndReason, events_kept: int) -> Call:
    """Build ``lua/end.lua``; ``events_kept`` as in Terms."""
    named = (*_all(keys), keys.events)
    kept = _per_bucket(events_kept)
    return _scripted("end", named, reason.value, TOMBSTONE_MS, CLAIM_MS, kept)


def rotate(
    old: SessionKeys, new: SessionKeys, token: bytes, options: WriteOptions, fence: Fence = NO_LOCK
) -> Call:
    """Build ``lua/rotate.lua``."""
    return _scripted(
        "rotate",
        (*_all(old), *_all(new), old.events),
        token,
        TOMBSTONE_MS,
        *options.ages,
        _per_bucket(options.events_kept),
        *_fenced(fence),
    )


def _all(keys: SessionKeys) -> tuple[str, str, str, str]:
    return keys.record, keys.index, keys.locks, keys.users


@cache
def _per_bucket(events_kept: int) -> int:
    """Return how many events a bucket has to keep for all to keep that many, 0 for none.

    That is more than its share: sessions are spread over the buckets at random.
    """
    share = events_kept / BUCKETS
    return math.ceil(share + 4 * math.sqrt(share) + 4) if events_kept else 0


def remove(keys: SessionKeys, user: bytes) -> Trip:
    """Remove a user's copy whose key nobody has been told, without a trace."""
    return (
        plain("DEL", key=keys.record),
        # Nobody was told that it began.
        unlist(keys, user, 0),
        plain("HDEL", keys.id, key=keys.locks),
    )


def unlist(keys: SessionKeys, user: bytes, events_kept: int) -> Call:
    """Build ``lua/unlist.lua``; ``user`` is the tag of the user whose session it was.

    ``events_kept`` as in Terms.
    """
    named = (keys.record, keys.index, keys.users, keys.events)
    return _scripted("unlist", named, user, _per_bucket(events_kept))


def counted(prefix: str, bucket: int, user: bytes) -> Trip:
    """Ask a bucket how many sessions it has of a user, by tag, and of users; and its index as well.

    Two plain commands take the store a quarter of the time that ``owned`` does.
    """
    tag = bucket_tag(prefix, bucket)
    return (
        plain("HMGET", user, "", key=f"{tag}:users"),
        plain("ZCOUNT", 0, "+inf", key=f"{tag}:index"),
    )


def owned(prefix: str, bucket: int, user: bytes) -> Call:
    """Build ``lua/owned.lua`` for a user's tag and one bucket under the setting KEY_PREFIX."""
    tag = bucket_tag(prefix, bucket)
    return _scripted("owned", (f"{tag}:index", f"{tag}:users"), user)


def claim(
    prefix: str,
    user: bytes,
    public_id: str,
    most: int,
    lapse_ms: int,
    counting: Sequence[str] = (),
    others: Iterable[bytes] = (),
) -> Call:
    """Build ``lua/claim.lua`` for a user's tag under the setting KEY_PREFIX.

    ``counting`` are the ids of other sessions that count, ``others`` of those that do not.
    """
    keys = (claims_key(prefix, user),)
    return _scripted("claim", keys, public_id, most, lapse_ms, len(counting), *counting, *others)


def unclaim(prefix: str, user: bytes, public_id: str) -> Call:
    """Give a claim back."""
    return plain("ZREM", public_id, key=claims_key(prefix, user))


def forget_claims(prefix: str, user: bytes) -> Call:
    """Remove all claims of a user."""
    return plain("DEL", key=claims_key(prefix, user))


def leave(
    keys: SessionKeys,
    token: bytes,
    version: bytes,
    successor: SessionKeys,
    events_kept: int,
    fence: Fence = NO_LOCK,
) -> Call:
    """Build ``lua/leave.lua``; ``version`` was copied to the place ``successor`` with ``token``.

    ``events_kept`` as in Terms.
    """
    return _scripted(
        "leave",
        (*_all(keys), keys.events),
        token,
        version,
        TOMBSTONE_MS,
        fence.token or "",
        CLAIM_MS,
        successor.id,
        _per_bucket(events_kept),
    )


def acquire(
    keys: SessionKeys, token: str, options: LockOptions, wait_ms: int, inside: str = ""
) -> Call:
    """Build ``lua/acquire.lua``; ``inside`` is the token of an outer request's lock."""
    return _scripted(
        "acquire",
        (keys.record, keys.locks),
        token,
        options.name,
        wait_ms,
        options.lease_ms,
        CLAIM_MS,
        options.most,
        inside,
        2 * options.hold_ms + options.wait_ms,
    )


def release(keys: SessionKeys, token: str) -> Call:
    """Build ``lua/release.lua``."""
    named = (keys.record, keys.locks, keys.mailbox(token))
    return _scripted("release", named, token, CLAIM_MS)


def renew(keys: SessionKeys, token: str, lease_ms: int, hold_ms: int) -> Call:
    """Build ``lua/renew.lua``."""
    return _scripted("renew", (keys.record,), token, lease_ms, hold_ms)


def _fenced(fence: Fence) -> tuple[Argument, ...]:
    return fence.token or "", int(fence.release), CLAIM_MS


def sweep(prefix: str, bucket: int, events_kept: int) -> Call:
    """Build ``lua/sweep.lua`` for one bucket under the setting KEY_PREFIX; the rest as in Terms."""
    tag = bucket_tag(prefix, bucket)
    keys = (f"{tag}:index", f"{tag}:users", f"{tag}:events")
    return _scripted("sweep", keys, _per_bucket(events_kept))


def events_waiting(prefix: str, bucket: int) -> Call:
    """Ask how many events of a bucket are not finished."""
    return plain("XLEN", key=_events(prefix, bucket))


def take(prefix: str, bucket: int, most: int, lease_ms: int) -> Call:
    """Build ``lua/take.lua``: take at most so many events of a bucket, to be finished in time."""
    return _scripted("take", (_events(prefix, bucket),), most, lease_ms)


def finish(prefix: str, bucket: int, entry: bytes) -> Trip:
    """Remove an event that was handled.

    In this order: what is acknowledged and still there would never go.
    """
    key = _events(prefix, bucket)
    return plain("XDEL", entry, key=key), plain("XACK", "workers", entry, key=key)


def give_back(prefix: str, bucket: int, entry: bytes, lease_ms: int) -> Call:
    """Let an event that was taken, and not handled, be taken by the next one who asks."""
    claim = ("workers", "worker", 0, entry, "IDLE", lease_ms, "JUSTID")
    return plain("XCLAIM", *claim, key=_events(prefix, bucket))


def _events(prefix: str, bucket: int) -> str:
    return f"{bucket_tag(prefix, bucket)}:events"


def stats(
    bucket: str,
    node: str,
    offset_ms: int,
    counts: Sequence[int | str],
    past: Sequence[tuple[int, Sequence[int]]] = (),
) -> Call:
    """Build ``lua/stats.lua``; ``"^3"`` among the counts: 3 at least, ``"v3"``: 3 at most.

    ``past`` are spans of time: how long ago each was, in ms, and what was counted in it.
    """
    lines = (" ".join(map(str, (age_ms, *counted))) for age_ms, counted in past)
    return _scripted(
        "stats",
        (f"{bucket}:figures", f"{bucket}:history"),
        node,
        offset_ms,
        SILENCE_MS,
        SLOT_MS,
        SLOTS,
        "\n".join(lines),
        *counts,
    )


def relied_on(trip: Trip) -> int | None:
    """Return the place in a trip of a write that users rely on, None where there is none."""
    return next((at for at, call in enumerate(trip) if _is_relied_on(call)), None)


def _is_relied_on(call: Call) -> bool:
    name = call.script.name if call.script else ""
    return name in _RELIED_ON or (name == "touch" and call.arguments[_ALWAYS] == 1)


def acknowledge(sync: SyncOptions) -> Trip:
    """Ask who has what this connection wrote, and then for the store's clock.

    Both go behind the write on its own trip: WAIT in a script is refused, and on another
    connection it asks about nothing.
    """
    if sync.fsync:
        wait = plain("WAITAOF", 1, sync.replicas, sync.timeout_ms)
    else:
        wait = plain("WAIT", sync.replicas, sync.timeout_ms)
    return wait, CLOCK


def is_acknowledgement(call: Call) -> bool:
    """Return whether a call asks who has a write: an error in reply says nothing of the write."""
    return call.script is None and call.arguments[0] in ("WAIT", "WAITAOF")


def is_passenger(trip: Trip, at: int) -> bool:
    """Return whether a call of a trip is figures that ride along, without which it goes on."""
    script = trip[at].script
    return at == 0 and len(trip) > 1 and script is not None and script.name == "stats"


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


def bucket_beside(trip: Trip) -> str:
    """Return what the keys of the bucket that a trip goes to start with."""
    return trip[0].keys[0].rpartition(":")[0]


def stored_size(fields: Iterable[tuple[bytes, bytes]]) -> int:
    """Return how many bytes new fields take in the store, their versions included."""
    return sum(len(field) + 8 + len(value) for field, value in fields)


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
    return _STATUSES[status], now_ms, rest


def parse_exists(reply: Any) -> bool:
    """Return whether the session is there."""
    try:
        return bool(_whole(reply))
    except Damaged:
        return False


def parse_why(reply: Any) -> EndReason:
    """Read the reply of ``why``."""
    try:
        return EndReason.of(_whole(reply) or b"")
    except Damaged:
        return EndReason.UNKNOWN


def parse_create(reply: Any) -> Alive | Exists:
    """Read the reply of ``create``."""
    status, now_ms, rest = _parse(reply)
    # A record that is damaged takes its key as well.
    return Alive(now_ms, rest[0], swept=rest[1]) if status is Status.DONE else Exists(now_ms)


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


def parse_end(reply: Any) -> Ended | None:
    """Read the reply of ``end``; None: there was no session to end."""
    status, now_ms, rest = _parse(reply)
    if status is not Status.DONE:
        return None
    created_ms, user = rest
    return Ended(now_ms - created_ms if created_ms else None, user)


def parse_sweep(reply: Any) -> int:
    """Return how many sessions have left a bucket's index."""
    status, _, rest = _parse(reply)
    return rest[0] if status is Status.DONE else 0


def parse_take(reply: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Read the reply of ``take``: each event's id in the stream, and its fields."""
    status, _, rest = _parse(reply)
    taken = []
    for entry, flat in rest if status is Status.DONE else ():
        words = iter(flat)
        taken.append((entry, dict(zip(words, words, strict=True))))
    return taken


def parse_counted(counts: Any, listed: Any) -> bool:
    """Return whether ``owned`` has sessions to find in the bucket, or a count to mend."""
    if isinstance(counts, Damaged) or isinstance(listed, Damaged):
        return True
    of_user, of_all = counts
    return of_user is not None or (of_all or b"0") != b"%d" % listed


def parse_owned(reply: Any) -> list[bytes]:
    """Return the public ids of the sessions that ``owned`` found in its bucket, none for damage."""
    status, _, rest = _parse(reply)
    return rest if status is Status.DONE else []


def parse_claim(reply: Any) -> list[bytes] | None:
    """Return the ids of the claims that stand in the way: none if it is claimed.

    None for damage.
    """
    status, _, rest = _parse(reply)
    return None if status is Status.GONE else rest


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
            since_ms, holder, left_ms, keys = rest
            return Held(now_ms, since_ms, _text(holder), left_ms, keys)
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
