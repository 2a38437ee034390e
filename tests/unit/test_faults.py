"""An exception that comes once is a signal's, and no fault of a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from django_clustered_sessions.protocol.merge import merge
from django_clustered_sessions.protocol.record import VERSION_BYTES, pack
from django_clustered_sessions.protocol.session_data import SessionData
from django_clustered_sessions.session.value_serializer import JSONSerializer

VERSION = bytes(VERSION_BYTES)


class SoftLimit(Exception):  # noqa: N818
    """As Celery's soft time limit."""


class Interrupted(JSONSerializer):
    """A serialiser that a signal's exception meets once."""

    is_due = True

    def met(self) -> None:
        if self.is_due:
            self.is_due = False
            raise SoftLimit

    def loads(self, data: bytes) -> Any:
        self.met()
        return super().loads(data)

    def dumps(self, obj: Any) -> bytes:
        self.met()
        return super().dumps(obj)


def fields() -> SessionData:
    return SessionData(Interrupted(), {b"d:n": VERSION + pack(b"1")})


@pytest.mark.parametrize(
    "read",
    [lambda it: it["n"], lambda it: it.get("n"), lambda it: "n" in it, lambda it: it.copy()],
    ids=["item", "get", "in", "copy"],
)
def test_value_that_a_signal_met_is_read_next_time(read: Callable[[SessionData], Any]) -> None:
    interrupted = fields()
    with pytest.raises(SoftLimit):
        read(interrupted)
    assert interrupted["n"] == 1


def test_value_that_a_signal_met_is_written_next_time() -> None:
    interrupted = SessionData(Interrupted())
    interrupted["n"] = [1]
    with pytest.raises(SoftLimit):
        interrupted.changes()
    (change,) = interrupted.changes().fields
    assert change.field == b"d:n"


def test_merge_that_a_signal_met_is_no_last_write() -> None:
    due = [True]

    class Value:
        def __deepcopy__(self, memo: object) -> Value:
            if due:
                due.clear()
                raise SoftLimit
            return self

    with pytest.raises(SoftLimit):
        merge("key", Value(), Value(), Value())
