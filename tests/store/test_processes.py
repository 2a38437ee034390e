"""Two real processes on one session: what each was told is written, is there.

Run as a script, this file is such a process:
``python -m tests.store.test_processes WORK URL ARGUMENTS``.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import django
import pytest
import redis
from hiredis import pack_command

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionConflict
from django_clustered_sessions.store import connections
from django_clustered_sessions.store.exchange import aconnect, aexchange
from tests.children import child, finish, line
from tests.conftest import use_store
from tests.servers import alent, deadline_s, lent

# In the process.


def count(key: str, threads: int, times: int) -> None:
    """Increment in threads, half of them with a change of another field in the same save."""

    def work(number: int) -> None:
        for _ in range(times):
            session = SessionStore(key)
            session.increment("n")
            if number % 2:
                session[f"{os.getpid()} {number}"] = "here"
            session.save()

    with ThreadPoolExecutor(threads) as pool:
        # What fails in a thread fails here; the whole process has its time.
        list(pool.map(work, range(threads)))


def acount(key: str, tasks: int, times: int) -> None:
    """See count()."""

    async def work() -> None:
        for _ in range(times):
            session = SessionStore(key)
            await session.aincrement("n")
            await session.asave()

    async def all_of_them() -> None:
        await asyncio.gather(*(work() for _ in range(tasks)))

    asyncio.run(all_of_them())


def set_fields(key: str, name: str, times: int) -> None:
    """Set a field of its own in each save, on one working copy that gets ever older."""
    session = SessionStore(key)
    for number in range(times):
        session[f"{name}{number}"] = {"by": name}
        session.save()


def change_in_place(key: str, name: str, times: int) -> None:
    """Add to a dict, to a list in it, and to a list; start over when others were always faster."""
    for number in range(times):
        while True:
            session = SessionStore(key)
            session["cart"][f"{name}{number}"] = number
            session["cart"]["seen"].append(f"{name}{number}")
            session["log"].append(f"{name}{number}")
            try:
                session.save()
            except SessionConflict:
                continue
            break


def write_until_killed(key: str, name: str) -> None:
    """Write two fields in each save, and say so when it is done."""
    number = 0
    while True:
        session = SessionStore(key)
        session[f"{name} a{number}"] = session[f"{name} b{number}"] = number
        session.increment(f"{name} n")
        session.save()
        print(number, flush=True)
        number += 1


def fork_after_use(key: str, times: int) -> None:
    """Use sessions, then fork, and use them in parent and children at once."""

    def work(pipe: int | None = None) -> None:
        for _ in range(times):
            session = SessionStore(key)
            session.increment("n")
            session.save()
        acount(key, 2, times)
        if pipe is not None:
            os.write(pipe, b"%d\n" % client_id())

    work()
    ours = client_id()
    reading, writing = os.pipe()
    children = []
    for _ in range(2):
        if (child := os.fork()) == 0:
            status = 1
            try:
                work(writing)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    work(writing)
    # They are killed with this process where that takes too long.
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.close(writing)
    with os.fdopen(reading) as lines:
        print(json.dumps({"codes": codes, "ours": ours, "all": [int(line) for line in lines]}))


def client_id() -> int:
    """Return the store's number of the connection that this process uses."""
    pool: Any = connections.pool()
    connection = lent(pool)
    connection.connect()
    try:
        connection.send_command("CLIENT", "ID")
        number: int = connection.read_response()
        return number
    finally:
        pool.take_back(connection)


def forked_in_a_loop() -> None:
    """Print the store's numbers of a parent's connection, its child's, and the parent's again."""

    async def number() -> int:
        pool = connections.apool()
        connection = await alent(pool)
        await aconnect(connection, deadline_s())
        (reply,) = await aexchange(connection, [pack_command(("CLIENT", "ID"))], deadline_s())
        pool.take_back(connection)
        return int(reply)

    async def parent() -> list[int]:
        before = await number()
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.write(writing, str(asyncio.new_event_loop().run_until_complete(number())).encode())
            os._exit(0)
        os.waitpid(child, 0)
        theirs = int(os.read(reading, 100))
        return [before, theirs, await number()]

    print(json.dumps(asyncio.run(parent())))


# In the test.


@pytest.fixture
def url(store: redis.Redis, settings: Any) -> str:
    location: str = settings.CACHES["sessions"]["LOCATION"]
    return location


def process(url: str, work: Any, *arguments: Any) -> AbstractContextManager[subprocess.Popen[str]]:
    """Run a function of this module in a process of its own."""
    return child("tests.store.test_processes", work.__name__, url, json.dumps(arguments))


def new_session(**values: Any) -> str:
    session = SessionStore()
    session.update(values)
    session.save()
    assert session.session_key is not None
    return session.session_key


def test_no_count_is_lost(url: str) -> None:
    key = new_session(n=1000)
    with (
        process(url, count, key, 4, 50) as one,
        process(url, count, key, 4, 50) as other,
        process(url, acount, key, 20, 10) as third,
    ):
        finish(one, other, third)
        stored = SessionStore(key).load()
    assert stored.pop("n") == 1000 + 2 * 4 * 50 + 20 * 10
    assert stored == {f"{p.pid} {n}": "here" for p in (one, other) for n in (1, 3)}


@pytest.mark.full
def test_fields_of_both_processes_survive(url: str) -> None:
    key = new_session()
    with (
        process(url, set_fields, key, "a", 100) as one,
        process(url, set_fields, key, "b", 100) as two,
    ):
        finish(one, two)
    stored = SessionStore(key).load()
    assert stored == {f"{name}{n}": {"by": name} for name in "ab" for n in range(100)}


@pytest.mark.full
def test_changes_within_one_value_are_merged(url: str) -> None:
    key = new_session(cart={"seen": []}, log=[])
    with (
        process(url, change_in_place, key, "a", 60) as one,
        process(url, change_in_place, key, "b", 60) as two,
    ):
        finish(one, two)
    stored = SessionStore(key).load()
    written = {f"{name}{number}": number for name in "ab" for number in range(60)}
    for log in (stored["log"], stored["cart"].pop("seen")):
        assert sorted(log) == sorted(written)
        for name in "ab":
            own = [entry for entry in log if entry.startswith(name)]
            assert own == [f"{name}{number}" for number in range(60)], "each in its order"
    assert stored["cart"] == written


@pytest.mark.parametrize("told", [20, pytest.param(1, marks=pytest.mark.full)])
def test_killed_process_loses_nothing_that_it_was_told(url: str, told: int) -> None:
    key = new_session()
    with (
        process(url, write_until_killed, key, "victim") as victim,
        process(url, set_fields, key, "other", 100) as other,
    ):
        lines = [int(line(victim)) for _ in range(told)]
        victim.send_signal(signal.SIGKILL)
        assert victim.stdout is not None
        lines += map(int, victim.stdout)
        finish(other)
    stored = SessionStore(key).load()
    written = stored["victim n"]
    assert lines == list(range(len(lines)))
    assert written - len(lines) in (0, 1), "all that was told, and at most the one under way"
    for letter in "ab":
        assert [stored.pop(f"victim {letter}{number}") for number in range(written)] == list(
            range(written)
        )
    del stored["victim n"]
    assert stored == {f"other{number}": {"by": "other"} for number in range(100)}


def test_forks_have_connections_of_their_own(url: str) -> None:
    key = new_session()
    with process(url, fork_after_use, key, 20) as forking:
        (printed,) = finish(forking)
    told = json.loads(printed)
    assert told["codes"] == [0, 0]
    assert told["ours"] in told["all"], "the parent's connection lives on"
    assert len(set(told["all"])) == 3, "nobody uses another process's connection"
    assert SessionStore(key).load() == {"n": 4 * (20 + 2 * 20)}


def test_fork_in_an_event_loop_has_its_own_connections(url: str) -> None:
    with process(url, forked_in_a_loop) as forking:
        (printed,) = finish(forking)
    before, theirs, after = json.loads(printed)
    assert theirs != before
    assert after == before, "the parent's connection lives on"


if __name__ == "__main__":
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
    django.setup()
    _, name, location, arguments = sys.argv
    use_store(django.conf.settings, location)
    globals()[name](*json.loads(arguments))
