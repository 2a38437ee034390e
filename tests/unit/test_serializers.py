"""The faster serialisers: what they write and refuse is what Django's own does."""

from __future__ import annotations

import datetime
import enum
import uuid
from typing import Any

import pytest
from django.contrib.sessions.serializers import JSONSerializer
from hypothesis import given
from hypothesis import strategies as st

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.serializers import MsgspecSerializer
from django_clustered_sessions.session import value_serializer as short

DJANGOS = JSONSerializer()
either = pytest.mark.parametrize(
    "ours", [MsgspecSerializer(), short.JSONSerializer()], ids=["msgspec", "short"]
)


class Colour(enum.Enum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


class Word(enum.StrEnum):
    A = "a"


class Real(float):
    pass


VALUES: dict[str, tuple[Any, ...]] = {
    "constants and integers": (None, True, 0, -1, 2**53, 2**63, 2**64, -(2**63) - 1, 2**200),
    "floats": (1.5, -0.0, 1e16, 1e-7, Real(2.5)),
    "floats without a form in JSON": (1e400, float("nan"), float("inf"), [float("nan")]),
    "text": ("", "a", "é", "😀", "\ud800", "\x00", "\u2028", '"\\/</script>'),
    "containers": ([], {}, (1, (2, [3])), {"a": [None, {"b": ()}]}),
    "keys that are no text": ({1: 2}, {None: 1, True: 2}, {1.5: 1}),
    "members that are text or numbers": (Number.ONE, Word.A, {Word.A: Number.ONE}, {Number.ONE: 1}),
    "other members": (Colour.RED, [Colour.RED]),
    "UUIDs": (uuid.UUID(int=1), {"u": uuid.UUID(int=1)}, {uuid.UUID(int=1): 1}),
    "times": (datetime.datetime(2026, 1, 1), datetime.date(2026, 1, 1), datetime.timedelta(1)),
    "other classes": ({1}, frozenset("a"), b"x", bytearray(b"x"), object(), 1j, {(1, 2): 3}),
}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text() | st.integers() | st.none() | st.booleans(), inner)
    ),
    max_leaves=20,
)


def test_class_that_is_put_in_place_of_the_serializer_counts(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.SESSION_SERIALIZER = "django.contrib.sessions.serializers.JSONSerializer"
    assert SessionStore().serializer is JSONSerializer

    class Other(JSONSerializer):
        """Another one."""

    monkeypatch.setattr("django.contrib.sessions.serializers.JSONSerializer", Other)
    assert SessionStore().serializer is Other


def same(ours: Any, value: Any) -> None:
    try:
        expected = repr(DJANGOS.loads(DJANGOS.dumps(value)))
    except Exception as error:
        with pytest.raises(type(error)):
            ours.dumps(value)
            pytest.fail(f"{value!r} is not refused")
        return
    for writer in (DJANGOS, ours):
        for reader in (DJANGOS, ours):
            assert repr(reader.loads(writer.dumps(value))) == expected, value


@either
@pytest.mark.parametrize("kind", VALUES)
def test_result_or_error_is_that_of_django(ours: Any, kind: str) -> None:
    for value in VALUES[kind]:
        same(ours, value)


@either
@given(value=JSON)
def test_result_for_any_json_is_that_of_django(ours: Any, value: Any) -> None:
    same(ours, value)


@pytest.mark.parametrize("data", [b" 1", b"1 ", b"[1] 2", b"", b"{", b'"\xe9"', b"nan"])
def test_foreign_data_reads_as_django_reads_it(data: bytes) -> None:
    try:
        expected = DJANGOS.loads(data)
    except ValueError as error:
        with pytest.raises(type(error)):
            short.JSONSerializer().loads(data)
    else:
        assert short.JSONSerializer().loads(data) == expected


def test_only_djangos_own_serialiser_is_replaced() -> None:
    class Signing(JSONSerializer):
        pass

    state = SessionStore().state
    for named, used in (
        (JSONSerializer, short.JSONSerializer),
        (Signing, Signing),
        (MsgspecSerializer, MsgspecSerializer),
    ):
        state.serializer = named
        assert type(state.value_serializer) is type(state.new_data().serializer) is used
