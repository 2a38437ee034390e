"""The shipped pages inside base templates of others: nobody's styles paint what is not theirs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from django.core.paginator import Paginator
from django.template.loader import render_to_string
from django.test import RequestFactory
from django.urls import include, path
from django.utils import timezone
from playwright.sync_api import Page

import django_clustered_sessions
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.devices.rows import rows
from django_clustered_sessions.registry import SessionInfo
from tests.example import conftest

browser, new_context, page = conftest.browser, conftest.new_context, conftest.page

FOREIGN = Path(__file__).parent / "foreign"
STATIC = Path(django_clustered_sessions.__file__).parent / "static"

#: What is not inherited, and shows who has painted an element. Fonts and colours are the site's.
PAINT = [
    "background-color",
    "border-bottom-width",
    "border-collapse",
    "border-top-left-radius",
    "border-top-width",
    "box-shadow",
    "display",
    "letter-spacing",
    "margin-bottom",
    "margin-top",
    "padding-left",
    "padding-top",
    "position",
    "text-align",
    "text-decoration-line",
    "text-indent",
    "text-transform",
]

#: The site's own: what the package says of its elements is not for them.
OWN = """<header id="own-header">A site</header><div id="own"><h1>Own</h1><p>Text</p>
<table><tr><th>a</th><td>b</td></tr></table><form><button>Send</button></form>
<nav><a href="#">c</a></nav>
</div>"""

READ = """([selector, names]) => [...document.querySelectorAll(selector)].map((each) => {
  const style = getComputedStyle(each);
  return [each.tagName + "." + each.className, ...names.map((name) => name + ": " + style[name])];
})"""

OURS = '.devices [class|="devices"], [class|="session-expiry"]'
THEIRS = "#own-header, #own, #own *"


@pytest.fixture
def shipped(settings: Any) -> dict[str, str]:
    """The pages' own styles and elements, as a site takes them into its base template."""
    settings.ROOT_URLCONF = (
        path("devices/", include("django_clustered_sessions.devices.urls")),
        path("sessions/", include("django_clustered_sessions.urls")),
    )
    settings.STATIC_URL = "/static/"
    now = timezone.now()
    entries = [SessionInfo(letter * 43, "1", now, now, now, letter == "A") for letter in "ABC"]
    pages = Paginator(rows(entries), 2)
    request = RequestFactory().get("/")
    request.session = SessionStore()
    context = {
        "rows": pages.page(1),
        "page_range": pages.page_range,
        "count": 3,
        "has_others": True,
        "track_hint": True,
    }
    devices = render_to_string("clustered_sessions/devices.html", {"devices": context})
    sign_in = {
        "session": entries[0],
        "browser": "Firefox on Linux",
        "address": "::1",
        "password_url": "/",
        "days": 7,
    }
    sign_ins = (
        render_to_string("clustered_sessions/sign_in.html", {"sign_in": sign_in | {"state": state}})
        for state in ("open", "expired")
    )
    return {
        "style": render_to_string("clustered_sessions/devices.css")
        + (STATIC / "clustered_sessions" / "expiry.css").read_text(),
        "devices": "".join(
            html[html.index('<div class="devices') : html.index("</main>")]
            for html in (devices, *sign_ins)
        ),
        "expiry": render_to_string("clustered_sessions/expiry.html", request=request),
    }


def show(page: Page, shipped: dict[str, str], *, foreign: str, ours: bool = True) -> None:
    """Open a page of a site; its own styles come last, where they win over equals."""
    style = shipped["style"] if ours else ""
    page.set_content(
        f"<!DOCTYPE html><html lang=en><title>t</title><style>{style}</style>"
        f"<style>{foreign}</style><body>{OWN}<main>{shipped['devices']}</main>{shipped['expiry']}"
    )
    page.evaluate("document.querySelector('dialog').showModal()")
    page.evaluate("document.querySelector('[data-when=warning]').hidden = false")


def painted(page: Page, selector: str) -> Any:
    """Return how each of the elements looks."""
    return page.evaluate(READ, [selector, PAINT])


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["framework", "classless", "reset"])
def test_styles_of_a_site_and_ours_keep_apart(
    page: Page, shipped: dict[str, str], name: str, width: int
) -> None:
    """Neither paints the other's elements, and every element of ours has a class."""
    page.set_viewport_size({"width": width, "height": 900})
    foreign = (FOREIGN / f"{name}.css").read_text()
    # Font and colour of the page itself are for all that is in it.
    show(page, shipped, foreign="\n".join(re.findall(r"(?m)^(?:html|body) .*", foreign)))
    plain = painted(page, OURS)
    assert len(plain) > 40
    for ours in ("devices", "session-expiry"):
        bare = f'.{ours} *:not([class|="{ours}"], [type="hidden"])'
        assert page.locator(bare).count() == 0
    show(page, shipped, foreign=foreign, ours=False)
    theirs = painted(page, THEIRS)
    show(page, shipped, foreign=foreign)
    assert painted(page, OURS) == plain
    assert page.locator("[data-when]:visible").count() == 1
    assert painted(page, THEIRS) == theirs
