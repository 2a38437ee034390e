#!/usr/bin/env python
"""Make the picture of the README: one cart, seen on both nodes, side by side.

Needs Playwright for Python and chromium on PATH. Run it after a change of the pages:

    python example_project/screenshot.py
"""

from __future__ import annotations

import argparse
import base64
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).resolve().parent
PICTURE = HERE.parent / "docs" / "images" / "cart.png"
WINDOW = {"width": 1120, "height": 1090}

CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

STYLE = """
body { margin: 0; padding: 36px; display: flex; gap: 36px; background: #d9d2c8; }
figure { margin: 0; border-radius: 14px; overflow: hidden; box-shadow: 0 14px 40px #0004; }
figcaption { display: flex; gap: 9px; align-items: center; padding: 13px 18px;
             background: #f4f1ec; }
i { width: 14px; height: 14px; border-radius: 50%; background: #cfc6ba; }
code { margin-left: 14px; padding: 6px 18px; flex: 1; border-radius: 99px; background: white;
       font: 19px "Liberation Sans", sans-serif; color: #4a4039; }
img { display: block; }
"""


@contextmanager
def demo(ports: str, *arguments: str) -> Iterator[None]:
    """Run the demo on two ports, given as ``9081,9082``."""
    command = [sys.executable, str(HERE / "demo.py"), "--ports", ports, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            if not any("Ctrl-C" in line for line in process.stdout):
                raise SystemExit("The demo did not start.")
            yield
        finally:
            process.terminate()


def shop(page: Page, first: str, second: str) -> None:
    """Look around and fill the cart, now on one node, now on the other."""
    for url in (f"{first}bowl/", f"{second}vase/", f"{first}tagine/", f"{second}jug/"):
        page.goto(url)
    log_in(page, first)
    page.goto(first)
    page.locator("#add-amphora").click()
    page.goto(second)
    for sku in ("teapot", "mug", "mug"):
        page.locator(f"#add-{sku}").click()


def log_in(page: Page, url: str, name: str = "") -> None:
    """Log in as a user, the one that the page names for none."""
    page.goto(f"{url}login/")
    page.locator("#id_username").fill(name or page.locator("kbd").nth(0).inner_text())
    page.locator("#id_password").fill(page.locator("kbd").nth(1).inner_text())
    page.get_by_role("button", name="Log in").click()


def window(page: Page, url: str) -> str:
    """Return the HTML of a browser window that shows a page."""
    page.goto(url)
    image = base64.b64encode(page.screenshot()).decode()
    return (
        f"<figure><figcaption><i></i><i></i><i></i><code>{url}</code></figcaption>"
        f'<img src="data:image/png;base64,{image}"></figure>'
    )


def main() -> None:
    """Take the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ports", default="9081,9082", help="ports of the two nodes")
    parser.add_argument("--to", type=Path, default=PICTURE, help="file to write")
    options = parser.parse_args()
    first, second = (f"http://localhost:{port}/Cart/" for port in options.ports.split(","))
    with demo(options.ports), sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=CHROMIUM_ARGUMENTS
        )
        page = browser.new_page(viewport=WINDOW, reduced_motion="reduce")
        shop(page, first, second)
        windows = window(page, first) + window(page, second)
        page.set_viewport_size({"width": 2 * WINDOW["width"] + 3 * 36, "height": 100})
        page.set_content(f"<!DOCTYPE html><style>{STYLE}</style>{windows}")
        options.to.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=options.to, full_page=True)
        browser.close()
    print(options.to)


if __name__ == "__main__":
    main()
