"""``manage.py sessionstats`` against a real store, and what each node reports to it."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from random import Random
from typing import Any

import pytest
import redis
from asgiref.sync import sync_to_async
from django.conf import settings as django_settings
from django.core.management import CommandError, call_command
from django.http import HttpResponse
from django.test import RequestFactory, override_settings
from django.urls import re_path
from rich.console import Console

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionLockTimeout
from django_clustered_sessions.middleware import ClusteredSessionMiddleware
from django_clustered_sessions.monitoring import json_document, server_info, tables
from django_clustered_sessions.monitoring import statistics as ours
from django_clustered_sessions.monitoring.counters import AGES, MAXIMA, NAMES, WAITS, Counters
from django_clustered_sessions.protocol.record import Locker, Meta, SessionKeys
from django_clustered_sessions.store import connections, drivers, runner
from django_clustered_sessions.store.budget import Budget
from tests.children import LIFE_S, line, python
from tests.conftest import use_store
from tests.locking import queue
from tests.pages import page, shape
from tests.servers import CountingProxy, StoreServer, wait_for
from tests.topologies import Replicated

#: The name of the lock that ``busy`` takes.
HOLDER = f"web-1 (pid {os.getpid()}, holder)"

#: What a child process runs: a script that finds the store in its environment.
CHILD = """
import os, sys
os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
from django.conf import settings
settings.CACHES["sessions"]["LOCATION"] = os.environ["STORE_URL"]
settings.CLUSTERED_SESSIONS_NODE_NAME = os.environ.get("NODE_NAME")
import django
django.setup()
"""
COMMAND = (
    CHILD
    + """
from django.core.management import execute_from_command_line
execute_from_command_line(["manage.py", "sessionstats", *sys.argv[1:]])
"""
)
NODE = (
    CHILD
    + """
from django_clustered_sessions.backend import SessionStore
for number in range(int(sys.argv[1])):
    session = SessionStore()
    session["a"], session["b"] = 1, 2
    session.save()
    session = SessionStore(session.session_key)
    session["a"] += 1
    session.save()
    if number % 2:
        session.flush()
"""
)


def stats(**options: Any) -> Any:
    return json.loads(printed(format="json", **options))


def printed(**options: Any) -> str:
    stdout = io.StringIO()
    call_command("sessionstats", stdout=stdout, **options)
    return stdout.getvalue()


def collect(sample: int | None = None) -> ours.Statistics:
    flow = ours.collect("session", time.time, sample=sample, random=Random(7))
    return drivers.run(flow, connections.pool, Budget(10))


def make(number: int, *, user: bool = False, age_s: int | None = None) -> list[SessionStore]:
    """Create sessions, each larger than the one before."""
    made = []
    for size in range(1, number + 1):
        session = SessionStore()
        session["cart"] = "x" * size
        if user:
            session["_auth_user_id"] = "1"
        if age_s:
            session.set_expiry(age_s)
        session.save()
        made.append(session)
    return made


def place(session: SessionStore) -> SessionKeys:
    assert session.session_key
    return SessionKeys.of("session", session.session_key)


def running(
    *args: str, code: str = COMMAND, env: Mapping[str, str] | None = None, **streams: int
) -> AbstractContextManager[subprocess.Popen[str]]:
    """Run ``code``, the command, in a process of its own."""
    location = django_settings.CACHES["sessions"]["LOCATION"]
    environment = os.environ | {"STORE_URL": location, "COLUMNS": "80"} | dict(env or {})
    return python("-c", code, *args, env=environment, **streams)


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """Give both ends of a terminal: the one to look at it, and a process's."""
    ours, theirs = pty.openpty()
    try:
        yield ours, theirs
    finally:
        os.close(ours)


def end(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """Wait until a process has ended with that code; return what it wrote."""
    written = process.communicate(timeout=LIFE_S)
    assert process.returncode == code, written
    return written


# Sessions.


def test_empty_store_has_no_figures(store: redis.Redis) -> None:
    found = stats()
    assert found["format"] == 1
    assert found["sessions"] == {"total": 0, "logged_in": 0, "anonymous": 0}
    assert found["measured"] == {"sessions": 0, "unreadable": 0, "exact": True}
    assert found["stored_bytes"] is None
    assert found["memory_bytes"] == {"record": None, "records": 0, "indexes": 0, "total": 0}
    assert set(found["counters"].values()) == {0}
    assert found["nodes"] == []
    assert "logged in  0" in printed()
    assert store.dbsize() == 0


def test_counts_are_exact(store: redis.Redis) -> None:
    make(20)
    make(10, user=True)
    ended, left, *_ = make(5, user=True)
    ended.flush()
    del left["_auth_user_id"]
    left.save()
    assert stats()["sessions"] == {"total": 34, "logged_in": 13, "anonymous": 21}


def test_expired_sessions_are_not_counted(store: redis.Redis) -> None:
    first, second = make(2)
    now_ms = int(time.time() * 1000)
    # Sessions leave the index some time after they have expired.
    for session, score in ((first, 1 - now_ms), (second, now_ms - 1)):
        store.zadd(place(session).index, {f"{place(session).id}expired": score})
    found = stats(exact=True)
    assert found["sessions"] == {"total": 2, "logged_in": 0, "anonymous": 2}
    assert found["measured"]["sessions"] == 2


def test_sizes_and_memory_are_those_of_all(store: redis.Redis) -> None:
    made = make(40) + make(30, user=True)
    records = [place(session).record for session in made]
    sizes = sorted(Meta.parse(store.hget(record, "m:")).size for record in records)
    memory = [store.memory_usage(record) for record in records]
    indexes = {place(session).index for session in made}
    found = stats(exact=True)
    assert found["measured"] == {"sessions": 70, "unreadable": 0, "exact": True}
    assert found["stored_bytes"] == {
        "min": sizes[0],
        "median": statistics.median_low(sizes),
        "p95": sizes[66],
        "max": sizes[-1],
        "mean": round(statistics.mean(sizes)),
    }
    assert found["memory_bytes"]["record"]["max"] == max(memory)
    assert found["memory_bytes"]["records"] == sum(memory)
    assert found["memory_bytes"]["indexes"] == sum(map(store.memory_usage, indexes))
    assert found["memory_bytes"]["total"] == (
        found["memory_bytes"]["records"] + found["memory_bytes"]["indexes"]
    )


def test_bucket_of_many_pages_is_read_to_its_end(store: redis.Redis) -> None:
    (session,) = make(1)
    record, index = store.hgetall(place(session).record), place(session).index
    deadline_ms = int(abs(store.zscore(index, place(session).id) or 0))
    for number in range(300):
        store.hset(f"{index.removesuffix('index')}{number}", mapping=record)
        store.zadd(index, {str(number): deadline_ms if number % 3 else -deadline_ms})
    found = stats(exact=True)
    assert found["sessions"] == {"total": 301, "logged_in": 200, "anonymous": 101}
    assert found["measured"]["sessions"] == 301


def test_time_left_is_told_in_classes(store: redis.Redis) -> None:
    for age_s in (50, 70, 590, 610, 7200, 1_000_000, 9_000_000):
        make(1, age_s=age_s)
    lives = {life["up_to_s"]: life["sessions"] for life in stats()["remaining_life"]}
    assert {up_to: count for up_to, count in lives.items() if count} == {
        60: 1,
        600: 2,
        3600: 1,
        21_600: 1,
        1_209_600: 1,
        None: 1,
    }


def test_sample_stands_for_all(store: redis.Redis) -> None:
    make(60)
    make(40, user=True)
    found = stats(sample=25)
    assert found["sessions"]["total"] == 100
    assert found["measured"] == {"sessions": 25, "unreadable": 0, "exact": False}
    assert sum(life["sessions"] for life in found["remaining_life"]) == 25
    mean = found["memory_bytes"]["record"]["mean"]
    assert abs(found["memory_bytes"]["records"] - 100 * mean) <= 100
    assert "a sample of 25 sessions" in printed(sample=25)
    assert re.search(r"Size, of a sample of 1 session\b", printed(sample=1))


def test_sample_takes_no_session_twice_and_none_always(store: redis.Redis) -> None:
    made = make(50)
    # By its size one tells which session it is.
    for session in made[::2]:
        session["_auth_user_id"] = "1" * 60
        session.save()
        store.zadd(place(session).index, {f"{place(session).id}expired": 1})
    seen = collect(sample=49).sizes.seen
    assert (len(seen), seen.total()) == (49, 49)
    few = [next(iter(collect_one(seed).sizes.seen)) for seed in range(20)]
    assert len(set(few)) > 5


def collect_one(seed: int) -> ours.Statistics:
    flow = ours.collect("session", time.time, sample=1, random=Random(seed))
    return drivers.run(flow, connections.pool, Budget(10))


def test_sample_larger_than_the_store_is_exact(store: redis.Redis) -> None:
    make(3)
    assert stats(sample=3)["measured"]["exact"] is True


def test_damaged_records_are_told_apart(store: redis.Redis) -> None:
    damaged, newer, wrong_type, evicted, _ = map(place, make(5))
    store.hset(damaged.record, "m:", b"\x01too short")
    store.hset(newer.record, "m:", b"\x02" + bytes(31))
    store.delete(wrong_type.record, evicted.record)
    store.set(wrong_type.record, "a string")
    found = stats()
    assert found["sessions"]["total"] == 5
    assert found["measured"] == {"sessions": 1, "unreadable": 3, "exact": True}
    assert "(3 more cannot be read)" in printed()


def test_damaged_buckets_do_no_harm(store: redis.Redis) -> None:
    store.set("session:{000}:index", "a string")
    store.set("session:{000}:figures", "a string")
    store.hset("session:{001}:figures", mapping={"web-1": "not numbers", "web-2": "5 7 3"})
    make(1)
    found = stats(exact=True)
    assert found["counters"]["requests"] == 3


def test_other_prefixes_are_left_out(store: redis.Redis, settings: Any) -> None:
    make(2)
    settings.CLUSTERED_SESSIONS_KEY_PREFIX = "other"
    make(1)
    found = stats()
    assert (found["key_prefix"], found["sessions"]["total"]) == ("other", 1)


# Nodes.


def test_counters_of_processes_are_summed_for_each_node(store: redis.Redis) -> None:
    with ExitStack() as started:
        processes = [
            started.enter_context(running(number, code=NODE, env={"NODE_NAME": name}))
            for number, name in (("6", "web-1"), ("4", "web-1"), ("10", "web-2"))
        ]
        for process in processes:
            assert end(process) == ("", "")
    found = stats()
    assert found["sessions"]["total"] == 10
    nodes = {node["name"]: node for node in found["nodes"]}
    expected = {"created": 10, "loads": 10, "commits": 20, "fields_written": 30, "ended": 5}
    for node in nodes.values():
        assert {name: node["counters"][name] for name in expected} == expected
        assert node["counters"]["fields_held"] == 40
        assert abs(node["clock_offset_ms"]) < 1000
        assert 0 <= found["time_ms"] - node["reported_ms"] < 30_000
    assert sorted(nodes) == ["web-1", "web-2"]
    assert {name: found["counters"][name] for name in expected} == {
        name: 2 * count for name, count in expected.items()
    }
    table = printed()
    assert "Commits wrote 75% of the fields that they held." in table
    assert "former nodes" not in table


def test_figures_are_summed_over_buckets_and_nodes(store: redis.Redis) -> None:
    store.hset("session:{000}:figures", mapping={"web-1": "1000 -5 1 2", "": "900 0 10"})
    store.hset("session:{3ff}:figures", mapping={"web-1": "2000 3600000 3", "web-2": "500 7 100"})
    found = stats()
    one, two = found["nodes"]
    assert (one["name"], one["reported_ms"], one["clock_offset_ms"]) == ("web-1", 2000, 3_600_000)
    assert (one["counters"]["requests"], one["counters"]["loads"]) == (4, 2)
    assert (two["name"], two["counters"]["requests"]) == ("web-2", 100)
    assert found["former_nodes"]["counters"]["requests"] == 10
    assert found["counters"]["requests"] == 114
    assert list(found["counters"]) == list(NAMES)
    table = printed()
    assert re.search(r"web-1 +\d+ days ago +\+3,600 s +4 +2", table)
    assert re.search(r"former nodes +10 +0", table)


def test_age_of_a_nodes_counts_is_told(store: redis.Redis) -> None:
    reported_ms = store.time()[0] * 1000 - 90_000
    store.hset("session:{000}:figures", "web-1", f"{reported_ms} 0 1")
    found = stats()
    assert found["time_ms"] - found["nodes"][0]["reported_ms"] >= 90_000
    assert re.search(r"web-1 +1 min ago ", printed())


# Locks.


def report(**counts: int) -> str:
    """Return what a node has reported."""
    return " ".join(map(str, (1000, 0, *(counts.get(name, 0) for name in NAMES))))


def lockers(store: redis.Redis, session: SessionStore) -> list[Locker]:
    """Return who holds a session's lock, and who waits for it."""
    return queue(store, session.session_key or "")


class Urls:
    """A site of one view, as a request's urlconf."""

    urlpatterns = (re_path("^count/[a-z]+/$", lambda request: HttpResponse()),)


ROUTE = "POST /^count/[a-z]+/$"


@contextmanager
def busy(session: SessionStore, waiting: int = 0) -> Iterator[None]:
    """Hold a session's lock in another thread, and let so many requests wait for it in order.

    In the end each of them gets it.
    """
    held, done, statuses = threading.Event(), threading.Event(), []

    def hold() -> None:
        with SessionStore(session.session_key).lock():
            held.set()
            done.wait(LIFE_S)

    def view(request: Any) -> HttpResponse:
        request.session.increment("n")
        return HttpResponse()

    def ask() -> None:
        request = RequestFactory().post("/count/tea/")
        request.urlconf = Urls
        request.COOKIES["sessionid"] = session.session_key
        statuses.append(ClusteredSessionMiddleware(view)(request).status_code)

    threads = [threading.Thread(target=hold, name="holder")]
    threads += [threading.Thread(target=ask) for _ in range(waiting)]
    with redis.Redis.from_url(django_settings.CACHES["sessions"]["LOCATION"]) as store:
        for place_in_queue, thread in enumerate(threads):
            thread.start()
            wait_for(lambda at=place_in_queue: len(lockers(store, session)) == at + 1, "its place")
    assert held.wait(LIFE_S)
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join(LIFE_S)
    assert statuses == [200] * waiting


@pytest.fixture
def locking(settings: Any) -> Any:
    settings.CLUSTERED_SESSIONS_LOCKING = "write"
    settings.CLUSTERED_SESSIONS_LOCK_MAX_WAITERS = 80
    settings.CLUSTERED_SESSIONS_NODE_NAME = "web-1"
    return settings


@pytest.mark.usefixtures("figures")
def test_locks_are_counted(store: redis.Redis, locking: Any) -> None:
    (session,) = make(1)
    with busy(session, waiting=3):
        pass
    locking.CLUSTERED_SESSIONS_LOCK_WAIT = 0.05
    late = SessionStore(session.session_key)
    with busy(session), pytest.raises(SessionLockTimeout), late.lock():
        pass
    runner.report_the_rest()
    found = stats()
    (node,) = found["nodes"]
    assert node["counters"] == found["counters"]
    expected = {
        "locks_acquired": 5,
        "lock_waits": 3,
        "lock_handoffs": 3,
        "lock_timeouts": 1,
        "lock_refusals": 0,
        "locks_lost": 0,
        "writes_refused": 0,
    }
    assert {name: found["counters"][name] for name in expected} == expected
    assert sum(found["counters"][name] for name in WAITS.classes) == 3
    assert found["counters"]["lock_longest_hold_ms"] > 0
    waited = found["locks"]["waited_ms"]
    assert waited == node["locks"]["waited_ms"]
    assert waited["max"] == found["counters"]["lock_longest_wait_ms"]
    assert 0 < waited["p50"] <= waited["p95"] <= waited["p99"] <= waited["max"]
    table = printed()
    assert re.search(r"^web-1 +5 +3 +3 +1 +0 +0 +0$", table, re.MULTILINE)
    longest_ms = found["counters"]["lock_longest_hold_ms"]
    assert re.search(rf"^all( +\d+){{5}} +{longest_ms:,}$", table, re.MULTILINE)


def test_no_table_of_locks_without_locks(store: redis.Redis) -> None:
    # A line of a release that had no locks is shorter.
    store.hset("session:{000}:figures", mapping={"web-1": "1000 0 1 2 3 4 5 6 7 8 9 10 11"})
    found = stats()
    assert found["counters"]["store_errors"] == 11
    assert found["counters"]["locks_acquired"] == 0
    assert found["locks"] == {"waited_ms": None}
    assert "Locks" not in printed()


def test_maximum_counter_keeps_largest(store: redis.Redis) -> None:
    one, two = "session:{000}:figures", "session:{3ff}:figures"
    waits = {"lock_waits": 2, "lock_wait_ms": 50, "lock_waits_to_50_ms": 2}
    for figures, wait_ms, hold_ms in ((one, 40, 7), (two, 30, 900)):
        longest = {"lock_longest_wait_ms": wait_ms, "lock_longest_hold_ms": hold_ms}
        store.hset(figures, "web-1", report(**waits, **longest))
    store.hset(one, "web-2", report(lock_waits=1, lock_longest_wait_ms=10, lock_longest_hold_ms=8))
    store.hset(two, "", report(lock_longest_wait_ms=35, lock_longest_hold_ms=1000))
    found = stats()
    longest = {
        name: [part["counters"][name] for part in (*found["nodes"], found["former_nodes"], found)]
        for name in MAXIMA
        if name.startswith("lock_")
    }
    assert longest == {
        "lock_longest_wait_ms": [40, 10, 35, 40],
        "lock_longest_hold_ms": [900, 8, 1000, 1000],
    }
    assert found["counters"]["lock_waits"] == 5
    assert found["locks"]["waited_ms"] == {"p50": 40, "p95": 40, "p99": 40, "max": 40, "mean": 20}
    assert found["former_nodes"]["locks"]["waited_ms"] is None


def test_percentiles_of_waits_come_from_their_classes() -> None:
    def waits(longest_ms: int, **counts: int) -> list[int]:
        classes = {f"lock_waits_{name}_ms": count for name, count in counts.items()}
        found = json_document.waits(
            Counter(classes, lock_waits=100, lock_longest_wait_ms=longest_ms, lock_wait_ms=700)
        )
        assert found
        return list(found.values())

    assert waits(4900, to_1=50, to_5=45, to_100=4, to_5000=1) == [1, 5, 100, 4900, 7]
    assert waits(4900, to_1=49, to_5=45, to_100=4, to_5000=2) == [5, 100, 4900, 4900, 7]
    # Longer than the last class.
    assert waits(30_000, to_10000=90) == [10_000, 30_000, 30_000, 30_000, 7]
    assert json_document.waits(Counter()) is None


def test_percentiles_of_ages_come_from_their_classes() -> None:
    told = Counters()
    for age_ms in (*[0] * 49, 10, 11, *[240] * 47, 251, 480):
        told.measure(AGES, age_ms)
    assert json_document.ages(Counter(told.counts)) == {
        "p50": 10, "p95": 250, "p99": 480, "max": 480, "mean": 120
    }  # fmt: skip
    # A setting's largest age has a class, too.
    told.measure(AGES, 60_000)
    assert sum(told.counts[name] for name in AGES.classes) == told.counts["near_reads"] == 101
    assert json_document.ages(Counter()) is None


def test_holders_and_waiters_are_shown(store: redis.Redis, locking: Any) -> None:
    locking.CLUSTERED_SESSIONS_LOCK_LEASE = 4
    idle, brief, first, second = make(4)
    with busy(first), busy(second, waiting=2):
        # Once its lease was renewed.
        wait_for(lambda: store.hexists(place(first).locks, place(first).id), "a lock held for long")
        # Not renewed, and so not listed, however slow the machine is.
        locking.CLUSTERED_SESSIONS_LOCK_LEASE = 600
        with busy(brief):
            assert len(stats(locks=True)["held_locks"]) == 2
        found = stats(locks=True)
        table = printed(locks=True)
    assert list(found) == ["format", "time_ms", "key_prefix", "held_locks"]
    one, two = found["held_locks"]
    assert (one["session"], one["holder"]) == (place(first).id[:12], HOLDER)
    assert one["waiting"] == []
    assert two["session"] == place(second).id[:12]
    assert 0 < two["lease_left_ms"] <= 4000
    assert [(waiter["place"], waiter["name"]) for waiter in two["waiting"]] == [
        (1, f"web-1 {ROUTE}"),
        (2, f"web-1 {ROUTE}"),
    ]
    times = [one["since_ms"], two["since_ms"], *(w["since_ms"] for w in two["waiting"])]
    assert times == sorted(times)
    assert 0 <= found["time_ms"] - times[-1] < 10_000
    assert "Locks: 2 held, 2 waiting" in table
    number = r"\d+\.\d s"
    assert re.search(
        rf"^{place(second).id[:12]} +holds +{number} +{number} +{re.escape(HOLDER)} *\n"
        rf" +1 +{number} +web-1 {re.escape(ROUTE)} *\n"
        rf" +2 +{number} +web-1 {re.escape(ROUTE)} *$",
        table,
        re.MULTILINE,
    )
    assert place(idle).id[:12] not in table
    assert stats(locks=True)["held_locks"] == []
    assert "Locks: 0 held, 0 waiting" in printed(locks=True)


def test_leftovers_are_no_locks(store: redis.Redis, locking: Any) -> None:
    (session,) = make(1)
    at = place(session)

    def held() -> Any:
        return stats(locks=True)["held_locks"]

    with busy(session, waiting=1):
        lock, entries = store.hget(at.record, "m:lock"), store.hget(at.locks, at.id)
    token, since_and_name = lock[:16], lock[22:]
    now_ms = held_now_ms()
    over = token + (now_ms - 1).to_bytes(6) + since_and_name
    good = token + (now_ms + 60_000).to_bytes(6) + since_and_name
    first = entries[: 30 + len(HOLDER)]
    store.hset(at.locks, at.id, entries)
    # Nobody holds it.
    assert held() == []
    # Its lease is over, and somebody still waits for it; then nobody does.
    store.hset(at.record, "m:lock", over)
    ((waiter,),) = [one["waiting"] for one in held()]
    assert waiter["place"] == 1
    assert "over" in printed(locks=True)
    store.hset(at.locks, at.id, first)
    assert held() == []
    # The time of who waits is over.
    store.hset(at.record, "m:lock", good)
    dead = entries[len(first) :]
    store.hset(at.locks, at.id, first + dead[:16] + (now_ms - 1).to_bytes(6) + dead[22:])
    assert [one["waiting"] for one in held()] == [[]]
    # The lock has gone to the one who waited, between the two questions.
    store.hset(at.locks, at.id, dead + first)
    assert [(one["holder"], one["waiting"]) for one in held()] == [(HOLDER, [])]
    # Damage.
    store.hset(at.locks, at.id, b"short")
    assert held() == []
    store.hset(at.locks, at.id, entries)
    store.hset(at.record, "m:lock", b"short")
    assert held() == []
    store.delete(at.record)
    store.set(at.record, "a string")
    assert held() == []
    store.delete(at.locks)
    store.set(at.locks, "a string")
    assert held() == []


def held_now_ms() -> int:
    return int(stats(locks=True)["time_ms"])


def test_locks_only_read_in_small_trips(
    proxy: CountingProxy, store: redis.Redis, settings: Any
) -> None:
    made = make(150)
    lock = b"a" * 16 + (2**47).to_bytes(6) + (1000).to_bytes(6) + b"\1web-1"
    for at in map(place, made):
        store.hset(at.record, "m:lock", lock)
        store.hset(at.locks, at.id, b"a" * 16 + bytes(12) + b"\1\5web-1")
    before = {key: store.dump(key) for key in store.scan_iter()}
    stats(locks=True)
    proxy.reset()
    store.config_resetstat()
    assert len(stats(locks=True)["held_locks"]) == 150
    used = set(store.info("commandstats"))
    assert used <= {f"cmdstat_{name}" for name in ("time", "hkeys", "hget", "config|resetstat")}
    assert {key: store.dump(key) for key in store.scan_iter()} == before
    commands = [len(re.findall(rb"(?:^|\r\n)\*\d+\r\n", request)) for request in proxy.requests]
    assert max(commands) <= 129


@pytest.mark.full
def test_watch_shows_locks_as_they_come(store: redis.Redis, locking: Any) -> None:
    (session,) = make(1)
    with running("--locks", "--format", "json", "--watch", "0.05") as process:
        assert json.loads(line(process))["held_locks"] == []
        with busy(session):
            while not (found := json.loads(line(process))["held_locks"]):
                pass
        process.send_signal(signal.SIGINT)
        _, stderr = end(process)
    assert found[0]["session"] == place(session).id[:12]
    assert stderr == ""


@pytest.mark.full
def test_table_of_locks_fits_eighty_columns(store: redis.Redis) -> None:
    (session,) = make(1)
    at, name = place(session), b"web-1.eu.example.net POST /" + b"n" * 200
    store.hset(
        at.record, "m:lock", b"a" * 16 + (2**47).to_bytes(6) + (1).to_bytes(6) + b"\1" + name
    )
    store.hset(at.locks, at.id, b"a" * 16 + bytes(12) + b"\1" + bytes([len(name)]) + name)
    with running("--locks") as process:
        stdout, _ = end(process)
    assert max(map(len, stdout.splitlines())) <= 80
    assert "…" not in stdout
    assert stdout.count("n") >= 200
    assert at.id[:12] in stdout


# The store.


def test_facts_of_the_store_are_told(store: redis.Redis, store_server: StoreServer) -> None:
    found, info = stats()["store"], store.info()
    assert found["product"] == ("valkey" if "valkey_version" in info else "redis")
    assert found["version"] == info.get("valkey_version", info["redis_version"])
    assert (found["role"], found["replicas"]) == ("primary", 0)
    assert found["used_memory_bytes"] > 100_000
    assert (found["maxmemory_bytes"], found["eviction_policy"]) == (0, "noeviction")
    assert (found["appendonly"], found["save"]) == (False, "")


def test_replica_is_told_to_be_one(store_server: StoreServer, settings: Any) -> None:
    follow = ("--replicaof", f"127.0.0.1 {store_server.port}")
    with StoreServer(*follow, binary=store_server.binary) as replica:
        use_store(settings, f"{replica.url}/1")
        assert stats()["store"]["role"] == "replica"


def test_forbidden_commands_leave_gaps_only(store_server: StoreServer, settings: Any) -> None:
    with StoreServer(binary=store_server.binary) as server, server.client() as client:
        use_store(settings, f"{server.url}/1")
        make(3)
        client.execute_command("ACL SETUSER site on >secret ~* +@all -config -info -memory")
        use_store(settings, f"redis://site:secret@127.0.0.1:{server.port}/1")
        found = stats()
        table = printed()
    assert found["sessions"]["total"] == found["measured"]["sessions"] == 3
    assert found["memory_bytes"] == dict.fromkeys(("record", "records", "indexes", "total"))
    assert set(found["store"].values()) == {None}
    assert re.search(r"on disk +\?", table)


def documented_topology() -> Any:
    """Return the example with Sentinels of ``docs/sessionstats-json.md``."""
    found = re.findall(
        r'^(    "topology": \{\n.*?^    \}\n)',
        page("sessionstats-json.md"),
        re.DOTALL | re.MULTILINE,
    )
    (text,) = found
    return json.loads(f"{{{text}}}")["topology"]


@pytest.mark.full
def test_topology_with_sentinels_is_told(settings: Any) -> None:
    with Replicated(replicas=2, sentinels=3) as topology:
        topology.use(settings, 1)
        make(3)
        found, table = stats()["topology"], printed()
        replicas = {f"127.0.0.1:{replica.port}" for replica in topology.replicas}
        topology.sentinels[2].pause()
        try:
            silent = stats()["topology"]["sentinels"]
        finally:
            topology.sentinels[2].resume()
    assert shape(found) == shape(documented_topology())
    (primary,) = found["primaries"]
    assert primary["address"] == f"127.0.0.1:{topology.primary.port}"
    assert (primary["role"], primary["clock_ahead_ms"]) == ("primary", 0)
    assert {replica["address"] for replica in primary["replicas"]} == replicas
    for replica in primary["replicas"]:
        assert replica["state"] == "online"
        assert 0 <= replica["lag_bytes"] < 10_000
        assert abs(replica["clock_ahead_ms"]) <= replica["clock_error_ms"] + 1
    named = {"service": "main", "named": 3, "answering": 3, "known": 3, "quorum": 2}
    assert found["sentinels"] == named
    assert silent == named | {"answering": 2}
    assert max(map(len, table.splitlines())) <= 80
    assert re.search(r"  127.0.0.1:\d+ +replica +[\d,.]+ \w+, \d+ s +[+-]\d+ ms", table)
    assert "3 of the 3 in the entry answer" in " ".join(table.split())
    assert "if it becomes the primary" not in table


def test_clock_ahead_of_the_primary_is_warned_of(settings: Any) -> None:
    """The replica's host is three seconds ahead."""
    facts = server_info.StoreFacts(5000, 10, 2, {"role": "master"}, "")
    figures = ours.Statistics("session", facts, exact=True)
    replicas = [
        server_info.Replica("b", 1, "online", 0, 0, server_info.Clock(8000, -2990, 2)),
        server_info.Replica("c", 1, "online", 0, 0, server_info.Clock(5900, -890, 2)),
        server_info.Replica("d", 1, "online", 0, 0, server_info.Clock(8000, -2990, 2100)),
        server_info.Replica("e", 1, "wait_bgsave", 0, 0),
    ]
    figures.primaries = [
        server_info.Primary("a:1", "primary", facts.clock, replicas, [(0, 99), (200, 300)])
    ]
    assert list(json_document.clocks_apart(figures)) == [("b:1", 3000)]
    found = json_document.document(figures)["topology"]["primaries"][0]
    assert found["slots"] == [[0, 99], [200, 300]]
    assert [replica["clock_ahead_ms"] for replica in found["replicas"]] == [3000, 900, 3000, None]
    console = Console(width=80, file=io.StringIO())
    console.print(tables.topology(figures))
    text = console.file.getvalue()
    assert "The clock of b:1 is 3.0 s ahead of that of a:1" in " ".join(text.split())
    assert re.search(r"primary +\+0 ms +0-99\n +200-300", text)
    assert re.search(r"e:1 +replica: wait_bgsave +\? +\?", text)


def test_topology_that_is_not_told_leaves_gaps(store_server: StoreServer, settings: Any) -> None:
    with StoreServer(binary=store_server.binary) as server:
        server.client().execute_command("ACL SETUSER site on >secret ~* +@all -info")
        use_store(settings, f"redis://site:secret@127.0.0.1:{server.port}/1")
        (primary,) = stats()["topology"]["primaries"]
        assert (primary["role"], primary["replicas"]) == (None, None)
        assert re.search(r"replicas +\?", printed())
        use_store(settings, f"{server.unix_url}?db=1")
        (primary,) = stats()["topology"]["primaries"]
        assert primary["address"] == str(server.socket_path)


def test_statistics_only_read_in_small_trips(proxy: CountingProxy, store: redis.Redis) -> None:
    make(200)
    before = {key: store.dump(key) for key in store.scan_iter()}
    collect()
    proxy.reset()
    store.config_resetstat()
    collect()
    used = set(store.info("commandstats"))
    assert used <= {
        f"cmdstat_{name}"
        for name in (
            *("time", "info", "config|get", "memory|usage", "zcount", "hgetall", "zrange", "hget"),
            "config|resetstat",
        )
    }
    assert {key: store.dump(key) for key in store.scan_iter()} == before
    commands = [len(re.findall(rb"(?:^|\r\n)\*\d+\r\n", request)) for request in proxy.requests]
    assert max(commands) <= 256
    assert len(commands) > 10


def test_store_that_is_away_is_an_error() -> None:
    with pytest.raises(CommandError) as raised:
        printed()
    assert "refused" in str(raised.value)


@pytest.mark.full
def test_store_that_is_away_ends_the_shell_command() -> None:
    with running("--format", "json") as process:
        stdout, stderr = end(process, 1)
    assert stdout == ""
    assert re.fullmatch(r"CommandError: .*refused.*\n", stderr)


def test_missing_entry_is_an_error(settings: Any) -> None:
    settings.SESSION_CACHE_ALIAS = "default"
    with pytest.raises(CommandError, match="SESSION_CACHE_ALIAS"):
        printed()


@pytest.mark.parametrize("arguments", [["--watch", "0"], ["--sample", "-1"], ["--sample", "many"]])
def test_bad_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(CommandError, match="is no number above 0"):
        call_command("sessionstats", *arguments)


def test_sample_and_exact_exclude_each_other() -> None:
    with pytest.raises(CommandError, match="not allowed with"):
        call_command("sessionstats", "--sample", "5", "--exact")


# Output.


@pytest.mark.full
def test_table_fits_eighty_columns(store: redis.Redis) -> None:
    make(5)
    large = " ".join(["1000 3600000", *["999999999999"] * len(NAMES)])
    store.hset("session:{000}:figures", mapping={"web-1.eu.example.net": large})
    with running() as process:
        stdout, _ = end(process)
    assert max(map(len, stdout.splitlines())) <= 80
    assert "…" not in stdout
    assert re.search(r"\d+ days ago +\+3,600 s +1 T ", stdout)
    assert "1000 G" not in stdout


def test_only_json_on_stdout_and_a_bar_on_a_terminal(store: redis.Redis) -> None:
    make(5)
    with (
        terminal() as (screen, stderr),
        running("--format", "json", "--exact", stderr=stderr, env={"TERM": "xterm"}) as process,
    ):
        os.close(stderr)
        stdout, _ = end(process)
        assert b"measuring sessions" in os.read(screen, 65536)
    assert json.loads(stdout)["sessions"]["total"] == 5


@pytest.mark.full
def test_pipe_gets_no_bar(store: redis.Redis) -> None:
    make(5)
    with running("--exact", env={"FORCE_COLOR": "1"}) as process:
        stdout, stderr = end(process)
    assert stderr == ""
    assert "measuring sessions" not in stdout


def test_watch_prints_documents_until_ctrl_c(store: redis.Redis) -> None:
    make(1)
    with running("--format", "json", "--watch", "0.05") as process:
        first = json.loads(line(process))
        make(1)
        while (later := json.loads(line(process)))["sessions"]["total"] == 1:
            pass
        process.send_signal(signal.SIGINT)
        _, stderr = end(process)
    assert first["sessions"]["total"] == 1
    assert later["sessions"]["total"] == 2
    assert stderr == ""


@pytest.mark.full
def test_watch_in_a_terminal_leaves_the_last_state(store: redis.Redis) -> None:
    make(1)
    with (
        terminal() as (ours, stdout),
        running("--watch", "0.05", stdout=stdout, env={"TERM": "xterm"}) as process,
    ):
        os.close(stdout)
        shown = b""
        # The terminal of a process that has ended, or was killed, tells so by EIO.
        while shown.count(b"Time left") < 3:
            shown += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        with suppress(OSError):
            while more := os.read(ours, 65536):
                shown += more
        _, stderr = end(process)
    assert stderr == ""
    # Back from the alternate screen, and the last state stays.
    screen, _, after = shown.rpartition(b"\x1b[?1049l")
    assert screen
    assert not re.search(rb"\x1b\[(?:H|\?\w+)\r\n", shown)
    assert b"Time left" in after


@pytest.mark.full
def test_watch_stays_while_the_store_is_away(store: redis.Redis, proxy: CountingProxy) -> None:
    with running("--format", "json", "--watch", "0.05") as process:
        assert json.loads(line(process))
        proxy.refuse()
        assert process.stderr
        # The breaker's warning may come before it.
        said = iter(process.stderr.readline, "")
        assert any(re.match(r"no figures since \d\d:\d\d:\d\d: ", one) for one in said)
        proxy.accept()
        assert json.loads(line(process))
        process.send_signal(signal.SIGINT)
        _, stderr = end(process)
    assert "Traceback" not in stderr


def holder() -> str:
    """Return who holds the only lock, once the list has it."""
    wait_for(lambda: stats(locks=True)["held_locks"], "the lock to be listed")
    (one,) = stats(locks=True)["held_locks"]
    return str(one["holder"])


def test_lock_outside_of_a_request_is_named(store: redis.Redis, locking: Any) -> None:
    (session,) = make(1)

    with session.lock(name="nightly-invoice"):
        assert holder() == f"web-1 nightly-invoice (pid {os.getpid()}, MainThread)"
        with session.lock(name="inner"):
            assert "nightly-invoice" in holder()
        names: list[str] = []

        def wait() -> None:
            with pytest.raises(SessionLockTimeout) as caught:
                SessionStore(session.session_key).lock(name="in vain").__enter__()
            names.extend((caught.value.holder, str(caught.value)))

        settings = override_settings(CLUSTERED_SESSIONS_LOCK_WAIT=0.05)
        with settings, ThreadPoolExecutor(1, thread_name_prefix="worker") as threads:
            threads.submit(wait).result()
    assert "nightly-invoice" in names[0]
    assert f"held by web-1 nightly-invoice (pid {os.getpid()}, MainThread)" in names[1]
    with session.lock():
        assert holder() == f"web-1 (pid {os.getpid()}, MainThread)"
    with session.lock(name="ä\x1b[31m\n" + "n" * 300):
        assert holder() == f"web-1 ä [31m {'n' * 93} (pid {os.getpid()}, MainThread)"


def test_lock_in_a_request_is_named_behind_its_route(store: redis.Redis, locking: Any) -> None:
    (session,) = make(1)
    locking.CLUSTERED_SESSIONS_LOCKING = "off"
    holders: list[str] = []

    def view(request: Any) -> HttpResponse:
        with request.session.lock(name="reservation"):
            holders.append(holder())
        return HttpResponse()

    request = RequestFactory().post("/count/tea/")
    request.urlconf = Urls
    request.COOKIES["sessionid"] = session.session_key
    ClusteredSessionMiddleware(view)(request)
    assert holders == [f"web-1 {ROUTE} reservation"]


async def test_async_lock_is_named(store: redis.Redis, locking: Any) -> None:
    session = SessionStore()
    await session.aset("a", 1)
    await session.asave()
    async with session.alock(name="nightly-invoice"):
        found = await sync_to_async(holder)()
    assert found == f"web-1 nightly-invoice (pid {os.getpid()}, MainThread)"
