"""A reply lost is not a write twice: the same token twice gives the first answer.

First each script against a real store, then the drivers through a proxy that cuts connections.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import pytest
import redis
from django.contrib.sessions.backends.base import UpdateError

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol import results
from django_clustered_sessions.protocol.changes import Change, Changes, Operation
from django_clustered_sessions.protocol.commands import records
from django_clustered_sessions.protocol.effects import Call
from django_clustered_sessions.protocol.flows import Flow
from django_clustered_sessions.protocol.options import Expiry, WriteOptions
from django_clustered_sessions.protocol.record import Ages, EndReason, Meta, Mode, SessionKeys
from django_clustered_sessions.protocol.results import Alive, Conflict, Exists, Gone
from django_clustered_sessions.protocol.scripts import script
from django_clustered_sessions.store import connections, drivers
from django_clustered_sessions.store.budget import Budget
from tests.gateways import load_scripts
from tests.locking import now_ms
from tests.servers import CountingProxy, wait_for

pytestmark = pytest.mark.each_server

#: Longer than any machine stands still: a test of its end has a window of its own.
WINDOW_MS = 600_000
TERMS = WriteOptions(Ages(60_000), 100_000, WINDOW_MS, "merge")
DEFAULT = Expiry(Mode.DEFAULT, 0)


def token() -> bytes:
    return secrets.token_bytes(8)


@pytest.fixture
def place() -> SessionKeys:
    return SessionKeys.of("session", secrets.token_hex(16))


@pytest.fixture
def other_place() -> SessionKeys:
    return SessionKeys.of("session", secrets.token_hex(16))


def ask(call: Call) -> Any:
    """Send one call to the store of the settings."""

    def flow() -> Flow[Any]:
        (reply,) = yield (call,)
        return reply

    return drivers.run(flow(), connections.pool, Budget(5.0))


def create(place: SessionKeys, as_token: bytes, **values: bytes) -> Alive | Exists:
    fields = [(b"d:" + name.encode(), value) for name, value in values.items()]
    return records.parse_create(ask(records.create(place, as_token, DEFAULT, fields, TERMS)))


def commit(
    place: SessionKeys, as_token: bytes, *changes: Change, terms: WriteOptions = TERMS
) -> Alive | Gone | Conflict:
    reply = ask(records.commit(place, as_token, None, Changes(changes, False), terms))
    answer = records.parse_commit(reply)
    assert not isinstance(answer, results.TooLarge)
    return answer


def put(name: str, value: bytes, loaded: bytes = b"") -> Change:
    return Change(Operation.SET, b"d:" + name.encode(), loaded, value)


def remove(name: str, loaded: bytes) -> Change:
    return Change(Operation.REMOVE, b"d:" + name.encode(), loaded, b"")


def count(name: str, by: int) -> Change:
    return Change(Operation.ADD, b"d:" + name.encode(), b"", b"%d" % by)


def raw(store: redis.Redis, place: SessionKeys) -> dict[bytes, bytes]:
    return store.hgetall(place.record)


def recent(store: redis.Redis, place: SessionKeys) -> set[bytes]:
    """Return the tokens of the writes that may come again, of the whole bucket."""
    return {name for log in place.writes for name in store.hkeys(log)}


def data(store: redis.Redis, place: SessionKeys) -> dict[bytes, bytes]:
    return {name: value for name, value in raw(store, place).items() if name[:2] == b"d:"}


# The scripts.


def test_create_again_is_the_first_answer(store: redis.Redis, place: SessionKeys) -> None:
    first = token()
    answer = create(place, first, a=b"s1")
    before = raw(store, place)
    again = create(place, first, a=b"s1")
    assert isinstance(answer, Alive)
    assert isinstance(again, Alive)
    assert again.deadline_ms == answer.deadline_ms
    assert raw(store, place) == before
    assert isinstance(create(place, token(), a=b"s2"), Exists)
    assert raw(store, place) == before


def test_create_does_not_make_an_ended_session_anew(store: redis.Redis, place: SessionKeys) -> None:
    first = token()
    create(place, first, a=b"s1")
    ask(records.end(place, EndReason.FLUSHED, 0))
    assert isinstance(create(place, first, a=b"s1"), Exists)
    assert raw(store, place) == {b"m:end": b"flushed"}


def test_commit_again_is_the_first_answer(store: redis.Redis, place: SessionKeys) -> None:
    first, second = token(), token()
    create(place, first, a=b"s1", b=b"s1")
    changes = put("a", b"s2", first), remove("b", first), put("c", b"s3")
    assert isinstance(commit(place, second, *changes), Alive)
    before = raw(store, place)
    assert isinstance(commit(place, second, *changes), Alive)
    assert raw(store, place) == before
    assert data(store, place) == {b"d:a": second + b"s2", b"d:c": second + b"s3"}


def test_count_again_is_the_first_answer_after_others_wrote(
    store: redis.Redis, place: SessionKeys
) -> None:
    create(place, token(), n=b"i10")
    mine = token()
    changes = count("n", 2), put("a", b"s1"), count("m", -1)
    answer = commit(place, mine, *changes)
    assert isinstance(answer, Alive)
    assert answer.counters == (12, -1)
    for number in range(20):
        assert isinstance(commit(place, token(), count("n", 1)), Alive)
        if number == 10:
            assert isinstance(commit(place, token(), put("a", b"s9", mine)), Alive)
        again = commit(place, mine, *changes)
        assert isinstance(again, Alive)
        assert again.counters == (12, -1)
    values = {name: value[8:] for name, value in data(store, place).items()}
    assert values == {b"d:n": b"i32", b"d:m": b"i-1", b"d:a": b"s9"}


def test_commit_again_is_the_first_answer_after_a_removal(
    store: redis.Redis, place: SessionKeys
) -> None:
    create(place, token())
    mine = token()
    assert isinstance(commit(place, mine, put("a", b"s1")), Alive)
    assert isinstance(commit(place, token(), remove("a", mine)), Alive)
    assert isinstance(commit(place, mine, put("a", b"s1")), Alive)
    assert data(store, place) == {}


def test_a_refused_commit_may_come_again_with_its_merge(
    store: redis.Redis, place: SessionKeys
) -> None:
    first, theirs, mine = token(), token(), token()
    create(place, first, a=b"s1")
    commit(place, theirs, put("a", b"s2", first))
    before = raw(store, place)
    for _ in range(2):
        refused = commit(place, mine, put("a", b"s3", first), put("b", b"s1"), count("n", 1))
        assert isinstance(refused, Conflict)
        assert refused.values == {b"d:a": theirs + b"s2"}
        assert raw(store, place) == before, "not one byte of a refused commit lands"
    assert isinstance(commit(place, mine, put("a", b"s4", theirs), count("n", 1)), Alive)
    assert data(store, place) == {b"d:a": mine + b"s4", b"d:n": mine + b"i1"}


def test_versions_are_compared_for_equality_only(store: redis.Redis, place: SessionKeys) -> None:
    low, high = b"\x00" * 8, b"\xff" * 8
    create(place, high, a=b"s1")
    assert isinstance(commit(place, low, put("a", b"s2", high)), Alive)
    for other in (high, b"\x00" * 7 + b"\x01", b""):
        assert isinstance(commit(place, token(), put("a", b"s3", other)), Conflict)
        assert isinstance(commit(place, token(), remove("a", other)), Conflict)
    assert isinstance(commit(place, token(), put("a", b"s3", low)), Alive)
    # What somebody else has removed: a change of it is a conflict, another removal is none.
    gone = token()
    version = data(store, place)[b"d:a"][:8]
    assert isinstance(commit(place, gone, remove("a", version)), Alive)
    conflict = commit(place, token(), put("a", b"s4", version))
    assert isinstance(conflict, Conflict)
    assert conflict.values == {b"d:a": b""}
    assert isinstance(commit(place, token(), remove("a", version)), Alive)


def test_the_window_is_long_enough_and_ends(store: redis.Redis, place: SessionKeys) -> None:
    create(place, token())
    mine = token()
    commit(place, mine, count("n", 1))
    commit(place, token(), put("a", b"s1"))
    assert mine in recent(store, place)
    assert isinstance(commit(place, mine, count("n", 1)), Alive)
    assert data(store, place)[b"d:n"][8:] == b"i1"
    store.delete(*place.writes)
    short, mine = TERMS._replace(replay_ms=300), token()
    commit(place, mine, count("n", 1), terms=short)

    def forgotten() -> bool:
        version = data(store, place)[b"d:a"][:8]
        answer = commit(place, token(), put("a", b"s1", version), terms=short)
        assert isinstance(answer, Alive)
        return mine not in recent(store, place)

    wait_for(forgotten, "a write that is too old to come again is forgotten")


def test_record_does_not_grow_with_the_rate_of_writes(
    store: redis.Redis, place: SessionKeys
) -> None:
    """Each load reads all of it, and each write would read and write it."""
    create(place, token())
    tokens = [token() for _ in range(1000)]
    for first in range(0, len(tokens), 100):
        for at in range(first, first + 100):
            commit(place, tokens[at], count("n", 1))
        size = sum(len(name) + len(value) for name, value in raw(store, place).items())
        assert size < 100
    for at in (0, 500, 999):
        again = commit(place, tokens[at], count("n", 1))
        assert isinstance(again, Alive)
        assert again.counters == (at + 1,)


def test_session_that_is_written_now_and_then_needs_no_notes(
    store: redis.Redis, place: SessionKeys
) -> None:
    create(place, first := token())
    short = TERMS._replace(replay_ms=20)
    answer = commit(place, second := token(), put("a", b"s1"), terms=short)
    assert isinstance(answer, Alive)
    assert recent(store, place) <= {first}
    wait_for(lambda: now_ms(store) >= answer.now_ms + 20, "the end of the window")
    store.delete(*place.writes)
    assert isinstance(commit(place, token(), put("a", b"s2", second), terms=short), Alive)
    assert recent(store, place) == set()


def test_writes_are_forgotten_where_nobody_writes_any_more(
    store: redis.Redis, place: SessionKeys
) -> None:
    create(place, token())
    commit(place, token(), count("n", 1))
    (log,) = store.keys("*writes")
    assert 0 < store.pttl(log) <= 2 * WINDOW_MS
    store.delete(log)
    commit(place, token(), count("n", 1), terms=TERMS._replace(replay_ms=300))
    wait_for(lambda: not store.keys("*writes"), "they expire by themselves")


def test_answer_outlasts_the_window_whenever_it_is_given(
    store: redis.Redis, place: SessionKeys
) -> None:
    create(place, token())
    # Windows of many lengths, so that a write lands at many places of its stretch of time.
    for window_ms in range(60_000, 300_000, 5821):
        store.delete(*place.writes)
        terms = TERMS._replace(replay_ms=window_ms)
        answer = commit(place, token(), count("n", 1), terms=terms)
        assert isinstance(answer, Alive)
        (log,) = store.keys("*writes")
        forgotten_ms = store.pexpiretime(log) + 1
        assert answer.now_ms + window_ms <= forgotten_ms <= answer.now_ms + 2 * window_ms
        # Then its turn comes again, and it is empty.
        assert forgotten_ms % (2 * window_ms) == window_ms * int(log.endswith(b"oddwrites"))


def test_newest_write_is_known_however_late_it_comes_again(
    store: redis.Redis, place: SessionKeys
) -> None:
    create(place, token(), n=b"i10")
    mine = token()
    changes = count("n", 2), put("a", b"s1"), count("m", -1)
    commit(place, mine, *changes)
    store.delete(*place.writes)
    again = commit(place, mine, *changes)
    assert isinstance(again, Alive)
    assert again.counters == (12, -1)


def test_a_write_that_let_the_session_expire_comes_again(
    store: redis.Redis, place: SessionKeys
) -> None:
    first, mine = token(), token()
    create(place, first, n=b"i1")

    def expire(as_token: bytes, window_ms: int = WINDOW_MS) -> Alive | Gone | Conflict:
        delta = Changes((count("n", 2),), False)
        terms = TERMS._replace(replay_ms=window_ms)
        reply = ask(records.commit(place, as_token, Expiry(Mode.FROM_NOW, -1), delta, terms))
        answer = records.parse_commit(reply)
        assert not isinstance(answer, results.TooLarge)
        return answer

    for _ in range(3):
        answer = expire(mine)
        assert isinstance(answer, Alive)
        assert answer.deadline_ms <= answer.now_ms
        assert answer.counters == (3,)
        assert raw(store, place) == {b"m:end": b""}
        assert 0 < store.pttl(place.record) <= WINDOW_MS
        assert store.zcard(place.index) == 0
    gone = expire(token())
    assert isinstance(gone, Gone)
    assert gone.reason is EndReason.UNKNOWN
    store.delete(place.record)
    create(place, first, n=b"i1")
    expire(token(), 1)
    wait_for(lambda: not store.exists(place.record), "nothing of it is kept for longer")


def test_rotate_again_is_the_first_answer(
    store: redis.Redis, place: SessionKeys, other_place: SessionKeys
) -> None:
    create(place, token(), a=b"s1")
    values = data(store, place)
    call = records.rotate(place, other_place, token(), TERMS)
    first = records.parse_rotate(ask(call))
    before = raw(store, place), raw(store, other_place)
    again = records.parse_rotate(ask(call))
    assert isinstance(first, Alive)
    assert isinstance(again, Alive)
    assert again.deadline_ms == first.deadline_ms
    assert (raw(store, place), raw(store, other_place)) == before
    assert data(store, other_place) == values
    assert raw(store, place) == {b"m:end": b"rotated"}


def test_rotate_again_brings_no_ended_session_back(
    store: redis.Redis, place: SessionKeys, other_place: SessionKeys
) -> None:
    create(place, token(), a=b"s1")
    call = records.rotate(place, other_place, token(), TERMS)
    ask(call)
    ask(records.end(other_place, EndReason.FLUSHED, 0))
    assert isinstance(records.parse_rotate(ask(call)), Exists)
    assert raw(store, other_place) == {b"m:end": b"flushed"}


def test_rotate_again_is_the_first_answer_after_others_wrote(
    store: redis.Redis, place: SessionKeys, other_place: SessionKeys
) -> None:
    """The tombstone of a user's session leads others to its new key before the reply is there."""
    user = secrets.token_bytes(8)
    ask(records.create(place, token(), DEFAULT, [], TERMS, user))
    call = records.rotate(place, other_place, token(), TERMS)
    ask(call)
    assert isinstance(commit(other_place, token(), put("a", b"s1")), Alive)
    assert isinstance(records.parse_rotate(ask(call)), Alive)
    assert data(store, other_place)[b"d:a"][8:] == b"s1"


@pytest.mark.parametrize("move", ["rotate", "leave"])
def test_commit_again_after_a_move_is_told_that_it_landed(
    store: redis.Redis, place: SessionKeys, other_place: SessionKeys, move: str
) -> None:
    create(place, token())
    counted, mine, late = token(), token(), put("a", b"s1")
    commit(place, counted, count("n", 1))
    commit(place, mine, late)
    if move == "rotate":
        ask(records.rotate(place, other_place, token(), TERMS))
    else:
        left = records.leave(place, token(), mine, other_place, TERMS)
        assert records.parse_leave(ask(left)) is None
    before = raw(store, other_place)
    for again, counted_to in (
        (commit(place, counted, count("n", 1)), (1,)),
        (commit(place, mine, late), ()),
        (commit(place, token(), late), None),
    ):
        assert isinstance(again, Gone)
        assert (again.reason, again.counters) == (EndReason.ROTATED, counted_to)
    assert raw(store, other_place) == before


def test_end_again_changes_nothing(store: redis.Redis, place: SessionKeys) -> None:
    create(place, token(), a=b"s1")
    assert records.parse_end(ask(records.end(place, EndReason.FLUSHED, 0)))
    first = store.pttl(place.record)
    records.parse_end(ask(records.end(place, EndReason.DELETED, 0)))
    assert raw(store, place) == {b"m:end": b"flushed"}
    assert store.pttl(place.record) <= first
    assert store.zscore(place.index, place.id) is None


def test_touch_again_changes_nothing_but_the_deadline(
    store: redis.Redis, place: SessionKeys
) -> None:
    create(place, token(), a=b"s1")
    before = raw(store, place)
    for _ in range(3):
        assert isinstance(records.parse_touch(ask(records.touch(place, TERMS))), Alive)
    after = raw(store, place)
    assert Meta.parse(after.pop(b"m:")).version == Meta.parse(before.pop(b"m:")).version
    assert after == before


# The drivers.

SyncOperation = Callable[[SessionStore], Any]
AsyncOperation = Callable[[SessionStore], Awaitable[Any]]


async def run(
    is_async: bool, session: SessionStore, sync: SyncOperation, twin: AsyncOperation
) -> Any:
    """Do an operation in one of its forms; the synchronous one where no event loop runs."""
    return await twin(session) if is_async else await asyncio.to_thread(sync, session)


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def is_async(request: pytest.FixtureRequest) -> bool:
    is_async: bool = request.param
    return is_async


async def warm_up(is_async: bool) -> None:
    """Connect, and let the store know the scripts and the process report its figures."""
    session = SessionStore()
    session.update({"n": 0})
    await run(is_async, session, lambda s: s.save(), lambda s: s.asave())
    session.increment("n")
    await run(is_async, session, lambda s: s.save(), lambda s: s.asave())
    await run(is_async, session, lambda s: s.cycle_key(), lambda s: s.acycle_key())
    await run(is_async, session, lambda s: s.flush(), lambda s: s.aflush())


async def saved(is_async: bool, **values: Any) -> SessionStore:
    """Return a session that the store has, after all that only the first one costs."""
    await warm_up(is_async)
    session = SessionStore()
    session.update(values)
    await run(is_async, session, lambda s: s.save(), lambda s: s.asave())
    return session


Where = Literal["request", "reply", "half"]

#: Two losses that the store has seen the request of, one for each driver. Where a loss is, is the
#: driver's business: it is crossed with the drivers for one of the writes.
LOSSES = pytest.mark.parametrize(
    ("is_async", "where"), [(False, "reply"), (True, "half")], ids=["sync-reply", "async-half"]
)


def sent(proxy: CountingProxy, text: bytes) -> int:
    """Return how often a command of that text came by."""
    return sum(request.count(text) for request in proxy.requests)


@pytest.mark.parametrize("where", ["request", "reply", "half"])
async def test_lost_commit_is_repeated_once_and_counts_once(
    store: redis.Redis, proxy: CountingProxy, is_async: bool, where: Where
) -> None:
    session = await saved(is_async, cart={"a": 1})
    session["cart"]["b"] = 2
    assert session.increment("n", 5) == 5
    proxy.reset()
    proxy.cut_next(where, matching=b"EVALSHA")
    await run(is_async, session, lambda s: s.save(), lambda s: s.asave())
    assert sent(proxy, b"EVALSHA") == 2
    assert proxy.connections == 1, "on a fresh connection"
    assert session["n"] == 5
    stored = await SessionStore(session.session_key).aload()
    assert stored == {"cart": {"a": 1, "b": 2}, "n": 5}


@LOSSES
async def test_lost_write_that_expires_the_session_is_repeated(
    store: redis.Redis, proxy: CountingProxy, is_async: bool, where: Where
) -> None:
    session = await saved(is_async, a=1)
    session.set_expiry(-1)
    proxy.reset()
    proxy.cut_next(where, matching=b"EVALSHA")
    await run(is_async, session, lambda s: s.save(), lambda s: s.asave())
    assert sent(proxy, b"EVALSHA") == 2
    assert not await SessionStore(session.session_key).aload()
    late = SessionStore(session.session_key)
    await late.aset("b", 1)
    await late.asave()
    assert late.session_key != session.session_key


@LOSSES
async def test_a_lost_creation_makes_one_session(
    store: redis.Redis, proxy: CountingProxy, is_async: bool, where: Where
) -> None:
    await warm_up(is_async)
    store.flushdb()
    session = SessionStore()
    session["a"] = 1
    proxy.cut_next(where, matching=b"EVALSHA")
    await run(is_async, session, lambda s: s.save(), lambda s: s.asave())
    assert store.keys("*:index") == [SessionKeys.of("session", session.session_key).index.encode()]
    assert await SessionStore(session.session_key).aload() == {"a": 1}


@LOSSES
async def test_a_lost_rotation_moves_the_session_once(
    store: redis.Redis, proxy: CountingProxy, is_async: bool, where: Where
) -> None:
    session = await saved(is_async, a=1)
    old = session.session_key
    proxy.reset()
    proxy.cut_next(where, matching=b"EVALSHA")
    await run(is_async, session, lambda s: s.cycle_key(), lambda s: s.acycle_key())
    assert sent(proxy, b"EVALSHA") == 2
    assert session.session_key != old
    assert await SessionStore(session.session_key).aload() == {"a": 1}
    assert raw(store, SessionKeys.of("session", old)) == {b"m:end": b"rotated"}


@LOSSES
async def test_a_lost_ending_ends_the_session(
    store: redis.Redis, proxy: CountingProxy, is_async: bool, where: Where
) -> None:
    session = await saved(is_async, a=1)
    old = session.session_key
    proxy.cut_next(where, matching=b"EVALSHA")
    await run(is_async, session, lambda s: s.flush(), lambda s: s.aflush())
    assert raw(store, SessionKeys.of("session", old)) == {b"m:end": b"flushed"}
    late = SessionStore(old)
    await late.aset("b", 1)
    await late.asave()
    assert late.session_key != old


@LOSSES
async def test_a_lost_release_is_no_lost_lock(
    store: redis.Redis, proxy: CountingProxy, is_async: bool, where: Where
) -> None:
    await warm_up(is_async)
    load_scripts(store)
    session = SessionStore()
    session["a"] = 1
    await run(is_async, session, lambda s: s.save(), lambda s: s.asave())
    # One that has changed nothing, so that its release is a trip of its own.
    session = SessionStore(session.session_key)
    before = counters.counts["locks_lost"]

    def lock(session: SessionStore) -> None:
        with session.lock():
            proxy.cut_next(where, matching=script("release").sha)

    async def alock(session: SessionStore) -> None:
        async with session.alock():
            proxy.cut_next(where, matching=script("release").sha)

    proxy.reset()
    await run(is_async, session, lock, alock)
    assert sent(proxy, script("release").sha) == 2
    assert b"m:lock" not in raw(store, SessionKeys.of("session", session.session_key))
    assert counters.counts["locks_lost"] == before


@LOSSES
async def test_a_lost_load_is_repeated(
    store: redis.Redis, proxy: CountingProxy, is_async: bool, where: Where
) -> None:
    session = await saved(is_async, a="x" * 500)
    proxy.cut_next(where, matching=b"HGETALL")
    again = SessionStore(session.session_key)
    assert await run(is_async, again, lambda s: s.load(), lambda s: s.aload()) == {"a": "x" * 500}


async def test_write_lost_twice_is_not_tried_again(
    store: redis.Redis, proxy: CountingProxy, is_async: bool
) -> None:
    session = await saved(is_async)
    session.increment("n")
    proxy.reset()
    proxy.cut_next("reply", times=2, matching=b"EVALSHA")
    with pytest.raises(SessionStoreUnavailable):
        await run(is_async, session, lambda s: s.save(), lambda s: s.asave())
    assert sent(proxy, b"EVALSHA") == 2
    assert proxy.connections == 1
    assert (await SessionStore(session.session_key).aload())["n"] == 1


async def test_save_repeated_by_the_view_is_a_write_of_its_own(
    store: redis.Redis, proxy: CountingProxy, is_async: bool
) -> None:
    session = await saved(is_async, cart={})
    session["cart"]["a"] = [1]
    proxy.cut_next("reply", times=2, matching=b"EVALSHA")
    with pytest.raises(SessionStoreUnavailable):
        await run(is_async, session, lambda s: s.save(), lambda s: s.asave())
    # It had landed; what it wrote meets itself, and is one change.
    await run(is_async, session, lambda s: s.save(), lambda s: s.asave())
    assert await SessionStore(session.session_key).aload() == {"cart": {"a": [1]}}


def out_of_memory(store: redis.Redis) -> Callable[[], Any]:
    store.config_set("maxmemory", 1)
    return lambda: store.config_set("maxmemory", 0)


def read_only(store: redis.Redis) -> Callable[[], Any]:
    store.replicaof("127.0.0.1", 1)
    return lambda: store.replicaof("NO", "ONE")


def too_few_replicas(store: redis.Redis) -> Callable[[], Any]:
    store.config_set("min-replicas-to-write", 1)
    return lambda: store.config_set("min-replicas-to-write", 0)


def forbidden(store: redis.Redis) -> Callable[[], Any]:
    store.execute_command("ACL", "SETUSER", "default", "-evalsha")
    return lambda: store.execute_command("ACL", "SETUSER", "default", "+@all")


#: What is done about a word is the same in both drivers, except for that of a replica.
@pytest.mark.parametrize(
    ("is_async", "refuse", "word"),
    [
        pytest.param(False, out_of_memory, "OOM", id="sync-OOM"),
        pytest.param(True, too_few_replicas, "NOREPLICAS", id="async-NOREPLICAS"),
        pytest.param(False, forbidden, "NOPERM", id="sync-NOPERM"),
        pytest.param(True, forbidden, "NOPERM", id="async-NOPERM"),
        pytest.param(False, read_only, "READONLY", id="sync-READONLY"),
        pytest.param(True, read_only, "READONLY", id="async-READONLY"),
    ],
)
async def test_a_refusal_is_not_repeated(
    store: redis.Redis,
    proxy: CountingProxy,
    is_async: bool,
    refuse: Callable[[redis.Redis], Callable[[], Any]],
    word: str,
) -> None:
    session = await saved(is_async)
    session["a"] = 1
    allow = refuse(store)
    try:
        proxy.reset()
        with pytest.raises(SessionStoreUnavailable, match=f"refused.*{word}"):
            await run(is_async, session, lambda s: s.save(), lambda s: s.asave())
        # A replica's is, on a fresh connection: that may lead to the primary of today.
        assert sent(proxy, b"EVALSHA") == 1 + (word == "READONLY")
        assert proxy.connections == (word == "READONLY")
    finally:
        allow()
    await run(is_async, session, lambda s: s.save(), lambda s: s.asave())
    assert await SessionStore(session.session_key).aload() == {"a": 1}


async def test_a_conflict_is_no_loss(
    store: redis.Redis, proxy: CountingProxy, is_async: bool
) -> None:
    """An answer that says no is an answer: the ended session is not asked for again."""
    session = await saved(is_async)
    await SessionStore().adelete(session.session_key)
    session["a"] = 1
    proxy.reset()
    with pytest.raises(UpdateError):
        await run(is_async, session, lambda s: s.save(), lambda s: s.asave())
    assert proxy.round_trips == 1


async def test_a_write_is_not_sent_again_for_figures_that_ride_along(
    store: redis.Redis,
    proxy: CountingProxy,
    is_async: bool,
    figures: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not where the store knows the script of the write, and not the one of the figures."""
    monkeypatch.setattr("django_clustered_sessions.monitoring.counters.INTERVAL_S", 0)
    session = await saved(is_async, n=1)
    session["n"] = 2
    store.script_flush()
    store.script_load(script("commit").source)
    proxy.reset()
    await run(is_async, session, lambda s: s.save(), lambda s: s.asave())
    assert [sent(proxy, script(name).sha) for name in ("stats", "commit")] == [1, 1]
    assert sent(proxy, b"EVAL\r\n") == 1
    assert await SessionStore(session.session_key).aload() == {"n": 2}
    store.script_flush()
    proxy.reset()
    session["n"] = 3
    await run(is_async, session, lambda s: s.save(), lambda s: s.asave())
    assert [sent(proxy, b"EVALSHA\r\n"), sent(proxy, b"EVAL\r\n")] == [2, 2]
    assert await SessionStore(session.session_key).aload() == {"n": 3}


async def test_a_store_that_forgot_the_scripts_gets_them_once(
    store: redis.Redis, proxy: CountingProxy, is_async: bool
) -> None:
    session = await saved(is_async, n=1)
    session.increment("n")
    store.script_flush()
    proxy.reset()
    await run(is_async, session, lambda s: s.save(), lambda s: s.asave())
    assert [sent(proxy, b"EVALSHA\r\n"), sent(proxy, b"EVAL\r\n")] == [1, 1]
    assert await SessionStore(session.session_key).aload() == {"n": 2}
