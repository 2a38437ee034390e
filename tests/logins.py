"""Logins: log a user in as a view does, and save as the middleware does."""

from __future__ import annotations

from django.contrib.auth import alogin, login
from django.contrib.auth.models import User
from django.http import HttpRequest

from django_clustered_sessions.backend import SessionStore

BACKEND = "django.contrib.auth.backends.ModelBackend"


def log_in(user: User, session: SessionStore | None = None) -> SessionStore:
    """Log a user in, in a new session if none is given; return the saved session."""
    request = HttpRequest()
    request.session = session or SessionStore()
    login(request, user, backend=BACKEND)
    request.session.save()
    return request.session


async def alog_in(user: User, session: SessionStore | None = None) -> SessionStore:
    """See log_in()."""
    request = HttpRequest()
    request.session = session or SessionStore()
    await alogin(request, user, backend=BACKEND)
    await request.session.asave()
    return request.session
