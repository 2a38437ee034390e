"""Locks in real servers and processes: what two of them count, and what an impatient user costs.

Run as a script, this file is a process that counts:
``python -m tests.topology.test_lock_processes WORK URL ARGUMENTS``. As a module it is the
site that the servers serve.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

import django
import pytest
import redis
from django.conf import settings as django_settings
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpResponse
from django.test import RequestFactory
from django.urls import path

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.store.budget import Budget
from tests.children import ROOT, finish, line, python
from tests.conftest import DATABASE, use_store
from tests.gateways import load_scripts, place
from tests.servers import CountingProxy, free_port, raw_client, wait_for

#: Requests of the impatient user; one has the lock, two of them wait for it.
IMPATIENT, SERVED = 12, 3

#: Keys in the store: a list of those who are in the slow page, and whether it may go on.
INSIDE, MAY_GO = "inside", "may go"


#: A store time-out (seconds) that a stop can outlast without delay.
BRIEF_S = 1.5


# In the process.


def count(key: str, threads: str, times: str) -> None:
    """Count up in threads, each time in a request of its own."""
    settings: Any = django_settings
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    settings.CLUSTERED_SESSIONS_LOCK_MAX_WAITERS = 800
    settings.ROOT_URLCONF = (path("", counted),)
    handler = WSGIHandler()

    def work() -> None:
        for _ in range(int(times)):
            request = RequestFactory().get("/")
            request.COOKIES["sessionid"] = key
            assert handler.get_response(request).status_code == 200

    with ThreadPoolExecutor(int(threads)) as pool:
        for done in [pool.submit(work) for _ in range(int(threads))]:
            done.result()


def counted(request: Any) -> HttpResponse:
    request.session["n"] += 1
    return HttpResponse()


def save_once(key: str, form: str) -> None:
    """Save an increment once told to, and tell what came of it."""
    settings: Any = django_settings
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = BRIEF_S
    session = SessionStore(key)

    def wait() -> None:
        print("ready", flush=True)
        sys.stdin.readline()

    async def asave() -> None:
        await session.aincrement("new")
        wait()
        await session.asave()

    try:
        if form == "async":
            asyncio.run(asave())
        else:
            session.increment("new")
            wait()
            session.save()
    except SessionStoreUnavailable:
        print("unknown", flush=True)
    else:
        print("saved", flush=True)


# In the site.


def store_of_site() -> redis.Redis:
    return raw_client(os.environ["TEST_STORE"])


def slow(request: Any) -> HttpResponse:
    """Show a page that takes until the test lets it go."""
    request.session["visits"] = request.session.get("visits", 0) + 1
    with store_of_site() as store:
        store.rpush(INSIDE, 1)
        wait_for(lambda: store.exists(MAY_GO), "the test lets it go", timeout_s=60)
    return HttpResponse("slow")


async def aslow(request: Any) -> HttpResponse:
    """See slow()."""
    await request.session.aset("visits", await request.session.aget("visits", 0) + 1)
    await asyncio.to_thread(wait_inside)
    return HttpResponse("slow")


def wait_inside() -> None:
    with store_of_site() as store:
        store.rpush(INSIDE, 1)
        wait_for(lambda: store.exists(MAY_GO), "the test lets it go", timeout_s=60)


def quick(request: Any) -> HttpResponse:
    """Show a page that takes no time, in a session that has its lock as well."""
    request.session["visits"] = request.session.get("visits", 0) + 1
    return HttpResponse("quick")


async def aquick(request: Any) -> HttpResponse:
    """See quick()."""
    await request.session.aset("visits", await request.session.aget("visits", 0) + 1)
    return HttpResponse("quick")


def set_up_site(*pages: Any) -> None:
    settings: Any = django_settings
    django.setup()
    use_store(settings, os.environ["TEST_STORE"])
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    # Longer than the test looks at those who wait.
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 60.0
    settings.MIDDLEWARE = settings.MIDDLEWARE[:1]
    settings.ROOT_URLCONF = pages


def wsgi() -> WSGIHandler:
    """Return the site as gunicorn wants it."""
    set_up_site(path("slow", slow), path("quick", quick))
    return WSGIHandler()


def asgi() -> ASGIHandler:
    """Return the site as uvicorn wants it."""
    set_up_site(path("slow", aslow), path("quick", aquick))
    return ASGIHandler()


# In the test.


@contextmanager
def process(*command: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run a Python process, and kill it in the end."""
    known = {"DJANGO_SETTINGS_MODULE": "tests.settings", "PYTHONPATH": str(ROOT)}
    environment = os.environ | known | environment
    with python(*command, env=environment, stdin=subprocess.PIPE, stderr=None) as running:
        yield running


def worker(work: Any, url: str, *arguments: str) -> Any:
    return process("-m", "tests.topology.test_lock_processes", work.__name__, url, *arguments)


def new_session(**values: Any) -> str:
    session = SessionStore()
    session.update(values)
    session.create()
    key = session.session_key
    assert key is not None
    return key


def test_two_processes_of_eight_threads_lose_no_count(store: redis.Redis, settings: Any) -> None:
    key = new_session(n=0)
    arguments = (settings.CACHES["sessions"]["LOCATION"], key, "8", "25")
    with worker(count, *arguments) as one, worker(count, *arguments) as other:
        finish(one, other)
    assert SessionStore(key)["n"] == 2 * 8 * 25


@pytest.mark.parametrize("form", ["sync", "async"])
def test_stopped_process_writes_nothing_again(
    store: redis.Redis, proxy: CountingProxy, settings: Any, form: str
) -> None:
    """Its write has landed, the reply is lost, and the store has forgotten the token by now."""
    load_scripts(store)
    key = new_session(n=0)
    record = place(key).record
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = BRIEF_S

    def has_forgotten() -> bool:
        other = SessionStore(key)
        # So long is for the one that is stopped: this machine may stand still.
        other.state.budget = Budget(15.0)
        other["n"] += 1
        other.save()
        return not any(store.hexists(log, token) for log in place(key).writes)

    with worker(save_once, proxy.url + f"/{DATABASE}", key, form) as stopped:
        assert stopped.stdin
        assert line(stopped) == "ready\n"
        proxy.stall()
        print(file=stopped.stdin, flush=True)
        token = wait_for(lambda: store.hget(record, "d:new"), "the write lands")[:8]
        stopped.send_signal(signal.SIGSTOP)
        os.waitpid(stopped.pid, os.WUNTRACED)
        proxy.cut()
        proxy.resume()
        # It keeps it for twice STORE_TIMEOUT at least, and twice as long at most.
        wait_for(has_forgotten, "the store forgets the write", timeout_s=30.0)
        stopped.send_signal(signal.SIGCONT)
        assert finish(stopped) == ["unknown\n"]
    assert SessionStore(key)["new"] == 1


@contextmanager
def server(kind: str, url: str) -> Iterator[int]:
    """Run the site in a real server; gives its port."""
    port = free_port()
    where = f"127.0.0.1:{port}"
    site = "tests.topology.test_lock_processes"
    command = {
        "gunicorn": ("gunicorn", f"{site}:wsgi()", "--bind", where, "--threads", "8"),
        "uvicorn": ("uvicorn", f"{site}:asgi", "--factory", "--port", str(port)),
    }[kind]
    extra = ("--lifespan", "off", "--log-level", "error") if kind == "uvicorn" else ()
    with process("-m", *command, *extra, TEST_STORE=url) as running:

        def answers() -> bool:
            assert running.poll() is None, f"{kind} did not start"
            try:
                return get(port, "quick") == (200, "quick")
            except OSError:
                return False

        wait_for(answers, f"{kind} answers", timeout_s=30)
        try:
            yield port
        finally:
            # Its worker ends with it; a kill would leave that alone.
            running.terminate()
            running.wait(30)


def get(port: int, page: str, key: str = "") -> tuple[int, str]:
    """Return status and text of a page."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", f"/{page}", headers={"Cookie": f"sessionid={key}"} if key else {})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


@pytest.mark.parametrize("kind", ["gunicorn", "uvicorn"])
def test_impatient_user_slows_nobody_else(store: redis.Redis, settings: Any, kind: str) -> None:
    """One holds F5 on a slow page: the surplus is refused at once, and the others are served."""
    key, answers, lock = new_session(), list[int](), threading.Lock()

    def press() -> None:
        status, _ = get(port, "slow", key)
        with lock:
            answers.append(status)

    with server(kind, settings.CACHES["sessions"]["LOCATION"]) as port:
        with ThreadPoolExecutor(IMPATIENT) as pool:
            presses = [pool.submit(press) for _ in range(IMPATIENT)]
            try:
                wait_for(lambda: store.llen(INSIDE), "one is in the slow page")
                wait_for(lambda: len(answers) == IMPATIENT - SERVED, "the surplus is answered")
                others = [get(port, "quick", new_session()) for _ in range(20)]
                assert others == [(200, "quick")] * 20
                # All the while, the slow page was there.
                assert answers == [429] * (IMPATIENT - SERVED)
                assert store.llen(INSIDE) == 1
            finally:
                store.set(MAY_GO, 1)
        for pressed in presses:
            pressed.result()
    assert sorted(answers) == [200] * SERVED + [429] * (IMPATIENT - SERVED)
    assert SessionStore(key)["visits"] == SERVED


def main() -> None:
    """Do one work in a process of its own."""
    _, work, url, *arguments = sys.argv
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
    django.setup()
    use_store(django_settings, url)
    globals()[work](*arguments)


if __name__ == "__main__":
    main()
