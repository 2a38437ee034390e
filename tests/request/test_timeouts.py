"""The end of a session, as pages and their scripts are told it: ``docs/timeouts.md``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from html import unescape
from typing import Any

import pytest
import redis
from asgiref.sync import async_to_sync
from django.contrib.auth import SESSION_KEY
from django.contrib.sessions.backends.base import UpdateError
from django.http import HttpResponse
from django.template import engines
from django.test import AsyncClient, Client
from django.urls import include, path
from django.utils import translation

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.session import finish, lock_scope
from tests.gateways import Browser, load_scripts, place
from tests.pairs import pairwise
from tests.servers import CountingProxy, StoreServer

EXPIRY, STAY = "/sessions/expiry/", "/sessions/stay/"
AGE_S, IDLE_S = 5000, 100


def log_in(request: Any) -> HttpResponse:
    request.session[SESSION_KEY] = "7"
    request.session.cycle_key()
    return HttpResponse()


def visit(request: Any) -> HttpResponse:
    request.session["n"] = 1
    return HttpResponse()


def page(request: Any) -> HttpResponse:
    if "look" in request.GET:
        request.session.get("n")
    engine = engines["django"]
    text = '{% include "clustered_sessions/expiry.html" with ' + request.GET["with"] + " %}"
    return HttpResponse(engine.from_string(text).render({}, request))


URLS = (
    path("sessions/", include("django_clustered_sessions.urls")),
    path("login/", log_in),
    path("visit/", visit),
    path("page/", page),
)


@pytest.fixture(params=["wsgi", "asgi"])
def browser(request: pytest.FixtureRequest, store: redis.Redis, settings: Any) -> Browser:
    settings.ROOT_URLCONF = URLS
    settings.SESSION_COOKIE_AGE = AGE_S
    settings.STATIC_URL = "/static/"
    return Browser(settings, asgi=request.param == "asgi")


def aged(store: redis.Redis, key: str, by_s: float, *, ends: bool = True) -> int:
    """Let a session have been made, and with ``ends`` used, so much earlier; return its end, ms."""
    at = place(key)
    meta = store.hget(at.record, "m:")
    assert meta is not None
    created_ms, deadline_ms = (int.from_bytes(meta[i : i + 6]) for i in (10, 16))
    created_ms -= round(by_s * 1000)
    if ends:
        deadline_ms -= round(by_s * 1000)
    times = created_ms.to_bytes(6) + deadline_ms.to_bytes(6)
    store.hset(at.record, "m:", meta[:10] + times + meta[22:])
    store.pexpireat(at.record, deadline_ms)
    return deadline_ms


def left_s(store: redis.Redis, key: str) -> float:
    return float(store.pttl(place(key).record)) / 1000


def deadline(store: redis.Redis, key: str) -> datetime:
    return datetime.fromtimestamp(store.pexpiretime(place(key).record) / 1000, UTC)


# expires_at()


Ask = Callable[[SessionStore], datetime | None]


async def _aask(session: SessionStore) -> datetime | None:
    return await session.aexpires_at()


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    return SessionStore.expires_at if request.param == "sync" else async_to_sync(_aask)


def stored(**values: Any) -> SessionStore:
    session = SessionStore()
    session.update(values)
    session.save()
    return session


def test_session_knows_when_it_ends(store: redis.Redis, ask: Ask, settings: Any) -> None:
    settings.USE_TZ = False
    saved = stored(a=1)
    key = saved.session_key or ""
    for session in (saved, SessionStore(key)):
        assert ask(session) == deadline(store, key)
    loaded = SessionStore(key)
    assert loaded["a"] == 1
    assert ask(loaded) == deadline(store, key)


def test_moved_session_ends_without_use_as_before(store: redis.Redis, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = IDLE_S
    settings.CLUSTERED_SESSIONS_ABSOLUTE_TIMEOUT = 10 * IDLE_S
    session = stored(a=1)
    session.cycle_key()
    left = store.pttl(place(session.session_key or "").record)
    assert 0 < left <= IDLE_S * 1000


def test_asking_for_the_end_renews_nothing(store: redis.Redis, ask: Ask, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = IDLE_S
    key = stored(a=1).session_key or ""
    aged(store, key, 50)
    before = deadline(store, key)
    session = SessionStore(key)
    assert ask(session) == before == deadline(store, key)
    # And it does not keep what is a use from being one.
    assert session["a"] == 1
    assert deadline(store, key) > before + timedelta(seconds=48)
    assert ask(session) == deadline(store, key)


def test_loaded_session_knows_its_end_without_a_trip(
    store: redis.Redis, proxy: CountingProxy, ask: Ask
) -> None:
    load_scripts(store)
    session = SessionStore(stored(a=1).session_key)
    assert session["a"] == 1
    proxy.reset()
    assert ask(session)
    assert proxy.round_trips == 0


def test_session_that_is_not_stored_ends_never(store: redis.Redis, ask: Ask) -> None:
    assert ask(SessionStore()) is None
    assert ask(SessionStore("x" * 32)) is None
    new = SessionStore()
    new["a"] = 1
    assert ask(new) is None


@pytest.mark.parametrize(
    ("ask", "ends"),
    [("sync", "flush"), ("async", "delete"), ("sync", "elsewhere"), ("async", "expired")],
    indirect=["ask"],
)
def test_ended_session_has_no_end(store: redis.Redis, ask: Ask, ends: str) -> None:
    session = stored(a=1)
    key = session.session_key or ""
    if ends == "flush":
        session.flush()
    elif ends == "delete":
        session.delete()
    elif ends == "elsewhere":
        SessionStore(key).flush()
        session = SessionStore(key)
    else:
        aged(store, key, AGE_S * 1000)
        session = SessionStore(key)
    assert ask(session) is None
    assert store.keys("*[^xs]") == [] or ends != "expired"


@pytest.mark.parametrize("known", ["nothing", "loaded", "by a lock"])
def test_page_that_asks_for_the_end_varies_by_cookie(browser: Browser, known: str) -> None:
    """An answer to nobody and one to a user must not be one entry of a shared cache."""
    asked: list[object] = []

    def view(request: Any) -> HttpResponse:
        session = request.session
        if known == "by a lock":
            session.run(lock_scope.lock(session.state), "alock()")
        else:
            session.get("a") if known == "loaded" else None
        session.accessed = False
        asked.append((session.expires_at(), session.left_s, session.is_at_hand))
        return HttpResponse()

    async def aview(request: Any) -> HttpResponse:
        asked.append(await request.session.aexpires_at())
        return HttpResponse()

    for cookie in ("", stored(a=1).session_key or ""):
        browser.key = cookie
        if cookie or known == "nothing":
            assert browser.visit(view).headers["Vary"] == "Cookie"
        if known == "nothing":
            assert browser.visit(aview).headers["Vary"] == "Cookie"


def test_each_answer_about_the_end_counts_as_access(store: redis.Redis) -> None:
    key = stored(a=1).session_key
    for tells in (
        SessionStore.expires_at,
        SessionStore.get_expiry_age,
        SessionStore.get_expiry_date,
        lambda session: session.left_s,
        lambda session: session.most_left_s,
        lambda session: session.is_at_hand,
    ):
        for session in (SessionStore(), SessionStore(key)):
            if session.session_key:
                session.expires_at()
            session.accessed = False
            tells(session)
            assert session.accessed


def test_expiry_counts_once_it_is_saved(store: redis.Redis, ask: Ask) -> None:
    session = stored(a=1)
    before = ask(session)
    session.set_expiry(10)
    assert ask(session) == before
    session.save()
    assert ask(session) == deadline(store, session.session_key or "")
    assert before
    assert ask(session) < before  # type: ignore[operator]


def test_damaged_session_ends_never(store: redis.Redis, ask: Ask) -> None:
    key = stored(a=1).session_key or ""
    store.hset(place(key).record, "m:", b"\1nonsense")
    assert ask(SessionStore(key)) is None


# An absolute timeout.


ABSOLUTE_S = 1000


def seconds_left(session: SessionStore, ask: Ask) -> float:
    end = ask(session)
    assert end is not None
    return (end - datetime.now(UTC)).total_seconds()


@pytest.fixture
def absolute(store: redis.Redis, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_ABSOLUTE_TIMEOUT = ABSOLUTE_S


@pytest.mark.usefixtures("absolute")
@pairwise(
    use=["read", "change", "cycle_key", "set_expiry"],
    idle=[None, IDLE_S],
    ask=["sync", "async"],
    indirect=["ask"],
)
def test_no_use_goes_beyond_the_absolute_timeout(
    store: redis.Redis, settings: Any, ask: Ask, use: str, idle: float | None
) -> None:
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = idle
    session = stored(a=1)
    aged(store, session.session_key or "", ABSOLUTE_S - 50, ends=False)
    session = SessionStore(session.session_key)
    if use == "read":
        assert session["a"] == 1
    elif use == "change":
        session["a"] += 1
        session.save()
    elif use == "cycle_key":
        session.cycle_key()
    else:
        session.set_expiry(timedelta(days=1))
        session.save()
    for known in (session, SessionStore(session.session_key)):
        assert 20 < seconds_left(known, ask) <= 50
    assert SessionStore(session.session_key).get_expiry_age() <= 50


@pytest.mark.usefixtures("absolute")
def test_login_begins_the_absolute_timeout_anew(store: redis.Redis, ask: Ask) -> None:
    session = stored(a=1)
    aged(store, session.session_key or "", ABSOLUTE_S - 50, ends=False)
    session = SessionStore(session.session_key)
    session.cycle_key()
    assert seconds_left(session, ask) <= 50
    session[SESSION_KEY] = "7"
    session.save()
    assert seconds_left(session, ask) > ABSOLUTE_S - 30
    aged(store, session.session_key or "", ABSOLUTE_S - 50, ends=False)
    # And not with what happens later, such as a new password.
    session.cycle_key()
    session["b"] = 1
    session.save()
    assert seconds_left(SessionStore(session.session_key), ask) <= 50


@pairwise(idle=[None, IDLE_S], is_known=[False, True], ask=["sync", "async"], indirect=["ask"])
def test_session_older_than_a_new_timeout_is_refused(
    store: redis.Redis, settings: Any, ask: Ask, idle: float | None, is_known: bool
) -> None:
    """Its deadline, set before, is far away."""
    keys = [stored(a=1).session_key or "" for _ in range(3)]
    for key in keys:
        if is_known:
            assert SessionStore(key).load() == {"a": 1}
        aged(store, key, ABSOLUTE_S + 50, ends=False)
    settings.CLUSTERED_SESSIONS_ABSOLUTE_TIMEOUT = ABSOLUTE_S
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = idle
    assert ask(SessionStore(keys[0])) is None
    read, changed, locked = (SessionStore(key) for key in keys)
    assert "a" not in read
    changed["b"] = 1
    assert changed.session_key is None
    with pytest.raises(UpdateError), locked.lock():
        pass
    assert store.keys("*[^xs]") == []


def test_new_timeout_holds_for_sessions_there_are(
    store: redis.Redis, settings: Any, ask: Ask
) -> None:
    key = stored(a=1).session_key or ""
    aged(store, key, ABSOLUTE_S - 50, ends=False)
    assert seconds_left(SessionStore(key), ask) > ABSOLUTE_S
    settings.CLUSTERED_SESSIONS_ABSOLUTE_TIMEOUT = ABSOLUTE_S
    loaded = SessionStore(key)
    assert loaded["a"] == 1
    for session in (loaded, SessionStore(key)):
        assert 20 < seconds_left(session, ask) <= 50
    assert 20 < loaded.get_expiry_age() <= 50


# The endpoint.


def test_endpoint_tells_how_long_the_session_lasts(browser: Browser, store: redis.Redis) -> None:
    assert browser.request(EXPIRY).json() == {
        "authenticated": False,
        "expires_in": None,
        "absolute_in": None,
    }
    browser.request("/visit/")
    most = left_s(store, browser.key)
    response = browser.request(EXPIRY)
    answer = response.json()
    assert left_s(store, browser.key) - 0.01 <= answer.pop("expires_in") <= most + 0.01
    assert answer == {"authenticated": False, "absolute_in": None}
    assert "no-store" in response["Cache-Control"]
    browser.request("/login/")
    assert browser.request(EXPIRY).json()["authenticated"] is True


@pytest.mark.usefixtures("absolute")
@pytest.mark.parametrize(
    ("browser", "by"), [("wsgi", "age"), ("asgi", "date")], indirect=["browser"]
)
def test_endpoint_tells_what_staying_cannot_move(
    browser: Browser, store: redis.Redis, settings: Any, by: str
) -> None:
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = IDLE_S
    browser.request("/login/")
    if by == "age":
        aged(store, browser.key, ABSOLUTE_S - 50, ends=False)
    else:
        session = SessionStore(browser.key)
        session.set_expiry(timedelta(seconds=50))
        session.save()
    for url, method in ((STAY, "post"), (EXPIRY, "get")):
        answer = browser.request(url, method).json()
        assert 20 < answer["expires_in"] <= answer["absolute_in"] <= 50


@pytest.mark.usefixtures("absolute")
def test_endpoint_tells_of_both_timeouts(browser: Browser, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = IDLE_S
    browser.request("/login/")
    answer = browser.request(EXPIRY).json()
    assert IDLE_S - 30 < answer["expires_in"] <= IDLE_S
    assert ABSOLUTE_S - 30 < answer["absolute_in"] <= ABSOLUTE_S


#: Each way to renew and to lock a session, under WSGI and ASGI.
each_renewal = pairwise(
    browser=["wsgi", "asgi"],
    every_request=[False, True],
    idle=[None, IDLE_S],
    lasts_s=["off", "all"],
    indirect=["browser", "lasts_s"],
)


@pytest.fixture
def lasts_s(
    request: pytest.FixtureRequest, settings: Any, every_request: bool, idle: float | None
) -> float:
    """Return how long a session lasts from its last use, where sessions are locked so."""
    settings.CLUSTERED_SESSIONS_LOCKING = request.param
    settings.SESSION_SAVE_EVERY_REQUEST = every_request
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = idle
    return idle or AGE_S


@each_renewal
def test_asking_keeps_nothing_alive(browser: Browser, store: redis.Redis, lasts_s: float) -> None:
    browser.request("/login/")
    key = browser.key
    deadline_ms = aged(store, key, 50)
    record = store.hgetall(place(key).record)
    for _ in range(2):
        response = browser.request(EXPIRY)
        assert response.json()["expires_in"] <= lasts_s - 50
        assert not response.cookies
    assert store.pexpiretime(place(key).record) == deadline_ms
    assert store.hgetall(place(key).record) == record


@each_renewal
def test_staying_renews_the_session_and_its_cookie(
    browser: Browser, store: redis.Redis, lasts_s: float
) -> None:
    browser.request("/login/")
    aged(store, browser.key, 50)
    response = browser.request(STAY, "post")
    answer = response.json()
    assert lasts_s - 30 < answer["expires_in"] <= lasts_s
    assert answer["authenticated"] is True
    assert lasts_s - 30 < left_s(store, browser.key) <= lasts_s
    assert lasts_s - 30 < response.cookies["sessionid"]["max-age"] <= lasts_s
    assert "no-store" in response["Cache-Control"]


def test_asking_and_staying_take_one_trip(
    store: redis.Redis, proxy: CountingProxy, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A response that is late asks the store once more.
    monkeypatch.setattr(finish, "LATE_S", float("inf"))
    load_scripts(store)
    settings.ROOT_URLCONF = URLS
    browser = Browser(settings)
    browser.request("/login/")
    for url, method in ((EXPIRY, "get"), (STAY, "post")):
        proxy.reset()
        assert browser.request(url, method).json()["authenticated"]
        assert proxy.round_trips == 1, url


class Early:
    """A middleware that has loaded the session before the view says how it uses it."""

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        request.session.get("a")
        return self.get_response(request)


def test_staying_renews_what_was_loaded_before(store: redis.Redis, settings: Any) -> None:
    settings.MIDDLEWARE = [*settings.MIDDLEWARE, f"{__name__}.Early"]
    settings.ROOT_URLCONF = URLS
    browser = Browser(settings)
    browser.request("/login/")
    before_ms = aged(store, browser.key, 50)
    response = browser.request(EXPIRY)
    assert not response.cookies
    assert store.pexpiretime(place(browser.key).record) == before_ms
    assert browser.request(STAY, "post").cookies
    assert store.pexpiretime(place(browser.key).record) > before_ms + 40_000


def test_endpoints_make_no_session(browser: Browser, store: redis.Redis) -> None:
    for key in ("", "x" * 32, "nonsense"):
        browser.key = key
        for url, method in ((EXPIRY, "get"), (STAY, "post")):
            assert browser.request(url, method).json()["expires_in"] is None
    assert store.keys("*[^xs]") == []


def test_asking_after_the_end_leaves_the_cookie_alone(browser: Browser) -> None:
    """Somebody may be logging in meanwhile: a late answer must not take away the new cookie."""
    browser.request("/login/")
    SessionStore(browser.key).flush()
    response = browser.request(EXPIRY)
    assert response.json() == {"authenticated": False, "expires_in": None, "absolute_in": None}
    assert not response.cookies
    # What somebody asks for himself does.
    browser.request(STAY, "post")
    assert browser.key == ""


@pytest.mark.parametrize(
    ("browser", "url", "wrong"),
    [("wsgi", EXPIRY, "post"), ("asgi", STAY, "get")],
    indirect=["browser"],
)
def test_endpoints_refuse_other_methods(browser: Browser, url: str, wrong: str) -> None:
    assert browser.request(url, wrong).status_code == 405


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_staying_needs_a_csrf_token(store: redis.Redis, settings: Any, kind: Any) -> None:
    """Also where the site has no middleware for it."""
    settings.ROOT_URLCONF = URLS
    browser = Browser(settings, asgi=kind is AsyncClient)
    browser.request("/login/")
    before_ms = aged(store, browser.key, 50)
    browser.client.handler.enforce_csrf_checks = True
    assert browser.request(STAY, "post").status_code == 403
    assert store.pexpiretime(place(browser.key).record) == before_ms
    settings.MIDDLEWARE = [*settings.MIDDLEWARE, "django.middleware.csrf.CsrfViewMiddleware"]
    browser.client.handler.load_middleware(is_async=browser.asgi)
    html = browser.request("/page/?with=a=1").content.decode()
    token = html.partition('name="csrfmiddlewaretoken" value="')[2].partition('"')[0]
    assert browser.request(STAY, "post", data={"csrfmiddlewaretoken": token}).status_code == 200
    assert store.pexpiretime(place(browser.key).record) > before_ms


@pairwise(
    nonstop=["exception", "noop", "local_reads"],
    endpoint=[(EXPIRY, "get"), (STAY, "post")],
    browser=["wsgi", "asgi"],
    indirect=["browser"],
    ids=lambda value: value[1] if isinstance(value, tuple) else None,
)
def test_store_that_is_away_is_not_a_logout(
    browser: Browser,
    store_server: StoreServer,
    settings: Any,
    caplog: pytest.LogCaptureFixture,
    nonstop: str,
    endpoint: tuple[str, str],
) -> None:
    settings.CLUSTERED_SESSIONS_NONSTOP = nonstop
    browser.request("/login/")
    settings.CACHES = settings.CACHES | {
        "sessions": settings.CACHES["sessions"] | {"LOCATION": "redis://127.0.0.1:1/1"}
    }
    for _ in range(5):
        response = browser.request(*endpoint)
        assert (response.status_code, response.json()) == (503, {"error": "away"})
        assert int(response["Retry-After"]) > 0
        assert "no-store" in response["Cache-Control"]
        assert not response.cookies
    # No line of Django's own for each, which would go to ADMINS by mail.
    assert [record for record in caplog.records if record.name.startswith("django.")] == []


def test_endpoints_require_no_login(store: redis.Redis, settings: Any) -> None:
    """A redirect to the login page would not say that the session is over."""
    required = "django.contrib.auth.middleware.LoginRequiredMiddleware"
    settings.MIDDLEWARE = [*settings.MIDDLEWARE, required]
    settings.ROOT_URLCONF = URLS
    browser = Browser(settings)
    assert browser.request("/visit/").status_code == 302
    assert browser.request(EXPIRY).status_code == 200
    assert browser.request(STAY, "post").status_code == 200


# The part of a page.


def data(browser: Browser, query: str) -> dict[str, str]:
    """Return the data attributes of the dialog."""
    html = browser.request(f"/page/?{query}").content.decode()
    tag = html.partition("<dialog")[2].partition(">\n")[0]
    pairs = (each.split('="', 1) for each in tag.split("data-")[1:])
    return {name: unescape(value.rpartition('"')[0]) for name, value in pairs}


def test_page_says_what_it_knows_without_a_trip(
    browser: Browser, store: redis.Redis, settings: Any
) -> None:
    assert json.loads(data(browser, "with=a=1")["known"])["authenticated"] is False
    browser.request("/login/")
    most = left_s(store, browser.key)
    # Not known, for nobody has looked into the session.
    assert data(browser, "with=a=1")["known"] == ""
    known = json.loads(data(browser, "look&with=a=1")["known"])
    assert left_s(store, browser.key) - 0.01 <= known.pop("expires_in") <= most + 0.01
    assert known == {"authenticated": True, "absolute_in": None}


@pytest.mark.parametrize(
    ("browser", "given", "age", "idle", "expected"),
    [
        ("wsgi", "a=1", 5000, None, "120"),
        ("asgi", "warn_before=30", 5000, None, "30"),
        ("wsgi", "warn_before=30", 5000, 40, "20"),
        ("asgi", "a=1", 90, None, "45"),
    ],
    indirect=["browser"],
)
def test_warning_comes_in_time(
    browser: Browser, settings: Any, given: str, age: int, idle: float | None, expected: str
) -> None:
    settings.SESSION_COOKIE_AGE, settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = age, idle
    settings.USE_THOUSAND_SEPARATOR, settings.LANGUAGE_CODE = True, "de"
    assert float(data(browser, f"with={given}")["warn-before"]) == float(expected)


@pytest.mark.parametrize("browser", ["wsgi"], indirect=True)
def test_links_are_those_of_the_site_or_given(browser: Browser, settings: Any) -> None:
    settings.LOGIN_URL = "/enter/"
    found = data(browser, "with=a=1")
    assert (found["login-url"], found["logout-url"]) == ("/enter/", "")
    found = data(browser, "with=login_url='/in/' logout_url='/out/'")
    assert (found["login-url"], found["logout-url"]) == ("/in/", "/out/")


@pytest.mark.parametrize("browser", ["wsgi"], indirect=True)
def test_texts_are_in_the_language_of_the_page(
    browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(translation._trans, "gettext", str.upper)
    html = browser.request("/page/?with=a=1").content.decode()
    texts = [text.strip() for text in re.findall(r">([^<>]+)<", html) if text.strip()]
    texts += [value for name, value in data(browser, "with=a=1").items() if name == "left"]
    assert len(texts) > 8
    assert [text for text in texts if text.upper() != text] == []
