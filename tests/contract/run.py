"""Run Django's own session tests, from the sdist of the Django installed, against our engine.

Usage: python tests/contract/run.py FOLDER [-v]

The sdist is downloaded into FOLDER once for each version.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import unittest
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from unittest import mock

import django
from asgiref.sync import async_to_sync, sync_to_async
from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.test.runner import DiscoverRunner

from django_clustered_sessions.embedded import EmbeddedStore
from tests import settings as site

#: An empty run is a failure: Django 5.2 has 65 tests of a store and 12 of the middleware.
EXPECTED_TESTS = {"StoreContract": 65, "MiddlewareContract": 12, "AsyncMiddlewareContract": 12}


def main() -> int:
    """Return 0 when every test of Django's passed, 1 otherwise."""
    tests_folder = unpacked_sdist(Path(sys.argv[1])) / "tests"
    sys.path.insert(0, str(tests_folder))
    with TemporaryDirectory(prefix="dcs-") as folder, EmbeddedStore(Path(folder)) as store:
        configure(store.url)
        runner = DiscoverRunner(verbosity=2 if "-v" in sys.argv[2:] else 1)
        runner.setup_test_environment()
        databases = runner.setup_databases()
        try:
            return run(runner)
        finally:
            runner.teardown_databases(databases)
            runner.teardown_test_environment()


def unpacked_sdist(folder: Path) -> Path:
    """Return the folder with the source of the installed Django, downloaded if it is not there."""
    version = django.get_version()
    unpacked = folder / version
    if not unpacked.exists():
        download = ("download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", folder)
        subprocess.run([sys.executable, "-m", "pip", *download, f"django=={version}"], check=True)
        (archive,) = folder.glob(f"[Dd]jango-{version}.tar.gz")
        with TemporaryDirectory(dir=folder) as partial, tarfile.open(archive) as sdist:
            sdist.extractall(partial, filter="data")
            (top,) = Path(partial).iterdir()
            top.rename(unpacked)
    return unpacked


def configure(store_url: str) -> None:
    """Set up a site that has the app of Django's tests, with its sessions in the store."""
    names = {name: value for name, value in vars(site).items() if name.isupper()}
    names["CACHES"] = names["CACHES"] | {
        "sessions": names["CACHES"]["sessions"] | {"LOCATION": store_url}
    }
    names["INSTALLED_APPS"] = [*names["INSTALLED_APPS"], "sessions_tests"]
    settings.configure(**names)
    django.setup()


def run(runner: DiscoverRunner) -> int:
    """Run the contract's classes and return the exit code."""
    suite = unittest.TestSuite()
    for case in contract(import_module("sessions_tests.tests")):
        tests = unittest.defaultTestLoader.loadTestsFromTestCase(case)
        if tests.countTestCases() < EXPECTED_TESTS[case.__name__]:
            print(f"{case.__name__} has only {tests.countTestCases()} tests", file=sys.stderr)
            return 1
        suite.addTests(tests)
    result = runner.run_suite(suite)
    failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
    passed = result.testsRun - failed - len(result.skipped)
    print(f"Django {django.get_version()}, Django's own session tests:")
    print(f"{passed} passed, {failed} failed, {len(result.skipped)} skipped")
    return 0 if passed == result.testsRun else 1


def contract(theirs: ModuleType) -> list[type[unittest.TestCase]]:
    """Return Django's test cases with our engine and our middleware in the place of its own."""
    from django_clustered_sessions.backend import SessionStore
    from django_clustered_sessions.middleware import ClusteredSessionMiddleware

    class InEventLoop:
        """Call the middleware's asynchronous side, which Django's synchronous tests do not see."""

        def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
            inner = ClusteredSessionMiddleware(sync_to_async(get_response))
            self.process_response = async_to_sync(inner.aprocess_response)
            self.inner = async_to_sync(inner)

        def __call__(self, request: HttpRequest) -> HttpResponse:
            return self.inner(request)

    class SavedSession:
        """Stand for the row of Django's table in which one test looks for what was saved."""

        def __init__(self, session_key: str) -> None:
            self.session_key = session_key

        def get_decoded(self) -> dict[str, object]:
            assert SessionStore().exists(self.session_key)
            return dict(SessionStore(self.session_key).load())

        objects = SimpleNamespace(get=lambda session_key: SavedSession(session_key))

    class StoreContract(theirs.SessionTestsMixin, theirs.SimpleTestCase):  # type: ignore[name-defined,misc]
        backend = SessionStore

    class MiddlewareContract(theirs.SessionMiddlewareTests):  # type: ignore[name-defined,misc]
        middleware: object = ClusteredSessionMiddleware

        def setUp(self) -> None:
            super().setUp()
            self.enterContext(mock.patch.object(theirs, "SessionMiddleware", self.middleware))
            self.enterContext(mock.patch.object(theirs, "Session", SavedSession))

    class AsyncMiddlewareContract(MiddlewareContract):
        middleware = InEventLoop

    return [StoreContract, MiddlewareContract, AsyncMiddlewareContract]


if __name__ == "__main__":
    sys.exit(main())
