"""The pages about sessions, "Your devices" and the admin's, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any, TypeVar

import httpx
import pytest
import redis
from axe_playwright_python.sync_playwright import Axe
from django.contrib.messages import constants
from django.contrib.messages.storage.base import Message
from django.core.paginator import Paginator
from django.template.loader import render_to_string
from django.test import override_settings
from django.urls import include, path
from django.utils import timezone
from playwright.sync_api import Browser, BrowserContext, Page, expect

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.devices.rows import rows
from django_clustered_sessions.protocol.record import SessionKeys
from django_clustered_sessions.registry import SessionInfo
from tests.conftest import use_store
from tests.example.conftest import EXAMPLE, Demo
from tests.example.project import PATIENCE_S
from tests.servers import wait_for

# The first one starts a demo and a browser, and logs two users in.
pytestmark = pytest.mark.timeout(240)

NewContext = Callable[..., BrowserContext]

#: Where the pictures are shown.
PAGE = EXAMPLE.parent / "docs" / "pages.md"

#: A browser with which nobody else is logged in.
FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:144.0) Gecko/20100101 Firefox/144.0"

T = TypeVar("T")
#: What a login puts into a session, by the user's name.
Logins = dict[str, dict[str, Any]]

#: What can be wrong with a page for those who do not see, hear or use a mouse.
AXE_OPTIONS = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}


class Visitors:
    """Browsers in which somebody is logged in already.

    A password takes its time to be checked, so each user logs in once, and what that has made is
    copied into new sessions.
    """

    def __init__(self, demo: Demo, new_context: NewContext, logins: Logins) -> None:
        self.demo = demo
        self.new_context = new_context
        self.logins = logins

    def page(self, user: str, **options: object) -> Page:
        """Return a page in a new browser of that user."""
        context = self.new_context(**options)
        key = in_thread(lambda: self.log_in(user))
        context.add_cookies(
            [{"name": "sessionid", "value": key, "domain": "localhost", "path": "/"}]
        )
        return context.new_page()

    def log_in(self, user: str) -> str:
        """Return the key of a new session."""
        session = SessionStore()
        session.update(self.logins[user])
        session.save()
        return str(session.session_key)


def in_thread(function: Callable[[], T]) -> T:
    """Run what talks to the store where Playwright's event loop is not."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(function).result()


@pytest.fixture(scope="module")
def logins(demo: Demo) -> Logins:
    """Log each user in once, and return what that has put into their sessions."""
    keys = {user: cookie_of(demo, user) for user in ("ada", "grace")}
    store = {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": store_of(demo)}
    with override_settings(CACHES={"sessions": store}):
        return {user: in_thread(SessionStore(key).load) for user, key in keys.items()}


def store_of(demo: Demo) -> str:
    """Return the address of the demo's store."""
    (store,) = re.findall(r"redis://\S+", demo.output)
    return str(store)


def cookie_of(demo: Demo, user: str) -> str:
    """Log in, and return the key of the session."""
    with httpx.Client(follow_redirects=True, timeout=PATIENCE_S) as client:
        client.get(demo.url(0, "login/"))
        data = {
            "username": user,
            "password": "fired-clay",
            "csrfmiddlewaretoken": client.cookies["csrftoken"],
        }
        client.post(demo.url(0, "login/"), data=data).raise_for_status()
        return client.cookies["sessionid"]


@pytest.fixture
def visitors(demo: Demo, new_context: NewContext, logins: Logins, settings: Any) -> Visitors:
    """Give browsers of users; nobody is logged in before."""
    use_store(settings, store_of(demo))
    in_thread(lambda: [registry.end_sessions_of(number) for number in (1, 2)])
    return Visitors(demo, new_context, logins)


def public_id(page: Page) -> str:
    """Return the public id of the session of a page's browser."""
    (key,) = (cookie["value"] for cookie in page.context.cookies() if cookie["name"] == "sessionid")
    return SessionKeys.of("session", key).id


def listed(page: Page) -> list[str]:
    """Return the rows of the list of sessions, as they are read out, once all are there."""
    page.wait_for_load_state()
    rows = page.locator(".devices-table, .sessions-cards").get_by_role("row").all()[1:]
    return [" ".join(row.inner_text().split()) for row in rows]


def test_device_is_logged_out_from_another_one(demo: Demo, visitors: Visitors) -> None:
    """End one of several, then all others, on both nodes and without JavaScript."""
    there, third, here = (visitors.page("ada", java_script_enabled=False) for _ in range(3))
    for page, node in ((third, 1), (there, 1), (here, 0)):
        page.goto(demo.url(node))
        expect(page.get_by_text("Logged in as ada")).to_be_visible()
    here.get_by_role("link", name="Devices").click()
    expect(here).to_have_title("Your devices · terracotta")
    expect(here.get_by_text("You are logged in on 3 devices.")).to_be_visible()
    # The page has variables of its own beside the shop's.
    expect(here.locator(".to-cart .count")).to_have_text("0")
    assert ["in use now" in row for row in listed(here)] == [True, False, False]
    here.locator(f'form[action*="{public_id(there)}"]').get_by_role("button").click()
    expect(here.get_by_role("status")).to_have_text("That device is logged out.")
    there.reload()
    expect(there.get_by_role("link", name="Log in")).to_be_visible()
    third.reload()
    expect(third.get_by_role("button", name="Log out")).to_be_visible()
    third.goto(demo.url(1, "devices/"))
    third.locator(f'form[action*="{public_id(here)}"]').get_by_role("button").click()
    here.get_by_role("button", name="Log out all others").click()
    expect(here).to_have_url(re.compile("/Cart/login/"))


def test_session_in_use_is_logged_out_last(demo: Demo, visitors: Visitors) -> None:
    """All others end first, then this one."""
    here, there = visitors.page("ada"), visitors.page("ada")
    here.goto(demo.url(1, "devices/"))
    here.get_by_role("button", name="Log out all others").click()
    expect(here.get_by_role("status")).to_have_text("1 other device is logged out.")
    expect(here.get_by_text("You are logged in on 1 device.")).to_be_visible()
    here.get_by_role("row").get_by_role("button").click()
    expect(here).to_have_url(demo.url(1))
    expect(here.get_by_role("link", name="Log in")).to_be_visible()
    there.goto(demo.url(0))
    expect(there.get_by_role("link", name="Log in")).to_be_visible()


def test_keyboard_alone_ends_a_device(demo: Demo, visitors: Visitors) -> None:
    """Every button has a name of its own, and shows that it has the focus."""
    visitors.page("ada")
    here = visitors.page("ada")
    here.goto(demo.url(1, "devices/"))
    snapshot = here.locator(".devices-table").aria_snapshot()
    assert re.search(r'button "Log out .+ in use now \d', snapshot), snapshot
    assert re.search(r'button "Log out Logged in on .+, last seen .+ \d', snapshot), snapshot
    here.locator("#content").focus()
    for _ in range(3):
        here.keyboard.press("Tab")
    outline = here.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    here.keyboard.press("Enter")
    expect(here.get_by_role("status")).to_have_text("That device is logged out.")


def test_staff_ends_sessions_of_a_user(demo: Demo, visitors: Visitors) -> None:
    """Search a user, end one session, then all; the user is out on both nodes."""
    customer, other = visitors.page("ada"), visitors.page("ada")
    staff = visitors.page("grace", java_script_enabled=False)
    staff.goto(demo.url(0, "../admin/"))
    staff.get_by_role("link", name="Sessions", exact=True).last.click()
    staff.get_by_role("searchbox", name="User").fill("ada")
    staff.get_by_role("button", name="Search").click()
    expect(staff.get_by_role("heading", name="Sessions of ada")).to_be_visible()
    assert len(listed(staff)) == 2
    for answer in ("No, take me back", "Yes, end"):
        staff.get_by_role("link", name=f"End session {public_id(customer)[:12]}").click()
        expect(staff.get_by_text("Do you want to end this session of ada?")).to_be_visible()
        staff.get_by_text(answer).or_(staff.get_by_role("button", name=answer)).click()
    expect(staff.get_by_text("The session has ended.")).to_be_visible()
    assert len(listed(staff)) == 1
    customer.goto(demo.url(1))
    expect(customer.get_by_role("link", name="Log in")).to_be_visible()
    other.goto(demo.url(1))
    expect(other.get_by_role("button", name="Log out")).to_be_visible()
    staff.get_by_role("link", name="End all", exact=True).click()
    expect(staff.get_by_text("Do you want to end 1 session of ada?")).to_be_visible()
    staff.get_by_role("button", name="Yes, end").click()
    expect(staff.get_by_text("ada is logged in nowhere.")).to_be_visible()
    other.reload()
    expect(other.get_by_role("link", name="Log in")).to_be_visible()
    staff.goto(demo.url(1, "../admin/auth/user/1/history/"))
    expect(staff.get_by_text("Ended 1 session.")).to_be_visible()


def test_staff_ends_chosen_sessions_of_the_list(demo: Demo, visitors: Visitors) -> None:
    """Find a session by the start of its id, choose it, end it; its browser is logged out."""
    customer, other = visitors.page("ada"), visitors.page("ada")
    staff = visitors.page("grace", java_script_enabled=False)
    staff.goto(demo.url(0, "../admin/clustered_sessions/session/"))
    staff.get_by_role("link", name="All sessions").click()
    assert any("yours, now" in row for row in listed(staff))
    start = public_id(customer)[:12]
    staff.get_by_label("Session", exact=True).fill(start)
    staff.get_by_role("button", name="Filter").click()
    (row,) = listed(staff)
    assert start in row
    staff.get_by_label(f"Choose session {start}").check()
    staff.get_by_role("button", name="End the chosen sessions").click()
    expect(staff.get_by_text("Do you want to end 1 session?")).to_be_visible()
    staff.get_by_role("button", name="Yes, end").click()
    expect(staff.get_by_text("1 session has ended.")).to_be_visible()
    expect(staff.get_by_text("No session passes the filters.")).to_be_visible()
    customer.goto(demo.url(1))
    expect(customer.get_by_role("link", name="Log in")).to_be_visible()
    other.goto(demo.url(1))
    expect(other.get_by_role("button", name="Log out")).to_be_visible()


def login_long_ago(page: Page, demo: Demo) -> None:
    """Have the login of a page's browser be an hour old."""
    record = SessionKeys.of_id("session", public_id(page)).record
    with redis.Redis.from_url(store_of(demo)) as store:
        packed = store.hget(record, "m:")
        old_ms = int.from_bytes(packed[10:16]) - 3_600_000
        store.hset(record, "m:", packed[:10] + old_ms.to_bytes(6) + packed[16:])


def test_mail_address_needs_a_recent_login(demo: Demo, visitors: Visitors) -> None:
    """A recent login passes; an older one is asked for the password, and stays logged in."""
    page = visitors.page("ada", java_script_enabled=False)
    page.goto(demo.url(0))
    page.get_by_role("link", name="Change your mail address").click()
    expect(page.get_by_role("heading", name="Your mail address")).to_be_visible()
    expect(page.get_by_text("within the last 1 minute.")).to_be_visible()
    login_long_ago(page, demo)
    page.goto(demo.url(1, "email/"))
    expect(page.get_by_role("heading", name="Confirm it is you")).to_be_visible()
    page.get_by_label("Password").fill("wrong")
    page.get_by_role("button", name="Go on").click()
    expect(page.get_by_role("alert")).to_have_text("That is not your password. Try again.")
    expect(page.get_by_role("button", name="Log out")).to_be_visible()
    page.get_by_label("Password").fill("fired-clay")
    page.get_by_role("button", name="Go on").click()
    expect(page).to_have_url(demo.url(1, "email/"))
    page.goto(demo.url(0, "email/"))
    page.get_by_label("Mail address").fill("ada@example.org")
    page.get_by_role("button", name="Change it").click()
    expect(page.get_by_text("Your mail address is changed.")).to_be_visible()


def test_mail_about_a_sign_in_ends_it(
    demo: Demo, visitors: Visitors, new_context: NewContext
) -> None:
    """The demo prints the mail; its link asks in another browser, and ends that session once."""
    page = new_context(user_agent=FIREFOX, java_script_enabled=False).new_page()
    before = len(demo.output)
    page.goto(demo.url(0, "login/"))
    page.get_by_label("Name").fill("ada")
    page.get_by_label("Password").fill("fired-clay")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_text("Logged in as ada")).to_be_visible()
    wait_for(lambda: "good for 7 days" in demo.output[before:], "the mail")
    mail = demo.output[before:]
    assert "new sign-in from Firefox on Linux, " in mail and "To: ada@" in mail
    (link,) = re.findall(r"^ +(http://\S+/sessions/sign-in/\S+/)$", mail, re.MULTILINE)
    there = new_context().new_page()
    there.goto(link)
    expect(there.get_by_role("heading", name="Was this you?")).to_be_visible()
    expect(there.get_by_text("Firefox on Linux")).to_be_visible()
    assert_fits_and_is_accessible(there)
    page.goto(demo.url(1))
    expect(page.get_by_text("Logged in as ada")).to_be_visible()
    there.get_by_role("button", name="End this session").click()
    expect(there.get_by_role("heading", name="The session has ended.")).to_be_visible()
    assert_fits_and_is_accessible(there)
    assert [cookie["name"] for cookie in there.context.cookies()] == ["csrftoken"]
    page.reload()
    expect(page.get_by_role("link", name="Log in")).to_be_visible()
    there.goto(link)
    expect(there.get_by_role("heading", name="That session had ended already.")).to_be_visible()


def assert_fits_and_is_accessible(page: Page) -> None:
    """Fail if a page about sessions scrolls sideways or axe finds something wrong with it."""
    for width, scheme in ((1280, "light"), (320, "dark")):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = Axe().run(page, context=".devices", options=AXE_OPTIONS)
        assert found.violations_count == 0, found.generate_report()


def test_customer_is_not_let_into_the_admin(demo: Demo, visitors: Visitors) -> None:
    """A user who is not staff sees the admin's login page."""
    page = visitors.page("ada")
    page.goto(demo.url(0, "../admin/clustered_sessions/session/"))
    expect(page.get_by_text("not authorized to access this page")).to_be_visible()


def test_charts_have_tables_that_open_without_a_script(demo: Demo, visitors: Visitors) -> None:
    """The table below a chart opens without a script."""
    page = visitors.page("grace", java_script_enabled=False)
    page.goto(demo.url(0, "../admin/clustered_sessions/session/"))
    for title in ("Sessions", "Requests in 5 minutes"):
        section = page.get_by_role("region", name=title, exact=True)
        expect(section.get_by_role("img")).to_be_visible()
        section.get_by_text("The numbers").click()
        expect(section.get_by_role("table")).to_be_visible()
    now = page.get_by_role("region", name="Sessions", exact=True).get_by_role("row").nth(1)
    assert int(now.get_by_role("cell").inner_text()) >= 1
    page.get_by_role("link", name="24 hours").click()
    expect(page.get_by_role("link", name="24 hours")).to_have_attribute("aria-current", "page")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (320, "dark")])
def test_pages_fit_and_are_accessible(
    demo: Demo, visitors: Visitors, width: int, scheme: str
) -> None:
    """Nothing scrolls sideways, and axe finds nothing wrong, with contrasts neither."""
    options: dict[str, Any] = {
        "viewport": {"width": width, "height": 800},
        "color_scheme": scheme,
    }
    customer, staff = (visitors.page(user, **options) for user in ("ada", "grace"))
    sessions = demo.url(0, "../admin/clustered_sessions/session/")
    user = f"{sessions}users/1/"
    pages = [
        (customer, demo.url(0, "devices/"), ".devices"),
        (customer, demo.url(0, "../sessions/confirm/"), ".devices"),
        (customer, demo.url(0, "email/"), "main"),
        (staff, sessions, ".sessions"),
        (staff, f"{sessions}?q=a", ".sessions"),
        (staff, f"{sessions}all/", ".sessions"),
        (staff, f"{sessions}all/?session=abc", ".sessions"),
        (staff, user, ".sessions"),
        (staff, f"{user}end/", ".sessions"),
        (staff, f"{user}end/{public_id(customer)}/", ".sessions"),
    ]
    for page, url, part in pages:
        page.goto(url)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, url
        found = Axe().run(page, context=part, options=AXE_OPTIONS)
        assert found.violations_count == 0, (url, found.generate_report())


def test_page_without_a_base_template_is_accessible(page: Page, settings: Any) -> None:
    """The whole page by axe, with messages, browsers and more than one page of rows."""
    settings.ROOT_URLCONF = (path("devices/", include("django_clustered_sessions.devices.urls")),)
    now = timezone.now()
    entries = [SessionInfo(letter * 43, "1", now, now, now, letter == "A") for letter in "ABC"]
    pages = Paginator(rows(entries), 2)
    devices = {
        "rows": pages.page(1),
        "page_range": pages.page_range,
        "count": 3,
        "has_addresses": True,
        "has_others": True,
    }
    messages = [Message(constants.SUCCESS, "Done."), Message(constants.INFO, "Done before.")]
    context = {"devices": devices, "messages": messages}
    html = render_to_string("clustered_sessions/devices.html", context)
    # A site's own styles for its header are not for the head of this page.
    assert "<header" not in html
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.set_content(html)
        found = Axe().run(page, options=AXE_OPTIONS)
        assert found.violations_count == 0, found.generate_report()


def test_screenshot_script_makes_pictures_of_the_pages(
    demo: Demo, visitors: Visitors, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script that makes the pictures of the documentation still finds its way."""
    monkeypatch.syspath_prepend(EXAMPLE)
    pictures = import_module("screenshot_pages").take(browser, demo.url(0), demo.url(1))
    assert set(pictures) == {"devices", "admin-sessions", "admin-figures"}
    for name, picture in pictures.items():
        assert picture.startswith(b"\x89PNG")
        assert f"images/{name}.png" in PAGE.read_text(encoding="utf-8")
        assert (PAGE.parent / "images" / f"{name}.png").exists()
