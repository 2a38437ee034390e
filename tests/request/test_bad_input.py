"""Cookies, records, values and settings that nobody should send, and what becomes of them."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
import redis
from django.contrib.sessions.backends.base import CreateError
from django.http import HttpRequest, HttpResponse
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionStoreUnavailable, SessionTooLarge
from tests.gateways import Browser, place, records
from tests.servers import wait_for

pytestmark = pytest.mark.full

COOKIE = "sessionid"
VERSION = b"8 bytes."


@pytest.fixture(params=["wsgi", "asgi"])
def browser(request: pytest.FixtureRequest, store: redis.Redis, settings: Any) -> Browser:
    return Browser(settings, asgi=request.param == "asgi")


def read(request: HttpRequest) -> HttpResponse:
    return HttpResponse(repr(request.session.get("n")))


def untouched(request: HttpRequest) -> HttpResponse:
    return HttpResponse("untouched")


def write(request: HttpRequest) -> HttpResponse:
    request.session["n"] = 1
    return HttpResponse("written")


def increment(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(request.session.increment("n")))


def stored(values: dict[Any, Any]) -> str:
    """Return the key of a new session that holds the values."""
    session = SessionStore()
    session.update(values)
    session.create()
    return session.session_key or ""


# Cookies.

COOKIES = [
    "",
    "x",
    "short77",
    "x" * 32,
    "X" * 40,
    "x" * 100_000,
    "../../../../etc/passwd",
    "session:{000}:index",
    "*" * 32,
    "ümlaut" * 6,
    "emoji\N{PILE OF POO}" * 5,
    "nul\0nul\0nul\0",
    "line\r\nline\r\nSET x 1\r\n",
    "surrogate \ud800 \udfff",
    "'; DROP TABLE django_session; --",
    "{}" * 16,
]


@pytest.mark.parametrize("cookie", COOKIES, ids=lambda cookie: ascii(cookie)[:20])
def test_cookie_of_no_session(store: redis.Redis, cookie: str) -> None:
    session = SessionStore(cookie)
    assert session.load() == {}
    assert session.session_key is None
    assert SessionStore().exists(cookie) is False
    SessionStore().delete(cookie)
    assert records(store) == []
    mine = SessionStore(cookie)
    mine["n"] = 1
    mine.save()
    assert mine.session_key not in (cookie, None)
    assert len(records(store)) == 1


@pytest.mark.parametrize("cookie", COOKIES, ids=lambda cookie: ascii(cookie)[:20])
async def test_cookie_of_no_session_asynchronously(store: redis.Redis, cookie: str) -> None:
    session = SessionStore(cookie)
    assert await session.aload() == {}
    assert session.session_key is None
    assert await SessionStore().aexists(cookie) is False
    assert records(store) == []


@pytest.mark.parametrize(
    "cookie", ["x", "x" * 32, "x" * 100_000, "a\tb" * 9, '"quoted, with; all"', "\xff\xfe" * 10]
)
def test_cookie_of_no_session_in_a_request(
    browser: Browser, store: redis.Redis, cookie: str
) -> None:
    browser.key = cookie
    assert browser.visit(read).content == b"None"
    assert records(store) == []


def test_cookie_of_an_ended_session_is_not_taken_up(browser: Browser, store: redis.Redis) -> None:
    browser.visit(write)
    ended = browser.key
    SessionStore(ended).flush()
    browser.key = ended
    browser.visit(write)
    assert browser.key not in ("", ended)
    assert SessionStore(ended).load() == {}


# Records.


def replaced_by(kind: str) -> Callable[[redis.Redis, str], None]:
    def damage(store: redis.Redis, record: str) -> None:
        store.delete(record)
        if kind == "string":
            store.set(record, "text")
        elif kind == "list":
            store.rpush(record, "text")
        elif kind == "zset":
            store.zadd(record, {"text": 1})
        else:
            store.hset(record, "some", "field")

    return damage


def meta(change: Callable[[bytes], bytes]) -> Callable[[redis.Redis, str], None]:
    def damage(store: redis.Redis, record: str) -> None:
        store.hset(record, "m:", change(store.hget(record, "m:")))

    return damage


DAMAGES = {
    "string": replaced_by("string"),
    "list": replaced_by("list"),
    "sorted set": replaced_by("zset"),
    "another hash": replaced_by("hash"),
    "meta missing": lambda store, record: store.hdel(record, "m:"),
    "meta empty": meta(lambda packed: b""),
    "meta cut": meta(lambda packed: packed[:-1]),
    "meta cut to one byte": meta(lambda packed: packed[:1]),
    "meta too long": meta(lambda packed: packed + b"\0"),
    "mode unknown": meta(lambda packed: packed[:1] + b"\xff" + packed[2:]),
}


@pytest.mark.parametrize("every_request", [False, True])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_record_is_no_session_and_no_error(
    browser: Browser, store: redis.Redis, settings: Any, damage: Any, every_request: bool
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = every_request
    for view in (read, untouched, write):
        browser.key = stored({"n": 7})
        record = place(browser.key).record
        damage(store, record)
        browser.key = damaged = browser.key
        response = browser.visit(view)
        assert response.status_code == 200, view
        if view is write:
            assert browser.key not in ("", damaged)
        # Whatever came out, the next visits work.
        assert browser.visit(write).status_code == 200
        assert browser.visit(read).content == b"1"


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_record_damaged_during_a_request_is_a_session_that_ended(
    browser: Browser, store: redis.Redis, damage: Any
) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        request.session["n"] = request.session["n"] + 1
        damage(store, place(request.session.session_key).record)
        return HttpResponse()

    browser.visit(write)
    assert browser.visit(view).status_code in (200, 400)
    assert browser.visit(write).status_code == 200
    assert browser.visit(read).content == b"1"


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_other_operations_on_a_damaged_record(store: redis.Redis, damage: Any) -> None:
    key = stored({"n": 7})
    damage(store, place(key).record)
    assert isinstance(SessionStore().exists(key), bool)
    fresh = SessionStore(key)
    fresh["n"] = 1
    fresh.save()
    assert fresh.session_key not in (None, key)
    rotated = SessionStore(key)
    rotated.cycle_key()
    assert rotated.session_key not in (None, key)
    SessionStore().delete(key)
    assert SessionStore(key).load() == {}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_record_keeps_its_key(store: redis.Redis, damage: Any) -> None:
    key = stored({"n": 7})
    damage(store, place(key).record)
    session = SessionStore(key)
    with pytest.raises(CreateError):
        session.save(must_create=True)


def test_damaged_list_of_replays_stops_no_write(browser: Browser, store: redis.Redis) -> None:
    for garbage in (b"", b"garbage", b"\xff" * 16, b"\xff" * 100, b"\0" * 15, b"\0" * 17):
        browser.key = stored({"n": 7})
        store.hset(place(browser.key).record, "m:replay", garbage)
        assert browser.visit(increment).content == b"8"
        assert browser.visit(increment).content == b"9"
        # It has to go, or the list would never be shortened again.
        recent = store.hget(place(browser.key).record, "m:replay")
        assert not garbage or garbage not in recent


UNREADABLE = {
    "empty": b"",
    "short": b"abc",
    "version only": VERSION,
    "codec unknown": VERSION + b"?" + b"1",
    "not JSON": VERSION + b"s" + b"{",
    "not compressed": VERSION + b"z" + b"not compressed",
    "no counter": VERSION + b"i" + b"many",
    "empty counter": VERSION + b"i",
    "binary": VERSION + b"s" + bytes(range(256)),
}


@pytest.mark.parametrize("value", UNREADABLE.values(), ids=UNREADABLE)
def test_value_that_cannot_be_read_is_set_aside(
    browser: Browser, store: redis.Redis, caplog: pytest.LogCaptureFixture, value: bytes
) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        session = request.session
        assert "odd" not in session
        assert session.get("odd", "default") == "default"
        with pytest.raises(KeyError):
            session["odd"]
        with pytest.raises(KeyError):
            del session["odd"]
        assert session.pop("odd", None) is None
        assert dict(session.items()) == {"n": session["n"]}
        session["n"] += 1
        return HttpResponse()

    browser.key = key = stored({"n": 7})
    store.hset(place(key).record, "d:odd", value)
    assert browser.visit(view).status_code == 200
    assert store.hget(place(key).record, "d:odd") == value
    assert key not in caplog.text
    session = SessionStore(key)
    session.cycle_key()
    assert store.hget(place(session.session_key).record, "d:odd") == value
    assert session.load() == {"n": 8}
    # A new value takes its place.
    session = SessionStore(session.session_key)
    session["odd"] = "new"
    session.save()
    assert SessionStore(session.session_key).load() == {"n": 8, "odd": "new"}


@pytest.mark.parametrize("value", UNREADABLE.values(), ids=UNREADABLE)
def test_counter_that_cannot_be_read_starts_anew(store: redis.Redis, value: bytes) -> None:
    key = stored({"n": 7})
    store.hset(place(key).record, "d:odd", value)
    session = SessionStore(key)
    session.increment("odd", 3)
    session.save()
    assert SessionStore(key).load() == {"n": 7, "odd": 3}


def test_field_that_is_no_key_is_kept(store: redis.Redis) -> None:
    key = stored({"n": 7})
    fields = {"d:\udcff".encode("utf-8", "surrogateescape"): b"x", b"k:{": b"y", b"z:new": b"z"}
    store.hset(place(key).record, mapping=fields)
    session = SessionStore(key)
    assert session.load() == {"n": 7}
    session["n"] = 8
    session.cycle_key()
    record = store.hgetall(place(session.session_key).record)
    assert fields.items() <= record.items()


@pytest.mark.parametrize("every_request", [False, True])
def test_newer_format_is_refused_and_left_alone(
    browser: Browser, store: redis.Redis, settings: Any, every_request: bool
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = every_request
    browser.key = key = stored({"n": 7})
    record = place(key).record
    store.hset(record, "m:", b"\x02" + store.hget(record, "m:")[1:])
    before = store.hgetall(record)
    for view in (read, write, increment):
        response = browser.visit(view)
        assert response.status_code == 503
        assert not response.cookies
    for operation in (SessionStore(key).load, SessionStore(key).cycle_key):
        with pytest.raises(SessionStoreUnavailable, match="newer release"):
            operation()
    assert store.hgetall(record) == before
    SessionStore(key).flush()
    assert SessionStore(key).load() == {}


def test_bucket_whose_index_is_damaged(store: redis.Redis) -> None:
    key = stored({"n": 7})
    store.set(place(key).index, "text")
    session = SessionStore(key)
    assert session.load() == {"n": 7}
    store.delete(place(key).record)
    with pytest.raises(CreateError):
        SessionStore(key).save(must_create=True)


# Values.


def refused(request: HttpRequest) -> HttpResponse:
    request.session["kept"] = 1
    request.session["bad one"] = object()
    return HttpResponse()


def refused_in_place(request: HttpRequest) -> HttpResponse:
    request.session["kept"] = 1
    request.session["bad one"]["inside"] = {1, 2}
    return HttpResponse()


@pytest.mark.parametrize("view", [refused, refused_in_place])
def test_value_that_the_serialiser_refuses(browser: Browser, view: Any) -> None:
    browser.key = key = stored({"n": 7, "bad one": {}})
    assert browser.visit(view).status_code == 500
    assert SessionStore(key).load() == {"n": 7, "bad one": {}}
    assert browser.visit(write).status_code == 200


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize("value", [object(), {1, 2}, CIRCLE, DEEP, {(1, 2): 3}, b"bytes"])
def test_refusal_names_the_key(store: redis.Redis, value: Any, create: bool) -> None:
    key = stored({"n": 7})
    session = SessionStore(None if create else key)
    session["bad one"] = value
    assert session.modified is True
    with pytest.raises(TypeError, match="'bad one'"):
        session.save()
    assert session.modified is True
    session.modified = False
    session.modified = True
    with pytest.raises(TypeError, match="'bad one'"):
        session.save()
    del session["bad one"]
    session["n"] = 8
    session.save()
    assert SessionStore(session.session_key).load() == {"n": 8}


@pytest.mark.parametrize("key", [(1, 2), frozenset(), b"bytes", object()], ids=type)
def test_key_that_the_serialiser_refuses(store: redis.Redis, key: Any) -> None:
    session_key = stored({"n": 7})
    session = SessionStore(session_key)
    session[key] = 1
    assert session.modified is True
    session.modified = False
    session.modified = True
    with pytest.raises(TypeError, match=r"session key"):
        session.save()
    assert SessionStore(session_key).load() == {"n": 7}


def test_key_that_cannot_be_hashed_is_refused_as_by_a_dict(store: redis.Redis) -> None:
    session = SessionStore(stored({"n": 7}))
    with pytest.raises(TypeError):
        session[[]] = 1
    with pytest.raises(TypeError):
        session.get({})
    assert session["n"] == 7


KEYS = [
    "",
    " ",
    "a:b",
    "m:",
    "d:x",
    "line\nline\r\n",
    "nul\0",
    "\ud800",
    "ü",
    "\N{PILE OF POO}",
    "x" * 100_000,
    "_session_expiry ",
]


@pytest.mark.parametrize("key", KEYS, ids=lambda key: ascii(key)[:20])
def test_odd_keys(store: redis.Redis, key: str) -> None:
    session = SessionStore(stored({key: [1], "other": 1}))
    assert session[key] == [1]
    session[key].append(2)
    session.save()
    session = SessionStore(session.session_key)
    assert session.load() == {key: [1, 2], "other": 1}
    session.increment(f"{key}!")
    session.save()
    del session[key]
    session.cycle_key()
    assert SessionStore(session.session_key).load() == {f"{key}!": 1, "other": 1}


@pytest.mark.parametrize(
    ("key", "found"), [(1, "1"), (1.5, "1.5"), (None, "null"), (True, "true"), (-0.0, "-0.0")]
)
def test_key_that_is_no_string_becomes_what_json_makes_of_it(
    store: redis.Redis, key: Any, found: str
) -> None:
    session = SessionStore(stored({key: [1]}))
    assert session.load() == {found: [1]}
    session[found].append(2)
    session.save()
    mine = SessionStore()
    mine[key] = [1]
    mine.save()
    assert mine[key] == [1]
    mine[key].append(2)
    assert mine.modified
    mine.save()
    assert SessionStore(mine.session_key).load() == {found: [1, 2]}
    del mine[key]
    mine.save()
    assert SessionStore(mine.session_key).load() == {}


@pytest.mark.parametrize(
    "value",
    [2**31, 2**53, 2**53 + 1, 2**64, -(2**64), 10**400, 1e308, 5e-324, -0.0, "\ud800", "\0", ""],
    ids=lambda value: repr(value)[:12],
)
def test_values_at_the_edges(store: redis.Redis, value: Any) -> None:
    found = SessionStore(stored({"value": value}))["value"]
    assert (repr(found), type(found)) == (repr(value), type(value))


@pytest.mark.parametrize("start", [0, 2**53 - 1, 2**53, -(2**53), 2**64, 10**40])
@pytest.mark.parametrize("by", [1, -1, 2**53, 10**40, 0])
@pytest.mark.parametrize("policy", ["merge", "overwrite", "error"])
def test_counters_at_the_edges(
    store: redis.Redis, settings: Any, start: int, by: int, policy: str
) -> None:
    settings.CLUSTERED_SESSIONS_ON_CONFLICT = policy
    session = SessionStore(stored({"n": start}))
    for turn in (1, 2, 3):
        assert session.increment("n", by) == start + turn * by
        session.save()
        assert SessionStore(session.session_key).load() == {"n": start + turn * by}


@pytest.mark.parametrize("value", ["7", 7.0, True, None, [7], {}])
def test_only_an_integer_can_be_incremented(store: redis.Redis, value: Any) -> None:
    session = SessionStore(stored({"value": value}))
    with pytest.raises(TypeError, match="'value'"):
        session.increment("value")
    with pytest.raises(TypeError):
        session.increment("n", value)
    session.save()
    assert SessionStore(session.session_key).load() == {"value": value}


@pytest.mark.parametrize("value", [True, "text", 1.5, None, [1]])
def test_value_after_an_increment_is_the_one_that_counts(store: redis.Redis, value: Any) -> None:
    for key in (None, stored({"n": 7})):
        session = SessionStore(key)
        session.increment("n")
        session["n"] = value
        session.save()
        found = SessionStore(session.session_key)["n"]
        assert (found, type(found)) == (value, type(value))


def test_ten_thousand_keys(store: redis.Redis) -> None:
    values = {f"key {number}": number for number in range(10_000)}
    session = SessionStore(stored(values))
    assert SessionStore(session.session_key).load() == values
    session.update({key: number + 1 for key, number in values.items()})
    session.save()
    session.cycle_key()
    session = SessionStore(session.session_key)
    for number in range(0, 10_000, 2):
        del session[f"key {number}"]
    session.save()
    assert len(SessionStore(session.session_key).load()) == 5_000
    session.clear()
    session["n"] = 1
    session.save()
    assert SessionStore(session.session_key).load() == {"n": 1}
    session.update(values)
    for number in range(10_000):
        session.increment(f"counter {number}")
    session.save()
    assert len(SessionStore(session.session_key).load()) == 20_001


# Sizes.


def enlarge(request: HttpRequest) -> HttpResponse:
    request.session["n"] = 2
    request.session["much"] = random.Random(1).randbytes(1000).hex() + "!"
    return HttpResponse()


def test_session_that_is_too_large(browser: Browser, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_MAX_BYTES = 1000
    browser.visit(write)
    assert browser.visit(enlarge).status_code == 500
    assert browser.visit(read).content == b"1"
    browser.key = ""
    assert browser.visit(enlarge).status_code == 500
    assert browser.visit(read).content == b"None"


@pytest.mark.parametrize("operation", ["save", "create", "cycle_key"])
def test_size_is_counted_in_stored_bytes(store: redis.Redis, settings: Any, operation: str) -> None:
    settings.CLUSTERED_SESSIONS_MAX_BYTES = 1000
    key = stored({"n": 1})
    session = SessionStore(key)
    session["n"] = 2
    session["much"] = "!" * 2000
    with pytest.raises(SessionTooLarge) as caught:
        getattr(session, operation)()
    assert caught.value.limit == 1000
    assert caught.value.size > 2000
    assert key not in str(caught.value)
    assert SessionStore(key).load() == {"n": 1}
    assert len(records(store)) == 1
    session["much"] = "!"
    session.save()
    assert SessionStore(session.session_key).load() == {"n": 2, "much": "!"}


def test_session_that_has_become_too_large_can_shrink(store: redis.Redis, settings: Any) -> None:
    key = stored({"one": "!" * 2000, "two": "!" * 2000, "n": 1})
    settings.CLUSTERED_SESSIONS_MAX_BYTES = 1000
    session = SessionStore(key)
    del session["one"]
    session["n"] = 2
    session.save()
    assert SessionStore(key)["n"] == 2
    session["three"] = "!"
    with pytest.raises(SessionTooLarge):
        session.save()


def test_compressed_size_is_what_counts(store: redis.Redis, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_MAX_BYTES = 1000
    assert SessionStore(stored({"much": "!" * 100_000}))["much"] == "!" * 100_000


# Expiries.


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize(
    "nonsense", ["tomorrow", "", [], {}, float("nan"), float("inf"), "2026-13-45T00:00:00"]
)
def test_expiry_that_is_nonsense(
    browser: Browser, store: redis.Redis, create: bool, nonsense: Any
) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        request.session["_session_expiry"] = nonsense
        request.session["n"] = 2
        return HttpResponse()

    if not create:
        browser.visit(write)
    status = browser.visit(view).status_code
    # JSON makes a list or a dict that is empty no date either: false counts as Django's 0.
    assert status in (200, 500)
    assert browser.visit(write).status_code == 200
    assert browser.visit(read).content == b"1"


@pytest.mark.parametrize("every_request", [False, True])
@pytest.mark.parametrize("nonsense", ['"tomorrow"', "[]", "NaN", "{", '"9999-12-31T23:59:59"'])
def test_stored_expiry_that_is_nonsense(
    browser: Browser, store: redis.Redis, settings: Any, nonsense: str, every_request: bool
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = every_request
    browser.key = key = stored({"n": 7})
    store.hset(place(key).record, "d:_session_expiry", VERSION + b"s" + nonsense.encode())
    assert browser.visit(read).content == b"7"
    assert browser.visit(write).status_code == 200
    assert SessionStore(key)["n"] == 1


@pytest.mark.parametrize("expiry", [-1, -3600, -(10**9), -(10**30), timedelta(days=-1)])
@pytest.mark.parametrize("create", [False, True])
def test_expiry_in_the_past_ends_the_session(store: redis.Redis, create: bool, expiry: Any) -> None:
    session = SessionStore(None if create else stored({"n": 1}))
    session["n"] = 2
    session.set_expiry(expiry)
    session.save()
    assert session.session_key
    assert SessionStore().exists(session.session_key) is False
    assert SessionStore(session.session_key).load() == {}
    assert records(store) == []


@pytest.mark.parametrize(
    "expiry", [10**6, 10**10, 10**20, 1e300, 1.5, timedelta(days=36500), datetime(9999, 12, 31)]
)
@pytest.mark.parametrize("create", [False, True])
def test_expiry_far_ahead_or_between_seconds(
    browser: Browser, store: redis.Redis, settings: Any, create: bool, expiry: Any
) -> None:
    settings.USE_TZ = not isinstance(expiry, datetime)

    def view(request: HttpRequest) -> HttpResponse:
        request.session.set_expiry(expiry)
        return HttpResponse()

    if not create:
        browser.visit(write)
    response = browser.visit(view)
    assert response.status_code == 200
    assert int(response.cookies[COOKIE]["max-age"]) > 0
    session = SessionStore(browser.key)
    assert session.get_expiry_age() > 0
    assert session.get_expiry_date()
    assert session["_session_expiry"] is not None
    assert store.pttl(place(browser.key).record) > 0


@pytest.mark.parametrize("age", [0, -1, 30.5, 10**12])
def test_site_wide_age_at_the_edges(browser: Browser, settings: Any, age: Any) -> None:
    settings.SESSION_COOKIE_AGE = age
    assert browser.visit(write).status_code == 200
    assert browser.visit(read).content == (b"1" if age > 0 else b"None")


def test_site_wide_age_of_less_than_a_second(browser: Browser, settings: Any) -> None:
    settings.SESSION_COOKIE_AGE = 0.5
    assert browser.visit(write).status_code == 200
    key = browser.key
    wait_for(lambda: browser.visit(read).content == b"None", "it has expired")
    assert SessionStore(key).load() == {}


# Any value, under serialisers with and without stable bytes.


class PickleSerializer:
    """Write with pickle, which may write equal values differently."""

    def dumps(self, obj: Any) -> bytes:
        return pickle.dumps(obj)

    def loads(self, data: bytes) -> Any:
        return pickle.loads(data)


class SaltedSerializer:
    """Never write the same bytes twice, as a serialiser that encrypts does."""

    turn = 0

    def dumps(self, obj: Any) -> bytes:
        type(self).turn += 1
        return b"%d:%s" % (self.turn, json.dumps(obj).encode())

    def loads(self, data: bytes) -> Any:
        return json.loads(data.partition(b":")[2])


ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
SESSIONS = st.dictionaries(
    st.text().filter(lambda key: key != "_session_expiry"), VALUES, max_size=5
)
CALM = hypothesis_settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("serializer", ["JSON", "Pickle", "Salted"])
@CALM
@given(values=SESSIONS, more=SESSIONS)
def test_any_values_come_back_and_changes_are_seen(
    store: redis.Redis, settings: Any, serializer: str, values: Any, more: Any
) -> None:
    settings.SESSION_SERIALIZER = (
        "django.contrib.sessions.serializers.JSONSerializer"
        if serializer == "JSON"
        else f"{__name__}.{serializer}Serializer"
    )
    key = stored(values)
    session = SessionStore(key)
    assert repr(sorted(session.items())) == repr(sorted(values.items()))
    assert session.modified is False
    before = store.hgetall(place(key).record)
    session.save()
    after = store.hgetall(place(key).record)
    # What was only read is not written.
    assert {k: v for k, v in before.items() if k[:1] == b"d"} == {
        k: v for k, v in after.items() if k[:1] == b"d"
    }
    session["box"] = {"list": []}
    session.save()
    session = SessionStore(key)
    session["box"]["list"].append(list(more.items()))
    assert session.modified is True
    session.update(more)
    session.save()
    expected = values | {"box": {"list": [[list(pair) for pair in more.items()]]}} | more
    found = SessionStore(key).load()
    if serializer == "Pickle":
        expected = expected | {"box": {"list": [list(more.items())]}} | more
    assert repr(sorted(found.items())) == repr(sorted(expected.items()))


@pytest.mark.parametrize("serializer", ["JSON", "Pickle", "Salted"])
@pytest.mark.parametrize(
    ("before", "after"), [(1, True), (0, False), (1, 1.0), (0.0, -0.0), ("1", 1), ([], {})]
)
def test_change_of_type_alone_is_a_change(
    store: redis.Redis, settings: Any, serializer: str, before: Any, after: Any
) -> None:
    settings.SESSION_SERIALIZER = (
        "django.contrib.sessions.serializers.JSONSerializer"
        if serializer == "JSON"
        else f"{__name__}.{serializer}Serializer"
    )
    key = stored({"value": before, "box": {"value": before}})
    session = SessionStore(key)
    session["value"] = after
    session["box"]["value"] = after
    session.save()
    assert repr(SessionStore(key)["value"]) == repr(after)
    assert repr(SessionStore(key)["box"]) == repr({"value": after})


def test_keys_keep_their_type_under_pickle(store: redis.Redis, settings: Any) -> None:
    settings.SESSION_SERIALIZER = f"{__name__}.PickleSerializer"
    values = {1: [1], (1, 2): "tuple", None: 0, "1": "text", b"1": "bytes", 1.5: {}}
    session = SessionStore(stored(values))
    assert session.load() == values
    session[1].append(2)
    session[(1, 2)] = "changed"
    del session[None]
    session.save()
    assert SessionStore(session.session_key).load() == {
        1: [1, 2],
        (1, 2): "changed",
        "1": "text",
        b"1": "bytes",
        1.5: {},
    }


@pytest.mark.parametrize("policy", ["merge", "overwrite", "error"])
def test_counter_over_a_pickled_integer(store: redis.Redis, settings: Any, policy: str) -> None:
    settings.SESSION_SERIALIZER = f"{__name__}.PickleSerializer"
    settings.CLUSTERED_SESSIONS_ON_CONFLICT = policy
    key = stored({"n": 5})
    for _ in range(2):
        session = SessionStore(key)
        session.increment("n")
        session.save()
    assert SessionStore(key).load() == {"n": 7}
