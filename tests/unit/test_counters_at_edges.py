"""Counters where Lua's numbers end: what the store may add to, and what is written as a sum."""

from __future__ import annotations

import pytest
from django.contrib.sessions.serializers import JSONSerializer

from django_clustered_sessions.protocol.changes import Change, Operation
from django_clustered_sessions.protocol.session_data import SessionData

FIELD = b"d:n"
EXACT = 2**53


@pytest.mark.parametrize("by", [1, -1, EXACT, 10**40, 0])
@pytest.mark.parametrize("start", [0, EXACT - 1, EXACT, -EXACT, 2**64, 10**40])
def test_store_adds_only_where_the_sum_is_exact(start: int, by: int) -> None:
    session = SessionData(JSONSerializer(), {FIELD: b"version0s%d" % start})
    version, is_counter = b"version0", False
    for turn in (1, 2, 3):
        total = start + turn * by
        assert session.increment("n", by) == total
        delta = session.changes()
        if not by:
            assert not delta
            continue
        is_exact = abs(total) < EXACT
        if is_counter and is_exact:
            expected = Change(Operation.ADD, FIELD, b"", b"%d" % by)
        else:
            packed = (b"i%d" if is_exact else b"s%d") % total
            expected = Change(Operation.SET_COUNTER, FIELD, version, packed)
        assert delta.fields == (expected,)
        assert delta.sums == {FIELD}
        version, is_counter = b"version%d" % turn, is_exact
        is_added = expected.operation is Operation.ADD
        session.written(delta, version, [total] if is_added else [])
        assert not session.changes()
        assert SessionData(JSONSerializer(), session.stored).copy() == {"n": total}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("steps", [[2 * EXACT - 5], [EXACT - 1, EXACT - 2], [EXACT]])
def test_step_beyond_what_lua_counts_is_a_value(sign: int, steps: list[int]) -> None:
    start = -sign * (EXACT - 1)
    session = SessionData(JSONSerializer(), {FIELD: b"version0i%d" % start})
    for step in steps:
        session.increment("n", sign * step)
    total = start + sign * sum(steps)
    expected = Change(Operation.SET_COUNTER, FIELD, b"version0", b"i%d" % total)
    assert session.changes().fields == (expected,)
    session.rebase({FIELD: b"version1i%d" % (start + sign)})
    (change,) = session.changes().fields
    assert change == expected._replace(loaded=b"version1", operand=b"i%d" % (total + sign))


@pytest.mark.parametrize("value", [True, "text", 1.5, None, [1]])
def test_value_set_after_an_increment_counts(value: object) -> None:
    for stored in ({}, {FIELD: b"version0s7"}, {FIELD: b"version0i7"}):
        session = SessionData(JSONSerializer(), stored)
        session.increment("n", 1)
        session["n"] = value
        (change,) = session.changes().fields
        assert change.operation is Operation.SET
        session.written(session.changes(), b"version1", [])
        found = SessionData(JSONSerializer(), session.stored)["n"]
        assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("value", ["7", 7.0, True, None, [7], {}])
def test_only_an_integer_can_be_incremented(value: object) -> None:
    session = SessionData(
        JSONSerializer(), {b"d:value": b"version0s" + JSONSerializer().dumps(value)}
    )
    with pytest.raises(TypeError, match="'value'"):
        session.increment("value", 1)
    with pytest.raises(TypeError, match="'n'"):
        session.increment("n", value)  # type: ignore[arg-type]
    assert not session.changes()
    assert session.copy() == {"value": value}
