"""``recent_login``: whom it lets through, whom it asks, and what confirms a login."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest
import redis
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth import alogin, login, update_session_auth_hash
from django.contrib.auth.backends import ModelBackend
from django.contrib.auth.models import User
from django.contrib.auth.signals import user_logged_in
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, HttpResponse
from django.test import Client, RequestFactory
from django.urls import include, path
from django.utils.decorators import method_decorator
from django.views import View
from django.views.debug import ExceptionReporter
from ninja import NinjaAPI
from rest_framework.authentication import BaseAuthentication
from rest_framework.decorators import api_view, authentication_classes
from rest_framework.response import Response
from rest_framework.views import APIView

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.decorators import marks_of, recent_login
from django_clustered_sessions.protocol.record import SessionKeys
from tests.gateways import Browser
from tests.locking import BOUND_S, Threads, outcome, wait_for_sleepers

pytestmark = pytest.mark.django_db

CONFIRM = "/sessions/confirm/"
PASSWORD = "fired-clay"
NAMES = itertools.count()


def say(request: Any) -> HttpResponse:
    return HttpResponse("let in")


@recent_login()
def sync_view(request: HttpRequest) -> HttpResponse:
    return say(request)


@recent_login(minutes=10)
async def async_view(request: HttpRequest) -> HttpResponse:
    return say(request)


@recent_login()
class Class(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return say(request)

    post = get


@recent_login()
class AsyncClass(View):
    async def get(self, request: HttpRequest) -> HttpResponse:
        return say(request)

    post = get


@method_decorator(recent_login(), name="dispatch")
class Dispatched(View):
    async def get(self, request: HttpRequest) -> HttpResponse:
        return say(request)

    post = get


class Method(View):
    @method_decorator(recent_login())
    def get(self, request: HttpRequest) -> HttpResponse:
        return say(request)

    post = get


class AsyncMethod(View):
    @method_decorator(recent_login())
    async def get(self, request: HttpRequest) -> HttpResponse:
        return say(request)

    post = get


class Plain(View):
    async def get(self, request: HttpRequest) -> HttpResponse:
        return say(request)

    post = get


@recent_login()
class RestClass(APIView):
    def get(self, request: Any) -> Response:
        return Response("let in")

    post = get


@api_view(["GET", "POST"])
@recent_login()
def rest_inside(request: Any) -> Response:
    return Response("let in")


@recent_login()
@api_view(["GET", "POST"])
def rest_outside(request: Any) -> Response:
    return Response("let in")


def ninja_urls() -> Any:
    api = NinjaAPI(urls_namespace=f"recent-{next(NAMES)}")

    @api.get("sync")
    @recent_login()
    def operation(request: HttpRequest, number: int = 1) -> Any:
        return "let in"

    @api.get("async")
    @recent_login()
    async def aoperation(request: HttpRequest, number: int = 1) -> Any:
        return "let in"

    return api.urls


def log_in_again(request: HttpRequest) -> HttpResponse:
    user = User.objects.get(username="ada")
    login(request, user, backend="django.contrib.auth.backends.ModelBackend")
    return say(request)


async def alog_in_again(request: HttpRequest) -> HttpResponse:
    user = await User.objects.aget(username="ada")
    await alogin(request, user, backend="django.contrib.auth.backends.ModelBackend")
    return say(request)


def confirm(request: HttpRequest) -> HttpResponse:
    request.session.confirm_login()
    return say(request)


async def aconfirm(request: HttpRequest) -> HttpResponse:
    await request.session.aconfirm_login()
    return say(request)


def move(request: HttpRequest) -> HttpResponse:
    request.session.cycle_key()
    return say(request)


def change_password(request: HttpRequest) -> HttpResponse:
    user = request.user
    assert user.is_authenticated
    user.set_password("another")
    user.save()
    update_session_auth_hash(request, user)
    return say(request)


def fill_in(request: HttpRequest) -> HttpResponse:
    request.session.update(json.loads(request.body))
    return say(request)


VIEWS: dict[str, Any] = {
    "sync": sync_view,
    "async": async_view,
    "class": Class.as_view(),
    "async class": AsyncClass.as_view(),
    "dispatch of an async class": Dispatched.as_view(),
    "method": Method.as_view(),
    "async method": AsyncMethod.as_view(),
    "view of an async class": recent_login()(Plain.as_view()),
    "api view class": RestClass.as_view(),
    "inside api_view": rest_inside,
    "outside api_view": rest_outside,
}
PAGES = [*VIEWS, "ninja/sync", "ninja/async"]
OTHERS = [log_in_again, alog_in_again, confirm, aconfirm, move, change_password, fill_in]


@pytest.fixture(autouse=True)
def site(settings: Any, store: redis.Redis) -> None:
    # Quick.
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
    settings.LOGIN_URL, settings.LOGIN_REDIRECT_URL = "/login/", "/home/"
    settings.ROOT_URLCONF = (
        path("sessions/", include("django_clustered_sessions.urls")),
        path("ninja/", ninja_urls()),
        *(path(name, view) for name, view in VIEWS.items()),
        *(path(view.__name__, view) for view in OTHERS),
    )


@pytest.fixture
def ada(site: None) -> User:
    return User.objects.create_user("ada", password=PASSWORD)


@pytest.fixture
def client(ada: User) -> Client:
    """Return a browser in which ada has logged in just now."""
    return logged_in(ada)


def logged_in(user: User, **options: Any) -> Client:
    client = Client(**options)
    client.force_login(user)
    return client


def long_ago(client: Client, store: redis.Redis, minutes: float = 11) -> None:
    """Have the login of a browser's session be that old."""
    record = SessionKeys.of("session", client.cookies["sessionid"].value).record
    packed = store.hget(record, "m:")
    at = datetime.now(UTC) - timedelta(minutes=minutes)
    created = int(at.timestamp() * 1000).to_bytes(6)
    store.hset(record, "m:", packed[:10] + created + packed[16:])


def is_let_in(client: Client, page: str = "sync") -> bool:
    response = client.get(f"/{page}")
    assert response.status_code in {200, 302}
    if response.status_code == 302:
        assert response.url.startswith(CONFIRM)
    return response.status_code == 200 and "let in" in response.content.decode()


@pytest.mark.parametrize("page", PAGES)
def test_recent_login_is_let_in_and_older_one_asked(
    client: Client, store: redis.Redis, page: str
) -> None:
    assert "let in" in client.get(f"/{page}").content.decode()
    long_ago(client, store)
    answer = client.get(f"/{page}?a=1&b=2")
    assert answer.status_code == 302
    place = urlsplit(answer.url)
    assert place.path == CONFIRM
    assert parse_qs(place.query) == {"next": [quote(f"/{page}") + "?a=1&b=2"]}
    assert "no-store" in answer["Cache-Control"]
    assert "Cookie" in answer["Vary"]
    assert client.session["_auth_user_id"]


@pytest.mark.parametrize("page", PAGES)
def test_the_same_under_asgi(ada: User, store: redis.Redis, settings: Any, page: str) -> None:
    browser = Browser(settings, asgi=True)
    browser.client.force_login(ada)
    assert "let in" in browser.request(f"/{page}").content.decode()
    long_ago(browser.client, store)
    assert browser.request(f"/{page}").status_code == 302


@pytest.mark.parametrize("page", ["sync", "async", "inside api_view", "ninja/sync"])
def test_nobody_is_sent_to_the_login(page: str) -> None:
    answer = Client().get(f"/{page}")
    assert answer.status_code == 302
    place = urlsplit(answer.url)
    assert (place.path, parse_qs(place.query)) == ("/login/", {"next": [quote(f"/{page}")]})


@pytest.mark.parametrize("page", ["sync", "async", "api view class", "ninja/async"])
def test_programs_get_a_reason(client: Client, store: redis.Redis, page: str) -> None:
    long_ago(client, store)
    answer = client.get(f"/{page}", headers={"Accept": "application/json"})
    assert answer.status_code == 401
    assert answer.json()["error"] == "login_not_recent"
    assert answer.json()["url"].startswith(f"{CONFIRM}?next=")
    assert "max_age=600" in answer["WWW-Authenticate"]
    stranger = Client().get(f"/{page}", headers={"Accept": "application/json"})
    assert (stranger.status_code, stranger.json()["error"]) == (401, "not_logged_in")
    html = client.get(f"/{page}", headers={"Accept": "text/html,application/json;q=0.9,*/*;q=0.8"})
    assert html.status_code == 302


def test_htmx_is_sent_to_the_page_and_back_to_its_own(client: Client, store: redis.Redis) -> None:
    long_ago(client, store)
    headers = {"HX-Request": "true", "HX-Current-URL": "http://testserver/profile/?tab=2"}
    answer = client.get("/sync", headers=headers)
    assert (answer.status_code, answer.content) == (401, b"login_not_recent")
    query = parse_qs(urlsplit(answer["HX-Redirect"]).query)
    assert query == {"next": ["http://testserver/profile/?tab=2"]}
    headers["HX-Current-URL"] = "https://evil.example/"
    answer = client.get("/sync", headers=headers)
    assert parse_qs(urlsplit(answer["HX-Redirect"]).query) == {"next": ["/sync"]}


@pytest.mark.parametrize(
    ("referer", "back"),
    [
        ("http://testserver/form/", "http://testserver/form/"),
        ("https://evil.example/form/", "/sync"),
        ("", "/sync"),
    ],
)
def test_refused_post_leads_back_to_its_form(
    client: Client, store: redis.Redis, referer: str, back: str
) -> None:
    long_ago(client, store)
    answer = client.post("/sync", headers={"Referer": referer})
    assert parse_qs(urlsplit(answer.url).query) == {"next": [back]}


def test_right_password_confirms_and_leads_back(client: Client, store: redis.Redis) -> None:
    long_ago(client, store)
    page = client.get(client.get("/sync?a=1").url)
    assert "ada" in page.content.decode()
    assert 'value="/sync?a=1"' in page.content.decode()
    assert "no-store" in page["Cache-Control"]
    answer = client.post(CONFIRM, {"password": PASSWORD, "next": "/sync?a=1"})
    assert answer.url == "/sync?a=1"
    assert is_let_in(client)


def test_wrong_password_confirms_nothing_and_logs_nobody_out(
    client: Client, store: redis.Redis
) -> None:
    from django.contrib.auth.signals import user_login_failed

    failed: list[Any] = []

    def on_failure(**kwargs: Any) -> None:
        failed.append(kwargs["credentials"]["username"])

    user_login_failed.connect(on_failure)
    long_ago(client, store)
    for password in ("wrong", "", PASSWORD + " "):
        answer = client.post(CONFIRM, {"password": password})
        assert answer.status_code == 200
        assert PASSWORD not in answer.content.decode()
    user_login_failed.disconnect(on_failure)
    assert failed == ["ada", "ada"]
    assert not is_let_in(client)
    assert client.session["_auth_user_id"]


def test_password_of_another_user_confirms_nothing(client: Client, store: redis.Redis) -> None:
    User.objects.create_user("bob", password="bobs")
    long_ago(client, store)
    assert client.post(CONFIRM, {"password": "bobs", "username": "bob"}).status_code == 200
    assert not is_let_in(client)


class Mistaken(ModelBackend):
    """A backend that takes one user for another."""

    def authenticate(self, request: Any, **credentials: Any) -> Any:
        return User.objects.exclude(username=credentials["username"]).first()


def test_backend_that_finds_another_user_confirms_nothing(
    client: Client, store: redis.Redis, settings: Any
) -> None:
    User.objects.create_user("bob")
    # The session's own backend has to be among them.
    settings.AUTHENTICATION_BACKENDS = [
        f"{__name__}.Mistaken",
        "django.contrib.auth.backends.ModelBackend",
    ]
    long_ago(client, store)
    assert client.post(CONFIRM, {"password": PASSWORD}).status_code == 200
    assert not is_let_in(client)


class Strict:
    """A backend for the login form of Django alone."""

    def authenticate(self, request: Any, username: str, password: str) -> Any:
        return User.objects.filter(email=username).first() if password == PASSWORD else None

    def get_user(self, key: Any) -> Any:
        return User.objects.filter(pk=key).first()


def test_backends_are_asked_as_by_the_login_form(
    ada: User, store: redis.Redis, settings: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(User, "USERNAME_FIELD", "email")
    User.objects.update(email="ada@example.org")
    settings.AUTHENTICATION_BACKENDS = [f"{__name__}.Strict"]
    client = logged_in(ada)
    long_ago(client, store)
    assert client.post(CONFIRM, {"password": PASSWORD}).status_code == 302
    assert is_let_in(client)


class Broken(ModelBackend):
    """A backend whose database is away."""

    def authenticate(self, request: Any, **credentials: Any) -> Any:
        del credentials
        raise ConnectionError


def test_error_report_shows_no_password(client: Client, settings: Any) -> None:
    settings.AUTHENTICATION_BACKENDS = [f"{__name__}.Broken", *settings.AUTHENTICATION_BACKENDS]
    client.raise_request_exception = False
    answer = client.post(CONFIRM, {"password": PASSWORD})
    report = ExceptionReporter(answer.wsgi_request, *answer.exc_info)
    assert "ConnectionError" in report.get_traceback_html()
    assert PASSWORD not in report.get_traceback_html()


@pytest.mark.parametrize("there", ["https://evil.example/", "//evil.example", "javascript:x", ""])
def test_way_back_is_the_sites_own(client: Client, there: str) -> None:
    assert client.post(CONFIRM, {"password": PASSWORD, "next": there}).url == "/home/"
    assert "evil" not in client.get(CONFIRM, {"next": there}).content.decode()


def test_confirming_needs_a_login_and_the_csrf_token(ada: User) -> None:
    assert Client().get(CONFIRM).url == f"/login/?next={CONFIRM}"
    strict = logged_in(ada, enforce_csrf_checks=True)
    assert strict.post(CONFIRM, {"password": PASSWORD}).status_code == 403


@pytest.mark.parametrize("how", ["confirm", "aconfirm", "log_in_again", "alog_in_again"])
def test_what_confirms_a_login(client: Client, store: redis.Redis, how: str) -> None:
    long_ago(client, store)
    assert not is_let_in(client)
    client.get(f"/{how}")
    assert is_let_in(client)


@pytest.mark.parametrize("how", ["move", "change_password"])
def test_confirmation_moves_with_the_key(client: Client, store: redis.Redis, how: str) -> None:
    long_ago(client, store)
    client.get("/confirm")
    before = client.cookies["sessionid"].value
    client.get(f"/{how}")
    assert client.cookies["sessionid"].value != before
    assert is_let_in(client)


@pytest.mark.parametrize("how", ["move", "change_password"])
def test_new_key_makes_no_login_recent(client: Client, store: redis.Redis, how: str) -> None:
    long_ago(client, store)
    client.get(f"/{how}")
    assert not is_let_in(client)


def test_confirmation_ends_after_the_minutes(
    client: Client, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_ago(client, store, minutes=60)
    client.get("/confirm")
    value = client.session["_login_confirmed"]
    assert is_let_in(client)
    session = client.session
    session["_login_confirmed"] = f"{int(value.split(':')[0], 16) - 700:x}:{value.split(':')[1]}"
    session.save()
    assert not is_let_in(client)


def test_confirmation_of_one_user_is_no_others(client: Client, store: redis.Redis) -> None:
    long_ago(client, store)
    client.get("/confirm")
    value = client.session["_login_confirmed"]
    bob = logged_in(User.objects.create_user("bob"))
    long_ago(bob, store)
    bob.post("/fill_in", json.dumps({"_login_confirmed": value}), "application/json")
    assert not is_let_in(bob)


@pytest.mark.parametrize("value", ["6a000000", "ffffffff:x", 1, None, True, {"a": 1}, "", ":"])
def test_values_of_a_view_confirm_nothing(client: Client, store: redis.Redis, value: Any) -> None:
    long_ago(client, store)
    client.post("/fill_in", json.dumps({"_login_confirmed": value}), "application/json")
    assert not is_let_in(client)


def test_confirmation_ends_with_a_logout(client: Client, ada: User, store: redis.Redis) -> None:
    client.get("/confirm")
    client.logout()
    client.force_login(ada)
    long_ago(client, store)
    assert not is_let_in(client)


def test_confirmation_after_an_ending_brings_nothing_back(client: Client) -> None:
    def end(request: HttpRequest) -> HttpResponse:
        assert request.session["_auth_user_id"]
        registry.end_session(request.session.public_id)
        request.session.confirm_login()
        return say(request)

    from django.conf import settings
    from django.urls import clear_url_caches

    settings.ROOT_URLCONF = (path("end", end),)
    clear_url_caches()
    assert client.get("/end").status_code == 400
    assert list(registry.matching()) == []


def test_clock_that_was_set_back_makes_no_login_recent(client: Client, store: redis.Redis) -> None:
    long_ago(client, store, minutes=-60)
    assert not is_let_in(client)


def test_store_that_is_away_lets_nobody_in(client: Client, settings: Any) -> None:
    settings.CACHES = {
        "default": {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": "redis://127.0.0.1:1"}
    }
    settings.SESSION_CACHE_ALIAS = "default"
    assert client.get("/sync").status_code == 503


def test_age_of_a_login(client: Client, store: redis.Redis) -> None:
    session = SessionStore()
    assert session.login_age() is None
    session["_auth_user_id"] = "1"
    assert session.login_age() == 0
    session.save()
    assert 0 <= SessionStore(session.session_key).login_age() < 60
    long_ago(client, store)
    loaded = SessionStore(client.cookies["sessionid"].value)
    assert 660 <= loaded.login_age() < 720
    loaded.confirm_login()
    assert 0 <= loaded.login_age() < 60
    loaded.cycle_key()
    assert 0 <= loaded.login_age() < 60


def test_nobodys_login_cannot_be_confirmed() -> None:
    with pytest.raises(ValueError, match="nobody is logged in"):
        SessionStore().confirm_login()


@pytest.mark.parametrize("minutes", [0, -1, "10", None, sync_view, float("nan")])
def test_minutes_have_to_be_a_number_above_zero(minutes: Any) -> None:
    with pytest.raises(ValueError, match="number above 0"):
        recent_login(minutes)


@pytest.mark.parametrize("view", [sync_view, async_view, Class.as_view()])
def test_view_is_served_from_no_copy(view: Any) -> None:
    assert marks_of(view).is_fresh


def test_call_without_a_request_is_refused() -> None:
    with pytest.raises(TypeError, match="without a Django request"):
        sync_view("no request")


def test_class_without_dispatch_is_refused() -> None:
    with pytest.raises(TypeError, match="no dispatch"):
        recent_login()(type("Nothing", (), {}))


def test_other_engine_lets_nobody_in() -> None:
    from django.contrib.sessions.backends.signed_cookies import SessionStore as Other

    request = RequestFactory().get("/")
    request.session = Other()
    with pytest.raises(ImproperlyConfigured, match="SESSION_ENGINE"):
        sync_view(request)


def test_missing_page_is_said(client: Client, store: redis.Redis, settings: Any) -> None:
    long_ago(client, store)
    settings.ROOT_URLCONF = (path("sync", sync_view),)
    with pytest.raises(ImproperlyConfigured, match="Include django_clustered_sessions.urls"):
        client.get("/sync")


def test_page_of_the_sites_own(client: Client, store: redis.Redis, settings: Any) -> None:
    settings.ROOT_URLCONF = (path("own", recent_login(confirm_url="/passkey/?a=1")(say)),)
    long_ago(client, store)
    assert client.get("/own").url == "/passkey/?a=1&next=%2Fown"


def test_check_costs_no_trip_and_a_confirmation_the_new_key(
    proxy: Any, ada: User, store: Any
) -> None:
    client = logged_in(ada)
    before = proxy.round_trips
    assert is_let_in(client)
    assert proxy.round_trips - before == 1
    before = proxy.round_trips
    client.get("/confirm")
    assert proxy.round_trips - before == 3


# The session's key, which somebody else may have as well.


def thief_of(client: Client) -> Client:
    """Return a browser with a copy of another one's cookies."""
    thief = Client()
    thief.cookies["sessionid"] = client.cookies["sessionid"].value
    return thief


@pytest.mark.parametrize(
    "how", ["page", "confirm", "aconfirm", "log_in_again", "alog_in_again", "under ASGI"]
)
def test_stolen_cookie_gains_nothing_by_a_confirmation(
    client: Client, ada: User, store: redis.Redis, settings: Any, how: str
) -> None:
    long_ago(client, store)
    thief = thief_of(client)
    if how == "page":
        client.post(CONFIRM, {"password": PASSWORD})
    elif how == "under ASGI":
        urls = settings.ROOT_URLCONF
        browser = Browser(settings, asgi=True)
        browser.client.cookies = client.cookies
        browser.visit(aconfirm)
        settings.ROOT_URLCONF = urls
    else:
        client.get(f"/{how}")
    assert client.cookies["sessionid"].value != thief.cookies["sessionid"].value
    assert is_let_in(client)
    answer = thief.get("/sync")
    assert answer.url.startswith("/login/")
    # Nor does its late answer log out the browser that has the new one.
    assert "sessionid" not in answer.cookies


def test_old_key_never_has_the_confirmation(client: Client, store: redis.Redis) -> None:
    """Somebody may use it between the two trips, and a process may end there."""
    long_ago(client, store)
    session = SessionStore(client.cookies["sessionid"].value)
    session["x"] = 1
    session.confirm_login()
    assert SessionStore(client.cookies["sessionid"].value).login_age() is None
    unsaved = SessionStore(session.session_key)
    assert unsaved.get("x") == 1
    assert unsaved.login_age() >= 660
    session.save()
    assert SessionStore(session.session_key).login_age() < 60


@pytest.mark.parametrize("is_async", [False, True])
def test_request_in_flight_goes_on_without_the_confirmation(
    client: Client, store: redis.Redis, is_async: bool
) -> None:
    long_ago(client, store)
    key = client.cookies["sessionid"].value

    def goes_on() -> None:
        session = SessionStore(key)
        assert session["_auth_user_id"]
        client.get("/confirm")
        with session.lock():
            # It has read the session anew.
            assert session["_login_confirmed"]
            assert session.login_age() >= 660
            session["x"] = 1

    async def agoes_on() -> None:
        session = SessionStore(key)
        assert await session.aget("_auth_user_id")
        await sync_to_async(client.get)("/confirm")
        async with session.alock():
            assert await session.aget("_login_confirmed")
            assert await session.alogin_age() >= 660
            await session.aset("x", 1)

    if is_async:
        async_to_sync(agoes_on)()
    else:
        goes_on()
    assert client.session["x"] == 1
    assert is_let_in(client)


def test_request_that_waits_for_the_confirming_one_is_asked(
    client: Client, store: redis.Redis, settings: Any, threads: Threads
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = BOUND_S
    long_ago(client, store)
    key = client.cookies["sessionid"].value
    thief = thief_of(client)
    session = SessionStore(key)

    def age() -> float | None:
        waiting = SessionStore(key)
        with waiting.lock():
            return waiting.login_age()

    with session.lock():
        asking = threads.start(age)
        wait_for_sleepers(store, 1)
        session.confirm_login()
    assert outcome(asking) >= 660
    assert SessionStore(session.session_key).login_age() < 60
    assert thief.get("/sync").url.startswith("/login/")


@pytest.mark.parametrize("is_async", [False, True])
def test_confirmation_is_not_for_the_one_who_has_moved_the_session(
    client: Client, store: redis.Redis, is_async: bool
) -> None:
    """A page that cycles the key gives a thief the new one while the user types the password."""
    long_ago(client, store)
    key = client.cookies["sessionid"].value
    session, thief = SessionStore(key), SessionStore(key)
    assert session["_auth_user_id"] == thief["_auth_user_id"]
    thief.cycle_key()
    thief.save()
    if is_async:
        async_to_sync(session.aconfirm_login)()
    else:
        session.confirm_login()
    session.save()
    assert session.login_age() >= 660
    assert SessionStore(thief.session_key).login_age() >= 660


def test_password_that_is_sent_twice_confirms_once(client: Client, store: redis.Redis) -> None:
    long_ago(client, store)
    both = [SessionStore(client.cookies["sessionid"].value) for _ in range(2)]
    for session in both:
        assert session["_auth_user_id"]
    for session in both:
        session.confirm_login()
        session.save()
    first, second = (session.session_key for session in both)
    assert second == client.cookies["sessionid"].value != first
    assert SessionStore(first).login_age() < 60


class ByHeader(BaseAuthentication):
    """Tokens, as far as this test needs them."""

    def authenticate(self, request: Any) -> Any:
        name = request.headers.get("X-Token")
        return (User.objects.get(username=name), None) if name else None


@api_view(["GET"])
@authentication_classes([ByHeader])
@recent_login()
def by_token(request: Any) -> Response:
    return Response(f"let in as {request.user}")


class ByTokenMethod(APIView):
    authentication_classes = (ByHeader,)

    @recent_login()
    def get(self, request: Any) -> Response:
        return Response(f"let in as {request.user}")


@pytest.mark.parametrize("view", [by_token, ByTokenMethod.as_view()], ids=["function", "method"])
def test_login_of_one_user_lets_no_other_in(client: Client, settings: Any, view: Any) -> None:
    User.objects.create_user("bob")
    settings.ROOT_URLCONF = (path("token", view),)
    assert client.get("/token", headers={"X-Token": "ada"}).content == b'"let in as ada"'
    answer = client.get("/token", headers={"X-Token": "bob", "Accept": "application/json"})
    assert (answer.status_code, answer.json()["error"]) == (401, "not_logged_in")


@pytest.mark.parametrize("is_asgi", [False, True], ids=["wsgi", "asgi"])
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("how", ["inactive", "deleted", "other password"])
def test_login_that_django_refuses_is_none(
    ada: User, settings: Any, page: str, how: str, is_asgi: bool
) -> None:
    browser = Browser(settings, asgi=is_asgi)
    browser.client.force_login(ada)
    if how == "inactive":
        User.objects.update(is_active=False)
    elif how == "deleted":
        ada.delete()
    else:
        ada.set_password("another")
        ada.save()
    answer = browser.request(f"/{page}")
    assert (answer.status_code, answer.url.partition("?")[0]) == (302, "/login/")


def by_header(get_response: Any) -> Any:
    """Return a middleware that names the user by a token, without a login."""

    def middleware(request: HttpRequest) -> Any:
        if name := request.headers.get("X-Token"):
            request.user = User.objects.get(username=name)
        return get_response(request)

    return middleware


@pytest.mark.parametrize("how", ["another's login", "no login"])
def test_password_confirms_only_the_own_login(
    client: Client, store: redis.Redis, settings: Any, how: str
) -> None:
    User.objects.create_user("bob", password="bobs")
    settings.MIDDLEWARE = [*settings.MIDDLEWARE, f"{__name__}.by_header"]
    client.raise_request_exception = False
    browser = client if how == "another's login" else Client(raise_request_exception=False)
    long_ago(client, store)
    answer = browser.post(CONFIRM, {"password": "bobs"}, headers={"X-Token": "bob"})
    assert answer.status_code == 403
    assert not is_let_in(client)


@pytest.mark.parametrize("whose", ["another's login", "no login"])
def test_login_for_a_token_confirms_no_session(
    client: Client, store: redis.Redis, settings: Any, whose: str
) -> None:
    bob = User.objects.create_user("bob")

    def give_token(request: HttpRequest) -> HttpResponse:
        user_logged_in.send(sender=User, request=request, user=bob)
        return HttpResponse("token")

    settings.ROOT_URLCONF = (*settings.ROOT_URLCONF, path("token", give_token))
    long_ago(client, store)
    browser = client if whose == "another's login" else Client()
    assert browser.get("/token").content == b"token"
    assert not is_let_in(client)
