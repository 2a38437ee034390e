"""What ``clustered_sessions/expiry.html`` shows: ``{% load clustered_sessions %}``."""

from __future__ import annotations

import json
from typing import Any, Final

from django import template
from django.conf import settings
from django.shortcuts import resolve_url
from django.template import Context

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.conf import conf
from django_clustered_sessions.views import told

register = template.Library()

#: How long before the end the warning comes, in seconds.
WARN_BEFORE_S: Final = 120


@register.simple_tag(takes_context=True)
def session_expiry(context: Context, warn_before: float | str | None = None) -> dict[str, Any]:
    """Return what the warning needs to know: for ``{% session_expiry as expiry %}``.

    ``known``: what the endpoint would answer, as JSON, empty where that is not known without
    asking the store; ``warn_before``: seconds, at most half of what the session lasts unused.
    """
    session = getattr(context.get("request"), "session", None)
    known = told(session) if isinstance(session, SessionStore) and session.is_at_hand else None
    lasts_s = float(conf.idle_timeout or settings.SESSION_COOKIE_AGE)
    return {
        "known": json.dumps(known) if known else "",
        "warn_before": min(float(warn_before or WARN_BEFORE_S), lasts_s / 2),
        "login_url": resolve_url(settings.LOGIN_URL),
        "csrf_cookie": settings.CSRF_COOKIE_NAME,
    }
