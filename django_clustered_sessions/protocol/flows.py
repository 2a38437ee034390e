"""The operations on a session: each a generator, written once for sync and async.

A flow yields a trip, the calls of one round trip to the store, and is sent the replies;
``store.drivers`` has the two loops that run one. Clock, token and random keys come in as arguments,
so a flow can be tested without a store, reply by reply. The shape is that of ``httpx``'s
authentication flows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple, cast

from django_clustered_sessions.exceptions import (
    SessionConflict,
    SessionLockLost,
    SessionStoreUnavailable,
    SessionTooLarge,
)

from . import locks
from .changes import Changes
from .commands import lock_queue, records
from .effects import Flow, Trip
from .locks import LockOutcome, LockRequest
from .options import NO_LOCK, Expiry, Fence, WriteOptions
from .record import (
    LOCK,
    META,
    CachedSession,
    Damaged,
    EndReason,
    Loaded,
    Lock,
    Meta,
    NewerFormat,
    SessionKeys,
)
from .results import (
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
from .session_data import SessionData

#: Most moves of a session that are followed.
_MOST_MOVES: Final = 8
#: Bytes from which on a session that is known is read by a script, which may leave its values out.
#: Fewer are copied by the store faster than it gets to run a script.
_LARGE: Final = 2048
#: Conflicts in a row after which a writer queues for the lock.
_PATIENCE: Final = 3


class Read(NamedTuple):
    """Result of a load: the session, or the reason why there is none; the store's clock in ms.

    ``turn`` is the outcome of the request for the lock, None without one.
    """

    found: Loaded | EndReason
    now_ms: int
    turn: LockOutcome | None = None
    #: True if the session is as it was known.
    is_known: bool = False
    #: Bytes of values that were not sent, because they are known.
    saved: int = 0
    #: Of a session that is gone: the tag of its user when the wait for its lock began.
    whose: bytes = b""


class Committed(NamedTuple):
    """A commit that landed: the state of the session now, and the steps that led there.

    ``merged`` is the number of fields that others had changed too; ``turn`` is the outcome of the
    request for the lock, where the commit made one; ``version`` is the record's now, if something
    was written. ``user`` is the tag of the user who has logged in by it, NOBODY after a logout,
    empty where neither was.
    """

    alive: Alive
    changes: Changes
    merged: int
    turn: LockOutcome | None = None
    version: bytes = b""
    user: bytes = b""


def load(
    keys: SessionKeys,
    options: WriteOptions | None = None,
    lock_request: LockRequest | None = None,
    known: CachedSession | None = None,
    *,
    joins: bool = False,
) -> Flow[Read]:
    """Read a session; with ``options``, renew its deadline on the same trip.

    With ``lock_request``, take its lock first, on the same trip too where the lock is free; with
    ``joins`` only if it is the outer request's, and go on without it otherwise. The values that are
    ``known`` are not sent again where they are the same.

    Raises Damaged where the record cannot be understood, NewerFormat where it must not be,
    SessionLockTimeout.
    """
    # A conditional read omits the lock, so a joining request reads the whole record.
    known = None if joins else known
    left_out = known if known is not None and known.size >= _LARGE else None
    trip = records.fetch(keys, left_out.version) if left_out else records.read(keys)
    if options:
        trip = (records.touch(keys, options), *trip)
    turn = None
    if lock_request and not joins:
        turn, replies = yield from locks.take(keys, lock_request, trip)
    else:
        replies = yield trip
    fields, now_ms = records.parse_read(replies[-2:])
    packed = fields if isinstance(fields, bytes) else fields.get(META)
    found: Loaded | EndReason
    if known and packed is not None and (meta := Meta.parse(packed)).version == known.version:
        found = Loaded(meta, known.values, past=known.past)
    else:
        known = None
        found = Loaded.parse(cast(dict[bytes, bytes], fields))
    if isinstance(found, Loaded) and found.meta.deadline_ms <= now_ms:
        # It expired between the two commands of this trip.
        found = EndReason.UNKNOWN
    if isinstance(found, EndReason) and turn and turn.seen:
        return Read(found, now_ms, turn, whose=_user_in(turn.seen))
    if lock_request and joins and isinstance(found, Loaded):
        turn = _joined(lock_request, cast(dict[bytes, bytes], fields).get(LOCK), now_ms)
    saved = meta.size if known and left_out else 0
    return Read(found, now_ms, turn, known is not None, saved)


def _user_in(replies: Sequence[Any]) -> bytes:
    """Return the tag of the user of the session that was read, empty where none was."""
    with suppress(Damaged, NewerFormat):
        fields, _ = records.parse_read(replies[-2:])
        return Meta.parse(fields if isinstance(fields, bytes) else fields.get(META, b"")).user
    return b""


def _joined(lock_request: LockRequest, packed: bytes | None, now_ms: int) -> LockOutcome | None:
    """Return the outcome for a request inside another's lock, None where that is not held."""
    with suppress(Damaged):
        if packed and (lock := Lock.parse(packed)).token == lock_request.inside:
            return LockOutcome(Taken(now_ms, lock.since_ms, inside=True))
    return None


def exists(keys: SessionKeys) -> Flow[bool]:
    """Return whether there is such a session."""
    (reply,) = yield records.exists(keys)
    return records.parse_exists(reply)


def ends(all_keys: Sequence[SessionKeys]) -> Flow[Sequence[EndReason | None]]:
    """Return of each session the reason why it has ended, None where it is there."""
    replies = yield tuple(call for keys in all_keys for call in records.exists(keys))
    found: list[EndReason | None] = [None] * len(all_keys)
    gone = [at for at, reply in enumerate(replies) if not records.parse_exists(reply)]
    if gone:
        replies = yield tuple(records.why(all_keys[at]) for at in gone)
        for at, reply in zip(gone, replies, strict=True):
            found[at] = records.parse_why(reply)
    return found


def look(keys: SessionKeys) -> Flow[tuple[Meta | None, int]]:
    """Return a session's meta, None where there is none; and the store's clock in ms.

    Raises Damaged, NewerFormat.
    """
    packed, now_ms = records.parse_look((yield records.look(keys)))
    return (Meta.parse(packed) if packed is not None else None), now_ms


def follow(keys: SessionKeys, prefix: str, user: bytes) -> Flow[tuple[SessionKeys, bytes] | None]:
    """Return the keys under which a user's session, by tag, goes on that has left ``keys``.

    Beside them the session's past, see ``sealing``. None where it does not go on, or where it is
    another user's by now. ``prefix`` is the setting KEY_PREFIX.

    Raises NewerFormat.
    """
    for _ in range(_MOST_MOVES):
        (reply,) = yield records.whereabouts(keys)
        packed, public_id, past = records.parse_whereabouts(reply)
        try:
            if packed:
                return (keys, past) if Meta.parse(packed).user == user else None
            keys = SessionKeys.of_id(prefix, public_id)
        except (Damaged, ValueError):
            break
    return None


def touch(keys: SessionKeys, options: WriteOptions) -> Flow[Alive | Gone]:
    """Renew a session's deadline."""
    (reply,) = yield (records.touch(keys, options),)
    return records.parse_touch(reply)


def create(
    keys: SessionKeys,
    fields: Sequence[tuple[bytes, bytes]],
    expiry: Expiry,
    options: WriteOptions,
    token: bytes,
    user: bytes,
) -> Flow[Alive | Exists]:
    """Create a session with ``fields``, of a user, where there is none and none was ended.

    Raises SessionTooLarge.
    """
    size = records.stored_size(fields)
    if size > options.max_bytes:
        raise SessionTooLarge(keys.id, size, options.max_bytes)
    (reply,) = yield (records.create(keys, token, expiry, fields, options, user),)
    return records.parse_create(reply)


def commit(
    keys: SessionKeys,
    fields: SessionData,
    expiry_of: Callable[[SessionData], Expiry],
    options: WriteOptions,
    token_of: Callable[[Changes], bytes],
    asks: Callable[[], LockRequest],
    fence: Fence = NO_LOCK,
    *,
    whose: bytes = b"",
    again: bool = False,
) -> Flow[Committed | Gone]:
    """Write what changed in ``fields`` into a session that exists.

    Concurrent changes by others are merged into ``fields``. With nothing to write, the deadline is
    renewed; with ``again`` by a write in any case, so that WAIT can follow. ``token_of`` returns
    the token for some changes. ``asks`` returns a request for the lock, with a new token each time:
    a request that lost its lock begins anew. ``whose`` is the tag of the user to whom the session
    has to belong, empty for any: it is gone, as rotated, once it is another user's.

    While another request holds the lock, this one queues for it with ``asks()``, as it does after
    three conflicts in a row.

    Raises SessionTooLarge; SessionConflict where that is the policy; SessionLockLost;
    SessionLockTimeout.
    """
    conflicts = merged = 0
    lock_request: LockRequest | None = None
    turn: LockOutcome | None = None
    try:
        while True:
            changes = fields.changes()
            if not changes:
                alive = yield from _renew(keys, options, fence, again)
                return alive if isinstance(alive, Gone) else Committed(alive, changes, merged, turn)
            expiry = expiry_of(fields) if changes.expiry_changed else None
            token = token_of(changes)
            sent = fields.sealed(changes)
            user = fields.user if changes.changes_user else b""
            (reply,) = yield (
                records.commit(keys, token, expiry, sent, options, fence, user, whose),
            )
            queues = False
            match records.parse_commit(reply):
                case Gone() as gone:
                    if gone.counters is not None:
                        # The session has taken it along.
                        fields.written(sent, token, list(gone.counters))
                    return gone
                case TooLarge(size=size):
                    raise SessionTooLarge(keys.id, size, options.max_bytes)
                case Lost(holder=holder) if turn is None:
                    raise SessionLockLost(keys.id, holder)
                case Held() | Lost():
                    queues = True
                case Conflict(values=theirs):
                    # An addition to a field that is no counter in the store is no conflict: the
                    # sum is set.
                    if not theirs.keys() <= changes.sums:
                        conflicts += 1
                        merged += len(theirs)
                        if options.on_conflict == "error":
                            raise SessionConflict(keys.id, [_readable(field) for field in theirs])
                    fields.rebase(theirs)
                    queues = fence.token is None and conflicts >= _PATIENCE
                case Alive() as alive:
                    fields.written(sent, token, list(alive.counters))
                    return Committed(alive, changes, merged, turn, token, user)
            if queues:
                lock_request = asks()
                turn, _ = yield from locks.take(keys, lock_request)
                if isinstance(turn.found, Gone):
                    return turn.found
                fence = Fence(lock_request.token, release=True)
    except Exception:
        if lock_request and turn:
            with suppress(SessionStoreUnavailable):
                yield (lock_queue.release(keys, lock_request.token),)
        raise


def _renew(
    keys: SessionKeys, options: WriteOptions, fence: Fence, again: bool
) -> Flow[Alive | Gone]:
    trip: Trip = (records.touch(keys, options, always=again),)
    if fence.token and fence.release:
        trip += (lock_queue.release(keys, fence.token),)
    reply, *_ = yield trip
    return records.parse_touch(reply)


def rotate(
    old: SessionKeys,
    new: SessionKeys,
    options: WriteOptions,
    token_of: Callable[[], bytes],
    asks: Callable[[], LockRequest],
    fence: Fence = NO_LOCK,
    *,
    apart: bool = False,
    found: Loaded | None = None,
    past: bytes = b"",
) -> Flow[Alive | Gone | Exists]:
    """Move a session to a new key, with everything that the store holds of it.

    Raw values move, those included that this release cannot read. While another request holds the
    lock, this one queues for it with ``asks()``. Where the two keys may be ``apart``, on two
    servers, the session is copied, then ended under the old key unless it has changed since;
    ``found`` is the session as it was loaded, None to read it. ``past`` is its past under the new
    key, see ``sealing``; empty to leave that as it is.

    Raises SessionLockLost, SessionLockTimeout.
    """
    lock_request: LockRequest | None = None
    while True:
        if apart:
            moved = yield from _move(
                old, new, options, token_of(), lock_request or asks(), fence, found, past
            )
            found = None
        else:
            (reply,) = yield (records.rotate(old, new, token_of(), options, fence, past),)
            moved = records.parse_rotate(reply)
        match moved:
            case Conflict():
                # Others wrote between the two steps.
                continue
            case Lost(holder=holder) if lock_request is None:
                raise SessionLockLost(old.id, holder)
            case Held() | Lost():
                lock_request = asks()
                turn, _ = yield from locks.take(old, lock_request)
                if isinstance(turn.found, Gone):
                    return turn.found
                fence = Fence(lock_request.token, release=True)
            case Exists() as exists:
                if lock_request:
                    yield (lock_queue.release(old, lock_request.token),)
                return exists
            case done:
                return done


def _move(
    old: SessionKeys,
    new: SessionKeys,
    options: WriteOptions,
    token: bytes,
    lock_request: LockRequest,
    fence: Fence,
    found: Loaded | None,
    past: bytes,
) -> Flow[Alive | Gone | Exists | Conflict | Held | Lost]:
    """Copy a session to a new key, then end it under the old one: one always exists."""
    if found is None:
        try:
            read = yield from load(old)
        except Damaged:
            return Gone(0, EndReason.UNKNOWN)
        if isinstance(read.found, EndReason):
            return Gone(read.now_ms, read.found)
        found = read.found
    trip: Trip = (records.copy(new, token, found, options, past),)
    if fence.token and not fence.release:
        # The lock goes along.
        trip += (lock_queue.acquire(new, fence.token, lock_request.options, 0),)
    reply, *_ = yield trip
    copied = records.parse_create(reply)
    if isinstance(copied, Exists):
        return copied
    leave = records.leave(old, token, found.meta.version, new, options, fence)
    (reply,) = yield (leave,)
    refusal = records.parse_leave(reply)
    if refusal is None:
        return copied
    yield records.remove(new, found.meta.user)
    return refusal


def release(keys: SessionKeys, token: str) -> Flow[int | None]:
    """Give up a session's lock, or the place in its queue.

    Return the time it was held, in ms; None where it was not held any more.
    """
    (reply,) = yield (lock_queue.release(keys, token),)
    return lock_queue.parse_release(reply)


def end(keys: SessionKeys, reason: EndReason, events_kept: int) -> Flow[Ended | None]:
    """End a session for good; return None where there was none. See WriteOptions."""
    (reply,) = yield (records.end(keys, reason, events_kept),)
    return records.parse_end(reply)


def _readable(field: bytes) -> str:
    return field[2:].decode("utf-8", "replace")
