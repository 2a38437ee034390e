"""Fields of a session that are encrypted, each bound to its session and to its name. Pure.

A sealed field has the codec ``e``, and behind it what the cipher made of the packed value. It is
bound to the *name* of the session: half of the public id of the record for which it was sealed. A
session that moves to another key takes along the names that it had, with a proof that one of the
site's keys made of them: the field ``m:past``. So its values stay readable without being encrypted
anew, also where the process that moves it lacks their key, and what somebody copies from one record
into another is worth nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Final, NamedTuple, Protocol

from . import record
from .record import FIRST, LAST, PAST, USER_FIELD, VERSION_BYTES, Damaged, Loaded, Serializer

_SEALED: Final = b"e"
#: The codec of a sealed field that a script tells together with the session's past.
_TOLD: Final = b"E"
_PAST_LENGTH_BYTES: Final = 2
_COUNTER: Final = b"i"

#: Bytes of a name, and of what the cipher adds: key id, nonce, tag.
_NAME_BYTES: Final = 16
KEY_ID_BYTES: Final = 4
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
_PROOF_BYTES: Final = KEY_ID_BYTES + NONCE_BYTES + TAG_BYTES

#: Names of a session that are kept in any case: values may be written while it moves.
_RECENT_NAMES: Final = 8
_MOST_NAMES: Final = 255
#: Longest past of other sites' keys that is kept, in bytes.
_LONGEST_REST: Final = 1024

#: The name under which both clients are sealed: a script writes the same bytes to either field.
_CLIENT: Final = b"m:client"


class Unopened(Damaged):
    """No key of this process opens a sealed value, or it is another session's or field's."""


class Cipher(Protocol):
    """The site's encryption keys."""

    #: False if values are written as they are, and only read with these keys.
    writes: bool
    #: Id of the key that writes.
    key_id: bytes

    def seal(self, name: bytes, field: bytes, plain: bytes) -> bytes:
        """Return a value encrypted, bound to the name of a session and to a field."""

    def open(self, name: bytes, field: bytes, sealed: bytes) -> bytes | None:
        """Return what ``seal`` encrypted, None where name, field or bytes are not as they were.

        Raises Unopened for another site's key.
        """


class Renewed(NamedTuple):
    """The fields of a record that are to be written anew, each with its old and its new bytes.

    ``unopened`` is the number of those that no key opens.
    """

    fields: Mapping[bytes, tuple[bytes, bytes]]
    unopened: int


class Seal:
    """The sealing of one session's fields.

    ``public_id`` is that of its record, ``past`` the record's field of that name.
    """

    def __init__(self, cipher: Cipher, public_id: str, past: bytes = b"") -> None:
        self._cipher = cipher
        self._public_id = public_id
        self._last_name: bytes | None = None
        self.past = past

    def seal(self, field: bytes, packed: bytes) -> bytes:
        """Return a packed value sealed; a counter as it is, for the store adds to it."""
        if packed[:1] == _COUNTER or not self._cipher.writes:
            return packed
        return _SEALED + self._cipher.seal(self._names[0], field, packed)

    def open(self, field: bytes, stored: bytes) -> bytes:
        """Return a stored field's bytes as they would be without a seal.

        Raises Unopened.
        """
        if stored[VERSION_BYTES : VERSION_BYTES + 1] != _SEALED:
            return stored
        return stored[:VERSION_BYTES] + self._opened(field, stored[VERSION_BYTES + 1 :])

    def seal_client(self, packed: bytes) -> bytes:
        """Return a packed client sealed."""
        return self.seal(_CLIENT, packed)

    def open_client(self, stored: bytes) -> bytes:
        """Return what ``seal_client`` sealed; empty where no key opens it."""
        with suppress(Unopened):
            return self._opened(_CLIENT, stored[1:]) if stored[:1] == _SEALED else stored
        return b""

    def moved(self, public_id: str, stored: Mapping[bytes, bytes]) -> Seal:
        """Return the seal of the session once it is in another record.

        ``stored`` are its fields, as far as they are known.
        """
        names, rest = self._lineage
        needed = {*names[:_RECENT_NAMES]}
        for field, value in stored.items():
            try:
                needed.add(self._name_of(field, value))
            except Unopened:
                needed.update(names)
        kept = [name for name in names if name in needed][:_MOST_NAMES]
        past = self._part(_name(public_id), kept) + (rest if len(rest) <= _LONGEST_REST else b"")
        return Seal(self._cipher, public_id, past)

    def _part(self, about: bytes, names: Sequence[bytes]) -> bytes:
        told = b"".join(names)
        return bytes([len(names)]) + told + self._cipher.seal(about, PAST + told, b"")

    def renewed(self, found: Loaded) -> Renewed:
        """Return the fields of a record that the writing key has not written."""
        fields: dict[bytes, tuple[bytes, bytes]] = {}
        unopened = 0
        for field, stored in (*found.values.items(), *found.clients.items()):
            is_client = field in (FIRST, LAST)
            start = 0 if is_client else VERSION_BYTES
            label, packed = _CLIENT if is_client else field, stored[start:]
            if self._is_current(packed):
                continue
            try:
                opened = self._opened(label, packed[1:]) if packed[:1] == _SEALED else packed
            except Unopened:
                unopened += 1
                continue
            fields[field] = stored, stored[:start] + self.seal(label, opened)
        past = self._renewed_past(is_needed=bool(unopened) or self._cipher.writes)
        if past != found.past:
            fields[PAST] = found.past, past
        return Renewed(fields, unopened)

    def _is_current(self, packed: bytes) -> bool:
        if packed[:1] in (_COUNTER, b""):
            return True
        if packed[:1] == _SEALED:
            return self._cipher.writes and packed[1 : 1 + KEY_ID_BYTES] == self._cipher.key_id
        return not self._cipher.writes

    def _renewed_past(self, *, is_needed: bool) -> bytes:
        """Return the past with a proof of the newest key, empty where no sealed value is left."""
        if not self.past or not is_needed:
            return b""
        names, rest = self._lineage
        at = 1 + _NAME_BYTES * self.past[0]
        if len(names) == 1 or self.past[at : at + KEY_ID_BYTES] == self._cipher.key_id:
            return self.past
        return self._part(names[0], names[1:]) + rest

    def _opened(self, field: bytes, sealed: bytes) -> bytes:
        # Values that were written together have the same name.
        names = self._names if self._last_name is None else (self._last_name, *self._names)
        for name in names:
            opened = self._cipher.open(name, field, sealed)
            if opened is not None:
                self._last_name = name
                return opened
        raise Unopened("it is encrypted, and was not written for this session and field")

    def _name_of(self, field: bytes, stored: bytes) -> bytes:
        """Return the name under which a field is sealed, the newest one where it is not."""
        if stored[VERSION_BYTES : VERSION_BYTES + 1] != _SEALED:
            return self._names[0]
        self._opened(field, stored[VERSION_BYTES + 1 :])
        return self._last_name or self._names[0]

    @property
    def _names(self) -> tuple[bytes, ...]:
        return self._lineage[0]

    @cached_property
    def _lineage(self) -> tuple[tuple[bytes, ...], bytes]:
        """The names of the session, the newest first; and the rest of a past that has no proof.

        The past has one part, and a further one for each move whose process could not read what was
        there: the number of names, the names, and a proof of them for the oldest name of the part
        before.
        """
        about = _name(self._public_id)
        names, rest = [about], self.past
        while rest:
            end = 1 + _NAME_BYTES * rest[0]
            told, proof = rest[1:end], rest[end : end + _PROOF_BYTES]
            try:
                if not told or self._cipher.open(about, PAST + told, proof) is None:
                    break
            except Unopened:
                break
            names += (told[at : at + _NAME_BYTES] for at in range(0, len(told), _NAME_BYTES))
            about, rest = told[-_NAME_BYTES:], rest[end + _PROOF_BYTES :]
        return tuple(names), rest


def _name(public_id: str) -> bytes:
    return base64.urlsafe_b64decode(public_id + "=")[:_NAME_BYTES]


def user_id(stored: bytes, serializer: Serializer, seal: Seal | None) -> str | None:
    """Return the key of the user whom USER_FIELD names, None where it is empty or unreadable."""
    if seal is not None and stored:
        try:
            stored = seal.open(USER_FIELD, stored)
        except Unopened:
            return None
    return record.user_id(stored, serializer)


def told_apart(told: bytes) -> tuple[bytes, bytes]:
    """Return the user's field that a script told, and the past that it told with it."""
    at = VERSION_BYTES + 1
    if told[VERSION_BYTES:at] != _TOLD:
        return told, b""
    end = at + _PAST_LENGTH_BYTES + int.from_bytes(told[at : at + _PAST_LENGTH_BYTES])
    return told[:VERSION_BYTES] + _SEALED + told[end:], told[at + _PAST_LENGTH_BYTES : end]
