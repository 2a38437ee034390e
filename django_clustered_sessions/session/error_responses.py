"""Responses to requests whose session cannot be used."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any, Final, cast

from django.conf import settings
from django.http import HttpResponse
from django.template import TemplateDoesNotExist, loader
from django.utils.functional import Promise
from django.utils.translation import gettext_lazy

from django_clustered_sessions.exceptions import (
    ClusteredSessionError,
    SessionConflict,
    SessionLimitReached,
    SessionLockLost,
    SessionLockRefused,
    SessionLockTimeout,
    SessionNotReplicated,
    SessionStoreUnavailable,
)

logger = logging.getLogger("django_clustered_sessions")

#: Retry-After of a 503 or 429, in seconds.
RETRY_AFTER_S: Final = 5

_BUSY: Final = gettext_lazy("Another request of yours is still under way. Please try again.")
_CHANGED: Final = gettext_lazy("Another request changed the same session data. Please try again.")
_AWAY: Final = gettext_lazy("Sessions cannot be reached for a moment. Please try again.")
_TOO_MANY: Final = gettext_lazy("You are logged in too many times. Please log out elsewhere first.")
_UNSURE: Final = gettext_lazy(
    "This was done, but could not be secured. Please look before you repeat it."
)

#: Error -> status and, where the site has no template of that name, the text; the first match.
_ANSWERS: Final[tuple[tuple[type[ClusteredSessionError], int, Promise], ...]] = (
    (SessionLockRefused, 429, _BUSY),
    (SessionLockTimeout, 503, _BUSY),
    (SessionLockLost, 409, _CHANGED),
    (SessionConflict, 409, _CHANGED),
    (SessionStoreUnavailable, 503, _AWAY),
    (SessionNotReplicated, 503, _UNSURE),
    (SessionLimitReached, 403, _TOO_MANY),
)


def answer_to(error: Exception) -> HttpResponse | None:
    """Return the response to an error of the session, None where there is none of its own.

    The site's ``503.html``, ``429.html``, ``409.html`` or ``403.html``, or a line of text where
    it has none. With DEBUG, why the store is away in place of either.
    """
    found = next((answer for answer in _ANSWERS if isinstance(error, answer[0])), None)
    if found is None or not isinstance(error, ClusteredSessionError):
        return None
    _, status, text = found
    is_told = isinstance(error, SessionStoreUnavailable) and error.is_told
    level = logging.ERROR if status == 503 else logging.WARNING
    # Once told, the log has it that the store is away, and will have it that it is back. And the
    # answer to what a view lets through is made again at the request's end.
    is_news = not is_told and not error.is_answered
    logger.log(level if is_news else logging.DEBUG, "answered %d: %s", status, error)
    error.is_answered = True
    response = _page(status, text, error)
    if status in (429, 503):
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    if is_told:
        # Nor a line of Django's for each request, which goes to ADMINS by mail.
        cast(Any, response)._has_been_logged = True
    return response


def _page(status: int, words: Promise, error: ClusteredSessionError) -> HttpResponse:
    if settings.DEBUG and isinstance(error, SessionStoreUnavailable):
        # In place of the site's page, as Django does it with 404 and 500.
        text = _why(error)
    else:
        with suppress(TemplateDoesNotExist):
            return HttpResponse(loader.get_template(f"{status}.html").render(), status=status)
        text = str(words)
    return HttpResponse(f"{text}\n", status=status, content_type="text/plain; charset=utf-8")


def _why(error: SessionStoreUnavailable) -> str:
    """Return the cause in one line, and how a developer gets a store."""
    why = f"Sessions cannot be used: {str(error).rstrip('.')}."
    if not error.is_away and not error.is_told:
        return why
    return (
        f"{why} Start a store by manage.py sessionserver, or correct LOCATION in "
        f"CACHES[{settings.SESSION_CACHE_ALIAS!r}]."
    )


def instead_of(replaced: HttpResponse, response: HttpResponse) -> HttpResponse:
    """Return ``response``, which closes what the replaced one had open: a file, a generator."""
    cast(Any, response)._resource_closers.extend(cast(Any, replaced)._resource_closers)
    return response
