"""The history of the figures: what nodes tell of the past, and what becomes of it."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
from django.core.management import CommandError, call_command

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.monitoring import counters as counters_module
from django_clustered_sessions.monitoring import history
from django_clustered_sessions.monitoring.counters import KEPT, NAMES, Counters, Past, counters
from django_clustered_sessions.protocol.commands import records, script_calls, statistics
from django_clustered_sessions.protocol.commands.statistics import SLOT_MS, SLOTS
from django_clustered_sessions.protocol.record import SessionKeys
from django_clustered_sessions.store import connections, drivers, runner
from django_clustered_sessions.store.budget import Budget
from tests.servers import CountingProxy

pytestmark = pytest.mark.usefixtures("figures")


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(counters_module, "time", clock)
    return clock


def counted(past: Past) -> dict[str, int]:
    return {name: n for name, n in zip(KEPT, past.counts, strict=True) if n}


def tell(past: list[tuple[int, list[int]]], *, node: str = "web-1", bucket: str = "000") -> None:
    """Let a node tell of the past: how long ago, in ms, and the counts of KEPT."""

    def flow() -> Any:
        (reply,) = yield (
            statistics.stats(f"session:{{{bucket}}}", node, 0, [0] * len(NAMES), past),
        )
        return reply

    assert drivers.run(flow(), connections.pool, Budget(5.0))[0] == script_calls.Status.DONE


def now_ms(store: redis.Redis) -> int:
    seconds, microseconds = store.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


# What a process keeps until it tells.


def test_the_past_leaves_once_a_minute(clock: Clock) -> None:
    told = Counters()
    told.add(requests=3, loads=2, created=1)
    assert told.drain()
    assert told.drain_past() == ()
    clock.now_s += 30
    told.add(requests=4)
    assert told.drain()
    clock.now_s += 30
    (past,) = told.drain_past()
    assert (past.age_ms, counted(past)) == (60_000, {"requests": 7, "created": 1})
    assert told.drain_past() == ()


def test_at_the_end_of_a_process_all_of_it_leaves(clock: Clock) -> None:
    told = Counters()
    told.add(store_errors=1)
    told.drain(now=True)
    assert [counted(past) for past in told.drain_past(now=True)] == [{"store_errors": 1}]


def test_what_nobody_plots_is_no_past(clock: Clock) -> None:
    told = Counters()
    told.add(loads=1)
    told.drain()
    assert told.drain_past(now=True) == ()


def test_minutes_without_the_store_are_each_kept_once(clock: Clock) -> None:
    told = Counters()
    for minute in range(5):
        told.add(store_errors=minute + 1)
        counts, past = told.drain(), told.drain_past()
        told.put_back(counts)
        told.put_back_past(past)
        clock.now_s += 60
    assert told.drain()
    spans = told.drain_past()
    assert [(past.age_ms, counted(past)) for past in spans] == [
        ((5 - minute) * 60_000, {"store_errors": minute + 1}) for minute in range(5)
    ]


def test_days_without_the_store_leave_one_day(clock: Clock) -> None:
    told = Counters()
    for _ in range(25 * 60):
        told.add(store_errors=1)
        told.put_back(told.drain())
        told.put_back_past(told.drain_past())
        clock.now_s += 60
    spans = told.drain_past()
    # A request does not pay for all of them at once.
    assert len(spans) == 60
    told.put_back_past(spans)
    spans = told.drain_past(now=True)
    assert 23 * 60 <= len(spans) <= 24 * 60
    assert [past.age_ms for past in spans] == [60_000 * n for n in range(len(spans), 0, -1)]
    assert told.drain(now=True)[NAMES.index("store_errors")] == 25 * 60


# What the store makes of it.


def test_counts_go_to_the_slot_in_which_they_happened(store: redis.Redis) -> None:
    tell([(0, [5, 1]), (SLOT_MS, [7]), (2 * SLOT_MS, [9])])
    tell([(0, [1])], bucket="3ff")
    tell([(0, [100])], node="web-2 of two words", bucket="3ff")
    found = history.recent()
    sums = Counter({node: sum(values) for node, values in found.counted("requests").items()})
    assert sums == {"web-1": 22, "web-2 of two words": 100}
    assert sum(found.counted("lock_waits")["web-1"]) == 1
    mine = [row for row in found.rows if row.node == "web-1"]
    assert [row.requests for row in mine[:2]] == [9, 7]
    assert mine[1].start - mine[0].start == history.SLOT
    assert found.now - 4 * history.SLOT < mine[0].start <= found.now - 2 * history.SLOT


def test_history_is_bounded_by_a_day_and_goes_by_itself(store: redis.Redis) -> None:
    slot = now_ms(store) // SLOT_MS
    key = "session:{000}:history"
    old = {f"{slot - SLOTS - n} web-1": "1" for n in range(5)}
    store.hset(key, mapping=old | {f"{slot - SLOTS + 5} web-1": "1", "damaged": "1"})
    tell([((SLOTS + 1) * SLOT_MS, [1]), (0, [1])])
    left = sorted(int(name.split()[0]) for name in store.hkeys(key))
    assert left[0] == slot - SLOTS + 5
    assert len(left) == 2
    assert 0 < store.pttl(key) <= SLOTS * SLOT_MS
    rows = history.recent().rows
    assert len(rows) == 2


def test_without_a_past_no_history_is_touched(store: redis.Redis) -> None:
    tell([])
    assert store.keys("*history") == []


def test_a_process_tells_on_the_trip_of_its_figures(
    proxy: CountingProxy, store: redis.Redis, clock: Clock, settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_NODE_NAME = "web-1"
    session = SessionStore()
    session["n"] = 1
    session.save()
    assert store.keys("*history") == []
    counters.add(requests=5)
    clock.now_s += 61
    SessionStore(session.session_key).load()
    clock.now_s += 61
    proxy.reset()
    SessionStore(session.session_key).load()
    assert proxy.round_trips == 1
    assert len(store.keys("*history")) == 1
    assert {row.node: row.requests for row in history.recent().rows} == {"web-1": 5}
    assert sum(row.created for row in history.recent().rows) == 1


def test_a_lost_trip_loses_no_past(store: redis.Redis, clock: Clock) -> None:
    counters.add(requests=5)
    clock.now_s += 61
    counters.drain()
    counters.add(requests=1)
    clock.now_s += 61
    report = runner.Figures()
    assert report.board(records.exists(SessionKeys.of("session", "key"))) is not None
    report.lost()
    runner.report_the_rest()
    assert sum(row.requests for row in history.recent().rows) == 6


# What is made of it.


def test_an_empty_store_has_an_empty_history(store: redis.Redis) -> None:
    found = history.recent(1)
    assert (found.rows, found.nodes, len(found.starts)) == ([], [], 12)
    assert [level.sessions for level in found.levels] == [None] * 12 + [0]
    assert found.starts[-1] <= found.now < found.starts[-1] + history.SLOT
    assert found.levels[-1].at == found.now


@pytest.mark.parametrize("hours", [0, 25, -1])
def test_other_hours_are_refused(hours: int) -> None:
    with pytest.raises(ValueError, match="1 to 24 hours"):
        history.recent(hours)


async def test_twin_reads_the_same_history(store: redis.Redis) -> None:
    await SessionStore().asave()
    found = await history.arecent(2)
    assert (found.hours, found.levels[-1].sessions) == (2, 1)
    with pytest.raises(ValueError, match="1 to 24 hours"):
        await history.arecent(25)


def test_sessions_are_worked_out_backwards(store: redis.Redis) -> None:
    for _ in range(4):
        SessionStore().save()
    counters.clear()
    slot = now_ms(store) // SLOT_MS
    names = {name: place for place, name in enumerate(KEPT)}

    def line(**counts: int) -> str:
        numbers = [0] * len(KEPT)
        for name, count in counts.items():
            numbers[names[name]] = count
        return " ".join(map(str, numbers))

    store.hset("session:{001}:history", f"{slot - 5} web-1", line(created=10))
    store.hset("session:{001}:history", f"{slot - 4} web-1", line(created=2, ended=3))
    store.hset("session:{002}:history", f"{slot - 2} web-2", line(expired=6))
    store.hset("session:{002}:history", f"{slot - 1} web-2", line(created=1))
    found = history.recent(1)
    levels = {level.at: level.sessions for level in found.levels}

    def at(slot: int) -> int | None:
        return levels[datetime.fromtimestamp(slot * SLOT_MS / 1000, UTC)]

    assert at(slot) == 4
    assert at(slot - 1) == 3
    assert at(slot - 2) == 9
    assert at(slot - 3) == 9
    assert at(slot - 4) == 10
    assert at(slot - 5) == 0
    assert at(slot - 6) is None


def test_damaged_history_does_no_harm(store: redis.Redis) -> None:
    slot = now_ms(store) // SLOT_MS
    store.set("session:{000}:history", "a string")
    store.set("session:{000}:index", "a string")
    store.hset(
        "session:{001}:history",
        mapping={f"{slot} web-1": "no numbers", "x": "1", f"{slot} web-2": "5 1 20 7 1 0 0 99"},
    )
    (row,) = history.recent(1).rows
    assert (row.node, row.requests, row.store_errors) == ("web-2", 5, 7)


def test_history_only_reads_in_small_trips(proxy: CountingProxy, store: redis.Redis) -> None:
    history.recent()
    proxy.reset()
    store.config_resetstat()
    history.recent()
    used = set(store.info("commandstats"))
    assert used <= {f"cmdstat_{name}" for name in ("time", "hgetall", "zcount", "config|resetstat")}
    assert proxy.round_trips <= 17


# The command.


def printed(**options: Any) -> str:
    stdout = io.StringIO()
    call_command("sessionstats", stdout=stdout, **options)
    return stdout.getvalue()


def test_history_is_told_in_a_table_and_as_json(store: redis.Redis) -> None:
    SessionStore().save()
    counters.clear()
    tell([(0, [70, 3, 400, 2, 1])])
    tell([(0, [30, 0, 0, 0, 0])], node="web-2")
    table = printed(history=2)
    assert re.search(r"^\d\d:00 +1 +100 +1 +0 +0 +3 +2$", table, re.MULTILINE)
    assert re.search(r"^web-1 +70 +3 +0.4 s +2$", table, re.MULTILINE)
    assert max(map(len, table.splitlines())) <= 80
    found = json.loads(printed(history=2, format="json"))
    assert (found["format"], found["hours"], found["slot_ms"]) == (1, 2, SLOT_MS)
    assert found["sessions"][-1] == {"at_ms": found["time_ms"], "sessions": 1}
    assert [(row["node"], row["requests"]) for row in found["slots"]] == [
        ("web-1", 70),
        ("web-2", 30),
    ]
    assert timedelta(0) <= datetime.now(UTC) - datetime.fromtimestamp(
        found["slots"][0]["start_ms"] / 1000, UTC
    )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--history", "25"], "is not 1 to 24 hours"),
        (["--history", "0"], "is not 1 to 24 hours"),
        (["--history", "many"], "is not 1 to 24 hours"),
        (["--history", "--locks"], "not allowed with"),
        (["--history", "--top-users", "3"], "not with --top-users"),
        (["--locks", "--top-users", "3"], "not with --top-users"),
        (["--top-users", "0"], "is no number above 0"),
        (["--history", "--format", "prometheus"], "not with"),
        (["--locks", "--format", "prometheus"], "not with"),
        (["--watch", "1", "--format", "prometheus"], "not with"),
        (["--top-users", "1", "--format", "prometheus"], "not with"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], error: str) -> None:
    with pytest.raises(CommandError, match=error):
        call_command("sessionstats", *arguments)


def test_history_without_a_store_is_an_error() -> None:
    with pytest.raises(CommandError, match="refused"):
        printed(history=1)
