"""The page behind the link of the mail, which ends the session of a sign-in."""

from __future__ import annotations

from typing import Any

from django.contrib.auth import logout
from django.contrib.auth.decorators import login_not_required
from django.core.signing import BadSignature, SignatureExpired
from django.http import HttpRequest, HttpResponse
from django.urls import NoReverseMatch, reverse
from django.utils.decorators import method_decorator
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import csrf_protect
from django.views.generic import TemplateView

from django_clustered_sessions.devices import agents
from django_clustered_sessions.registry import SessionInfo

from .links import LIFE, Login

#: Pages on which a password is changed, of Django and of allauth: the first that the site has.
#: Those that need no login come first.
_PASSWORD_PAGES = (
    "password_reset",
    "account_reset_password",
    "password_change",
    "account_change_password",
)


@method_decorator([login_not_required, csrf_protect, never_cache], name="dispatch")
class EndSignIn(TemplateView):
    """Show a sign-in, and end its session on a POST, which programs that look at mails do not send.

    Whoever has the link may do so, also without a login. Answers 404 for a link that is none, and
    410 for one that has expired or whose session is over. The template gets ``sign_in`` with
    ``state``, ``open``, ``ended``, ``over``, ``expired`` or ``unknown``; ``session``, ``browser``
    and ``address`` of one that is open, empty if unknown; ``days``, for which a link is good; and
    ``password_url``, empty where the site has no such page.
    """

    http_method_names = ["get", "head", "post", "options"]
    template_name = "clustered_sessions/sign_in.html"

    def get(self, request: HttpRequest, link: str) -> HttpResponse:
        """Show the sign-in, and ask."""
        login = self._login(link)
        if not isinstance(login, Login):
            return login
        session = login.session(current=request.session)
        return self._answer("open", session) if session else self._answer("over", status=410)

    def post(self, request: HttpRequest, link: str) -> HttpResponse:
        """End the session; the one in use is logged out."""
        login = self._login(link)
        if not isinstance(login, Login):
            return login
        session = login.session(current=request.session)
        if session is not None and session.is_current:
            logout(request)
            return self._answer("ended")
        return self._answer("ended") if login.end() else self._answer("over", status=410)

    def _login(self, link: str) -> Login | HttpResponse:
        """Return the login that a link names, or the answer to one that names none."""
        try:
            return Login.read(link)
        except SignatureExpired:
            return self._answer("expired", status=410)
        except BadSignature:
            return self._answer("unknown", status=404)

    def _answer(
        self, state: str, session: SessionInfo | None = None, *, status: int = 200
    ) -> HttpResponse:
        client = session.first if session else None
        sign_in = {
            "state": state,
            "session": session,
            "browser": agents.readable(client.user_agent) if client else "",
            "address": client.address if client else "",
            "days": LIFE.days,
            "password_url": _password_url(),
        }
        context: dict[str, Any] = self.get_context_data(sign_in=sign_in)
        # A page of the site's design may lead and load from elsewhere, where nobody is to have the
        # link. Not "no-referrer": browsers then send no origin either, and Django refuses the POST.
        headers = {"Referrer-Policy": "same-origin"}
        return self.render_to_response(context, status=status, headers=headers)


def _password_url() -> str:
    for name in _PASSWORD_PAGES:
        try:
            return reverse(name)
        except NoReverseMatch:
            continue
    return ""
