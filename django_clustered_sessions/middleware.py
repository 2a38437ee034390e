"""The session middleware: Django's, with a store that may be away and without a thread hop."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

from asgiref.sync import sync_to_async
from django.conf import settings
from django.contrib.auth import SESSION_KEY
from django.contrib.sessions.backends.base import UpdateError
from django.contrib.sessions.exceptions import SessionInterrupted
from django.contrib.sessions.middleware import SessionMiddleware
from django.http import HttpRequest, HttpResponse
from django.template import TemplateDoesNotExist, loader
from django.utils.cache import patch_vary_headers
from django.utils.http import http_date

from .backend import SessionStore
from .conf import conf
from .counters import counters
from .drivers import Budget
from .exceptions import SessionConflict, SessionStoreUnavailable
from .flows import Flow
from .record import EndReason

logger = logging.getLogger("django_clustered_sessions")

#: What a 503 tells the client to wait before it asks again, in seconds.
RETRY_AFTER_S: Final = 5

#: An answer this long after its session's load is late, in seconds: somebody may have logged in
#: meanwhile. What is faster is within the time that any answer takes on its way to the browser.
LATE_S: Final = 0.1


class ClusteredSessionMiddleware(SessionMiddleware):
    """Django's session middleware for ``django_clustered_sessions.backend``.

    Sliding expiry rides on the load. A store that is away becomes a 503 with the cookie left
    alone, whatever an inner middleware or a template made of the exception. With any other
    session engine this is Django's own.
    """

    def process_request(self, request: HttpRequest) -> None:
        """Put a session in the request; it does not load before it is used."""
        super().process_request(request)
        session = request.session
        if isinstance(session, SessionStore):
            session.budget = Budget(conf.store_timeout)
            session.renew_on_load = settings.SESSION_SAVE_EVERY_REQUEST
            counters.add(requests=1)

    def process_response(self, request: HttpRequest, response: HttpResponse) -> HttpResponse:
        """Save the session, and set or delete its cookie.

        Raises SessionInterrupted (400) where the session was ended during the request.
        """
        session = getattr(request, "session", None)
        if not isinstance(session, SessionStore):
            return super().process_response(request, response)
        return session.run(self._finishing(request, response, session), "asave()")

    async def aprocess_response(self, request: HttpRequest, response: HttpResponse) -> HttpResponse:
        """See process_response()."""
        session = getattr(request, "session", None)
        if not isinstance(session, SessionStore):
            return await sync_to_async(super().process_response)(request, response)
        return await session.arun(self._finishing(request, response, session))

    async def __acall__(self, request: HttpRequest) -> HttpResponse:
        own, ours = type(self), ClusteredSessionMiddleware
        if own.aprocess_response is ours.aprocess_response and (
            own.process_request is not ours.process_request
            or own.process_response is not ours.process_response
        ):
            # A subclass with synchronous hooks of its own: in a thread, as by Django.
            return cast(HttpResponse, await super().__acall__(request))
        self.process_request(request)
        get_response = cast(Callable[[HttpRequest], Awaitable[Any]], self.get_response)
        return await self.aprocess_response(request, await get_response(request))

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        """Answer what a view lets through: 503 for a store that is away, 409 for a conflict.

        Raises SessionInterrupted for an UpdateError, as for one that the save meets.
        """
        session = getattr(request, "session", None)
        if isinstance(exception, UpdateError) and isinstance(session, SessionStore):
            raise _interrupted() from exception
        if isinstance(exception, SessionConflict):
            return _conflict()
        if isinstance(exception, SessionStoreUnavailable):
            return _unavailable(exception)
        return None

    def _finishing(
        self, request: HttpRequest, response: HttpResponse, session: SessionStore
    ) -> Flow[HttpResponse]:
        accessed = session.accessed
        saved = False
        if session.outage is None and response.status_code < 500 and not session.is_empty():
            try:
                saved = yield from _keeping(session)
            except SessionStoreUnavailable as error:
                session.outage = error
            except SessionConflict as error:
                logger.warning("answered 409: %s", error)
                response = _instead_of(response, _conflict())
            except UpdateError as error:
                raise _interrupted() from error
        if session.outage is not None:
            if not session.tolerates_outage:
                response = _instead_of(response, _unavailable(session.outage))
            # Nothing is known of the session, so its cookie stays as it is.
            vary = accessed
        elif saved:
            _set_cookie(response, session)
            vary = True
        elif settings.SESSION_COOKIE_NAME in request.COOKIES and session.is_empty():
            # A request that was under way while its session moved to another key must not take
            # the new key's cookie away.
            if session.ended is not EndReason.ROTATED:
                _delete_cookie(response)
            vary = True
        else:
            vary = accessed
        if vary:
            patch_vary_headers(response, ("Cookie",))
        return response


def _keeping(session: SessionStore) -> Flow[bool]:
    """Save or renew the session as the settings want it; return whether it is to have a cookie."""
    if session.modified:
        yield from session.saving()
    elif settings.SESSION_SAVE_EVERY_REQUEST or session.renewed:
        # Renewed: an idle timeout did, and the cookie has to last as long.
        if session.renewed and session.store_seen_s_ago > LATE_S and SESSION_KEY not in session:
            # After a login the old key in a cookie would take the new one's place, so it is worth
            # a trip to ask.
            session.renewed = False
        yield from session.renewing()
    else:
        return False
    return session.session_key is not None


def _instead_of(replaced: HttpResponse, response: HttpResponse) -> HttpResponse:
    """Return ``response``, which closes what the replaced one had open: a file, a generator."""
    cast(Any, response)._resource_closers.extend(cast(Any, replaced)._resource_closers)
    return response


def _set_cookie(response: HttpResponse, session: SessionStore) -> None:
    if session.get_expire_at_browser_close():
        max_age = expires = None
    else:
        max_age = session.get_expiry_age()
        expires = http_date(time.time() + max_age)
    response.set_cookie(
        settings.SESSION_COOKIE_NAME,
        session.session_key or "",
        max_age=max_age,
        expires=expires,
        domain=settings.SESSION_COOKIE_DOMAIN,
        path=settings.SESSION_COOKIE_PATH,
        secure=settings.SESSION_COOKIE_SECURE,
        httponly=settings.SESSION_COOKIE_HTTPONLY,
        samesite=settings.SESSION_COOKIE_SAMESITE,
    )


def _delete_cookie(response: HttpResponse) -> None:
    response.delete_cookie(
        settings.SESSION_COOKIE_NAME,
        path=settings.SESSION_COOKIE_PATH,
        domain=settings.SESSION_COOKIE_DOMAIN,
        samesite=settings.SESSION_COOKIE_SAMESITE,
    )


def _interrupted() -> SessionInterrupted:
    return SessionInterrupted(
        "The request's session was deleted before the request completed. "
        "The user may have logged out in a concurrent request, for example."
    )


def _conflict() -> HttpResponse:
    return HttpResponse(
        "Another request changed the same session data. Please try again.\n",
        status=409,
        content_type="text/plain; charset=utf-8",
    )


def _unavailable(error: SessionStoreUnavailable) -> HttpResponse:
    """Return the site's ``503.html``, or a line of text where it has none."""
    logger.error("answered 503: %s", error)
    try:
        body, content_type = loader.get_template("503.html").render(), "text/html; charset=utf-8"
    except TemplateDoesNotExist:
        body = "Sessions cannot be reached for a moment. Please try again.\n"
        content_type = "text/plain; charset=utf-8"
    response = HttpResponse(body, status=503, content_type=content_type)
    response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response
