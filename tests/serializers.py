"""Serialisers that write equal values in different bytes: changes are found by comparing values."""

from __future__ import annotations

import json
import pickle
from typing import Any


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
