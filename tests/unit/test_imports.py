"""Import the whole package; which module may import which is held by ``.importlinter``."""

from __future__ import annotations

import subprocess
import sys

from tests.children import ROOT

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
