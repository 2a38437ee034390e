"""Load a session: read it, take its lock on the same trip, find what has moved or comes in."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, TypeVar, cast

from django_clustered_sessions.conf import conf
from django_clustered_sessions.decorators import Access
from django_clustered_sessions.exceptions import (
    SessionLockLost,
    SessionLockTimeout,
    SessionStoreUnavailable,
)
from django_clustered_sessions.importing import on_demand
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol import flows
from django_clustered_sessions.protocol.effects import Flow
from django_clustered_sessions.protocol.options import WriteOptions
from django_clustered_sessions.protocol.record import (
    NOBODY,
    CachedSession,
    Damaged,
    EndReason,
    HiddenKey,
    Loaded,
    SessionKeys,
)
from django_clustered_sessions.protocol.session_data import SessionData
from django_clustered_sessions.store import clock

from . import near_reads, renewals
from .near_cache import near_cache
from .outage import read_without_store
from .request_policy import read_header
from .state import SessionState

T = TypeVar("T")

logger = logging.getLogger("django_clustered_sessions")

_IsRenewed = Callable[[SessionKeys, Loaded], bool]

_LOCK_ERRORS: Final = (SessionLockTimeout, SessionLockLost)


def fill(state: SessionState) -> Flow[SessionData]:
    """Return the session's values; load them unless another task has."""
    if state.data is None:
        state.data = yield from load(state)
    return state.data


def answer_of(state: SessionState, question: Callable[[], T]) -> Flow[T]:
    """Return what the session object says; load first where a subclass needs the values for it."""
    answer = question()
    if state.needs_values:
        state.needs_values = False
        yield from fill(state)
        answer = question()
    return answer


def load(state: SessionState) -> Flow[SessionData]:
    """Load the session; with ``renew_on_load`` or an idle timeout, renew it as well."""
    keys = state.keys
    if keys is None:
        return state.new_data()
    if isinstance(state.failure, _LOCK_ERRORS):
        # The lock already failed in this request, and the caller swallowed the error.
        raise state.failure
    access = None if state.lock.grant or state.is_over else state.policy.access
    locks = access is Access.LOCKED
    # A view that asks for no lock joins an outer request in its own: that is no reason to wait.
    header = state.policy.lock_header
    joins = access is Access.UNLOCKED and header != "" and read_header(header, keys.id) != ""
    is_near = conf.near_reads == "tracked" and not (locks or joins) and near_reads.is_for(state)
    renews = (state.renew_on_load or conf.idle_timeout) and state.policy.touches
    options, is_renewed = _renewing(state, keys, is_near=is_near) if renews else (None, None)
    try:
        keys, loaded = yield from read(
            state, keys, options, locks=locks or joins, joins=joins, is_near=is_near
        )
    except SessionLockTimeout as error:
        state.failure = error
        raise state.lock.not_locked(error, state.policy) from None
    except Damaged as damage:
        logger.warning("session %s is damaged and not used: %s", keys.id[:12], damage)
        state.vanish(EndReason.UNKNOWN)
        return state.new_data()
    except SessionStoreUnavailable as error:
        if locks and not state.is_lock_optional:
            raise
        return read_without_store(state, keys, error)
    if state.is_over:
        # The client left while a thread waited here.
        yield from state.lock.releasing()
    state.renewed = bool(loaded and is_renewed and is_renewed(keys, loaded))
    if state.renewed:
        state.keep_life(keys)
    elif renews:
        # Another request has shortened its life meanwhile, or the age was not known: the answer
        # makes up for it.
        state.renew_on_load = True
    return state.new_data(loaded)


def read(
    state: SessionState,
    keys: SessionKeys,
    options: WriteOptions | None = None,
    *,
    locks: bool,
    joins: bool = False,
    is_near: bool = False,
) -> Flow[tuple[SessionKeys, Loaded | None]]:
    """Read the session, from a copy if it ``is_near``; take what was read, and its lock.

    Return where that was, and the session, None if it is gone.
    """
    while True:
        lock_request = state.lock.request(keys, state.policy, capped=True) if locks else None
        if is_near:
            read = yield from near_reads.load(state, keys)
        else:
            known = near_cache.get(keys.record) if conf.near_cache_bytes else None
            read = yield from flows.load(keys, options, lock_request, known, joins=joins)
        found = read.found
        if not isinstance(found, EndReason):
            break
        # A request that waited for the lock had seen the session before it moved.
        state.owner = state.owner or read.whose or None
        if not (yield from find(state, keys, found)):
            break
        keys, is_near = cast(SessionKeys, state.keys), False
    if (
        conf.absolute_timeout is not None
        and isinstance(found, Loaded)
        and found.meta.created_ms + conf.absolute_timeout * 1000 <= read.now_ms
    ):
        # Its deadline is from before the timeout was set; a renewal lets it expire.
        yield from flows.touch(keys, state.write_options())
        near_cache.end(keys.record)
        found = EndReason.UNKNOWN
    if lock_request is not None:
        state.lock.take(keys, lock_request, read.turn)
    if isinstance(found, EndReason):
        _miss(state, keys, found)
        return keys, None
    meta = found.meta
    if state.owner not in (None, NOBODY, meta.user) and (
        state.data is not None or state.has_moved_on
    ):
        # It is not the user's any more whose this object has it.
        yield from state.lock.releasing()
        state.vanish(EndReason.ROTATED)
        return keys, None
    deadline_ms = meta.deadline_ms if conf.absolute_timeout is None else state.deadline_ms(meta)
    life = state.lifetime.see(read.now_ms, deadline_ms, meta.mode)
    counters.add(loads=1, near_hits=int(read.is_known), near_bytes_saved=read.saved)
    if read.is_known:
        near_cache.renew(keys.record, life)
    elif conf.near_cache_bytes:
        cached = CachedSession.of(meta.version, found.values, found.past)
        near_cache.put(keys.record, cached, conf.near_cache_bytes, life)
    state.version, state.found, state.owner = meta.version, found, meta.user
    return keys, found


def _miss(state: SessionState, keys: SessionKeys, reason: EndReason) -> None:
    """Take note that there is no session; tell if that is not as it should be."""
    counters.add(loads=1)
    if reason is EndReason.UNKNOWN and near_cache.misses(keys.record, clock.now_s()):
        logger.warning(
            "the session store knows nothing of session %s, which it had a short while "
            "ago: it has come back without some of its data, or without all of it, and "
            "whose sessions are gone is logged out",
            keys.id[:12],
        )
    near_cache.drop(keys.record)
    state.vanish(reason)


def look(state: SessionState) -> Flow[None]:
    """Ask how long the session lives, which is no use of it."""
    keys = state.keys
    if keys is None or state.goes_on:
        return
    try:
        meta, now_ms = yield from flows.look(keys)
    except Damaged:
        return
    except SessionStoreUnavailable as error:
        read_without_store(state, keys, error)
        return
    if meta:
        state.see(keys, now_ms, state.deadline_ms(meta), meta.mode)


def exists(state: SessionState, key: HiddenKey | None) -> Flow[bool]:
    """Return whether there is a session under a key."""
    if key is None:
        return False
    keys = state.keys_of(key.value)
    if (yield from flows.exists(keys)):
        return True
    return (yield from move_in(state, keys, key)) and (yield from flows.exists(keys))


def find(state: SessionState, keys: SessionKeys, reason: EndReason) -> Flow[bool]:
    """Find a session that is not where it was; return whether it may be at ``state.keys`` now."""
    if reason is EndReason.ROTATED:
        return (yield from follow(state, keys))
    return reason is EndReason.UNKNOWN and (yield from move_in(state, keys))


def follow(state: SessionState, keys: SessionKeys) -> Flow[bool]:
    """Go on where the session does whose key others have cycled, if it is still this user's.

    Only what was loaded before is followed: a key that comes later is worth nothing.
    """
    if not state.whose or keys != state.keys:
        return False
    found = yield from flows.follow(keys, conf.key_prefix, state.whose)
    if found is None:
        return False
    successor, past = found
    near_cache.end(keys.record)
    state.follow(successor)
    if state.data is not None:
        state.data.seal = state.seal(past)
    return True


def move_in(state: SessionState, keys: SessionKeys, key: HiddenKey | None = None) -> Flow[bool]:
    """Take over from the site's old engine what the store knows nothing of.

    ``key`` is the one of the session at ``keys``, None where that is this one. Return whether
    the session may be in the store now.
    """
    key = key or HiddenKey.of(state.session_key)
    if key is None or not conf.migrate_from:
        return False
    options = state.write_options()
    return (yield from on_demand.take_over(key, keys, options, state.value_serializer))


def _renewing(
    state: SessionState, keys: SessionKeys, *, is_near: bool
) -> tuple[WriteOptions | None, _IsRenewed]:
    """Return with which options a load is to renew the deadline on its trip, None for not there.

    Beside them the function that says of what was loaded whether it is renewed, or will be.
    """
    options = state.write_options()
    if state.needs_values:
        # A subclass sets the age by the values: the answer renews, on a trip of its own.
        return None, lambda keys, loaded: False
    if is_near:
        return None, lambda keys, loaded: renewals.renew_later(state, keys, loaded, options)
    life = near_cache.life(keys.record)
    if life is not None and life.is_renewed(clock.now_s(), options.ages):
        # Just now: another renewal would change nothing.
        state.lifetime.renewal = life.renewal
        return None, lambda keys, loaded: loaded.meta.deadline_ms >= life.deadline_ms

    def at_once(keys: SessionKeys, loaded: Loaded) -> bool:
        state.lifetime.renewed(loaded.meta, options.ages)
        return True

    return options, at_once
