"""Figures of how sessions come and go: lifetimes, expiries, hops between nodes, users."""

from __future__ import annotations

import io
import json
import re
import tracemalloc
from random import Random
from typing import Any

import pytest
import redis
from django.core.management import call_command

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.monitoring import collect
from django_clustered_sessions.monitoring import statistics as ours
from django_clustered_sessions.monitoring.counters import MINIMA, NAMES, Counters, counters
from django_clustered_sessions.protocol.record import SessionKeys, session_id, user_tag
from django_clustered_sessions.store import connections, drivers, runner
from django_clustered_sessions.store.budget import PerTrip
from tests.servers import CountingProxy, wait_for

pytestmark = pytest.mark.usefixtures("figures")


def stats(**options: Any) -> Any:
    runner.report_the_rest()
    return json.loads(printed(format="json", **options))


def printed(**options: Any) -> str:
    stdout = io.StringIO()
    call_command("sessionstats", stdout=stdout, **options)
    return stdout.getvalue()


def counted(*names: str) -> list[int]:
    found = stats()["counters"]
    return [found[name] for name in names]


def new(**values: Any) -> SessionStore:
    session = SessionStore()
    session.update(values)
    session.save()
    return session


def place(session: SessionStore) -> SessionKeys:
    return SessionKeys.of("session", session.session_key or "")


# Lifetimes.


def test_lifetimes_of_ended_sessions_are_counted(store: redis.Redis) -> None:
    sessions = [new(n=n) for n in range(3)]
    begun = [registry.find(session_id(session.session_key or "")) for session in sessions]
    assert all(begun)
    assert stats()["lifetimes_ms"] is None

    def have_all_lived() -> bool:
        seconds, microseconds = store.time()
        now_ms = int(seconds) * 1000 + int(microseconds) // 1000
        last = max(entry.created.timestamp() for entry in begun if entry)
        return now_ms - last * 1000 >= 20

    wait_for(have_all_lived, "sessions that have lived for 20 ms")
    sessions[0].flush()
    SessionStore().delete(sessions[1].session_key)
    assert registry.end_session(session_id(sessions[2].session_key or ""))
    found = stats()
    lived = found["lifetimes_ms"]
    assert 20 <= lived["min"] <= lived["mean"] <= lived["max"] < 60_000
    assert found["counters"]["ended"] == found["counters"]["lifetimes"] == 3
    assert found["counters"]["lifetime_ms"] >= 3 * lived["min"]
    (node,) = found["nodes"]
    assert node["lifetimes_ms"] == lived


def test_session_that_was_ended_before_counts_once(store: redis.Redis) -> None:
    session = new(n=1)
    again = SessionStore(session.session_key)
    again.load()
    session.flush()
    again.flush()
    assert counted("ended", "lifetimes") == [1, 1]


def test_a_damaged_record_does_not_tell_how_long_it_lived(store: redis.Redis) -> None:
    session = new(n=1)
    store.hset(place(session).record, "m:", b"damaged")
    SessionStore().delete(session.session_key)
    assert counted("ended", "lifetimes") == [1, 0]
    assert stats()["lifetimes_ms"] is None


def test_the_shortest_and_the_longest_are_those_of_all(store: redis.Redis) -> None:
    def line(count: int, total: int, shortest: int, longest: int) -> str:
        known = {
            "lifetimes": count,
            "lifetime_ms": total,
            "lifetime_shortest_ms": shortest,
            "lifetime_longest_ms": longest,
        }
        return " ".join(map(str, (1000, 0, *(known.get(name, 0) for name in NAMES))))

    store.hset("session:{000}:figures", "web-1", line(2, 100, 30, 70))
    store.hset("session:{001}:figures", "web-1", line(1, 20, 20, 20))
    store.hset("session:{001}:figures", "web-2", line(0, 0, 0, 0))
    store.hset("session:{002}:figures", "", line(1, 900, 900, 900))
    found = stats()
    assert found["lifetimes_ms"] == {"min": 20, "mean": 255, "max": 900}
    assert [node["lifetimes_ms"] for node in found["nodes"]] == [
        {"min": 20, "mean": 40, "max": 70},
        None,
    ]
    assert found["former_nodes"]["lifetimes_ms"] == {"min": 900, "mean": 900, "max": 900}


def test_the_store_keeps_the_shortest(store: redis.Redis) -> None:
    for lifetimes in ([500, 300], [], [400], [0], [700]):
        counters.ended(lifetimes)
        runner.report_the_rest()
    found = stats()
    assert found["counters"]["lifetime_shortest_ms"] == 1
    assert found["lifetimes_ms"] == {"min": 1, "mean": 380, "max": 700}


def test_counts_that_come_back_keep_the_shortest() -> None:
    (minimum,) = MINIMA
    told = Counters()
    told.ended([500])
    counts = told.drain(now=True)
    told.ended([800])
    told.put_back(counts)
    told.ended([600])
    taken = dict(zip(NAMES, told.drain(now=True), strict=True))
    assert (taken[minimum], taken["lifetime_longest_ms"], taken["lifetime_ms"]) == (500, 800, 1900)


# Expiry.


def test_expired_session_is_counted_as_it_leaves_the_index(store: redis.Redis) -> None:
    anonymous, logged_in = new(n=1), new(_auth_user_id="1")
    one, two = place(anonymous), place(logged_in)
    for at in (one, two):
        for member, score in store.zrange(at.index, 0, -1, withscores=True):
            store.zadd(at.index, {member: 1 if score > 0 else -1})
        store.delete(at.record)
    assert counted("expired") == [0]
    # A new session in the same bucket.
    for at in (one, two):
        session = SessionStore()
        keys = (session.state.new_key().value for _ in range(100_000))
        key = next(key for key in keys if SessionKeys.of("session", key).index == at.index)
        session._session_key = key
        session.save(must_create=True)
    assert counted("expired", "created", "ended") == [2, 4, 0]
    assert store.zcount(one.index, -1, 1) + store.zcount(two.index, -1, 1) == 0


def test_a_session_that_is_written_as_expired_has_expired(store: redis.Redis) -> None:
    session = new(n=1)
    session.set_expiry(-1)
    session.save()
    late = SessionStore()
    late.set_expiry(-1)
    late.save()
    found = stats()
    assert found["sessions"]["total"] == 0
    assert [found["counters"][name] for name in ("created", "expired", "ended")] == [2, 2, 0]


def test_created_ended_and_expired_make_what_is_there(store: redis.Redis) -> None:
    random = Random(11)
    alive: list[SessionStore] = []
    for _ in range(150):
        match random.choice(["create", "create", "end", "rotate", "login", "expire"]):
            case "create":
                alive.append(new(n=1))
            case "end" if alive:
                alive.pop(random.randrange(len(alive))).flush()
            case "rotate" if alive:
                random.choice(alive).cycle_key()
            case "login" if alive:
                session = random.choice(alive)
                session["_auth_user_id"] = str(random.randrange(3))
                session.save()
            case "expire" if alive:
                session = alive.pop(random.randrange(len(alive)))
                session.set_expiry(-1)
                session.save()
    found = stats()
    counts = found["counters"]
    assert found["sessions"]["total"] == len(alive)
    assert counts["created"] - counts["ended"] - counts["expired"] == len(alive)
    assert min(counts[name] for name in ("created", "ended", "expired")) > 5


# Hops.


@pytest.fixture
def on(settings: Any) -> Any:
    """Return a function that lets what follows happen on another node."""

    def node(name: str) -> None:
        runner.report_the_rest()
        settings.CLUSTERED_SESSIONS_NODE_NAME = name

    return node


def write(session: SessionStore) -> None:
    later = SessionStore(session.session_key)
    later["n"] = later.get("n", 0) + 1
    later.save()


def hops() -> dict[str, int]:
    return {node["name"]: node["counters"]["node_hops"] for node in stats()["nodes"]}


def test_hop_is_a_write_on_another_node_than_before(store: redis.Redis, on: Any) -> None:
    on("web-1")
    session = new(n=1)
    write(session)
    on("web-2")
    SessionStore(session.session_key).load()
    write(session)
    write(session)
    on("web-1")
    write(session)
    on("web-3")
    new(n=1)
    assert hops() == {"web-1": 1, "web-2": 1, "web-3": 0}
    # A new key is no hop, and tells where it was made.
    on("web-3")
    moved = SessionStore(session.session_key)
    moved.cycle_key()
    write(moved)
    on("web-1")
    write(moved)
    assert hops() == {"web-1": 2, "web-2": 1, "web-3": 0}


def test_a_version_tells_a_node_and_is_still_new_each_time(store: redis.Redis, on: Any) -> None:
    on("web-1")
    versions = {store.hget(place(new(n=1)).record, "m:")[2:10] for _ in range(50)}
    assert len(versions) == 50
    assert len({version[:2] for version in versions}) == 1
    on("web-2")
    other = store.hget(place(new(n=1)).record, "m:")[2:10]
    assert other[:2] not in {version[:2] for version in versions}


# Users.


def test_users_with_most_sessions_are_counted(store: redis.Redis) -> None:
    for user, count in (("1", 5), ("2", 2), ("3", 2), ("4", 1)):
        for _ in range(count):
            new(_auth_user_id=user)
    new(n=1)
    assert stats()["users"] is None
    assert stats(top_users=3)["users"] == {"logged_in": 4, "most_sessions": [5, 2, 2]}
    assert stats(top_users=9)["users"] == {"logged_in": 4, "most_sessions": [5, 2, 2, 1]}
    assert "Users logged in: 4. Most sessions of a user: 5, 2." in printed(top_users=2)
    registry.end_sessions_of("1")
    assert stats(top_users=1)["users"] == {"logged_in": 3, "most_sessions": [2]}


def test_store_without_users_has_no_top(store: redis.Redis) -> None:
    assert stats(top_users=3)["users"] == {"logged_in": 0, "most_sessions": []}
    assert "Users logged in: 0. Most sessions of a user: -." in printed(top_users=3)


def test_users_are_numbers_only(store: redis.Redis) -> None:
    new(_auth_user_id="4711")
    told = json.dumps(stats(top_users=3)) + printed(top_users=3)
    assert "4711" not in told
    assert user_tag("4711").hex() not in told


def test_users_that_are_damaged_do_no_harm(store: redis.Redis) -> None:
    index = place(new(_auth_user_id="1")).index
    one, two, *_ = (tag for tag in ("{000}", "{001}", "{002}") if tag not in index)
    store.set(f"session:{one}:users", "a string")
    store.hset(f"session:{two}:users", mapping={b"12345678": b"many", b"short": b"7", b"": b"x"})
    assert stats(top_users=3)["users"] == {"logged_in": 1, "most_sessions": [1]}


@pytest.mark.full
def test_many_users_take_little_memory(proxy: CountingProxy, store: redis.Redis) -> None:
    """Thirty thousand, each in one bucket; one is in all of them."""
    with store.pipeline(transaction=False) as pipeline:
        for bucket in range(1024):
            users = {user_tag(f"{bucket}-{n}"): 1 for n in range(29)}
            pipeline.hset(f"session:{{{bucket:03x}}}:users", mapping=users | {user_tag("x"): 2})
        pipeline.execute()
    collect.figures(1, top_users=1)
    proxy.reset()
    tracemalloc.start()
    try:
        flow = ours.top_users_of("session", 2)
        found = drivers.run(flow, connections.pool, PerTrip(10))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == ours.Users(1024 * 29 + 1, [2048, 1])
    assert most < 4_000_000
    assert proxy.round_trips == 128


def test_table_of_lives_fits_eighty_columns(store: redis.Redis) -> None:
    new(n=1).flush()
    new(n=1)
    runner.report_the_rest()
    table = printed()
    # The session that has ended lived as long as this took.
    assert re.search(r"^all +2 +1 +0 +0( +\d+ s){3}$", table, re.MULTILINE)
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.usefixtures("figures")
def test_first_login_is_in_the_figures_at_once(store: redis.Redis) -> None:
    before = collect.figures().counts["created"]
    SessionStore().create()
    assert collect.figures().counts["created"] == before + 1
