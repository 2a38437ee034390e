"""Views of "Your devices": list the user's sessions, and end them."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.contrib import messages
from django.contrib.auth import logout
from django.contrib.auth.mixins import LoginRequiredMixin
from django.core.paginator import Paginator
from django.http import Http404, HttpRequest
from django.http.response import HttpResponseBase
from django.shortcuts import redirect
from django.utils.decorators import method_decorator
from django.utils.translation import gettext as _
from django.utils.translation import ngettext
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import csrf_protect
from django.views.generic import TemplateView, View

from django_clustered_sessions import registry
from django_clustered_sessions.conf import conf

from .rows import Row, belongs_to, rows


@method_decorator([csrf_protect, never_cache], name="dispatch")
class OwnSessions(LoginRequiredMixin, View):
    """Base of the three views: login required, never cached, CSRF-protected."""


class DeviceList(OwnSessions, TemplateView):
    """List the user's sessions: the current one first, then by last use.

    The template gets all in ``devices``, as other names may be those of context processors:
    ``rows``, a page of ``rows.Row``; ``page_range``; ``count``, the number of all sessions;
    ``has_others``; ``has_addresses``, False where no row has one; ``track_hint``, True for staff if
    the site does not keep browsers and addresses.
    """

    http_method_names = ["get", "head", "options"]
    template_name = "clustered_sessions/devices.html"
    paginate_by = 20

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        """Return the template's context."""
        entries = registry.sessions_of(self.request.user, current=self.request.session)
        pages: Paginator[Row] = Paginator(rows(entries), self.paginate_by)
        page = pages.get_page(self.request.GET.get("page"))
        devices = {
            "rows": page,
            "page_range": pages.get_elided_page_range(page.number, on_each_side=2, on_ends=1),
            "count": pages.count,
            "has_others": any(not entry.is_current for entry in entries),
            "has_addresses": any(row.address for row in page),
            "track_hint": getattr(self.request.user, "is_staff", False) and not conf.track_clients,
        }
        return super().get_context_data(devices=devices, **kwargs)


class EndDevice(OwnSessions):
    """End one of the user's sessions; ending the current one is a logout."""

    http_method_names = ["post", "options"]

    def post(self, request: HttpRequest, id: str) -> HttpResponseBase:
        """End the session and redirect to the list.

        Answers 404 for another user's session.
        """
        entry = registry.find(id, current=request.session)
        if entry is not None and not belongs_to(entry, request.user):
            raise Http404("no session of this user")
        if entry is not None and entry.is_current:
            logout(request)
            return redirect(settings.LOGOUT_REDIRECT_URL or settings.LOGIN_URL)
        if entry is not None and registry.end_session(id):
            messages.success(request, _("That device is logged out."), fail_silently=True)
        else:
            messages.info(request, _("That device was logged out already."), fail_silently=True)
        return redirect("clustered_sessions_devices:list")


class EndOtherDevices(OwnSessions):
    """End all of the user's sessions except the current one."""

    http_method_names = ["post", "options"]

    def post(self, request: HttpRequest) -> HttpResponseBase:
        """End the sessions and redirect to the list."""
        ended = registry.end_sessions_of(request.user, keep=request.session)
        if ended:
            text = ngettext(
                "%(count)d other device is logged out.",
                "%(count)d other devices are logged out.",
                ended,
            )
            messages.success(request, text % {"count": ended}, fail_silently=True)
        else:
            text = _("There was no other device that is logged in.")
            messages.info(request, text, fail_silently=True)
        return redirect("clustered_sessions_devices:list")
