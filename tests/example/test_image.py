"""The image of the example, built from its Dockerfile without a registry of images."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.children import ROOT, bound
from tests.conftest import require
from tests.example.test_deploy import DEPLOY, PATIENCE_S, Process, is_healthy
from tests.servers import free_port, wait_for

pytestmark = [
    pytest.mark.full,
    pytest.mark.image,
    pytest.mark.skipif(os.geteuid() != 0, reason="a chroot needs root"),
    pytest.mark.timeout(1800),
]

#: Seconds for all packages of the root file system, or of the image.
DOWNLOAD_S = 900


class Builder:
    """Buildah with a store of its own, whose containers are a chroot: no namespaces, no daemon."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.command = [
            str(require(shutil.which("buildah"), "buildah")),
            *("--root", str(folder / "storage"), "--runroot", str(folder / "run")),
            *("--storage-driver", "vfs"),
        ]

    def __call__(self, *arguments: str) -> str:
        """Return what a command of buildah prints; fail with all that it says."""
        return run([*self.command, *arguments])

    def in_container(self, container: str, *arguments: str, **environment: str) -> list[str]:
        """Return the command that runs something in a container, in the network of the host."""
        settings = [f"--env={name}={value}" for name, value in environment.items()]
        return [*self.command, "run", "--isolation=chroot", *settings, container, "--", *arguments]


def run(command: list[str]) -> str:
    """Return what a command prints; fail with all that it says."""
    done = subprocess.run(bound(command), capture_output=True, text=True, timeout=DOWNLOAD_S)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout.strip()


def suite_and_mirror() -> tuple[str, str]:
    """Return the release of this machine, and where its apt has that from."""
    require(shutil.which("apt-get"), "apt-get")
    suite = platform.freedesktop_os_release()["VERSION_CODENAME"]
    listed = run(["apt-get", "indextargets", "--format", "$(ORIGIN) $(CODENAME) $(REPO_URI)"])
    found = re.findall(rf"(?m)^(?:Debian|Ubuntu) {suite} (\S+)$", listed)
    return suite, str(found[0] if found else require(None, f"a source of {suite} for apt"))


def pip_files() -> set[Path]:
    """Return the files that this machine's pip is configured by, for the pip of the image."""
    pip = [sys.executable, "-m", "pip", "config"]
    debug = run([*pip, "debug"])
    named = re.findall(r"(/\S+), exists: True", debug)
    settings = run([*pip, "list"])
    named += re.findall(r"(?<![\w:/])(/[\w.@/-]+)", settings)
    # The pages of an index on disk lead to files beside its folder.
    named += [str(Path(index).parent) for index in re.findall(r"file://(/[\w.@/-]+)", settings)]
    return {path for path in map(Path, named) if path.exists()}


@pytest.fixture
def builder(tmp_path: Path) -> Iterator[Builder]:
    """Build the image ``shop:1``."""
    builder = Builder(tmp_path)
    debootstrap = require(
        shutil.which("debootstrap", path=f"{os.environ['PATH']}:/usr/sbin"), "debootstrap"
    )
    system = tmp_path / "system"
    suite, mirror = suite_and_mirror()
    packages = "--include=python3,python3-pip,ca-certificates"
    run([str(debootstrap), "--variant=minbase", packages, suite, str(system), mirror])
    # As the base image has them: python, and a pip that installs for all.
    (system / "usr/bin/python").symlink_to("python3")
    for marker in system.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        marker.unlink()
    (base,) = re.findall(r"(?m)^FROM (\S+)$", (DEPLOY / "Dockerfile").read_text())
    container = builder("from", "scratch")
    builder("copy", "--quiet", container, str(system), "/")
    builder("commit", "--quiet", "--rm", container, f"docker.io/library/{base}")
    shutil.rmtree(system)
    volumes = [f"--volume={path}:{path}:ro" for path in sorted(pip_files())]
    dockerfile = ["--file", str(DEPLOY / "Dockerfile"), "--tag", "shop:1", str(ROOT)]
    builder("bud", "--pull-never", "--isolation=chroot", *volumes, *dockerfile)
    yield builder
    shutil.rmtree(tmp_path / "storage")


def test_image_is_built_migrates_and_answers(builder: Builder, tmp_path: Path) -> None:
    """It holds what it needs and no more, and a node of it starts with compose's settings."""
    container = builder("from", "--pull-never", "shop:1")
    held = run(builder.in_container(container, "ls", "-A", "/srv/shop")).split()
    assert {"django_clustered_sessions", "example_project"} < set(held)
    assert not {".git", "tests", "docs"} & set(held)
    assert run(builder.in_container(container, "id", "-un")) == "shop"
    port = free_port()
    environment = {
        "SHOP_BIND": f"127.0.0.1:{port}",
        "SHOP_DATABASE": "/var/lib/shop/shop.sqlite3",
        "SHOP_NODE": "app1",
        "SHOP_PROXIES": "1",
        "SHOP_SECRET_KEY": "not secret: tests only",
        "SHOP_STORE": "redis://127.0.0.1:1/1",
    }
    run(builder.in_container(container, "python", "manage.py", "migrate", **environment))
    server = ["gunicorn", "--config", "deploy/gunicorn.conf.py", "shop.wsgi"]
    command = builder.in_container(container, *server, **environment)
    with Process(tmp_path / "log", command):
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: is_healthy(url), "a node of the image answers", timeout_s=PATIENCE_S)
