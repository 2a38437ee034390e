"""The stored form of a session: keys, the meta field, one value's bytes.

``lua/prelude.lua`` describes the same record from the store's side.
"""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cache, lru_cache
from hashlib import sha256
from struct import Struct
from struct import error as StructError  # noqa: N812
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Protocol

from django_clustered_sessions.exceptions import SessionStoreUnavailable

from .faults import fault_of

#: Version of the record's format that this release reads and writes.
FORMAT: Final = 1

META: Final = b"m:"
ENDED: Final = b"m:end"
#: In a tombstone: the public id under which the session goes on.
NEXT: Final = b"m:next"
LOCK: Final = b"m:lock"
#: Address and browser that used a session first and last.
FIRST: Final = b"m:first"
LAST: Final = b"m:last"
#: Names under which fields are sealed that a move brought along: see ``sealing``.
PAST: Final = b"m:past"
#: Prefix of the field of a session key that is a string, and the encoding of the rest.
DATA: Final = b"d:"
ENCODING: Final = ("utf-8", "surrogatepass")
#: Prefix of the field of any other session key; the serialiser's bytes of the key follow.
ODD_DATA: Final = b"k:"

#: Session key under which Django keeps the key of the user, and its field.
USER_KEY: Final = "_auth_user_id"
USER_FIELD: Final = DATA + USER_KEY.encode()
#: Field of the session key under which Django keeps an expiry.
EXPIRY_FIELD: Final = DATA + b"_session_expiry"

#: Bytes of a version, which is the random token of the write that made it.
VERSION_BYTES: Final = 8
#: Number of them that name the node which wrote it.
NODE_BYTES: Final = 2
BUCKETS: Final = 1024

#: Values from this size on are compressed, in bytes.
COMPRESS_FROM: Final = 4096

#: Exceptions that damaged bytes raise. No others: an exception of a signal must not log a user out.
_DAMAGE: Final = (StructError, KeyError, TypeError, ValueError)

_META = Struct(">Bc8s6s6s6sI6s8s")
#: token, end of the lease, since when, whether it is listed; then the name
_LOCK = Struct(">16s6s6sB")
#: token, until when it waits, since when, whether it counts against the caps, length of the name
_LOCKER = Struct(">16s6s6sBB")
_LONGEST_NAME = 255
_OF_META = b"m:"
_int = int.from_bytes

#: The latest time that is told, in ms since the epoch: the calendar's last day begins. A day before
#: its end, so that it is a date in each time zone, and by each node's clock.
LATEST_MS: Final = 253_402_214_400_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

#: A deadline that would move on by less than so many ms stays: see step_ms().
RENEWED_EACH_MS: Final = 1000

#: Number of places that are remembered: a browser loads a page in several requests.
_REMEMBERED: Final = 4096

#: Bytes of a user's tag, and the tag of a session without a user.
_TAG_BYTES: Final = 8
NOBODY: Final = bytes(_TAG_BYTES)
#: Characters of a session's public id.
ID_LENGTH: Final = 43
_ID = re.compile(r"[A-Za-z0-9_-]{43}")
_HEX_STRING = re.compile(rb'"((?:[0-9a-f]{2}){16,})"')


class Mode(StrEnum):
    """Rule by which a session's deadline moves; ``lua/prelude.lua`` has the meaning of each."""

    DEFAULT = "d"
    BROWSER = "b"
    SLIDING = "s"
    ABSOLUTE = "a"
    #: Only on its way to the store, which keeps it as ABSOLUTE.
    FROM_NOW = "r"


_MODES: Final = {mode.encode(): mode for mode in Mode}


class EndReason(StrEnum):
    """Reason why a session has ended, as its tombstone tells."""

    #: Unknown: it never was, or it expired.
    UNKNOWN = ""
    #: ``flush()``, as a logout calls it.
    FLUSHED = "flushed"
    #: ``delete(session_key)``, by another request.
    DELETED = "deleted"
    #: It lives on under another key, as after a login.
    ROTATED = "rotated"
    #: It was ended by its public id, or with all sessions of its user.
    ENDED = "ended"
    #: Its user logged in elsewhere more often than is allowed.
    LIMIT = "limit"

    @classmethod
    def of(cls, tombstone: bytes) -> EndReason:
        """Return the reason that a tombstone gives; a later release's is read as DELETED."""
        try:
            return cls(tombstone.decode())
        except ValueError:
            return cls.DELETED


def moment(ms: int) -> datetime:
    """Return a time of the record as a date, cut to LATEST_MS: any number of ms is one."""
    return _EPOCH + timedelta(milliseconds=max(0, min(ms, LATEST_MS)))


def milliseconds_of(at: datetime) -> int:
    """Return a date in ms since the epoch, rounded down.

    One without a zone is in the local one, and at the ends of the calendar in UTC: there the local
    one has no rules.
    """
    if at.utcoffset() is None:
        try:
            at = at.astimezone(UTC)
        except (ValueError, OverflowError, OSError):
            at = at.replace(tzinfo=UTC)
    return (at - _EPOCH) // timedelta(milliseconds=1)


class Damaged(Exception):
    """Stored bytes were written neither by this release nor by an older one."""


class NewerFormat(SessionStoreUnavailable):
    """A newer release wrote this record; it is left as it is."""

    def __init__(self) -> None:
        super().__init__(
            "this session was written by a newer release of django-clustered-sessions than this "
            "process runs, and is left as it is. Finish the deploy on this node, or take it out "
            "of service."
        )


def session_id(session_key: str) -> str:
    """Return the public id of a session: the SHA-256 of its key, base64url, 43 characters."""
    return _text(_digest(session_key))


def _digest(session_key: str) -> bytes:
    return sha256(session_key.encode("utf-8", "surrogatepass")).digest()


def _text(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest)[:-1].decode()


def user_tag(user: object) -> bytes:
    """Return the tag of a user in the store: 8 bytes of the SHA-256 of the user's key.

    ``user`` is the value of ``_auth_user_id``, which Django makes of a primary key.
    """
    return sha256(str(user).encode("utf-8", "surrogatepass")).digest()[:_TAG_BYTES]


@cache
def node_tag(node: str) -> bytes:
    """Return the start of the versions that a node writes: 2 bytes, of its name."""
    return sha256(node.encode("utf-8", "surrogatepass")).digest()[:NODE_BYTES]


@dataclass(frozen=True, slots=True, repr=False)
class HiddenKey:
    """A session key that no traceback shows: tools print the locals of frames by their repr."""

    value: str

    @classmethod
    def of(cls, session_key: str | None) -> HiddenKey | None:
        """Return a key hidden, None where there is none."""
        return cls(session_key) if session_key else None


@dataclass(frozen=True, slots=True)
class SessionKeys:
    """The keys of a session's record, and those of its bucket.

    ``index``, ``locks`` and ``users`` are of the bucket's sessions. ``events`` is the stream of
    their events, ``writes`` are the recent writes to them, which take turns, and ``moved`` are the
    sessions that came from another engine. ``ended_mailbox`` is the list that wakes all who wait,
    when the session ends or leaves this key. All of a bucket's keys share one hash tag, so that one
    script can change them together, on Cluster too.
    """

    id: str
    record: str
    index: str
    locks: str
    users: str
    events: str
    writes: tuple[str, str]
    moved: str
    ended_mailbox: str

    @staticmethod
    @lru_cache(maxsize=_REMEMBERED)
    def of(prefix: str, session_key: str) -> SessionKeys:
        """Return the place of the session ``session_key`` under the setting KEY_PREFIX."""
        digest = _digest(session_key)
        return SessionKeys._in(prefix, digest[0] << 2 | digest[1] >> 6, _text(digest))

    @classmethod
    def of_id(cls, prefix: str, public_id: str) -> SessionKeys:
        """Return the place of the session with this public id.

        Raises ValueError for another string.
        """
        if not _ID.fullmatch(public_id):
            raise ValueError(f"{public_id!r} is no session's public id")
        first, second = base64.urlsafe_b64decode(public_id[:4])[:2]
        return cls._in(prefix, first << 2 | second >> 6, public_id)

    @classmethod
    def _in(cls, prefix: str, bucket: int, public_id: str) -> SessionKeys:
        record = f"{bucket_tag(prefix, bucket)}:{public_id}"
        return cls(public_id, record, *_shared(prefix, bucket), f"{record}:ended")

    def mailbox(self, token: str) -> str:
        """Return the key of the list that wakes the request behind the one with ``token``."""
        return f"{self.record}:{token}"


@cache
def _shared(prefix: str, bucket: int) -> tuple[str, str, str, str, tuple[str, str], str]:
    """Return the keys that all sessions of a bucket share; there are 1,024 buckets."""
    tag = bucket_tag(prefix, bucket)
    names = (f"{tag}:index", f"{tag}:locks", f"{tag}:users", f"{tag}:events")
    return (*names, (f"{tag}:evenwrites", f"{tag}:oddwrites"), f"{tag}:moved")


def bucket_tag(prefix: str, bucket: int) -> str:
    """Return the start of the keys of bucket 0 to 1023."""
    return f"{prefix}:{{{bucket:03x}}}"


def claims_key(prefix: str, user: bytes) -> str:
    """Return the key of the logins of a user, by tag, that are not written yet."""
    return f"{bucket_tag(prefix, user[0] << 2 | user[1] >> 6)}:logins-{user.hex()}"


def step_ms(left_ms: float) -> float:
    """Return by how many ms a renewal moves a deadline on that leaves ``left_ms``, or it is none.

    ``lua/write.lua`` has the same.
    """
    return min(RENEWED_EACH_MS, left_ms / 100)


class Ages(NamedTuple):
    """Ages that the settings give a session, in ms; 0 for no timeout."""

    default_ms: int
    idle_ms: int = 0
    absolute_ms: int = 0


class Meta(NamedTuple):
    """Meta field: version, times in ms since the epoch by the store's clock, size in bytes.

    ``seen_ms`` is the last use that renewed or wrote it, ``user`` the user's tag.
    """

    mode: Mode
    version: bytes
    created_ms: int
    deadline_ms: int
    span_ms: int
    size: int
    seen_ms: int
    user: bytes

    @classmethod
    def parse(cls, packed: bytes) -> Meta:
        """Read a meta field.

        Raises NewerFormat, or Damaged.
        """
        if packed and packed[0] != FORMAT:
            raise NewerFormat
        try:
            _, mode, version, created, deadline, span, size, seen, user = _META.unpack(packed)
            times = _int(created), _int(deadline), _int(span)
            return cls(_MODES[mode], version, *times, size, _int(seen), user)
        except _DAMAGE as error:
            raise Damaged("its meta field is damaged") from error

    def renewed_ms(self, now_ms: int, ages: Ages) -> int:
        """Return the deadline that a use at ``now_ms`` gives it, as ``lua/write.lua`` does."""
        default_ms, idle_ms, absolute_ms = ages
        deadline_ms = self.span_ms
        if self.mode is not Mode.ABSOLUTE:
            deadline_ms = now_ms + (self.span_ms if self.mode is Mode.SLIDING else default_ms)
        if idle_ms:
            deadline_ms = min(deadline_ms, now_ms + idle_ms)
        if absolute_ms:
            deadline_ms = min(deadline_ms, self.created_ms + absolute_ms)
        return deadline_ms


class CachedSession(NamedTuple):
    """A session's values, raw by field, and the version of the record that they are.

    ``past`` is the field of that name, ``size`` the number of bytes of all, names included.
    """

    version: bytes
    values: Mapping[bytes, bytes]
    past: bytes
    size: int

    @classmethod
    def of(cls, version: bytes, values: Mapping[bytes, bytes], past: bytes = b"") -> CachedSession:
        """Return the session with these values."""
        size = sum(map(len, values)) + sum(map(len, values.values())) + len(past)
        return cls(version, values, past, size)


class Loaded(NamedTuple):
    """A session as the store holds it, nothing decoded: raw values by field.

    ``clients`` are the fields with the address and browser that used it, raw too; ``past`` is the
    field of that name, empty without one.
    """

    meta: Meta
    values: Mapping[bytes, bytes]
    clients: Mapping[bytes, bytes] = MappingProxyType({})
    past: bytes = b""

    @classmethod
    def parse(cls, fields: Mapping[bytes, bytes]) -> Loaded | EndReason:
        """Read all fields of a record, or the reason why it has ended.

        Raises NewerFormat, or Damaged.
        """
        packed = fields.get(META)
        if packed is None:
            if not fields:
                return EndReason.UNKNOWN
            if ENDED in fields:
                return EndReason.of(fields[ENDED])
            raise Damaged("its meta field is missing")
        meta = Meta.parse(packed)
        clients = {field: fields[field] for field in (FIRST, LAST) if field in fields}
        values = {f: v for f, v in fields.items() if f[:2] != _OF_META}
        return cls(meta, values, clients, fields.get(PAST, b""))


@dataclass(frozen=True, slots=True)
class Lock:
    """A session's lock in its record: the holder's token, end of the lease, beginning; in ms.

    ``is_listed``: the bucket's hash of locks has an entry of it.
    """

    token: str
    lease_end_ms: int
    since_ms: int
    is_listed: bool
    name: str

    @classmethod
    def parse(cls, packed: bytes) -> Lock:
        """Read the field.

        Raises Damaged.
        """
        try:
            token, lease_end, since, is_listed = _LOCK.unpack_from(packed)
            times = int.from_bytes(lease_end), int.from_bytes(since)
            name = packed[_LOCK.size :].decode("utf-8", "replace")
            return cls(token.decode("ascii"), *times, is_listed == 1, name)
        except _DAMAGE as error:
            raise Damaged("its lock is damaged") from error

    def ends_ms(self, now_ms: int) -> int:
        """Return the end of the lease: now for a future beginning, as for ``lua/queue.lua``."""
        return self.lease_end_ms if self.since_ms <= now_ms else min(self.lease_end_ms, now_ms)


@dataclass(frozen=True, slots=True)
class Locker:
    """Holder of a session's lock, or waiter for it: as ``lua/queue.lua`` keeps it.

    Times are ms by the store's clock; a holder's ``waits_until_ms`` has no meaning. ``locker_name``
    makes the ``name``.
    """

    token: str
    waits_until_ms: int
    since_ms: int
    name: str

    @classmethod
    def parse_all(cls, packed: bytes) -> list[Locker]:
        """Read a session's entry in the hash of locks: the holder, then the waiters, in order.

        Raises Damaged.
        """
        found, at = [], 0
        try:
            while at < len(packed):
                token, until, since, _, length = _LOCKER.unpack_from(packed, at)
                at += _LOCKER.size + length
                name = packed[at - length : at].decode("utf-8", "replace")
                times = int.from_bytes(until), int.from_bytes(since)
                found.append(cls(token.decode("ascii"), *times, name))
        except _DAMAGE as error:
            raise Damaged("its entry among the locks is damaged") from error
        return found


def locker_name(node: str, purpose: str) -> bytes:
    """Return the name under which a lock is held or waited for: its node and what it is for.

    ``purpose`` is a request's route, or says which process it is of and for what.
    """
    return f"{node} {purpose.strip()}".strip().encode("utf-8", "replace")[:_LONGEST_NAME]


class Serializer(Protocol):
    """Instance of the class that ``SESSION_SERIALIZER`` names."""

    def dumps(self, obj: Any) -> bytes:
        """Return ``obj`` as bytes."""

    def loads(self, data: bytes) -> Any:
        """Return the object that ``dumps`` made bytes of."""


def _hex_string(payload: bytes) -> bytes:
    return b'"' + payload.hex().encode() + b'"'


_PLAIN: Final = b"s"
#: Codec byte -> how to get the serialiser's bytes back. ``s`` as they are; ``z`` compressed;
#: ``h`` a JSON string of hexadecimal digits, as Django's session hash is, at half its size: it
#: keeps a logged-in session's values within the 64 bytes of a compact hash. ``i`` is a counter,
#: whose digits every serialiser's record holds alike.
_UNPACK: Final[Mapping[bytes, Callable[[bytes], bytes]]] = {
    _PLAIN: bytes,
    b"z": zlib.decompress,
    b"h": _hex_string,
}
_COUNTER: Final = b"i"


def pack(serialized: bytes) -> bytes:
    """Return a serialised value as stored: the codec's byte and the payload."""
    if len(serialized) >= COMPRESS_FROM:
        compressed = zlib.compress(serialized, 1)
        if len(compressed) < len(serialized):
            return b"z" + compressed
    elif match := _HEX_STRING.fullmatch(serialized):
        return b"h" + bytes.fromhex(match[1].decode())
    return _PLAIN + serialized


def is_addable(number: int) -> bool:
    """Return whether the store can add to a counter exactly: Lua's numbers have 53 bits."""
    return abs(number) < 2**53


def pack_counter(number: int) -> bytes:
    """Return an integer as a counter is stored, which the store itself can add to."""
    return _COUNTER + b"%d" % number


def serialized(stored: bytes) -> bytes:
    """Return the serialiser's bytes in a stored field's bytes: version, codec, payload.

    Raises Damaged for a codec that this release lacks, or the codec's exceptions.
    """
    codec, payload = stored[VERSION_BYTES : VERSION_BYTES + 1], stored[VERSION_BYTES + 1 :]
    try:
        return _UNPACK[codec](payload)
    except KeyError:
        raise Damaged(f"its codec {codec!r} is unknown") from None


def unpack(stored: bytes, serializer: Serializer) -> Any:
    """Return the value in a stored field's bytes.

    Raises the exceptions of ``serialized`` and of the serialiser.
    """
    codec = stored[VERSION_BYTES : VERSION_BYTES + 1]
    if codec == _PLAIN:
        # As most are: not by way of a function for each step.
        return serializer.loads(stored[VERSION_BYTES + 1 :])
    if codec == _COUNTER:
        return int(stored[VERSION_BYTES + 1 :])
    return serializer.loads(serialized(stored))


def is_counter(stored: bytes) -> bool:
    """Return whether a stored field's bytes are a counter."""
    return stored[VERSION_BYTES : VERSION_BYTES + 1] == _COUNTER


def field_of(key: Any, serializer: Serializer) -> bytes:
    """Return the field of a session key.

    Keys that are not strings are converted as the serialiser converts the keys of a dict: under
    JSON 1 becomes "1", under pickle it stays 1.
    """
    if not isinstance(key, str):
        (key,) = serializer.loads(serializer.dumps({key: None}))
        if not isinstance(key, str):
            return ODD_DATA + serializer.dumps(key)
    return DATA + key.encode(*ENCODING)


def key_of(field: bytes, serializer: Serializer) -> Any:
    """Return the session key of a field."""
    name = field[2:]
    if field.startswith(ODD_DATA):
        return serializer.loads(name)
    return name.decode(*ENCODING)


def user_id(stored: bytes, serializer: Serializer) -> str | None:
    """Return the key of the user whom USER_FIELD names, None where it is empty or unreadable.

    Another release may have written it: no user is logged in to such a session.
    """
    if not stored:
        return None
    try:
        return str(unpack(stored, serializer))
    except Exception as error:
        fault_of(lambda: str(unpack(stored, serializer)), error)
        return None
