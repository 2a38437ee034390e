"""Endpoints for pages that warn before the visitor's session ends: ``docs/timeouts.md``.

They are synchronous, because under WSGI an async view would connect to the store on each request.
"""

from __future__ import annotations

from typing import Any, cast

from django.contrib.auth import SESSION_KEY
from django.contrib.auth.decorators import login_not_required
from django.http import HttpRequest, JsonResponse
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import csrf_protect
from django.views.decorators.http import require_GET, require_POST

from .backend import SessionStore
from .decorators import session_no_touch, session_nonstop, session_read_only, session_unlocked
from .session import save
from .session.error_responses import RETRY_AFTER_S


@login_not_required
@never_cache
@require_GET
@session_no_touch
@session_read_only
@session_nonstop("noop")
def expiry(request: HttpRequest) -> JsonResponse:
    """Answer with ``expiry_status()`` as JSON; this does not count as a use and sets no cookie.

    Answers 503 with Retry-After while the store is away.
    """
    return _answer(_session_of(request))


@login_not_required
@never_cache
@require_POST
@csrf_protect
@session_unlocked
@session_nonstop("noop")
def stay(request: HttpRequest) -> JsonResponse:
    """Renew the session if there is one, never create one, and answer as ``expiry``."""
    session = _session_of(request)
    # The load renews on its own round trip; if a middleware has loaded the session before, renew()
    # makes one more.
    session.state.renew_on_load = True
    session.get(SESSION_KEY)
    session.run(save.renew(session.state), "asave()")
    return _answer(session)


def expiry_status(session: SessionStore) -> dict[str, Any]:
    """Return whether a user is logged in, and how long the session lasts by the store's clock.

    ``expires_in``: seconds until it ends if it is not used, None without a session;
    ``absolute_in``: seconds until it ends even if it is used, None without such a limit.
    """
    is_authenticated = SESSION_KEY in session
    left_s, most_left_s = session.left_s, session.most_left_s
    return {
        "authenticated": is_authenticated and left_s is not None,
        "expires_in": None if left_s is None else round(left_s, 3),
        "absolute_in": None if most_left_s is None else round(most_left_s, 3),
    }


def _session_of(request: HttpRequest) -> SessionStore:
    return cast(SessionStore, request.session)


def _answer(session: SessionStore) -> JsonResponse:
    answer = expiry_status(session)
    if session.outage is None:
        return JsonResponse(answer)
    away = JsonResponse({"error": "away"}, status=503, headers={"Retry-After": RETRY_AFTER_S})
    # The outage is logged already; Django is not to log each request as well.
    cast(Any, away)._has_been_logged = True
    return away
