"""The mail about a new sign-in, and the page behind its link."""

from __future__ import annotations

import asyncio
import io
import itertools
import logging
import re
from collections.abc import Iterator
from datetime import timedelta
from operator import methodcaller
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from django.conf.urls.i18n import i18n_patterns
from django.contrib.auth import alogin, login, logout, update_session_auth_hash
from django.contrib.auth.models import User
from django.contrib.sessions.backends.base import SessionBase
from django.core import mail, signing
from django.core.exceptions import ObjectDoesNotExist
from django.core.mail.backends import console
from django.core.mail.backends.locmem import EmailBackend
from django.http import HttpRequest, HttpResponse
from django.test import Client
from django.urls import include, path
from django.utils import timezone, translation
from rest_framework.decorators import api_view
from rest_framework.response import Response

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.protocol.record import SessionKeys
from django_clustered_sessions.session.client_info import Client as ClientInfo
from django_clustered_sessions.sign_ins import links
from django_clustered_sessions.sign_ins.mail import is_new, mail_about
from django_clustered_sessions.signals import session_created, session_login
from tests.catalogues import compile_into
from tests.gateways import GATEWAYS, Browser, records
from tests.locking import Threads
from tests.logins import BACKEND, log_in
from tests.pages import block
from tests.servers import CountingProxy

pytestmark = pytest.mark.django_db

FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:{}.0) Gecko/20100101 Firefox/{}.0"
FIREFOX_144 = FIREFOX.format(144, 144)
CHROME = (
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) "
    "Chrome/142.0.0.0 Safari/537.36"
)
EDGE = f"{CHROME} Edg/142.0.0.0"
LINK = re.compile(r"^http://testserver(/sessions/sign-in/\S+/)$", re.MULTILINE)
NAMES = itertools.count()


def enter(request: HttpRequest) -> HttpResponse:
    login(request, User.objects.get(username="ada"), backend=BACKEND)
    return HttpResponse("welcome")


async def aenter(request: HttpRequest) -> HttpResponse:
    user = await User.objects.aget(username="ada")
    await alogin(request, user, backend=BACKEND)
    return HttpResponse("welcome")


@api_view(["GET"])
def rest_enter(request: Any) -> Response:
    login(request, User.objects.get(username="ada"), backend=BACKEND)
    return Response("welcome")


def new_key(request: HttpRequest) -> HttpResponse:
    request.session.cycle_key()
    return HttpResponse("moved")


def new_password(request: HttpRequest) -> HttpResponse:
    request.user.set_password("fired-clay")
    request.user.save()
    update_session_auth_hash(request, request.user)
    return HttpResponse("changed")


def write(request: HttpRequest) -> HttpResponse:
    request.session["n"] = 1
    return HttpResponse("written")


def leave(request: HttpRequest) -> HttpResponse:
    logout(request)
    return HttpResponse("bye")


def whoami(request: HttpRequest) -> HttpResponse:
    return HttpResponse(request.user.get_username() or "nobody")


@pytest.fixture(autouse=True)
def site(settings: Any, store: redis.Redis) -> None:
    settings.CLUSTERED_SESSIONS_SIGN_IN_MAIL = "new"
    settings.CLUSTERED_SESSIONS_TRACK_CLIENTS = True
    settings.ROOT_URLCONF = (
        path("sessions/", include("django_clustered_sessions.urls")),
        path("enter/", enter),
        path("aenter/", aenter),
        path("rest/", rest_enter),
        path("key/", new_key),
        path("password/", new_password),
        path("leave/", leave),
        path("write/", write),
        path("whoami/", whoami),
    )


@pytest.fixture
def ada() -> User:
    return User.objects.create_user("ada", "ada@example.org", "fired-clay")


@pytest.fixture(params=GATEWAYS)
def browser(request: pytest.FixtureRequest, settings: Any) -> Browser:
    return Browser(settings, asgi=request.param == "asgi")


def signed_in(agent: str = FIREFOX_144, **options: Any) -> Client:
    """Return a browser that has logged in."""
    client = Client(headers={"user-agent": agent}, **options)
    assert client.get("/enter/").content == b"welcome"
    return client


def link() -> str:
    """Return the link of the last mail."""
    (found,) = LINK.findall(mail.outbox[-1].body)
    return str(found)


def name_of(client: Client) -> bytes:
    return bytes(client.get("/whoami/").content)


# The mail.


@pytest.mark.parametrize("view", ["enter", "aenter", "rest"])
def test_owner_is_told_of_a_sign_in(ada: User, browser: Browser, view: str) -> None:
    headers = {"user-agent": FIREFOX_144}
    assert browser.request(f"/{view}/", headers=headers).status_code == 200
    (sent,) = mail.outbox
    (session,) = registry.sessions_of(ada)
    assert sent.to == ["ada@example.org"]
    assert sent.subject.startswith("testserver: new sign-in from Firefox on Linux, ")
    assert "Hello ada," in sent.body and "127.0.0.1" in sent.body
    assert f"{session.created:%Y}" in sent.body
    assert browser.request("/whoami/").content == b"ada"
    assert len(mail.outbox) == 1
    page = Client().get(link())
    assert page.status_code == 200 and "Firefox on Linux" in page.content.decode()


def test_mail_and_page_have_no_session_key(
    ada: User, browser: Browser, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    browser.request("/enter/")
    key = browser.key
    pages = [
        browser.request(link()).content.decode(),
        browser.request(link(), "post").content.decode(),
        browser.request(link()).content.decode(),
    ]
    for text in (str(mail.outbox[0].message()), *pages, caplog.text):
        assert key and key not in text
        assert SessionKeys.of("session", key).id not in text


@pytest.mark.parametrize(
    ("agents", "mails"),
    [
        pytest.param([FIREFOX_144, FIREFOX_144], 1, id="the same"),
        pytest.param([FIREFOX_144, FIREFOX.format(150, 150)], 1, id="an update"),
        pytest.param([CHROME, EDGE], 2, id="another browser"),
        pytest.param(
            [FIREFOX_144, FIREFOX_144.replace("X11; Linux", "Windows NT")], 2, id="system"
        ),
        pytest.param(["", ""], 2, id="unknown"),
        pytest.param(["shopper/1", "shopper/2", "shopper/1"], 2, id="unknown to the parser"),
    ],
)
def test_mail_is_about_a_browser_that_no_other_session_has(
    ada: User, agents: list[str], mails: int
) -> None:
    for agent in agents:
        signed_in(agent)
    assert len(mail.outbox) == mails


def test_browser_of_a_session_that_is_over_is_new_again(ada: User) -> None:
    signed_in().get("/leave/")
    signed_in()
    assert len(mail.outbox) == 2


def test_browser_that_took_a_session_over_is_known(ada: User) -> None:
    client = signed_in(FIREFOX_144)
    client.get("/write/", headers={"user-agent": CHROME})
    signed_in(CHROME)
    assert len(mail.outbox) == 1


def test_of_two_logins_at_once_one_is_new(ada: User, settings: Any) -> None:
    """Neither may take the other for an older session of the same browser."""
    first, second = signed_in(), signed_in()
    sessions = registry.sessions_of(ada)
    assert sorted(is_new(one, sessions) for one in sessions) == [False, True]
    assert name_of(first) == name_of(second) == b"ada"


def test_all_tells_of_each_login(ada: User, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_SIGN_IN_MAIL = "all"
    client = signed_in()
    signed_in()
    assert len(mail.outbox) == 2
    client.get("/enter/")
    client.get("/key/")
    client.get("/password/")
    assert len(mail.outbox) == 2


def test_off_calls_nothing(ada: User, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_SIGN_IN_MAIL = "off"
    assert not session_login.has_listeners(SessionStore)
    signed_in()
    assert mail.outbox == []


def test_nothing_is_sent_without_an_address_or_a_request(ada: User) -> None:
    log_in(ada)
    ada.email = ""
    ada.save()
    signed_in()
    assert mail.outbox == []


@pytest.mark.parametrize(
    ("agent", "named"),
    [
        ("Your account is at risk, see http://evil.example", "an unknown browser"),
        # The parser takes the name of these from what stands there.
        ("You won at evil-example Bot/1.0", "an unknown browser"),
        ("You won at evil-example/1.0 CFNetwork/978 Darwin/18", "iOS"),
        (FIREFOX_144.replace("Firefox", "evil Spider"), "Linux"),
        ("HbbTV/1.1.1 (;x;evil;2015)", "an unknown browser"),
    ],
)
def test_words_of_a_user_agent_are_not_in_the_mail(ada: User, agent: str, named: str) -> None:
    """They are those of the person who has signed in."""
    signed_in(agent)
    (sent,) = mail.outbox
    assert "evil" not in sent.subject + sent.body
    assert f" from {named}, " in sent.subject


def test_link_can_be_copied_from_a_console(ada: User) -> None:
    signed_in()
    shown = io.StringIO()
    console.EmailBackend(stream=shown).send_messages(mail.outbox)
    (found,) = LINK.findall(shown.getvalue())
    assert Client().get(found).status_code == 200


def test_address_that_is_none_is_not_in_the_mail(ada: User) -> None:
    """Some middlewares take REMOTE_ADDR from a header, which is anybody's text."""
    signed_in(REMOTE_ADDR="see http://evil.example")
    (sent,) = mail.outbox
    assert "evil" not in sent.body
    assert "Address" not in sent.body


def test_user_name_is_as_it_is_in_the_mail(settings: Any) -> None:
    user = User.objects.create_user("o'hara+<b>", "o@example.org")

    def view(request: HttpRequest) -> HttpResponse:
        login(request, user, backend=BACKEND)
        return HttpResponse()

    settings.ROOT_URLCONF = (*settings.ROOT_URLCONF, path("other/", view))
    Client().get("/other/")
    assert "Hello o'hara+<b>," in mail.outbox[0].body


def test_mail_is_in_the_language_of_the_site(
    ada: User, browser: Browser, settings: Any, tmp_path: Any
) -> None:
    """A thief would choose one that the owner cannot read."""
    compile_into(tmp_path / "locale", settings)
    settings.MIDDLEWARE = [*settings.MIDDLEWARE, "django.middleware.locale.LocaleMiddleware"]
    settings.LANGUAGE_CODE = "de"
    before = translation.get_language()
    browser.request("/enter/", headers={"accept-language": "ja", "user-agent": FIREFOX_144})
    (sent,) = mail.outbox
    assert "neue Anmeldung" in sent.subject
    translation.activate(before)


def test_link_is_in_the_language_of_the_mail(ada: User, settings: Any) -> None:
    """Addresses begin with a language, which the page of the link then has."""
    settings.MIDDLEWARE = [*settings.MIDDLEWARE, "django.middleware.locale.LocaleMiddleware"]
    settings.LANGUAGE_CODE = "de"
    pages = i18n_patterns(path("sessions/", include("django_clustered_sessions.urls")))
    settings.ROOT_URLCONF = (path("enter/", enter), *pages)
    before = translation.get_language()
    Client().get("/enter/", headers={"accept-language": "ja", "user-agent": FIREFOX_144})
    translation.activate(before)
    (sent,) = mail.outbox
    assert "http://testserver/de/sessions/sign-in/" in sent.body


def test_mail_about_a_login_is_in_the_language_given(
    ada: User, settings: Any, tmp_path: Any
) -> None:
    compile_into(tmp_path / "locale", settings)
    subjects = []

    def note(client: ClientInfo | None, request: HttpRequest, **login: Any) -> None:
        about = (login["session_id"], login["user_id"], client, request)
        sent = mail_about(*about, language="ja")
        subjects.append(sent and sent.subject)

    session_login.connect(note)
    try:
        signed_in()
    finally:
        session_login.disconnect(note)
    assert "新しいログイン" in subjects[0]


def test_mail_has_the_time_zone_of_the_site(ada: User) -> None:
    with timezone.override("Asia/Tokyo"):
        signed_in()
    assert "(JST)" not in mail.outbox[0].body


def test_mail_trouble_does_not_break_the_login(
    ada: User,
    browser: Browser,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(self: EmailBackend, messages: Any) -> int:
        raise ConnectionRefusedError("no mail server")

    monkeypatch.setattr(EmailBackend, "send_messages", refuse)
    response = browser.request("/enter/")
    assert (response.status_code, response.content) == (200, b"welcome")
    assert browser.request("/whoami/").content == b"ada"
    (session,) = registry.sessions_of(ada)
    assert f"sign-in of session {session.id[:12]} could not be sent" in caplog.text
    assert "no mail server" in caplog.text and browser.key not in caplog.text


def test_missing_page_does_not_break_the_login(
    ada: User, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings.ROOT_URLCONF = settings.ROOT_URLCONF[1:]
    signed_in()
    assert "NoReverseMatch" in caplog.text
    (sent,) = mail.outbox
    assert "change your password now" in sent.body and "http" not in sent.body


def test_mail_comes_once_the_session_is_stored(ada: User, proxy: CountingProxy) -> None:
    """A login that the store has not got is none."""
    client = Client(raise_request_exception=False)
    proxy.refuse()
    assert client.get("/enter/").status_code == 503
    assert mail.outbox == []


def test_domain_is_that_of_the_request(ada: User, settings: Any) -> None:
    Client(headers={"host": "shop.example:8443"}).get("/enter/", secure=True)
    assert "https://shop.example:8443/sessions/sign-in/" in mail.outbox[0].body
    settings.ALLOWED_HOSTS = ["testserver"]


@pytest.mark.parametrize("with_sites", [False, True])
def test_forged_host_does_not_keep_the_mail_back(
    ada: User,
    settings: Any,
    browser: Browser,
    monkeypatch: pytest.MonkeyPatch,
    with_sites: bool,
) -> None:
    """Without CommonMiddleware the login succeeds."""
    settings.ALLOWED_HOSTS = ["testserver"]
    if with_sites:

        def unknown(request: HttpRequest) -> None:
            # django.contrib.sites without SITE_ID, whose table these tests do not have.
            raise ObjectDoesNotExist

        monkeypatch.setattr("django_clustered_sessions.sign_ins.mail.get_current_site", unknown)
    headers = {"host": "evil.example", "user-agent": FIREFOX_144}
    assert browser.request("/enter/", headers=headers).content == b"welcome"
    (sent,) = mail.outbox
    assert sent.subject == "Sign-in to your account"
    assert "Somebody has signed in to your account:" in sent.body
    assert "change your password now" in sent.body
    assert "http" not in sent.body and "evil" not in sent.body


def test_recipe_leaves_the_mail_to_a_task(ada: User, browser: Browser, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_SIGN_IN_MAIL = "off"
    sent: list[tuple[Any, ...]] = []
    task = SimpleNamespace(delay=lambda *arguments: sent.append(arguments))
    recipe: dict[str, Any] = {"send_later": task}
    exec(block("sign-ins.md", "send_later"), recipe)
    try:
        for agent in (FIREFOX_144, FIREFOX_144, CHROME):
            browser.client.cookies.clear()
            browser.request("/enter/", headers={"user-agent": agent})
    finally:
        session_login.disconnect(recipe["tell_owner"])
    assert [to for _, _, to in sent] == [["ada@example.org"]] * 2
    assert "Firefox on Linux" in sent[0][0] and LINK.search(sent[0][1])
    assert mail.outbox == []


# The link.


def test_link_ends_the_session(ada: User, browser: Browser) -> None:
    browser.request("/enter/", headers={"user-agent": FIREFOX_144})
    there = Client()
    url = link()
    asked = there.get(url)
    assert asked.status_code == 200 and "Was this you?" in asked.content.decode()
    assert browser.request("/whoami/").content == b"ada"
    ended = there.post(url)
    assert ended.status_code == 200 and "The session has ended." in ended.content.decode()
    assert browser.request("/whoami/").content == b"nobody"
    for method in ("get", "post"):
        again = getattr(there, method)(url)
        assert again.status_code == 410
        assert "That session had ended already." in again.content.decode()
    assert not there.cookies.get("sessionid")


@pytest.mark.parametrize("method", ["get", "post", "head"])
def test_link_makes_no_session(ada: User, store: redis.Redis, method: str) -> None:
    signed_in()
    url = link()
    before = len(records(store))
    client = Client()
    getattr(client, method)(url)
    assert "sessionid" not in client.cookies
    assert len(records(store)) == before - (method == "post")


@pytest.mark.parametrize("method", ["get", "post"])
def test_other_sites_are_not_told_the_link(ada: User, settings: Any, method: str) -> None:
    security = "django.middleware.security.SecurityMiddleware"
    settings.MIDDLEWARE = [security, *settings.MIDDLEWARE]
    settings.SECURE_REFERRER_POLICY = "unsafe-url"
    signed_in()
    assert getattr(Client(), method)(link())["Referrer-Policy"] == "same-origin"


def test_token_in_the_session_protects_the_end_as_well(ada: User, settings: Any) -> None:
    settings.CSRF_USE_SESSIONS = True
    signed_in()
    strict = Client(enforce_csrf_checks=True)
    page = strict.get(link()).content.decode()
    assert strict.post(link()).status_code == 403
    (token,) = re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', page)
    assert strict.post(link(), {"csrfmiddlewaretoken": token}).status_code == 200
    assert registry.sessions_of(ada) == []


@pytest.mark.parametrize("moves", [["key"], ["key", "key", "password"], ["password"]])
def test_link_follows_a_new_key(ada: User, store: redis.Redis, moves: list[str]) -> None:
    """Also when the tombstones of the old ones are gone."""
    client = signed_in()
    for move in moves:
        client.get(f"/{move}/")
    for key in store.scan_iter("session:*", _type="hash"):
        if store.hexists(key, "m:end"):
            store.delete(key)
    assert Client().post(link()).status_code == 200
    assert name_of(client) == b"nobody"


def test_key_that_moves_between_look_and_end_is_followed(
    ada: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = signed_in()
    end_session = registry.end_session
    moves = [True]

    def end(public_id: str) -> bool:
        if moves:
            moves.pop()
            client.get("/key/")
        return end_session(public_id)

    monkeypatch.setattr(registry, "end_session", end)
    assert Client().post(link()).status_code == 200
    assert name_of(client) == b"nobody"


@pytest.mark.parametrize("method", ["get", "post"])
def test_session_that_a_look_has_missed_is_found(
    ada: User, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A look at all buckets may come to the new one before a move, and to the old one after it."""
    client = signed_in()
    sessions_of = registry.sessions_of
    looks: list[int] = []

    def look(*args: Any, **kwargs: Any) -> Any:
        looks.append(1)
        return [] if len(looks) == 1 else sessions_of(*args, **kwargs)

    monkeypatch.setattr(registry, "sessions_of", look)
    assert getattr(Client(), method)(link()).status_code == 200
    assert name_of(client) == (b"nobody" if method == "post" else b"ada")


def test_link_ends_no_other_session_of_the_user(ada: User) -> None:
    first = signed_in()
    url = link()
    second = signed_in(CHROME)
    assert Client().post(url).status_code == 200
    assert (name_of(first), name_of(second)) == (b"nobody", b"ada")
    first.get("/enter/", headers={"user-agent": FIREFOX_144})
    assert Client().post(url).status_code == 410
    assert (name_of(first), name_of(second)) == (b"ada", b"ada")


def test_link_is_not_that_of_a_later_user_of_the_session(ada: User) -> None:
    client = signed_in()
    other = User.objects.create_user("bob")
    session = SessionStore(client.cookies["sessionid"].value)
    session["_auth_user_id"] = str(other.pk)
    session.save()
    assert Client().post(link()).status_code == 410
    assert len(registry.sessions_of(other)) == 1


def test_link_in_the_browser_itself_is_a_logout(ada: User, browser: Browser) -> None:
    browser.request("/enter/")
    url = link()
    assert b"that you are using now" in browser.request(url).content
    ended = browser.request(url, "post")
    assert b"The session has ended." in ended.content
    assert browser.key == ""
    assert registry.sessions_of(ada) == []


def test_link_of_a_user_who_is_deleted_still_ends_the_session(ada: User) -> None:
    signed_in()
    pk = ada.pk
    ada.delete()
    assert Client().get(link()).status_code == 200
    assert Client().post(link()).status_code == 200
    assert registry.sessions_of(pk) == []


@pytest.mark.parametrize("method", ["get", "post"])
def test_link_that_is_none_is_404(ada: User, method: str) -> None:
    client = signed_in()
    token = link().rstrip("/").rpartition("/")[2]
    payload, _, rest = token.partition(":")
    others = [
        "x",
        "a:b:c",
        token[:-1],
        token + "x",
        f"x{payload}:{rest}",
        signing.dumps(["1", 1]),
        signing.dumps(["1", 1], salt="django_clustered_sessions.lock"),
        "%00",
        "é" * 400,
    ]
    for other in others:
        response = getattr(Client(), method)(f"/sessions/sign-in/{other}/")
        assert response.status_code == 404, other
        assert "This link is not valid." in response.content.decode()
    assert name_of(client) == b"ada"


@pytest.mark.parametrize("method", ["get", "post"])
def test_link_expires(ada: User, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    client = signed_in()
    monkeypatch.setattr(links, "LIFE", timedelta(seconds=-1))
    response = getattr(Client(), method)(link())
    assert response.status_code == 410
    assert "This link has expired." in response.content.decode()
    assert name_of(client) == b"ada"


def test_link_outlives_a_new_secret_key(ada: User, settings: Any) -> None:
    client = signed_in()
    settings.SECRET_KEY_FALLBACKS = [settings.SECRET_KEY]
    settings.SECRET_KEY = "another one, for tests only"
    assert name_of(client) == b"ada"
    assert Client().post(link()).status_code == 200
    assert name_of(client) == b"nobody"


def test_end_is_protected_against_forgery(ada: User) -> None:
    victim = signed_in()
    strict = Client(enforce_csrf_checks=True)
    assert strict.post(link()).status_code == 403
    assert name_of(victim) == b"ada"
    token = re.findall(
        r'name="csrfmiddlewaretoken" value="(\w+)"', strict.get(link()).content.decode()
    )
    assert strict.post(link(), {"csrfmiddlewaretoken": token[0]}).status_code == 200
    assert name_of(victim) == b"nobody"


def test_page_needs_no_login(ada: User, settings: Any) -> None:
    settings.MIDDLEWARE = [
        *settings.MIDDLEWARE,
        "django.contrib.auth.middleware.LoginRequiredMiddleware",
    ]
    client = Client(headers={"user-agent": FIREFOX_144})
    session = SessionStore()
    client.force_login(ada)
    (found,) = registry.sessions_of(ada)
    url = f"/sessions/sign-in/{links.Login.of(found).sign()}/"
    assert session.session_key is None
    assert Client().get(url).status_code == 200
    assert Client().get(url).headers["Cache-Control"].startswith("max-age=0, no-cache")


def test_store_that_is_away_is_503(ada: User, proxy: CountingProxy) -> None:
    signed_in()
    proxy.refuse()
    client = Client(raise_request_exception=False)
    for method in ("get", "post"):
        assert getattr(client, method)(link()).status_code == 503


def test_two_clicks_at_once_end_it_once(ada: User, threads: Threads) -> None:
    victim = signed_in()
    login_ = links.Login.read(link().rstrip("/").rpartition("/")[2])
    ends = [threads.start(login_.end) for _ in range(4)]
    assert sorted(end.result() for end in ends) == [False, False, False, True]
    assert name_of(victim) == b"nobody"


def test_click_and_logout_at_once(ada: User, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = signed_in()
    end_session = registry.end_session

    def end(public_id: str) -> bool:
        victim.get("/leave/")
        return end_session(public_id)

    monkeypatch.setattr(registry, "end_session", end)
    assert Client().post(link()).status_code == 410
    assert registry.sessions_of(ada) == []


def test_page_leads_to_the_change_of_password(ada: User, settings: Any) -> None:
    signed_in()
    url = link()
    settings.ROOT_URLCONF = (
        *settings.ROOT_URLCONF,
        path("change/", whoami, name="password_change"),
    )
    assert 'href="/change/"' in Client().post(url).content.decode()
    settings.ROOT_URLCONF = (*settings.ROOT_URLCONF, path("reset/", whoami, name="password_reset"))
    assert 'href="/reset/"' in Client().get(url).content.decode()


# The signals.


@pytest.fixture
def heard() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    found: list[tuple[str, dict[str, Any]]] = []

    def created(signal: Any, sender: Any, **about: Any) -> None:
        found.append(("created", about))

    def logged_in(signal: Any, sender: Any, **about: Any) -> None:
        assert sender is SessionStore and registry.find(about["session_id"]) is not None
        found.append(("login", about))

    session_created.connect(created, dispatch_uid="test")
    session_login.connect(logged_in, dispatch_uid="test")
    yield found
    session_created.disconnect(dispatch_uid="test")
    session_login.disconnect(dispatch_uid="test")


@pytest.mark.parametrize("tracks", [True, False])
def test_signals_say_from_where(
    ada: User, browser: Browser, heard: list[Any], settings: Any, tracks: bool
) -> None:
    settings.CLUSTERED_SESSIONS_TRACK_CLIENTS = tracks
    browser.request("/enter/", headers={"user-agent": FIREFOX_144})
    client = ClientInfo("127.0.0.1", FIREFOX_144)
    public_id = SessionKeys.of("session", browser.key).id
    (created, _), (logged_in, about) = heard
    assert (created, logged_in) == ("created", "login")
    assert heard[0][1]["client"] == heard[1][1]["client"] == client
    assert (about["session_id"], about["user_id"]) == (public_id, str(ada.pk))
    assert isinstance(about["request"], HttpRequest) and about["request"].path == "/enter/"
    heard.clear()
    for page in ("key", "password", "enter", "leave"):
        browser.request(f"/{page}/")
    assert heard == []


def new_life(session: SessionBase) -> None:
    session.set_expiry(0)
    session.save()


def no_change(session: SessionBase) -> None:
    """Leave it as it is."""


@pytest.mark.parametrize(
    ("act", "who", "max_age"),
    [
        (no_change, b"ada", 1209600),
        (methodcaller("cycle_key"), b"ada", 1209600),
        (new_life, b"ada", ""),
        (methodcaller("flush"), b"nobody", None),
    ],
)
def test_cookie_is_as_a_receiver_leaves_the_session(
    ada: User, browser: Browser, act: Any, who: bytes, max_age: Any
) -> None:
    """It is told when the request has saved the session, which the cookie follows."""

    def receive(request: HttpRequest, **about: Any) -> None:
        act(request.session)

    session_login.connect(receive, dispatch_uid="test")
    try:
        response = browser.request("/enter/")
    finally:
        session_login.disconnect(dispatch_uid="test")
    cookie = response.cookies.get("sessionid")
    assert (cookie and cookie["max-age"]) == max_age
    assert browser.request("/whoami/").content == who


def saved(user: User, session: SessionBase) -> SessionBase:
    session["_auth_user_id"] = str(user.pk)
    session.save()
    return session


@pytest.mark.parametrize("limit", [None, 5])
def test_each_way_to_log_in_is_told_once(
    ada: User, heard: list[Any], settings: Any, limit: int | None
) -> None:
    settings.CLUSTERED_SESSIONS_MAX_SESSIONS_PER_USER = limit

    def logins() -> list[Any]:
        return [about for what, about in heard if what == "login"]

    log_in(ada)
    session = saved(ada, SessionStore())
    assert len(logins()) == 2
    assert {(one["user_id"], one["client"], one["request"]) for one in logins()} == {
        (str(ada.pk), None, None)
    }
    session.clear()
    saved(ada, session)
    assert len(logins()) == 2
    saved(User.objects.create_user("bob"), session)
    assert len(logins()) == 3
    session.flush()
    for is_stored in (False, True):
        expired = SessionStore()
        if is_stored:
            expired.create()
        expired["_auth_user_id"] = str(ada.pk)
        expired.set_expiry(-1)
        expired.save()
    assert len(logins()) == 3


@pytest.mark.parametrize("begins", [False, True])
def test_login_whose_session_moves_at_once_is_told(
    ada: User, browser: Browser, heard: list[Any], settings: Any, begins: bool
) -> None:
    """The id that it is told with is that of the session that goes on."""

    def view(request: HttpRequest) -> HttpResponse:
        login(request, ada, backend=BACKEND)
        request.session.cycle_key()
        return HttpResponse()

    settings.ROOT_URLCONF = (*settings.ROOT_URLCONF, path("moving/", view))
    if begins:
        browser.request("/write/")
    browser.request("/moving/")
    (about,) = (about for what, about in heard if what == "login")
    assert about["session_id"] == SessionKeys.of("session", browser.key).id
    assert len(registry.sessions_of(ada)) == 1
    assert Client().post(link()).status_code == 200 and registry.sessions_of(ada) == []


def test_login_is_told_by_the_twins(ada: User, heard: list[Any]) -> None:
    async def main() -> None:
        session = SessionStore()
        await session.aset("n", 1)
        await session.asave()
        await session.aset("_auth_user_id", str(ada.pk))
        await session.asave()

    asyncio.run(main())
    assert [(what, about["user_id"]) for what, about in heard] == [
        ("created", None),
        ("login", str(ada.pk)),
    ]
