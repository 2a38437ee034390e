"""The decorators under Django REST framework and Django Ninja, and where they can do nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial, partialmethod
from typing import Any

import pytest
import redis
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory
from django.urls import path
from django.utils.decorators import method_decorator
from django.views import View as ClassBasedView
from ninja import NinjaAPI
from ninja.decorators import decorate_view
from rest_framework.decorators import action, api_view
from rest_framework.response import Response
from rest_framework.views import APIView
from rest_framework.viewsets import ViewSet

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.decorators import (
    Access,
    Marks,
    marks_of,
    recent_login,
    session_fresh,
    session_locked,
    session_no_touch,
    session_nonstop,
    session_read_only,
    session_unlocked,
)
from tests.gateways import GATEWAYS, Browser
from tests.locking import BOUND_S, Threads, new_session, outcome, owner

Decorator = Callable[[Any], Any]

#: Two APIs of Ninja need two names.
NAMES = itertools.count()


@pytest.fixture(params=GATEWAYS)
def browser(request: pytest.FixtureRequest, store: redis.Redis, settings: Any) -> Browser:
    """Visit with the cookie of a session that is stored, in which ``n`` is 0."""
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = BOUND_S
    settings.CLUSTERED_SESSIONS_LOCK_MAX_WAITERS = 64
    found = Browser(settings, asgi=request.param == "asgi")
    found.key = new_session(n=0)
    return found


def count(request: Any) -> dict[str, Any]:
    request.session["n"] += 1
    return {"n": request.session["n"], "is_locked": request.session.is_locked}


# Django REST framework. Each form takes a decorator and returns the site's pages.


def function_inside(decorate: Decorator) -> Any:
    @api_view(["GET"])
    @decorate
    def page(request: Any) -> Response:
        return Response(count(request))

    return page


def function_outside(decorate: Decorator) -> Any:
    @decorate
    @api_view(["GET"])
    def page(request: Any) -> Response:
        return Response(count(request))

    return page


def function_by_keyword(decorate: Decorator) -> Any:
    @decorate
    def inner(number: int, *, request: Any) -> Response:
        return Response(count(request))

    @api_view(["GET"])
    def page(request: Any) -> Response:
        return inner(7, request=request)

    return page


def bound_method(decorate: Decorator) -> Any:
    class Page(APIView):
        @method_decorator(decorate)
        def get(self, request: Any) -> Response:
            return Response(count(request))

    return Page.as_view()


def method_as_it_is(decorate: Decorator) -> Any:
    class Page(APIView):
        @decorate
        def get(self, request: Any) -> Response:
            return Response(count(request))

    return Page.as_view()


def class_as_it_is(decorate: Decorator) -> Any:
    @decorate
    class Page(APIView):
        def get(self, request: Any) -> Response:
            return Response(count(request))

    return Page.as_view()


def class_by_dispatch(decorate: Decorator) -> Any:
    @method_decorator(decorate, name="dispatch")
    class Page(APIView):
        def get(self, request: Any) -> Response:
            return Response(count(request))

    return Page.as_view()


def action_inside(decorate: Decorator) -> Any:
    class Pages(ViewSet):
        @action(detail=False)
        @decorate
        def page(self, request: Any) -> Response:
            return Response(count(request))

    return Pages.as_view({"get": "page"})


def action_outside(decorate: Decorator) -> Any:
    class Pages(ViewSet):
        @decorate
        @action(detail=False)
        def page(self, request: Any) -> Response:
            return Response(count(request))

    return Pages.as_view({"get": "page"})


# Django Ninja.


def api() -> NinjaAPI:
    return NinjaAPI(urls_namespace=f"api-{next(NAMES)}")


def operation(decorate: Decorator) -> Any:
    pages = api()

    @pages.get("")
    @decorate
    def page(request: HttpRequest, number: int = 7) -> dict[str, Any]:
        return count(request)

    return pages.urls


def async_operation(decorate: Decorator) -> Any:
    pages = api()

    @pages.get("")
    @decorate
    async def page(request: HttpRequest, number: int = 7) -> dict[str, Any]:
        n = await request.session.aget("n") + 1
        await request.session.aset("n", n)
        return {"n": n, "is_locked": request.session.is_locked}

    return pages.urls


def operation_as_a_view(decorate: Decorator) -> Any:
    pages = api()

    @pages.get("")
    @decorate_view(decorate)
    def page(request: HttpRequest, number: int = 7) -> dict[str, Any]:
        return count(request)

    return pages.urls


FORMS: list[Callable[[Decorator], Any]] = [
    function_inside,
    function_outside,
    function_by_keyword,
    bound_method,
    method_as_it_is,
    class_as_it_is,
    class_by_dispatch,
    action_inside,
    action_outside,
    operation,
    async_operation,
    operation_as_a_view,
]


@pytest.mark.parametrize("form", FORMS)
def test_locked_view_counts_one_after_the_other(
    browser: Browser, store: redis.Redis, threads: Threads, form: Callable[[Decorator], Any]
) -> None:
    browser.settings.ROOT_URLCONF = (path("", form(session_locked)),)
    visits = [threads.start(browser.another_tab().request, "/") for _ in range(3)]
    answers = [outcome(visit).json() for visit in visits]
    assert sorted(answer["n"] for answer in answers) == [1, 2, 3]
    assert all(answer["is_locked"] for answer in answers)
    assert SessionStore(browser.key).load() == {"n": 3}
    assert owner(store, browser.key) == ""


@pytest.mark.parametrize("form", FORMS)
def test_view_that_only_reads_writes_nothing(
    browser: Browser, form: Callable[[Decorator], Any]
) -> None:
    browser.settings.ROOT_URLCONF = (path("", form(session_read_only)),)
    assert browser.request("/").json() == {"n": 1, "is_locked": False}
    assert SessionStore(browser.key).load() == {"n": 0}


# Where a decorator would have no effect.


def test_decorator_above_ninjas_is_refused() -> None:
    pages = api()
    with pytest.raises(TypeError, match=r"test_frameworks\..*page is an operation of Django Ninja"):

        @session_locked
        @pages.get("")
        def page(request: HttpRequest) -> None: ...


def takes_none(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the view was called")


async def atakes_none(*args: Any, **kwargs: Any) -> None:
    takes_none()


@pytest.mark.parametrize(
    "decorate", [session_locked, session_read_only, session_no_touch, session_nonstop("noop")]
)
async def test_view_without_a_request_is_refused(decorate: Decorator) -> None:
    for arguments in ((), (object(), 7)):
        with pytest.raises(TypeError, match=r"takes_none was called without a Django request"):
            decorate(takes_none)(*arguments, name="request")
        with pytest.raises(TypeError, match=r"takes_none was called without a Django request"):
            await decorate(atakes_none)(*arguments, name="request")


@pytest.mark.parametrize(
    "decorator",
    [session_locked, session_read_only, session_unlocked, session_no_touch, session_fresh],
)
def test_decorator_with_empty_parentheses_is_told(decorator: Any) -> None:
    with pytest.raises(TypeError, match="without parentheses, as in @session_locked"):
        decorator()


@pytest.mark.parametrize("kind", [classmethod, partial(partialmethod, name="cart")])
@pytest.mark.parametrize("decorator", [session_locked, session_nonstop("noop"), recent_login()])
def test_decorator_above_classmethod_is_told(decorator: Any, kind: Any) -> None:
    with pytest.raises(TypeError, match=r"given a (class|partial)method.*Put it below"):
        decorator(kind(takes_none))


def test_decorator_below_classmethod_finds_the_request() -> None:
    class Pages:
        @classmethod
        @session_locked
        def page(cls, request: HttpRequest) -> str:
            return "called"

    assert marks_of(Pages.page).access is Access.LOCKED
    assert Pages.page(RequestFactory().get("/")) == "called"


def test_decorator_without_its_parentheses_is_told() -> None:
    decorators: Any = (session_nonstop, recent_login)
    for decorator in decorators:
        with pytest.raises(ValueError, match="This decorator needs parentheses"):
            decorator(takes_none)
    with pytest.raises(ValueError, match=r"session_nonstop\(behaviour\): None is none of"):
        decorators[0]()


def test_class_that_is_no_view_is_refused() -> None:
    class Cart:
        pass

    with pytest.raises(TypeError, match=r"Cart has no dispatch\(\)"):
        session_locked(Cart)


def test_request_of_another_engine_is_left_alone() -> None:
    request = RequestFactory().get("/")
    assert session_locked(lambda request: "called")(request) == "called"
    request.session = {}
    assert session_locked(lambda request: "called")(request) == "called"


# Several on one class.


def one_by_one(view: Any) -> Any:
    return session_no_touch(session_read_only(view))


def by_dispatch(view: Any) -> Any:
    for decorate in (session_read_only, session_no_touch):
        view = method_decorator(decorate, name="dispatch")(view)
    return view


def by_a_list(view: Any) -> Any:
    return method_decorator([session_no_touch, session_read_only], name="dispatch")(view)


@pytest.mark.parametrize("decorate", [one_by_one, by_dispatch, by_a_list])
def test_marks_of_a_class_add_up(decorate: Decorator) -> None:
    class Page(ClassBasedView):
        def get(self, request: HttpRequest) -> HttpResponse:
            return HttpResponse()

    assert marks_of(decorate(Page).as_view()) == Marks(Access.READ_ONLY, touches=False)
