"""The pages of "Your devices", over a real store."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
import redis
from django.contrib.auth.models import User
from django.http import HttpRequest
from django.test import AsyncClient, Client
from django.urls import include, path
from django.utils import translation

from django_clustered_sessions import registry
from tests.gateways import Browser

pytestmark = pytest.mark.django_db

LIST = "/devices/"
OTHERS = "/devices/end-others/"
NOWHERE = "A" * 43


@pytest.fixture(autouse=True)
def site(settings: Any, store: redis.Redis) -> None:
    """Serve the pages; there is no middleware against forgery, for the pages see to it."""
    settings.ROOT_URLCONF = (path("devices/", include("django_clustered_sessions.devices.urls")),)
    settings.LOGIN_URL = "/login/"
    settings.LOGOUT_REDIRECT_URL = "/bye/"


@pytest.fixture
def ada() -> User:
    return User.objects.create_user("ada")


@pytest.fixture
def bob() -> User:
    return User.objects.create_user("bob")


def logged_in(user: User, **options: Any) -> Client:
    client = Client(**options)
    client.force_login(user)
    return client


def id_of(client: Client) -> str:
    (entry,) = (
        entry
        for entry in registry.sessions_of(client.session["_auth_user_id"], current=client.session)
        if entry.is_current
    )
    return entry.id


def end(client: Client, id: str, **data: Any) -> Any:
    return client.post(f"{LIST}{id}/end/", data, follow=False)


def texts(response: Any) -> str:
    """Return what a page says, without its marks."""
    html = re.sub(r"<style.*?</style>", "", response.content.decode(), flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def names_of_the_site(request: HttpRequest) -> dict[str, str]:
    """Return what a site's context processor may give, under plain names."""
    names = ("rows", "count", "state", "session", "browser", "address", "days")
    return dict.fromkeys((*names, "has_others", "page_range", "password_url"), "the site's")


@pytest.mark.parametrize("url", [LIST, "/sessions/sign-in/none/"])
def test_pages_hide_no_name_of_the_site(ada: User, settings: Any, url: str) -> None:
    (engine,) = settings.TEMPLATES
    processors = [*engine["OPTIONS"]["context_processors"], f"{__name__}.names_of_the_site"]
    options = engine["OPTIONS"] | {"context_processors": processors}
    settings.TEMPLATES = [engine | {"OPTIONS": options}]
    settings.ROOT_URLCONF = (
        *settings.ROOT_URLCONF,
        path("sessions/", include("django_clustered_sessions.urls")),
    )
    context = logged_in(ada).get(url).context
    for name in names_of_the_site(HttpRequest()):
        assert context[name] == "the site's"


def test_own_sessions_are_listed_and_no_others(ada: User, bob: User) -> None:
    here, there, others = logged_in(ada), logged_in(ada), logged_in(bob)
    page = here.get(LIST)
    html = page.content.decode()
    assert "You are logged in on 2 devices." in texts(page)
    assert [row.entry.is_current for row in page.context["devices"]["rows"]] == [True, False]
    assert [row.entry.id for row in page.context["devices"]["rows"]] == [id_of(here), id_of(there)]
    assert id_of(others) not in html
    assert "in use now" in html
    assert str(here.session.session_key) not in html
    assert page.headers["Cache-Control"].startswith("max-age=0, no-cache, no-store")


def test_one_session_has_no_button_for_the_others(ada: User) -> None:
    page = texts(logged_in(ada).get(LIST))
    assert "You are logged in on 1 device." in page
    assert "Log out all others" not in page


def test_staff_is_told_which_setting_shows_browsers(ada: User, settings: Any) -> None:
    name = "CLUSTERED_SESSIONS_TRACK_CLIENTS"
    here = logged_in(ada)
    assert name not in texts(here.get(LIST))
    ada.is_staff = True
    ada.save()
    assert name in texts(here.get(LIST))
    settings.CLUSTERED_SESSIONS_TRACK_CLIENTS = True
    assert name not in texts(here.get(LIST))


def test_who_is_not_logged_in_goes_to_the_login() -> None:
    for url in (LIST, OTHERS, f"{LIST}{NOWHERE}/end/"):
        for send in (Client().get, Client().post):
            response = send(url)
            assert (response.status_code, response.url) == (302, f"/login/?next={url}")


def test_another_session_is_ended(ada: User) -> None:
    here, there = logged_in(ada), logged_in(ada)
    response = end(here, id_of(there))
    assert (response.status_code, response.url) == (302, LIST)
    assert "That device is logged out." in texts(here.get(LIST))
    assert there.get(LIST).status_code == 302
    assert registry.count_of(ada) == 1


def test_all_others_are_ended(ada: User, bob: User) -> None:
    here, there, elsewhere, others = (logged_in(user) for user in (ada, ada, ada, bob))
    assert here.post(OTHERS).url == LIST
    page = texts(here.get(LIST))
    assert "2 other devices are logged out." in page
    assert "You are logged in on 1 device." in page
    assert [client.get(LIST).status_code for client in (there, elsewhere, others)] == [
        302,
        302,
        200,
    ]
    here.post(OTHERS)
    assert "There was no other device that is logged in." in texts(here.get(LIST))


def test_session_in_use_is_logged_out(ada: User) -> None:
    here, there = logged_in(ada), logged_in(ada)
    response = end(here, id_of(here))
    assert (response.status_code, response.url) == (302, "/bye/")
    assert here.cookies["sessionid"].value == ""
    assert registry.count_of(ada) == 1
    assert there.get(LIST).status_code == 200


def test_session_of_another_user_is_not_found(ada: User, bob: User) -> None:
    here, others = logged_in(ada), logged_in(bob)
    assert end(here, id_of(others)).status_code == 404
    assert others.get(LIST).status_code == 200


def test_anonymous_session_is_not_found(ada: User, store: redis.Redis) -> None:
    anonymous = Client()
    session = anonymous.session
    session["cart"] = 1
    session.save()
    (id_,) = (
        key.decode().rpartition(":")[2] for key in store.scan_iter("session:*") if len(key) > 50
    )
    assert end(logged_in(ada), id_).status_code == 404
    assert anonymous.session["cart"] == 1


def test_wrong_id_is_not_found(ada: User) -> None:
    here = logged_in(ada)
    for id_ in ("A" * 42, "A" * 44, "ä" * 43, "%00" * 43, "A" * 42 + "*"):
        assert end(here, id_).status_code == 404, id_


def test_session_that_is_over_is_a_friendly_message(ada: User, store: redis.Redis) -> None:
    here, there, expired = logged_in(ada), logged_in(ada), logged_in(ada)
    ended, gone = id_of(there), id_of(expired)
    there.logout()
    session = expired.session
    session.set_expiry(timedelta(milliseconds=1))
    session.save()
    for id_ in (ended, gone, NOWHERE):
        assert end(here, id_).url == LIST
        page = here.get(LIST)
        assert "That device was logged out already." in texts(page)
    assert len(page.context["devices"]["rows"]) == 1


@pytest.mark.parametrize("middleware", [True, False])
def test_endings_need_a_token(ada: User, settings: Any, middleware: bool) -> None:
    if middleware:
        settings.MIDDLEWARE = [*settings.MIDDLEWARE, "django.middleware.csrf.CsrfViewMiddleware"]
    there = logged_in(ada)
    here = logged_in(ada, enforce_csrf_checks=True)
    other = id_of(there)
    assert end(here, other).status_code == here.post(OTHERS).status_code == 403
    assert registry.count_of(ada) == 2
    html = here.get(LIST).content.decode()
    tokens = re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', html)
    assert len(tokens) == html.count("<form") == 3
    assert end(here, other, csrfmiddlewaretoken=tokens[0]).status_code == 302
    assert registry.count_of(ada) == 1


def test_get_ends_nothing(ada: User) -> None:
    here = logged_in(ada)
    for url in (OTHERS, f"{LIST}{id_of(here)}/end/"):
        assert here.get(url).status_code == 405
    assert registry.count_of(ada) == 1


@pytest.mark.parametrize("asgi", [False, True])
def test_pages_work_under_wsgi_and_asgi(ada: User, settings: Any, asgi: bool) -> None:
    there = logged_in(ada)
    browser = Browser(settings, asgi=asgi)
    assert isinstance(browser.client, AsyncClient) is asgi
    browser.key = logged_in(ada).session.session_key or ""
    assert "You are logged in on 2 devices." in texts(browser.request(LIST))
    assert browser.request(f"{LIST}{id_of(there)}/end/", "post").status_code == 302
    page = browser.request(LIST)
    assert "That device is logged out." in texts(page)
    assert "You are logged in on 1 device." in texts(page)
    assert browser.request(OTHERS, "post").status_code == 302


def test_many_sessions_come_in_pages(ada: User) -> None:
    here = logged_in(ada)
    for _ in range(45):
        logged_in(ada)
    seen = []
    for number in (1, 2, 3):
        page = here.get(LIST, {"page": number})
        assert ("in use now" in texts(page)) is (number == 1)
        assert 'aria-current="page"' in page.content.decode()
        seen += [row.entry.id for row in page.context["devices"]["rows"]]
    assert len(set(seen)) == len(seen) == 46
    assert here.get(LIST, {"page": "4x"}).context["devices"]["rows"].number == 1


def test_pages_work_without_messages(ada: User, settings: Any) -> None:
    settings.INSTALLED_APPS = [
        app
        for app in settings.INSTALLED_APPS
        if app not in ("django.contrib.messages", "django.contrib.admin")
    ]
    settings.MIDDLEWARE = settings.MIDDLEWARE[:2]
    here, there = logged_in(ada), logged_in(ada)
    assert end(here, id_of(there)).status_code == 302
    assert here.get(LIST).status_code == 200


def test_pages_work_without_time_zones(ada: User, settings: Any) -> None:
    settings.USE_TZ = False
    here, _ = logged_in(ada), logged_in(ada)
    assert "just now" in texts(here.get(LIST))


def test_texts_can_be_translated(ada: User) -> None:
    with translation.override("de"):
        page = logged_in(ada).get(LIST, headers={"accept-language": "de"})
    assert '<html lang="de" dir="ltr">' in page.content.decode()
