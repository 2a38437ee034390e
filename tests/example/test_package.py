"""The wheel, as an index would give it: what is in it, and that it works where it is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

import django_clustered_sessions
from tests.children import ROOT, bound
from tests.servers import StoreServer

# They build with pip and the package index, which answer when they like.
pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

PACKAGE = Path(django_clustered_sessions.__file__).parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, so that no old build folder leaks into it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=ignored)
    run_pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", source / "dist", source)
    (built,) = (source / "dist").iterdir()
    return built


def run_pip(python: str | Path, *arguments: str | Path) -> None:
    command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(bound(command), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(ZipFile(wheel).namelist())
    packed = {name for name in names if ".dist-info/" not in name}
    kept = (path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert packed == {path.relative_to(PACKAGE.parent).as_posix() for path in kept}
    assert f"{PACKAGE.name}/py.typed" in packed
    assert any(name.endswith(".lua") for name in packed)


SESSION = """
import sys
import django
from django.conf import settings
settings.configure(
    SECRET_KEY="not secret",
    INSTALLED_APPS=["django_clustered_sessions"],
    CACHES={"sessions": {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": sys.argv[1]}},
    SESSION_CACHE_ALIAS="sessions",
)
django.setup()
from django_clustered_sessions.backend import SessionStore
session = SessionStore()
session["cart"] = ["tea"]
session.save()
print(django.VERSION, SessionStore(session.session_key).load())
"""


def test_installed_wheel_loads_a_session(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run_pip(python, "install", wheel)
    with StoreServer() as server:
        done = subprocess.run(
            [python, "-W", "error", "-c", SESSION, f"{server.url}/1"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("{'cart': ['tea']}\n")
