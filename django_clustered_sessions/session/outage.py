"""Go on while the store is away: CLUSTERED_SESSIONS_NONSTOP, and the marks of views."""

from __future__ import annotations

import logging

from django_clustered_sessions.conf import conf
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol.record import SessionKeys
from django_clustered_sessions.protocol.session_data import SessionData
from django_clustered_sessions.store import clock

from .near_cache import near_cache
from .state import SessionState

logger = logging.getLogger("django_clustered_sessions")


def read_without_store(
    state: SessionState,
    keys: SessionKeys,
    error: SessionStoreUnavailable,
) -> SessionData:
    """Return what there is to read while the store is away, or raise its error."""
    if state.nonstop == "exception":
        raise error
    if state.nonstop == "noop":
        go_on(state, error)
        return state.new_data()
    cached = near_cache.get(keys.record) if conf.near_cache_bytes else None
    life = near_cache.life(keys.record)
    if cached is None or life is None or life.left_s(clock.now_s()) <= 0:
        raise error
    go_on(state, error)
    state.is_local = True
    state.lifetime.recall(life)
    counters.add(local_reads=1)
    return state.new_data(cached)


def go_on(state: SessionState, error: SessionStoreUnavailable) -> None:
    """Let the request go on without its session."""
    state.failure = error
    if not error.is_told:
        logger.warning("%s goes on: %s", state.policy.route or "a request", error)


def require_store(state: SessionState) -> None:
    """Raise the store's error where the request goes on without the store.

    For what must not be dropped: a lock, a login.
    """
    if state.goes_on and state.outage is not None:
        raise state.outage


def refuse_writes(state: SessionState) -> None:
    """Raise the store's error where the session was not read, though the store may be back.

    Nothing is written on top of what was not read, and no key is moved: the cookie stays as it is.
    """
    if isinstance(state.failure, SessionStoreUnavailable) and state.nonstop != "exception":
        raise state.failure


def may_drop(state: SessionState, *, must_create: bool) -> bool:
    """Return whether a write may be dropped while the store is away.

    Never one without which a login or a logout would only look like one, nor one under a lock.
    """
    if must_create or state.has_moved or state.nonstop not in ("noop", "local_reads"):
        return False
    if state.lock.grant and not state.is_lock_optional:
        return False
    return state.data is None or not state.data.changes().changes_user
