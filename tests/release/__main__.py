"""Build sdist, wheel and SBOM of the committed files, and check them as an index would get them.

    python -m tests.release [--output dist] [--tag v1.2.3]

Both are built twice, in folders of their own, and must be equal to the byte. Each is checked by
twine and check-wheel-contents, holds what it should, and is installed into a clean environment,
where every module can be imported. The unit tests run from the unpacked sdist. With ``--tag``, the
tag and the newest entry of CHANGELOG.md must be the version's.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
from email.parser import HeaderParser
from pathlib import Path
from typing import Final
from zipfile import ZipFile

from django_clustered_sessions import __version__
from tests.children import ROOT
from tests.release.changelog import newest

PACKAGE: Final = "django_clustered_sessions"

#: Program that imports all modules of the installed package but those of the extras.
IMPORT: Final = f"""
import importlib, pkgutil, sys
import django
from django.conf import settings
settings.configure(
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "{PACKAGE}"],
    SESSION_ENGINE="{PACKAGE}.backend",
)
django.setup()
import {PACKAGE} as package
assert package.__file__.startswith(sys.prefix), package.__file__
optional = {{"opentelemetry", "prometheus", "pytest_plugin", "serializers", "admin"}}
for module in pkgutil.walk_packages(package.__path__, "{PACKAGE}."):
    if module.name.split(".")[1] not in optional:
        importlib.import_module(module.name)
print(package.__version__)
"""


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command that must succeed, and return its output."""
    print("+", *(str(word) if "\n" not in str(word) else "..." for word in command), flush=True)
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{command[0]} failed with {done.returncode}")
    return done.stdout


def committed() -> list[str]:
    """Return the names of the files that git knows."""
    return run("git", "ls-files").splitlines()


def build(folder: Path, epoch: int) -> list[Path]:
    """Build an sdist of the committed files, and from it the wheel; return both."""
    source, output = folder / "source", folder / "dist"
    for name in committed():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((ROOT / name).read_bytes())
        path.chmod(0o755 if os.access(ROOT / name, os.X_OK) else 0o644)
    build_ = (sys.executable, "-m", "build", "--outdir", output)
    run(*build_, "--sdist", source, SOURCE_DATE_EPOCH=str(epoch))
    (sdist,) = output.iterdir()
    normalise(sdist, epoch)
    unpacked = unpack(sdist, folder)
    run(*build_, "--wheel", unpacked, SOURCE_DATE_EPOCH=str(epoch))
    return sorted(output.iterdir())


def normalise(sdist: Path, epoch: int) -> None:
    """Rewrite an sdist with sorted names, one time and no owner, which setuptools does not."""
    with tarfile.open(sdist) as old:
        files = {one.name: (one, old.extractfile(one)) for one in old.getmembers()}
        contents = {name: file.read() if file else None for name, (_, file) in files.items()}
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as new:
        for name in sorted(files):
            member = tarfile.TarInfo(name)
            member.mtime, member.type = epoch, files[name][0].type
            member.mode = 0o755 if files[name][0].mode & 0o100 else 0o644
            content = contents[name]
            member.size = len(content or b"")
            new.addfile(member, None if content is None else io.BytesIO(content))
    sdist.write_bytes(gzip.compress(raw.getvalue(), mtime=epoch))


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack an sdist below a folder, and return its own."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (found,) = (folder / "unpacked").iterdir()
    return found


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_contents(sdist: Path, wheel: Path) -> None:
    """Check that the sdist has all files, and that the description has no relative link."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = set(committed()) - names
    if missing:
        raise SystemExit(f"MANIFEST.in leaves out {', '.join(sorted(missing))}")
    (name,) = (name for name in ZipFile(wheel).namelist() if name.endswith("/METADATA"))
    metadata = HeaderParser().parsestr(ZipFile(wheel).read(name).decode())
    relative = re.findall(r"\]\((?!https?:)[^)]*\)", str(metadata.get_payload()))
    if relative or metadata["License-Expression"] != "BSD-3-Clause":
        raise SystemExit(f"the metadata has {relative or metadata['License-Expression']}")


def install(package: Path, folder: Path) -> Path:
    """Install a package into a clean environment, import all of it, and return the Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "install", package)
    run(*pip, "check")
    version = run(python, "-c", IMPORT, cwd=folder).split()[-1]
    if version != __version__:
        raise SystemExit(f"{package.name} is {version}, not {__version__}")
    return python


def write_sbom(python: Path, path: Path) -> None:
    """Write the SBOM of what an installation of the package consists of."""
    # Not the tool that has installed it.
    run(python, "-m", "pip", "--quiet", "uninstall", "--yes", "pip", "setuptools")
    tool = Path(sys.executable).parent / "cyclonedx-py"
    run(tool, "environment", "--output-reproducible", "--output-file", path, python)
    names = {one["name"] for one in json.loads(path.read_text(encoding="utf-8"))["components"]}
    if not {"django-clustered-sessions", "Django", "redis"} <= names:
        raise SystemExit(f"the SBOM has only {', '.join(sorted(names))}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.release", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    parser.add_argument("--tag", help="the tag of the release, v1.2.3")
    options = parser.parse_args()
    if options.tag and (options.tag, newest()) != (f"v{__version__}", __version__):
        raise SystemExit(
            f"the tag is {options.tag}, the version {__version__}, and the newest of CHANGELOG.md "
            f"{newest()}: all three must be one"
        )
    epoch = int(run("git", "log", "-1", "--format=%ct"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, second = (build(folder / part, epoch) for part in ("first", "second"))
        if list(map(digest, first)) != list(map(digest, second)):
            raise SystemExit("two builds of the same commit differ")
        sdist, wheel = sorted(first, key=lambda path: path.suffix != ".gz")
        run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
        run(sys.executable, "-m", "check_wheel_contents", wheel)
        check_contents(sdist, wheel)
        install(sdist, folder / "of-sdist")
        python = install(wheel, folder / "of-wheel")
        options.output.mkdir(exist_ok=True)
        sbom = options.output / f"{wheel.name.partition('-py3')[0]}.cdx.json"
        write_sbom(python, sbom)
        unit = ("-m", "pytest", "-q", "-n", "auto", "-p", "no:cacheprovider", "tests/unit")
        unpacked = folder / "first" / "unpacked"
        (source,) = unpacked.iterdir()
        print(run(sys.executable, *unit, cwd=source, PYTHONPATH=str(source)).splitlines()[-1])
        for path in (sdist, wheel):
            (options.output / path.name).write_bytes(path.read_bytes())
    for path in (options.output / sdist.name, options.output / wheel.name, sbom):
        print(digest(path), path)


if __name__ == "__main__":
    main()
