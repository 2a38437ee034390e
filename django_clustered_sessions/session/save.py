"""Save a session: create it, write what has changed, or renew its deadline."""

from __future__ import annotations

import logging
from functools import partial
from typing import cast

from django.conf import settings
from django.contrib.auth import SESSION_KEY as USER
from django.contrib.sessions.backends.base import CreateError, UpdateError
from django.contrib.sessions.middleware import SessionMiddleware
from django.utils.module_loading import import_string

from django_clustered_sessions.conf import conf, site
from django_clustered_sessions.decorators import Access
from django_clustered_sessions.encryption import seal_of
from django_clustered_sessions.exceptions import (
    SessionLockLost,
    SessionLockTimeout,
    SessionNotReplicated,
    SessionReadOnly,
    SessionStoreUnavailable,
)
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol import flows
from django_clustered_sessions.protocol.effects import Flow
from django_clustered_sessions.protocol.record import (
    NOBODY,
    USER_FIELD,
    EndReason,
    HiddenKey,
    SessionKeys,
    user_tag,
)
from django_clustered_sessions.protocol.results import Exists, Gone
from django_clustered_sessions.protocol.session_data import SessionData
from django_clustered_sessions.signals import session_created, session_login

from . import near_reads
from .load import answer_of, find
from .outage import go_on, may_drop, refuse_writes, require_store
from .replication import wanted
from .state import SessionState, because, is_elsewhere, new_token

logger = logging.getLogger("django_clustered_sessions")


def create(state: SessionState) -> Flow[None]:
    """Store the session under a new key."""
    data = state.unloaded_data()
    while not (yield from _insert(state, data, state.new_key())):
        pass
    state.ended = None
    state.is_marked_modified = True
    answer(state)


def save_as_asked(state: SessionState, must_create: bool) -> Flow[None]:
    """Save for the site's code, or for Django's middleware, which sets the cookie next.

    The two look alike. Django's would put the old key over the new one, which others have given
    the session.

    Raises UpdateError once the changes are saved, if Django's middleware would do that.
    """
    yield from save(state, must_create)
    if state.has_moved_on and state.budget is None and _sets_cookie_unasked():
        raise UpdateError(
            "the changes are saved, but the session has got a new key meanwhile, and Django's "
            "SessionMiddleware would set the cookie to the old one: use this package's"
        )


def _sets_cookie_unasked() -> bool:
    """Return whether the site's session middleware is Django's, or is derived from it alone."""
    own = f"{__name__.partition('.')[0]}.middleware"
    for path in site.MIDDLEWARE:
        found = import_string(path)
        if isinstance(found, type) and issubclass(found, SessionMiddleware):
            return all(cls.__module__ != own for cls in found.__mro__)
    return False


def save(state: SessionState, must_create: bool = False, release: bool = False) -> Flow[None]:
    """Write what has changed; with ``release``, give up the lock as well.

    While the store is away the changes are dropped, where that is wanted and does no harm.
    """
    try:
        refuse_writes(state)
        yield from _save(state, must_create, release)
    except SessionStoreUnavailable as error:
        if not may_drop(state, must_create=must_create):
            raise
        go_on(state, error)


def _save(state: SessionState, must_create: bool, release: bool) -> Flow[None]:
    if not may_write(state):
        return
    keys = state.keys
    if keys is None:
        if state.ended is EndReason.ROTATED and state.unloaded_data().user == NOBODY:
            # Not for a login, which has a session of its own.
            raise UpdateError("the session has moved to another key, as at a login")
        yield from create(state)
    elif must_create:
        data = state.unloaded_data()
        if not (yield from _insert(state, data, HiddenKey(state.session_key or ""))):
            raise CreateError
        answer(state)
    elif state.data is None:
        # Also what was renewed a moment ago may be gone by now.
        state.renewed = False
        yield from renew(state)
        if state.ended is not None:
            raise UpdateError
    elif gone := (yield from commit(state, keys, state.data, release)):
        raise UpdateError(f"the session is gone{because(gone.reason)}")
    else:
        answer(state)


def renew(state: SessionState) -> Flow[None]:
    """Renew the session's deadline, unless its load has."""
    keys = state.keys
    if keys is None or state.renewed or state.goes_on:
        return
    try:
        options = yield from answer_of(state, state.write_options)
        if state.ended is not None or state.goes_on:
            # Found so by a load for the options.
            return
        keys = cast(SessionKeys, state.keys)
        found = yield from flows.touch(keys, options)
        while isinstance(found, Gone) and (yield from find(state, keys, found.reason)):
            keys = cast(SessionKeys, state.keys)
            found = yield from flows.touch(keys, options)
    except SessionStoreUnavailable as error:
        if state.nonstop == "exception":
            raise
        go_on(state, error)
        return
    if isinstance(found, Gone):
        state.vanish(found.reason)
    else:
        state.see(keys, found.now_ms, found.deadline_ms, found.mode)
        state.renewed = True


def commit(
    state: SessionState,
    keys: SessionKeys,
    data: SessionData,
    release: bool = False,
    *,
    waits: bool = True,
    again: bool = False,
) -> Flow[Gone | None]:
    """Write the changes; return why not, if the session is gone.

    With ``release``, give up the lock as well. Without ``waits``, do not wait for replicas, as a
    move follows. With ``again``, write also where nothing has changed, so that they can be waited
    for.
    """
    options = state.write_options()
    sending = near_reads.sending(keys) if conf.near_reads == "tracked" else None
    if conf.max_sessions_per_user is not None and data.changes().changes_user:
        if data.user != NOBODY:
            user = str(data[USER])
            sync = wanted(state.operation_budget)
            yield from state.login_limit.claiming(keys, user, sync, state.signals)
        state.login_limit.writing()
    try:
        committing = flows.commit(
            keys,
            data,
            state.expiry,
            options,
            state.token_of,
            partial(state.lock.request, keys, state.policy, capped=False),
            state.lock.fence(release=release),
            whose=state.whose,
            again=again or state.replication.shortfall is not None,
        )
        # Others have moved it on, so that no move of this request's comes after.
        sync = wanted(state.operation_budget) if waits or state.has_moved_on else None
        outcome = yield from state.replication.awaited(keys, committing, sync)
    except SessionLockTimeout as error:
        raise state.lock.not_locked(error, state.policy) from None
    except SessionLockLost as error:
        state.failure = state.lock.refused(error)
        raise
    state.unanswered = None
    if isinstance(outcome, Gone):
        if (yield from find(state, keys, outcome.reason)):
            here = cast(SessionKeys, state.keys)
            again = outcome.counters is not None
            return (yield from commit(state, here, data, release, waits=waits, again=again))
        state.lock.let_go()
        return outcome
    state.write_count += 1
    if outcome.user:
        is_login = outcome.user not in (NOBODY, state.owner)
        if is_login and outcome.alive.deadline_ms > outcome.alive.now_ms:
            _note_login(state, keys, data)
        state.owner = outcome.user
    if outcome.turn:
        # The commit had to take a lock of its own, which ended with it.
        state.lock.count(outcome.turn)
    if release:
        state.lock.let_go()
    alive = outcome.alive
    now_ms = alive.now_ms + state.replication.after_ms
    state.lifetime.see(now_ms, alive.deadline_ms, alive.mode)
    if state.found is not None:
        state.lifetime.renewed(state.found.meta, options.ages)
    state.renewed = True
    if outcome.version:
        is_all = alive.before != b"" and alive.before == state.version
        copy = None
        if sending and is_all:
            copy = near_reads.written(state, keys, data, outcome, sending)
        state.wrote(keys, data, outcome.version, is_all=is_all, copy=copy)
    else:
        state.keep_life(keys)
    counters.add(
        commits=1,
        fields_written=len(outcome.changes.fields),
        fields_held=len(data.stored),
        conflicts_merged=outcome.merged,
        conflicts_overwritten=alive.overwritten,
        expired=int(alive.deadline_ms <= alive.now_ms),
        node_hops=int(is_elsewhere(alive.before)),
    )
    return None


def admit(state: SessionState, data: SessionData, user: object) -> Flow[None]:
    """Claim a place among a user's sessions, before the user is set."""
    require_store(state)
    if data.user == user_tag(user) and data.as_stored(USER):
        return
    if state.session_key is None:
        if not may_write(state):
            return
        # There has to be a session that can be ended while the login is on its way.
        yield from create(state)
    keys = cast(SessionKeys, state.keys)
    sync = wanted(state.operation_budget)
    yield from state.login_limit.claiming(keys, str(user), sync, state.signals)


def may_write(state: SessionState) -> bool:
    """Return whether the view may change its session.

    Raises SessionReadOnly where it may not and DEBUG is on.
    """
    if state.policy.access is not Access.READ_ONLY or state.lock.grant is not None:
        return True
    if state.session_key and not (state.data and state.data.changes()):
        return True
    error = SessionReadOnly(state.policy.route)
    if settings.DEBUG:
        raise error
    logger.warning("%s", error)
    return False


def answer(state: SessionState) -> None:
    """Say so if too few replicas have acknowledged what was just written.

    Raises SessionNotReplicated.
    """
    try:
        state.replication.answer()
    except SessionNotReplicated:
        # Written all the same: nothing is left to be saved, and the cookie is due.
        state.committed, state.is_marked_modified = True, False
        raise


def _insert(state: SessionState, data: SessionData, key: HiddenKey) -> Flow[bool]:
    keys, user = state.keys_of(key.value), data.user
    seal = seal_of(keys.id) if conf.encryption_keys else None
    values, token, expiry = data.everything(seal), new_token(), state.expiry(data)
    is_limited = data.user_id is not None and conf.max_sessions_per_user is not None
    if is_limited:
        # A login is a commit, to a session that is there.
        values, user = [pair for pair in values if pair[0] != USER_FIELD], NOBODY
    creating = flows.create(keys, values, expiry, state.write_options(seal), token, user)
    found = yield from state.replication.awaited(keys, creating, wanted(state.operation_budget))
    if isinstance(found, Exists):
        return False
    data.created(values, token, seal)
    state.session_key, state.owner = key.value, user
    state.write_count += 1
    state.lifetime.see(found.now_ms + state.replication.after_ms, found.deadline_ms)
    state.wrote(keys, data, token, is_all=True)
    state.renewed = True
    counters.add(
        created=1,
        commits=1,
        fields_written=len(values),
        fields_held=len(values),
        expired=found.swept + int(found.deadline_ms <= found.now_ms),
    )
    if found.deadline_ms > found.now_ms:
        if session_created.has_listeners(state.sender):
            state.signals.created(keys, data.user_id, state.client)
        if user != NOBODY:
            _note_login(state, keys, data)
    if is_limited and (gone := (yield from commit(state, keys, data))):
        raise UpdateError(f"the session is gone{because(gone.reason)}")
    return True


def _note_login(state: SessionState, keys: SessionKeys, data: SessionData) -> None:
    """Have it told that the user of what was written has logged in."""
    if session_login.has_listeners(state.sender):
        state.signals.logged_in(keys, data.user_id, state.client, state.policy.request)
