"""What the measured requests do with their session; and no more than that."""

from __future__ import annotations

from functools import cache
from typing import Any

from django.contrib.auth import alogin, alogout, login, logout
from django.http import HttpRequest, HttpResponse
from django.urls import path

BACKEND = "django.contrib.auth.backends.ModelBackend"


@cache
def visitor() -> Any:
    """Return the user who logs in; no database knows them."""
    from django.contrib.auth.models import User

    return User(pk=17, username="visitor", password="md5$salt$hash")


def untouched(request: HttpRequest) -> HttpResponse:
    """Answer without a look at the session."""
    return HttpResponse()


async def auntouched(request: HttpRequest) -> HttpResponse:
    """See untouched()."""
    return HttpResponse()


def read(request: HttpRequest) -> HttpResponse:
    """Read two keys, as a page that knows who is logged in."""
    session = request.session
    session.get("_auth_user_id"), session.get("n")
    return HttpResponse()


async def aread(request: HttpRequest) -> HttpResponse:
    """See read()."""
    session = request.session
    await session.aget("_auth_user_id"), await session.aget("n")
    return HttpResponse()


def change(request: HttpRequest) -> HttpResponse:
    """Read two keys and change one."""
    session = request.session
    session.get("_auth_user_id")
    session["n"] = session.get("n", 0) + 1
    return HttpResponse()


async def achange(request: HttpRequest) -> HttpResponse:
    """See change()."""
    session = request.session
    await session.aget("_auth_user_id")
    await session.aset("n", await session.aget("n", 0) + 1)
    return HttpResponse()


def log_in(request: HttpRequest) -> HttpResponse:
    """Log in without a password."""
    login(request, visitor(), BACKEND)
    return HttpResponse()


async def alog_in(request: HttpRequest) -> HttpResponse:
    """See log_in()."""
    await alogin(request, visitor(), BACKEND)
    return HttpResponse()


def log_out(request: HttpRequest) -> HttpResponse:
    """Log out; who is, was read before, as by Django's own authentication."""
    request.session.get("_auth_user_id")
    logout(request)
    return HttpResponse()


async def alog_out(request: HttpRequest) -> HttpResponse:
    """See log_out()."""
    await request.session.aget("_auth_user_id")
    await alogout(request)
    return HttpResponse()


urlpatterns = [path("read", read), path("change", change)]
