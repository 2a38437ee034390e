"""The faster serialisers: what they write and refuse is what Django's own does."""

from __future__ import annotations

import datetime
import enum
import uuid
from typing import Any

import pytest
import redis
from django.contrib.sessions.serializers import JSONSerializer
from hypothesis import given
from hypothesis import strategies as st

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.checks.settings import check_settings
from django_clustered_sessions.serializers import MsgspecSerializer
from django_clustered_sessions.session import values as short
from django_clustered_sessions.session.values import serializer_of

DJANGOS = JSONSerializer()
either = pytest.mark.parametrize("ours", [MsgspecSerializer(), short.JSONSerializer()])


class Colour(enum.Enum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


class Word(enum.StrEnum):
    A = "a"


class Real(float):
    pass


VALUES: list[Any] = [
    *(None, True, 0, -1, 2**53, 2**63, 2**64, -(2**63) - 1, 2**200),
    *(1.5, -0.0, 1e16, 1e-7, 1e400, float("nan"), float("inf"), [float("nan")], Real(2.5)),
    *("", "a", "é", "😀", "\ud800", "\x00", "\u2028", '"\\/</script>'),
    *([], {}, (1, (2, [3])), {"a": [None, {"b": ()}]}, {1: 2}, {None: 1, True: 2}, {1.5: 1}),
    *(Number.ONE, Word.A, {Word.A: Number.ONE}, {Number.ONE: 1}),
    *(Colour.RED, [Colour.RED], uuid.UUID(int=1), {"u": uuid.UUID(int=1)}, {uuid.UUID(int=1): 1}),
    *(datetime.datetime(2026, 1, 1), datetime.date(2026, 1, 1), datetime.timedelta(1)),
    *({1}, frozenset("a"), b"x", bytearray(b"x"), object(), 1j, {(1, 2): 3}),
]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text() | st.integers() | st.none() | st.booleans(), inner)
    ),
    max_leaves=20,
)


def same(ours: Any, value: Any) -> None:
    try:
        expected = repr(DJANGOS.loads(DJANGOS.dumps(value)))
    except Exception as error:
        with pytest.raises(type(error)):
            ours.dumps(value)
        return
    for writer in (DJANGOS, ours):
        for reader in (DJANGOS, ours):
            assert repr(reader.loads(writer.dumps(value))) == expected


@either
@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_same_result_or_same_error(ours: Any, value: Any) -> None:
    same(ours, value)


@either
@given(value=JSON)
def test_same_result_for_any_json(ours: Any, value: Any) -> None:
    same(ours, value)


@pytest.mark.parametrize("data", [b" 1", b"1 ", b"[1] 2", b"", b"{", b'"\xe9"', b"nan"])
def test_what_somebody_else_wrote_reads_the_same(data: bytes) -> None:
    try:
        expected = DJANGOS.loads(data)
    except ValueError as error:
        with pytest.raises(type(error)):
            short.JSONSerializer().loads(data)
    else:
        assert short.JSONSerializer().loads(data) == expected


def test_djangos_own_is_short_and_no_other() -> None:
    class Signing(JSONSerializer):
        pass

    assert type(serializer_of(JSONSerializer)) is short.JSONSerializer
    assert type(serializer_of(Signing)) is Signing
    assert type(serializer_of(MsgspecSerializer)) is MsgspecSerializer


def test_nodes_with_either_share_sessions(store: redis.Redis, settings: Any) -> None:
    ours = f"{MsgspecSerializer.__module__}.{MsgspecSerializer.__qualname__}"
    values = {"n": 1, "cart": {"tea": 2, "été": None}, "1": [1.5, "x" * 5000]}
    session = SessionStore()
    session.update(values)
    session.create()
    for serializer in (ours, settings.SESSION_SERIALIZER, ours):
        settings.SESSION_SERIALIZER = serializer
        assert check_settings() == []
        session = SessionStore(session.session_key)
        assert session.load() == values
        session["n"] = values["n"] = values["n"] + 1
        session["cart"]["tea"] += 1
        values["cart"]["tea"] += 1
        session.save()


def test_a_value_that_is_refused_is_told_with_the_sites_serialiser(store: redis.Redis) -> None:
    session = SessionStore()
    session["seen"] = {1}
    with pytest.raises(TypeError, match="session key 'seen': JSONSerializer cannot write set"):
        session.save()
