"""The session engines that are compared, the bare round trips below them, and nothing at all."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Final

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.urls import ResolverMatch

from django_clustered_sessions.embedded import bundled_binary

from . import project
from .scenarios import READ, Scenario

BASE: Final = "cache (pickle)"
OURS: Final = "clustered"
LOCKED: Final = "clustered, locked"
NO_NEAR: Final = "clustered, no near cache"
TRACKED: Final = "clustered, tracked"
FLOOR: Final = "bare round trips"
FRAME: Final = "no session"

_DJANGO = "django.contrib.sessions.middleware.SessionMiddleware"
_CLUSTERED = "django_clustered_sessions.middleware.ClusteredSessionMiddleware"
_NEAR_BYTES: Final = 16 * 1024 * 1024


@dataclass(frozen=True)
class Engine:
    """A session engine with its settings, and what it keeps sessions in."""

    name: str
    module: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    middleware: str = _DJANGO
    has_store: bool = True
    has_database: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether this is the package's own."""
        return self.middleware == _CLUSTERED

    def all_settings(self, scenario: Scenario | None) -> dict[str, Any]:
        """Return every setting that engines or scenarios differ in."""
        return {
            "SESSION_ENGINE": self.module,
            "SESSION_CACHE_ALIAS": project.OURS,
            "SESSION_SAVE_EVERY_REQUEST": False,
            "CLUSTERED_SESSIONS_LOCKING": "off",
            "CLUSTERED_SESSIONS_NEAR_CACHE_BYTES": _NEAR_BYTES,
            "CLUSTERED_SESSIONS_NEAR_READS": "checked",
            **self.settings,
            **(scenario.settings if scenario else {}),
        }

    def use(self, scenario: Scenario | None = None) -> None:
        """Let Django use this engine from now on, as the scenario wants it."""
        project.change(self.all_settings(scenario))

    def save(self, content: Mapping[str, Any]) -> str:
        """Save a new session with ``content``; return its key."""
        session = import_module(self.module).SessionStore()
        session.update(content)
        session.save()
        return str(session.session_key)


def _ours(name: str, **values: Any) -> Engine:
    prefixed = {f"CLUSTERED_SESSIONS_{setting}": value for setting, value in values.items()}
    return Engine(name, "django_clustered_sessions.backend", prefixed, _CLUSTERED)


def engines() -> tuple[list[Engine], list[str]]:
    """Return the engines, and why others that belong here are missing."""
    of_django = "django.contrib.sessions.backends"
    found = [
        Engine(BASE, f"{of_django}.cache", {"SESSION_CACHE_ALIAS": project.PICKLE}),
        Engine("cache (JSON)", f"{of_django}.cache", {"SESSION_CACHE_ALIAS": project.JSON}),
        *(
            Engine(f"cache ({name})", f"{of_django}.cache", {"SESSION_CACHE_ALIAS": name})
            for name, backend in project.BACKENDS.items()
            if project.is_installed(backend)
        ),
        Engine(
            f"cached_db ({project.database_name()})",
            f"{of_django}.cached_db",
            {"SESSION_CACHE_ALIAS": project.PICKLE},
            has_database=True,
        ),
        Engine(
            f"db ({project.database_name()})",
            f"{of_django}.db",
            has_store=False,
            has_database=True,
        ),
    ]
    missing = [
        f"{name}: not installed"
        for name, backend in project.BACKENDS.items()
        if not project.is_installed(backend)
    ]
    reason = _why_not_redis_sessions()
    if reason:
        missing.append(f"django-redis-sessions: {reason}")
    else:
        found.append(Engine("django-redis-sessions", "redis_sessions.session"))
    found += [
        _ours(OURS),
        _ours(LOCKED, LOCKING="all"),
        _ours(NO_NEAR, NEAR_CACHE_BYTES=0),
        _ours(TRACKED, NEAR_READS="tracked"),
    ]
    return found, missing


def _why_not_redis_sessions() -> str:
    """Try django-redis-sessions; return why it does not work, or nothing."""
    if find_spec("redis_sessions") is None:
        return "not installed"
    engine = Engine("django-redis-sessions", "redis_sessions.session")
    try:
        key = engine.save({"n": 1})
        if import_module(engine.module).SessionStore(key)["n"] != 1:
            return "does not read what it wrote"
    except Exception as error:
        return f"fails with this Django and redis-py: {error!r}"
    return ""


class Requests:
    """Requests of one engine and scenario, each on the next one of many sessions in turn."""

    def __init__(self, engine: Engine, scenario: Scenario, sessions: int) -> None:
        self.engine = engine
        self.scenario = scenario
        self.name = engine.name
        engine.use(scenario)
        module, name = engine.middleware.rsplit(".", 1)
        self._middleware_class = getattr(import_module(module), name)
        self._middleware = self._middleware_class(scenario.view)
        #: The page on which a visitor has been before logging in or out.
        self._visit = self._middleware_class(READ.view)
        self._amiddleware: Any = None
        self._sessions = sessions
        self._keys: Any = None
        if scenario.before is not None and not scenario.consumes:
            self._keys = cycle([engine.save(scenario.before) for _ in range(sessions)])

    def see_all(self) -> None:
        """Answer a request on each session: a process that has been up for a while has."""
        if self.scenario.before is not None and not self.scenario.consumes:
            for request in self.prepare(self._sessions):
                self.run(request)

    def prepare(self, count: int) -> list[HttpRequest]:
        """Point Django at the engine and return the block's requests; this is not timed."""
        self.engine.use(self.scenario)
        before = self.scenario.before
        if before is None:
            return [_request(self.scenario, None) for _ in range(count)]
        if self._keys is None:
            keys = [self.engine.save(before) for _ in range(count)]
            for key in keys:
                self._visit(_request(READ, key))
        else:
            keys = list(islice(self._keys, count))
        if self.scenario.cold:
            forget_near()
        return [_request(self.scenario, key) for key in keys]

    def run(self, request: HttpRequest) -> HttpResponse:
        """Pass a request through the session middleware and the view; this is timed."""
        return self._middleware(request)

    async def arun(self, request: HttpRequest) -> None:
        """See run()."""
        if self._amiddleware is None:
            self._amiddleware = self._middleware_class(self.scenario.aview)
        await self._amiddleware(request)


class NoSession:
    """The same requests with a dict for a session: what is timed and is no session code."""

    name = FRAME

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario

    def prepare(self, count: int) -> list[HttpRequest]:
        """Return a block of requests."""
        requests = []
        for _ in range(count):
            request = _request(self.scenario, None)
            request.session = _DictSession(self.scenario.before or {})
            requests.append(request)
        return requests

    def run(self, request: HttpRequest) -> None:
        """Call the view."""
        self.scenario.view(request)

    async def arun(self, request: HttpRequest) -> None:
        """See run()."""
        await self.scenario.aview(request)


class BareRoundTrips:
    """The same number of round trips by redis-py on a held connection, with the same bytes."""

    name = FLOOR

    def __init__(self, scenario: Scenario, location: str) -> None:
        import redis

        self.scenario = scenario
        self._connection = redis.ConnectionPool.from_url(location).get_connection()
        key, value = "bare-round-trip", pickle.dumps(dict(scenario.before or {}), -1)
        commands = {"GET": ("GET", key), "SETEX": ("SETEX", key, 1_209_600, value)}
        self._ask(commands["SETEX"])
        self._commands = [commands[name] for name in scenario.floor]

    def prepare(self, count: int) -> list[None]:
        """Return as many empty requests."""
        return [None] * count

    def run(self, request: None) -> None:
        """Ask the store, one command after the other."""
        for command in self._commands:
            self._ask(command)

    def _ask(self, command: Sequence[Any]) -> None:
        self._connection.send_command(*command)
        self._connection.read_response()


class _DictSession(dict[str, Any]):
    """Do nothing with what login and logout ask of a session."""

    session_key = None

    def flush(self) -> None: ...
    def cycle_key(self) -> None: ...
    async def aflush(self) -> None: ...
    async def acycle_key(self) -> None: ...

    async def aget(self, key: str, default: Any = None) -> Any:
        return self.get(key, default)

    async def aset(self, key: str, value: Any) -> None:
        self[key] = value


def bundled_store() -> Path:
    """Return the Valkey that everything is measured on."""
    binary = bundled_binary()
    if binary is None:
        raise SystemExit('The benchmarks need the extra "benchmark".')
    return binary


def forget_near() -> None:
    """Empty the near cache of this process."""
    from django_clustered_sessions.session.near_cache import near_cache

    near_cache.clear()


def _request(scenario: Scenario, session_key: str | None) -> HttpRequest:
    request = HttpRequest()
    request.method = "GET"
    request.path = request.path_info = "/shop/"
    request.META = {"SERVER_NAME": "localhost", "SERVER_PORT": "80"}
    if session_key is not None:
        request.COOKIES = {settings.SESSION_COOKIE_NAME: session_key}
    request.resolver_match = ResolverMatch(_handler(scenario), (), {}, route="shop/")
    return request


def _handler(scenario: Scenario) -> Callable[..., Any]:
    return scenario.view
