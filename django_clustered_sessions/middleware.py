"""The session middleware: Django's, with a store that may be away and without a thread hop."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any, Final, cast

from asgiref.sync import sync_to_async
from django.apps import apps
from django.contrib.sessions.backends.base import UpdateError
from django.contrib.sessions.exceptions import SessionInterrupted
from django.contrib.sessions.middleware import SessionMiddleware
from django.http import HttpRequest, HttpResponse
from django.utils.cache import patch_vary_headers
from django.utils.http import http_date

from .backend import SessionStore
from .conf import conf, site
from .monitoring.counters import counters
from .protocol.effects import Flow
from .session import lock_scope
from .session.error_responses import answer_to, instead_of
from .session.finish import Cookie, Finish, finish
from .session.operation_lock import to_its_end
from .session.request_policy import RequestPolicy
from .store.budget import RequestBudget

logger = logging.getLogger("django_clustered_sessions")


class ClusteredSessionMiddleware(SessionMiddleware):
    """Django's session middleware for ``django_clustered_sessions.backend``.

    Sliding expiry rides on the load. A store that is away becomes a 503 with the cookie left
    alone, whatever an inner middleware or a template made of the exception. Where the request's
    session is locked, that ends here. With any other session engine this is Django's own.
    """

    def __init__(self, get_response: Any) -> None:
        """Warn where the app is not installed, for then no system check does."""
        super().__init__(get_response)
        app = __name__.partition(".")[0]
        if not apps.is_installed(app):
            logger.warning(
                "%s is not in INSTALLED_APPS, so manage.py check does not check the settings of "
                "sessions, and its commands and templates are missing: add it there",
                app,
            )

    def process_request(self, request: HttpRequest) -> None:
        """Put a session in the request; it does not load before it is used."""
        super().process_request(request)
        session = request.session
        if isinstance(session, SessionStore):
            state = session.state
            state.budget = RequestBudget(conf.store_timeout)
            state.policy = RequestPolicy(request)
            state.renew_on_load = site.SESSION_SAVE_EVERY_REQUEST
            cast(Any, request)._given_session = session
            counters.add(requests=1)

    def process_response(self, request: HttpRequest, response: HttpResponse) -> HttpResponse:
        """Save the session, and set or delete its cookie.

        Raises SessionInterrupted (400) where the session was ended during the request.
        """
        session, replaced = _sessions_of(request)
        if replaced is not None:
            replaced.run(_hand_over(replaced, session), "acommit()")
        if session is None:
            return super().process_response(request, response)
        try:
            flow = finish(session.state, request, response, accessed=session.accessed)
            found = session.run(flow, "asave()")
        except UpdateError as error:
            raise _interrupted() from error
        return _finished(response, session, found)

    async def aprocess_response(self, request: HttpRequest, response: HttpResponse) -> HttpResponse:
        """See process_response()."""
        session, replaced = _sessions_of(request)
        if replaced is not None:
            await replaced.arun(_hand_over(replaced, session))
        if session is None:
            return await sync_to_async(super().process_response)(request, response)
        try:
            flow = finish(session.state, request, response, accessed=session.accessed)
            found = await session.arun(flow)
        except UpdateError as error:
            raise _interrupted() from error
        return _finished(response, session, found)

    def __call__(self, request: HttpRequest) -> Any:
        """Answer a request; whatever becomes of it, its session's lock is given up."""
        if self.async_mode:
            return self.__acall__(request)
        try:
            return super().__call__(request)
        except BaseException:
            # There will be no answer: a worker that is told to stop, for one.
            for session in _sessions_of(request):
                if session is not None:
                    session.run(lock_scope.close(session.state), "acommit()")
            raise

    async def __acall__(self, request: HttpRequest) -> HttpResponse:
        own, ours = type(self), ClusteredSessionMiddleware
        get_response = cast(Callable[[HttpRequest], Awaitable[Any]], self.get_response)
        try:
            if own.aprocess_response is ours.aprocess_response and (
                own.process_request is not ours.process_request
                or own.process_response is not ours.process_response
            ):
                # A subclass with synchronous hooks of its own: in a thread, as by Django.
                return cast(HttpResponse, await super().__acall__(request))
            self.process_request(request)
            return await self.aprocess_response(request, await get_response(request))
        except BaseException:
            # There will be no answer: a client that has left, for one.
            for session in _sessions_of(request):
                if session is not None:
                    # A thread of the view may wait for the lock, which is given up all the same.
                    closing = session.arun(lock_scope.close(session.state), out_of_turn=True)
                    await to_its_end(closing)
            raise

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        """Answer what a view lets through, as ``error_responses.answer_to`` says.

        503: the store is away, the wait for the lock was in vain, or what was written is not
        replicated. 429: too many wait for the lock.
        409: a conflict, or a lock that was lost. 403: too many sessions of one user. Raises
        SessionInterrupted for an UpdateError, as for one that the save meets.
        """
        if isinstance(exception, UpdateError) and _sessions_of(request)[0] is not None:
            raise _interrupted() from exception
        return answer_to(exception)


#: Cookies of one second mostly end together.
_http_date: Final = lru_cache(maxsize=64)(http_date)


def _sessions_of(request: HttpRequest) -> tuple[SessionStore | None, SessionStore | None]:
    """Return the request's session, None if another engine made it, or there is none.

    Beside it the one that the request was given, None unless a view has put in another one.
    """
    session: Any = getattr(request, "session", None)
    given: SessionStore | None = getattr(request, "_given_session", None)
    ours = session if isinstance(session, SessionStore) else None
    return ours, None if given is session else given


def _hand_over(replaced: SessionStore, session: SessionStore | None) -> Flow[None]:
    """Give up the lock of a session that is replaced; the other one goes by the same request."""
    yield from lock_scope.close(replaced.state)
    if session is not None:
        state = session.state
        state.policy, state.budget = replaced.state.policy, replaced.state.budget
        state.renew_on_load = replaced.state.renew_on_load


def _finished(response: HttpResponse, session: SessionStore, found: Finish) -> HttpResponse:
    """Return the response with what became of its session.

    After its signals: a receiver may have given the session a new key, another life, or its end.
    """
    if found.error is not None:
        response = instead_of(response, answer_to(found.error) or response)
    if found.cookie is Cookie.SET and (session_key := session.session_key):
        _set_cookie(response, session, session_key)
    elif found.cookie is Cookie.DELETE:
        _delete_cookie(response)
    if found.varies:
        patch_vary_headers(response, ("Cookie",))
    return response


def _set_cookie(response: HttpResponse, session: SessionStore, session_key: str) -> None:
    if session.get_expire_at_browser_close():
        max_age = expires = None
    else:
        max_age = session.get_expiry_age()
        expires = _http_date(int(time.time()) + max_age)
    response.set_cookie(
        site.SESSION_COOKIE_NAME,
        session_key,
        max_age=max_age,
        expires=expires,
        domain=site.SESSION_COOKIE_DOMAIN,
        path=site.SESSION_COOKIE_PATH,
        secure=site.SESSION_COOKIE_SECURE,
        httponly=site.SESSION_COOKIE_HTTPONLY,
        samesite=site.SESSION_COOKIE_SAMESITE,
    )


def _delete_cookie(response: HttpResponse) -> None:
    response.delete_cookie(
        site.SESSION_COOKIE_NAME,
        path=site.SESSION_COOKIE_PATH,
        domain=site.SESSION_COOKIE_DOMAIN,
        samesite=site.SESSION_COOKIE_SAMESITE,
    )


def _interrupted() -> SessionInterrupted:
    return SessionInterrupted(
        "The request's session was deleted before the request completed. "
        "The user may have logged out in a concurrent request, for example."
    )
