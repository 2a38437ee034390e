"""The store's side of locking: who gets a lock, in which order, and for how long."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import redis
from django.contrib.sessions.backends.base import UpdateError

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionLockLost, SessionLockTimeout
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.monitoring.held_locks import HeldLock, collect_locks
from django_clustered_sessions.protocol import locks
from django_clustered_sessions.protocol.commands import lock_queue
from django_clustered_sessions.protocol.effects import Wait
from django_clustered_sessions.protocol.locks import LockOutcome, LockRequest
from django_clustered_sessions.protocol.options import LockOptions
from django_clustered_sessions.protocol.record import EndReason
from django_clustered_sessions.protocol.results import Gone, Held, Taken
from django_clustered_sessions.protocol.scripts import script
from django_clustered_sessions.session import leases
from django_clustered_sessions.session.background import Worlds
from django_clustered_sessions.store import connections, drivers
from django_clustered_sessions.store.drivers import Budget
from tests.children import forked
from tests.conftest import DATABASE, use_store
from tests.gateways import load_scripts, place
from tests.locking import (
    BOUND_S,
    ELSEWHERE,
    Threads,
    ask,
    claim,
    free,
    lease_end_ms,
    new_session,
    new_token,
    now_ms,
    outcome,
    owner,
    queue,
    seize,
    wait_for_queue,
    wait_for_sleepers,
)
from tests.servers import CountingProxy, StoreServer, wait_for

pytestmark = pytest.mark.each_server


@pytest.fixture(autouse=True)
def patience(settings: Any) -> None:
    """Let a slow machine take its time: nothing here is to end by a bound."""
    # Not the 15 s of all tests: whose turn went unheard asks again after half of it.
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 5.0
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = BOUND_S
    settings.CLUSTERED_SESSIONS_LOCK_MAX_WAITERS = 128


def append(key: str, value: Any) -> None:
    """Append to the session's list under its lock."""
    session = SessionStore(key)
    with session.lock():
        session["order"] = [*session.get("order", []), value]


async def aappend(key: str, value: Any) -> None:
    session = SessionStore(key)
    async with session.alock():
        await session.aset("order", [*await session.aget("order", []), value])


def stored(key: str) -> dict[str, Any]:
    return SessionStore(key).load()


# Whose turn it is.


def test_free_lock_is_taken_at_once_and_leaves_nothing_behind(store: redis.Redis) -> None:
    key = new_session()
    with SessionStore(key).lock():
        (holder,) = queue(store, key)
        assert holder.token == owner(store, key)
        assert store.keys("*:locks") == []
    assert owner(store, key) == ""
    assert store.keys("*:locks") == []


def test_lock_goes_to_who_came_first(store: redis.Redis, threads: Threads) -> None:
    key = new_session()
    token = seize(key)
    waiting = []
    for number in range(6):
        waiting.append(threads.start(append, key, number))
        wait_for_queue(store, key, number + 1)
    wait_for_sleepers(store, 6)
    free(key, token)
    for future in waiting:
        outcome(future)
    assert stored(key)["order"] == [0, 1, 2, 3, 4, 5]
    assert store.keys("*:locks") == []
    assert owner(store, key) == ""


async def test_lock_goes_to_who_came_first_asynchronously(store: redis.Redis) -> None:
    key = await asyncio.to_thread(new_session)
    token = seize(key)
    tasks = []
    for number in range(6):
        tasks.append(asyncio.create_task(aappend(key, number)))
        await asyncio.to_thread(wait_for_queue, store, key, number + 1)
    free(key, token)
    await asyncio.wait_for(asyncio.gather(*tasks), BOUND_S)
    assert (await SessionStore(key).aload())["order"] == [0, 1, 2, 3, 4, 5]
    assert store.keys("*:locks") == []


def test_newcomer_cannot_overtake_one_who_has_not_woken_up_yet(store: redis.Redis) -> None:
    key, first, newcomer = new_session(), new_token(), new_token()
    token = seize(key)
    assert claim(key, first).queue_position == 1
    free(key, token)
    assert owner(store, key) == first
    assert store.lrange(place(key).mailbox(token), 0, -1) == [b"1"]
    found = claim(key, newcomer)
    assert isinstance(found, Held)
    assert (found.queue_position, found.holder) == (1, ELSEWHERE)
    assert isinstance(claim(key, first), Taken)
    free(key, first)
    assert isinstance(claim(key, newcomer), Taken)


def test_asking_again_keeps_the_place(store: redis.Redis) -> None:
    key, first, second = new_session(), new_token(), new_token()
    seize(key)
    assert [claim(key, token).queue_position for token in (first, second, first)] == [1, 2, 1]


def test_one_whose_patience_is_over_is_skipped(store: redis.Redis) -> None:
    key, late, next_one = new_session(), new_token(), new_token()
    token = seize(key)
    found = claim(key, late, wait_ms=20)
    claim(key, next_one)
    wait_for(lambda: now_ms(store) > found.now_ms + 20, "its patience to end")
    free(key, token)
    assert owner(store, key) == next_one


def test_one_who_gave_up_leaves_the_queue(
    store: redis.Redis, settings: Any, threads: Threads
) -> None:
    key, next_one = new_session(), new_token()
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 0.2
    token = seize(key)
    given_up = threads.start(append, key, 1)
    with pytest.raises(SessionLockTimeout, match=r"node-b GET /slow/<int:pk>/"):
        outcome(given_up)
    assert [entry.token for entry in queue(store, key)] == [token]
    claim(key, next_one)
    free(key, token)
    assert owner(store, key) == next_one


def test_one_that_gives_up_wakes_the_one_behind_it(store: redis.Redis) -> None:
    key, first, second = new_session(), new_token(), new_token()
    token = seize(key)
    assert claim(key, first).before == token
    assert claim(key, second).before == first
    free(key, first)
    assert store.lrange(place(key).mailbox(first), 0, -1) == [b"1"]
    assert claim(key, second).before == token


def test_one_who_gave_up_when_its_turn_came_hands_on(store: redis.Redis) -> None:
    key, first, second = new_session(), new_token(), new_token()
    token = seize(key)
    claim(key, first), claim(key, second)
    free(key, token)
    assert owner(store, key) == first
    free(key, first)
    assert owner(store, key) == second
    assert store.lrange(place(key).mailbox(first), 0, -1) == [b"1"]


def test_dead_waiter_costs_no_more_than_the_claim_lease(
    store: redis.Redis, threads: Threads
) -> None:
    key, dead = new_session(), new_token()
    token = seize(key)
    claim(key, dead)
    living = threads.start(append, key, "living")
    wait_for_queue(store, key, 2)
    free(key, token)
    assert owner(store, key) == dead
    assert 0 < lease_end_ms(store, key) - now_ms(store) <= lock_queue.CLAIM_MS
    # Nobody reads its mailbox, which goes by itself.
    assert 0 < store.pttl(place(key).mailbox(token)) <= lock_queue.CLAIM_MS
    outcome(living)
    assert stored(key)["order"] == ["living"]
    assert isinstance(claim(key, dead), Taken)


def test_no_more_than_so_many_wait_and_writers_are_not_counted(store: redis.Redis) -> None:
    key, one, two, writer = (new_session(), *(new_token() for _ in range(3)))
    seize(key)
    assert claim(key, one, most=1).queue_position == 1
    refused = claim(key, two, most=1)
    assert isinstance(refused, Held)
    assert (refused.queue_position, refused.waiting, refused.holder) == (0, 1, ELSEWHERE)
    # One who does not count against the caps has a place in the same queue.
    assert claim(key, writer, most=-1).queue_position == 2
    assert claim(key, one, most=1).queue_position == 1
    assert [entry.token for entry in queue(store, key)][1:] == [one, writer]


# Doubt.


def asking(token: str, *, slice_ms: float = 60_000, wait_ms: int = 60_000) -> LockRequest:
    terms = LockOptions(wait_ms, 60_000, 120_000, 16, b"here")
    return LockRequest(token, terms, slice_ms, lambda: None, nullcontext)


def step(flow: Any, reply: Any = None) -> Any:
    """Send a reply; return what the flow asks next, or what it returns."""
    try:
        return flow.send(reply)
    except StopIteration as stop:
        return stop.value


def test_wake_up_that_was_lost_costs_one_question(store: redis.Redis) -> None:
    key, mine = new_session(), new_token()
    token = seize(key)
    flow = locks.take(place(key), asking(mine))
    trip = step(flow)
    sleep = step(flow, [ask(*trip)])
    assert isinstance(sleep, Wait)
    free(key, token)
    assert store.delete(*sleep.mailboxes) == 1
    trip = step(flow, False)
    turn, _ = step(flow, [ask(*trip)])
    assert isinstance(turn, LockOutcome) and isinstance(turn.found, Taken)
    assert owner(store, key) == mine


def test_one_behind_a_dead_waiter_asks_before_its_turn_is_over(store: redis.Redis) -> None:
    """Nobody pushes into a dead one's mailbox, and the lock goes on over its head."""
    key, dead, mine = new_session(), new_token(), new_token()
    seize(key)
    claim(key, dead)
    flow = locks.take(place(key), asking(mine))
    sleep = step(flow, [ask(*step(flow))])
    assert isinstance(sleep, Wait)
    assert sleep.mailboxes[0] == place(key).mailbox(dead)
    assert sleep.seconds * 1000 < lock_queue.CLAIM_MS


def test_one_behind_a_waiter_whose_wait_is_over_gets_its_turn(
    store: redis.Redis, settings: Any, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder pushes into its own mailbox, at which the one that is skipped was to wake up."""
    # Nothing else is to wake it up in time.
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 10 * BOUND_S
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 5 * BOUND_S
    monkeypatch.setattr(lock_queue, "CLAIM_MS", round(10_000 * BOUND_S))
    key, late = new_session(), new_token()
    token = seize(key)
    found = claim(key, late, wait_ms=500)
    waiting = threads.start(append, key, 1)
    # Not until two wait: on a machine that stands still, the first one's wait is over by then.
    wait_for_sleepers(store, 1)
    wait_for(lambda: now_ms(store) > found.now_ms + 500, "its wait to end")
    free(key, token)
    outcome(waiting)
    assert stored(key)["order"] == [1]


def test_wait_ends_with_its_bound_and_no_place_is_left(store: redis.Redis) -> None:
    key, mine = new_session(), new_token()
    token = seize(key)
    flow = locks.take(place(key), asking(mine, wait_ms=1000, slice_ms=400))
    request, naps = step(flow), []
    with pytest.raises(SessionLockTimeout, match=r"waited 1\.0 s in vain"):
        while True:
            if isinstance(request, Wait):
                naps.append(round(request.seconds, 3))
                request = step(flow, False)
            else:
                request = step(flow, [ask(*request)])
    # By what was slept: the store's clock has hardly moved, or a failover has set it back.
    assert naps[0] == 0.4
    assert sum(naps) <= 1.0
    assert [entry.token for entry in queue(store, key)] == [token]


def test_sleep_that_failed_does_not_count_as_slept(store: redis.Redis) -> None:
    key, mine = new_session(), new_token()
    token = seize(key)
    flow = locks.take(place(key), asking(mine, wait_ms=60_000, slice_ms=20_000))
    request = step(flow)
    for _ in range(10):
        sleep = step(flow, [ask(*request)])
        assert isinstance(sleep, Wait)
        request = step(flow, None)
    free(key, token)
    turn, _ = step(flow, [ask(*request)])
    assert isinstance(turn.found, Taken)


def test_waiter_whose_wake_up_is_cut_off_asks_once(
    proxy: CountingProxy, store: redis.Redis, settings: Any, threads: Threads
) -> None:
    # One slice of sleep lasts half of this.
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 2 * BOUND_S
    load_scripts(store)
    key = new_session()
    token = seize(key)
    proxy.reset()
    proxy.cut_next("reply", matching=b"BLPOP")
    waiting = threads.start(append, key, 1)
    wait_for_sleepers(store, 1)
    free(key, token)
    outcome(waiting)
    questions = [one for one in proxy.requests if script("acquire").sha in one]
    assert len(questions) == 2
    assert stored(key)["order"] == [1]


def break_off(store: redis.Redis, how: str) -> None:
    """Make the one blocking read fail."""
    (sleeper,) = wait_for_sleepers(store, 1)
    if how == "unblock":
        store.client_unblock(int(sleeper["id"]), error=True)
    else:
        store.client_kill_filter(_id=sleeper["id"])


def sleeps(proxy: CountingProxy) -> int:
    return sum(b"BLPOP" in one for one in list(proxy.requests))


@pytest.mark.parametrize("how", ["unblock", "kill"])
def test_blocking_read_that_fails_is_survived(
    proxy: CountingProxy, store: redis.Redis, threads: Threads, how: str
) -> None:
    key = new_session()
    token = seize(key)
    waiting = threads.start(append, key, 1)
    break_off(store, how)
    wait_for(lambda: sleeps(proxy) >= 2, "the next blocking read")
    assert len(queue(store, key)) == 2
    free(key, token)
    outcome(waiting)
    assert stored(key)["order"] == [1]


@pytest.mark.parametrize("how", ["unblock", "kill"])
async def test_blocking_read_that_fails_is_survived_asynchronously(
    proxy: CountingProxy, store: redis.Redis, how: str
) -> None:
    key = await asyncio.to_thread(new_session)
    token = seize(key)
    waiting = asyncio.create_task(aappend(key, 1))
    await asyncio.to_thread(break_off, store, how)
    await asyncio.to_thread(wait_for, lambda: sleeps(proxy) >= 2, "the next blocking read")
    free(key, token)
    await asyncio.wait_for(waiting, BOUND_S)
    assert (await SessionStore(key).aload())["order"] == [1]


async def test_asynchronous_waiter_does_not_block_the_loop(store: redis.Redis) -> None:
    key, other = await asyncio.to_thread(new_session), await asyncio.to_thread(new_session)
    token = seize(key)
    waiting = asyncio.create_task(aappend(key, 1))
    async with asyncio.timeout(BOUND_S):
        while len(queue(store, key)) < 2:
            await asyncio.sleep(0)
    await aappend(other, 2)
    assert not waiting.done()
    assert (await SessionStore(other).aload())["order"] == [2]
    free(key, token)
    await asyncio.wait_for(waiting, BOUND_S)


def test_those_who_wait_starve_nobody_who_works(
    store: redis.Redis, store_server: StoreServer, settings: Any, threads: Threads
) -> None:
    use_store(
        settings,
        f"{store_server.url}/{DATABASE}",
        CONNECTION_POOL_KWARGS={"max_connections": 4},
    )
    # All sleep until they are woken.
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 2 * BOUND_S
    key, other = new_session(), new_session()
    token = seize(key)
    waiting = []
    for number in range(5):
        waiting.append(threads.start(append, key, number))
        wait_for_queue(store, key, number + 1)
    wait_for_sleepers(store, 4)
    append(other, "works")
    assert stored(other)["order"] == ["works"]
    free(key, token)
    for future in waiting:
        outcome(future)
    # The fifth found no connection to sleep on, and asked every now and then instead.
    assert sorted(stored(key)["order"]) == [0, 1, 2, 3, 4]


async def test_those_who_await_starve_nobody_who_works(
    store: redis.Redis, store_server: StoreServer, settings: Any
) -> None:
    key, other = await asyncio.to_thread(new_session), await asyncio.to_thread(new_session)
    use_store(
        settings,
        f"{store_server.url}/{DATABASE}",
        CONNECTION_POOL_KWARGS={"max_connections": 4},
    )
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 2 * BOUND_S
    token = seize(key)
    waiting = []
    for number in range(4):
        waiting.append(asyncio.create_task(aappend(key, number)))
        await asyncio.to_thread(wait_for_sleepers, store, number + 1)
    await aappend(other, "works")
    free(key, token)
    await asyncio.wait_for(asyncio.gather(*waiting), BOUND_S)
    assert (await SessionStore(key).aload())["order"] == [0, 1, 2, 3]


# Leases.


def unrenewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process's holders silent, as one that is stopped is."""
    monkeypatch.setattr(leases.Renewer, "keep", lambda self, grant: None)


def test_silent_holder_loses_its_lock_to_whoever_waits(
    store: redis.Redis, settings: Any, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    unrenewed(monkeypatch)
    key = new_session(order=[])
    settings.CLUSTERED_SESSIONS_LOCK_LEASE = 0.3
    silent = SessionStore(key)
    with pytest.raises(SessionLockLost, match="nothing of this write has landed"), silent.lock():
        silent["order"] += ["silent"]
        silent["more"] = 1
        outcome(threads.start(append, key, "next"))
    assert stored(key) == {"order": ["next"]}
    assert not silent.is_locked


def test_lease_that_is_over_stays_the_holders_while_nobody_comes(
    store: redis.Redis, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    unrenewed(monkeypatch)
    key = new_session()
    settings.CLUSTERED_SESSIONS_LOCK_LEASE = 0.05
    session = SessionStore(key)
    with session.lock():
        session["n"] = 1
        wait_for(lambda: now_ms(store) > lease_end_ms(store, key) + 200, "the lease to end")
    assert stored(key) == {"n": 1}


# The store's clock is set back.

HOUR_MS = 3_600_000


def set_back(store: redis.Redis, key: str) -> None:
    """Let a session's lock be as if the store's clock had been an hour ahead until now."""
    packed = store.hget(place(key).record, "m:lock") or b""
    times = (int.from_bytes(packed[at : at + 6]) + HOUR_MS for at in (16, 22))
    moved = b"".join(time.to_bytes(6) for time in times)
    store.hset(place(key).record, "m:lock", packed[:16] + moved + packed[28:])


@pytest.mark.parametrize("asks", ["acquire", "save", "cycle_key", "waiting", "leave"])
def test_dead_holder_before_the_clock_was_set_back_is_over(
    store: redis.Redis, settings: Any, asks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = new_session(n=0)
    dead = seize(key)
    waiting = new_token()
    if asks == "waiting":
        assert isinstance(claim(key, waiting), Held)
    set_back(store, key)
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 0.5
    session = SessionStore(key)
    session["n"] = 1
    match asks:
        case "acquire":
            taken = claim(key, new_token())
            assert isinstance(taken, Taken) and taken.since_ms <= taken.now_ms
        case "save":
            session.save()
            assert owner(store, key) == ""
        case "cycle_key":
            session.cycle_key()
            assert owner(store, session.session_key or "") == ""
        case "waiting":
            assert isinstance(claim(key, waiting), Taken)
            assert lease_end_ms(store, key) < now_ms(store) + HOUR_MS
        case "leave":
            # As on a cluster, where the two keys may be on two servers.
            monkeypatch.setattr(connections, "is_cluster", lambda: True)
            session.cycle_key()
            assert SessionStore(session.session_key)["n"] == 1
    assert dead not in [locker.token for locker in queue(store, key)]


@pytest.mark.parametrize("renews", ["renew", "acquire"])
def test_living_holder_keeps_its_lock_when_the_clock_is_set_back(
    store: redis.Redis, renews: str
) -> None:
    key = new_session(n=0)
    mine = seize(key)
    set_back(store, key)
    if renews == "renew":
        left = lock_queue.parse_renew(ask(lock_queue.renew(place(key), mine, 8000, 120_000)))
        assert left is not None and 0 < left <= 8000
    else:
        assert isinstance(claim(key, mine, lease_ms=8000), Taken)
    assert lease_end_ms(store, key) <= now_ms(store) + 8000
    other = claim(key, new_token())
    assert isinstance(other, Held) and 0 < other.lease_left_ms <= 8000
    assert other.since_ms <= other.now_ms


def test_lock_of_before_the_clock_was_set_back_is_told_as_over(store: redis.Redis) -> None:
    key = new_session(n=0)
    seize(key)
    set_back(store, key)

    def told() -> Sequence[HeldLock]:
        return drivers.run(collect_locks("session"), connections.pool, Budget(5.0)).locks

    waits_until = (now_ms(store) + HOUR_MS).to_bytes(6)
    holder = store.hget(place(key).record, "m:lock")[:16] + bytes(12) + b"\1\0"
    waiter = b"w" * 16 + waits_until + bytes(6) + b"\1\0"
    store.hset(place(key).locks, place(key).id, holder)
    assert told() == []
    store.hset(place(key).locks, place(key).id, holder + waiter)
    (lock,) = told()
    assert lock.lease_end_ms <= now_ms(store)


def test_unlocked_write_ends_a_lock_whose_lease_is_over(
    store: redis.Redis, settings: Any, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    unrenewed(monkeypatch)
    key = new_session()
    settings.CLUSTERED_SESSIONS_LOCK_LEASE = 0.05
    session = SessionStore(key)

    def write() -> None:
        other = SessionStore(key)
        other["m"] = 1
        other.save()

    with pytest.raises(SessionLockLost), session.lock():
        session["n"] = 1
        outcome(threads.start(write))
    assert stored(key) == {"n": 0, "m": 1}


@pytest.mark.full
def test_renewer_keeps_a_living_holders_lock(
    store: redis.Redis, settings: Any, threads: Threads
) -> None:
    key = new_session(order=[])
    # A machine may stand still for some of it.
    settings.CLUSTERED_SESSIONS_LOCK_LEASE = 6.0
    session = SessionStore(key)
    with session.lock():
        mine, first_end_ms = owner(store, key), lease_end_ms(store, key)
        waiting = threads.start(append, key, "waiter")
        wait_for(lambda: now_ms(store) > first_end_ms + 500, "its first lease would be over")
        assert owner(store, key) == mine
        assert not waiting.done()
        session["order"] += ["holder"]
    outcome(waiting)
    assert stored(key)["order"] == ["holder", "waiter"]


@pytest.mark.full
async def test_renewer_keeps_a_living_holders_lock_asynchronously(
    store: redis.Redis, settings: Any
) -> None:
    key = await asyncio.to_thread(new_session, order=[])
    settings.CLUSTERED_SESSIONS_LOCK_LEASE = 6.0
    session = SessionStore(key)
    waiting = None
    started = asyncio.Event()

    async def wait() -> None:
        await asyncio.wait_for(started.wait(), BOUND_S)
        await aappend(key, "waiter")

    # Not a child of the holder, which would wait for itself.
    waiting = asyncio.create_task(wait())
    async with session.alock():
        mine, first_end_ms = owner(store, key), lease_end_ms(store, key)
        started.set()
        await asyncio.to_thread(
            wait_for, lambda: now_ms(store) > first_end_ms + 500, "its first lease would be over"
        )
        assert owner(store, key) == mine
        assert not waiting.done()
        (await session.aget("order")).append("holder")
    await asyncio.wait_for(waiting, BOUND_S)
    assert (await SessionStore(key).aload())["order"] == ["holder", "waiter"]


def test_renewer_stops_at_the_longest_hold(
    store: redis.Redis, settings: Any, threads: Threads, caplog: pytest.LogCaptureFixture
) -> None:
    key = new_session(order=[])
    settings.CLUSTERED_SESSIONS_LOCK_LEASE = 0.2
    settings.CLUSTERED_SESSIONS_LOCK_MAX_HOLD = 0.6
    session = SessionStore(key)
    with pytest.raises(SessionLockLost), session.lock():
        session["order"] += ["holder"]
        outcome(threads.start(append, key, "waiter"))
        wait_for(lambda: "LOCK_MAX_HOLD" in caplog.text or "lost its lock" in caplog.text, "a line")
    assert stored(key)["order"] == ["waiter"]


def test_lock_that_the_renewer_finds_lost_is_counted_once(
    store: redis.Redis,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    added: Counter[str] = Counter()
    monkeypatch.setattr(counters, "add", lambda **counts: added.update(counts))
    settings.CLUSTERED_SESSIONS_LOCK_LEASE = 0.2
    for has_changed in (True, False):
        key = new_session()
        session = SessionStore(key)
        with (
            pytest.raises(SessionLockLost) if has_changed else nullcontext(),
            session.lock(),
        ):
            if has_changed:
                session["n"] = 1
            free(key, owner(store, key))
            wait_for(lambda: "lost its lock" in caplog.text, "a line")
        caplog.clear()
        assert added.pop("locks_lost") == 1


def test_lock_given_up_during_its_renewal_hides_no_lost_one(
    store: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    renewer = leases.Renewer()
    for key in (new_session(), new_session()):
        token = seize(key)
        free(key, token)
        grant = leases.Grant(place(key), token, "here", 4000, 120_000)
        grant.renewed_at_s -= 2.0
        renewer.grants.add(grant)
    renewing = renewer.round()
    calls = next(renewing)
    first, second = sorted(renewer.grants, key=lambda one: one.keys.record != calls[0].keys[0])
    first.is_held = False
    with suppress(StopIteration):
        renewing.send([ask(call) for call in calls])
    (line,) = caplog.messages
    assert second.keys.id[:12] in line
    assert "lost its lock" in line


def test_lock_lost_while_this_process_stood_still_is_counted(
    store: redis.Redis, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases.Renewer, "keep", lambda self, grant: None)
    settings.CLUSTERED_SESSIONS_LOCK_LEASE = 0.2
    key, other = new_session(), new_token()
    session = SessionStore(key)
    before = counters.counts["locks_lost"]
    with session.lock():
        wait_for(lambda: isinstance(claim(key, other), Taken), "the lease is over")
        # Whose it is by this process's own clock is another moment.
        wait_for(lambda: not session.state.lock.grant.is_leased, "it is here too")
    assert counters.counts["locks_lost"] == before + 1
    assert owner(store, key) == other


def test_renewal_is_fenced(store: redis.Redis) -> None:
    key, stranger = new_session(), new_token()
    token = seize(key)
    before = store.hget(place(key).record, "m:lock")
    assert (
        lock_queue.parse_renew(ask(lock_queue.renew(place(key), stranger, 90_000, 120_000))) is None
    )
    assert store.hget(place(key).record, "m:lock") == before
    left_ms = lock_queue.parse_renew(ask(lock_queue.renew(place(key), token, 90_000, 120_000)))
    assert left_ms is not None and left_ms > 60_000
    assert lease_end_ms(store, key) > now_ms(store) + 60_000
    free(key, token)
    assert lock_queue.parse_renew(ask(lock_queue.renew(place(key), token, 90_000, 120_000))) is None
    assert owner(store, key) == ""


def renewers() -> set[threading.Thread]:
    return {one for one in threading.enumerate() if one.name == "session-lock-renewer"}


def test_renewer_starts_with_the_first_lock_and_is_the_only_one(
    store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "renewers", Worlds(leases.Renewer))
    # One of another test may end meanwhile.
    before = renewers()
    keys = [new_session() for _ in range(3)]
    stored(keys[0])
    SessionStore(keys[0]).save()
    assert renewers() <= before
    for key in keys:
        with SessionStore(key).lock():
            assert len(renewers() - before) == 1


def test_forked_child_has_no_locks_and_no_renewer(
    store: redis.Redis, settings: Any, threads: Threads
) -> None:
    key = new_session()
    session = SessionStore(key)

    def look() -> bytes:
        seen = b"held" if leases.holds(place(key)) else b"free"
        renewer = leases.renewers.here()
        return seen + b" %d %d" % (len(renewer.grants), renewer.is_running)

    with session.lock():
        assert forked(look) == b"free 0 0"
        assert leases.holds(place(key))
        session["n"] = 1
    assert stored(key) == {"n": 1}


# The fence.


def test_write_of_a_lock_that_was_lost_changes_not_one_byte(
    store: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    key = new_session()
    session = SessionStore(key)
    with pytest.raises(SessionLockLost), session.lock():
        session["n"] = 99
        session["more"] = "x"
        session.increment("hits")
        free(key, owner(store, key))
        token = seize(key)
        before = store.hgetall(place(key).record)
        caplog.clear()
    assert store.hgetall(place(key).record) == before
    assert owner(store, key) == token
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert "lease 8.0 s" in line
    assert re.search(r"held for \d+\.\d s", line)
    assert ELSEWHERE in line


def test_lost_lock_that_nobody_has_any_more_is_lost_all_the_same(store: redis.Redis) -> None:
    key = new_session()
    session = SessionStore(key)
    with pytest.raises(SessionLockLost), session.lock():
        session["n"] = 99
        free(key, owner(store, key))
        other = SessionStore(key)
        other["m"] = 1
        other.save()
    assert stored(key) == {"n": 0, "m": 1}


# Writers without a lock.


def test_unlocked_writer_waits_for_its_turn_and_then_merges(
    store: redis.Redis, settings: Any, threads: Threads
) -> None:
    # Its work is done already, so there is always room for it.
    settings.CLUSTERED_SESSIONS_LOCK_MAX_WAITERS = 0
    key = new_session(order=[])
    holder = SessionStore(key)

    def write() -> None:
        session = SessionStore(key)
        session["order"] += ["writer"]
        session["m"] = 1
        session.increment("hits", 2)
        session.save()

    with holder.lock():
        writing = threads.start(write)
        wait_for_queue(store, key, 1)
        assert stored(key) == {"order": []}
        holder["order"] += ["holder"]
        holder.increment("hits")
    outcome(writing)
    assert stored(key) == {"order": ["holder", "writer"], "m": 1, "hits": 3}
    assert owner(store, key) == ""
    assert store.keys("*:locks") == []


async def test_unlocked_writer_waits_for_its_turn_asynchronously(store: redis.Redis) -> None:
    key = await asyncio.to_thread(new_session)
    token = seize(key)

    async def write() -> None:
        session = SessionStore(key)
        await session.aset("m", 1)
        await session.aincrement("hits")
        await session.asave()

    writing = asyncio.create_task(write())
    await asyncio.to_thread(wait_for_queue, store, key, 1)
    assert not store.hexists(place(key).record, "d:m")
    free(key, token)
    await asyncio.wait_for(writing, BOUND_S)
    assert await SessionStore(key).aload() == {"n": 0, "m": 1, "hits": 1}
    assert owner(store, key) == ""


def test_unlocked_writer_keeps_its_place_among_those_who_lock(
    store: redis.Redis, threads: Threads
) -> None:
    key = new_session(order=[])
    token = seize(key)

    def write(value: str) -> None:
        session = SessionStore(key)
        session["order"] += [value]
        session.save()

    work = ((append, (key, "a")), (write, ("b",)), (append, (key, "c")), (write, ("d",)))
    started = []
    for number, (what, arguments) in enumerate(work, 1):
        started.append(threads.start(what, *arguments))
        wait_for_queue(store, key, number)
    free(key, token)
    for future in started:
        outcome(future)
    assert stored(key)["order"] == ["a", "b", "c", "d"]


def test_unlocked_writer_whose_wait_is_over_has_written_nothing(
    store: redis.Redis, settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 0.1
    key = new_session()
    token = seize(key)
    session = SessionStore(key)
    session["n"] = 1
    with pytest.raises(SessionLockTimeout):
        session.save()
    assert stored(key) == {"n": 0}
    assert [entry.token for entry in queue(store, key)] == [token]


def test_moving_a_session_that_another_holds_waits_for_its_turn(
    store: redis.Redis, threads: Threads
) -> None:
    key = new_session()
    token = seize(key)
    session = SessionStore(key)
    moving = threads.start(session.cycle_key)
    wait_for_queue(store, key, 1)
    assert session.session_key == key
    free(key, token)
    outcome(moving)
    assert session.session_key != key
    assert stored(session.session_key) == {"n": 0}
    assert owner(store, session.session_key) == ""
    assert store.keys("*:locks") == []


def test_renewing_never_waits(store: redis.Redis, settings: Any) -> None:
    key = new_session()
    token = seize(key)
    settings.SESSION_COOKIE_AGE = 5000
    record = place(key).record
    store.pexpire(record, 1000_000)
    SessionStore(key).save()
    assert store.ttl(record) > 4900
    assert [entry.token for entry in queue(store, key)] == [token]


# A session that ends or moves.


def test_ending_never_waits_and_the_holder_is_told(store: redis.Redis, threads: Threads) -> None:
    key = new_session()
    session = SessionStore(key)
    with pytest.raises(UpdateError), session.lock():
        session["n"] = 1
        outcome(threads.start(SessionStore(key).flush))
    assert stored(key) == {}
    assert store.keys("*:locks") == []


def test_waiters_for_a_session_that_ends_are_told_at_once(
    store: redis.Redis, settings: Any, threads: Threads
) -> None:
    # Who was not told would look again when its slice of sleep is over.
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 10 * BOUND_S
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 5 * BOUND_S
    key = new_session()
    seize(key)

    def write() -> None:
        session = SessionStore(key)
        session["m"] = 1
        session.save()

    def move() -> None:
        session = SessionStore(key)
        session.get("n")
        session.cycle_key()

    waiting = [
        threads.start(append, key, 1),
        threads.start(append, key, 2),
        threads.start(write),
        threads.start(move),
    ]
    wait_for_queue(store, key, 4)
    wait_for_sleepers(store, 4)
    SessionStore(key).flush()
    for future in waiting:
        with pytest.raises(UpdateError):
            outcome(future)
    assert stored(key) == {}
    assert store.keys("*:locks") == []


def test_waiters_for_a_session_that_moves_are_told_at_once(
    store: redis.Redis, settings: Any, threads: Threads
) -> None:
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 10 * BOUND_S
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 5 * BOUND_S
    settings.CLUSTERED_SESSIONS_LOCK_LEASE = 5 * BOUND_S
    key = new_session()
    session = SessionStore(key)
    with session.lock():
        waiting = threads.start(append, key, 1)
        wait_for_queue(store, key, 1)
        wait_for_sleepers(store, 1)
        session.cycle_key()
        with pytest.raises(UpdateError, match=EndReason.ROTATED):
            outcome(waiting)
        assert session.is_locked


def test_lock_follows_the_new_key(store: redis.Redis, threads: Threads) -> None:
    key = new_session(order=[])
    session = SessionStore(key)
    with session.lock():
        mine = owner(store, key)
        session.cycle_key()
        new_key = session.session_key or ""
        assert owner(store, new_key) == mine
        assert [entry.token for entry in queue(store, new_key)] == [mine]
        assert queue(store, key) == []
        assert leases.holds(place(new_key))
        waiting = threads.start(append, new_key, "waiter")
        wait_for_queue(store, new_key, 1)
        session["order"] += ["holder"]
    outcome(waiting)
    assert stored(new_key)["order"] == ["holder", "waiter"]
    assert store.keys("*:locks") == []


def test_lock_that_has_moved_is_renewed_under_the_new_key(
    store: redis.Redis, settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_LOCK_LEASE = 0.4
    key = new_session()
    session = SessionStore(key)
    with session.lock():
        session.cycle_key()
        new_key = session.session_key or ""
        first_end_ms = lease_end_ms(store, new_key)
        wait_for(lambda: lease_end_ms(store, new_key) > first_end_ms + 800, "two leases")


def test_moving_a_session_renews_no_lease(
    store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    unrenewed(monkeypatch)
    key = new_session()
    session = SessionStore(key)
    with session.lock():
        end_ms = lease_end_ms(store, key)
        session.cycle_key()
        assert lease_end_ms(store, session.session_key or "") == end_ms > 0


def test_session_whose_holder_is_silent_may_be_moved(store: redis.Redis) -> None:
    key = new_session()
    seize(key, lease_ms=10)
    wait_for(lambda: now_ms(store) > lease_end_ms(store, key), "the lease to end")
    session = SessionStore(key)
    session.cycle_key()
    assert owner(store, session.session_key or "") == ""
    assert store.keys("*:locks") == []


def test_there_is_no_lock_on_a_session_that_is_not_there(store: redis.Redis) -> None:
    assert isinstance(claim("x" * 32, new_token()), Gone)
    with pytest.raises(UpdateError), SessionStore("x" * 32).lock():
        pass
    assert store.keys("*") == []


def test_locks_whose_holders_died_are_forgotten(store: redis.Redis) -> None:
    token = seize(key := new_session())
    claim(key, new_token())
    assert 0 < store.pttl(place(key).locks) <= 2 * 120_000 + 60_000
    assert token == owner(store, key)


def test_a_wait_for_the_lock_is_no_offset_of_the_clock(store: redis.Redis) -> None:
    key = new_session()
    seize(key, lease_ms=4000)
    with SessionStore(key).lock():
        # It came back for the end of the lease, and half of that was counted.
        assert abs(counters.clock_offset_ms) < 1500
