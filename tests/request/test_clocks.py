"""Nodes whose clocks are an hour off, and in other time zones, on one store.

Every node is a process of its own, under libfaketime where its clock is wrong. What is compared is
always what the store says in the same moment: before and after the node was asked.

Run as a script, this file is such a node: it reads a line of JSON, does it, prints the answer.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from types import ModuleType
from typing import Any

import django
import pytest
import redis
from django.conf import settings as django_settings
from django.core.signals import setting_changed
from django.test import RequestFactory
from django.utils.timezone import make_naive

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.middleware import ClusteredSessionMiddleware
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol.record import Meta, SessionKeys
from tests import settings as test_settings
from tests.children import ROOT, bound
from tests.clocks import libfaketime
from tests.conftest import use_store
from tests.pairs import pairwise
from tests.servers import wait_for

# Wrong clocks need libfaketime, and four processes that take seconds to start. What they show holds
# because deadlines come from the store's clock, which tests of requests and of sessions show.
pytestmark = pytest.mark.full

HOUR_MS = 3_600_000
SPAN_S = 1000
AGE_S = 5000

#: How long an answer may take on a slow machine, in seconds.
PATIENCE_S = 60.0


# In the node.


def use(url: str, **changes: Any) -> None:
    """Work with another store, and with other settings."""
    use_store(django_settings, url)
    for name, value in changes.items():
        setattr(django_settings, name, value)
    for name in ("CACHES", *changes):
        setting_changed.send(None, setting=name, value=None, enter=True)


def clock() -> float:
    return time.time()


def expiry_of(kind: str, value: float | None) -> Any:
    """Return what a view gives to set_expiry(); dates in the form that USE_TZ asks for."""
    if kind == "timedelta":
        assert value is not None
        return timedelta(seconds=value)
    if kind == "datetime":
        assert value is not None
        date = datetime.fromtimestamp(value, UTC)
        return date if django_settings.USE_TZ else make_naive(date)
    return value


def make(kind: str, value: float | None, is_async: bool) -> str | None:
    """Make a session with that expiry."""
    session = SessionStore()

    async def amake() -> None:
        await session.aset("a", 1)
        if kind != "default":
            await session.aset_expiry(expiry_of(kind, value))
        await session.asave()

    if is_async:
        asyncio.run(amake())
    else:
        session["a"] = 1
        if kind != "default":
            session.set_expiry(expiry_of(kind, value))
        session.save()
    return session.session_key


def change(key: str, is_async: bool) -> None:
    """Change something else in a session."""
    session = SessionStore(key)

    async def achange() -> None:
        await session.aset("b", await session.aget("b", 0) + 1)
        await session.asave()

    if is_async:
        asyncio.run(achange())
    else:
        session["b"] = session.get("b", 0) + 1
        session.save()


def look(key: str, is_async: bool) -> Any:
    """Return age and date of a session's expiry, or None where there is no session."""
    session = SessionStore(key)

    async def alook() -> Any:
        if not await session.aload():
            return None
        return await session.aget_expiry_age(), await session.aget_expiry_date()

    if is_async:
        found = asyncio.run(alook())
    else:
        found = (session.get_expiry_age(), session.get_expiry_date()) if session.load() else None
    if found is None:
        return None
    age, date = found
    assert (date.tzinfo is not None) == django_settings.USE_TZ
    return age, date.timestamp() * 1000


def ends_at(key: str, is_async: bool) -> float | None:
    """Return when a session ends, or None where there is no session; no use of it."""
    session = SessionStore(key)
    end = asyncio.run(session.aexpires_at()) if is_async else session.expires_at()
    if end is None:
        return None
    assert end.tzinfo is not None
    return end.timestamp() * 1000


def request(key: str, does: str) -> Any:
    """Answer a request: the Max-Age of its cookie, or None where it sets none."""

    def view(request: Any) -> Any:
        if does == "read":
            request.session.get("a")
        elif does == "change":
            request.session["c"] = request.session.get("c", 0) + 1
        return django.http.HttpResponse()

    asked = RequestFactory().get("/")
    asked.COOKIES[django_settings.SESSION_COOKIE_NAME] = key
    response = ClusteredSessionMiddleware(view)(asked)
    assert response.status_code == 200
    cookie = response.cookies.get(django_settings.SESSION_COOKIE_NAME)
    assert cookie is None or cookie.value == key, "a cookie of another session, or none"
    return None if cookie is None else cookie["max-age"]


def offset_ms() -> int:
    return counters.clock_offset_ms


def main() -> None:
    """Be a node until nobody asks any more."""
    module: Any = ModuleType("node_settings")
    vars(module).update(vars(test_settings))
    vars(module).update(json.loads(sys.argv[1]))
    sys.modules["node_settings"] = module
    os.environ["DJANGO_SETTINGS_MODULE"] = "node_settings"
    django.setup()
    for line in sys.stdin:
        work, arguments, options = json.loads(line)
        print(json.dumps(globals()[work](*arguments, **options)), flush=True)


# In the test.


@dataclass
class Node:
    """A process that answers requests; its clock is ``offset_s`` seconds off."""

    name: str
    offset_s: int
    time_zone: str
    use_tz: bool
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        environ = dict(os.environ, TZ=self.time_zone)
        if self.offset_s:
            # Timeouts are no wrong clocks: the monotonic one stays as it is.
            environ |= {
                "LD_PRELOAD": str(libfaketime()),
                "FAKETIME": f"{self.offset_s:+d}s",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }
        own = {
            "USE_TZ": self.use_tz,
            "TIME_ZONE": self.time_zone,
            "CLUSTERED_SESSIONS_NODE_NAME": self.name,
            "SESSION_COOKIE_AGE": AGE_S,
        }
        self.process = subprocess.Popen(
            bound([sys.executable, "-W", "error", "-m", __name__, json.dumps(own)]),
            cwd=ROOT,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, work: Any, *arguments: Any, **options: Any) -> Any:
        """Let the node do it; its traceback is on stderr when it fails."""
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([work.__name__, arguments, options]), file=self.process.stdin, flush=True)
        # It answers with one line, so nothing is left of an answer before.
        assert select.select([self.process.stdout], [], [], PATIENCE_S)[0], f"{self.name} is silent"
        answer = self.process.stdout.readline()
        assert answer, f"node {self.name} failed"
        return json.loads(answer)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


NODES = (
    Node("ahead", 3600, "Pacific/Auckland", True),
    Node("behind", -3600, "America/Los_Angeles", False),
    Node("naive", 0, "Pacific/Auckland", False),
    Node("right", 0, "UTC", True),
)


@pytest.fixture(scope="module")
def running_nodes() -> Iterator[dict[str, Node]]:
    try:
        for node in NODES:
            node.start()
        yield {node.name: node for node in NODES}
    finally:
        for node in NODES:
            node.stop()


@pytest.fixture
def nodes(
    running_nodes: dict[str, Node], store: redis.Redis, settings: Any
) -> Iterator[dict[str, Node]]:
    tell(running_nodes, settings)
    yield running_nodes
    tell(running_nodes, settings)


def tell(nodes: dict[str, Node], settings: Any, **changes: Any) -> None:
    usual = {
        "SESSION_COOKIE_AGE": AGE_S,
        "SESSION_SAVE_EVERY_REQUEST": False,
        "CLUSTERED_SESSIONS_IDLE_TIMEOUT": None,
        "CLUSTERED_SESSIONS_ABSOLUTE_TIMEOUT": None,
    }
    for node in nodes.values():
        node.ask(use, settings.CACHES["sessions"]["LOCATION"], **(usual | changes))


MAKERS = [node.name for node in NODES]

#: Those whose clocks are wrong. The time zone is of no matter to a span.
WRONG = [node.name for node in NODES if node.offset_s]


def name_of(value: Any) -> str | None:
    """Return the name of a case's value."""
    if isinstance(value, bool):
        return "async" if value else "sync"
    return str(value[0]) if isinstance(value, tuple) else None


class Watch:
    """The store's times of one session, all in ms by its clock."""

    def __init__(self, store: redis.Redis, key: str) -> None:
        self.store = store
        self.record = SessionKeys.of("session", key).record

    @property
    def deadline_ms(self) -> int:
        return int(self.store.pexpiretime(self.record))

    @property
    def left_s(self) -> int:
        """Whole seconds that are left, the one that has begun included."""
        return math.ceil(self.store.pttl(self.record) / 1000)


def now_ms(store: redis.Redis) -> float:
    seconds, microseconds = store.time()
    return float(seconds * 1000 + microseconds / 1000)


def agreed(watch: Watch, nodes: dict[str, Node], key: str) -> None:
    """Hold that every node says what the store says."""
    for node in nodes.values():
        for is_async in (False, True):
            most = watch.left_s
            age, date_ms = node.ask(look, key, is_async)
            assert watch.left_s <= age <= most, node.name
            assert round(date_ms) == watch.deadline_ms, node.name


def test_clocks_of_nodes_are_wrong(nodes: dict[str, Node]) -> None:
    for node in nodes.values():
        before = time.time()
        told = node.ask(clock) - node.offset_s
        assert before - 0.1 <= told <= time.time() + 0.1


SPANS: list[tuple[str, float | None, int]] = [
    ("default", None, AGE_S),
    ("browser", 0, AGE_S),
    ("seconds", SPAN_S, SPAN_S),
    ("timedelta", SPAN_S, SPAN_S),
    ("none", None, AGE_S),
]


@pairwise(maker=WRONG, is_async=[False, True], span=SPANS, ids=name_of)
def test_span_lasts_as_long_by_the_stores_clock(
    store: redis.Redis,
    nodes: dict[str, Node],
    maker: str,
    is_async: bool,
    span: tuple[str, float | None, int],
) -> None:
    kind, value, span_s = span
    earliest = now_ms(store)
    key = nodes[maker].ask(make, kind, value, is_async)
    latest = now_ms(store)
    watch = Watch(store, key)
    # Rounded to whole ms on the way.
    assert earliest - 1 <= watch.deadline_ms - span_s * 1000 <= latest + 1
    agreed(watch, nodes, key)


@pairwise(maker=MAKERS, is_async=[False, True], minutes=[1, 61], ids=name_of)
def test_date_is_that_date_on_every_node(
    store: redis.Redis, nodes: dict[str, Node], maker: str, is_async: bool, minutes: int
) -> None:
    """Also one that the node which sets it takes for past, or for more than an hour away."""
    date = round(now_ms(store) / 1000) + minutes * 60
    key = nodes[maker].ask(make, "datetime", date, is_async)
    watch = Watch(store, key)
    assert watch.deadline_ms == date * 1000
    agreed(watch, nodes, key)


@pytest.mark.parametrize(
    ("maker", "kind"),
    [
        ("ahead", "datetime"),
        ("ahead", "timedelta"),
        ("behind", "datetime"),
        ("behind", "timedelta"),
        ("naive", "datetime"),
    ],
)
def test_absolute_expiry_moves_only_when_it_is_set(
    store: redis.Redis, nodes: dict[str, Node], settings: Any, maker: str, kind: str
) -> None:
    tell(nodes, settings, SESSION_SAVE_EVERY_REQUEST=True)
    value = SPAN_S if kind == "timedelta" else round(now_ms(store) / 1000) + SPAN_S
    key = nodes[maker].ask(make, kind, value, False)
    watch = Watch(store, key)
    deadline_ms = watch.deadline_ms
    for node in nodes.values():
        for does in ("nothing", "read", "change"):
            most = watch.left_s
            age = node.ask(request, key, does)
            assert watch.left_s <= age <= most, node.name
        for is_async in (False, True):
            node.ask(change, key, is_async)
        assert watch.deadline_ms == deadline_ms, node.name
    agreed(watch, nodes, key)


def test_every_node_renews_by_the_stores_clock(
    store: redis.Redis, nodes: dict[str, Node], settings: Any
) -> None:
    tell(nodes, settings, SESSION_SAVE_EVERY_REQUEST=True)
    spans = (("default", None, AGE_S), ("seconds", SPAN_S, SPAN_S))
    keys = [
        (maker.ask(make, kind, value, False), span_s, does)
        for maker in nodes.values()
        for (kind, value, span_s) in spans
        for does in ("nothing", "read", "change")
    ]
    for node in nodes.values():
        for key, span_s, does in keys:
            watch = Watch(store, key)
            wait_for(partial(renews, watch, node, key, span_s, does), f"{node.name} renews {does}")
    for key, _, _ in keys:
        agreed(watch=Watch(store, key), nodes=nodes, key=key)


def renews(watch: Watch, node: Node, key: str, span_s: int, does: str) -> bool:
    """Send a request; return whether it renewed the session, which it does once a second."""
    before_ms, least, earliest = watch.deadline_ms, watch.left_s, now_ms(watch.store)
    age = node.ask(request, key, does)
    latest = now_ms(watch.store)
    assert min(least, watch.left_s) <= age <= span_s
    if watch.deadline_ms == before_ms:
        assert before_ms > earliest - 1001 + span_s * 1000
        assert age <= math.ceil((before_ms - earliest) / 1000)
        return False
    assert earliest - 1 <= watch.deadline_ms - span_s * 1000 <= latest
    return True


@pytest.mark.parametrize("maker", WRONG)
def test_cookie_lasts_as_long_as_the_session(
    store: redis.Redis, nodes: dict[str, Node], maker: str
) -> None:
    """Also on a node that only changes something in a session that another one made."""
    date = round(now_ms(store) / 1000) + SPAN_S
    for kind, value in (("default", None), ("seconds", SPAN_S), ("datetime", date)):
        key = nodes[maker].ask(make, kind, value, False)
        watch = Watch(store, key)
        for node in nodes.values():
            assert node.ask(request, key, "read") is None, "nothing to say"
            most = max(watch.left_s, 0 if kind == "datetime" else int(value or AGE_S))
            age = node.ask(request, key, "change")
            assert watch.left_s <= age <= most
    key = nodes[maker].ask(make, "browser", 0, False)
    for node in nodes.values():
        assert node.ask(request, key, "change") == ""


def test_session_ends_for_all_nodes_when_the_store_says_so(
    store: redis.Redis, nodes: dict[str, Node]
) -> None:
    date = math.ceil(now_ms(store) / 1000) + 2
    left = {
        maker.ask(make, kind, date if kind == "datetime" else 1, is_async)
        for maker in nodes.values()
        for kind in ("seconds", "timedelta", "datetime")
        for is_async in (False, True)
    }

    def over(key: str) -> bool:
        record, answers = Watch(store, key).record, []
        for node in nodes.values():
            was_there = store.exists(record)
            found = node.ask(look, key, False)
            is_there = store.pttl(record) > 0
            assert found or not is_there, f"{node.name} ended it early"
            assert not found or was_there, f"{node.name} ended it late"
            answers.append(found)
        return not any(answers)

    def all_over() -> bool:
        left.difference_update(list(filter(over, left)))
        return not left

    wait_for(all_over, "the sessions expire")


def is_used_until(
    limit_ms: float, store: redis.Redis, node: Node, key: str, is_async: bool
) -> bool:
    """Use a session; hold that it is there until the limit, and not after. Return if it is."""
    earliest = now_ms(store)
    found = node.ask(look, key, is_async)
    assert found or now_ms(store) >= limit_ms, f"{node.name} ended it early"
    assert not found or earliest < limit_ms, f"{node.name} ended it late"
    return bool(found)


def test_idle_timeout_ends_what_is_not_used(
    store: redis.Redis, nodes: dict[str, Node], settings: Any
) -> None:
    tell(nodes, settings, CLUSTERED_SESSIONS_IDLE_TIMEOUT=4)
    keys = {name: node.ask(make, "default", None, False) for name, node in nodes.items()}
    for name, key in keys.items():
        watch = Watch(store, key)
        earliest = now_ms(store)
        assert nodes[name].ask(look, key, True)
        # A renewal is written once a second at most.
        assert earliest - 1001 <= watch.deadline_ms - 4000 <= now_ms(store)
    for is_async in (False, True):
        for node in nodes.values():
            for key in keys.values():
                # -2 where it has ended meanwhile.
                before_ms = Watch(store, key).deadline_ms
                told = node.ask(ends_at, key, is_async)
                after_ms = Watch(store, key).deadline_ms
                assert (round(told) == before_ms) if told else after_ms < 0, node.name
                assert after_ms in (before_ms, -2), "to ask is no use of it"
    wait_for(lambda: not store.exists(*(Watch(store, key).record for key in keys.values())), "end")
    for key in keys.values():
        assert [node.ask(look, key, False) for node in nodes.values()] == [None] * len(nodes)


@pytest.mark.parametrize("is_new", [False, True])
def test_absolute_timeout_ends_what_is_used(
    store: redis.Redis, nodes: dict[str, Node], settings: Any, is_new: bool
) -> None:
    """Also a session whose deadline is from before the timeout was set."""
    changes = {"CLUSTERED_SESSIONS_IDLE_TIMEOUT": 100}
    timeout = {"CLUSTERED_SESSIONS_ABSOLUTE_TIMEOUT": 3}
    tell(nodes, settings, **(changes | timeout if is_new else changes))
    limits: dict[str, int] = {}
    for node in nodes.values():
        key = node.ask(make, "default", None, False)
        meta = store.hget(Watch(store, key).record, "m:")
        assert meta is not None
        limits[key] = Meta.parse(meta).created_ms + 3000
    if not is_new:
        tell(nodes, settings, **(changes | timeout))
    for key, limit_ms in limits.items():
        for node in nodes.values():
            told = node.ask(ends_at, key, False)
            assert round(told) == limit_ms if told else now_ms(store) >= limit_ms, node.name

    def is_used() -> bool:
        used = [
            is_used_until(limit_ms, store, node, key, is_async)
            for node in nodes.values()
            for is_async in (False, True)
            for key, limit_ms in limits.items()
        ]
        return any(used)

    wait_for(lambda: not is_used(), "they end")


@pytest.mark.parametrize(
    ("maker", "kind"),
    [
        ("ahead", "seconds"),
        ("behind", "timedelta"),
        *((node.name, "datetime") for node in NODES),
    ],
)
def test_expiry_in_the_past_ends_a_session_at_once(
    store: redis.Redis, nodes: dict[str, Node], maker: str, kind: str
) -> None:
    value = -5 if kind != "datetime" else math.floor(now_ms(store) / 1000) - 5
    key = nodes[maker].ask(make, kind, value, False)
    assert [node.ask(look, key, False) for node in nodes.values()] == [None] * len(nodes)
    assert store.keys("*[^xs]") == []


def test_offset_of_each_node_is_measured_and_reported(
    store: redis.Redis, nodes: dict[str, Node]
) -> None:
    key = nodes["right"].ask(make, "default", None, False)
    bucket = SessionKeys.of("session", key).index.removesuffix(":index")

    def reported() -> dict[str, int]:
        for node in nodes.values():
            node.ask(request, key, "read")
        figures = store.hgetall(f"{bucket}:figures")
        return {name.decode(): int(line.split()[1]) for name, line in figures.items()}

    for node in nodes.values():
        node.ask(look, key, False)
        wrong_by = node.ask(offset_ms) - node.offset_s * 1000
        assert abs(wrong_by) < HOUR_MS / 60, node.name

    def all_known() -> bool:
        offsets = reported()
        return all(
            abs(offsets.get(node.name, HOUR_MS * 9) - node.offset_s * 1000) < HOUR_MS / 60
            for node in nodes.values()
        )

    wait_for(all_known, "each node has reported its offset")


if __name__ == "__main__":
    main()
