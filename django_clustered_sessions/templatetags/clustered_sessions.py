"""Template tags for ``clustered_sessions/expiry.html``: ``{% load clustered_sessions %}``."""

from __future__ import annotations

import json
from typing import Any, Final

from django import template
from django.conf import settings
from django.shortcuts import resolve_url
from django.template import Context

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.conf import conf
from django_clustered_sessions.views import expiry_status

register = template.Library()

#: Seconds from the warning to the end of the session.
WARN_BEFORE_S: Final = 120


@register.simple_tag(takes_context=True)
def session_expiry(context: Context, warn_before: float | str | None = None) -> dict[str, Any]:
    """Return the data of the warning, for ``{% session_expiry as expiry %}``.

    ``known``: the endpoint's answer as JSON, empty if only the store has it; ``warn_before``:
    seconds, at most half of the session's lifetime without use.
    """
    session = getattr(context.get("request"), "session", None)
    known = (
        expiry_status(session) if isinstance(session, SessionStore) and session.is_at_hand else None
    )
    lasts_s = float(conf.idle_timeout or settings.SESSION_COOKIE_AGE)
    return {
        "known": json.dumps(known) if known else "",
        "warn_before": min(float(warn_before or WARN_BEFORE_S), lasts_s / 2),
        "login_url": resolve_url(settings.LOGIN_URL),
        "csrf_cookie": settings.CSRF_COOKIE_NAME,
    }
