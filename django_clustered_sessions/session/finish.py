"""The end of a request: save the session, release its lock, decide on cookie and response."""

from __future__ import annotations

from enum import Enum, auto
from typing import Final, NamedTuple

from django.http import HttpRequest, HttpResponse

from django_clustered_sessions.conf import site
from django_clustered_sessions.exceptions import (
    ClusteredSessionError,
    SessionConflict,
    SessionLimitReached,
    SessionLockLost,
    SessionLockTimeout,
    SessionNotReplicated,
    SessionStoreUnavailable,
)
from django_clustered_sessions.protocol.effects import Flow
from django_clustered_sessions.protocol.record import EndReason

from . import lock_scope, save
from .load import answer_of
from .state import SessionState

#: An answer this long after its session's load is late, in seconds: its key may have been cycled
#: meanwhile, so the store is asked before the cookie is set. A faster answer is sent without that.
LATE_S: Final = 0.1

#: A write was refused for what others have done meanwhile, and all before it stands.
_REFUSALS: Final = (SessionConflict, SessionLockLost, SessionLockTimeout)

_FAILURES: Final = (*_REFUSALS, SessionLimitReached, SessionStoreUnavailable)


class Cookie(Enum):
    """The session's cookie in the response."""

    KEEP = auto()
    SET = auto()
    DELETE = auto()


class Finish(NamedTuple):
    """The decision on a response.

    ``error`` is answered instead, if there is one; ``varies``: the response depends on the cookie.
    """

    cookie: Cookie
    varies: bool
    error: ClusteredSessionError | None = None


def finish(
    state: SessionState, request: HttpRequest, response: HttpResponse, *, accessed: bool
) -> Flow[Finish]:
    """Save the session and give up its lock; return what becomes of the response.

    ``accessed``: the view has used the session. Nothing is saved after a server error.

    Raises UpdateError where the session was ended during the request.
    """
    is_saved, is_empty, error = False, False, None
    if state.failure is None or state.goes_on:
        try:
            is_empty = state.is_empty()
            if state.needs_values:
                is_empty = yield from answer_of(state, state.is_empty)
            if response.status_code < 500 and not is_empty:
                is_saved = yield from _keep(state)
        except SessionNotReplicated as shortfall:
            error = shortfall
        except _FAILURES as problem:
            state.fail(problem)
    yield from lock_scope.close(state)
    if state.failure is not None:
        # Nothing is known of the session, so its cookie stays as it is. But where a write was
        # refused after this request had moved the session, only this one knows the new key.
        is_news = state.has_moved and state.session_key and isinstance(state.failure, _REFUSALS)
        failure = error if state.goes_on else state.failure
        return Finish(Cookie.SET if is_news else Cookie.KEEP, accessed, failure)
    if is_saved or (state.replication.shortfall and state.session_key):
        # A write that landed, even if it is not replicated: its key may be a new one.
        return Finish(Cookie.KEEP if state.has_moved_on else Cookie.SET, True, error)
    # It may have been found to have ended meanwhile.
    is_empty = is_empty or not (state.session_key or state.data)
    if is_empty and site.SESSION_COOKIE_NAME in request.COOKIES:
        # A request that was under way while its session moved to another key must not take
        # the new key's cookie away. Nor one that a page sends by itself, and that is no use:
        # a login may be under way meanwhile.
        is_asked = state.policy.touches or state.ended is None
        is_told = is_asked and state.ended is not EndReason.ROTATED
        return Finish(Cookie.DELETE if is_told else Cookie.KEEP, True, error)
    return Finish(Cookie.KEEP, accessed, error)


def _keep(state: SessionState) -> Flow[bool]:
    """Save or renew the session as the settings want it; return whether it is to have a cookie."""
    if state.is_modified:
        yield from save.save(state, release=True)
    elif (state.renew_on_load or state.renewed) and state.policy.touches:
        # Renewed: an idle timeout did, and the cookie has to last as long.
        if state.renewed and state.lifetime.seen_s_ago > LATE_S:
            # The old key in a cookie would take the place of a new one, which others have got
            # meanwhile, so it is worth a trip to ask.
            state.renewed = False
        yield from save.renew(state)
    elif not state.committed and not state.has_moved:
        return False
    return state.session_key is not None
