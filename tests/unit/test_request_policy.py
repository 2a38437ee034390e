"""A request's use of the session, by the setting, its view's marks and its header."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.core import signing
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory
from django.urls import path
from django.utils.decorators import method_decorator
from django.views import View as ClassBasedView

from django_clustered_sessions.decorators import (
    NO_MARKS,
    Access,
    Marks,
    marks_of,
    session_locked,
    session_no_touch,
    session_read_only,
    session_unlocked,
)
from django_clustered_sessions.session.request_policy import (
    HEADER,
    RequestPolicy,
    read_header,
    write_header,
)

Decorator = Callable[[Any], Any]


def page(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


async def apage(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


@method_decorator(session_locked, name="dispatch")
class Page(ClassBasedView):
    """A view whose every method is marked."""


class MarkedMethod(ClassBasedView):
    """A view that only shows its mark when it is called."""

    @method_decorator(session_locked)
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse()


def request_of(view: Any, method: str = "get", url: str = "/") -> HttpRequest:
    request = getattr(RequestFactory(), method)(url)
    request.urlconf = (path("", view), path("page/<str:secret>/", view))
    return request


@pytest.mark.parametrize(
    ("mode", "method", "locks"),
    [
        (None, "post", False),
        ("off", "get", False),
        ("off", "post", False),
        ("write", "get", False),
        ("write", "head", False),
        ("write", "options", False),
        ("write", "trace", False),
        ("write", "post", True),
        ("write", "put", True),
        ("write", "patch", True),
        ("write", "delete", True),
        ("all", "get", True),
        ("all", "post", True),
    ],
)
def test_setting_decides_where_the_view_says_nothing(
    settings: Any, mode: str | None, method: str, locks: bool
) -> None:
    if mode:
        settings.CLUSTERED_SESSIONS_LOCKING = mode
    request = request_of(page, method)
    assert RequestPolicy(request).access is (Access.LOCKED if locks else Access.UNLOCKED)


@pytest.mark.parametrize(
    ("mode", "decorate", "access"),
    [
        ("off", session_locked, Access.LOCKED),
        ("write", session_locked, Access.LOCKED),
        ("write", session_unlocked, Access.UNLOCKED),
        ("all", session_unlocked, Access.UNLOCKED),
        ("write", session_read_only, Access.READ_ONLY),
        ("all", session_read_only, Access.READ_ONLY),
    ],
)
@pytest.mark.parametrize("method", ["get", "post"])
def test_view_decides_whatever_the_setting_says(
    settings: Any, mode: str, decorate: Decorator, access: Access, method: str
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = mode
    request = request_of(decorate(page), method)
    assert RequestPolicy(request).access is access


@pytest.mark.parametrize(
    ("view", "marks"),
    [
        (page, NO_MARKS),
        (session_locked(page), Marks(Access.LOCKED)),
        (session_locked(apage), Marks(Access.LOCKED)),
        (Page.as_view(), Marks(Access.LOCKED)),
        (MarkedMethod.as_view(), NO_MARKS),
        (session_no_touch(page), Marks(touches=False)),
        (session_no_touch(session_read_only(page)), Marks(Access.READ_ONLY, touches=False)),
        (session_read_only(session_no_touch(page)), Marks(Access.READ_ONLY, touches=False)),
        (session_unlocked(session_locked(page)), Marks(Access.UNLOCKED)),
    ],
    ids=[
        "nothing",
        "function",
        "async function",
        "class",
        "method",
        "no touch",
        "no touch outside",
        "no touch inside",
        "outermost counts",
    ],
)
def test_marks_of_a_view_are_seen_before_it_is_called(view: Any, marks: Marks) -> None:
    assert marks_of(view) == marks


def test_marks_that_come_late_add_up() -> None:
    request = request_of(session_no_touch(page))
    policy = RequestPolicy(request)
    assert not policy.touches
    assert policy.apply(Marks(Access.READ_ONLY))
    assert (policy.access, policy.touches) == (Access.READ_ONLY, False)
    assert not policy.apply(Marks(touches=False))
    assert (policy.access, policy.touches) == (Access.READ_ONLY, False)
    assert not policy.apply(Marks(Access.LOCKED))
    assert (policy.access, policy.touches) == (Access.LOCKED, False)


def test_route_shows_the_pattern_and_no_value() -> None:
    request = request_of(page, url="/page/hunter2/")
    assert RequestPolicy(request).route == "GET /page/<str:secret>/"


def test_unknown_path_has_no_route_and_no_marks(settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    request = request_of(session_unlocked(page), url="/nowhere/")
    policy = RequestPolicy(request)
    assert policy.route == ""
    assert policy.access is Access.LOCKED


def test_header_gives_its_token_back() -> None:
    header = write_header("its id", "token")
    assert list(header) == [HEADER]
    assert read_header(header[HEADER], "its id") == "token"


@pytest.mark.parametrize(
    "header",
    ["forged", "tampered", "another session's", "no token", "another salt", "too short", "no list"],
)
def test_header_that_is_not_this_sessions_gives_no_token(header: str) -> None:
    good = write_header("its id", "token")[HEADER]
    value = {
        "forged": "token",
        "tampered": good[:-1] + ("a" if good[-1] != "a" else "b"),
        "another session's": write_header("another id", "token")[HEADER],
        "no token": write_header("its id", "")[HEADER],
        "another salt": signing.dumps(["its id", "token"], salt="another"),
        "too short": signing.dumps(["its id"], salt="django_clustered_sessions.lock"),
        "no list": signing.dumps(7, salt="django_clustered_sessions.lock"),
    }[header]
    assert read_header(value, "its id") == ""


def test_request_without_the_header_runs_under_no_lock() -> None:
    request = request_of(page)
    assert RequestPolicy(request).lock_header == ""


def test_request_with_the_header_runs_under_its_lock() -> None:
    request = RequestFactory().get("/", headers=write_header("its id", "token"))
    header = RequestPolicy(request).lock_header
    assert read_header(header, "its id") == "token"
    assert read_header(header, "another id") == ""
