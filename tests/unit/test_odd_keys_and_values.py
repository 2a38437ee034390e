"""Session keys, keys in a session, and values that nobody should use: what becomes of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from django_clustered_sessions.protocol import record
from django_clustered_sessions.protocol.changes import Change, Operation
from django_clustered_sessions.protocol.record import Serializer, SessionKeys
from django_clustered_sessions.protocol.session_data import SessionData
from django_clustered_sessions.session.value_serializer import JSONSerializer
from tests.serializers import PickleSerializer, SaltedSerializer

VERSION = b"version0"


SERIALIZERS = [JSONSerializer, PickleSerializer, SaltedSerializer]


def created(values: dict[Any, Any], serializer: Serializer | None = None) -> dict[bytes, bytes]:
    """Return what the store holds of a new session with the values."""
    new = SessionData(serializer or JSONSerializer(), cleared=True)
    new.update(values)
    return {field: VERSION + packed for field, packed in new.everything()}


def loaded(values: dict[Any, Any], serializer: Serializer | None = None) -> SessionData:
    """Return a session with the values, as a request has it that loads it."""
    return SessionData(serializer or JSONSerializer(), created(values, serializer))


def saved(
    session: SessionData, version: bytes = b"version1", serializer: Serializer | None = None
) -> dict[Any, Any]:
    """Write what has changed, and return what the next request finds."""
    delta = session.changes()
    additions = [change for change in delta.fields if change.operation is Operation.ADD]
    numbers = [session[record.key_of(one.field, JSONSerializer())] for one in additions]
    session.written(delta, version, numbers)
    return SessionData(serializer or JSONSerializer(), session.stored).copy()


# Session keys, which are what a cookie says.

COOKIES = [
    "",
    "x",
    "x" * 100_000,
    "../../../../etc/passwd",
    "session:{000}:index",
    "*" * 32,
    "ümlaut" * 6,
    "emoji\N{PILE OF POO}" * 5,
    "nul\0nul\0nul\0",
    "line\r\nline\r\nSET x 1\r\n",
    "surrogate \ud800 \udfff",
    "{}" * 16,
]


@pytest.mark.parametrize("cookie", COOKIES, ids=lambda cookie: ascii(cookie)[:20])
def test_key_in_the_store_takes_nothing_from_a_cookie(cookie: str) -> None:
    place = SessionKeys.of("session", cookie)
    bucket, _, public_id = place.record.rpartition(":")
    assert bucket == f"session:{{{bucket[9:12]}}}"
    assert int(bucket[9:12], 16) < record.BUCKETS
    assert record.session_id(cookie) == public_id == place.id
    assert SessionKeys.of_id("session", public_id) == place


# Keys.

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
def test_odd_key_is_a_key_as_others(key: str) -> None:
    session = loaded({key: [1], "other": 1})
    assert session[key] == [1]
    session[key].append(2)
    assert session.changed_in_place()
    assert saved(session) == {key: [1, 2], "other": 1}
    session.increment(f"{key}!", 1)
    del session[key]
    assert saved(session, b"version2") == {f"{key}!": 1, "other": 1}
    assert not session.changes().expiry_changed and not session.changes().changes_user


@pytest.mark.parametrize(
    ("key", "found"), [(1, "1"), (1.5, "1.5"), (None, "null"), (True, "true"), (-0.0, "-0.0")]
)
def test_key_that_is_no_string_is_what_json_says(key: Any, found: str) -> None:
    assert loaded({key: [1]}).copy() == {found: [1]}
    mine = SessionData(JSONSerializer())
    mine[key] = [1]
    assert saved(mine) == {found: [1]}
    assert mine[key] == [1]
    mine[key].append(2)
    assert mine.changed_in_place()
    assert saved(mine, b"version2") == {found: [1, 2]}
    del mine[key]
    assert saved(mine, b"version3") == {}


@pytest.mark.parametrize("key", [(1, 2), frozenset(), b"bytes", object()], ids=type)
def test_key_that_the_serialiser_refuses_is_named(key: Any) -> None:
    session = loaded({"n": 7})
    session[key] = 1
    assert session.changed_in_place()
    session.settle()
    for write in (session.changes, session.everything):
        with pytest.raises(TypeError, match=r"session key"):
            write()


def test_keys_keep_their_type_under_pickle() -> None:
    values = {1: [1], (1, 2): "tuple", None: 0, "1": "text", b"1": "bytes", 1.5: {}}
    session = loaded(values, PickleSerializer())
    assert session.copy() == values
    session[1].append(2)
    session[(1, 2)] = "changed"
    del session[None]
    expected = {1: [1, 2], (1, 2): "changed", "1": "text", b"1": "bytes", 1.5: {}}
    assert saved(session, serializer=PickleSerializer()) == expected


# Values.


@pytest.mark.parametrize("serializer", SERIALIZERS)
@pytest.mark.parametrize(
    "value",
    [2**31, 2**53, 2**53 + 1, 2**64, -(2**64), 10**400, 1e308, 5e-324, -0.0, "\ud800", "\0", ""],
    ids=lambda value: repr(value)[:12],
)
def test_value_at_the_edge_comes_back(serializer: Any, value: Any) -> None:
    found = loaded({"value": value}, serializer())["value"]
    assert (repr(found), type(found)) == (repr(value), type(value))


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]
REFUSED = {
    "object": object(),
    "set": {1, 2},
    "circle": CIRCLE,
    "deep": DEEP,
    "tuple as a key": {(1, 2): 3},
    "bytes": b"bytes",
}


@pytest.mark.parametrize("value", REFUSED.values(), ids=REFUSED)
def test_value_that_the_serialiser_refuses_is_named(value: Any) -> None:
    session = loaded({"n": 7})
    session["bad one"] = value
    assert session.changed_in_place()
    session.settle()
    for write in (session.changes, session.everything, session.snapshot):
        with pytest.raises(TypeError, match=r"'bad one': JSONSerializer cannot write"):
            write()
    del session["bad one"]
    session["n"] = 8
    assert saved(session) == {"n": 8}


@pytest.mark.parametrize("serializer", SERIALIZERS)
@pytest.mark.parametrize(
    ("before", "after"), [(1, True), (0, False), (1, 1.0), (0.0, -0.0), ("1", 1), ([], {})]
)
def test_change_of_type_alone_is_a_change(serializer: Any, before: Any, after: Any) -> None:
    session = loaded({"value": before, "box": {"value": before}}, serializer())
    session["value"] = after
    session["box"]["value"] = after
    assert session.changed_in_place()
    found = saved(session, serializer=serializer())
    assert repr(found["value"]) == repr(after)
    assert repr(found["box"]) == repr({"value": after})


ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
SESSIONS = st.dictionaries(st.text(), VALUES, max_size=5)


@pytest.mark.parametrize("serializer", SERIALIZERS)
@hypothesis_settings(max_examples=30)
@given(values=SESSIONS, more=SESSIONS)
def test_any_values_come_back_and_changes_are_seen(
    serializer: Any, values: dict[str, Any], more: dict[str, Any]
) -> None:
    session = loaded(values, serializer())
    assert repr(sorted(session.items())) == repr(sorted(values.items()))
    # What was only read is not written.
    assert not session.changed_in_place()
    assert not session.changes()
    session["box"] = {"list": []}
    assert saved(session, serializer=serializer())["box"] == {"list": []}
    session = SessionData(serializer(), session.stored)
    session["box"]["list"].append(list(more.items()))
    assert session.changed_in_place()
    session.update(more)
    pair = tuple if serializer is PickleSerializer else list
    expected = values | {"box": {"list": [[pair(item) for item in more.items()]]}} | more
    assert repr(sorted(saved(session, serializer=serializer()).items())) == repr(
        sorted(expected.items())
    )


def test_pickled_integer_becomes_a_counter() -> None:
    session = loaded({"n": 5}, PickleSerializer())
    session.increment("n", 1)
    expected = Change(Operation.SET_COUNTER, b"d:n", VERSION, b"i6")
    assert session.changes().fields == (expected,)
    assert saved(session, serializer=PickleSerializer()) == {"n": 6}
    session.increment("n", 1)
    assert session.changes().fields == (Change(Operation.ADD, b"d:n", b"", b"1"),)
