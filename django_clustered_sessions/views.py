"""How long the visitor's session lasts, for pages that warn before it ends: ``docs/timeouts.md``.

Synchronous, under ASGI too: under WSGI an async view would connect to the store anew each time.
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
    """Answer what ``told()`` returns; to ask is no use of the session and changes no cookie.

    503 with Retry-After while the store is away.
    """
    return _answer(_session_of(request))


@login_not_required
@never_cache
@require_POST
@csrf_protect
@session_unlocked
@session_nonstop("noop")
def stay(request: HttpRequest) -> JsonResponse:
    """Renew the session, which creates none, and answer as ``expiry`` does."""
    session = _session_of(request)
    # With the load, on its trip; and by one of its own where a middleware has loaded it before.
    session.state.renew_on_load = True
    session.get(SESSION_KEY)
    session.run(save.renew(session.state), "asave()")
    return _answer(session)


def told(session: SessionStore) -> dict[str, Any]:
    """Return whether somebody is logged in, and how long the session lasts, by the store's clock.

    ``expires_in``: seconds until it ends if nobody uses it, None where there is none;
    ``absolute_in``: seconds until it ends even if it is used, None where nothing ends it so.
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
    answer = told(session)
    if session.outage is None:
        return JsonResponse(answer)
    away = JsonResponse({"error": "away"}, status=503, headers={"Retry-After": RETRY_AFTER_S})
    # The log has it that the store is away; not a line of Django's for each request as well.
    cast(Any, away)._has_been_logged = True
    return away
