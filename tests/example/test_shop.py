"""The shop's pages, in a real browser and by HTTP."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.children import bound
from tests.conftest import require
from tests.example.conftest import EXAMPLE, Demo, refuses
from tests.example.project import PATIENCE_S
from tests.servers import free_port, wait_for

# Two demos are started for one of them, and a busy machine takes half a minute for each.
pytestmark = pytest.mark.timeout(240)

NewContext = Callable[..., BrowserContext]

PAGES = ("", "jug/", "login/", "no-such-product/")

#: The widths of two phones, a tablet and a desk.
WIDTHS = (320, 390, 768, 1280)


def state(page: Page, demo: Demo, node: int) -> dict[str, object]:
    """Return what a node knows of the page's session."""
    answer = page.request.get(demo.url(node, "state.json"))
    return dict(answer.json())


def follow(page: Page, node: str) -> None:
    """Follow the link to the same page on the other node."""
    page.get_by_role("navigation").get_by_role("link", name=f"Same page on {node}").click()


def log_in(page: Page) -> None:
    """Log in with the name and the password that the page shows."""
    page.get_by_role("link", name="Log in").click()
    expect(page.locator("kbd")).to_have_count(2)
    name, password = page.locator("kbd").all_inner_texts()
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Log in").click()


def focused(page: Page) -> str:
    """Return the id, or else the text, of the element that has the focus."""
    return str(page.evaluate("document.activeElement.id || document.activeElement.innerText"))


def wait_for_focus(page: Page, name: str) -> None:
    """Wait until an element has the focus: a page goes to its fragment once it is loaded."""
    wait_for(lambda: focused(page) == name, f"{name} has the focus")


@pytest.mark.parametrize("node", [0, 1])
def test_cart_filled_on_one_node_is_on_the_other(demo: Demo, page: Page, node: int) -> None:
    """Add here, follow the link, find it there; change it there, see it here."""
    here, there = ("terracotta", "cobalt") if node == 0 else ("cobalt", "terracotta")
    page.goto(demo.url(node))
    expect(page.get_by_role("heading", level=1)).to_have_text(f"You are on {here}.")
    page.get_by_role("button", name="Add Teapot to cart").click()
    page.get_by_role("button", name="Add Teapot to cart").click()
    expect(page.get_by_role("status")).to_have_text("Teapot is in the cart: 2.")
    follow(page, there)
    expect(page).to_have_url(demo.url(1 - node))
    expect(page.get_by_role("heading", level=1)).to_have_text(f"You are on {there}.")
    expect(page.locator("#quantity-teapot")).to_have_text("2 in the cart")
    page.get_by_role("button", name="One Teapot less").click()
    follow(page, here)
    expect(page.locator("#quantity-teapot")).to_have_text("1 in the cart")
    page.get_by_role("button", name="Remove Teapot").click()
    expect(page.get_by_role("status")).to_have_text("Teapot is out of the cart.")
    assert state(page, demo, 0)["cart"] == state(page, demo, 1)["cart"] == {}


def test_link_to_other_node_leads_to_the_same_page(demo: Demo, page: Page) -> None:
    """On a product's page the link leads to that product on the other node."""
    page.goto(demo.url(0, "jug/"))
    follow(page, "cobalt")
    expect(page).to_have_url(demo.url(1, "jug/"))


def test_history_names_products_and_their_nodes(demo: Demo, page: Page) -> None:
    """Products seen on either node are listed newest first, with the node that showed them."""
    page.goto(demo.url(0, "jug/"))
    page.goto(demo.url(1, "vase/"))
    page.goto(demo.url(0, "bowl/"))
    page.goto(demo.url(1, "jug/"))
    for node in (0, 1):
        page.goto(demo.url(node))
        seen = page.get_by_role("region", name="Seen lately").get_by_role("listitem")
        expect(seen).to_have_text(
            [
                re.compile(r"Water jug\s+seen on cobalt"),
                re.compile(r"Mixing bowl\s+seen on terracotta"),
                re.compile(r"Bud vase\s+seen on cobalt"),
            ]
        )
    assert state(page, demo, 0)["seen"] == ["jug", "vase", "bowl", "jug"]


def test_login_and_logout_count_on_both_nodes(demo: Demo, page: Page) -> None:
    """The cart comes along with a login; a logout ends the session on both nodes."""
    page.goto(demo.url(0, "mug/"))
    page.get_by_role("button", name="Add to cart").click()
    log_in(page)
    expect(page).to_have_url(demo.url(0, "mug/"))
    expect(page.get_by_role("status")).to_contain_text("Welcome, ada.")
    follow(page, "cobalt")
    expect(page.get_by_text("Logged in as ada")).to_be_visible()
    known = state(page, demo, 1)
    assert (known["user"], known["cart"]) == ("ada", {"mug": 1})
    page.goto(demo.url(1, "login/"))
    expect(page).to_have_url(demo.url(1))
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_role("status")).to_contain_text("You are logged out on every node")
    page.goto(demo.url(0))
    expect(page.get_by_role("link", name="Log in")).to_be_visible()
    for node in (0, 1):
        known = state(page, demo, node)
        assert (known["user"], known["cart"]) == (None, {})


def test_wrong_password_is_refused(demo: Demo, page: Page) -> None:
    """The form says so and keeps the name."""
    page.goto(demo.url(0, "login/"))
    page.get_by_label("Name").fill("ada")
    page.get_by_label("Password").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_be_visible()
    expect(page.get_by_label("Name")).to_have_value("ada")


def test_keyboard_alone_fills_the_cart(demo: Demo, page: Page) -> None:
    """Skip to the products, add one twice without losing the focus, and change the cart."""
    page.goto(demo.url(0))
    page.keyboard.press("Tab")
    assert focused(page) == "Skip to the content"
    expect(page.get_by_role("link", name="Skip to the content")).to_be_in_viewport(ratio=1)
    page.keyboard.press("Enter")
    wait_for_focus(page, "content")
    page.keyboard.press("Tab")
    assert focused(page) == "Amphora"
    page.keyboard.press("Tab")
    for quantity in (1, 2):
        wait_for_focus(page, "add-amphora")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_have_text(f"Amphora is in the cart: {quantity}.")
    for key, expected in (("more", "3"), ("less", "2")):
        page.locator("#more-amphora").wait_for()
        while focused(page) != f"{key}-amphora":
            page.keyboard.press("Shift+Tab" if key == "less" else "Tab")
        page.keyboard.press("Space")
        expect(page.locator("#quantity-amphora")).to_have_text(f"{expected} in the cart")
        wait_for_focus(page, f"{key}-amphora")
    page.keyboard.press("Enter")
    expect(page.locator("#quantity-amphora")).to_have_text("1 in the cart")
    wait_for_focus(page, "less-amphora")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("Amphora is out of the cart.")
    wait_for_focus(page, "cart")


def test_shop_works_without_javascript(demo: Demo, new_context: NewContext) -> None:
    """Forms and redirects do all the work."""
    page = new_context(java_script_enabled=False).new_page()
    page.goto(demo.url(1))
    page.get_by_role("button", name="Add Mug to cart").click()
    expect(page.get_by_role("status")).to_have_text("Mug is in the cart: 1.")
    page.get_by_role("button", name="One Mug more").click()
    expect(page.locator("#quantity-mug")).to_have_text("2 in the cart")
    page.get_by_role("button", name="Remove Mug").click()
    expect(page.get_by_text("Nothing in it yet.")).to_be_visible()
    log_in(page)
    expect(page.get_by_role("button", name="Log out")).to_be_visible()


def test_reload_adds_nothing(demo: Demo, page: Page) -> None:
    """The answer to a form is a redirect, and its message is shown once."""
    page.goto(demo.url(0))
    page.get_by_role("button", name="Add Mug to cart").click()
    expect(page.get_by_role("status")).to_have_text("Mug is in the cart: 1.")
    page.reload()
    expect(page.get_by_role("status")).to_have_text("")
    assert state(page, demo, 0)["cart"] == {"mug": 1}


def test_no_page_scrolls_sideways(demo: Demo, page: Page) -> None:
    """Pages with a full cart fit each width."""
    page.goto(demo.url(0, "planter/"))
    page.goto(demo.url(0))
    for name in ("Mixing bowl", "Water jug"):
        page.get_by_role("button", name=f"Add {name} to cart").click()
    log_in(page)
    for path in PAGES:
        page.goto(demo.url(0, path))
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("innerWidth") == width
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path


def test_header_of_a_phone_hides_no_focused_button(demo: Demo, page: Page) -> None:
    """After adding to the cart the header has two rows, and the button is below it."""
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(demo.url(0))
    log_in(page)
    for _ in range(12):
        page.get_by_role("button", name="Add Water jug to cart").click()
    button = page.locator("#add-jug")
    header = page.locator(".bar-top").bounding_box()
    box = button.bounding_box()
    assert header is not None
    assert box is not None
    assert header["height"] < 128
    assert box["y"] >= header["y"] + header["height"]


def test_staff_is_named_beside_the_password_only(demo: Demo, page: Page) -> None:
    """No other page speaks of a password, or names who may open the admin."""
    page.goto(demo.url(0))
    expect(page.locator("footer")).not_to_contain_text("grace")
    page.goto(demo.url(0, "login/"))
    expect(page.locator(".hint")).to_contain_text("grace")


def test_text_is_readable_in_light_and_dark(demo: Demo, page: Page) -> None:
    """Text, soft text, links on the band and buttons reach a contrast of 4.5 on their ground."""
    for node, scheme in ((0, "light"), (1, "dark"), (0, "dark"), (1, "light")):
        page.emulate_media(color_scheme=scheme)
        page.goto(demo.url(node))
        pairs = page.evaluate(
            """() => {
              const canvas = document.createElement("canvas").getContext("2d");
              const rgb = (colour) => {
                canvas.fillStyle = colour;
                canvas.fillRect(0, 0, 1, 1);
                return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
              };
              const ground = (selector) =>
                rgb(getComputedStyle(document.querySelector(selector)).backgroundColor);
              const text = (selector) =>
                rgb(getComputedStyle(document.querySelector(selector)).color);
              return [
                ["body", text("body"), ground("body")],
                ["shelf", text(".shelf p"), ground("body")],
                ["panel", text(".empty"), ground(".panel")],
                ["button", text(".add"), ground("body")],
                ["band", text(".hero"), ground(".hero")],
                ["bar", text(".brand"), ground(".bar-top")],
              ];
            }"""
        )
        for name, text, ground in pairs:
            assert contrast(text, ground) >= 4.5, (scheme, node, name, text, ground)


def contrast(first: list[int], second: list[int]) -> float:
    """Return the contrast of two colours as WCAG defines it, 1 to 21."""

    def luminance(colour: list[int]) -> float:
        parts = [value / 255 for value in colour]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_pages_ask_no_other_host_and_log_no_error(demo: Demo, page: Page) -> None:
    """Nothing comes from another host, and the console stays empty."""
    asked: list[str] = []
    logged: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: logged.append(message.text))
    page.on("pageerror", lambda error: logged.append(str(error)))
    for path in PAGES[:3]:
        page.goto(demo.url(1, path))
    own = demo.url(1).removesuffix("Cart/")
    assert [url for url in asked if not url.startswith((own, "data:"))] == []
    assert logged == []


def test_killed_gunicorn_node_takes_nothing_with_it(
    start_demo: Callable[..., Demo], page: Page
) -> None:
    """Log in and fill the cart on a node, kill it: the other goes on with all of it."""
    demo = start_demo().wait_until_started()
    page.goto(demo.url(0, "lantern/"))
    page.get_by_role("button", name="Add to cart").click()
    log_in(page)
    os.kill(demo.pid("terracotta"), signal.SIGKILL)
    demo.wait_for_output("terracotta died (killed by SIGKILL). cobalt goes on")
    # The worker that gunicorn has left behind would answer once more.
    assert refuses(demo.ports[0])
    page.goto(demo.url(1))
    expect(page.get_by_text("Logged in as ada")).to_be_visible()
    expect(page.locator("#quantity-lantern")).to_have_text("1 in the cart")
    page.get_by_role("button", name="One Lantern more").click()
    expect(page.locator("#quantity-lantern")).to_have_text("2 in the cart")
    assert state(page, demo, 1) == {
        "node": "cobalt",
        "user": "ada",
        "cart": {"lantern": 2},
        "seen": ["lantern", "lantern", "lantern"],
    }
    demo.ctrl_c()
    assert demo.wait() == 0
    assert demo.processes() == []


def test_visitor_without_a_session_gets_no_cookie(demo: Demo) -> None:
    """Looking at the shelf stores nothing."""
    for node in (0, 1):
        for path in ("", "state.json"):
            assert "sessionid" not in httpx.get(demo.url(node, path), timeout=PATIENCE_S).cookies


def test_form_without_csrf_token_is_refused(demo: Demo) -> None:
    """A change needs the CSRF token, and leads back to this site only."""
    with httpx.Client(timeout=PATIENCE_S) as client:
        url = demo.url(0, "mug/change/")
        assert client.post(url, data={"action": "add"}).status_code == 403
        client.get(demo.url(0, "login/"))
        data = {"csrfmiddlewaretoken": client.cookies["csrftoken"], "next": "//example.org/"}
        assert client.post(url, data=data).headers["location"] == "/Cart/#add-mug"
        assert client.get(url).status_code == 405


def test_screenshot_script_makes_a_picture(tmp_path: Path) -> None:
    """The script that makes the picture of the README makes one."""
    require(shutil.which("chromium"), "chromium")
    picture = tmp_path / "cart.png"
    subprocess.run(
        bound(
            [
                *(sys.executable, EXAMPLE / "screenshot.py"),
                *("--ports", f"{free_port()},{free_port()}", "--to", picture),
            ]
        ),
        check=True,
        timeout=200,
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
