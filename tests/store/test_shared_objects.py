"""One session object, many tasks or threads: one load, one lock, one set of changes."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any

import pytest
import redis
from django.http import HttpRequest, HttpResponse
from django.test import AsyncRequestFactory

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.middleware import ClusteredSessionMiddleware
from tests.locking import BOUND_S, Threads, new_session, outcome, owner
from tests.servers import CountingProxy

pytestmark = pytest.mark.usefixtures("store")


def stored(key: str | None) -> dict[str, Any]:
    return SessionStore(key).load()


def run(work: Coroutine[Any, Any, Any]) -> None:
    asyncio.run(asyncio.wait_for(work, BOUND_S))


def test_keys_set_before_the_load_are_both_there() -> None:
    key = new_session(old=0)

    async def both() -> None:
        session = SessionStore(key)
        await asyncio.gather(session.aset("a", 1), session.aset("b", 2))
        await session.asave()

    run(both())
    assert stored(key) == {"old": 0, "a": 1, "b": 2}


def test_tasks_share_one_load(proxy: CountingProxy) -> None:
    key = new_session(n=0)

    async def many() -> None:
        await SessionStore(key).aexists(key)
        proxy.reset()
        session = SessionStore(key)
        await asyncio.gather(*(session.aincrement("n") for _ in range(5)))
        assert proxy.round_trips == 1
        await session.asave()

    run(many())
    assert stored(key) == {"n": 5}


@pytest.mark.parametrize("locking", ["off", "all"])
def test_tasks_of_a_request_do_not_wait_for_each_other(settings: Any, locking: str) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = locking
    key = new_session(a=1)

    async def view(request: HttpRequest) -> HttpResponse:
        found = await asyncio.gather(*(request.session.aget("a") for _ in range(5)))
        await asyncio.gather(*(request.session.aincrement("n") for _ in range(5)))
        return HttpResponse(str(found))

    async def visit() -> None:
        request = AsyncRequestFactory().get("/")
        request.COOKIES["sessionid"] = key
        response = await ClusteredSessionMiddleware(view)(request)
        assert (response.status_code, response.content) == (200, b"[1, 1, 1, 1, 1]")

    run(visit())
    assert stored(key) == {"a": 1, "n": 5}


def test_load_that_is_cancelled_is_done_by_another_task(proxy: CountingProxy) -> None:
    key = new_session(n=3)

    async def go() -> None:
        session = SessionStore(key)
        proxy.stall()
        first = asyncio.create_task(session.aget("n"))
        second = asyncio.create_task(session.aget("n"))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        proxy.resume()
        assert await second == 3

    run(go())


@pytest.mark.parametrize("start", ["old", "new", "counter"])
def test_steps_beside_saves_count_once(start: str) -> None:
    async def go() -> str | None:
        session = SessionStore()
        if start != "new":
            await session.aset("n" if start == "counter" else "old", 0)
            await session.asave()

        async def step() -> None:
            await session.aincrement("n")
            await session.asave()

        await asyncio.gather(*(step() for _ in range(10)))
        for _ in range(10):
            await session.aincrement("n")
            saving = asyncio.create_task(session.asave())
            await asyncio.sleep(0)
            await session.aincrement("n")
            await saving
        await session.asave()
        return session.session_key

    assert stored(asyncio.run(go()))["n"] == 30


def test_value_set_while_a_save_is_under_way_is_saved_next(proxy: CountingProxy) -> None:
    key = new_session(n=0, other=0)

    async def go() -> None:
        session = SessionStore(key)
        await session.aincrement("n")
        await session.aget("other")
        proxy.stall()
        saving = asyncio.create_task(session.asave())
        await asyncio.sleep(0)
        await session.aset("n", 50)
        await session.apop("other")
        proxy.resume()
        await saving
        assert await session.aget("n") == 50
        await session.asave()

    run(go())
    assert stored(key) == {"n": 50}


def test_change_beside_a_commit_is_saved_with_the_response(proxy: CountingProxy) -> None:
    key = new_session(a=0, b=0)

    async def view(request: HttpRequest) -> HttpResponse:
        session = request.session
        await session.aset("a", 1)
        await session.aget("b")
        proxy.stall()
        committing = asyncio.create_task(session.acommit())
        await asyncio.sleep(0)
        session["b"] = 1
        proxy.resume()
        await committing
        return HttpResponse()

    async def visit() -> None:
        request = AsyncRequestFactory().get("/")
        request.COOKIES["sessionid"] = key
        await ClusteredSessionMiddleware(view)(request)

    run(visit())
    assert stored(key) == {"a": 1, "b": 1}


def test_threads_lose_no_step() -> None:
    session = SessionStore()
    session["old"] = 0
    session.save()

    def work() -> None:
        for _ in range(50):
            session.increment("n")
            session.save()

    with Threads() as threads:
        works = [threads.start(work) for _ in range(4)]
    for one in works:
        outcome(one)
    session.save()
    assert stored(session.session_key)["n"] == 200


def test_threads_decode_each_value_once() -> None:
    key = new_session(**{f"key {number}": [number] for number in range(200)})
    session = SessionStore(key)
    together = threading.Barrier(4)

    def work() -> list[int]:
        together.wait(BOUND_S)
        return [id(session[f"key {number}"]) for number in range(200)]

    with Threads() as threads:
        works = [threads.start(work) for _ in range(4)]
    first, *others = map(outcome, works)
    assert others == [first] * 3


def test_thread_and_task_take_turns() -> None:
    key = new_session(n=0)

    async def go() -> None:
        session = SessionStore(key)

        async def task() -> None:
            for _ in range(20):
                await session.aincrement("n")
                await session.asave()

        def thread() -> None:
            for _ in range(20):
                session.increment("n")
                session.save()

        await asyncio.gather(task(), asyncio.to_thread(thread), task())

    run(go())
    assert stored(key) == {"n": 60}


# Blocks of lock().


def test_last_block_that_ends_writes_and_releases(store: redis.Redis) -> None:
    key = new_session(n=0)

    async def go() -> None:
        session = SessionStore(key)
        inside, leave = asyncio.Event(), asyncio.Event()

        async def first() -> None:
            async with session.alock():
                await session.aset("first", 1)
                await inside.wait()
            assert owner(store, key)
            assert "first" not in await SessionStore(key).aload()
            leave.set()

        async def second() -> None:
            async with session.alock():
                inside.set()
                await session.aset("second", 2)
                await leave.wait()

        await asyncio.gather(first(), second())

    run(go())
    assert stored(key) == {"n": 0, "first": 1, "second": 2}
    assert owner(store, key) == ""


@pytest.mark.parametrize("fails_first", [True, False])
def test_block_that_fails_beside_another_loses_it_nothing(
    store: redis.Redis, fails_first: bool
) -> None:
    key = new_session(n=0)

    async def go() -> None:
        session = SessionStore(key)
        inside, ended = asyncio.Event(), asyncio.Event()

        async def failing() -> None:
            with contextlib.suppress(LookupError):
                async with session.alock():
                    await inside.wait()
                    if not fails_first:
                        await ended.wait()
                    raise LookupError
            ended.set()

        async def other() -> None:
            async with session.alock():
                await session.aset("kept", 1)
                inside.set()
                if fails_first:
                    await ended.wait()
            ended.set()

        await asyncio.gather(failing(), other())
        await session.asave()

    run(go())
    assert stored(key) == {"n": 0, "kept": 1}
    assert owner(store, key) == ""


def test_flow_that_asks_its_own_session_does_not_wait_for_itself() -> None:
    key = new_session(n=1)
    session = SessionStore(key)

    def flow() -> Any:
        yield from ()
        return session.get("n")

    assert session.run(flow(), "aget()") == 1


@pytest.mark.parametrize("times", [1, 3])
def test_use_goes_on_after_tasks_gave_up(proxy: CountingProxy, times: int) -> None:
    key = new_session(n=1)

    async def go() -> None:
        session = SessionStore(key)
        proxy.stall()
        tasks = [asyncio.create_task(session.aget("n")) for _ in range(times)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        proxy.resume()
        assert await session.aget("n") == 1

    run(go())
