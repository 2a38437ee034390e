"""A session's values as the store holds them, each decoded when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

from . import record
from .faults import fault_of
from .merge import MISSING
from .record import Serializer
from .sealing import Seal

#: Values of these types cannot change in place.
_ATOMS: Final = frozenset({str, bytes, int, float, bool, type(None)})


class LazyValues:
    """Stored fields, and the values that were decoded from them or set.

    ``stored`` has each field's bytes as loaded: version, codec, payload. ``live`` has the values by
    session key, ``undecoded`` the fields whose values it does not have yet, in order. ``atoms`` are
    those values of ``live`` that are as loaded if they are the same object. ``set_aside`` are the
    fields that cannot be read: invisible, and kept in the store unless the key is set anew.
    ``guard`` is a reentrant lock. ``seal`` opens encrypted fields, None without encryption.
    ``TrackedValues`` sets them all.
    """

    serializer: Serializer
    on_unreadable: Callable[[Any, Exception], None]
    guard: AbstractContextManager[Any]
    seal: Seal | None
    stored: dict[bytes, bytes]
    live: dict[Any, Any]
    undecoded: dict[bytes, None]
    atoms: dict[Any, Any]
    set_aside: set[bytes]

    def get(self, key: Any, default: Any = None) -> Any:
        """Return a key's value, decoded where that is still to be done; ``default`` for none."""
        value = self.live.get(key, MISSING)
        if value is not MISSING:
            return value
        if isinstance(key, str):
            field = record.DATA + key.encode(*record.ENCODING)
            if field in self.undecoded:
                self._decode(field, key)
        else:
            # Keys that are equal, such as 1 and 1.0, may be written differently.
            for field in [field for field in self.undecoded if field.startswith(record.ODD_DATA)]:
                self._decode(field)
        return self.live.get(key, default)

    def all(self) -> dict[Any, Any]:
        """Decode all values, and return them by key."""
        for field in list(self.undecoded):
            self._decode(field)
        return self.live

    def is_unread(self, key: str) -> bool:
        """Return whether a key's value is stored and cannot be read."""
        self.get(key)
        return record.field_of(key, self.serializer) in self.set_aside

    def read(self, key: Any, field: bytes, stored: bytes) -> Any:
        """Return the value in a field's bytes; MISSING where they are empty or cannot be read."""
        if not stored:
            return MISSING
        try:
            return record.unpack(self.opened(field, stored), self.serializer)
        except Exception as error:
            fault = fault_of(
                lambda: record.unpack(self.opened(field, stored), self.serializer), error
            )
            self.on_unreadable(key, fault)
            return MISSING

    def opened(self, field: bytes, stored: bytes) -> bytes:
        """Return a field's bytes as they would be without encryption.

        Raises Unopened.
        """
        return stored if self.seal is None else self.seal.open(field, stored)

    def key(self, field: bytes) -> Any:
        """Return the key under which the request knows a field."""
        key = record.key_of(field, self.serializer)
        if key in self.live:
            return key
        # Only a key that is no string can be written differently.
        odd = (k for k in self.live if not isinstance(k, str))
        return next((k for k in odd if record.field_of(k, self.serializer) == field), key)

    def field(self, key: Any) -> bytes:
        """Return the field of a key.

        Raises TypeError, naming the key, where the serialiser refuses it.
        """
        try:
            return record.field_of(key, self.serializer)
        except Exception as error:
            fault = fault_of(lambda: record.field_of(key, self.serializer), error)
            raise TypeError(
                f"session key {key!r}: {type(self.serializer).__name__} cannot write it: {fault}"
            ) from fault

    def serialize(self, key: Any, value: Any) -> bytes:
        """Return a value as the serialiser writes it.

        Raises TypeError, naming the key, where the serialiser refuses the value.
        """
        try:
            return self.serializer.dumps(value)
        except Exception as error:
            fault = fault_of(lambda: self.serializer.dumps(value), error)
            raise TypeError(
                f"session key {key!r}: {type(self.serializer).__name__} cannot write "
                f"{type(value).__name__}: {fault}"
            ) from fault

    def replace(self, field: bytes, stored: bytes) -> None:
        """Forget a field's value for ``stored``, empty for no value."""
        self.stored.pop(field, None)
        self.set_aside.discard(field)
        if stored:
            self.stored[field] = stored
        try:
            key = self.key(field)
        except Exception as error:
            if stored:
                self._put_aside(field, field, error)
            return
        self.live.pop(key, None)
        self.atoms.pop(key, None)
        if stored:
            self.undecoded[field] = None
        else:
            self.undecoded.pop(field, None)

    def forget(self) -> None:
        """Forget everything, the stored fields included."""
        self.stored, self.undecoded, self.set_aside = {}, {}, set()
        self.live, self.atoms = {}, {}

    def _decode(self, field: bytes, key: str | None = None) -> None:
        """Decode a field's value; ``key`` is its session key, None where that is to be found."""
        with self.guard:
            if field not in self.undecoded:
                # Another thread has done it meanwhile.
                return
            known: Any = field if key is None else key
            try:
                if key is None:
                    known = record.key_of(field, self.serializer)
                stored = self.stored[field]
                if self.seal is not None:
                    stored = self.seal.open(field, stored)
                value = record.unpack(stored, self.serializer)
            except Exception as error:
                fault = fault_of(lambda: self._unpacked(field), error)
                del self.undecoded[field]
                self._put_aside(known, field, fault)
                return
            self.live[known] = value
            if type(value) in _ATOMS:
                self.atoms[known] = value
            del self.undecoded[field]

    def _unpacked(self, field: bytes) -> tuple[Any, Any]:
        key = record.key_of(field, self.serializer)
        return key, record.unpack(self.opened(field, self.stored[field]), self.serializer)

    def _put_aside(self, key: Any, field: bytes, error: Exception) -> None:
        self.set_aside.add(field)
        self.on_unreadable(key, error)
