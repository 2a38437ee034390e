"""No traceback shows a session key: no page of DEBUG, no error mail, no tool that reads frames."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import redis
from asgiref.sync import sync_to_async
from django.contrib.sessions.backends.base import CreateError, UpdateError
from django.http import HttpRequest, HttpResponse
from django.views.debug import ExceptionReporter

import django_clustered_sessions
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import (
    SessionConflict,
    SessionLockTimeout,
    SessionStoreUnavailable,
    SessionTooLarge,
)
from tests.gateways import Browser, load_scripts, place
from tests.locking import seize
from tests.servers import CountingProxy

OURS = str(Path(django_clustered_sessions.__file__).parent)

Does = Callable[[SessionStore], Any]
Awaits = Callable[[SessionStore], Awaitable[Any]]


def change(session: SessionStore) -> None:
    session["n"] = session["n"] + 1


def enlarge(session: SessionStore) -> None:
    session["much"] = "x" * 2000


def taken(session: SessionStore) -> SessionStore:
    """Return an object of the same session, of which nothing is loaded."""
    return SessionStore(session.session_key)


def end_elsewhere(session: SessionStore) -> None:
    change(session)
    taken(session).flush()


def move_elsewhere(session: SessionStore) -> None:
    change(session)
    taken(session).cycle_key()


def write_elsewhere(session: SessionStore) -> None:
    change(session)
    other = taken(session)
    other["n"] = 7
    other.save()


def damage_value(session: SessionStore) -> None:
    change(session)
    session["n"] = object()


def nothing(session: SessionStore) -> None:
    pass


#: What is done before, what fails then, its twin, and how.
FAILURES: dict[str, tuple[Does, Does, Awaits, type[Exception]]] = {
    "refused": (damage_value, lambda s: s.save(), lambda s: s.asave(), TypeError),
    "too large": (enlarge, lambda s: s.save(), lambda s: s.asave(), SessionTooLarge),
    "too large to create": (enlarge, lambda s: s.create(), lambda s: s.acreate(), SessionTooLarge),
    "too large to move": (
        enlarge,
        lambda s: s.cycle_key(),
        lambda s: s.acycle_key(),
        SessionTooLarge,
    ),
    "exists": (
        change,
        lambda s: s.save(must_create=True),
        lambda s: s.asave(must_create=True),
        CreateError,
    ),
    "ended": (end_elsewhere, lambda s: s.save(), lambda s: s.asave(), UpdateError),
    "ended and moved": (move_elsewhere, lambda s: s.save(), lambda s: s.asave(), UpdateError),
    "ended before a move": (
        end_elsewhere,
        lambda s: s.cycle_key(),
        lambda s: s.acycle_key(),
        UpdateError,
    ),
    "ended before a commit": (
        end_elsewhere,
        lambda s: s.commit(),
        lambda s: s.acommit(),
        UpdateError,
    ),
    "ended before a lock": (
        end_elsewhere,
        lambda s: s.lock().__enter__(),
        lambda s: s.alock().__aenter__(),
        UpdateError,
    ),
    "conflict": (write_elsewhere, lambda s: s.save(), lambda s: s.asave(), SessionConflict),
    "locked": (
        nothing,
        lambda s: s.lock().__enter__(),
        lambda s: s.alock().__aenter__(),
        SessionLockTimeout,
    ),
    "locked for a save": (change, lambda s: s.save(), lambda s: s.asave(), SessionLockTimeout),
    "locked for a move": (
        change,
        lambda s: s.cycle_key(),
        lambda s: s.acycle_key(),
        SessionLockTimeout,
    ),
    "away": (change, lambda s: s.save(), lambda s: s.asave(), SessionStoreUnavailable),
    "away for a load": (
        nothing,
        lambda s: taken(s).load(),
        lambda s: taken(s).aload(),
        SessionStoreUnavailable,
    ),
    "away for a move": (
        change,
        lambda s: s.cycle_key(),
        lambda s: s.acycle_key(),
        SessionStoreUnavailable,
    ),
    "away for a look": (
        nothing,
        lambda s: taken(s).expires_at(),
        lambda s: taken(s).aexpires_at(),
        SessionStoreUnavailable,
    ),
    "away for a question": (
        nothing,
        lambda s: s.exists(s.session_key),
        lambda s: s.aexists(s.session_key),
        SessionStoreUnavailable,
    ),
    "away for an end": (
        nothing,
        lambda s: s.delete(s.session_key),
        lambda s: s.adelete(s.session_key),
        SessionStoreUnavailable,
    ),
    "away for a logout": (
        nothing,
        lambda s: s.flush(),
        lambda s: s.aflush(),
        SessionStoreUnavailable,
    ),
}


def frames(error: BaseException | None) -> Iterator[FrameType]:
    """Yield our frames of an error, of what caused it, and of what was being handled."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        step = error.__traceback__
        while step is not None:
            if step.tb_frame.f_code.co_filename.startswith(OURS):
                yield step.tb_frame
            step = step.tb_next
        error = error.__cause__ or error.__context__


def reports(request: HttpRequest, error: Exception) -> list[str]:
    """Return what a mail, a page, and a tool that prints each local of our frames would show."""
    reporter = ExceptionReporter(request, type(error), error, error.__traceback__)
    found = [
        f"{frame.f_code.co_qualname}: {name} = {value!r}"
        for frame in frames(error)
        for name, value in frame.f_locals.items()
    ]
    assert found
    return [reporter.get_traceback_html(), reporter.get_traceback_text(), *found, str(error)]


@pytest.fixture(params=["wsgi", "asgi"])
def browser(request: pytest.FixtureRequest, settings: Any) -> Browser:
    settings.DEBUG = True
    return Browser(settings, asgi=request.param == "asgi")


@pytest.mark.parametrize("name", FAILURES)
def test_error_shows_no_session_key(
    store: redis.Redis, proxy: CountingProxy, browser: Browser, settings: Any, name: str
) -> None:
    before, does, awaits, kind = FAILURES[name]
    settings.CLUSTERED_SESSIONS_MAX_BYTES = 1000
    settings.CLUSTERED_SESSIONS_ON_CONFLICT = "error"
    load_scripts(store)
    session = SessionStore()
    session["n"] = 1
    session.create()
    browser.key = key = session.session_key or ""
    told: list[list[str]] = []

    def prepare(request: HttpRequest) -> None:
        before(request.session)  # type: ignore[arg-type]
        if name.startswith("locked"):
            seize(str(request.session.session_key))
            settings.CLUSTERED_SESSIONS_LOCK_WAIT = 0.05
        if name.startswith("away"):
            proxy.refuse()
            settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 0.5

    def view(request: HttpRequest) -> HttpResponse:
        try:
            does(request.session)  # type: ignore[arg-type]
        except kind as error:
            told.append(reports(request, error))
        return HttpResponse()

    async def aview(request: HttpRequest) -> HttpResponse:
        try:
            await awaits(request.session)  # type: ignore[arg-type]
        except kind as error:
            told.append(reports(request, error))
        return HttpResponse()

    def visit(request: HttpRequest) -> HttpResponse:
        prepare(request)
        return view(request)

    async def avisit(request: HttpRequest) -> HttpResponse:
        await sync_to_async(prepare)(request)
        return await aview(request)

    browser.visit(avisit if browser.asgi else visit)
    (texts,) = told
    for text in texts:
        assert key not in text, text[:200]


@pytest.mark.parametrize("before", [enlarge, end_elsewhere, damage_value])
def test_page_of_debug_shows_no_session_key(
    store: redis.Redis, browser: Browser, settings: Any, before: Does
) -> None:
    """The middleware saves, and nothing of the site is there to catch."""
    settings.CLUSTERED_SESSIONS_MAX_BYTES = 1000
    session = SessionStore()
    session["n"] = 1
    session.create()
    browser.key = key = session.session_key or ""

    def view(request: HttpRequest) -> HttpResponse:
        before(request.session)  # type: ignore[arg-type]
        return HttpResponse()

    for accept in ("text/html", "text/plain"):
        if accept == "text/plain" and not store.exists(place(key).record):
            continue
        response = browser.visit(view, headers={"accept": accept})
        assert response.status_code in (400, 500)
        text = response.content.decode()
        assert "Traceback" in text
        assert key not in text
