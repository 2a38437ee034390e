"""Move a session to a new key, as at a login."""

from __future__ import annotations

from functools import partial

from django.contrib.sessions.backends.base import UpdateError

from django_clustered_sessions.conf import conf
from django_clustered_sessions.exceptions import SessionLockLost, SessionLockTimeout
from django_clustered_sessions.importing import on_demand
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol import flows
from django_clustered_sessions.protocol.effects import Flow
from django_clustered_sessions.protocol.record import EndReason, HiddenKey, SessionKeys
from django_clustered_sessions.protocol.results import Alive, Exists, Gone
from django_clustered_sessions.protocol.sealing import Seal
from django_clustered_sessions.protocol.session_data import SessionData
from django_clustered_sessions.signals import session_ended
from django_clustered_sessions.store import connections

from .load import answer_of, find, load
from .near_cache import near_cache
from .outage import refuse_writes
from .replication import wanted
from .save import answer, commit, create, may_write
from .state import SessionState, because, new_token


def rotate(state: SessionState) -> Flow[None]:
    """Move the session to a new key; without a session, create one."""
    refuse_writes(state)
    if not may_write(state):
        return
    # A subclass may need the values to set the session's age.
    yield from answer_of(state, state.write_options)
    keys, data = state.keys, state.data
    if keys is None and state.ended is EndReason.ROTATED:
        # It has moved before this request came. A new session would take its cookie's place,
        # so there is none before a login.
        return
    needs_data = conf.max_sessions_per_user is not None or conf.encryption_keys
    if needs_data and keys is not None and data is None:
        # The user has to be known, or the names under which values are encrypted.
        data = state.data = yield from load(state)
        keys = state.keys
    found: Alive | Gone | Exists | None = None
    if keys is not None and data is not None and data.changes():
        # The move comes after it, and what has the one has the other.
        found = yield from commit(state, keys, data, waits=False)
        keys = state.keys
    while keys is not None and not isinstance(found, Alive | Gone):
        if state.has_moved_on and data is not None and data.user_id is not None:
            # Others have cycled the key meanwhile, and that is as good.
            answer(state)
            return
        new = state.new_key()
        new_keys = state.keys_of(new.value)
        seal = None
        if data is not None and data.seal is not None:
            seal = data.seal.moved(new_keys.id, data.stored)
        found = yield from _move(state, keys, new_keys, data, seal)
        if isinstance(found, Gone) and (yield from find(state, keys, found.reason)):
            keys = state.keys
            found = None
    # Two clicks on "log in": the second one's session has moved meanwhile. It had no user
    # logged in, so a session of its own takes nothing from anybody.
    if (
        isinstance(found, Gone)
        and data is not None
        and (found.reason is not EndReason.ROTATED or data.has_stored_user)
    ):
        raise UpdateError(f"the session is gone{because(found.reason)}")
    state.has_moved = True
    if keys is not None and isinstance(found, Alive):
        if data is not None:
            data.seal = seal
        yield from _moved(state, keys, new, found)
    else:
        state.lock.let_go()
        yield from create(state)


def _move(
    state: SessionState,
    old: SessionKeys,
    new: SessionKeys,
    data: SessionData | None,
    seal: Seal | None,
) -> Flow[Alive | Gone | Exists]:
    rotating = flows.rotate(
        old,
        new,
        state.write_options(),
        new_token,
        partial(state.lock.request, old, state.policy, capped=False),
        state.lock.fence(),
        apart=connections.is_cluster(),
        # What is at hand may not say from where the session was used, or be encrypted with a key
        # of which sessionrekey has left nothing in the store: that changes no version.
        found=None if conf.track_clients or conf.encryption_keys else state.as_loaded,
        past=seal.past if seal else b"",
    )
    near_cache.drop(old.record)
    if data is not None:
        yield from state.login_limit.moving(new, data.user)
    try:
        return (yield from state.replication.awaited(new, rotating, wanted(state.operation_budget)))
    except SessionLockTimeout as error:
        raise state.lock.not_locked(error, state.policy) from None
    except SessionLockLost as error:
        state.failure = state.lock.refused(error)
        raise


def _moved(state: SessionState, old: SessionKeys, new: HiddenKey, found: Alive) -> Flow[None]:
    """Take note that the session is under its new key."""
    counters.add(expired=found.swept)
    old_key = HiddenKey.of(state.session_key)
    state.session_key, state.found = new.value, None
    new_keys = state.keys_of(new.value)
    state.lock.move(new_keys)
    near_cache.end(old.record)
    state.lifetime.see(found.now_ms + state.replication.after_ms, found.deadline_ms)
    state.renewed = True
    state.is_marked_modified = True
    state.signals.moved(old, new_keys)
    if session_ended.has_listeners(state.sender):
        user = state.data.user_id if state.data is not None else None
        state.signals.ended(old, user, EndReason.ROTATED, new_keys)
    if old_key:
        yield from on_demand.leave(old_key)
    answer(state)
