"""Run the demo as a user would, and open its pages in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.children import ROOT, bound
from tests.conftest import require
from tests.example.project import PATIENCE_S
from tests.servers import free_port, wait_for

EXAMPLE = ROOT / "example_project"

#: Seconds for the start of the demo: three Django processes one after the other.
START_TIMEOUT = 90.0

# By default what is expected of a page has five seconds.
expect.set_options(timeout=1000 * PATIENCE_S)

CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Demo:
    """Run ``demo.py`` in a session of its own, with its temporary files below ``folder``."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.ports = (free_port(), free_port())
        self.folder = folder
        self.output_path = folder.with_name(f"{folder.name}-output.txt")
        if "--ports" not in arguments:
            arguments += ("--ports", "{},{}".format(*self.ports))
        folder.mkdir(exist_ok=True)
        with self.output_path.open("w") as output:
            self.process = subprocess.Popen(
                bound([sys.executable, EXAMPLE / "demo.py", *arguments]),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"TMPDIR": str(folder)} | environment,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """Return what the demo has printed."""
        return self.output_path.read_text()

    def url(self, node: int, path: str = "") -> str:
        """Return the address of a page on the first (0) or the second (1) node."""
        return f"http://localhost:{self.ports[node]}/Cart/{path}"

    def wait_for_output(self, text: str, *, timeout_s: float = 20.0) -> None:
        """Return once the demo has printed the text; fail when it ends before that."""

        def said() -> bool:
            ended = self.process.poll() is not None
            if text in self.output:
                return True
            assert not ended, self.output
            return False

        wait_for(said, f"the demo says {text!r}", timeout_s=timeout_s)

    def wait_until_started(self) -> Demo:
        """Return once both nodes answer."""
        self.wait_for_output("Ctrl-C stops everything.", timeout_s=START_TIMEOUT)
        return self

    def pid(self, name: str) -> int:
        """Return the process id of a node or of the store, as the demo prints it."""
        found = re.search(rf"^  {name} .* pid (\d+)$", self.output, re.MULTILINE)
        assert found is not None, self.output
        return int(found[1])

    def ctrl_c(self) -> None:
        """Send what a terminal sends: SIGINT to the demo's whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self) -> int:
        """Return the exit status once the demo has ended."""
        return self.process.wait(START_TIMEOUT)

    def processes(self) -> list[psutil.Process]:
        """Return all running processes that the demo started, and those that they started."""
        return [process for process in psutil.process_iter() if self.started(process)]

    def started(self, process: psutil.Process) -> bool:
        """Tell whether a process runs in the demo's session, which none of them leaves."""
        try:
            is_own = os.getsid(process.pid) == self.process.pid
            return is_own and process.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.Error):
            return False

    def wait_until_gone(self) -> None:
        """Fail when one of the processes stays."""
        wait_for(lambda: not self.processes(), f"no process: {self.processes()}", timeout_s=20.0)

    def close(self) -> None:
        """End the demo, and what it has left behind where a test has failed."""
        self.process.terminate()
        try:
            self.process.wait(20)
        finally:
            for process in self.processes():
                process.kill()


def refuses(port: int) -> bool:
    """Tell whether nobody listens on a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture
def start_demo(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    """Return what starts a demo with some arguments; it ends with the test."""
    numbers = count()
    with ExitStack() as started:

        def start(*arguments: str, **environment: str) -> Demo:
            folder = tmp_path / f"demo{next(numbers)}"
            return started.enter_context(closing(Demo(folder, *arguments, **environment)))

        yield start


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """Run one demo for all tests that leave its processes alone."""
    with closing(Demo(tmp_path_factory.mktemp("shared") / "demo")) as demo:
        yield demo.wait_until_started()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run chromium.

    Playwright's sync API keeps an event loop running in this thread, so no module that uses this
    may hold async tests, and the scope may not be larger than a module.
    """
    path = require(shutil.which("chromium"), "chromium")
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=path, args=CHROMIUM_ARGUMENTS) as browser,
    ):
        yield browser


@pytest.fixture
def new_context(browser: Browser) -> Iterator[Callable[..., BrowserContext]]:
    """Return what opens a browser profile without cookies; it ends with the test."""
    with ExitStack() as opened:

        def new(**options: object) -> BrowserContext:
            context = opened.enter_context(browser.new_context(**options))
            context.set_default_timeout(1000 * PATIENCE_S)
            return context

        yield new


@pytest.fixture
def page(new_context: Callable[..., BrowserContext]) -> Page:
    """Open one page of a desktop browser."""
    return new_context(viewport={"width": 1280, "height": 900}).new_page()
