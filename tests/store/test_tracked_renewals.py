"""Sliding sessions with tracked reads: no trip for a read, and renewals in batches."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import redis
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory, override_settings

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.middleware import ClusteredSessionMiddleware
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol.effects import Flow
from django_clustered_sessions.protocol.record import Meta
from django_clustered_sessions.session import finish, renewals
from django_clustered_sessions.session.near_cache import near_cache
from tests.children import finish as wait_for_end
from tests.children import python
from tests.conftest import DATABASE
from tests.gateways import load_scripts, place
from tests.locking import BOUND_S, new_session
from tests.servers import CountingProxy, StoreServer, wait_for

#: Seconds within which a renewal has left, on a machine that is busy.
LEFT_S = 5.0


@pytest.fixture(autouse=True)
def sliding(store: redis.Redis, settings: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    near_cache.clear()
    load_scripts(store)
    settings.SESSION_SAVE_EVERY_REQUEST = True
    settings.CLUSTERED_SESSIONS_NEAR_READS = "tracked"
    settings.CLUSTERED_SESSIONS_NEAR_MAX_AGE = 60.0
    # No response is late here, so that a slow machine adds no trips.
    monkeypatch.setattr(finish, "LATE_S", float("inf"))
    yield
    # Not in another test, to another store.
    renewals.renew_the_rest()


def visit(key: str) -> HttpResponse:
    request = RequestFactory().get("/")
    request.COOKIES = {"sessionid": key}
    return ClusteredSessionMiddleware(view)(request)


def view(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(request.session.get("n")))


async def avisit(key: str) -> HttpResponse:
    async def page(request: HttpRequest) -> HttpResponse:
        return HttpResponse(str(await request.session.aget("n")))

    request = RequestFactory().get("/")
    request.COOKIES = {"sessionid": key}
    return await ClusteredSessionMiddleware(page)(request)


def meta(store: redis.Redis, key: str) -> Meta:
    return Meta.parse(store.hget(place(key).record, "m:") or b"")


def aged(store: redis.Redis, age_ms: int = 100_000) -> str:
    """Return the key of a session that was used last that long ago."""
    key = new_session(n=1)
    now = meta(store, key)
    # The fields of the packed meta that are times of use: the deadline, and the last use.
    packed = bytearray(store.hget(place(key).record, "m:") or b"")
    packed[16:22] = (now.deadline_ms - age_ms).to_bytes(6, "big")
    packed[32:38] = (now.seen_ms - age_ms).to_bytes(6, "big")
    store.hset(place(key).record, "m:", bytes(packed))
    near_cache.clear()
    return key


def is_tracked_since(key: str, seen_ms: int) -> bool:
    """Return whether the session is at hand as it was renewed after that time."""
    copy = near_cache.copy(place(key).record)
    return copy is not None and copy.is_tracked and copy.found.meta.seen_ms > seen_ms


def test_read_costs_no_trip_and_renews(proxy: CountingProxy, store: redis.Redis) -> None:
    key = aged(store)
    before = meta(store, key)
    visit(key)
    wait_for(lambda: meta(store, key).deadline_ms > before.deadline_ms + 90_000, "it is renewed")
    wait_for(lambda: is_tracked_since(key, before.seen_ms), "it is at hand again")
    proxy.reset()
    for _ in range(20):
        assert visit(key).content == b"1"
    # None of its own: a batch may have left meanwhile.
    assert counters.counts["near_reads"] >= 20
    assert all(b"HGETALL" not in sent for sent in proxy.requests)


def test_read_costs_no_trip_and_renews_on_a_loop(store: redis.Redis) -> None:
    key = aged(store)
    before = meta(store, key)

    async def main() -> None:
        await avisit(key)
        deadline = time.monotonic() + LEFT_S
        while meta(store, key).deadline_ms < before.deadline_ms + 90_000:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        counters.clear()
        for _ in range(20):
            assert (await avisit(key)).content == b"1"
        assert counters.counts["near_reads"] >= 19

    asyncio.run(main())


def test_renewals_of_a_loop_that_ends_leave_all_the_same(store: redis.Redis) -> None:
    key = aged(store)
    before = meta(store, key)
    asyncio.run(avisit(key))
    wait_for(lambda: meta(store, key).deadline_ms > before.deadline_ms + 90_000, "it is renewed")


class BusyLoop(asyncio.SelectorEventLoop):
    """An event loop at which, when the test's thread looks, another thread's visit comes first."""

    visiting: Callable[[], Any] | None = None

    def is_closed(self) -> bool:
        visiting, BusyLoop.visiting = BusyLoop.visiting, None
        if visiting:
            thread = threading.Thread(target=visiting)
            thread.start()
            thread.join()
            BusyLoop.visiting = visiting
        return super().is_closed()


def test_loops_of_threads_may_begin_at_once(store: redis.Redis) -> None:
    """As with asynchronous views under WSGI: each request has a loop of its own."""
    key = aged(store)
    with asyncio.Runner(loop_factory=BusyLoop) as runner:
        runner.run(avisit(key))
    BusyLoop.visiting = lambda: asyncio.run(avisit(key))
    try:
        assert asyncio.run(avisit(key)).content == b"1"
    finally:
        BusyLoop.visiting = None


def test_session_is_tracked_again_after_its_renewal(store: redis.Redis) -> None:
    key = aged(store)
    # Before the visit: its renewal may leave at once.
    seen = meta(store, key).seen_ms
    visit(key)
    wait_for(lambda: meta(store, key).seen_ms > seen, "it is renewed")
    # Without a read in between, which would track it, too.
    wait_for(lambda: is_tracked_since(key, seen), "it is at hand")


def test_cookie_lasts_as_long_as_the_renewed_session(store: redis.Redis, settings: Any) -> None:
    settings.SESSION_COOKIE_AGE = 1000
    key = aged(store, 300_000)
    assert SessionStore(key).get_expiry_age() <= 700
    response = visit(key)
    assert 990 <= response.cookies["sessionid"]["max-age"] <= 1000


def test_many_sessions_are_renewed_on_few_trips(proxy: CountingProxy, store: redis.Redis) -> None:
    keys = [aged(store) for _ in range(150)]
    before = {key: meta(store, key).deadline_ms for key in keys}
    for key in keys:
        visit(key)
    wait_for(lambda: all(meta(store, key).deadline_ms > before[key] for key in keys), "all are")
    touches = [sent for sent in proxy.requests if sent.count(b"EVALSHA\r\n") > 1]
    assert 1 <= len(touches) < 15


def test_session_at_the_brink_is_renewed_at_once(store: redis.Redis, settings: Any) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = False
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = 4
    key = new_session(n=1)
    seen = meta(store, key).seen_ms
    wait_for(lambda: store.time()[0] * 1000 > seen + 1100, "a second has passed")
    visit(key)
    assert meta(store, key).seen_ms > seen


def test_renewals_go_on_after_an_exception(
    store: redis.Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = aged(store)
    before = meta(store, key)
    may_begin, begin = threading.Event(), renewals.Batch.round

    def round_(batch: renewals.Batch) -> Flow[None]:
        # One that is due at once would leave before the fault.
        may_begin.wait(BOUND_S)
        return begin(batch)

    monkeypatch.setattr(renewals.Batch, "round", round_)
    visit(key)
    # This process cannot build a connection for a while.
    nowhere = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
    with override_settings(CACHES=nowhere):
        may_begin.set()
        wait_for(lambda: "session-renewals: a round failed" in caplog.text, "a line")
    wait_for(lambda: meta(store, key).deadline_ms > before.deadline_ms + 90_000, "it is renewed")


def test_ended_session_is_not_renewed(store: redis.Redis) -> None:
    key = aged(store)
    visit(key)
    SessionStore(key).flush()
    ended = store.hgetall(place(key).record)
    other = aged(store)
    before = meta(store, other).seen_ms
    visit(other)
    wait_for(lambda: meta(store, other).seen_ms > before, "another one is renewed")
    assert store.hgetall(place(key).record) == ended
    assert visit(key).content == b"None"


def test_renewals_leave_at_the_end_of_a_process(
    store: redis.Redis, store_server: StoreServer
) -> None:
    key = aged(store)
    before = meta(store, key)
    code = f"""
import os
os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
from django.conf import settings
settings.CACHES = settings.CACHES | {{
    "sessions": {{
        "BACKEND": "django_redis.cache.RedisCache",
        "LOCATION": "{store_server.url}/{DATABASE}",
    }}
}}
settings.SESSION_SAVE_EVERY_REQUEST = True
settings.CLUSTERED_SESSIONS_NEAR_READS = "tracked"
import django
django.setup()
from tests.store.test_tracked_renewals import visit
assert visit({key!r}).content == b"1"
"""
    with python("-W", "error", "-c", code) as process:
        wait_for_end(process)
    assert meta(store, key).deadline_ms > before.deadline_ms + 90_000


@pytest.mark.parametrize("age_ms", [0, 500, 5000])
def test_renewal_that_the_store_takes_for_none_is_not_told(
    store: redis.Redis, settings: Any, age_ms: int
) -> None:
    settings.SESSION_COOKIE_AGE = 600
    key = aged(store, age_ms)
    before = meta(store, key)
    visit(key)
    told = near_cache.life(place(key).record)
    assert told is not None
    later_ms = told.seen_ms - before.seen_ms
    moves = later_ms >= 1000
    assert told.deadline_ms == before.deadline_ms + (later_ms if moves else 0)


@pytest.mark.parametrize("idle", [None, 300])
@pytest.mark.parametrize("absolute", [None, 400])
@pytest.mark.parametrize("expiry", [None, 500, datetime(2100, 1, 1, tzinfo=UTC)])
def test_store_sets_the_deadline_that_was_foreseen(
    store: redis.Redis, settings: Any, idle: int | None, absolute: int | None, expiry: Any
) -> None:
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = idle
    settings.CLUSTERED_SESSIONS_ABSOLUTE_TIMEOUT = absolute
    settings.SESSION_COOKIE_AGE = 600
    session = SessionStore(new_session(n=1))
    session.set_expiry(expiry)
    session.save()
    key = session.session_key or ""
    # That it was read is a use, too, whose renewal must not come in place of the visit's.
    renewals.renew_the_rest()
    before = meta(store, key)
    wait_for(lambda: store.time()[0] * 1000 > before.seen_ms + 1100, "a second has passed")
    visit(key)
    foreseen = near_cache.life(place(key).record)
    assert foreseen is not None
    wait_for(lambda: meta(store, key).seen_ms >= foreseen.seen_ms, "it is renewed")
    after = meta(store, key)
    # It was renewed later, by so much, and one of the two clocks was read before its trip.
    later_ms = after.seen_ms - foreseen.seen_ms
    assert 0 <= after.deadline_ms - foreseen.deadline_ms <= later_ms + 1
