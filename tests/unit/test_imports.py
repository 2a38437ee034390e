"""Import the whole package; ``.importlinter`` holds which module may import which."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from configparser import ConfigParser

from tests.children import ROOT
from tests.pages import page

IMPORT_ALL = """
import importlib, os, pkgutil, sys, threading
os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
def audit(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.fork"):
        raise SystemExit(f"{event} {arguments}")
sys.addaudithook(audit)
import django
django.setup()
import django_clustered_sessions as package
names = [found.name for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    importlib.import_module(name)
assert threading.active_count() == 1, threading.enumerate()
print(*names)
"""


#: Programs import these before they choose their settings.
IMPORT_FIRST = """
from django.conf import settings
import django_clustered_sessions.backend
import django_clustered_sessions.channels
import django_clustered_sessions.decorators
import django_clustered_sessions.middleware
import django_clustered_sessions.registry
import django_clustered_sessions.signals
assert not settings.configured
"""


def test_importing_what_a_site_names_reads_no_setting() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT_FIRST],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if "SETTINGS" not in name},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr


def test_importing_the_package_opens_no_connection() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT_ALL],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert "django_clustered_sessions.store.connections" in ran.stdout.split()


def test_documentation_shows_the_rows_that_imports_are_held_to() -> None:
    contracts = ConfigParser()
    contracts.read(ROOT / ".importlinter")
    held = {
        contract["containers"].removeprefix("django_clustered_sessions.").replace(".", "/"): [
            row for row in contract["layers"].splitlines() if row
        ]
        for contract in contracts.values()
        if contract.get("type") == "layers"
    }
    shown: dict[str, list[str]] = {}
    picture = page("internals.md").partition("## Modules\n")[2].partition("\n## ")[0]
    for folder, rows in re.findall(r"^([\w/]+)/\n((?: {4}.*\n)+)", picture, re.MULTILINE):
        shown[folder] = [re.split(" {2,}", row.strip())[0] for row in rows.splitlines()]
    assert shown == held
