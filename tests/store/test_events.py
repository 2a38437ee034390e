"""Events from the store: written with the change, handled by one worker each, none lost."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import itertools
import json
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from django.core.management import CommandError, call_command

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.events import Event, StreamEntry
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.management.commands import sessionevents
from django_clustered_sessions.management.commands.sessionevents import Worker
from django_clustered_sessions.monitoring.counters import NAMES, Counters, counters
from django_clustered_sessions.protocol import scripts
from django_clustered_sessions.protocol.changes import Changes
from django_clustered_sessions.protocol.commands import event_stream, records, users
from django_clustered_sessions.protocol.effects import Call
from django_clustered_sessions.protocol.flows import Flow
from django_clustered_sessions.protocol.options import Expiry, WriteOptions, kept_per_bucket
from django_clustered_sessions.protocol.record import (
    NOBODY,
    Ages,
    EndReason,
    Mode,
    SessionKeys,
    session_id,
    user_tag,
)
from django_clustered_sessions.signals import session_expired
from django_clustered_sessions.store import connections, drivers
from django_clustered_sessions.store.budget import Budget
from tests import event_worker
from tests.children import child
from tests.clusters import ClusterServers
from tests.event_worker import KEPT, WAIT_S, note, note_and_hang, note_when_allowed
from tests.locking import Threads, outcome
from tests.pages import page
from tests.round_trips import CASES, cost, warm
from tests.servers import CountingProxy, StoreServer, wait_for

__all__ = ["warm"]

pytestmark = [pytest.mark.usefixtures("no_databases"), pytest.mark.each_server]

#: Numbers for keys that nobody has had.
KEYS = itertools.count()
LEASE_S = 60


# In the test.


@pytest.fixture
def kept(settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_EVENTS_KEPT = KEPT


@pytest.fixture
def events(store: redis.Redis, kept: None) -> redis.Redis:
    """Turn events on, in an empty store; give a raw client of it."""
    return store


def handled(lease_s: int = LEASE_S) -> list[Event]:
    """Let a worker handle what there is; return it."""
    found: list[Event] = []
    Worker(found.append, lease_s).run(once=True)
    return found


def told(found: list[Event]) -> Counter[tuple[str, str, str | None]]:
    return Counter((event.kind, event.session_id, event.reason) for event in found)


def new_session(user: object = None, **values: Any) -> SessionStore:
    session = SessionStore()
    session.update(values)
    if user is not None:
        session["_auth_user_id"] = str(user)
    session.save()
    return session


def public_id(session: Any) -> str:
    return session_id(session.session_key)


def place_of(session: Any) -> SessionKeys:
    return SessionKeys.of("session", session.session_key)


def waiting(client: redis.Redis) -> int:
    """Return how many events are in the store, handled or not."""
    return sum(client.xlen(key) for key in client.scan_iter("*:events", count=10_000))


def expired_by_now(client: redis.Redis, *sessions: SessionStore) -> None:
    """Let sessions expire, and wait until the store has none of them."""
    for session in sessions:
        session.set_expiry(1)
        session.save()
    records = [place_of(session).record for session in sessions]
    wait_for(lambda: not client.exists(*records), "they have expired", timeout_s=WAIT_S)


def worker(
    url: str, handler: Any, log: Path, lease_s: int = 60
) -> AbstractContextManager[subprocess.Popen[str]]:
    """Run a worker in a process of its own."""
    return child(event_worker.__name__, url, handler.__name__, str(log), str(lease_s))


def lines(log: Path) -> list[list[str]]:
    """Return what the workers have written down."""
    path = log / "log"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def url_of(settings: Any) -> str:
    location: str = settings.CACHES["sessions"]["LOCATION"]
    return location


def ask(*calls: Call) -> list[Any]:
    def flow() -> Flow[list[Any]]:
        replies: list[Any] = yield calls
        return replies

    return drivers.run(flow(), connections.pool, Budget(5.0))


# What is written.


def test_nothing_is_kept_where_events_are_off(store: redis.Redis) -> None:
    session = new_session(user=1)
    session.cycle_key()
    session.flush()
    new_session().set_expiry(1)
    registry.end_sessions_of(1)
    assert store.keys("*:events") == []


def test_session_is_told_of_from_first_to_last(events: redis.Redis) -> None:
    session = new_session()
    anonymous = public_id(session)
    session["n"] = 1
    session.cycle_key()
    session["_auth_user_id"] = "7"
    session.save()
    user = public_id(session)
    session.cycle_key()
    last = public_id(session)
    session.flush()
    before = wait_for(lambda: events.time()[0], "the store's clock")
    found = {(event.kind, event.session_id): event for event in handled()}
    assert set(found) == {
        ("created", anonymous),
        *(("ended", one) for one in (anonymous, user, last)),
    }
    ends = [found["ended", one] for one in (anonymous, user, last)]
    assert [(end.reason, end.replaced_by) for end in ends] == [
        ("replaced", user),
        ("replaced", last),
        ("logout", None),
    ]
    assert [end.user_id for end in ends] == [None, "7", "7"]
    assert [end.is_of(7) for end in ends] == [False, True, True]
    assert [end.user_tag for end in ends] == [None, *[user_tag(7).hex()] * 2]
    for event in found.values():
        assert event.time.utcoffset() == timedelta(0)
        assert abs(event.time.timestamp() - before) < WAIT_S
    assert len({event.id for event in found.values()}) == 4
    assert waiting(events) == 0
    for key in events.scan_iter("*:events"):
        assert events.xpending(key, "workers")["pending"] == 0
    assert handled() == []


def test_every_way_to_end_a_session_says_why(events: redis.Redis) -> None:
    deleted, ended, *all_of_them = (new_session(user=1) for _ in range(4))
    assert {event.user_id for event in handled()} == {"1"}
    SessionStore().delete(deleted.session_key)
    registry.end_session(public_id(ended))
    asyncio.run(registry.aend_sessions_of(1))
    found = handled()
    assert {event.user_id for event in found} == {"1"}
    assert told(found) == {
        ("ended", public_id(deleted), "deleted"): 1,
        **{("ended", public_id(one), "ended"): 1 for one in (ended, *all_of_them)},
    }


def test_session_that_expires_at_once_is_told_of_with_its_user(
    events: redis.Redis, settings: Any
) -> None:
    by_commit = new_session(user=3)
    never = SessionStore()
    never.set_expiry(-1)
    never.save()
    by_touch = new_session(user=3)
    handled()
    by_commit.set_expiry(-1)
    by_commit.save()
    settings.CLUSTERED_SESSIONS_ABSOLUTE_TIMEOUT = 0.001
    assert SessionStore(by_touch.session_key).load() == {}
    found = handled()
    assert told(found) == {("expired", public_id(one), None): 1 for one in (by_commit, by_touch)}
    assert {event.user_id for event in found} == {"3"}


def test_expired_session_is_found_once(events: redis.Redis) -> None:
    user, anonymous = new_session(user=5), new_session()
    gone = new_session(user=5)
    gone_id = public_id(gone)
    handled()
    gone.flush()
    expired_by_now(events, user, anonymous)
    workers = [Worker(lambda event: None, LEASE_S) for _ in range(2)]
    for one in workers:
        one.sweep_if_due()
    found = handled()
    assert told(found) == {
        ("ended", gone_id, "logout"): 1,
        ("expired", public_id(user), None): 1,
        ("expired", public_id(anonymous), None): 1,
    }
    (of_user,) = [event for event in found if event.session_id == public_id(user)]
    assert (of_user.user_id, of_user.is_of(5), of_user.is_of(6)) == (None, True, False)
    assert not events.exists(place_of(user).index, place_of(user).users)
    assert handled() == []


def test_creating_a_session_tells_of_expired_ones(events: redis.Redis) -> None:
    for session in (new_session(user=5), new_session()):
        expired_by_now(events, session)
        before = events.xlen(place_of(session).events)
        for _ in range(2):
            create_in(place_of(session))
        assert events.xlen(place_of(session).events) == before + 2 + 1
        assert told(handled())["expired", public_id(session), None] == 1


def test_taking_a_session_over_tells_of_expired_ones(events: redis.Redis) -> None:
    """And not that it begins: it began under another engine."""
    session = new_session(user=5)
    expired_by_now(events, session)
    handled_before = waiting(events)
    terms = WriteOptions(Ages(60_000), 100_000, 4000, "merge", events_kept=KEPT)
    place = SessionKeys.of("session", key_in(place_of(session)))
    expiry, field = Expiry(Mode.DEFAULT, 0), [(b"d:n", b"s1")]
    ask(records.adopt(place, b"token--1", expiry, field, terms, NOBODY, 60_000, 60_000))
    assert waiting(events) == handled_before + 1
    found = handled()
    assert ("expired", public_id(session), None) in told(found)
    assert place.id not in {event.session_id for event in found}


@pytest.mark.usefixtures("figures")
def test_expiries_that_a_worker_finds_are_counted(
    events: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session()
    expired_by_now(events, session)
    # None of them leaves for the store.
    monkeypatch.setattr(Counters, "are_due", False)
    counters.drain(now=True)
    handled()
    assert dict(zip(NAMES, counters.drain(now=True), strict=True))["expired"] == 1


def key_in(place: SessionKeys) -> str:
    """Return a key that nobody has had, of a session in the bucket of ``place``."""
    keys = (f"{number:032}" for number in KEYS)
    return next(key for key in keys if SessionKeys.of("session", key).index == place.index)


def create_in(place: SessionKeys) -> SessionStore:
    """Create a session in the bucket of ``place``."""
    session = SessionStore(key_in(place))
    session.save(must_create=True)
    return session


def test_expired_session_is_found_within_a_minute(
    events: redis.Redis, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sessionevents.SWEEP_S + sessionevents.POLL_S < 60
    monkeypatch.setattr(sessionevents, "SWEEP_S", 0.1)
    monkeypatch.setattr(sessionevents, "POLL_S", 0.05)
    found: list[Event] = []
    running = Worker(found.append, LEASE_S)
    done = threads.start(running.run)
    try:
        session = new_session(user=5)
        expired_by_now(events, session)
        wait_for(lambda: len(found) > 1, "the worker has found it", timeout_s=WAIT_S)
    finally:
        running.stop.set()
    outcome(done)
    assert [event.kind for event in found] == ["created", "expired"]


def test_session_gone_from_the_index_is_told_of_once(events: redis.Redis) -> None:
    """It is listed, and gone when it is looked up: it may have expired in between."""
    session, ended = new_session(user=5), new_session(user=5)
    handled()
    place = place_of(session)
    events.delete(place.record)
    assert registry.count_of(5) == 1
    for one in (place, place_of(ended)):
        ask(users.unlist(one, user_tag(5), KEPT))
    assert told(handled()) == {("expired", place.id, None): 1}
    registry.end_session(public_id(ended))
    # Put back into the index by hand.
    events.zadd(place_of(ended).index, {place_of(ended).id.encode() + user_tag(5): 9e15})
    ask(users.unlist(place_of(ended), user_tag(5), KEPT))
    assert [event.kind for event in handled()] == ["ended"]


@pytest.mark.parametrize("user", [None, 5])
def test_session_in_its_last_millisecond_is_not_told_of(
    events: redis.Redis, user: int | None
) -> None:
    """The store has a record for as long as its clock is not past the deadline."""
    session = new_session(user=user)
    place = place_of(session)
    handled()
    source = scripts.script("sweep").source.replace(
        b"\nreturn {DONE", b"\nnow = tonumber(ARGV[2])\nreturn {DONE"
    )
    ((_, score),) = events.zrange(place.index, 0, -1, withscores=True)
    deadline = abs(score)
    for now, swept in ((deadline, 0), (deadline + 1, 1)):
        keys = (place.index, place.users, place.events)
        reply: Any = events.eval(source, 3, *keys, KEPT, f"{now:.0f}")
        assert reply[2] == swept


def test_a_write_that_is_repeated_tells_once(events: redis.Redis) -> None:
    """The driver repeats a trip whose reply is lost."""
    terms = WriteOptions(Ages(60_000), 100_000, 4000, "merge", events_kept=KEPT)
    first, second, third, other = (SessionKeys.of("session", name * 32) for name in "abcd")
    expiry, at_once = Expiry(Mode.DEFAULT, 0), Expiry(Mode.ABSOLUTE, 0)
    field = [(b"d:n", b"s1")]
    calls = [
        records.create(first, b"token--1", expiry, field, terms),
        records.rotate(first, second, b"token--2", terms),
        records.end(second, EndReason.FLUSHED, KEPT),
        records.create(third, b"token--3", expiry, field, terms),
        records.leave(third, b"token--4", b"token--3", other, terms),
        records.create(other, b"token--5", expiry, field, terms),
        records.commit(other, b"token--6", at_once, Changes((), True), terms),
    ]
    for call in calls:
        ask(call, call)
        ask(call)
    assert told(handled()) == {
        **{("created", one.id, None): 1 for one in (first, third, other)},
        ("ended", first.id, "replaced"): 1,
        ("ended", second.id, "logout"): 1,
        ("ended", third.id, "replaced"): 1,
        ("expired", other.id, None): 1,
    }


def test_a_request_whose_reply_was_lost_tells_once(
    events: redis.Redis, proxy: CountingProxy
) -> None:
    session = new_session()
    proxy.cut_next("reply")
    session.cycle_key()
    proxy.cut_next("reply")
    session.flush()
    assert sorted(event.kind for event in handled()) == ["created", "ended", "ended"]


#: One request for each of the scripts that may write an event.
WRITING = [
    case
    for case in CASES
    if case.id in ("untouched, every request", "change", "first write", "login", "logout")
]


@pytest.mark.parametrize(("before", "every_request", "use", "_ause", "expected"), WRITING)
def test_events_cost_no_round_trip(
    warm: CountingProxy,
    settings: Any,
    before: str | None,
    every_request: bool,
    use: Any,
    _ause: Any,
    expected: int,
) -> None:
    settings.CLUSTERED_SESSIONS_EVENTS_KEPT = KEPT
    settings.SESSION_SAVE_EVERY_REQUEST = every_request
    assert cost(warm, before, use) == (expected, 0)


def test_bound_keeps_the_newest_events(events: redis.Redis, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_EVENTS_KEPT = 1
    place = SessionKeys.of("session", "some key")
    sessions = [create_in(place) for _ in range(12)]
    assert events.xlen(place.events) == 5
    assert [event.session_id for event in handled()] == [public_id(one) for one in sessions[-5:]]


def test_event_pushed_out_while_handled_leaves_nothing(events: redis.Redis, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_EVENTS_KEPT = 1
    place = SessionKeys.of("session", "some key")
    create_in(place)
    bucket = int(place.index.partition("{")[2][:3], 16)
    (taken,) = event_stream.parse_take(ask(event_stream.take("session", bucket, 10, 1))[0])
    newest = [create_in(place) for _ in range(5)]
    wait_for(lambda: idle_ms(events, place) > 1, "its time is over")
    assert taken[0] not in dict(events.xrange(place.events))
    assert [event.session_id for event in handled()] == [public_id(one) for one in newest]
    assert events.xpending(place.events, "workers")["pending"] == 0


def idle_ms(client: redis.Redis, place: SessionKeys) -> int:
    pending = client.xpending_range(place.events, "workers", "-", "+", 1)
    return int(pending[0]["time_since_delivered"])


def test_as_many_events_as_the_setting_says_can_wait() -> None:
    for kept in (1, 1000, KEPT, 1_000_000):
        share, most = kept / 1024, kept_per_bucket(kept)
        assert share + 4 * share**0.5 <= most <= share + 4 * share**0.5 + 5
    assert kept_per_bucket(0) == 0


# Workers.


@pytest.mark.full
def test_each_event_is_handled_by_one_of_two_workers(
    events: redis.Redis, settings: Any, tmp_path: Path
) -> None:
    created: list[str] = []

    def both_have_handled() -> bool:
        created.extend(public_id(new_session()) for _ in range(20))
        return len({pid for pid, *_ in lines(tmp_path)}) == 2

    url = url_of(settings)
    with worker(url, note, tmp_path), worker(url, note, tmp_path):
        wait_for(both_have_handled, "both workers handle events", timeout_s=WAIT_S)
        wait_for(lambda: waiting(events) == 0, "nothing is left", timeout_s=WAIT_S)
        wait_for(lambda: len(lines(tmp_path)) >= len(created), "all are noted")
    assert Counter(line[2] for line in lines(tmp_path)) == Counter(created)


def test_an_event_is_handled_again_after_a_crash(
    events: redis.Redis, settings: Any, tmp_path: Path
) -> None:
    url = url_of(settings)
    sessions = [new_session() for _ in range(3)]
    with worker(url, note_and_hang, tmp_path) as victim:
        wait_for(lambda: lines(tmp_path), "a worker has one at hand", timeout_s=WAIT_S)
        victim.kill()
        victim.wait(timeout=WAIT_S)
    ((_, _, at_hand),) = lines(tmp_path)
    found = handled()
    # What it had taken it may have had for a good while yet.
    assert at_hand not in {event.session_id for event in found}
    with worker(url, note, tmp_path, lease_s=1):
        wait_for(lambda: waiting(events) == 0, "nothing is left", timeout_s=WAIT_S)
    again = Counter(line[2] for line in lines(tmp_path)[1:])
    again.update(event.session_id for event in found)
    assert again == Counter(map(public_id, sessions))


@pytest.mark.full
def test_a_worker_that_is_told_to_stop_finishes_what_it_does(
    events: redis.Redis, settings: Any, tmp_path: Path
) -> None:
    new_session()
    with worker(url_of(settings), note_when_allowed, tmp_path) as stopping:
        wait_for(lambda: lines(tmp_path), "it has one at hand", timeout_s=WAIT_S)
        stopping.send_signal(signal.SIGTERM)
        (tmp_path / "go").touch()
        _, errors = stopping.communicate(timeout=WAIT_S)
    assert stopping.returncode == 0, errors
    assert lines(tmp_path)[1:] == [["done"]]
    assert waiting(events) == 0


def test_a_worker_that_stops_gives_back_what_it_has_taken(events: redis.Redis) -> None:
    """It takes one, two, four at once, and stops at the second of the four."""
    sessions = [create_in(SessionKeys.of("session", "some key")) for _ in range(8)]
    found: list[Event] = []

    def handle(event: Event) -> None:
        found.append(event)
        if len(found) == 5:
            stopping.stop.set()

    stopping = Worker(handle, LEASE_S)
    stopping.run()
    assert len(found) == 5
    # At once, and not a lease later.
    found += handled()
    assert Counter(event.session_id for event in found) == Counter(map(public_id, sessions))


def test_slow_handler_gives_back_what_it_is_late_for(events: redis.Redis) -> None:
    place = SessionKeys.of("session", "some key")
    sessions = [create_in(place) for _ in range(3)]
    found: list[Event] = []
    slow = Worker(found.append, LEASE_S)
    bucket = int(place.index.partition("{")[2][:3], 16)
    reply = ask(event_stream.take("session", bucket, 10, LEASE_S * 1000))[0]
    taken = [StreamEntry(bucket, *one) for one in event_stream.parse_take(reply)]
    slow.handle(taken[:1], time.monotonic())
    slow.handle(taken[1:], time.monotonic() - LEASE_S / 2 - 1)
    assert [event.session_id for event in found] == [public_id(sessions[0])]
    assert [event.session_id for event in handled()] == [public_id(one) for one in sessions[1:]]


def test_events_wait_for_a_worker(events: redis.Redis) -> None:
    first = new_session()
    assert [event.session_id for event in handled()] == [public_id(first)]
    others = [new_session() for _ in range(50)]
    assert told(handled()) == {("created", public_id(one), None): 1 for one in others}


def test_an_event_that_could_not_be_handled_is_tried_again(
    events: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = new_session(), new_session()
    place, found = place_of(bad), []

    def handle(event: Event) -> None:
        if event.session_id == public_id(bad):
            raise ValueError("no such mail server")
        found.append(event)

    failing = Worker(handle, LEASE_S)
    failing.run(once=True)
    assert [event.session_id for event in found] == [public_id(good)]
    assert (failing.failures, waiting(events)) == (1, 1)
    assert "no such mail server" in caplog.text
    assert handled() == []
    wait_for(lambda: idle_ms(events, place) > 1000, "its time is over", timeout_s=WAIT_S)
    assert [event.session_id for event in handled(lease_s=1)] == [public_id(bad)]
    assert waiting(events) == 0


class AsyncHandler:
    """An instance whose call is asynchronous, which no function says."""

    def __init__(self, work: Callable[[Event], None]) -> None:
        self._work = work

    async def __call__(self, event: Event) -> None:
        await asyncio.sleep(0)
        self._work(event)


def as_a_function(work: Callable[[Event], None]) -> Callable[[Event], Any]:
    async def handle(event: Event) -> None:
        await asyncio.sleep(0)
        work(event)

    return handle


def wrapped(work: Callable[[Event], None]) -> Callable[[Event], Any]:
    """Return an asynchronous function behind a plain one, as decorators make them."""
    handle = as_a_function(work)
    return lambda event: handle(event)


def as_an_awaitable(work: Callable[[Event], None]) -> Callable[[Event], Any]:
    """Return a function that returns no coroutine, and something to await all the same."""
    return lambda event: Later(as_a_function(work)(event))


class Later:
    def __init__(self, work: Coroutine[Any, Any, None]) -> None:
        self._work = work

    def __await__(self) -> Any:
        return self._work.__await__()


@pytest.mark.parametrize("form", [AsyncHandler, as_a_function, wrapped, as_an_awaitable])
def test_asynchronous_handlers_are_run(events: redis.Redis, form: Callable[..., Any]) -> None:
    sessions = [new_session() for _ in range(20)]
    found: list[Event] = []
    Worker(form(found.append), LEASE_S).run(once=True)
    assert told(found) == {("created", public_id(one), None): 1 for one in sessions}
    assert waiting(events) == 0


@pytest.mark.parametrize("form", [AsyncHandler, as_a_function, wrapped, as_an_awaitable])
def test_event_stays_where_an_asynchronous_handler_fails(
    events: redis.Redis, form: Callable[..., Any]
) -> None:
    def work(event: Event) -> None:
        raise ValueError("no such mail server")

    new_session()
    failing = Worker(form(work), LEASE_S)
    failing.run(once=True)
    assert (failing.failures, waiting(events)) == (1, 1)


def yields(event: Event) -> Iterator[None]:
    yield


async def ayields(event: Event) -> AsyncIterator[None]:
    yield


@pytest.mark.parametrize("handler", [yields, ayields])
def test_event_stays_where_the_handler_has_not_run(
    events: redis.Redis, caplog: pytest.LogCaptureFixture, handler: Any
) -> None:
    new_session()
    failing = Worker(handler, LEASE_S)
    failing.run(once=True)
    assert (failing.failures, waiting(events)) == (1, 1)
    assert "a generator cannot be run" in caplog.text


def test_command_takes_an_asynchronous_handler(events: redis.Redis) -> None:
    new_session()
    seen.clear()
    call_command("sessionevents", once=True, handler="tests.store.test_events.ahandler")
    assert (len(seen), waiting(events)) == (1, 0)


seen: list[Event] = []


async def ahandler(event: Event) -> None:
    seen.append(event)


def test_asynchronous_receivers_of_an_expiry_are_run(events: redis.Redis) -> None:
    session, found = new_session(), []
    receiver = wrapped(found.append)

    def receive(sender: Any, event: Event, **kwargs: Any) -> Any:
        return receiver(event)

    session_expired.connect(receive)
    try:
        handled()
        expired_by_now(events, session)
        handled()
    finally:
        session_expired.disconnect(receive)
    assert [event.session_id for event in found] == [public_id(session)]


@pytest.mark.parametrize("fails", [False, True])
def test_old_database_connections_are_closed_around_events(
    events: redis.Redis, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(sessionevents, "close_old_connections", lambda: seen.append("looked after"))

    def handle(event: Event) -> None:
        seen.append(event.kind)
        if fails:
            raise ValueError("no such table")

    new_session()
    Worker(handle, LEASE_S).run(once=True)
    assert seen == ["looked after", "created", "looked after"]


def test_a_store_that_is_away_is_waited_for(
    events: redis.Redis,
    proxy: CountingProxy,
    threads: Threads,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also where it goes away while an event is handled: that one is not handled again."""
    monkeypatch.setattr(sessionevents, "POLL_S", 0.05)
    found: list[Event] = []

    def handle(event: Event) -> None:
        found.append(event)
        if len(found) == 1:
            proxy.refuse()
            proxy.cut()

    def goes_on() -> bool:
        with suppress(SessionStoreUnavailable):
            new_session()
        return len(found) > 1

    running = Worker(handle, LEASE_S)
    new_session()
    done = threads.start(running.run)
    try:
        wait_for(lambda: "events wait" in caplog.text, "the store is away", timeout_s=WAIT_S)
        proxy.accept()
        wait_for(lambda: waiting(events) == 0, "it is finished", timeout_s=WAIT_S)
        wait_for(goes_on, "it goes on", timeout_s=WAIT_S)
    finally:
        running.stop.set()
    outcome(done)
    assert len({event.id for event in found}) == len(found)
    assert caplog.text.count("events wait") == 1


def test_damaged_event_is_left_out(events: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    session = new_session()
    key = place_of(session).events
    events.xadd(key, {"x": "y"})
    events.xadd(key, {"what": b"\xff", "id": "x"})
    # A later release may tell more.
    later = {"what": "moved", "id": "i", "tag": "t" * 8, "user": b"?", "why": "w", "more": "x"}
    events.xadd(key, later)
    elsewhere = next(tag for tag in ("{3fe}", "{3ff}") if tag not in key)
    events.set(f"session:{elsewhere}:events", "damage")
    found = handled()
    assert [event.kind for event in found] == ["created", "moved"]
    assert (found[1].user_id, found[1].reason, found[1].user_tag) == (None, "w", (b"t" * 8).hex())
    assert "is left out" in caplog.text
    assert events.xlen(key) == 0


# The command.


def test_the_command_prints_a_line_for_each(events: redis.Redis) -> None:
    session = new_session(user=4)
    stdout = io.StringIO()
    call_command("sessionevents", once=True, stdout=stdout)
    (line,) = stdout.getvalue().splitlines()
    printed = json.loads(line)
    assert (printed["kind"], printed["session_id"]) == ("created", public_id(session))
    assert (printed["user_id"], printed["user_tag"]) == ("4", user_tag(4).hex())
    assert printed["time"].endswith("+00:00")
    assert (printed["reason"], printed["replaced_by"]) == (None, None)
    assert session.session_key not in line


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"handler": "tests.nowhere.at_all"}, "--handler: .*nowhere"),
        ({"handler": "tests.store.test_events.LEASE_S"}, "LEASE_S cannot be called"),
        ({"lease": 0}, "1 second at least"),
    ],
)
def test_wrong_options_are_told(kept: None, options: Any, error: str) -> None:
    with pytest.raises(CommandError, match=error):
        call_command("sessionevents", once=True, **options)


def test_without_events_there_is_nothing_to_work_on(store: redis.Redis) -> None:
    with pytest.raises(CommandError, match="CLUSTERED_SESSIONS_EVENTS_KEPT is 0"):
        call_command("sessionevents", once=True)


def test_a_failure_shows_in_the_exit_code(events: redis.Redis, proxy: CountingProxy) -> None:
    new_session()
    with pytest.raises(CommandError, match="1 events could not be handled"):
        call_command("sessionevents", once=True, handler="tests.store.test_events.fail")
    proxy.refuse()
    proxy.cut()
    with pytest.raises(CommandError, match="the session store does not answer"):
        call_command("sessionevents", once=True)


def fail(event: Event) -> None:
    """Handle nothing."""
    raise RuntimeError(event.kind)


# On a cluster.


@pytest.fixture(scope="module")
def servers(store_server: StoreServer) -> Iterator[ClusterServers]:
    with ClusterServers(binary=store_server.binary) as started:
        yield started


@pytest.mark.full
def test_cluster_tells_of_each_event_once(
    servers: ClusterServers, settings: Any, kept: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers.flush()
    servers.use(settings)
    sessions = [new_session(user=number) for number in range(30)]
    ids = [[public_id(session)] for session in sessions]
    for session, its in zip(sessions, ids, strict=True):
        session.cycle_key()
        its.append(public_id(session))
    for session in sessions[:10]:
        session.flush()
    for session in sessions[10:20]:
        session.set_expiry(1)
        session.save()
    for session in sessions[10:20]:
        wait_for(
            lambda one=session: not one.exists(one.session_key), "it expires", timeout_s=WAIT_S
        )
    found = handled()
    assert told(found) == {
        **{("created", first, None): 1 for first, _ in ids},
        **{("ended", first, "replaced"): 1 for first, _ in ids},
        **{("ended", second, "logout"): 1 for _, second in ids[:10]},
        **{("expired", second, None): 1 for _, second in ids[10:20]},
    }
    replaced = {event.session_id: event for event in found if event.reason == "replaced"}
    assert {first: replaced[first].replaced_by for first, _ in ids} == dict(ids)
    assert [replaced[first].user_id for first, _ in ids] == [str(n) for n in range(30)]
    assert handled() == []


@pytest.mark.full
def test_copy_that_is_taken_back_was_never_there(
    servers: ClusterServers, settings: Any, kept: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writes between the two steps of a rotation, so there is a second copy."""
    servers.flush()
    servers.use(settings)
    session = new_session(user=1)
    first = public_id(session)
    session = SessionStore(session.session_key)
    session.load()
    other, is_first, leave = SessionStore(session.session_key), [True], records.leave

    def meddle(*arguments: Any) -> Call:
        if is_first.pop() if is_first else False:
            other["n"] = 1
            other.save()
        return leave(*arguments)

    monkeypatch.setattr(records, "leave", meddle)
    session.cycle_key()
    assert not is_first
    assert told(handled()) == {("created", first, None): 1, ("ended", first, "replaced"): 1}


# The documentation.


def test_page_says_what_an_event_has_and_how_many_are_kept() -> None:
    text = page("events.md")
    table = text.partition("\n| field | |\n")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [
        field.name for field in dataclasses.fields(Event)
    ]
    for kept, each, all_ in (
        (100_000, "142", "145 408"),
        (1_000_000, "1106", "1 132 544"),
    ):
        assert kept_per_bucket(kept) == int(each)
        assert int(each) * 1024 == int(all_.replace(" ", ""))
        assert re.search(rf"`{kept:_}`\s+(?:that is )?{each}, or {all_}", text)
    for number in (sessionevents.SWEEP_S, LEASE_S):
        assert f"{number:.0f} seconds" in text
