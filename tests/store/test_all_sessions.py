"""All sessions: found by the start of an id, filtered as a stream, listed in pages, ended."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from io import StringIO
from secrets import token_bytes
from typing import Any

import pytest
import redis
from django.core.exceptions import SynchronousOnlyOperation
from django.core.management import call_command
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionIdAmbiguous
from django_clustered_sessions.protocol.record import SessionKeys, session_id
from django_clustered_sessions.registry import SessionInfo

NEVER = "A" * 43


def new(
    user: str | None = None, *, age_s: int | None = None, key: str | None = None
) -> SessionStore:
    session = SessionStore(key)
    if key is not None:
        # Before it is looked at: a key that the store does not know is not kept.
        session.save(must_create=True)
    session["x"] = 1
    if user is not None:
        session["_auth_user_id"] = user
    if age_s is not None:
        session.set_expiry(age_s)
    session.save()
    return session


def id_of(session: SessionStore) -> str:
    return session_id(session.session_key or "")


def ids(found: Any) -> list[str]:
    return [one.id for one in found]


def age(store: redis.Redis, public_id: str, **times: datetime) -> None:
    """Set ``created`` or ``seen`` of a record, as after days of use."""
    record = SessionKeys.of_id("session", public_id).record
    packed = store.hget(record, "m:")
    for name, at in times.items():
        start = {"created": 10, "seen": 32}[name]
        packed = packed[:start] + int(at.timestamp() * 1000).to_bytes(6) + packed[start + 6 :]
    store.hset(record, "m:", packed)


async def alisted(found: Any) -> list[SessionInfo]:
    return [one async for one in found]


Both = Callable[..., list[SessionInfo]]


@pytest.fixture(params=["sync", "async"])
def matching(request: pytest.FixtureRequest) -> Both:
    if request.param == "sync":
        return lambda **filters: list(registry.matching(**filters))
    return lambda **filters: asyncio.run(alisted(registry.amatching(**filters)))


@pytest.fixture(params=["sync", "async"])
def find(request: pytest.FixtureRequest) -> Callable[[str], SessionInfo | None]:
    if request.param == "sync":
        return registry.find
    return lambda start: asyncio.run(registry.afind(start))


def with_common_start(length: int) -> list[str]:
    """Return new ids of two sessions that begin alike, and of one that does not."""
    seen: dict[str, SessionStore] = {}
    while True:
        session = SessionStore(f"{len(seen):032x}")
        start = id_of(session)[:length]
        if start in seen:
            break
        seen[start] = session
    keys = [str(seen[start].session_key), str(session.session_key), "f" * 32]
    for key in keys:
        SessionStore(key).save(must_create=True)
    return [session_id(key) for key in keys]


def test_session_is_found_by_the_start_of_its_id(store: Any, find: Any) -> None:
    public_id = id_of(new("1"))
    new("2")
    for length in (4, 12, 42, 43):
        assert find(public_id[:length]).id == public_id
    assert find(NEVER[:12]) is None
    assert find(NEVER) is None


def test_start_that_several_ids_have_lists_them(store: Any, find: Any) -> None:
    first, second, other = with_common_start(4)
    with pytest.raises(SessionIdAmbiguous) as caught:
        find(first[:4])
    assert set(caught.value.ids) == {first, second}
    assert "2 sessions have ids that begin with" in str(caught.value)
    assert first[:12] in str(caught.value)
    assert second[:12] in str(caught.value)
    assert find(first[:12]).id == first
    assert find(other[:4]).id == other


@pytest.mark.parametrize("start", ["", "abc", "abc*", "ab/d", "a" * 44, "abcd\n", "*" * 43])
def test_what_no_id_begins_with_is_refused(store: Any, find: Any, start: str) -> None:
    with pytest.raises(ValueError, match="public id"):
        find(start)


def test_ended_session_is_not_found_by_its_start(store: Any, find: Any) -> None:
    public_id = id_of(new())
    registry.end_session(public_id)
    assert find(public_id[:12]) is None


def test_all_sessions_match_no_filter(store: Any, matching: Both) -> None:
    made = {id_of(new(user)): user for user in ("1", "2", None)}
    assert {one.id: one.user_id for one in matching()} == made


def test_filters_choose_sessions(store: redis.Redis, matching: Both, settings: Any) -> None:
    now = datetime.now(UTC)
    old, idle, fresh = (id_of(new("1")) for _ in range(3))
    other = id_of(new())
    age(store, old, created=now - timedelta(days=40))
    age(store, idle, created=now - timedelta(days=2), seen=now - timedelta(days=1))
    assert set(ids(matching(user=1))) == {old, idle, fresh}
    assert ids(matching(created_before=now - timedelta(days=30))) == [old]
    assert ids(matching(idle_since=now - timedelta(hours=1))) == [idle]
    both = {"user": "1", "created_before": now - timedelta(days=1)}
    assert set(ids(matching(**both))) == {old, idle}
    assert matching(user="2") == []
    assert set(ids(matching(idle_since=now + timedelta(hours=1)))) == {old, idle, fresh, other}


def test_naive_time_is_local(store: Any, matching: Both) -> None:
    new()
    local = datetime.now()  # noqa: DTZ005
    assert matching(created_before=local - timedelta(minutes=1)) == []
    assert len(matching(created_before=local + timedelta(minutes=1))) == 1


def test_sessions_are_found_by_address(store: redis.Redis, matching: Both, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_TRACK_CLIENTS = True
    here, there, nowhere = (id_of(new()) for _ in range(3))
    for public_id, first, last in (
        (here, b'["10.0.0.7","a"]', b'["2001:db8::1","a"]'),
        (there, b'["192.0.2.1","a"]', b'["not an address","a"]'),
    ):
        record = SessionKeys.of_id("session", public_id).record
        store.hset(record, mapping={b"m:first": first, b"m:last": last})
    assert ids(matching(address="10.0.0.7")) == [here]
    assert ids(matching(address="10.0.0.0/8")) == [here]
    assert ids(matching(address="2001:db8::/32")) == [here]
    assert ids(matching(address="192.0.2.1")) == [there]
    assert set(ids(matching(address="0.0.0.0/0"))) == {here, there}
    assert nowhere


@pytest.mark.parametrize("function", [registry.matching, registry.amatching])
def test_filter_that_cannot_be_used_is_refused_at_once(
    store: Any, settings: Any, function: Any
) -> None:
    with pytest.raises(ValueError, match="TRACK_CLIENTS is off"):
        function(address="10.0.0.7")
    settings.CLUSTERED_SESSIONS_TRACK_CLIENTS = True
    with pytest.raises(ValueError, match="does not appear to be an IPv4 or IPv6"):
        function(address="here")
    with pytest.raises(TypeError):
        function(place="10.0.0.7")


def test_sync_matching_on_an_event_loop_is_refused(store: Any) -> None:
    async def on_the_loop() -> None:
        with pytest.raises(SynchronousOnlyOperation):
            list(registry.matching())

    asyncio.run(on_the_loop())


def test_progress_is_told_up_to_the_number_of_sessions(store: Any, matching: Both) -> None:
    for _ in range(5):
        new()
    told: list[tuple[int, int]] = []
    matching(progress=lambda *figures: told.append(figures))
    assert told[-1] == (5, 5)


def test_broken_index_of_a_bucket_hides_no_other(store: redis.Redis, matching: Both) -> None:
    # Of 1,024 pairs of random keys one is in the same bucket.
    first, second = id_of(new("1", key="0" * 32)), id_of(new(key="f" * 32))
    index = SessionKeys.of_id("session", first).index
    store.delete(index)
    store.set(index, "damaged")
    assert ids(matching()) == [second]
    assert ids(registry.page(9).sessions) == [second]
    foreign = SessionKeys.of_id("session", second).index
    store.zadd(foreign, {"what is this": 1, "another": 9e12})
    assert ids(matching()) == [second]
    assert ids(registry.page(9).sessions) == [second]


def pages_of(count: int, **filters: Any) -> list[list[str]]:
    found, after = [], None
    while True:
        page = registry.page(count, after=after, **filters)
        assert page == asyncio.run(registry.apage(count, after=after, **filters))
        found.append(ids(page.sessions))
        after = page.after
        if after is None:
            return found


def test_pages_are_in_order_and_complete(store: Any) -> None:
    by_age = [id_of(new(user, age_s=1000 + n)) for n, user in enumerate(["1", None] * 4)]
    wanted = by_age[::-1]
    assert pages_of(3) == [wanted[:3], wanted[3:6], wanted[6:]]
    assert pages_of(4) == [wanted[:4], wanted[4:]]
    assert pages_of(20) == [wanted]
    assert pages_of(3, user=1) == [wanted[1::2][:3], wanted[1::2][3:]]


def test_no_session_is_lost_among_equal_deadlines(store: redis.Redis) -> None:
    at_ms = 10**13
    in_one_bucket = SessionKeys.of("session", f"{0:032x}").index
    wanted = set()
    for n in range(40_000):
        keys = SessionKeys.of("session", f"{n:032x}")
        if keys.index == in_one_bucket:
            SessionStore(f"{n:032x}").save(must_create=True)
            wanted.add(keys.id)
    for number, member in enumerate(store.zrange(in_one_bucket, 0, -1)):
        store.zrem(in_one_bucket, member)
        has_user = number % 2
        store.zadd(in_one_bucket, {member + b"8 letter" * has_user: at_ms * (has_user or -1)})
    assert len(wanted) > 20
    listed = [one for page in pages_of(19) for one in page]
    assert len(listed) == len(set(listed))
    assert set(listed) == wanted


@pytest.mark.parametrize(
    "after",
    [
        "",
        "1",
        "1.",
        "1.2.",
        *(f"{one}{NEVER}" for one in ("x.2.", "-1.2.", "1.", "1.2.A", "1.x.", "1.1024.")),
    ],
)
def test_place_that_is_none_is_refused(store: Any, after: str) -> None:
    with pytest.raises(ValueError, match="no place"):
        registry.page(3, after=after)


def test_current_session_is_marked_on_a_page(store: Any) -> None:
    mine, other = new(), new()
    page = registry.page(9, current=mine)
    assert {one.id: one.is_current for one in page.sessions} == {
        id_of(mine): True,
        id_of(other): False,
    }


@pytest.mark.parametrize("is_async", [False, True])
def test_chosen_sessions_end_and_no_others(store: Any, is_async: bool) -> None:
    first, second, kept = (id_of(new("1")) for _ in range(3))
    gone = [first, second, NEVER]
    ended = asyncio.run(registry.aend_sessions(gone)) if is_async else registry.end_sessions(gone)
    assert ended == 2
    assert ids(registry.matching()) == [kept]


def test_invalid_id_among_chosen_ones_ends_nothing(store: Any) -> None:
    public_id = id_of(new())
    with pytest.raises(ValueError, match="public id"):
        registry.end_sessions([public_id, public_id[:12]])
    assert registry.find(public_id)


DAYS = st.integers(0, 5)
LOGINS = st.lists(st.tuples(st.sampled_from(["1", "2", None]), DAYS, DAYS), max_size=8)


@hypothesis_settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    logins=LOGINS,
    ends=st.sets(st.integers(0, 7)),
    user=st.sampled_from(["1", "2", None]),
    created_days=DAYS,
    idle_days=DAYS,
    count=st.integers(1, 4),
)
def test_matching_agrees_with_the_truth(
    store: redis.Redis,
    logins: Any,
    ends: set[int],
    user: str | None,
    created_days: int,
    idle_days: int,
    count: int,
) -> None:
    store.flushdb()
    now, truth = datetime.now(UTC), {}
    for owner, created, seen in logins:
        public_id = id_of(new(owner))
        times = [now - timedelta(days=days, minutes=1) for days in (max(created, seen), seen)]
        age(store, public_id, created=times[0], seen=times[1])
        truth[public_id] = (owner, *times)
    registry.end_sessions(list(truth)[n] for n in ends if n < len(truth))
    filters: Any = {
        "user": user,
        "created_before": now - timedelta(days=created_days),
        "idle_since": now - timedelta(days=idle_days),
    }
    expected = {
        public_id
        for n, (public_id, (owner, created, seen)) in enumerate(truth.items())
        if n not in ends
        and user in (None, owner)
        and created < filters["created_before"]
        and seen < filters["idle_since"]
    }
    found = ids(registry.matching(**filters))
    assert len(found) == len(expected)
    assert set(found) == expected
    page = registry.page(count, **filters)
    assert {one.id for one in page.sessions} <= expected
    assert len(page.sessions) == min(count, len(expected))


def copies(store: redis.Redis, many: int, deadlines_ms: Sequence[int]) -> set[str]:
    """Make copies of a session, half of them with a user, that have these deadlines by turns."""
    record = store.dump(SessionKeys.of_id("session", id_of(new())).record)
    store.flushdb()
    pipe = store.pipeline(transaction=False)
    made = set()
    for n in range(many):
        keys = SessionKeys.of("session", token_bytes(16).hex())
        pipe.restore(keys.record, 0, record)
        has_user, deadline_ms = n % 2, deadlines_ms[n // 2 % len(deadlines_ms)]
        member = keys.id.encode() + b"8 letter" * has_user
        pipe.zadd(keys.index, {member: deadline_ms * (1 if has_user else -1)})
        made.add(keys.id)
        if n % 1000 == 999:
            pipe.execute()
    pipe.execute()
    return made


@pytest.mark.parametrize(("deadlines", "count"), [(1, 100), (3, 100), (1, 3000), (400, 3000)])
def test_pages_are_complete_where_many_have_few_deadlines(
    store: redis.Redis, deadlines: int, count: int
) -> None:
    made = copies(store, 1500, range(10**13, 10**13 + deadlines))
    listed, after = [], None
    for _ in range(1500 // count + 2):
        page = registry.page(count, after=after)
        listed += ids(page.sessions)
        after = page.after
        if after is None:
            break
    assert len(listed) == len(set(listed))
    assert set(listed) == made


def test_page_goes_on_after_a_session_that_has_ended(store: redis.Redis) -> None:
    made = copies(store, 2500, [10**13])
    page = registry.page(1200)
    seen = ids(page.sessions)
    assert registry.end_sessions(seen[-300:]) == 300
    rest = registry.page(2500, after=page.after)
    assert rest.after is None
    assert set(ids(rest.sessions)) == made - set(seen)


@pytest.mark.full
def test_very_many_sessions_with_one_deadline_are_listed_in_bounded_replies(
    store: redis.Redis,
) -> None:
    """A site that lets all sessions expire at midnight has all of them there."""
    many = 50_000
    made = copies(store, many, [10**13])
    registry.page(1)

    def told() -> int:
        return int(store.info("stats")["total_net_output_bytes"])

    before = told()
    page = registry.page(100)
    second = registry.page(100, after=page.after)
    assert told() - before < 2_500_000
    assert len({*ids(page.sessions), *ids(second.sessions)} & made) == 200
    listed, after = set(), None
    while True:
        page = registry.page(5000, after=after)
        listed.update(ids(page.sessions))
        after = page.after
        if after is None:
            break
    assert listed == made
    out = StringIO()
    call_command("sessions", "list", stdout=out, stderr=StringIO())
    assert len(out.getvalue().splitlines()) == many + 1


@pytest.mark.full
def test_many_sessions_pass_in_bounded_memory(store: redis.Redis) -> None:
    record = store.dump(SessionKeys.of_id("session", id_of(new())).record)
    many = 10_000
    pipe = store.pipeline(transaction=False)
    for n in range(many):
        keys = SessionKeys.of("session", token_bytes(16).hex())
        pipe.restore(keys.record, 0, record)
        pipe.zadd(keys.index, {keys.id: -(10**13) + n})
        if n % 1000 == 999:
            pipe.execute()
    tracemalloc.start()
    try:
        assert sum(1 for _ in registry.matching()) == many + 1
        assert (
            sum(1 for _ in registry.matching(created_before=datetime(2020, 1, 1, tzinfo=UTC))) == 0
        )
        assert len(registry.page(50).sessions) == 50
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000
