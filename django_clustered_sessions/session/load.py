"""Load a session: read it, take its lock on the same trip, find what has moved or comes in."""

from __future__ import annotations

import logging
import time
from typing import Final, cast

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
from django_clustered_sessions.protocol.flows import Read
from django_clustered_sessions.protocol.locks import LockRequest
from django_clustered_sessions.protocol.options import WriteOptions
from django_clustered_sessions.protocol.record import (
    CachedSession,
    Damaged,
    EndReason,
    HiddenKey,
    Loaded,
    SessionKeys,
)
from django_clustered_sessions.protocol.session_data import SessionData

from .near_cache import Life, Renewal, near_cache
from .outage import read_without_store
from .state import SessionState

logger = logging.getLogger("django_clustered_sessions")

_LOCK_ERRORS: Final = (SessionLockTimeout, SessionLockLost)


def fill(state: SessionState) -> Flow[SessionData]:
    """Return the session's values; load them unless another task has."""
    if state.data is None:
        state.data = yield from load(state)
    return state.data


def load(state: SessionState) -> Flow[SessionData]:
    """Load the session; with ``renew_on_load`` or an idle timeout, renew it as well."""
    keys = state.keys
    if keys is None:
        return state.new_data()
    if isinstance(state.failure, _LOCK_ERRORS):
        # The lock already failed in this request, and the caller swallowed the error.
        raise state.failure
    renews = state.policy.touches and (state.renew_on_load or conf.idle_timeout)
    options = state.write_options() if renews else None
    life = _renewed_just_now(state, keys, options) if options else None
    if life:
        options = None
    locks, joins = _locks_on_load(state, keys)
    try:
        keys, lock_request, found = yield from read(
            state, options, locks=locks or joins, joins=joins
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
        return read_without_store(state, keys, _cached(keys), error)
    loaded = yield from take(state, keys, lock_request, found)
    if loaded and options:
        state.lifetime.renewal = Renewal(loaded.meta.seen_ms, options.ages)
        state.keep_life(keys)
    if state.is_over:
        # The client left while a thread waited here.
        yield from state.lock.releasing()
    state.renewed = loaded is not None and (
        options is not None or (life is not None and loaded.meta.deadline_ms >= life.deadline_ms)
    )
    if renews and not state.renewed:
        # Another request has shortened its life meanwhile: the answer makes up for it.
        state.renew_on_load = True
    return state.new_data(loaded)


def read(
    state: SessionState, options: WriteOptions | None, *, locks: bool, joins: bool = False
) -> Flow[tuple[SessionKeys, LockRequest | None, Read]]:
    """Read the session; return where that was, and how its lock was asked for."""
    while True:
        keys = cast(SessionKeys, state.keys)
        lock_request = state.lock.request(keys, state.policy, capped=True) if locks else None
        found = yield from flows.load(keys, options, lock_request, _cached(keys), joins=joins)
        if not isinstance(found.found, EndReason):
            break
        # A request that waited for the lock had seen the session before it moved.
        state.owner = state.owner or found.whose or None
        if not (yield from find(state, keys, found.found)):
            return keys, lock_request, found
    if conf.absolute_timeout is None:
        return keys, lock_request, found
    if found.found.meta.created_ms + conf.absolute_timeout * 1000 > found.now_ms:
        return keys, lock_request, found
    # Its deadline is from before the timeout was set; a renewal lets it expire.
    yield from flows.touch(keys, state.write_options())
    near_cache.end(keys.record)
    return keys, lock_request, found._replace(found=EndReason.UNKNOWN)


def take(
    state: SessionState, keys: SessionKeys, lock_request: LockRequest | None, read: Read
) -> Flow[Loaded | None]:
    """Take what was read, and the lock that came with it; return None if the session is gone."""
    if lock_request is not None:
        state.lock.take(keys, lock_request, read.turn)
    found = read.found
    if isinstance(found, EndReason):
        counters.add(loads=1)
        if found is EndReason.UNKNOWN and near_cache.misses(keys.record, time.monotonic()):
            logger.warning(
                "the session store knows nothing of session %s, which it had a short while "
                "ago: it has come back without some of its data, or without all of it, and "
                "whose sessions are gone is logged out",
                keys.id[:12],
            )
        near_cache.drop(keys.record)
        state.vanish(found)
        return None
    if state.is_anothers(found.meta.user):
        yield from state.lock.releasing()
        state.vanish(EndReason.ROTATED)
        return None
    state.see(keys, read.now_ms, state.deadline_ms(found.meta), found.meta.mode)
    if read.is_known:
        counters.add(loads=1, near_hits=1, near_bytes_saved=found.meta.size)
    else:
        counters.add(loads=1)
        if conf.near_cache_bytes:
            cached = CachedSession(found.meta.version, found.values)
            near_cache.put(keys.record, cached, conf.near_cache_bytes, state.lifetime.life)
    state.version, state.found, state.owner = found.meta.version, found, found.meta.user
    return found


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
        read_without_store(state, keys, _cached(keys), error)
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
    successor = yield from flows.follow(keys, conf.key_prefix, state.whose)
    if successor is None:
        return False
    near_cache.end(keys.record)
    state.follow(successor)
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


def _cached(keys: SessionKeys) -> CachedSession | None:
    return near_cache.get(keys.record) if conf.near_cache_bytes else None


def _renewed_just_now(state: SessionState, keys: SessionKeys, options: WriteOptions) -> Life | None:
    """Return what is known of a session that was renewed within this second, None of others.

    Another renewal would change nothing.
    """
    life = near_cache.life(keys.record)
    if life is None or not life.is_renewed(time.monotonic(), options.ages):
        return None
    state.lifetime.renewal = life.renewal
    return life


def _locks_on_load(state: SessionState, keys: SessionKeys) -> tuple[bool, bool]:
    """Return whether a load takes the lock, and whether it joins an outer request in its own.

    The latter is for a view that asks for none: the header is no reason to wait for anybody.
    """
    if state.lock.grant is not None or state.is_over:
        return False, False
    access = state.policy.access
    is_unlocked = access is Access.UNLOCKED
    return access is Access.LOCKED, is_unlocked and bool(state.policy.outer_token(keys.id))
