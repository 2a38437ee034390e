"""Requests while the store is away, by CLUSTERED_SESSIONS_NONSTOP: docs/outages.md."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import cycle
from typing import Any, get_args

import pytest
import redis
from django.contrib.auth import alogin, alogout, authenticate, login, logout
from django.contrib.auth.models import User
from django.core.management import call_command
from django.http import HttpRequest, HttpResponse
from django.template import RequestContext, Template
from django.utils.decorators import method_decorator
from django.views import View as ClassBasedView

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.conf import Nonstop
from django_clustered_sessions.decorators import session_locked, session_nonstop, session_read_only
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.session import near_cache
from django_clustered_sessions.store import clock
from django_clustered_sessions.store.circuit_breaker import breakers
from django_clustered_sessions.store.runner import report_the_rest
from tests.conftest import DATABASE, use_store
from tests.gateways import Browser, View, load_scripts, place
from tests.pairs import pairwise
from tests.servers import CountingProxy, StoreServer, free_port, wait_for

COOKIE = "sessionid"
EXCEPTION, NOOP, LOCAL, LOCAL_OR_EXCEPTION = BEHAVIOURS = get_args(Nonstop)

#: Each behaviour once, under WSGI and ASGI in turn: both run the code that looks at it.
each_behaviour = pytest.mark.parametrize(
    ("browser", "behaviour"),
    list(zip(["wsgi", "asgi", "wsgi", "asgi"], BEHAVIOURS, strict=True)),
    indirect=["browser"],
)


@pytest.fixture(params=["wsgi", "asgi"])
def browser(request: pytest.FixtureRequest, settings: Any) -> Browser:
    return Browser(settings, asgi=request.param == "asgi")


@pytest.fixture(autouse=True)
def begin(store: redis.Redis, settings: Any) -> None:
    near_cache.near_cache.clear()
    load_scripts(store)
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]


def back(proxy: CountingProxy) -> None:
    """Let the store be back, and be asked at once: how soon it is found is the breaker's test."""
    proxy.accept()
    proxy.resume()
    breakers.reset()


# Views; each says what it made of the session.


def read(request: HttpRequest) -> HttpResponse:
    session = request.session
    return HttpResponse(f"{session.get('n')} {session.is_local} {session.outage is not None}")


async def aread(request: HttpRequest) -> HttpResponse:
    session = request.session
    number = await session.aget("n")
    return HttpResponse(f"{number} {session.is_local} {session.outage is not None}")


def write(request: HttpRequest) -> HttpResponse:
    request.session["n"] = 2
    return HttpResponse("written")


async def awrite(request: HttpRequest) -> HttpResponse:
    await request.session.aset("n", 2)
    return HttpResponse("written")


def save(request: HttpRequest) -> HttpResponse:
    request.session["n"] = 2
    request.session.save()
    return HttpResponse("written")


async def asave(request: HttpRequest) -> HttpResponse:
    await request.session.aset("n", 2)
    await request.session.acommit()
    return HttpResponse("written")


def untouched(request: HttpRequest) -> HttpResponse:
    return HttpResponse("untouched")


async def auntouched(request: HttpRequest) -> HttpResponse:
    return HttpResponse("untouched")


def lock(request: HttpRequest) -> HttpResponse:
    with request.session.lock():
        return HttpResponse("locked")


async def alock(request: HttpRequest) -> HttpResponse:
    async with request.session.alock():
        return HttpResponse("locked")


def log_in(request: HttpRequest) -> HttpResponse:
    login(request, authenticate(request, username="ada", password="analytical"))
    return HttpResponse("welcome")


async def alog_in(request: HttpRequest) -> HttpResponse:
    user = await User.objects.aget(username="ada")
    await alogin(request, user, "django.contrib.auth.backends.ModelBackend")
    return HttpResponse("welcome")


def log_out(request: HttpRequest) -> HttpResponse:
    logout(request)
    return HttpResponse("bye")


async def alog_out(request: HttpRequest) -> HttpResponse:
    await alogout(request)
    return HttpResponse("bye")


def first(request: HttpRequest) -> HttpResponse:
    request.session["n"] = 1
    return HttpResponse()


AWAY = "503"
TABLE: dict[str, tuple[View, View, tuple[str, str, str, str]]] = {
    "reads, at hand": (read, aread, (AWAY, "None False True", *["1 True True"] * 2)),
    "reads, not at hand": (read, aread, (AWAY, "None False True", AWAY, AWAY)),
    "reads, no cookie": (read, aread, ("None False False",) * 4),
    "does not look": (untouched, auntouched, ("untouched",) * 4),
    "does not look, sliding": (untouched, auntouched, (AWAY, *["untouched"] * 3)),
    "writes, at hand": (write, awrite, (AWAY, "written", "written", AWAY)),
    "saves, at hand": (save, asave, (AWAY, "written", "written", AWAY)),
    "writes, not at hand": (write, awrite, (AWAY, "written", AWAY, AWAY)),
    "writes, no cookie": (write, awrite, (AWAY, "written", "written", AWAY)),
    "locked view": (session_locked(read), session_locked(aread), (AWAY,) * 4),
    "locks": (lock, alock, (AWAY,) * 4),
    "logs in": (log_in, alog_in, (AWAY,) * 4),
    "logs in, no cookie": (log_in, alog_in, (AWAY,) * 4),
    "logs out": (log_out, alog_out, (AWAY,) * 4),
}


def assert_is(response: Any, expected: str) -> None:
    """Compare an answer with a cell of the table; no answer touches the cookie."""
    assert COOKIE not in response.cookies
    if expected == AWAY:
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) > 0
    else:
        assert (response.status_code, response.content.decode()) == (200, expected)


@pytest.mark.django_db
@pairwise(row=TABLE, behaviour=BEHAVIOURS, browser=["wsgi", "asgi"], indirect=["browser"])
def test_outage_answers_as_the_table_says(
    browser: Browser, proxy: CountingProxy, settings: Any, row: str, behaviour: str
) -> None:
    view, aview, cells = TABLE[row]
    settings.CLUSTERED_SESSIONS_NONSTOP = behaviour
    settings.SESSION_SAVE_EVERY_REQUEST = "sliding" in row
    if "logs in" in row:
        User.objects.create_user("ada", password="analytical")
    browser.visit(first)
    visited = browser.another_tab()
    if "not at hand" in row:
        near_cache.near_cache.clear()
    if "no cookie" in row:
        del browser.client.cookies[COOKIE]
    proxy.refuse()
    cell = cells[BEHAVIOURS.index(behaviour)]
    # The last ones find the breaker open.
    for _ in range(4):
        assert_is(browser.visit(aview if browser.asgi else view), cell)
    back(proxy)
    settings.SESSION_SAVE_EVERY_REQUEST = False
    assert visited.visit(read).content == b"1 False False"


@each_behaviour
def test_store_away_before_the_save_is_met_by_behaviour(
    browser: Browser, proxy: CountingProxy, settings: Any, behaviour: str
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = behaviour

    def view(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 2
        proxy.refuse()
        return HttpResponse("written")

    browser.visit(first)
    expected = "written" if behaviour in (NOOP, LOCAL) else AWAY
    assert_is(browser.visit(view), expected)
    back(proxy)
    assert browser.visit(read).content == b"1 False False"


@each_behaviour
def test_silent_store_is_met_by_behaviour(
    browser: Browser, proxy: CountingProxy, settings: Any, behaviour: str
) -> None:
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 0.2
    settings.CLUSTERED_SESSIONS_NONSTOP = behaviour
    # A store that is slow for a moment leaves a site that goes on without a session.
    wait_for(lambda: COOKIE in browser.visit(first).cookies, "it has a session")
    proxy.stall()
    # Three that wait, and two that find the breaker open.
    for view in (read, write, log_out, write, log_out):
        response = browser.visit(view)
        assert COOKIE not in response.cookies
        if view is log_out or behaviour == EXCEPTION:
            assert response.status_code == 503
        elif view is read or behaviour == NOOP:
            assert response.status_code == 200
    back(proxy)
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 30
    assert browser.visit(read).content == b"1 False False"


@each_behaviour
def test_store_never_seen_is_met_by_behaviour(
    browser: Browser, settings: Any, behaviour: str
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = behaviour
    with StoreServer(port=free_port()) as server:
        use_store(settings, f"{server.url}/{DATABASE}")
        server.kill()
        browser.key = "x" * 32
        goes_on = "None False True" if behaviour == NOOP else AWAY
        assert_is(browser.visit(read), goes_on)
        browser.client.cookies.clear()
        assert_is(browser.visit(read), "None False False")
        assert_is(browser.visit(write), "written" if behaviour in (NOOP, LOCAL) else AWAY)
        server.start()
        assert browser.visit(first).cookies[COOKIE].value == browser.key
    assert browser.key


# What must never look as if it were.


@pytest.mark.django_db
@pairwise(
    behaviour=BEHAVIOURS, swallow=[True, False], browser=["wsgi", "asgi"], indirect=["browser"]
)
def test_logout_that_the_view_swallows_is_a_503(
    browser: Browser, proxy: CountingProxy, settings: Any, behaviour: str, swallow: bool
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = behaviour

    def view(request: HttpRequest) -> HttpResponse:
        request.session.get("n")
        with suppress(SessionStoreUnavailable):
            logout(request)
        return HttpResponse("you are logged out")

    def tolerant(request: HttpRequest) -> HttpResponse:
        request.session.tolerate_outage()
        return view(request)

    browser.visit(first)
    proxy.refuse()
    for _ in range(4):
        assert_is(browser.visit(view if swallow else tolerant), AWAY)
    back(proxy)
    assert browser.visit(read).content == b"1 False False"


@pytest.mark.django_db
@each_behaviour
def test_login_that_cannot_be_stored_any_more_is_a_503(
    browser: Browser, proxy: CountingProxy, settings: Any, behaviour: str
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = behaviour
    User.objects.create_user("ada", password="analytical")

    def view(request: HttpRequest) -> HttpResponse:
        log_in(request)
        proxy.refuse()
        return HttpResponse("welcome")

    def by_hand(request: HttpRequest) -> HttpResponse:
        request.session["_auth_user_id"] = "1"
        return HttpResponse("welcome")

    browser.visit(first)
    assert_is(browser.visit(view), AWAY)
    browser.client.cookies.clear()
    assert_is(browser.visit(by_hand), AWAY)


@each_behaviour
def test_new_key_that_the_browser_cannot_be_told_is_a_503(
    browser: Browser, proxy: CountingProxy, settings: Any, behaviour: str
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = behaviour

    def view(request: HttpRequest) -> HttpResponse:
        request.session.cycle_key()
        request.session["n"] = 2
        proxy.refuse()
        return HttpResponse()

    browser.visit(first)
    assert_is(browser.visit(view), AWAY)


@each_behaviour
def test_session_that_cannot_be_emptied_is_a_503(
    browser: Browser, proxy: CountingProxy, settings: Any, behaviour: str
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = behaviour

    def view(request: HttpRequest) -> HttpResponse:
        request.session.clear()
        return HttpResponse("emptied")

    browser.visit(first)
    proxy.refuse()
    assert_is(browser.visit(view), AWAY)


@pytest.mark.parametrize(
    ("browser", "behaviour"), [("wsgi", NOOP), ("asgi", LOCAL)], indirect=["browser"]
)
def test_store_back_within_the_request_gets_nothing(
    browser: Browser, proxy: CountingProxy, settings: Any, behaviour: str
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = behaviour

    def view(request: HttpRequest) -> HttpResponse:
        request.session["cart"] = {}
        back(proxy)
        request.session["n"] = 2
        request.session.save()
        with pytest.raises(SessionStoreUnavailable):
            request.session.cycle_key()
        return HttpResponse()

    browser.visit(first)
    proxy.refuse()
    response = browser.visit(view)
    # A key that could not be moved is no success, whoever catches it.
    assert_is(response, AWAY)
    assert SessionStore(browser.key).load() == {"n": 1}


def test_locked_view_drops_nothing_silently(
    browser: Browser, proxy: CountingProxy, settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = NOOP

    @session_locked
    def locked(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 2
        proxy.refuse()
        return HttpResponse("written")

    def locks(request: HttpRequest) -> HttpResponse:
        with suppress(SessionStoreUnavailable), request.session.lock():
            request.session["n"] = 2
            proxy.refuse()
        return HttpResponse("written")

    for view in (locked, locks):
        # A session of its own: the other one's lock is held until its lease is over.
        browser.client.cookies.clear()
        browser.visit(first)
        assert_is(browser.visit(view), AWAY)
        back(proxy)


@pytest.mark.parametrize(
    ("browser", "swallows"), [("wsgi", True), ("asgi", True), ("wsgi", False)], indirect=["browser"]
)
def test_template_that_swallows_a_refusal_is_replaced(
    browser: Browser, proxy: CountingProxy, settings: Any, swallows: bool
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = LOCAL
    source = "{% if not user.is_authenticated %}anonymous{% else %}in{% endif %}"

    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse(Template(source).render(RequestContext(request)))

    browser.visit(first)
    if swallows:
        near_cache.near_cache.clear()
    proxy.refuse()
    assert_is(browser.visit(view), AWAY if swallows else "anonymous")


# Local reads.


@contextmanager
def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> Iterator[None]:
    """Let the clock be later that sessions are measured by."""
    now = clock.now_s
    with monkeypatch.context() as patch:
        patch.setattr(clock, "now_s", lambda: now() + seconds)
        yield


@pytest.mark.parametrize(
    ("browser", "renewed"), [("wsgi", False), ("asgi", True)], indirect=["browser"]
)
def test_expired_session_is_not_served(
    browser: Browser,
    proxy: CountingProxy,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    renewed: bool,
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = LOCAL
    settings.SESSION_COOKIE_AGE = 1000
    browser.visit(first)
    if renewed:
        settings.SESSION_COOKIE_AGE = 2000
        settings.SESSION_SAVE_EVERY_REQUEST = True
        browser.visit(read)
    proxy.refuse()
    with later(monkeypatch, 990):
        assert_is(browser.visit(read), "1 True True")
    with later(monkeypatch, 1010):
        assert_is(browser.visit(read), "1 True True" if renewed else AWAY)
    with later(monkeypatch, 2010):
        assert_is(browser.visit(read), AWAY)


def test_local_session_knows_its_age(
    browser: Browser, proxy: CountingProxy, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = LOCAL

    def view(request: HttpRequest) -> HttpResponse:
        session = request.session
        session.set_expiry(500)
        return HttpResponse()

    def age(request: HttpRequest) -> HttpResponse:
        session = request.session
        session.get("n")
        return HttpResponse(f"{session.get_expiry_age() // 100} {session.is_local}")

    browser.visit(view)
    browser.visit(read)
    proxy.refuse()
    with later(monkeypatch, 150):
        assert_is(browser.visit(age), "3 True")


def delete(browser: Browser) -> None:
    SessionStore(browser.key).delete()


def flush(browser: Browser) -> None:
    key = browser.key
    browser.visit(log_out)
    browser.key = key


def rotate(browser: Browser) -> None:
    session = SessionStore(browser.key)
    session.get("n")
    session.cycle_key()


@pytest.mark.parametrize(
    ("browser", "end"), [("wsgi", delete), ("asgi", flush), ("wsgi", rotate)], indirect=["browser"]
)
def test_session_that_was_ended_here_is_not_served(
    browser: Browser, proxy: CountingProxy, settings: Any, end: Callable[[Browser], None]
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = LOCAL
    browser.visit(first)
    browser.visit(read)
    end(browser)
    proxy.refuse()
    assert_is(browser.visit(read), AWAY)


def test_load_under_way_at_the_end_leaves_nothing_to_serve(
    browser: Browser, proxy: CountingProxy, settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = LOCAL
    browser.visit(first)
    record = place(browser.key).record
    known, life = near_cache.near_cache.get(record), near_cache.near_cache.life(record)
    assert known is not None
    SessionStore(browser.key).delete()
    near_cache.near_cache.put(record, known, 10**6, life)
    proxy.refuse()
    assert_is(browser.visit(read), AWAY)


def test_key_that_may_have_moved_is_not_served(
    browser: Browser, proxy: CountingProxy, settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = LOCAL
    browser.visit(first)
    session = SessionStore(browser.key)
    session.get("n")
    proxy.cut_next("reply", matching=b"EVALSHA", times=2)
    with pytest.raises(SessionStoreUnavailable):
        session.cycle_key()
    proxy.refuse()
    assert_is(browser.visit(read), AWAY)


def test_failed_logout_is_not_served_either(
    browser: Browser, proxy: CountingProxy, settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = LOCAL
    browser.visit(first)
    proxy.refuse()
    assert_is(browser.visit(read), "1 True True")
    assert_is(browser.visit(log_out), AWAY)
    assert_is(browser.visit(read), AWAY)


def test_local_reads_share_nothing(browser: Browser, proxy: CountingProxy, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = LOCAL

    def fill(request: HttpRequest) -> HttpResponse:
        request.session["cart"] = {"x": 1}
        return HttpResponse()

    def add(request: HttpRequest) -> HttpResponse:
        request.session["cart"]["y"] = len(request.session["cart"])
        return HttpResponse(repr(request.session["cart"]))

    browser.visit(fill)
    proxy.refuse()
    before = counters.counts["local_reads"]
    for _ in range(2):
        assert_is(browser.visit(add), "{'x': 1, 'y': 1}")
    assert counters.counts["local_reads"] == before + 2
    back(proxy)
    assert SessionStore(browser.key).load() == {"cart": {"x": 1}}


# Per view.


class Page(ClassBasedView):
    def get(self, request: HttpRequest) -> HttpResponse:
        return read(request)


class MarkedPage(ClassBasedView):
    @method_decorator(session_nonstop("noop"))
    def get(self, request: HttpRequest) -> HttpResponse:
        return read(request)


def hidden(request: HttpRequest) -> HttpResponse:
    return session_nonstop("noop")(read)(request)


MARKED: dict[str, View] = {
    "function": session_nonstop("noop")(read),
    "coroutine": session_nonstop("noop")(aread),
    "class": method_decorator(session_nonstop("noop"), name="dispatch")(Page).as_view(),
    "method": MarkedPage.as_view(),
    "hidden": hidden,
    "outer read only": session_read_only(session_nonstop("noop")(read)),
    "inner read only": session_nonstop("noop")(session_read_only(read)),
}


@pairwise(
    view=list(MARKED),
    locking=["off", "all"],
    browser=["wsgi", "asgi"],
    indirect=["browser"],
)
def test_mark_of_the_view_counts(
    browser: Browser, proxy: CountingProxy, settings: Any, view: str, locking: str
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = locking
    browser.visit(first)
    proxy.refuse()
    for _ in range(4):
        assert_is(browser.visit(MARKED[view]), "None False True")
        assert_is(browser.visit(read), AWAY)


class Swallowing:
    """A middleware inside of ours that looks at the session, and does without."""

    def __init__(self, get_response: View) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        with suppress(SessionStoreUnavailable):
            request.session.get("n")
        return self.get_response(request)


@pytest.mark.parametrize(
    ("browser", "view"),
    [(kind, view) for kind, view in zip(cycle(["wsgi", "asgi"]), MARKED, strict=False)],
    indirect=["browser"],
)
def test_mark_of_the_view_counts_after_a_middleware_looked(
    browser: Browser, proxy: CountingProxy, settings: Any, view: str
) -> None:
    settings.MIDDLEWARE = [*settings.MIDDLEWARE, f"{__name__}.Swallowing"]
    browser.visit(first)
    proxy.refuse()
    assert_is(browser.visit(MARKED[view]), "None False True")
    assert_is(browser.visit(untouched), AWAY)


@pytest.mark.parametrize(
    ("browser", "mark"),
    [
        ("wsgi", session_nonstop("exception")),
        ("asgi", session_nonstop("exception")),
        ("asgi", lambda view: view),
    ],
    ids=["wsgi-marked", "asgi-marked", "asgi-plain"],
    indirect=["browser"],
)
def test_view_may_want_more_than_the_site(
    browser: Browser, proxy: CountingProxy, settings: Any, mark: Callable[[View], View]
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = NOOP
    settings.MIDDLEWARE = [*settings.MIDDLEWARE, f"{__name__}.Swallowing"]
    ran: list[int] = []

    def note(request: HttpRequest) -> HttpResponse:
        ran.append(1)
        return read(request)

    is_marked = mark(read) is not read
    browser.visit(first)
    proxy.refuse()
    for view in (mark(read), lambda request: mark(note)(request)):
        assert_is(browser.visit(view), AWAY if is_marked else "None False True")
    # Where the mark was hidden, the view does not begin with what it would not have.
    assert len(ran) == int(not is_marked)


def test_locking_by_the_setting_alone_is_locking(
    browser: Browser, proxy: CountingProxy, settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = NOOP
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    browser.visit(first)
    proxy.refuse()
    assert_is(browser.visit(read), AWAY)
    assert_is(browser.visit(session_nonstop("noop")(session_locked(read))), AWAY)
    assert_is(browser.visit(session_read_only(read)), "None False True")


def test_tolerant_view_goes_on_without_the_lock_of_the_setting(
    browser: Browser, proxy: CountingProxy, settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"

    def view(request: HttpRequest) -> HttpResponse:
        request.session.tolerate_outage()
        request.session["n"] = 2
        return HttpResponse("written")

    def locks(request: HttpRequest) -> HttpResponse:
        request.session.tolerate_outage()
        request.session.get("n")
        with request.session.lock():
            return HttpResponse("locked")

    browser.visit(first)
    proxy.refuse()
    assert_is(browser.visit(view), "written")
    assert_is(browser.visit(locks), AWAY)


def test_tolerant_view_learns_that_its_lock_wrote_nothing(
    browser: Browser, proxy: CountingProxy
) -> None:
    def loses(request: HttpRequest) -> HttpResponse:
        request.session.tolerate_outage()
        with suppress(SessionStoreUnavailable), request.session.lock():
            request.session["n"] = 2
            proxy.refuse()
        return HttpResponse("written")

    browser.visit(first)
    assert_is(browser.visit(loses), AWAY)


def test_decorator_knows_the_behaviours() -> None:
    with pytest.raises(ValueError, match=r"'none' is none of 'exception', 'noop'"):
        session_nonstop("none")  # type: ignore[arg-type]


def test_outside_of_requests_the_setting_is_no_matter(proxy: CountingProxy, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = NOOP
    proxy.refuse()
    with pytest.raises(SessionStoreUnavailable):
        SessionStore("x" * 32).load()


# The log.


@pytest.mark.full
@each_behaviour
def test_log_has_one_line_for_an_outage_and_one_for_its_end(
    browser: Browser,
    proxy: CountingProxy,
    settings: Any,
    behaviour: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = behaviour
    browser.visit(first)
    caplog.clear()
    proxy.refuse()
    for _ in range(40):
        browser.visit(read)
    lines = [
        record
        for record in caplog.records
        if record.levelname in ("WARNING", "ERROR") and record.name.startswith("django")
    ]
    # Two requests failed before the breaker opened; Django has a line for such a one too.
    assert len([line for line in lines if "is away" in line.getMessage()]) == 1
    assert len(lines) <= 5
    assert browser.key not in caplog.text
    proxy.accept()
    wait_for(
        lambda: browser.visit(read) and "is back" in caplog.text, "it is asked again", timeout_s=30
    )
    (line,) = [line for line in caplog.messages if "is back" in line]
    assert f"127.0.0.1:{proxy.port}" in line


@pytest.mark.parametrize(
    ("browser", "catches"), [("wsgi", False), ("asgi", True)], indirect=["browser"]
)
def test_request_that_fails_has_one_line_and_djangos(
    browser: Browser, proxy: CountingProxy, caplog: pytest.LogCaptureFixture, catches: bool
) -> None:
    def careful(request: HttpRequest) -> HttpResponse:
        with suppress(SessionStoreUnavailable):
            return read(request)
        return HttpResponse()

    browser.visit(first)
    caplog.clear()
    proxy.refuse()
    assert browser.visit(careful if catches else read).status_code == 503
    ours = [line for line in caplog.messages if line.startswith("answered 503: ")]
    assert len(ours) == 1
    djangos = [record for record in caplog.records if record.name == "django.request"]
    assert [record.getMessage() for record in djangos] == ["Service Unavailable: /"]


@pytest.mark.usefixtures("figures")
def test_figures_tell_of_it_afterwards(
    proxy: CountingProxy, settings: Any, browser: Browser
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = LOCAL
    settings.CLUSTERED_SESSIONS_NODE_NAME = "web-1"
    browser.visit(first)
    counters.drain(now=True)
    proxy.refuse()
    visits = 0
    # The more slowly they come, the more of them may ask whether the store is back.
    while not counters.counts["nonstop_trips"]:
        browser.visit(read)
        visits += 1
    back(proxy)
    report_the_rest()
    stdout = io.StringIO()
    call_command("sessionstats", format="json", stdout=stdout)
    (node,) = json.loads(stdout.getvalue())["nodes"]
    told = {name: node["counters"][name] for name in ("local_reads", "breaker_opened")}
    assert told == {"local_reads": visits, "breaker_opened": 1}
    assert node["counters"]["nonstop_trips"] == 1
    assert abs(node["reported_ms"] - node["counters"]["store_last_away_ms"]) < 60_000
    stdout = io.StringIO()
    call_command("sessionstats", stdout=stdout)
    _, _, table = stdout.getvalue().partition("Outages of the store")
    assert re.search(r"\nweb-1 .* \d+\.\d s +\d+ s ago *\n", table)


def test_request_that_goes_on_has_one_line_and_asks_once(
    browser: Browser, proxy: CountingProxy, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = NOOP
    settings.SESSION_SAVE_EVERY_REQUEST = True
    browser.visit(first)
    proxy.refuse()
    before = counters.counts["store_errors"]
    assert_is(browser.visit(read), "None False True")
    assert counters.counts["store_errors"] == before + 1
    assert len([line for line in caplog.messages if "goes on" in line]) == 1
