#!/usr/bin/env python
"""Make the pictures of docs/pages.md: "Your devices", and the sessions in the admin.

Needs what screenshot.py needs. What the plots show is made up, the rest is as it is:

    python example_project/screenshot_pages.py
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import socket
import time
from pathlib import Path
from random import Random

import redis
from playwright.sync_api import Browser, Page, sync_playwright
from screenshot import CHROMIUM_ARGUMENTS, PICTURE, STYLE, demo, log_in, window

DESK = {"width": 1160, "height": 620}
PHONE = {"width": 390, "height": 620}
CHROME = (
    "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) "
    "Chrome/142.0.0.0 Safari/537.36"
)
FIREFOX = "Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:145.0) Gecko/20100101 Firefox/145.0"
SAFARI = (
    "Mozilla/5.0 (iPhone; CPU iPhone OS 18_6 like Mac OS X) AppleWebKit/605.1.15 "
    "(KHTML, like Gecko) Version/18.6 Mobile/15E148 Safari/604.1"
)
#: A day of the shop: the busy hours are in the middle of it.
HOURS = 24
NODES = ("terracotta", "cobalt")
NARROW = "code { width: 0; overflow: hidden; font-size: 16px; white-space: nowrap; }"


def make_up(store: str) -> None:
    """Fill the store with visitors, and with what two nodes would have counted in a day."""
    os.environ |= {"DJANGO_SETTINGS_MODULE": "shop.settings", "SHOP_STORE": store}
    import django

    django.setup()
    from django_clustered_sessions.backend import SessionStore
    from django_clustered_sessions.monitoring.counters import KEPT
    from django_clustered_sessions.monitoring.history import SLOT_MS

    random = Random(6)
    now = int(time.time() * 1000) // SLOT_MS
    slots = range(now - HOURS * 3_600_000 // SLOT_MS, now)
    levels = [400 + round(250 * math.sin(2.6 + (slot - now) / len(slots) * 6.3)) for slot in slots]
    for _ in range(levels[-1]):
        session = SessionStore()
        session["cart"] = {}
        session.save()
    lines = {}
    for slot, level, before in zip(slots, levels, [levels[0], *levels], strict=False):
        for node in NODES:
            gone = random.randrange(6, 18)
            counted = {
                "requests": round(level * random.uniform(0.8, 1.2)),
                "created": gone + (level - before) // 2,
                "ended": gone // 3,
                "expired": gone - gone // 3,
                "lock_waits": max(0, round(random.gauss(level / 60, 3))),
                "store_errors": random.randrange(8) if 40 < now - slot < 44 else 0,
            }
            lines[f"{slot} {node}"] = " ".join(str(counted.get(name, 0)) for name in KEPT)
    with redis.Redis.from_url(store) as client:
        client.hset("session:{000}:history", mapping=lines)


def side_by_side(page: Page, windows: str, width: int) -> bytes:
    """Return a picture of some windows."""
    page.set_viewport_size({"width": width, "height": 100})
    page.set_content(f"<!DOCTYPE html><style>{STYLE}{NARROW}</style>{windows}")
    return page.screenshot(full_page=True)


def take(browser: Browser, first: str, second: str) -> dict[str, bytes]:
    """Return the pictures by their names."""
    desk = browser.new_page(viewport=DESK, reduced_motion="reduce", user_agent=CHROME)
    phone = browser.new_page(
        viewport=PHONE, reduced_motion="reduce", color_scheme="dark", user_agent=SAFARI
    )
    staff = browser.new_page(viewport=DESK)
    paper = browser.new_page()
    for page, url in (
        (browser.new_page(user_agent=FIREFOX), second),
        (phone, second),
        (desk, first),
    ):
        log_in(page, url)
    log_in(staff, first, "grace")
    admin = first.replace("Cart/", "admin/clustered_sessions/session/")
    user = f"{admin}users/1/"
    both = DESK["width"] + PHONE["width"] + 3 * 36
    devices = window(desk, f"{first}devices/") + window(phone, f"{second}devices/")
    staff.goto(user)
    end = staff.get_by_role("link", name="End session").first.get_attribute("href") or ""
    sessions = window(staff, user)
    staff.emulate_media(color_scheme="dark")
    sessions += window(staff, first.replace("/Cart/", end))
    staff.emulate_media(color_scheme="light")
    staff.set_viewport_size({"width": 1160, "height": 1560})
    figures = window(staff, f"{admin}?hours=24")
    return {
        "devices": side_by_side(paper, devices, both),
        "admin-sessions": side_by_side(paper, sessions, 2 * DESK["width"] + 3 * 36),
        "admin-figures": side_by_side(paper, figures, DESK["width"] + 2 * 36),
    }


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ports", default="9081,9082", help="ports of the two nodes")
    parser.add_argument("--to", type=Path, default=PICTURE.parent, help="folder to write to")
    options = parser.parse_args()
    first, second = (f"http://localhost:{port}/Cart/" for port in options.ports.split(","))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with demo(options.ports, "--store-port", str(port)):
        make_up(f"redis://127.0.0.1:{port}/0")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=CHROMIUM_ARGUMENTS
            )
            pictures = take(browser, first, second)
            browser.close()
    options.to.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        path = options.to / f"{name}.png"
        path.write_bytes(picture)
        print(path)


if __name__ == "__main__":
    main()
