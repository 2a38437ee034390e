"""Sessions in Django's admin, over a real store."""

from __future__ import annotations

import io
import re
from datetime import timedelta
from secrets import token_bytes
from typing import Any
from urllib.parse import quote

import pytest
import redis
from django.apps import apps
from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.contrib.sessions.serializers import JSONSerializer
from django.core.management import call_command
from django.db import connection
from django.test import Client
from django.urls import include, path

from django_clustered_sessions import registry
from django_clustered_sessions.admin import SPANS, USERS_PER_PAGE, SessionAdmin
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.models import Session
from django_clustered_sessions.monitoring import history
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol.commands import records
from django_clustered_sessions.protocol.options import Expiry, WriteOptions
from django_clustered_sessions.protocol.record import (
    Ages,
    Mode,
    SessionKeys,
    pack,
    session_id,
    user_tag,
)
from tests.gateways import Browser, load_scripts, place

pytestmark = pytest.mark.django_db

INDEX = "/admin/"
SESSIONS = "/admin/clustered_sessions/session/"
NOWHERE = "A" * 43


@pytest.fixture(autouse=True)
def site(settings: Any, store: redis.Redis) -> None:
    settings.ROOT_URLCONF = (path("admin/", admin.site.urls),)


@pytest.fixture
def ada() -> User:
    return User.objects.create_user("ada", "ada@example.org")


def staff(*permissions: str, **options: Any) -> Client:
    """Return a browser of somebody who may do only that."""
    user = User.objects.create_user("grace", is_staff=True)
    user.user_permissions.set(
        Permission.objects.get(codename=name, content_type__app_label="clustered_sessions")
        for name in permissions
    )
    return logged_in(user, **options)


def logged_in(user: User, **options: Any) -> Client:
    client = Client(**options)
    client.force_login(user)
    return client


def page_of(user: User) -> str:
    return f"{SESSIONS}users/{user.pk}/"


ODD = {
    "ends after the calendar": {"m:": (16, (2**48 - 1).to_bytes(6))},
    "created after the calendar": {"m:": (10, (2**48 - 1).to_bytes(6))},
    "seen after the calendar": {"m:": (32, (2**48 - 1).to_bytes(6))},
    "unknown mode": {"m:": (1, b"?")},
    "another format": {"m:": (0, b"\xff")},
    "user unreadable": {"d:_auth_user_id": (8, b"?")},
    "no browser": {"m:last": (0, b"[" * 100_000), "m:first": (0, b"\xff")},
}


@pytest.mark.parametrize("patches", ODD.values(), ids=ODD)
def test_odd_record_breaks_no_list(
    ada: User, settings: Any, store: redis.Redis, patches: dict[str, tuple[int, bytes]]
) -> None:
    devices = path("devices/", include("django_clustered_sessions.devices.urls"))
    settings.ROOT_URLCONF = (path("admin/", admin.site.urls), devices)
    settings.CLUSTERED_SESSIONS_TRACK_CLIENTS = True
    settings.TIME_ZONE = "Pacific/Kiritimati"
    odd, other, grace = logged_in(ada), logged_in(ada), staff("view_session")
    record = place(odd.session.session_key).record
    for field, (at, patch) in patches.items():
        before = store.hget(record, field) or b""
        store.hset(record, field, before[:at] + patch + before[at + len(patch) :])
    ours = SessionKeys.of("session", other.session.session_key).id
    assert ours in {entry.id for entry in registry.sessions_of(ada)}
    for client, page in ((other, "/devices/"), (grace, page_of(ada)), (grace, SESSIONS)):
        assert client.get(page).status_code == 200, page
    assert f"device-{ours}" in other.get("/devices/").content.decode()
    for options in ({}, {"format": "json"}, {"top_users": 3}):
        call_command("sessionstats", stdout=io.StringIO(), **options)


def id_of(client: Client) -> str:
    entries = registry.sessions_of(client.session["_auth_user_id"], current=client.session)
    return next(entry.id for entry in entries if entry.is_current)


def texts(response: Any) -> str:
    """Return what the main part of a page says, without its marks."""
    html = response.content.decode().partition("<main")[2]
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def logs() -> list[tuple[str, str, str, str]]:
    return [
        (str(log.user), str(log.content_type), log.object_repr, log.get_change_message())
        for log in LogEntry.objects.order_by("pk")
    ]


def log_in_often(user: User, store: redis.Redis, times: int) -> None:
    """Create that many sessions of a user as the engine would, but in few round trips."""
    load_scripts(store)
    fields = [("d:_auth_user_id", pack(JSONSerializer().dumps(str(user.pk))))]
    terms = WriteOptions(Ages(3_600_000), 1 << 20, 4000, "merge")
    pipeline = store.pipeline(transaction=False)
    for number in range(times):
        place = SessionKeys.of("session", f"{number:032}")
        expiry = Expiry(Mode.DEFAULT, 0)
        call = records.create(place, token_bytes(8), expiry, fields, terms, user_tag(user.pk))
        assert call.script
        words = (call.script.sha, len(call.keys), *call.keys, *call.arguments)
        pipeline.evalsha(*words)
        if number % 1000 == 999:
            pipeline.execute()


PAGES = ["", "?q=ada", "users/{ada}/", "users/{ada}/end/", "users/{ada}/end/{id}/"]


def urls(ada: User) -> list[str]:
    id_ = id_of(logged_in(ada))
    return [SESSIONS + page.format(ada=ada.pk, id=id_) for page in PAGES]


@pytest.mark.parametrize("method", ["get", "post"])
def test_who_is_not_staff_goes_to_the_login(ada: User, method: str) -> None:
    User.objects.filter(pk=ada.pk).update(is_superuser=True)
    pages = urls(ada)
    for client in (Client(), logged_in(ada)):
        for url in pages:
            response = getattr(client, method)(url)
            assert (response.status_code, response.url) == (302, f"/admin/login/?next={quote(url)}")
    assert registry.count_of(ada) == 2


@pytest.mark.parametrize("may", [[], ["delete_session"]])
def test_staff_without_the_permission_is_refused(ada: User, may: list[str]) -> None:
    client = staff(*may)
    pages = urls(ada)
    for send in (client.get, client.post):
        assert [send(url).status_code for url in pages] == [403] * len(PAGES)
    assert registry.count_of(ada) == 1
    assert logs() == []


@pytest.mark.parametrize("method", ["get", "post"])
def test_who_may_only_look_ends_nothing(ada: User, method: str) -> None:
    client = staff("view_session")
    found = [getattr(client, method)(url).status_code for url in urls(ada)]
    assert found == [200, 302, 200, 403, 403]
    assert registry.count_of(ada) == 1
    page = client.get(page_of(ada)).content.decode()
    assert "/end/" not in page


@pytest.mark.parametrize(("may", "listed"), [(["view_session"], True), ([], False)])
def test_index_lists_sessions_for_whom_they_are(may: list[str], listed: bool) -> None:
    page = staff(*may).get(INDEX).content.decode()
    assert (SESSIONS in page) is listed
    assert ("app-clustered_sessions" in page) is listed


def test_permissions_come_without_a_table() -> None:
    found = Permission.objects.filter(content_type__app_label="clustered_sessions")
    assert {permission.codename for permission in found} == {"view_session", "delete_session"}
    assert not [
        name for name in connection.introspection.table_names() if "clustered_sessions" in name
    ]


def test_commands_live_with_a_model_without_a_table(ada: User) -> None:
    out = io.StringIO()
    call_command("makemigrations", check=True, dry_run=True, stdout=out)
    assert "No changes detected" in out.getvalue()
    for every in (False, True):
        dumped = io.StringIO()
        call_command("dumpdata", use_base_manager=every, stdout=dumped)
        assert '"auth.user"' in dumped.getvalue()
        assert "clustered_sessions.session" not in dumped.getvalue()
    with pytest.raises(TypeError, match="no table"):
        Session().save()
    assert apps.get_model("clustered_sessions", "Session") is Session


def test_only_user_who_matches_is_shown_at_once(ada: User) -> None:
    User.objects.create_user("bob")
    client = staff("view_session")
    for query in ("ada", "AD", "example.org", " ada ", str(ada.pk)):
        response = client.get(SESSIONS, {"q": query})
        assert (response.status_code, response.url) == (302, page_of(ada)), query


def test_users_who_match_are_listed(ada: User) -> None:
    User.objects.bulk_create(User(username=f"adam{n:02}") for n in range(USERS_PER_PAGE + 2))
    client = staff("view_session")
    first, second = (client.get(SESSIONS, {"q": "ada", "p": n}) for n in (1, 2))
    assert f"{USERS_PER_PAGE + 3} users" in texts(first)
    assert page_of(ada) in first.content.decode()
    assert "?q=ada&amp;p=2" in first.content.decode()
    assert "adam21" not in texts(first)
    assert "adam21" in texts(second)


def test_search_without_a_match_says_so(ada: User) -> None:
    client = staff("view_session")
    for query in ("nobody", "9" * 40, "\0", "'; --", "ä", "%", "2147483648"):
        page = client.get(SESSIONS, {"q": query})
        assert page.status_code == 200
        # PostgreSQL refuses a zero, and SQLite's LIKE ends there; nothing is searched for by it.
        assert ("No user matches." in texts(page)) is (query != "\0"), query
        assert ("figures" in page.context) is (query == "\0"), query


def test_sessions_of_a_user_are_shown(ada: User) -> None:
    client = staff("view_session", "delete_session")
    browsers = [logged_in(ada) for _ in range(2)]
    page = client.get(page_of(ada))
    for browser in browsers:
        assert id_of(browser)[:12] in texts(page)
        assert f"{page_of(ada)}end/{id_of(browser)}/" in page.content.decode()
        assert str(browser.session.session_key) not in page.content.decode()
    assert "2 sessions" in texts(page)
    assert f'{page_of(ada)}end/"' in page.content.decode()
    nobody = User.objects.create_user("bob")
    assert "bob is logged in nowhere." in texts(client.get(page_of(nobody)))


def test_one_session_is_ended(ada: User) -> None:
    client = staff("view_session", "delete_session")
    gone, stays = logged_in(ada), logged_in(ada)
    id_ = id_of(gone)
    url = f"{page_of(ada)}end/{id_}/"
    question = client.get(url)
    assert "Do you want to end this session of ada?" in texts(question)
    assert 'method="post"' in question.content.decode()
    assert registry.count_of(ada) == 2
    response = client.post(url)
    assert (response.status_code, response.url) == (302, page_of(ada))
    assert "The session has ended." in texts(client.get(page_of(ada)))
    assert not gone.session.get("_auth_user_id")
    assert registry.sessions_of(ada)[0].id == id_of(stays)
    assert logs() == [
        ("grace", "Authentication and Authorization | user", "ada", f"Ended session {id_[:12]}.")
    ]


def test_all_sessions_are_ended(ada: User) -> None:
    client = staff("view_session", "delete_session")
    for _ in range(3):
        logged_in(ada)
    bob = User.objects.create_user("bob")
    logged_in(bob)
    url = f"{page_of(ada)}end/"
    assert "Do you want to end 3 sessions of ada?" in texts(client.get(url))
    assert registry.count_of(ada) == 3
    assert client.post(url).url == page_of(ada)
    assert "3 sessions have ended." in texts(client.get(page_of(ada)))
    assert (registry.count_of(ada), registry.count_of(bob)) == (0, 1)
    assert [log[2:] for log in logs()] == [("ada", "Ended 3 sessions.")]
    for method in ("get", "post"):
        assert getattr(client, method)(url).url == page_of(ada)
        assert "There is no session to end." in texts(client.get(page_of(ada)))
    assert len(logs()) == 1


def test_ending_all_keeps_the_session_in_use() -> None:
    client = staff("view_session", "delete_session")
    grace = User.objects.get()
    logged_in(grace)
    url = f"{page_of(grace)}end/"
    assert "End all others" in texts(client.get(page_of(grace)))
    assert "The session that you use now goes on." in texts(client.get(url))
    client.post(url)
    assert [entry.id for entry in registry.sessions_of(grace)] == [id_of(client)]


def test_session_in_use_can_be_ended() -> None:
    client = staff("view_session", "delete_session")
    grace = User.objects.get()
    url = f"{page_of(grace)}end/{id_of(client)}/"
    assert "you will be logged out" in texts(client.get(url))
    assert client.post(url).url == INDEX
    assert client.cookies["sessionid"].value == ""
    assert (registry.count_of(grace), len(logs())) == (0, 1)


@pytest.mark.parametrize("method", ["get", "post"])
def test_session_that_is_not_there_is_a_friendly_message(ada: User, method: str) -> None:
    client = staff("view_session", "delete_session")
    bob = User.objects.create_user("bob")
    others, expired, ended = id_of(logged_in(bob)), logged_in(ada), logged_in(ada)
    ids = [NOWHERE, "no-id", others, id_of(expired), id_of(ended)]
    ended.logout()
    session = expired.session
    session.set_expiry(timedelta(milliseconds=1))
    session.save()
    for id_ in ids:
        response = getattr(client, method)(f"{page_of(ada)}end/{id_}/")
        assert (response.status_code, response.url) == (302, page_of(ada))
        assert "That session had ended already." in texts(client.get(page_of(ada)))
    assert (registry.count_of(bob), logs()) == (1, [])


def test_deleted_user_who_is_logged_in_is_shown(ada: User) -> None:
    client = staff("view_session", "delete_session")
    browser, key = logged_in(ada), str(ada.pk)
    ada.delete()
    url = f"{SESSIONS}users/{key}/"
    assert client.get(SESSIONS, {"q": key}).url == url
    page = client.get(url)
    assert f"Sessions of deleted user {key}" in texts(page)
    assert id_of(browser)[:12] in texts(page)
    assert client.get(f"{url}end/{id_of(browser)}/").status_code == 200
    assert client.post(f"{url}end/").url == url
    response = client.get(url)
    assert response.url == SESSIONS
    assert "There is no such user." in texts(client.get(SESSIONS))
    assert [log[2:] for log in logs()] == [(f"deleted user {key}", "Ended 1 session.")]


def test_user_who_never_was_leads_to_the_search() -> None:
    client = staff("view_session", "delete_session")
    for key in ("0", "x", "9" * 40, "_2F", "ä"):
        assert client.get(f"{SESSIONS}users/{key}/").url == SESSIONS
        assert client.get(f"{SESSIONS}users/{key}/end/").url == SESSIONS
        assert client.post(f"{SESSIONS}users/{key}/end/").url == SESSIONS


def test_endings_need_a_token(ada: User) -> None:
    client = staff("view_session", "delete_session", enforce_csrf_checks=True)
    id_ = id_of(logged_in(ada))
    for url in (f"{page_of(ada)}end/", f"{page_of(ada)}end/{id_}/"):
        assert client.post(url).status_code == 403
        assert registry.count_of(ada) == 1
    html = client.get(url).content.decode()
    token = re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', html)[-1]
    assert client.post(url, {"csrfmiddlewaretoken": token}).status_code == 302
    assert registry.count_of(ada) == 0


def test_figures_are_drawn_and_told() -> None:
    client = staff("view_session")
    counters.drain(now=True)
    for _ in range(3):
        client.get(INDEX)
    page = client.get(SESSIONS)
    html = page.content.decode()
    figures = page.context["figures"]
    assert [plot.name for plot, _ in figures] == [
        *("sessions", "requests", "lock_waits", "store_errors")
    ]
    assert html.count('<svg role="img"') + html.count('role="img"') >= len(figures)
    for plot, numbers in figures:
        assert str(plot.svg) in html
        assert [at for at, _ in numbers] == sorted(plot.times, reverse=True)
        told = {
            series.label: [values[n] for _, values in numbers]
            for n, series in enumerate(plot.series)
        }
        assert told == {series.label: list(series.values)[::-1] for series in plot.series}
    now = figures[0][1][0]
    assert now[1] == [1]
    assert "<script" not in html.partition("<main")[2].partition("</main")[0]


def test_figures_span_the_hours_that_are_asked_for() -> None:
    client = staff("view_session")
    for asked in ("", "1", "24", "0", "25", "x"):
        page = client.get(SESSIONS, {"hours": asked})
        hours = int(asked) if asked in ("1", "24") else SPANS[0]
        assert page.context["hours"] == hours
        times = page.context["figures"][0][0].times
        assert abs(times[-1] - times[0] - timedelta(hours=hours)) <= timedelta(minutes=10)


def test_store_that_refuses_figures_leaves_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(hours: int) -> Any:
        raise SessionStoreUnavailable("NOPERM")

    monkeypatch.setattr(history, "recent", refuse)
    page = staff("view_session").get(SESSIONS)
    assert "There are no figures: NOPERM" in texts(page)
    assert 'name="q"' in page.content.decode()


@pytest.mark.parametrize("asgi", [False, True])
def test_pages_work_under_wsgi_and_asgi(ada: User, settings: Any, asgi: bool) -> None:
    logged_in(ada)
    browser = Browser(settings, asgi=asgi)
    browser.key = staff("view_session", "delete_session").session.session_key or ""
    assert browser.request(SESSIONS).status_code == 200
    assert "1 session" in texts(browser.request(page_of(ada)))
    assert browser.request(f"{page_of(ada)}end/", "post").status_code == 302
    assert registry.count_of(ada) == 0


@pytest.mark.full
def test_ten_thousand_sessions_come_in_pages(ada: User, store: redis.Redis) -> None:
    client = staff("view_session", "delete_session")
    log_in_often(ada, store, 10_000)
    page = client.get(page_of(ada))
    assert "10000 sessions" in texts(page).replace(",", "")
    assert len(page.context["rows"]) == SessionAdmin.list_per_page == 50
    last = client.get(page_of(ada), {"p": 200})
    assert len(last.context["rows"]) == 50
    assert client.get(f"{page_of(ada)}end/").status_code == 200
    client.post(f"{page_of(ada)}end/")
    assert registry.count_of(ada) == 0


def test_other_admin_site_has_the_pages(ada: User, settings: Any) -> None:
    own = admin.AdminSite(name="backstage")
    own.register(Session, SessionAdmin)
    settings.ROOT_URLCONF = (path("backstage/", own.urls),)
    client = staff("view_session", "delete_session")
    url = f"/backstage/clustered_sessions/session/users/{ada.pk}/"
    logged_in(ada)
    assert client.get(url).status_code == 200
    assert client.post(f"{url}end/").url == url


def test_user_model_without_a_mail_address_can_be_searched(
    monkeypatch: pytest.MonkeyPatch, ada: User
) -> None:
    """Without a mail address, and with a key that Django quotes in addresses."""
    monkeypatch.setattr(User, "EMAIL_FIELD", "mailbox")
    client = staff("view_session")
    assert client.get(SESSIONS, {"q": "example.org"}).status_code == 200
    assert client.get(SESSIONS, {"q": "a"}).status_code == 200


ALL = f"{SESSIONS}all/"
END_CHOSEN = f"{ALL}end/"


def listed(client: Client, query: str = "") -> list[str]:
    """Return the starts of the ids on the page of all sessions."""
    response = client.get(f"{ALL}?{query}")
    assert response.status_code == 200
    return re.findall(r"<code>(.{12})</code>", response.content.decode())


def anonymous() -> str:
    """Return the id of a session of nobody."""
    session = SessionStore()
    session["x"] = 1
    session.save()
    return str(session.public_id)


def choose(client: Client, *ids: str, **data: str) -> Any:
    return client.post(END_CHOSEN, {"id": ids, "back": "user=ada", **data})


def test_all_sessions_are_listed_with_their_users(ada: User) -> None:
    grace = staff("view_session")
    hers, nobodys = id_of(logged_in(ada)), anonymous()
    assert set(listed(grace)) == {hers[:12], nobodys[:12], id_of(grace)[:12]}
    page = grace.get(ALL)
    assert "ada" in texts(page)
    assert "yours, now" in texts(page)
    assert grace.session.session_key not in page.content.decode()
    assert ALL in grace.get(SESSIONS).content.decode()


def test_filters_choose_among_all_sessions(ada: User, settings: Any, store: redis.Redis) -> None:
    settings.CLUSTERED_SESSIONS_TRACK_CLIENTS = True
    grace = staff("view_session")
    hers, nobodys = id_of(logged_in(ada)), anonymous()
    record = SessionKeys.of_id("session", nobodys).record
    store.hset(record, b"m:last", b'["10.0.0.7","Lynx"]')
    packed = store.hget(record, "m:")
    store.hset(record, b"m:", packed[:10] + (10**12).to_bytes(6) + packed[16:])
    assert listed(grace, "user=ada") == [hers[:12]]
    assert listed(grace, f"user={ada.pk}") == [hers[:12]]
    assert listed(grace, "address=10.0.0.0/8") == [nobodys[:12]]
    assert listed(grace, f"session={hers[:12]}") == [hers[:12]]
    assert listed(grace, "created_before=2010-01-01T00:00") == [nobodys[:12]]
    assert listed(grace, "idle_since=2010-01-01T00:00") == []
    assert listed(grace, "created_before=2010-01-01T00:00&user=ada") == []
    assert "No session passes the filters." in texts(grace.get(f"{ALL}?user=nobody"))


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("address=home", "no IP address"),
        ("session=abc", "4 characters"),
        ("session=ab*cd", "4 characters"),
        ("idle_since=lately", "valid date/time"),
    ],
)
def test_filter_that_cannot_be_used_is_said(settings: Any, query: str, error: str) -> None:
    settings.CLUSTERED_SESSIONS_TRACK_CLIENTS = True
    grace = staff("view_session")
    page = grace.get(f"{ALL}?{query}")
    assert error in texts(page)
    assert "<code>" not in page.content.decode()


def test_start_of_several_ids_lists_them() -> None:
    grace = staff("view_session")
    seen: dict[str, str] = {}
    for n in range(10**6):
        key = f"{n:032x}"
        if (other := seen.setdefault(session_id(key)[:4], key)) != key:
            break
    for each in (key, other):
        SessionStore(each).save(must_create=True)
    found = listed(grace, f"session={session_id(key)[:4]}")
    assert set(found) == {session_id(key)[:12], session_id(other)[:12]}


def test_pages_of_all_sessions_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SessionAdmin, "list_per_page", 2)
    grace = staff("view_session")
    wanted = {id_of(grace)[:12], *(anonymous()[:12] for _ in range(4))}
    found, query, pages = [], "", 0
    while True:
        found += listed(grace, query)
        pages += 1
        html = grace.get(f"{ALL}?{query}").content.decode()
        assert ("First page" in html) == bool(query)
        following = re.search(r'href="\?([^"]+)" rel="next"', html)
        if not following:
            break
        query = following[1].replace("&amp;", "&")
    assert pages == 3
    assert (len(found), set(found)) == (5, wanted)
    assert grace.get(f"{ALL}?after=nowhere").status_code == 302


def test_chosen_sessions_end_once_confirmed(ada: User) -> None:
    grace = staff("view_session", "delete_session")
    hers, nobodys, kept = id_of(logged_in(ada)), anonymous(), anonymous()
    mine = id_of(grace)
    page = choose(grace, hers, nobodys, mine)
    assert "Do you want to end 2 sessions?" in texts(page)
    assert hers[:12] in texts(page)
    assert mine[:12] not in texts(page)
    assert registry.find(hers)
    assert registry.find(nobodys)
    done = choose(grace, hers, nobodys, mine, confirmed="yes")
    assert done.url == f"{ALL}?user=ada"
    assert "2 sessions have ended." in texts(grace.get(ALL))
    assert {entry.id for entry in registry.matching()} == {mine, kept}
    assert sorted(logs()) == sorted(
        [
            (
                "grace",
                "Authentication and Authorization | user",
                "ada",
                f"Ended session {hers[:12]}.",
            ),
            (
                "grace",
                "Sessions | session",
                nobodys[:12],
                f"Ended session {nobodys[:12]}.",
            ),
        ]
    )
    assert grace.get(INDEX).status_code == 200


@pytest.mark.parametrize("ids", [(), ("A" * 43,), ("A" * 12,), ("ä",)])
def test_choosing_nothing_ends_nothing(ids: tuple[str, ...]) -> None:
    grace = staff("view_session", "delete_session")
    assert choose(grace, *ids, confirmed="yes").status_code == 302
    assert "There is no session to end." in texts(grace.get(ALL))


def test_start_of_an_id_ends_nothing_in_the_admin(ada: User) -> None:
    grace = staff("view_session", "delete_session")
    hers = id_of(logged_in(ada))
    choose(grace, hers[:12], confirmed="yes")
    grace.post(f"{page_of(ada)}end/{hers[:12]}/")
    assert registry.find(hers)


def test_list_of_all_needs_the_permissions(ada: User) -> None:
    hers = id_of(logged_in(ada))
    for permissions, sees in (([], 403), (["view_session"], 200)):
        User.objects.filter(username="grace").delete()
        grace = staff(*permissions)
        assert grace.get(ALL).status_code == sees
        assert choose(grace, hers, confirmed="yes").status_code == 403
        assert 'type="checkbox"' not in grace.get(ALL).content.decode()
    assert Client().get(ALL).status_code == 302
    assert registry.find(hers)


def test_ending_chosen_sessions_needs_the_csrf_token(ada: User) -> None:
    grace = staff("view_session", "delete_session", enforce_csrf_checks=True)
    hers = id_of(logged_in(ada))
    assert choose(grace, hers, confirmed="yes").status_code == 403
    assert registry.find(hers)


def test_way_back_leads_to_the_list_only() -> None:
    grace = staff("view_session", "delete_session")
    nobodys = anonymous()
    done = choose(grace, nobodys, confirmed="yes", back="//evil.example/?x=//evil.example")
    assert done.url.startswith(f"{ALL}?")
