"""Answers of ``decorators.recent_login`` to requests whose login is not recent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from django.conf import settings
from django.contrib.auth import REDIRECT_FIELD_NAME, SESSION_KEY, get_user_model
from django.contrib.auth.signals import user_logged_in
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, JsonResponse
from django.shortcuts import resolve_url
from django.urls import NoReverseMatch
from django.utils.cache import add_never_cache_headers
from django.utils.http import url_has_allowed_host_and_scheme


@dataclass(frozen=True, slots=True)
class RecentLogin:
    """A login, or its confirmation on the page ``confirm_url``, of the last ``most_s`` seconds."""

    most_s: float
    confirm_url: str

    def answer(self, request: HttpRequest, session: Any) -> HttpResponse | None:
        """Return the answer to a request without such a login, None if it has one.

        Raises ImproperlyConfigured for another session engine, and for a name that is no page's.
        """
        _require_engine(session)
        is_login = is_login_of(getattr(request, "user", None), session.get(SESSION_KEY))
        return self._unless_recent(request, session.login_age() if is_login else None)

    async def aanswer(self, request: HttpRequest, session: Any) -> HttpResponse | None:
        """See answer()."""
        _require_engine(session)
        user = await request.auser() if hasattr(request, "auser") else None
        is_login = is_login_of(user, await session.aget(SESSION_KEY))
        return self._unless_recent(request, await session.alogin_age() if is_login else None)

    def _unless_recent(self, request: HttpRequest, age_s: float | None) -> HttpResponse | None:
        if age_s is not None and age_s < self.most_s:
            return None
        try:
            page = resolve_url(settings.LOGIN_URL if age_s is None else self.confirm_url)
        except NoReverseMatch as error:
            raise ImproperlyConfigured(
                f"recent_login does not know its page: {error}. Include "
                "django_clustered_sessions.urls in the site's URLs, or name a page of your own "
                "with recent_login(confirm_url=...)."
            ) from error
        page += ("&" if "?" in page else "?") + urlencode({REDIRECT_FIELD_NAME: _way_back(request)})
        reason = "not_logged_in" if age_s is None else "login_not_recent"
        response: HttpResponse
        if request.headers.get("HX-Request") == "true":
            response = HttpResponse(reason, status=401, content_type="text/plain")
            response["HX-Redirect"] = page
        elif request.get_preferred_type(["text/html", "application/json"]) == "application/json":
            response = JsonResponse({"error": reason, "url": page}, status=401)
        else:
            response = HttpResponseRedirect(page)
        if response.status_code == 401:
            # As RFC 9470 has it for tokens.
            response["WWW-Authenticate"] = (
                f'Session error="insufficient_user_authentication", max_age={round(self.most_s)}'
            )
        add_never_cache_headers(response)
        return response


def is_login_of(user: Any, key: Any) -> bool:
    """Return whether a session that has the user with this key is a login of the request's user.

    It is not if Django refuses it, for a user who is inactive or has another password now, nor if
    the request has its user by something else, such as a token. ``user`` is None on a site whose
    requests have none.
    """
    return user is None or bool(get_user_model()._meta.pk.to_python(key) == user.pk)


def count_logins() -> None:
    """Have a login by the user who is logged in already count, of which nothing else would tell."""
    user_logged_in.connect(_confirm, dispatch_uid=__name__)


def _confirm(request: HttpRequest, user: Any, **kwargs: Any) -> None:
    session: Any = getattr(request, "session", None)
    # A login for a token is told as well, perhaps beside the session of somebody else.
    if hasattr(session, "confirm_login") and is_login_of(user, session.get(SESSION_KEY)):
        session.confirm_login()


def _require_engine(session: Any) -> None:
    if not hasattr(session, "login_age"):
        raise ImproperlyConfigured(
            "recent_login needs SESSION_ENGINE = 'django_clustered_sessions.backend', which knows "
            "when the user logged in."
        )


def _way_back(request: HttpRequest) -> str:
    """Return the page to come back to: the one that sent the request if that cannot be repeated."""
    if request.headers.get("HX-Request") == "true":
        before = request.headers.get("HX-Current-URL", "")
    elif request.method in {"GET", "HEAD"}:
        return request.get_full_path()
    else:
        before = request.headers.get("Referer", "")
    is_ours = url_has_allowed_host_and_scheme(before, {request.get_host()}, request.is_secure())
    return before if before and is_ours else request.get_full_path()
