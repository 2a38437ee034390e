"""Sessions in Django's admin: those of each user and of all, ending them, and statistics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any, Final, cast

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.utils import quote, unquote
from django.contrib.auth import get_user_model, logout
from django.core.exceptions import PermissionDenied, ValidationError
from django.core.paginator import Paginator
from django.db.models import Model, Q, QuerySet
from django.http import HttpRequest, HttpResponse, QueryDict
from django.shortcuts import redirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from . import registry
from .conf import conf
from .devices.rows import Row, rows
from .exceptions import SessionIdAmbiguous, SessionStoreUnavailable
from .models import Session
from .monitoring import charts, history
from .registry import Page, SessionInfo

if TYPE_CHECKING:
    ModelAdmin = admin.ModelAdmin[Session]
else:
    # Not generic when it runs.
    ModelAdmin = admin.ModelAdmin

#: Users that a search shows on a page.
USERS_PER_PAGE: Final = 20

#: Spans of the charts, in hours; the first is the default.
SPANS: Final = (6, 1, 24)


@dataclass(frozen=True)
class SessionOwner:
    """User whose sessions are shown, named by the primary key as sessions hold it.

    ``user`` is None if the user was deleted while logged in.
    """

    key: str
    user: Any

    @classmethod
    def by_key(cls, key: str) -> SessionOwner:
        """Look the user with that key up."""
        model = get_user_model()
        return cls(key, model._default_manager.filter(_has_key(key)).first())

    @classmethod
    def of(cls, user: Model) -> SessionOwner:
        """Return that user."""
        return cls(user._meta.pk.value_to_string(user), user)

    @property
    def name(self) -> str:
        """Return the user's name as pages and the log show it."""
        if self.user is None:
            return _("deleted user %(key)s") % {"key": self.key}
        return str(self.user.get_username())

    @property
    def email(self) -> str:
        """Return the user's e-mail address, empty if there is none."""
        return getattr(self.user, get_user_model().get_email_field_name(), None) or ""

    @property
    def quoted(self) -> str:
        """Return the key as it stands in URLs."""
        return quote(self.key)


@admin.register(Session)
class SessionAdmin(ModelAdmin):
    """Search users, show and end their sessions, and show what the cluster did lately.

    Every page needs ``clustered_sessions.view_session``, ending ``delete_session`` as well.
    """

    list_per_page = 50

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Refuse: only visits create sessions."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Refuse: a session cannot be changed here."""
        return False

    def get_urls(self) -> list[URLPattern]:
        """Return the pages, without Django's own, because those query a table."""
        wrap, name = self.admin_site.admin_view, "clustered_sessions_session"
        return [
            path("", wrap(self.changelist_view), name=f"{name}_changelist"),
            path("all/", wrap(self.all_view), name=f"{name}_all"),
            path("all/end/", wrap(self.end_chosen_view), name=f"{name}_end_chosen"),
            path("users/<str:key>/", wrap(self.user_view), name=f"{name}_user"),
            path("users/<str:key>/end/", wrap(self.end_all_view), name=f"{name}_end_all"),
            path("users/<str:key>/end/<str:id>/", wrap(self.end_view), name=f"{name}_end"),
        ]

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        """Show what the cluster did in the last ``hours``; with ``q`` the users that match.

        If exactly one user matches, redirect to the page of that user's sessions.
        """
        self._allow(request)
        query = request.GET.get("q", "").replace("\0", "").strip()
        context: dict[str, Any] = {"title": _("Sessions"), "query": query}
        if query:
            deleted = _deleted(query)
            found = Paginator(_search(query), USERS_PER_PAGE)
            page = found.get_page(request.GET.get("p"))
            users = [*deleted, *map(SessionOwner.of, page)]
            if len(users) == found.count + len(deleted) == 1:
                return redirect(self._url("user", users[0].quoted))
            context |= {
                "users": users,
                "count": found.count + len(deleted),
                "page": page,
                "page_range": found.get_elided_page_range(page.number),
            }
        else:
            context |= _figures(request.GET.get("hours", ""))
        return self._page(request, "sessions", context | (extra_context or {}))

    def all_view(self, request: HttpRequest) -> HttpResponse:
        """Show the sessions that pass the filters, the latest expiry first."""
        self._allow(request)
        form = FilterForm(request.GET, request.session)
        after = request.GET.get("after")
        context: dict[str, Any] = {"title": _("All sessions"), "form": form}
        if form.is_valid():
            try:
                page = form.page(self.list_per_page, after)
            except ValueError:
                # Somebody has changed the address by hand.
                return redirect(self._url("all"))
            shown = _owned(page.sessions)
            query = request.GET.copy()
            query.pop("after", None)
            filters = query.urlencode()
            query["after"] = page.after or ""
            context |= {
                "rows": shown,
                "first": filters,
                "next": query.urlencode() if page.after else "",
                "is_first": not after,
                "back": request.GET.urlencode(),
                "has_addresses": any(row.address for owner, row in shown),
                "may_end": self.has_delete_permission(request),
            }
        return self._page(request, "all", context)

    def end_chosen_view(self, request: HttpRequest) -> HttpResponse:
        """Ask whether to end the chosen sessions but the current one; once confirmed, end them."""
        self._allow(request, ending=True)
        chosen = [_entry(id, request) for id in request.POST.getlist("id")]
        entries = [entry for entry in chosen if entry and not entry.is_current]
        back = self._url("all") + "?" + QueryDict(request.POST.get("back", "")).urlencode()
        if not entries:
            messages.warning(request, _("There is no session to end."))
            return redirect(back)
        if "confirmed" not in request.POST:
            context = {"title": _("End sessions"), "rows": _owned(entries), "back": back}
            return self._page(request, "end_chosen", context | {"query": request.POST.get("back")})
        ended = 0
        for owner, row in _owned(entries):
            if registry.end_session(row.entry.id):
                ended += 1
                self._log(request, owner, f"Ended session {row.entry.id[:12]}.", row.entry)
        text = ngettext("%(count)d session has ended.", "%(count)d sessions have ended.", ended)
        messages.success(request, text % {"count": ended})
        return redirect(back)

    def user_view(self, request: HttpRequest, key: str) -> HttpResponse:
        """Show a user's sessions."""
        self._allow(request)
        owner = SessionOwner.by_key(unquote(key))
        entries = registry.sessions_of(owner.key, current=request.session)
        if owner.user is None and not entries:
            return self._gone(request, _("There is no such user."))
        pages: Paginator[Row] = Paginator(rows(entries), self.list_per_page)
        page = pages.get_page(request.GET.get("p"))
        context = {
            "title": _("Sessions of %(user)s") % {"user": owner.name},
            "owner": owner,
            "rows": page,
            "page": page,
            "page_range": pages.get_elided_page_range(page.number),
            "count": pages.count,
            "has_addresses": any(row.address for row in page),
            "has_others": any(not entry.is_current for entry in entries),
            "keeps_one": any(entry.is_current for entry in entries),
            "may_end": self.has_delete_permission(request),
        }
        return self._page(request, "user", context)

    def end_view(self, request: HttpRequest, key: str, id: str) -> HttpResponse:
        """Ask whether to end one of a user's sessions; POST ends it."""
        self._allow(request, ending=True)
        owner = SessionOwner.by_key(unquote(key))
        entry = _find(owner, id, request)
        if entry is None:
            return self._gone(request, _("That session had ended already."), owner)
        if request.method != "POST":
            context = {
                "title": _("End a session of %(user)s") % {"user": owner.name},
                "owner": owner,
                "row": Row(entry),
            }
            return self._page(request, "end", context)
        if not registry.end_session(id):
            return self._gone(request, _("That session had ended already."), owner)
        self._log(request, owner, f"Ended session {id[:12]}.")
        if entry.is_current:
            # Deletes the cookie, and nothing is saved to the ended session.
            logout(request)
            return redirect(reverse("admin:index", current_app=self.admin_site.name))
        messages.success(request, _("The session has ended."))
        return redirect(self._url("user", owner.quoted))

    def end_all_view(self, request: HttpRequest, key: str) -> HttpResponse:
        """Ask whether to end all of a user's sessions; POST ends them, except the current one."""
        self._allow(request, ending=True)
        owner = SessionOwner.by_key(unquote(key))
        entries = registry.sessions_of(owner.key, current=request.session)
        count = sum(not entry.is_current for entry in entries)
        if request.method != "POST":
            if not count:
                return self._gone(request, _("There is no session to end."), owner)
            context = {
                "title": _("End the sessions of %(user)s") % {"user": owner.name},
                "owner": owner,
                "count": count,
                "keeps_one": count < len(entries),
            }
            return self._page(request, "end", context)
        ended = registry.end_sessions_of(owner.key, keep=request.session)
        if not ended:
            return self._gone(request, _("There is no session to end."), owner)
        self._log(request, owner, f"Ended {ended} session{'s' * (ended > 1)}.")
        text = ngettext("%(count)d session has ended.", "%(count)d sessions have ended.", ended)
        messages.success(request, text % {"count": ended})
        return redirect(self._url("user", owner.quoted))

    def _allow(self, request: HttpRequest, *, ending: bool = False) -> None:
        may = self.has_view_permission(request) and (
            not ending or self.has_delete_permission(request)
        )
        if not may:
            raise PermissionDenied

    def _url(self, page: str, *args: str) -> str:
        name = f"admin:clustered_sessions_session_{page}"
        return reverse(name, args=args, current_app=self.admin_site.name)

    def _page(self, request: HttpRequest, name: str, context: dict[str, Any]) -> HttpResponse:
        request.current_app = self.admin_site.name
        shown = {**self.admin_site.each_context(request), "opts": self.opts, **context}
        return TemplateResponse(request, f"clustered_sessions/admin/{name}.html", shown)

    def _gone(
        self, request: HttpRequest, why: str, owner: SessionOwner | None = None
    ) -> HttpResponse:
        messages.warning(request, why)
        is_known = owner is not None and owner.user is not None
        return redirect(
            self._url("user", owner.quoted) if owner and is_known else self._url("changelist")
        )

    def _log(
        self,
        request: HttpRequest,
        owner: SessionOwner | None,
        what: str,
        entry: SessionInfo | None = None,
    ) -> None:
        """Add a line to the recent actions of the acting user, and to the owner's history.

        ``entry`` is the session that it is about if there is no owner.
        """
        from django.contrib.admin.models import CHANGE, LogEntry
        from django.contrib.contenttypes.models import ContentType

        model: type[Model] = Session if owner is None else get_user_model()
        public_id = entry.id if entry else ""
        LogEntry.objects.create(
            user=cast(Any, request.user),
            content_type=ContentType.objects.get_for_model(model, for_concrete_model=False),
            object_id=public_id if owner is None else owner.key,
            object_repr=public_id[:12] if owner is None else owner.name[:200],
            action_flag=CHANGE,
            change_message=what,
        )


class FilterForm(forms.Form):
    """Filters of the list of all sessions."""

    session = forms.CharField(
        label=gettext_lazy("Session"),
        required=False,
        max_length=43,
        help_text=gettext_lazy("The first characters of its id, as logs have them."),
    )
    user = forms.CharField(
        label=gettext_lazy("User"),
        required=False,
        help_text=gettext_lazy("The user name, or the primary key."),
    )
    address = forms.CharField(
        label=gettext_lazy("Address"),
        required=False,
        help_text=gettext_lazy(
            "Of the login or of the last use: 10.0.0.7, or a network, 10.0.0.0/8."
        ),
    )
    idle_since = forms.DateTimeField(label=gettext_lazy("Not seen since"), required=False)
    created_before = forms.DateTimeField(label=gettext_lazy("Logged in before"), required=False)

    def __init__(self, data: Any, current: Any) -> None:
        super().__init__(data, label_suffix="")
        self.current = current
        if not conf.track_clients:
            del self.fields["address"]
        for name in ("idle_since", "created_before"):
            self.fields[name].widget = forms.DateTimeInput(
                {"type": "datetime-local"}, format="%Y-%m-%dT%H:%M"
            )

    def clean_user(self) -> str | None:
        """Return the primary key of the user with this name, else what was given."""
        model = get_user_model()
        name = self.cleaned_data["user"]
        user = model._default_manager.filter(**{model.USERNAME_FIELD: name}).first()
        return SessionOwner.of(user).key if name and user else name or None

    def clean_address(self) -> str | None:
        """Return the address or network, None for an empty one."""
        address = self.cleaned_data["address"] or None
        try:
            registry.matching(address=address)
        except ValueError:
            raise ValidationError(_("This is no IP address, and no network.")) from None
        return address

    def clean_session(self) -> Page | None:
        """Return the sessions whose ids begin so, None where nothing was given."""
        start = self.cleaned_data["session"]
        if not start:
            return None
        try:
            found = [registry.find(start, current=self.current)]
        except SessionIdAmbiguous as error:
            ids = error.ids[: SessionAdmin.list_per_page]
            found = [registry.find(id, current=self.current) for id in ids]
        except ValueError:
            raise ValidationError(
                _("Give 4 characters of its id or more: letters, digits, - and _.")
            ) from None
        return Page([entry for entry in found if entry], None)

    def page(self, count: int, after: str | None) -> Page:
        """Return the sessions to show. Raises ValueError for a place that is none."""
        filters = {name: value for name, value in self.cleaned_data.items() if value}
        found = filters.pop("session", None)
        return found or registry.page(count, after=after, current=self.current, **filters)


def _owned(entries: Iterable[SessionInfo]) -> list[tuple[SessionOwner | None, Row]]:
    """Return each session as a row, with its owner, None if nobody is logged in."""
    model = get_user_model()
    shown = list(entries)
    keys = {entry.user_id for entry in shown if entry.user_id is not None}
    users = model._default_manager.filter(reduce(or_, map(_has_key, keys), Q(pk__in=())))
    owners = {owner.key: owner for owner in map(SessionOwner.of, users)}
    return [
        (
            None
            if entry.user_id is None
            else owners.get(entry.user_id) or SessionOwner(entry.user_id, None),
            Row(entry),
        )
        for entry in shown
    ]


def _figures(asked: str) -> dict[str, Any]:
    """Return the charts of the last hours, each with its numbers, newest first."""
    hours = next((span for span in SPANS if str(span) == asked), SPANS[0])
    context: dict[str, Any] = {"hours": hours, "spans": sorted(SPANS)}
    try:
        drawn = charts.overview(history.recent(hours), timezone.get_current_timezone())
    except SessionStoreUnavailable as error:
        return context | {"why_no_figures": str(error)}
    figures = [
        (plot, [(at, [one.values[n] for one in plot.series]) for n, at in enumerate(plot.times)])
        for plot in drawn
    ]
    return context | {"figures": [(plot, numbers[::-1]) for plot, numbers in figures]}


def _search(query: str) -> QuerySet[Any]:
    """Return users by a part of the name or of the e-mail address, or by the primary key."""
    model = get_user_model()
    named = {model.USERNAME_FIELD, model.get_email_field_name()}
    found = _has_key(query)
    for name in named & {field.name for field in model._meta.get_fields()}:
        found |= Q((f"{name}__icontains", query))
    return model._default_manager.filter(found).order_by(model.USERNAME_FIELD, "pk")


def _deleted(query: str) -> list[SessionOwner]:
    """Return the deleted user with this key, if sessions of that user are left."""
    owner = SessionOwner.by_key(query)
    return [owner] if owner.user is None and registry.count_of(query) else []


def _has_key(key: str) -> Q:
    try:
        return Q(pk=get_user_model()._meta.pk.to_python(key))
    except ValidationError:
        return Q(pk__in=())


def _find(owner: SessionOwner, id: str, request: HttpRequest) -> SessionInfo | None:
    """Return the user's session with this id, None if there is none."""
    entry = _entry(id, request)
    return entry if entry is not None and entry.user_id == owner.key else None


def _entry(id: str, request: HttpRequest) -> SessionInfo | None:
    """Return the session with this id, None if there is none, or it is the start of an id."""
    try:
        entry = registry.find(id, current=request.session)
    except ValueError:
        return None
    return entry if entry is not None and entry.id == id else None
