"""Worker: threads and tasks of an event loop that use sessions, and log the outcomes.

Run by the driver: ``python -m tests.chaos.worker CONFIGURATION``, a line of JSON.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any, cast

import django
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import got_request_exception
from django.dispatch import receiver
from django.http import HttpResponse
from django.test import AsyncRequestFactory, RequestFactory
from django.urls import path

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.decorators import session_read_only, session_unlocked
from django_clustered_sessions.exceptions import (
    SessionLockLost,
    SessionLockRefused,
    SessionLockTimeout,
    SessionNotReplicated,
    SessionStoreUnavailable,
)
from django_clustered_sessions.protocol import scripts
from django_clustered_sessions.protocol.record import SessionKeys
from django_clustered_sessions.session.request_policy import read_header
from django_clustered_sessions.store import connections
from django_clustered_sessions.store.entries import django_redis
from tests import settings as test_settings
from tests.chaos import plan as plans
from tests.chaos.history import Notebook, Operation, Seen, digest
from tests.chaos.plan import Plan
from tests.variants import Variant

#: Kinds of operations, with their frequencies.
KINDS = {"lock": 12, "drop": 1, "look": 2, "merge": 3, "own": 2, "blind": 2, "read": 2}

#: Mean number of seconds until a user retries after a 503.
RETRY_S = 0.2

#: Seconds between two beats of a thread, and the delay of one that counts as a stall.
BEAT_S, STALL_S = 0.05, 0.25


class Dropped(Exception):
    """Exception raised under a lock; none of the changes may be written."""


@dataclass
class Work:
    """Current operation; its length in seconds, and the signal that its process receives."""

    operation: Operation
    actor: Actor
    hold_s: float
    fault: signal.Signals | None


#: Current work of this thread or task.
_work: ContextVar[Work] = ContextVar("work")


class Actor:
    """Thread or task that uses one session after another."""

    def __init__(self, plan: Plan, name: str, began_s: float, notebook: Notebook) -> None:
        self.plan = plan
        self.name = name
        self.began_s = began_s
        self.notebook = notebook
        self.dice = Random(f"{plan.seed} {name}")
        self.count = 0
        #: Operations that reached the store; during an outage many fail quickly, and do not count.
        self.reached = 0
        self.was_away = False

    @property
    def is_over(self) -> bool:
        is_late = time.monotonic() >= self.began_s + self.plan.seconds
        return is_late or self.reached >= self.plan.operations

    def run(self) -> None:
        while not self.is_over:
            # This is the time between two visits, not synchronisation.
            time.sleep(self.pause_s())
            work = self.begin()
            try:
                self.do(work.operation)
                self.end(work)
            except BaseException as error:
                self.end(work, error)

    async def arun(self) -> None:
        while not self.is_over:
            await asyncio.sleep(self.pause_s())
            work = self.begin()
            try:
                await self.ado(work.operation)
                self.end(work)
            except BaseException as error:
                self.end(work, error)

    def pause_s(self) -> float:
        """Return the seconds until the next visit, chosen by the seed.

        During an outage, visits without pauses would take the processor from the failover, and
        each trip that tries the store would fail for that.
        """
        return self.dice.uniform(0, RETRY_S if self.was_away else 0.01)

    def begin(self) -> Work:
        self.count += 1
        dice, faults = self.dice, self.plan.faults
        (kind,) = dice.choices(list(KINDS), list(KINDS.values()))
        number = dice.choice((0, 0, *range(plans.SESSIONS)))
        hold_s = dice.choice((0, 0, dice.uniform(0, 0.02)))
        chance = dice.random()
        era = min(int((time.monotonic() - self.began_s) // self.plan.era_s), self.plan.eras - 1)
        operation = Operation(
            f"{self.name}#{self.count}", kind, self.plan.key(era, number), self.name, 0.0
        )
        fault = None
        if operation.is_locked and chance < faults.stop:
            fault = signal.SIGSTOP
        elif operation.is_locked and chance < faults.stop + faults.kill:
            fault = signal.SIGKILL
        work = Work(operation, self, hold_s, fault)
        _work.set(work)
        operation.began_s = time.monotonic()
        self.note(operation)
        return work

    def note(self, operation: Operation) -> None:
        self.notebook.note("operation", **asdict(operation))

    def end(self, work: Work, error: BaseException | None = None) -> None:
        operation = work.operation
        operation.done_s = time.monotonic()
        operation.answer = answer_to(error, operation)
        self.was_away = operation.answer == "away"
        self.reached += not self.was_away
        if operation.answer == "error":
            text = "".join(traceback.format_exception(error))
            self.notebook.note("error", text=f"{operation}: {text}")
        self.note(operation)

    # Operations: by hand, or as a request.

    def do(self, operation: Operation) -> None:
        if self.dice.random() < 0.5 and operation.kind != "own":
            request = RequestFactory().post(f"/{operation.kind}")
            request.COOKIES["sessionid"] = operation.session
            raise_for(HANDLER.get_response(request), request, operation)
            return
        session = SessionStore(operation.session)
        if operation.is_locked:
            with session.lock():
                use(session)
        else:
            use(session)
            if operation.kind != "read":
                session.save()

    async def ado(self, operation: Operation) -> None:
        if self.dice.random() < 0.5 and operation.kind != "own":
            request = AsyncRequestFactory().post(f"/a{operation.kind}")
            request.COOKIES["sessionid"] = operation.session
            raise_for(await AHANDLER.get_response_async(request), request, operation)
            return
        session = SessionStore(operation.session)
        if operation.is_locked:
            async with session.alock():
                await ause(session)
        else:
            await ause(session)
            if operation.kind != "read":
                await session.asave()


def use(session: Any) -> None:
    work = _work.get()
    session.get("log")
    take(work, session)
    # Stands for the work of a view that holds the lock.
    time.sleep(work.hold_s)
    change(work, session)


async def ause(session: Any) -> None:
    work = _work.get()
    await session.aget("log")
    take(work, session)
    await asyncio.sleep(work.hold_s)
    change(work, session)


def take(work: Work, session: Any) -> None:
    """Log the loaded values, and cause the fault of this work."""
    operation = work.operation
    operation.took_s = time.monotonic()
    ids = list(session.get(operation.log, []))
    shown = ids if work.actor.plan.may_lose else ()
    operation.seen = Seen(len(ids), digest(ids), session.get("n"), session.get("hits"), shown)
    for header in session.lock_headers().values():
        operation.token = read_header(header, SessionKeys.of("session", operation.session).id)
    if work.fault:
        work.actor.note(operation)
        os.kill(os.getpid(), work.fault)


def change(work: Work, session: Any) -> None:
    """Change a loaded session by the kind of operation; log the operation before it is sent."""
    operation = work.operation
    if operation.kind in ("look", "read"):
        return
    if operation.kind == "blind":
        session.increment("blind")
    elif operation.kind == "own":
        session[operation.log] = [*session.get(operation.log, []), operation.id]
    else:
        add(session["log"], operation.id)
        session.increment("hits")
    if operation.is_locked:
        session["n"] += 1
    if operation.kind == "drop":
        raise Dropped
    operation.sent_s = time.monotonic()
    work.actor.note(operation)


def add(log: Any, name: str) -> None:
    """Append to a log of either kind (`Plan.empty_log`)."""
    if isinstance(log, dict):
        log[name] = len(log)
    else:
        log.append(name)


def raise_for(response: Any, request: Any, operation: Operation) -> None:
    """Raise the error that a response stands for, unless its status is 200."""
    if operation.kind == "drop" and response.status_code == 500:
        raise Dropped
    if response.status_code == 200:
        return
    session = request.session
    raise (
        session.state.failure
        or session.state.replication.shortfall
        or RuntimeError(f"answered {response.status_code}")
    ) from getattr(request, "uncaught", None)


@receiver(got_request_exception)
def keep_uncaught(request: Any, **kwargs: Any) -> None:
    """Keep the exception that Django answers by 500: only its traceback says where it came from."""
    request.uncaught = sys.exception()


def answer_to(error: BaseException | None, operation: Operation) -> str:
    match error:
        case None:
            return "ok"
        case SessionLockLost():
            return "lost"
        case SessionLockRefused():
            return "refused"
        case SessionLockTimeout():
            return "timeout"
        case SessionStoreUnavailable():
            return "unknown" if operation.sent_s else "away"
        case SessionNotReplicated():
            return "short"
        case Dropped():
            return "dropped"
    return "error"


def view(request: Any) -> HttpResponse:
    use(request.session)
    return HttpResponse()


async def aview(request: Any) -> HttpResponse:
    await ause(request.session)
    return HttpResponse()


def page(kind: str, is_async: bool) -> Any:
    marks = {"merge": session_unlocked, "blind": session_unlocked, "read": session_read_only}
    marked = marks.get(kind, lambda view: view)
    return path(f"a{kind}", marked(aview)) if is_async else path(kind, marked(view))


def watch_waits() -> None:
    """Log the time when a request is in the queue: it takes a connection to wait then."""

    def watched(pool: Any) -> Any:
        def asked(step: Any) -> Any:
            operation = _work.get().operation
            operation.queued_s = operation.queued_s or time.monotonic()
            return pool(step)

        return asked

    names: Any = connections
    names.waiting_pool = watched(connections.waiting_pool)
    names.awaiting_pool = watched(connections.awaiting_pool)


def mutate(name: str) -> None:
    """Apply the mutant to its script or module."""
    mutant, read = plans.MUTANTS[name], scripts.read
    if "." in mutant.where:
        Variant(mutant.where, mutant.old, mutant.new).apply()
        return

    def mutated(script: str) -> bytes:
        text = read(script)
        if script != mutant.where:
            return text
        old, new = mutant.old.encode(), mutant.new.encode()
        assert text.count(old) == 1, f"the mutant {name} does not fit the script any more"
        return text.replace(old, new)

    names: Any = scripts
    names.read = mutated
    scripts.script.cache_clear()


def beat(notebook: Notebook, is_over: threading.Event) -> None:
    """Log stalls of this process."""
    seen_s = time.monotonic()
    while not is_over.wait(BEAT_S):
        now_s = time.monotonic()
        if now_s - seen_s > STALL_S:
            notebook.note("stall", began_s=seen_s, ended_s=now_s)
        seen_s = now_s


def main() -> None:
    """Work until the end of the run."""
    global HANDLER, AHANDLER
    told = json.loads(sys.argv[1])
    plan, name, folder = Plan(**told["plan"]), told["name"], Path(told["folder"])
    faulthandler.register(signal.SIGUSR1)
    if "LD_PRELOAD" in os.environ:
        # With libfaketime, clock_nanosleep() fails.
        cast(Any, time).sleep = lambda seconds: threading.Event().wait(seconds)
    module: Any = ModuleType("chaos_settings")
    vars(module).update(vars(test_settings), **plan.settings)
    module.CACHES = test_settings.CACHES | {
        "sessions": {"BACKEND": django_redis.BACKEND, **told["sessions"]}
    }
    module.MIDDLEWARE = test_settings.MIDDLEWARE[:1]
    module.ROOT_URLCONF = tuple(
        page(kind, is_async) for kind in KINDS for is_async in (False, True)
    )
    module.CLUSTERED_SESSIONS_NODE_NAME = name
    sys.modules["chaos_settings"] = module
    os.environ["DJANGO_SETTINGS_MODULE"] = "chaos_settings"
    if plan.mutant:
        mutate(plan.mutant)
    watch_waits()
    django.setup()
    HANDLER, AHANDLER = WSGIHandler(), ASGIHandler()
    HANDLER.load_middleware()

    notebook, is_over = Notebook(folder / f"{name}.jsonl"), threading.Event()
    while not (folder / "began").exists():
        # Interval of polling; the driver writes the file when all processes are up.
        time.sleep(0.005)
    began_s = float((folder / "began").read_text())
    heart = threading.Thread(target=beat, args=(notebook, is_over))
    heart.start()

    def actor(number: int) -> Actor:
        return Actor(plan, f"{name}/{number}", began_s, notebook)

    async def tasks() -> None:
        await asyncio.gather(*(actor(number).arun() for number in range(plans.TASKS)))

    with ThreadPoolExecutor(plans.THREADS + 1) as pool:
        work = [pool.submit(actor(plans.TASKS + number).run) for number in range(plans.THREADS)]
        work.append(pool.submit(lambda: asyncio.run(tasks())))
    is_over.set()
    heart.join()
    for done in work:
        done.result()


HANDLER: WSGIHandler
AHANDLER: ASGIHandler

if __name__ == "__main__":
    main()
