"""The tutorial, step by step, in a project that Django's own command has started."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.example.project import Project, answers, log_in, visitor
from tests.pages import block
from tests.servers import free_port, wait_for

# It starts eight Pythons, four of which stay.
pytestmark = [pytest.mark.full, pytest.mark.timeout(240)]


def port_of(url: str) -> str:
    return url.rpartition(":")[2]


def test_tutorial_leads_to_a_login_on_two_nodes(tmp_path: Path) -> None:
    project = Project(tmp_path, block("tutorial.md", "CACHES = {"))
    (tmp_path / "site1" / "urls.py").write_text(block("tutorial.md", "def visits"))
    first, second = (f"http://localhost:{free_port()}" for _ in range(2))
    with project.start("sessionserver") as server:
        project.prepare()
        with (
            project.start("runserver", "--noreload", port_of(first)),
            project.start("runserver", "--noreload", port_of(second)),
            visitor() as browser,
        ):
            for url in (first, second):
                answers(f"{url}/admin/login/")
            assert browser.get(first).json() == {"visits": 1, "cart": {"tea": 1}}
            assert browser.get(second).json() == {"visits": 2, "cart": {"tea": 2}}
            log_in(browser, first)
            assert "Log out" in browser.get(f"{second}/admin/").text
            assert re.search(r"logged in +1\n", project.manage("sessionstats"))

            server.send_signal(signal.SIGINT)
            server.wait(30)
            assert browser.get(second).status_code == 503
            with project.start("sessionserver"):
                wait_for(lambda: browser.get(second).status_code == 200, "it is back", timeout_s=30)
                assert browser.get(first).json() == {"visits": 4, "cart": {"tea": 4}}
                assert "Log out" in browser.get(f"{first}/admin/").text
