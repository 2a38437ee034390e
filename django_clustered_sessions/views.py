"""Views of a site: "Confirm it is you", and endpoints for the warning before a session ends.

``docs/recent-logins.md`` and ``docs/timeouts.md``. They are synchronous, because under WSGI an
async view would connect to the store on each request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

from django import forms
from django.conf import settings
from django.contrib.auth import REDIRECT_FIELD_NAME, SESSION_KEY, authenticate
from django.contrib.auth.decorators import login_not_required
from django.contrib.auth.mixins import UserPassesTestMixin
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import resolve_url
from django.utils.decorators import method_decorator
from django.utils.http import url_has_allowed_host_and_scheme
from django.utils.translation import gettext_lazy as _
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import csrf_protect
from django.views.decorators.debug import sensitive_post_parameters, sensitive_variables
from django.views.decorators.http import require_GET, require_POST
from django.views.generic import FormView

from .backend import SessionStore
from .decorators import session_no_touch, session_nonstop, session_read_only, session_unlocked
from .recent_logins import is_login_of
from .session import save
from .session.error_responses import RETRY_AFTER_S


class PasswordForm(forms.Form):
    """The password of the user who is logged in."""

    error_messages: ClassVar = {"wrong": _("That is not your password. Try again.")}

    password = forms.CharField(
        label=_("Password"),
        strip=False,
        widget=forms.PasswordInput({"autocomplete": "current-password", "autofocus": True}),
    )

    def __init__(self, *args: Any, request: HttpRequest, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.request = request

    @sensitive_variables()
    def clean_password(self) -> str:
        """Return the password. Raises ValidationError if it is not the user's."""
        user, password = self.request.user, self.cleaned_data["password"]
        # Not check_password(): the site's backends know the password, and count failures. They get
        # what Django's login form gives them, also where USERNAME_FIELD is another.
        if authenticate(self.request, username=user.get_username(), password=password) != user:
            raise forms.ValidationError(self.error_messages["wrong"], "wrong")
        return cast(str, password)


if TYPE_CHECKING:
    PasswordFormView = FormView[PasswordForm]
else:
    # Not generic when it runs.
    PasswordFormView = FormView


@method_decorator([csrf_protect, never_cache, sensitive_post_parameters()], name="dispatch")
class ConfirmLogin(UserPassesTestMixin, PasswordFormView):
    """Ask for the password again, and go back to the page that asked for it, ``next``.

    A wrong password logs nobody out, and is told to Django's ``user_login_failed``. A user whom the
    request has by something else than this session's login gets a 403.
    """

    form_class = PasswordForm
    template_name = "clustered_sessions/confirm.html"

    def test_func(self) -> bool:
        """Return whether the user is logged in, and that in this session."""
        user = self.request.user
        return user.is_authenticated and is_login_of(user, self.request.session.get(SESSION_KEY))

    def get_success_url(self) -> str:
        """Return ``next``, or LOGIN_REDIRECT_URL if it is not the site's."""
        return self._next or resolve_url(settings.LOGIN_REDIRECT_URL)

    @property
    def _next(self) -> str:
        sent, host = self.request.POST or self.request.GET, self.request.get_host()
        url = sent.get(REDIRECT_FIELD_NAME, "")
        is_ours = url_has_allowed_host_and_scheme(url, {host}, self.request.is_secure())
        return url if is_ours else ""

    def get_form_kwargs(self) -> dict[str, Any]:
        """Return the arguments of the form."""
        return super().get_form_kwargs() | {"request": self.request}

    def form_valid(self, form: PasswordForm) -> HttpResponse:
        """Confirm the login, and go back."""
        _session_of(self.request).confirm_login()
        return super().form_valid(form)

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        """Return the template's context: ``form``, and ``next``, empty if it is not the site's."""
        return super().get_context_data(next=self._next, next_field=REDIRECT_FIELD_NAME, **kwargs)


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
    # In this order: time passes, and the end comes no later than the latest one.
    most_left_s = session.most_left_s
    left_s = session.left_s
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
