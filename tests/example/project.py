"""A project that Django's own command has started, and a visitor who logs in to its admin."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import httpx

from tests.children import ROOT, finish, python
from tests.servers import free_port, wait_for

#: Longest life of a command in seconds.
LIFE_S: Final = 200.0

#: Seconds for an answer on a busy machine; the first one of a page, and to check a password, takes
#: one or two where nothing else runs.
PATIENCE_S: Final = 30.0

#: The user that `Project.prepare` creates, and the password.
USER: Final = "ada"
PASSWORD: Final = "not secret"


class Project:
    """A project with the settings of a page, whose store is on a free port.

    ``interpreter`` is the Python to run it by. One that is not this one has the package installed.
    """

    def __init__(
        self, folder: Path, settings: str, interpreter: str | Path = sys.executable
    ) -> None:
        self.folder = folder
        self.interpreter = interpreter
        self.environment = os.environ | {
            "DJANGO_SETTINGS_MODULE": "site1.settings",
            "DJANGO_SUPERUSER_PASSWORD": PASSWORD,
            "PYTHONPATH": str(ROOT) if interpreter == sys.executable else "",
        }
        self.run("-m", "django", "startproject", "site1", ".", DJANGO_SETTINGS_MODULE="")
        with (folder / "site1" / "settings.py").open("a", encoding="utf-8") as file:
            file.write(settings.replace(":6379/", f":{free_port()}/"))
            # A busy machine may stall for seconds.
            file.write("\nCLUSTERED_SESSIONS_STORE_TIMEOUT = 10.0\n")

    def run(self, *arguments: str, **environment: str) -> str:
        """Run Python to its end, and return its output."""
        with python(
            *arguments,
            interpreter=self.interpreter,
            life_s=LIFE_S,
            cwd=self.folder,
            env=self.environment | environment,
        ) as process:
            (output,) = finish(process)
        return output

    def manage(self, *arguments: str) -> str:
        """Run a command to its end, and return its output."""
        return self.run("manage.py", *arguments)

    def start(self, *arguments: str) -> AbstractContextManager[subprocess.Popen[str]]:
        """Run a command in the background."""
        return python(
            "manage.py",
            *arguments,
            interpreter=self.interpreter,
            life_s=LIFE_S,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def prepare(self) -> None:
        """Go from the started store to the first user."""
        wait_for((self.folder / ".sessionstore").exists, "the store is there", timeout_s=60)
        assert "no issues" in self.manage("check")
        self.manage("migrate")
        self.manage("createsuperuser", "--noinput", f"--username={USER}", "--email=ada@example.com")


def answers(url: str, status: int = 200) -> None:
    """Wait until an address answers with a status."""

    def does() -> bool:
        try:
            return httpx.get(url, timeout=PATIENCE_S).status_code == status
        except httpx.TransportError:
            return False

    wait_for(does, f"{url} answers {status}", timeout_s=60)


def visitor() -> httpx.Client:
    """Return the browser of a visitor."""
    return httpx.Client(follow_redirects=True, timeout=PATIENCE_S)


def log_in(browser: httpx.Client, url: str) -> None:
    """Log in to the admin of a node."""
    login = f"{url}/admin/login/?next=/admin/"
    token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', browser.get(login).text)
    assert token is not None
    form = {"username": USER, "password": PASSWORD, "csrfmiddlewaretoken": token[1]}
    assert "Log out" in browser.post(login, data=form).text
