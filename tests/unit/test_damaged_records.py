"""Damage by somebody else: a record, a reply or a value that no release has written."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.sessions.serializers import JSONSerializer

from django_clustered_sessions.protocol.changes import Change, Operation
from django_clustered_sessions.protocol.commands import (
    event_stream,
    lock_queue,
    records,
    replication,
    script_calls,
    users,
)
from django_clustered_sessions.protocol.record import (
    Damaged,
    EndReason,
    Loaded,
    NewerFormat,
    SessionKeys,
)
from django_clustered_sessions.protocol.results import Exists, Gone
from django_clustered_sessions.protocol.session_data import SessionData

VERSION = b"8 bytes."
META = bytes.fromhex("0164" + "0102030405060708" + "000000000001" + "0000000000ff" + "00" * 24)

# Records.

DAMAGES = {
    "another hash": {b"some": b"field"},
    "meta missing": {b"d:n": VERSION + b"s7"},
    "meta empty": {b"m:": b""},
    "meta of one byte": {b"m:": META[:1]},
    "meta cut": {b"m:": META[:-1]},
    "meta too long": {b"m:": META + b"\0"},
    "mode unknown": {b"m:": META[:1] + b"\xff" + META[2:]},
    "mode only on its way": {b"m:": META[:1] + b"?" + META[2:]},
}


@pytest.mark.parametrize("fields", DAMAGES.values(), ids=DAMAGES)
def test_damaged_record_is_no_session(fields: dict[bytes, bytes]) -> None:
    with pytest.raises(Damaged, match="its meta field is"):
        Loaded.parse(fields)


# Replies.

GONE = Gone(0, EndReason.UNKNOWN)
PARSED: list[tuple[Any, Any]] = [
    (records.parse_exists, False),
    (records.parse_why, EndReason.UNKNOWN),
    (records.parse_create, Exists(0)),
    (records.parse_commit, GONE),
    (records.parse_touch, GONE),
    (records.parse_end, None),
    (event_stream.parse_sweep, 0),
    (event_stream.parse_take, []),
    (users.parse_owned, []),
    (users.parse_claim, None),
    (records.parse_rotate, GONE),
    (records.parse_leave, GONE),
    (lock_queue.parse_acquire, GONE),
    (lock_queue.parse_release, None),
    (lock_queue.parse_renew, None),
]


def name_of(parameter: Any) -> str | None:
    return getattr(parameter, "__name__", "expected")


@pytest.mark.parametrize(("parse", "expected"), PARSED, ids=name_of)
def test_key_of_another_type_is_no_session(parse: Any, expected: Any) -> None:
    assert parse(Damaged("its key holds another type")) == expected


def test_refused_write_is_not_taken_for_acknowledged() -> None:
    write = records.end(SessionKeys.of("session", "key"), EndReason.FLUSHED, 0)
    assert replication.parse_acknowledged(write, NewerFormat(), 1, [b"5", b"0"]) is None


@pytest.mark.parametrize("parse", [records.parse_read, records.parse_look], ids=name_of)
def test_damage_reaches_who_reads(parse: Any) -> None:
    with pytest.raises(Damaged, match="another type"):
        parse([Damaged("its key holds another type"), [b"0", b"0"]])


@pytest.mark.parametrize("parse", [parse for parse, _ in PARSED[2:]], ids=name_of)
def test_newer_format_is_refused_in_each_reply(parse: Any) -> None:
    with pytest.raises(NewerFormat, match="newer release"):
        parse([script_calls.Status.NEWER.value, 5, b""])


# Values.

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
each_unreadable = pytest.mark.parametrize("value", UNREADABLE.values(), ids=UNREADABLE)


def session_with(value: bytes) -> tuple[SessionData, list[Any]]:
    """Return a session that holds the value, and the list of the keys that it sets aside."""
    told: list[Any] = []
    session = SessionData(
        JSONSerializer(),
        {b"d:n": VERSION + b"s7", b"d:odd": value},
        on_unreadable=lambda key, error: told.append(key),
    )
    return session, told


@each_unreadable
def test_unreadable_value_is_set_aside(value: bytes) -> None:
    session, told = session_with(value)
    assert "odd" not in session
    assert session.get("odd", "default") == "default"
    with pytest.raises(KeyError):
        session["odd"]
    with pytest.raises(KeyError):
        del session["odd"]
    assert session.pop("odd", None) is None
    assert session.copy() == {"n": 7}
    assert session.as_stored("odd")
    assert told == ["odd"]
    session["n"] += 1
    assert [change.field for change in session.changes().fields] == [b"d:n"]
    # As it is stored, for a session that moves to another key.
    assert dict(session.everything())[b"d:odd"] == value[len(VERSION) :]


@each_unreadable
def test_new_value_replaces_an_unreadable_one(value: bytes) -> None:
    for has_looked in (False, True):
        session, _ = session_with(value)
        if has_looked:
            assert "odd" not in session
        session["odd"] = "new"
        expected = Change(Operation.SET, b"d:odd", value[: len(VERSION)], b's"new"')
        assert session.changes().fields == (expected,)


@each_unreadable
def test_unreadable_counter_starts_anew(value: bytes) -> None:
    session, _ = session_with(value)
    assert session.increment("odd", 3) == 3
    expected = Change(Operation.SET_COUNTER, b"d:odd", value[: len(VERSION)], b"i3")
    assert session.changes().fields == (expected,)


def test_field_that_is_no_key_is_kept() -> None:
    odd = {b"d:\xff": b"x", b"k:{": b"y", b"z:new": b"z"}
    told: list[Any] = []
    session = SessionData(
        JSONSerializer(),
        {b"d:n": VERSION + b"s7"} | odd,
        on_unreadable=lambda key, error: told.append(key),
    )
    assert session.copy() == {"n": 7}
    assert len(told) == len(odd)
    session["n"] = 8
    assert [change.field for change in session.changes().fields] == [b"d:n"]
    assert odd.keys() < dict(session.everything()).keys()
