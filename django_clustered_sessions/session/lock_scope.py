"""Use a session under its lock: blocks of ``lock()``, ``commit()``, and the end of a request."""

from __future__ import annotations

from typing import cast

from django.contrib.sessions.backends.base import UpdateError

from django_clustered_sessions.decorators import Access, Marks
from django_clustered_sessions.exceptions import SessionLockTimeout
from django_clustered_sessions.protocol.effects import Flow
from django_clustered_sessions.protocol.record import Damaged, SessionKeys

from . import load
from .lock import shown
from .outage import require_store
from .save import create, save
from .state import LockScope, SessionState, because


def enter(state: SessionState, scope: LockScope, name: str = "") -> Flow[None]:
    """Begin a block of ``lock(name)``: take the lock, unless this object has it."""
    is_first = not state.lock_scopes
    state.lock_scopes.add(scope)
    if state.lock.grant is None:
        # Where the request locks its session anyway, its own lock is the outermost.
        if is_first or not state.lock_ends_with_scopes:
            locks_anyway = state.data is None and state.policy.access is Access.LOCKED
            state.lock_ends_with_scopes = state.is_over or not locks_anyway
        state.lock.name = shown(name)
        try:
            yield from lock(state)
        finally:
            state.lock.name = ""
    elif is_first:
        state.lock_ends_with_scopes = False
    scope.data, scope.write_count, scope.end_count = state.data, state.write_count, state.end_count
    scope.modified = state.is_marked_modified
    scope.snapshot = None if state.data is None else state.data.snapshot()
    scope.may_forget = True


def leave(state: SessionState, scope: LockScope) -> Flow[None]:
    """End a block of ``lock()`` cleanly; with the last one, write and give up the lock."""
    scope.may_forget = False
    state.lock_scopes.discard(scope)
    for other in state.lock_scopes:
        # What this block has changed stands, though another task's goes on and may fail.
        other.may_forget = other.may_forget and other.by == scope.by
    if state.lock_scopes or not state.lock_ends_with_scopes:
        return
    yield from commit(state)
    # Dropped, where a caller that locks wants to know that it has landed.
    require_store(state)


def break_off(state: SessionState, scope: LockScope) -> Flow[None]:
    """End a block of ``lock()`` that failed, wherever; with the last one, give up the lock.

    What was changed inside is forgotten, except while another task is inside as well. May be
    done twice.
    """
    if scope.may_forget and {other.by for other in state.lock_scopes} == {scope.by}:
        has_ended = scope.end_count != state.end_count
        if (
            scope.data is not None
            and scope.snapshot is not None
            and not has_ended
            and scope.write_count == state.write_count
        ):
            scope.data.restore(scope.snapshot)
            state.data = scope.data
        else:
            state.data = None
        # A session that was ended inside stays ended, and nothing of it is left to be saved.
        state.is_marked_modified = scope.modified and not has_ended
    scope.may_forget = False
    state.lock_scopes.discard(scope)
    if not has_left(state, scope):
        yield from state.lock.releasing()


def has_left(state: SessionState, scope: LockScope) -> bool:
    """Return whether nothing is left to do for a block of ``lock()`` that has ended."""
    if scope in state.lock_scopes:
        return False
    if state.lock_scopes or not state.lock_ends_with_scopes:
        return True
    return not (state.lock.grant or state.lock.asked)


def lock(state: SessionState) -> Flow[None]:
    """Take the lock and load afresh; what was not saved yet goes on top."""
    require_store(state)
    if state.session_key is None:
        yield from create(state)
    keys = cast(SessionKeys, state.keys)
    try:
        keys, loaded = yield from load.read(state, keys, locks=True)
    except SessionLockTimeout as error:
        raise state.lock.not_locked(error, state.policy) from None
    except Damaged as damage:
        yield from state.lock.releasing()
        raise UpdateError(f"the session is damaged: {damage}") from damage
    if loaded is None:
        raise UpdateError(f"the session is gone{because(state.ended)}")
    if state.data is None:
        state.data = state.new_data(loaded)
    else:
        state.data.refresh(loaded.values, loaded.meta.user, state.seal(loaded.past))


def commit(state: SessionState) -> Flow[None]:
    """Write what has changed and give up the lock."""
    try:
        if state.is_modified and not (yield from load.answer_of(state, state.is_empty)):
            yield from save(state, release=True)
            state.committed = True
            # Not ``modified = False``: what another task has changed since is still to be written.
            state.is_marked_modified = False
    except Exception:
        yield from state.lock.releasing()
        raise
    yield from state.lock.releasing()


def close(state: SessionState) -> Flow[None]:
    """Give up the lock, or the place in its queue: the request is over."""
    state.is_over = True
    if state.lock.grant or state.lock.asked:
        yield from state.lock.releasing()
    if state.login_limit.claim is not None:
        yield from state.login_limit.giving_back()


def apply_marks(state: SessionState, marks: Marks) -> Flow[None] | None:
    """Take what the decorators of the view that begins say.

    Return what is left to do where the session was loaded before they were known.
    """
    is_news = state.policy.apply(marks)
    if marks.nonstop == "exception" and state.outage is not None:
        # A middleware was content with less before the mark was known.
        raise state.outage
    if state.data is None or state.session_key is None:
        return None
    grant = state.lock.grant
    if marks.access is Access.LOCKED:
        return None if grant else _lock_late(state)
    if marks.is_fresh and state.is_copy:
        return _load_afresh(state)
    if marks.access is None:
        return None
    if grant and is_news and not grant.is_inside and not state.lock_scopes:
        return state.lock.releasing()
    return None


def _lock_late(state: SessionState) -> Flow[None]:
    yield from lock(state)
    if state.is_over:
        yield from state.lock.releasing()


def _load_afresh(state: SessionState) -> Flow[None]:
    """Read what came without a trip from the store; what was not saved yet goes on top."""
    keys = cast(SessionKeys, state.keys)
    _, loaded = yield from load.read(state, keys, locks=False)
    if loaded is not None and state.data is not None:
        state.data.refresh(loaded.values, loaded.meta.user, state.seal(loaded.past))
