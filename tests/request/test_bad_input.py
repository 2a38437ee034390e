"""Cookies, records, values and settings that nobody should send, and what becomes of them.

The tables of what is decided without a store are in ``tests/unit``: ``test_damaged_records``,
``test_odd_keys_and_values``, ``test_counters_at_edges``, ``test_expiry_values``.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from itertools import cycle
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
from tests.pairs import pairwise
from tests.serializers import Array
from tests.servers import wait_for

COOKIE = "sessionid"
VERSION = b"8 bytes."


@pytest.fixture(params=["wsgi", "asgi"])
def browser(request: pytest.FixtureRequest, store: redis.Redis, settings: Any) -> Browser:
    return Browser(settings, asgi=request.param == "asgi")


def in_turn(
    names: str, cases: Iterable[Any], ids: Iterable[str] | None = None
) -> pytest.MarkDecorator:
    """Return a mark for a test that takes the cases under WSGI and under ASGI in turn."""
    rows = [
        (kind, *(case if "," in names else [case]))
        for kind, case in zip(cycle(["wsgi", "asgi"]), cases, strict=False)
    ]
    return pytest.mark.parametrize(f"browser,{names}", rows, ids=ids, indirect=["browser"])


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

COOKIES = ["", "short77", "x" * 32, "line\r\nline\r\nSET x 1\r\n", "surrogate \ud800 \udfff"]


@pytest.mark.parametrize("cookie", COOKIES, ids=lambda cookie: ascii(cookie)[:20])
async def test_cookie_of_no_session_is_none(store: redis.Redis, cookie: str) -> None:
    def synchronously() -> None:
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

    await asyncio.to_thread(synchronously)
    assert len(records(store)) == 1
    session = SessionStore(cookie)
    assert await session.aload() == {}
    assert session.session_key is None
    assert await SessionStore().aexists(cookie) is False
    await SessionStore().adelete(cookie)
    mine = SessionStore(cookie)
    await mine.aset("n", 1)
    await mine.asave()
    assert mine.session_key not in (cookie, None)
    assert len(records(store)) == 2


@in_turn("cookie", ["x", "x" * 32, "x" * 100_000, '"quoted, with; all"', "\xff\xfe" * 10])
def test_request_with_an_unknown_cookie_has_no_session(
    browser: Browser, store: redis.Redis, cookie: str
) -> None:
    browser.key = cookie
    assert browser.visit(read).content == b"None"
    assert records(store) == []


def test_cookie_with_control_characters_has_no_session(
    browser: Browser, store: redis.Redis
) -> None:
    # Newer Pythons refuse to write such a cookie, and read it all the same.
    header = {"cookie": "sessionid=" + "a\tb" * 9}
    assert browser.visit(read, headers=header).content == b"None"
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


def replace(store: redis.Redis, record: str) -> None:
    store.set(record, "text")


def meta(change: Callable[[bytes], bytes]) -> Callable[[redis.Redis, str], None]:
    def damage(store: redis.Redis, record: str) -> None:
        store.hset(record, "m:", change(store.hget(record, "m:")))

    return damage


#: One for each line of Python or Lua that looks for damage.
DAMAGES = {
    "another type": replace,
    "meta missing": lambda store, record: store.hdel(record, "m:"),
    "meta empty": meta(lambda packed: b""),
    "meta cut": meta(lambda packed: packed[:-1]),
    "meta too long": meta(lambda packed: packed + b"\0"),
    "mode unknown": meta(lambda packed: packed[:1] + b"\xff" + packed[2:]),
}
each_damage = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


@pytest.mark.each_server
@pairwise(
    damage=DAMAGES,
    every_request=[False, True],
    browser=["wsgi", "asgi"],
    indirect=["browser"],
)
def test_damaged_record_is_no_session_and_no_error(
    browser: Browser, store: redis.Redis, settings: Any, damage: str, every_request: bool
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = every_request
    for view in (read, untouched, write):
        browser.key = damaged = stored({"n": 7})
        DAMAGES[damage](store, place(browser.key).record)
        response = browser.visit(view)
        assert response.status_code == 200, view
        if view is write:
            assert browser.key not in ("", damaged)
        # Whatever came out, the next visits work.
        assert browser.visit(write).status_code == 200
        assert browser.visit(read).content == b"1"


@pytest.mark.each_server
@in_turn("damage", DAMAGES.values(), ids=DAMAGES)
def test_record_damaged_during_a_request_is_an_ended_session(
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


@pytest.mark.each_server
@each_damage
def test_damaged_record_is_replaced_by_each_operation(store: redis.Redis, damage: Any) -> None:
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


@pytest.mark.each_server
@each_damage
def test_damaged_record_keeps_its_key(store: redis.Redis, damage: Any) -> None:
    key = stored({"n": 7})
    damage(store, place(key).record)
    session = SessionStore(key)
    with pytest.raises(CreateError):
        session.save(must_create=True)


@pytest.mark.each_server
def test_damaged_list_of_replays_stops_no_write(browser: Browser, store: redis.Redis) -> None:
    browser.key = stored({"n": 7})
    for log in place(browser.key).writes:
        store.hset(log, mapping={b"\xff" * 8: b"\xff", b"": b"x"})
    assert browser.visit(increment).content == b"8"
    assert browser.visit(increment).content == b"9"


#: The store sees a difference between these; it never looks into others.
UNREADABLE = {
    "empty": b"",
    "short": b"abc",
    "not JSON": VERSION + b"s" + b"{",
    "no counter": VERSION + b"i" + b"many",
}


@in_turn("value", UNREADABLE.values(), ids=UNREADABLE)
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


def test_field_that_is_no_key_moves_along(store: redis.Redis) -> None:
    key = stored({"n": 7})
    fields = {"d:\udcff".encode("utf-8", "surrogateescape"): b"x", b"k:{": b"y", b"z:new": b"z"}
    store.hset(place(key).record, mapping=fields)
    session = SessionStore(key)
    assert session.load() == {"n": 7}
    session["n"] = 8
    session.cycle_key()
    record = store.hgetall(place(session.session_key).record)
    assert fields.items() <= record.items()


@in_turn("every_request", [False, True])
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


@pytest.mark.each_server
def test_damaged_index_ends_no_session(store: redis.Redis) -> None:
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


@in_turn("view", [refused, refused_in_place])
def test_value_that_the_serialiser_refuses_saves_nothing(browser: Browser, view: Any) -> None:
    browser.key = key = stored({"n": 7, "bad one": {}})
    assert browser.visit(view).status_code == 500
    assert SessionStore(key).load() == {"n": 7, "bad one": {}}
    assert browser.visit(write).status_code == 200


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize("value", [object(), {(1, 2): 3}], ids=type)
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


def test_key_that_the_serialiser_refuses_saves_nothing(store: redis.Redis) -> None:
    session_key = stored({"n": 7})
    session = SessionStore(session_key)
    session[(1, 2)] = 1
    assert session.modified is True
    session.modified = False
    session.modified = True
    with pytest.raises(TypeError, match=r"session key"):
        session.save()
    assert SessionStore(session_key).load() == {"n": 7}


def test_key_without_a_hash_is_refused_as_by_a_dict(store: redis.Redis) -> None:
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


def test_odd_keys_come_back(store: redis.Redis) -> None:
    session = SessionStore(stored(dict.fromkeys(KEYS, [1]) | {"other": 1}))
    for key in KEYS:
        assert session[key] == [1]
        session[key].append(2)
    session.save()
    session = SessionStore(session.session_key)
    assert session.load() == dict.fromkeys(KEYS, [1, 2]) | {"other": 1}
    for key in KEYS:
        session.increment(f"{key}!")
    session.save()
    for key in KEYS:
        del session[key]
    session.cycle_key()
    counters = {f"{key}!": 1 for key in KEYS}
    assert SessionStore(session.session_key).load() == counters | {"other": 1}


def test_key_that_is_no_string_is_what_json_makes_of_it(store: redis.Redis) -> None:
    session = SessionStore(stored({1.5: [1]}))
    assert session.load() == {"1.5": [1]}
    session["1.5"].append(2)
    session.save()
    mine = SessionStore()
    mine[None] = [1]
    mine.save()
    assert mine[None] == [1]
    mine[None].append(2)
    assert mine.modified
    mine.save()
    assert SessionStore(mine.session_key).load() == {"null": [1, 2]}
    del mine[None]
    mine.save()
    assert SessionStore(mine.session_key).load() == {}


def test_values_at_the_edges_come_back(store: redis.Redis) -> None:
    values = [2**53, 2**53 + 1, -(2**64), 10**400, 1e308, 5e-324, -0.0, "\ud800", "\0", ""]
    found = SessionStore(stored({f"value {at}": value for at, value in enumerate(values)}))
    for at, value in enumerate(values):
        one = found[f"value {at}"]
        assert (repr(one), type(one)) == (repr(value), type(value))


@pytest.mark.each_server
@pytest.mark.parametrize(
    ("start", "by", "policy"),
    [
        (2**53 - 1, 1, "merge"),
        (2**53, -1, "overwrite"),
        (-(2**53), 1, "error"),
        (2**53 - 3, 1, "overwrite"),
        (2**64, 10**40, "merge"),
        (10**40, 0, "error"),
    ],
)
def test_counters_at_the_edges_are_exact(
    store: redis.Redis, settings: Any, start: int, by: int, policy: str
) -> None:
    settings.CLUSTERED_SESSIONS_ON_CONFLICT = policy
    session = SessionStore(stored({"n": start}))
    for turn in (1, 2, 3):
        assert session.increment("n", by) == start + turn * by
        session.save()
        assert SessionStore(session.session_key).load() == {"n": start + turn * by}


@pytest.mark.each_server
@pytest.mark.parametrize("policy", ["merge", "overwrite"])
@pytest.mark.parametrize("is_counter", [False, True])
def test_counts_of_two_requests_at_the_edge_are_exact(
    store: redis.Redis, settings: Any, is_counter: bool, policy: str
) -> None:
    settings.CLUSTERED_SESSIONS_ON_CONFLICT = policy
    key = stored({"n": 2**53 - 5})
    if is_counter:
        made = SessionStore(key)
        made.increment("n")
        made.save()
    start = SessionStore(key)["n"]
    mine, other = SessionStore(key), SessionStore(key)
    assert mine.increment("n", 3) == start + 3
    other.increment("n", 2)
    other.save()
    mine.save()
    assert SessionStore(key).load() == {"n": start + 5}


def test_only_an_integer_can_be_incremented(store: redis.Redis) -> None:
    session = SessionStore(stored({"value": "7"}))
    with pytest.raises(TypeError, match="'value'"):
        session.increment("value")
    with pytest.raises(TypeError):
        session.increment("n", "7")  # type: ignore[arg-type]
    session.save()
    assert SessionStore(session.session_key).load() == {"value": "7"}


@pytest.mark.parametrize("value", [True, [1]], ids=repr)
def test_value_set_after_an_increment_counts(store: redis.Redis, value: Any) -> None:
    for key in (None, stored({"n": 7})):
        session = SessionStore(key)
        session.increment("n")
        session["n"] = value
        session.save()
        found = SessionStore(session.session_key)["n"]
        assert (found, type(found)) == (value, type(value))


@pytest.mark.full
def test_session_of_ten_thousand_keys_works(store: redis.Redis) -> None:
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


def test_too_large_session_saves_nothing(browser: Browser, settings: Any) -> None:
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


@in_turn(
    "create,nonsense",
    [(False, "tomorrow"), (True, "tomorrow"), (True, []), (False, {}), (False, float("inf"))],
)
def test_nonsense_as_an_expiry_harms_no_later_request(
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


@in_turn(
    "every_request,nonsense",
    [
        (False, '"tomorrow"'),
        (True, '"tomorrow"'),
        (True, "{"),
        (False, "[]"),
        (False, "NaN"),
        (True, '"9999-12-31T23:59:59"'),
    ],
)
def test_nonsense_as_a_stored_expiry_harms_nothing(
    browser: Browser, store: redis.Redis, settings: Any, nonsense: str, every_request: bool
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = every_request
    browser.key = key = stored({"n": 7})
    store.hset(place(key).record, "d:_session_expiry", VERSION + b"s" + nonsense.encode())
    assert browser.visit(read).content == b"7"
    assert browser.visit(write).status_code == 200
    session = SessionStore(key)
    assert session["n"] == 1
    assert session.get_expiry_date()


@pytest.mark.parametrize(
    ("create", "expiry"),
    [
        *((False, -1), (True, -(10**30)), (False, timedelta(days=-1)), (True, timedelta(days=-1))),
        *((False, datetime.min), (True, datetime.min.replace(tzinfo=UTC))),
    ],
)
def test_expiry_in_the_past_ends_the_session(store: redis.Redis, create: bool, expiry: Any) -> None:
    session = SessionStore(None if create else stored({"n": 1}))
    session["n"] = 2
    session.set_expiry(expiry)
    session.save()
    assert session.session_key
    assert SessionStore().exists(session.session_key) is False
    assert SessionStore(session.session_key).load() == {}
    assert records(store) == []


@in_turn(
    "create,expiry",
    [
        (False, 10**20),
        (True, 1e300),
        (True, 1.5),
        (False, timedelta(days=36500)),
        (True, datetime(9999, 12, 31)),
        (False, datetime(9999, 12, 31)),
        *((create, datetime.max) for create in (True, False)),
        *((create, datetime.max.replace(tzinfo=UTC)) for create in (True, False)),
    ],
)
def test_expiry_far_ahead_or_between_seconds_holds(
    browser: Browser, store: redis.Redis, settings: Any, create: bool, expiry: Any
) -> None:
    settings.USE_TZ = not isinstance(expiry, datetime) or expiry.tzinfo is not None

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
    if isinstance(expiry, datetime):
        assert session.get_expiry_date() == expiry
    assert session["_session_expiry"] is not None
    assert store.pttl(place(browser.key).record) > 0


@in_turn("age", [0, -1, 30.5, 10**12])
def test_site_wide_age_at_the_edges_holds(browser: Browser, settings: Any, age: Any) -> None:
    settings.SESSION_COOKIE_AGE = age
    assert browser.visit(write).status_code == 200
    assert browser.visit(read).content == (b"1" if age > 0 else b"None")


@in_turn("age", [0.5])
def test_site_wide_age_of_less_than_a_second_ends(
    browser: Browser, settings: Any, age: float
) -> None:
    settings.SESSION_COOKIE_AGE = age
    assert browser.visit(write).status_code == 200
    key = browser.key
    wait_for(lambda: browser.visit(read).content == b"None", "it has expired")
    assert SessionStore(key).load() == {}


# Any value, under serialisers with and without stable bytes.


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


@pytest.mark.full
@pytest.mark.parametrize("serializer", ["JSON", "Pickle", "Salted"])
@CALM
@given(values=SESSIONS, more=SESSIONS)
def test_any_values_come_back_and_changes_are_seen(
    store: redis.Redis, settings: Any, serializer: str, values: Any, more: Any
) -> None:
    settings.SESSION_SERIALIZER = (
        "django.contrib.sessions.serializers.JSONSerializer"
        if serializer == "JSON"
        else f"tests.serializers.{serializer}Serializer"
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
def test_change_of_type_alone_is_a_change(
    store: redis.Redis, settings: Any, serializer: str
) -> None:
    settings.SESSION_SERIALIZER = (
        "django.contrib.sessions.serializers.JSONSerializer"
        if serializer == "JSON"
        else f"tests.serializers.{serializer}Serializer"
    )
    pairs = [(1, True), (0, False), (1, 1.0), (0.0, -0.0), ("1", 1), ([], {})]
    key = stored({f"{n}": before for n, (before, _) in enumerate(pairs)})
    session = SessionStore(key)
    for n, (_, after) in enumerate(pairs):
        session[f"{n}"] = after
    session.save()
    found = SessionStore(key)
    assert [repr(found[f"{n}"]) for n in range(len(pairs))] == [repr(after) for _, after in pairs]


def test_keys_keep_their_type_under_pickle(store: redis.Redis, settings: Any) -> None:
    settings.SESSION_SERIALIZER = "tests.serializers.PickleSerializer"
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


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_conflict_of_arrays_loses_nothing_else(
    store: redis.Redis, settings: Any, is_wrapped: bool
) -> None:
    settings.SESSION_SERIALIZER = "tests.serializers.PickleSerializer"

    def value(number: int) -> Any:
        return {"chart": Array(number, number)} if is_wrapped else Array(number, number)

    key = stored({"v": value(1), "untouched": value(1)})
    one, other = SessionStore(key), SessionStore(key)
    assert one.load().keys() == other.load().keys()
    one["v"] = value(2)
    one.save()
    other["v"] = value(3)
    other["note"] = "kept"
    other.save()
    expected = {"v": value(3), "untouched": value(1), "note": "kept"}
    for session in (other, SessionStore(key)):
        assert repr(sorted(session.items())) == repr(sorted(expected.items()))


@pytest.mark.parametrize("policy", ["merge", "overwrite", "error"])
def test_counter_over_a_pickled_integer(store: redis.Redis, settings: Any, policy: str) -> None:
    settings.SESSION_SERIALIZER = "tests.serializers.PickleSerializer"
    settings.CLUSTERED_SESSIONS_ON_CONFLICT = policy
    key = stored({"n": 5})
    for _ in range(2):
        session = SessionStore(key)
        session.increment("n")
        session.save()
    assert SessionStore(key).load() == {"n": 7}
