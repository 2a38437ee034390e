"""Serialisers that write equal values in different bytes, and values without a plain equality."""

from __future__ import annotations

import json
import pickle
from typing import Any


class PickleSerializer:
    """Serialiser by pickle, which may write equal values differently."""

    def dumps(self, obj: Any) -> bytes:
        return pickle.dumps(obj)

    def loads(self, data: bytes) -> Any:
        return pickle.loads(data)


class SaltedSerializer:
    """Serialiser that never writes the same bytes twice, as encryption does."""

    turn = 0

    def dumps(self, obj: Any) -> bytes:
        type(self).turn += 1
        return b"%d:%s" % (self.turn, json.dumps(obj).encode())

    def loads(self, data: bytes) -> Any:
        return json.loads(data.partition(b":")[2])


class Array:
    """Value whose ``==`` has no truth value, as with arrays and data frames."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def __eq__(self, other: object) -> Any:
        return Array(*map(int.__eq__, self.numbers, vars(other)["numbers"]))

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise ValueError("the truth of an array is ambiguous")

    def __repr__(self) -> str:
        return f"Array{self.numbers}"
