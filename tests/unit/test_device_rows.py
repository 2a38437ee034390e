"""Rows of "Your devices": a session's browser, its address, and when it was used."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.template.loader import render_to_string
from django.urls import include, path
from django.utils import timezone

from django_clustered_sessions.devices import agents
from django_clustered_sessions.devices.rows import Row
from django_clustered_sessions.registry import SessionInfo
from django_clustered_sessions.session import client_info

NOWHERE = "A" * 43
FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:133.0) Gecko/20100101 Firefox/133.0"


@pytest.fixture(autouse=True)
def site(settings: Any) -> None:
    """Give the pages their addresses."""
    settings.ROOT_URLCONF = (path("devices/", include("django_clustered_sessions.devices.urls")),)


def tracked(user_agent: str, address: str = "2001:db8::7", **more: Any) -> SessionInfo:
    """Return an entry of a site that keeps addresses and browsers."""
    now = timezone.now()
    last = client_info.Client(address, user_agent)
    return SessionInfo(NOWHERE, "1", now, now, now + timedelta(days=1), last=last, **more)


def rendered(rows: list[Row]) -> str:
    context = {"rows": rows, "count": len(rows), "has_addresses": True}
    return render_to_string("clustered_sessions/devices.html", {"devices": context})


def test_browser_and_address_are_shown_where_they_are_known() -> None:
    row = Row(tracked(FIREFOX))
    html = rendered([row])
    assert "Firefox on Linux" in html
    assert "2001:db8::7" in html


def test_row_without_a_browser_is_named_by_its_times() -> None:
    now = timezone.now()
    created = now.replace(year=2026, month=5, day=3, hour=12)
    times = (created, now - timedelta(hours=2, minutes=5), now)
    known = "Logged in on May 3, 2026, last seen 2\xa0hours ago"
    assert Row(SessionInfo(NOWHERE, "1", *times)).name == known
    assert known in rendered([Row(SessionInfo(NOWHERE, "1", *times))])
    assert Row(SessionInfo(NOWHERE, "1", *times, is_current=True)).name == "This device"
    assert Row(tracked(FIREFOX)).name == "Firefox on Linux"


def test_style_has_the_nonce_of_a_policy() -> None:
    html = render_to_string("clustered_sessions/base.html", {"csp_nonce": "n0nce"})
    assert '<style nonce="n0nce">' in html
    assert "<style>" in render_to_string("clustered_sessions/base.html")
    assert "{% comment" not in html


def test_words_of_a_browser_are_escaped() -> None:
    rows = [Row(tracked('<script>"&', address="<b>"))]
    html = rendered(rows)
    assert "<script" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;&quot;&amp;" in html


def test_first_use_is_shown_where_there_is_no_last() -> None:
    now = timezone.now()
    entry = SessionInfo(NOWHERE, "1", now, now, now, first=client_info.Client("192.0.2.1", ""))
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
    ids=["known", "tool", "spaces", "too long", "just short enough", "none"],
)
def test_browsers_have_names(user_agent: str, name: str) -> None:
    assert agents.readable(user_agent) == name


def test_usual_name_is_none_of_the_user_agents_own_words() -> None:
    assert agents.usual_name(FIREFOX) == "Firefox on Linux"
    assert agents.name("Any words Bot/1.0") == "Any words Bot"
    assert agents.usual_name("Any words Bot/1.0") == ""


def test_browser_has_its_own_words_without_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agents, "parse_agent", None)
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
    assert Row(SessionInfo(NOWHERE, "1", then, then, then, is_current=current)).seen == words
