"""The image of the example, built without a registry of images, and the composition on it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.children import ROOT
from tests.conftest import require
from tests.example.composition import Builder, Composition, run
from tests.example.test_deploy import DEPLOY, PATIENCE_S, Process, is_healthy
from tests.servers import free_port, wait_for

pytestmark = [
    pytest.mark.full,
    pytest.mark.image,
    pytest.mark.skipif(os.geteuid() != 0, reason="a chroot needs root"),
    pytest.mark.timeout(1800),
]


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


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    """Build the image ``shop:1``."""
    folder = tmp_path_factory.mktemp("image")
    yield built(folder)
    shutil.rmtree(folder)


def built(folder: Path) -> Builder:
    """Return a builder that has the image ``shop:1``, made from this machine's distribution."""
    builder = Builder(folder)
    debootstrap = require(
        shutil.which("debootstrap", path=f"{os.environ['PATH']}:/usr/sbin"), "debootstrap"
    )
    system = folder / "system"
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
    return builder


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


@pytest.fixture
def composition(builder: Builder, tmp_path: Path) -> Iterator[Composition]:
    """Run the whole composition, as its file says."""
    settings = {"SHOP_SECRET_KEY": "not secret: tests only", "STORE_PASSWORD": "notsecret"}
    with Composition(DEPLOY / "compose.yaml", tmp_path, builder, **settings) as running:
        yield running
        print(running.output())


def test_composition_serves_one_session_from_all_nodes(composition: Composition) -> None:
    """Through the proxy: a cart, a login, and the same after the end of a node."""
    nodes = {name for name in composition.services if name.startswith("app")}
    url, host = composition.published()
    with httpx.Client(
        base_url=url, headers={"Host": host}, timeout=PATIENCE_S, trust_env=False
    ) as browser:

        def post(path: str, **data: str) -> int:
            data["csrfmiddlewaretoken"] = browser.cookies["csrftoken"]
            return browser.post(path, data=data).status_code

        def states(count: int) -> dict[str, tuple[str, dict[str, int]]]:
            answers = [browser.get("/Cart/state.json").json() for _ in range(count)]
            return {answer["node"]: (answer["user"], answer["cart"]) for answer in answers}

        def add(sku: str) -> bool:
            return post(f"/Cart/{sku}/change/", action="add") == 302

        # The proxy has looked at its nodes, and the primary has a replica.
        wait_for(lambda: browser.get("/Cart/").status_code == 200, "a page", timeout_s=PATIENCE_S)
        wait_for(lambda: add("jug"), "the cart takes a jug", timeout_s=PATIENCE_S)
        wait_for(lambda: states(9).keys() == nodes, "all nodes answer", timeout_s=PATIENCE_S)
        assert states(9) == dict.fromkeys(nodes, (None, {"jug": 1}))
        browser.get("/Cart/login/")
        assert post("/Cart/login/", username="ada", password="fired-clay") == 302
        assert states(9) == dict.fromkeys(nodes, ("ada", {"jug": 1}))
        killed = min(nodes)
        composition.processes[killed].close()
        browser.get("/Cart/")
        assert add("bowl")
        assert states(9) == dict.fromkeys(nodes - {killed}, ("ada", {"jug": 1, "bowl": 1}))
