"""The pages that ``compare_engines`` asks for."""

from __future__ import annotations

from django.contrib.auth import login, logout
from django.contrib.auth.models import User
from django.http import HttpRequest, HttpResponse
from django.urls import path


def read(request: HttpRequest) -> HttpResponse:
    """Read the session, as a page that shows who is logged in."""
    return HttpResponse(f"{request.session.get('n')} {request.session.get('_auth_user_id')}")


def write(request: HttpRequest) -> HttpResponse:
    """Change one value."""
    request.session["n"] = request.session.get("n", 0) + 1
    return HttpResponse()


def log_in(request: HttpRequest) -> HttpResponse:
    """Log in without a password."""
    login(request, User.objects.get(username="visitor"))
    return HttpResponse()


def log_out(request: HttpRequest) -> HttpResponse:
    """Log out."""
    logout(request)
    return HttpResponse()


urlpatterns = [
    path("read", read),
    path("write", write),
    path("login", log_in),
    path("logout", log_out),
]
