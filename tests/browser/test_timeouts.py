"""The warning before a session ends, in a real browser: ``docs/timeouts.md``."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from django.contrib.auth import SESSION_KEY
from django.core.handlers.wsgi import WSGIHandler
from django.core.servers.basehttp import ThreadedWSGIServer, WSGIRequestHandler
from django.http import HttpResponse
from django.template import engines
from django.urls import include, path
from django.views.static import serve
from playwright.sync_api import BrowserContext, Locator, Page, expect

import django_clustered_sessions
from tests.catalogues import compile_into
from tests.example import conftest
from tests.gateways import place
from tests.request.test_timeouts import aged
from tests.servers import wait_for

browser, new_context = conftest.browser, conftest.new_context

STATIC = Path(django_clustered_sessions.__file__).parent / "static"
#: Half of it is for the warning, in which something is done, also where the machine stands still.
IDLE_S = 10
#: Where the end is not to come: there is time for whatever is done until then.
LONG_S = 1000
WAIT_MS = 30_000

# Nothing inline, and nothing from anywhere else.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:"
)
PAGE = """{% load i18n %}{% get_current_language as LANGUAGE_CODE %}<!DOCTYPE html>
<html lang="{{ LANGUAGE_CODE }}"><head><title>A page</title><meta charset="utf-8">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"></head><body>
<h1>{{ title }}</h1><p><label>Text <input id="text"></label></p>
{% include "clustered_sessions/expiry.html" with logout_url=logout_url login_url="/login/?a=b" %}
</body></html>"""


def shown(request: Any, title: str) -> HttpResponse:
    request.session.get("n")
    values = {"title": title, "logout_url": request.GET.get("logout_url", "")}
    text = engines["django"].from_string(PAGE).render(values, request)
    headers = {"Content-Security-Policy": POLICY}
    if "keep" in request.GET:
        headers["Cache-Control"] = "private, max-age=600"
    return HttpResponse(text, headers=headers)


def page_view(request: Any) -> HttpResponse:
    return shown(request, "Page")


def login(request: Any) -> HttpResponse:
    request.session[SESSION_KEY] = "7"
    request.session.cycle_key()
    return shown(request, "Logged in")


def logout(request: Any) -> HttpResponse:
    request.session.flush()
    return shown(request, "Logged out")


class QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


class Site:
    """A site on a port of its own, that counts what its pages ask."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        handler = WSGIHandler()

        def application(environ: Any, start_response: Any) -> Any:
            self.asked.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
            return handler(environ, start_response)

        self.server = ThreadedWSGIServer(("127.0.0.1", 0), QuietHandler, ipv6=False)
        self.server.set_app(application)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def expiries(self) -> int:
        """Return how often the pages have asked how long the session lasts."""
        return self.asked.count("GET /sessions/expiry/")


@pytest.fixture
def site(store: redis.Redis, settings: Any) -> Iterator[Site]:
    settings.ROOT_URLCONF = (
        path("sessions/", include("django_clustered_sessions.urls")),
        path("static/<path:path>", serve, {"document_root": STATIC}),
        path("login/", login),
        path("logout/", logout),
        path("page/", page_view),
    )
    settings.STATIC_URL = "/static/"
    settings.MIDDLEWARE = [*settings.MIDDLEWARE, "django.middleware.csrf.CsrfViewMiddleware"]
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = IDLE_S
    running = Site()
    thread = threading.Thread(target=running.server.serve_forever, args=(0.01,))
    thread.start()
    yield running
    running.server.shutdown()
    thread.join(30)
    assert not thread.is_alive()
    running.server.server_close()


@pytest.fixture
def context(new_context: Callable[..., BrowserContext]) -> Iterator[BrowserContext]:
    opened = new_context(viewport={"width": 900, "height": 600})
    opened.set_default_timeout(WAIT_MS)
    errors: list[str] = []
    opened.on("weberror", lambda error: errors.append(str(error.error)))
    opened.on(
        "console",
        lambda message: (
            errors.append(message.text)
            if message.type == "error" and "status of" not in message.text
            else None
        ),
    )
    yield opened
    assert errors == []


@pytest.fixture
def tabs(site: Site, context: BrowserContext) -> tuple[Page, Page]:
    """Two tabs of somebody who has logged in."""
    first, second = context.new_page(), context.new_page()
    first.goto(f"{site.url}/login/")
    first.goto(f"{site.url}/page/?from=1")
    second.goto(f"{site.url}/page/")
    return first, second


def key(page: Page) -> str:
    (cookie,) = [one for one in page.context.cookies() if one["name"] == "sessionid"]
    return str(cookie["value"])


def warning(page: Page) -> Locator:
    return page.get_by_role("alertdialog", name="Are you still there?")


def over(page: Page) -> Locator:
    return page.get_by_role("alertdialog", name="You have been logged out")


def seen(dialog: Locator) -> None:
    expect(dialog).to_be_visible(timeout=WAIT_MS)


def gone(dialog: Locator) -> None:
    expect(dialog).to_be_hidden(timeout=WAIT_MS)


def come_back(page: Page) -> None:
    """Look at the tab again, out of the browser's own cache of pages."""
    page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', {persisted: true}))")


def warn(store: redis.Redis, page: Page, by_s: float) -> None:
    """Let the session be so much older, and the page warn of its end."""
    aged(store, key(page), by_s)
    come_back(page)
    seen(warning(page))


def test_staying_in_one_tab_counts_for_all(
    site: Site, store: redis.Redis, tabs: tuple[Page, Page]
) -> None:
    first, second = tabs
    seen(warning(first))
    seen(warning(second))
    # Two pages, and who warns has asked; a machine that stands still makes both ask again.
    assert 2 <= site.expiries() + site.asked.count("GET /page/") <= 6
    # Nobody can see it in two tabs at once; the one is told of what the other does.
    first.bring_to_front()
    expect(first.get_by_role("button", name="Stay logged in")).to_be_focused()
    before_ms = store.pexpiretime(place(key(first)).record)
    first.keyboard.press("Enter")
    gone(warning(first))
    gone(warning(second))
    assert store.pexpiretime(place(key(first)).record) >= before_ms + 2000
    assert site.asked.count("POST /sessions/stay/") == 1
    # And it comes again.
    seen(warning(first))
    seen(warning(second))


def test_unused_session_is_over_in_all_tabs(
    site: Site, store: redis.Redis, tabs: tuple[Page, Page]
) -> None:
    record = place(key(tabs[0])).record
    deadline_ms = store.pexpiretime(record)
    for page in tabs:
        seen(warning(page))
    # It was asked for that, and that is no use of the session.
    assert site.expiries() >= 1
    assert store.pexpiretime(record) == deadline_ms
    for page in tabs:
        seen(over(page))
    assert not store.exists(record)
    assert site.asked.count("POST /sessions/stay/") == 0
    first = tabs[0]
    first.bring_to_front()
    link = first.get_by_role("link", name="Log in again")
    expect(link).to_be_focused()
    assert link.get_attribute("href") == f"{site.url}/login/?a=b&next=%2Fpage%2F%3Ffrom%3D1"
    # Nothing more is asked once it is over.
    asked = len(site.asked)
    for page in tabs:
        come_back(page)
        page.keyboard.press("Escape")
        gone(over(page))
    first.goto(f"{site.url}/logout/")
    assert site.asked[asked:].count("GET /sessions/expiry/") == 0


def test_use_of_one_tab_counts_for_all(
    site: Site, store: redis.Redis, settings: Any, tabs: tuple[Page, Page]
) -> None:
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = LONG_S
    first, second = tabs
    for page in tabs:
        page.goto(f"{site.url}/page/")
    warn(store, first, LONG_S - 100)
    seen(warning(second))
    second.goto(f"{site.url}/page/")
    gone(warning(first))


def test_logout_in_one_tab_is_seen_in_the_other(site: Site, tabs: tuple[Page, Page]) -> None:
    first, second = tabs
    second.goto(f"{site.url}/logout/")
    seen(over(first))
    gone(over(second))


def test_logout_url_is_opened_when_the_session_is_over(
    site: Site, store: redis.Redis, tabs: tuple[Page, Page]
) -> None:
    first, second = tabs
    first.goto(f"{site.url}/page/?logout_url=/logout/")
    second.goto(f"{site.url}/logout/")
    first.wait_for_url(f"{site.url}/logout/")


@pytest.mark.parametrize("how", ["Escape", "Not now"])
def test_closed_dialog_does_not_put_off_the_end(
    site: Site, store: redis.Redis, settings: Any, tabs: tuple[Page, Page], how: str
) -> None:
    first, _ = tabs
    first.bring_to_front()
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = LONG_S
    first.goto(f"{site.url}/page/")
    first.get_by_label("Text").focus()
    warn(store, first, LONG_S - 100)
    if how == "Escape":
        first.keyboard.press("Escape")
    else:
        first.keyboard.press("Shift+Tab")
        expect(first.get_by_role("button", name=how)).to_be_focused()
        first.keyboard.press("Space")
    gone(warning(first))
    expect(first.get_by_label("Text")).to_be_focused()
    if how == "Escape":
        aged(store, key(first), 99)
        come_back(first)
        seen(over(first))


def test_time_left_is_said_once_and_not_each_second(
    site: Site, store: redis.Redis, settings: Any, tabs: tuple[Page, Page]
) -> None:
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = 60
    first, _ = tabs
    first.goto(f"{site.url}/page/")
    # What is left when the warning comes is said by itself, so ten seconds are if they come later.
    aged(store, key(first), 60 - 16)
    come_back(first)
    seen(warning(first))
    said = first.locator(".session-expiry-said")
    assert said.get_attribute("aria-live") == "polite"
    described = first.locator("#session-expiry-warning-text")
    # Seconds pass while this is looked at, some more on a machine that stands still.
    assert re.search(r"\b1[2-6] seconds$", described.inner_text())
    texts = first.evaluate(
        """async () => {
          const said = document.querySelector(".session-expiry-said"), texts = [];
          const clock = document.querySelector(".session-expiry-clock");
          if (said.textContent) texts.push(said.textContent);
          const watch = new MutationObserver(() => texts.push(said.textContent));
          watch.observe(said, { childList: true, characterData: true, subtree: true });
          const left = () => Number(clock.textContent.slice(-2));
          // Longer on a machine that stood still when it was to be said.
          while (left() > 8 || (!texts.length && left() > 2)) {
            await new Promise((resolve) => setTimeout(resolve, 50));
          }
          return texts;
        }"""
    )
    (text,) = texts
    assert re.fullmatch(r"(10|[2-9]) seconds left", text)


def test_warning_speaks_the_language_of_the_page(
    site: Site, context: BrowserContext, settings: Any, tmp_path: Path
) -> None:
    """The script has no words of its own, the browser only those for seconds."""
    compile_into(tmp_path, settings)
    settings.LANGUAGE_CODE = "de"
    page = context.new_page()
    page.goto(f"{site.url}/login/")
    page.goto(f"{site.url}/page/")
    seen(page.get_by_role("alertdialog", name="Sind Sie noch da?"))
    assert re.search(
        r"Sie werden abgemeldet in:\s\d Sekunden?$",
        page.locator("#session-expiry-warning-text").inner_text(),
    )
    page.route("**/sessions/stay/", lambda route: route.fulfill(status=503))
    page.get_by_role("button", name="Angemeldet bleiben").click()
    trouble = page.locator(".session-expiry-trouble")
    expect(trouble).to_have_text("Die Website antwortet nicht. Neuer Versuch …")


def test_absolute_end_offers_no_prolongation(
    site: Site, store: redis.Redis, settings: Any, tabs: tuple[Page, Page]
) -> None:
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = settings.CLUSTERED_SESSIONS_ABSOLUTE_TIMEOUT = LONG_S
    first, _ = tabs
    first.goto(f"{site.url}/page/")
    aged(store, key(first), LONG_S - 100, ends=False)
    come_back(first)
    last = first.get_by_role("alertdialog", name="Please finish soon")
    seen(last)
    expect(last.get_by_role("button")).to_have_text(["Close"])
    aged(store, key(first), 100, ends=False)
    come_back(first)
    seen(over(first))


def test_store_that_is_away_is_no_end_of_the_session(
    site: Site, store: redis.Redis, settings: Any, tabs: tuple[Page, Page]
) -> None:
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = 20
    first, _ = tabs
    first.goto(f"{site.url}/page/")
    # The button is pressed before the end, however slow the machine is.
    warn(store, first, 20 - 8)
    here = settings.CACHES
    entry = here["sessions"] | {"LOCATION": "redis://127.0.0.1:1/1"}
    settings.CACHES = here | {"sessions": entry}
    first.get_by_role("button", name="Stay logged in").click()
    expect(first.get_by_text("The site does not answer.")).to_be_visible(timeout=WAIT_MS)
    expect(first.locator("[data-when=warning] .session-expiry-clock")).to_have_text(
        "0:00", timeout=WAIT_MS
    )
    expect(over(first)).to_be_hidden()
    settings.CACHES = here
    # It went while nobody could be asked.
    wait_for(lambda: not store.exists(place(key(first)).record), "the session ends")
    first.evaluate("dispatchEvent(new Event('online'))")
    seen(over(first))


@pytest.mark.parametrize("has_slept", [False, True])
def test_page_asks_after_the_computer_has_slept(
    site: Site, store: redis.Redis, settings: Any, tabs: tuple[Page, Page], has_slept: bool
) -> None:
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = 1000
    first, _ = tabs
    first.goto(f"{site.url}/page/")
    store.delete(place(key(first)).record)
    asked = site.expiries()
    skew = 3_600_000 if has_slept else 0
    first.evaluate(
        f"const now = Date.now; Date.now = () => now() + {skew};"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    if has_slept:
        seen(over(first))
        return
    assert site.expiries() == asked
    come_back(first)
    seen(over(first))


@pytest.mark.parametrize("how", ["back", "again"])
def test_page_out_of_a_cache_asks(
    site: Site, settings: Any, tabs: tuple[Page, Page], how: str
) -> None:
    """It says what was true when it was made."""
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = 1000
    first, second = tabs
    second.close()
    first.goto(f"{site.url}/page/?keep=1")
    first.goto(f"{site.url}/sessions/expiry/")
    asked, made = site.expiries(), site.asked.count("GET /page/")
    if how == "back":
        first.go_back()
    else:
        first.goto(f"{site.url}/page/?keep=1")
    wait_for(lambda: site.expiries() > asked, "the page asks", timeout_s=30)
    assert site.asked.count("GET /page/") == made


def test_nothing_is_shown_without_javascript(
    site: Site, new_context: Callable[..., BrowserContext]
) -> None:
    page = new_context(java_script_enabled=False).new_page()
    page.goto(f"{site.url}/login/")
    expect(page.get_by_role("heading")).to_have_text(["Logged in"])
    expect(page.get_by_role("textbox")).to_be_visible()
    expect(page.locator("dialog")).to_be_hidden()


@pytest.mark.parametrize(("scheme", "width"), [("light", 900), ("dark", 320)])
def test_dialog_fits_and_can_be_read(
    site: Site,
    store: redis.Redis,
    settings: Any,
    new_context: Callable[..., BrowserContext],
    scheme: str,
    width: int,
) -> None:
    # It stays while it is looked at.
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = LONG_S
    viewport = {"width": width, "height": 640}
    page = new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce").new_page()
    page.goto(f"{site.url}/login/")
    page.goto(f"{site.url}/page/")
    warn(store, page, LONG_S - 100)
    dialog = warning(page)
    box = dialog.bounding_box()
    assert box
    assert 0 <= box["x"] <= box["x"] + box["width"] <= width
    ground, ink = dialog.evaluate(
        "each => [getComputedStyle(each).backgroundColor, getComputedStyle(each).color]"
    )
    assert (sum(channels(ground)) < sum(channels(ink))) == (scheme == "dark")


def channels(colour: str) -> list[float]:
    return [float(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
