"""The pages of "Your devices", over a real store."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
import redis
from django.contrib.auth.models import User
from django.template.loader import render_to_string
from django.test import AsyncClient, Client
from django.urls import include, path
from django.utils import timezone, translation

from django_clustered_sessions import registry
from django_clustered_sessions.devices import agents
from django_clustered_sessions.devices.rows import Row
from django_clustered_sessions.registry import Entry
from django_clustered_sessions.session import clients
from tests.gateways import Browser

pytestmark = pytest.mark.django_db

LIST = "/devices/"
OTHERS = "/devices/end-others/"
NOWHERE = "A" * 43

FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:133.0) Gecko/20100101 Firefox/133.0"


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


def test_own_sessions_are_listed_and_no_others(ada: User, bob: User) -> None:
    here, there, others = logged_in(ada), logged_in(ada), logged_in(bob)
    page = here.get(LIST)
    html = page.content.decode()
    assert "You are logged in on 2 devices." in texts(page)
    assert [row.entry.is_current for row in page.context["rows"]] == [True, False]
    assert [row.entry.id for row in page.context["rows"]] == [id_of(here), id_of(there)]
    assert id_of(others) not in html
    assert "in use now" in html
    assert str(here.session.session_key) not in html
    assert page.headers["Cache-Control"].startswith("max-age=0, no-cache, no-store")


def test_one_session_has_no_button_for_the_others(ada: User) -> None:
    page = texts(logged_in(ada).get(LIST))
    assert "You are logged in on 1 device." in page
    assert "Log out all others" not in page


@pytest.mark.parametrize("method", ["get", "post"])
@pytest.mark.parametrize("url", [LIST, OTHERS, f"{LIST}{NOWHERE}/end/"])
def test_who_is_not_logged_in_goes_to_the_login(method: str, url: str) -> None:
    response = getattr(Client(), method)(url)
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


def test_the_session_in_use_is_logged_out(ada: User) -> None:
    here, there = logged_in(ada), logged_in(ada)
    response = end(here, id_of(here))
    assert (response.status_code, response.url) == (302, "/bye/")
    assert here.cookies["sessionid"].value == ""
    assert registry.count_of(ada) == 1
    assert there.get(LIST).status_code == 200


def test_another_users_session_is_not_found(ada: User, bob: User) -> None:
    here, others = logged_in(ada), logged_in(bob)
    assert end(here, id_of(others)).status_code == 404
    assert others.get(LIST).status_code == 200


def test_an_anonymous_session_is_not_found(ada: User, store: redis.Redis) -> None:
    anonymous = Client()
    session = anonymous.session
    session["cart"] = 1
    session.save()
    (id_,) = (
        key.decode().rpartition(":")[2] for key in store.scan_iter("session:*") if len(key) > 50
    )
    assert end(logged_in(ada), id_).status_code == 404
    assert anonymous.session["cart"] == 1


@pytest.mark.parametrize("id_", ["A" * 42, "A" * 44, "ä" * 43, "%00" * 43, "A" * 42 + "*"])
def test_what_is_no_id_is_not_found(ada: User, id_: str) -> None:
    assert end(logged_in(ada), id_).status_code == 404


def test_a_session_that_is_over_is_a_friendly_message(ada: User, store: redis.Redis) -> None:
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
    assert len(page.context["rows"]) == 1


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


@pytest.mark.parametrize("url", [OTHERS, f"{LIST}{NOWHERE}/end/"])
def test_a_get_ends_nothing(ada: User, url: str) -> None:
    assert logged_in(ada).get(url).status_code == 405


@pytest.mark.parametrize("asgi", [False, True])
def test_the_pages_work_under_wsgi_and_asgi(ada: User, settings: Any, asgi: bool) -> None:
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
        seen += [row.entry.id for row in page.context["rows"]]
    assert len(set(seen)) == len(seen) == 46
    assert here.get(LIST, {"page": "4x"}).context["rows"].number == 1


def test_without_messages_the_pages_work_too(ada: User, settings: Any) -> None:
    settings.INSTALLED_APPS = [
        app
        for app in settings.INSTALLED_APPS
        if app not in ("django.contrib.messages", "django.contrib.admin")
    ]
    settings.MIDDLEWARE = settings.MIDDLEWARE[:2]
    here, there = logged_in(ada), logged_in(ada)
    assert end(here, id_of(there)).status_code == 302
    assert here.get(LIST).status_code == 200


def test_texts_can_be_translated(ada: User) -> None:
    with translation.override("de"):
        page = logged_in(ada).get(LIST, headers={"accept-language": "de"})
    assert '<html lang="de" dir="ltr">' in page.content.decode()


def tracked(user_agent: str, address: str = "2001:db8::7", **more: Any) -> Entry:
    """Return an entry of a site that keeps addresses and browsers."""
    now = timezone.now()
    last = clients.Client(address, user_agent)
    return Entry(NOWHERE, "1", now, now, now + timedelta(days=1), last=last, **more)


def rendered(rows: list[Row]) -> str:
    context = {"rows": rows, "count": len(rows), "has_addresses": True}
    return render_to_string("clustered_sessions/devices.html", context)


def test_browser_and_address_are_shown_where_they_are_known() -> None:
    row = Row(tracked(FIREFOX))
    html = rendered([row])
    assert "Firefox on Linux" in html
    assert "2001:db8::7" in html


def test_the_style_has_the_nonce_of_a_policy() -> None:
    html = render_to_string("clustered_sessions/base.html", {"csp_nonce": "n0nce"})
    assert '<style nonce="n0nce">' in html
    assert "<style>" in render_to_string("clustered_sessions/base.html")
    assert "{% comment" not in html


def test_what_a_browser_says_is_escaped() -> None:
    rows = [Row(tracked('<script>"&', address="<b>"))]
    html = rendered(rows)
    assert "<script" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;&quot;&amp;" in html


def test_the_first_is_shown_where_there_is_no_last() -> None:
    now = timezone.now()
    entry = Entry(NOWHERE, "1", now, now, now, first=clients.Client("192.0.2.1", ""))
    assert (Row(entry).address, Row(entry).browser) == ("192.0.2.1", "")


@pytest.mark.parametrize(
    ("user_agent", "name"),
    [
        (FIREFOX, "Firefox on Linux"),
        ("curl/8.5.0", "curl"),
        ("ShopKiosk/4.1\n terminal  17", "ShopKiosk/4.1 terminal 17"),
        ("x" * 61, "x" * 59 + "…"),
        ("x" * 60, "x" * 60),
        ("", ""),
    ],
)
def test_browsers_have_names(user_agent: str, name: str) -> None:
    assert agents.readable(user_agent) == name


def test_without_the_extra_a_browser_is_shown_in_its_own_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agents, "_parse", None)
    assert agents.readable(FIREFOX) == FIREFOX[:59] + "…"


@pytest.mark.parametrize(
    ("ago_s", "current", "words"),
    [
        (-90, False, "just now"),
        (59, False, "just now"),
        (300, False, "5\xa0minutes ago"),
        (9000, False, "2\xa0hours ago"),
        # Who looks at the page uses it now; its session may be renewed more rarely.
        (300, True, "just now"),
    ],
)
def test_last_seen_is_told_in_words(ago_s: int, current: bool, words: str) -> None:
    then = timezone.now() - timedelta(seconds=ago_s)
    assert Row(Entry(NOWHERE, "1", then, then, then, is_current=current)).seen == words
