"""The working copy of a session's values, between load and save.

Decodes a value when it is asked for, and tells at the end what changed by comparing with what
was loaded, so that an in-place change counts and a mere read does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import copy
from dataclasses import dataclass
from enum import StrEnum
from functools import wraps
from typing import Any, Concatenate, Final, NamedTuple, ParamSpec, TypeVar

from . import record
from .faults import fault_of
from .merge import MISSING, merge, same
from .record import Serializer

P = ParamSpec("P")
T = TypeVar("T")

#: Values of these types cannot change in place.
_ATOMS: Final = frozenset({str, bytes, int, float, bool, type(None)})

_USER: Final = "_auth_user_id"
USER_FIELD: Final = record.DATA + _USER.encode()
EXPIRY_FIELD: Final = record.DATA + b"_session_expiry"


def user_id(stored: bytes, serializer: Serializer) -> str | None:
    """Return the key of the user whom USER_FIELD names, None where it is empty or unreadable.

    Another release may have written it: such a session has nobody logged in.
    """
    if not stored:
        return None
    try:
        return str(record.unpack(stored, serializer))
    except Exception as error:
        fault_of(lambda: str(record.unpack(stored, serializer)), error)
        return None


class Operation(StrEnum):
    """What a commit does to a field."""

    SET = "="
    #: SET that is refused where others changed the field, whatever ON_CONFLICT says.
    SET_COUNTER = "#"
    REMOVE = "-"
    ADD = "+"


class Change(NamedTuple):
    """One field's change: ``loaded`` is the version it is based on, empty where there was none.

    ``operand`` is the value to set as codec and payload, the decimal number to add, or empty.
    """

    operation: Operation
    field: bytes
    loaded: bytes
    operand: bytes


class Changes(NamedTuple):
    """What a request changed; with ``cleared``, after all that was stored is forgotten.

    ``sums`` are the fields that are added to.
    """

    fields: tuple[Change, ...]
    cleared: bool
    sums: frozenset[bytes] = frozenset()

    def __bool__(self) -> bool:
        return self.cleared or bool(self.fields)

    @property
    def expiry_changed(self) -> bool:
        """Whether ``_session_expiry`` is among the changes."""
        return self._is_about(EXPIRY_FIELD)

    @property
    def changes_user(self) -> bool:
        """Whether somebody logs in or out by this, or everything is wiped."""
        return self._is_about(USER_FIELD)

    def _is_about(self, field: bytes) -> bool:
        return self.cleared or any(change.field == field for change in self.fields)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a copy of a session had changed at some time, what was stored, and whose that was."""

    changes: Changes
    added: Mapping[Any, int]
    stored: dict[bytes, bytes]
    owner: bytes


def _alone(
    method: Callable[Concatenate[SessionData, P], T],
) -> Callable[Concatenate[SessionData, P], T]:
    """Let no other thread change the values while ``method`` runs."""

    @wraps(method)
    def alone(self: SessionData, *args: P.args, **named: P.kwargs) -> T:
        with self._guard:
            return method(self, *args, **named)

    return alone  # type: ignore[return-value]


class SessionData(MutableMapping[Any, Any]):
    """A session's values by key: what the store holds, as far as it was decoded, and changes.

    ``stored`` has each field's bytes as loaded (version, codec, payload), ``owner`` is the tag of
    the user whose they are. ``on_unreadable`` is called with a key (or the raw field) whose value
    cannot be read. Such a value is set aside: invisible, and kept in the store unless the key is
    set anew, or the user is another one from then on. With a user who cannot be read, all that is
    stored counts as set aside when another user is set. ``guard`` is a reentrant lock, where
    threads share the session.

    Not a dict on purpose: a dict that decodes late hands out what is not decoded yet through
    ``dict(x)``, ``{**x}`` and ``==``.
    """

    def __init__(
        self,
        serializer: Serializer,
        stored: Mapping[bytes, bytes] | None = None,
        *,
        owner: bytes = record.NOBODY,
        cleared: bool = False,
        on_unreadable: Callable[[Any, Exception], None] = lambda key, error: None,
        guard: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._serializer = serializer
        self._guard = guard or nullcontext()
        self._on_unreadable = on_unreadable
        self._stored = dict(stored or {})
        self._owner = owner
        self._cleared = cleared
        self._values: dict[Any, Any] = {}
        #: The fields that nobody has asked for yet, in order.
        self._waiting: dict[bytes, None] = dict.fromkeys(self._stored)
        self._atoms: dict[Any, Any] = {}
        self._added: dict[Any, int] = {}
        self._set_aside: set[bytes] = set()
        self._settled: dict[bytes, bytes] = {}
        self._settled_missing: set[bytes] = set()
        self._removed: set[bytes] = set()

    # The mapping.

    def __getitem__(self, key: Any) -> Any:
        value = self.get(key, MISSING)
        if value is MISSING:
            raise KeyError(key)
        return value

    def get(self, key: Any, default: Any = None) -> Any:
        """Return a key's value, or ``default``; without an exception, unlike Mapping's."""
        value = self._values.get(key, MISSING)
        if value is MISSING and self._find(key):
            value = self._values[key]
        return default if value is MISSING else value

    def __setitem__(self, key: Any, value: Any) -> None:
        if key == _USER and self._is_unread(_USER) and self._owner != record.user_tag(value):
            self._forget()
        if isinstance(key, str):
            self._waiting.pop(self._field(key), None)
        else:
            self._find(key)
        self._values[key] = value
        if self._removed:
            self._removed.discard(self._field(key))

    def __delitem__(self, key: Any) -> None:
        if key not in self:
            raise KeyError(key)
        del self._values[key]
        self._removed.add(self._field(key))

    def __contains__(self, key: object) -> bool:
        return key in self._values or self._find(key)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __bool__(self) -> bool:
        return bool(self._values) or bool(self._all())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self._stored)} stored>"

    def copy(self) -> dict[Any, Any]:
        """Return all values as a plain dict."""
        return dict(self._all())

    def update(self, *others: Any, **named: Any) -> None:
        """Set some keys, the user's first: what the others then are is that user's."""
        values = dict(*others, **named)
        if _USER in values:
            self[_USER] = values.pop(_USER)
        super().update(values)

    @_alone
    def increment(self, key: Any, by: int) -> int:
        """Add to an integer and return what it is now, as far as this request knows.

        Raises TypeError where the value is no integer.
        """
        number = self.get(key, 0)
        for operand in (number, by):
            if not isinstance(operand, int) or isinstance(operand, bool):
                raise TypeError(f"session key {key!r} cannot be incremented: {operand!r}")
        self[key] = number + by
        self._added[key] = self._added.get(key, 0) + by
        return self._values[key]  # type: ignore[no-any-return]

    # What a save needs.

    @property
    def size(self) -> int:
        """How many fields the store holds of this session, as far as is known."""
        return len(self._stored)

    @property
    def stored(self) -> dict[bytes, bytes]:
        """What the store is known to hold, raw by field."""
        return dict(self._stored)

    @property
    def has_stored_user(self) -> bool:
        """Whether somebody was logged in when this was loaded."""
        return USER_FIELD in self._stored

    @property
    def user_id(self) -> str | None:
        """The key of the user who is logged in."""
        key = self.get(_USER)
        return None if key is None else str(key)

    @property
    def user(self) -> bytes:
        """The tag of the user who is logged in, also of one who cannot be read."""
        if self.user_id is not None:
            return record.user_tag(self.user_id)
        return self._owner if self._is_unread(_USER) else record.NOBODY

    @_alone
    def changes(self) -> Changes:
        """Return what differs from what the store is known to hold.

        All of it anew where the user is another one: what cannot be read is not the new user's.

        Raises TypeError, naming the key, for a value that the serialiser refuses.
        """
        if self._changes_hands():
            anew = (Change(Operation.SET, field, b"", value) for field, value in self._readable())
            return Changes(tuple(anew), cleared=True)
        found: dict[bytes, Change] = {}
        sums: set[bytes] = set()
        for key, value in list(self._values.items()):
            if self._atoms.get(key, MISSING) is value:
                continue
            field = self._field(key)
            if self._is_sum(key, field, value):
                if self._added[key]:
                    found[field] = self._addition(key, field, value)
                    sums.add(field)
            elif (serialized := self._if_changed(key, field, value)) is not None:
                packed = self._pack(key, field, value, serialized)
                found[field] = Change(Operation.SET, field, self._version(field), packed)
        for field in self._missing():
            found[field] = Change(Operation.REMOVE, field, self._version(field), b"")
        return Changes(tuple(found.values()), self._cleared, frozenset(sums))

    @_alone
    def everything(self) -> list[tuple[bytes, bytes]]:
        """Return all fields with codec and payload, those that were never decoded included.

        Without what cannot be read where the user is another one than was stored.

        Raises TypeError, naming the key, for a value that the serialiser refuses.
        """
        if self._changes_hands():
            return self._readable()
        packed = {
            field: stored[record.VERSION_BYTES :]
            for field, stored in self._stored.items()
            if field in self._set_aside
        }
        for field in self._waiting:
            packed[field] = self._stored[field][record.VERSION_BYTES :]
        packed.update(self._packed())
        return list(packed.items())

    @_alone
    def written(self, changes: Changes, version: bytes, counters: list[int]) -> None:
        """Take note that the store now holds ``delta`` under ``version``.

        ``counters`` are the new values of what was added to, in the order of the delta. What was
        changed since the delta was taken is still to be written.
        """
        sums = iter(counters)
        added = self._added_since(
            {
                change.field: self._sum(change)
                if change.operation is Operation.ADD
                else change.operand
                for change in changes.fields
            }
        )
        if changes.cleared:
            self._stored = {}
            self._cleared = False
            self._set_aside = set()
        for change in changes.fields:
            if change.operation is Operation.REMOVE:
                self._stored.pop(change.field, None)
                continue
            operand = change.operand
            if change.operation is Operation.ADD:
                number = next(sums)
                operand = record.pack_counter(number)
                key = self._key(change.field)
                if self._is_sum(key, change.field, self._values.get(key)):
                    self._values[key] = number + added.get(key, 0)
            self._stored[change.field] = version + operand
            self._set_aside.discard(change.field)
        self._added = added
        self._atoms = {}
        self._unsettle()

    @_alone
    def created(self, fields: list[tuple[bytes, bytes]], version: bytes) -> None:
        """Take note that a new record now holds ``fields`` under ``version``. See written()."""
        added = self._added_since(dict(fields))
        self._stored = {field: version + packed for field, packed in fields}
        self._cleared = False
        self._added = added
        self._atoms = {}
        self._unsettle()

    @_alone
    def rebase(self, theirs: Mapping[bytes, bytes]) -> None:
        """Merge what others wrote meanwhile into this copy.

        ``theirs`` has the fields in conflict as they are stored now, empty where there is none.

        Raises TypeError where an integer was to be added to and is none any more.
        """
        for field, stored in theirs.items():
            key = self._key(field)
            base = self._read(key, self._stored.get(field, b""))
            mine = live = self._values.pop(key, MISSING)
            current = self._read(key, stored)
            if stored and current is MISSING:
                self._set_aside.add(field)
            if self._is_sum(key, field, mine):
                by = self._added.pop(key)
                if current is not MISSING:
                    self._values[key] = current
                self.increment(key, by)
            else:
                # As a reader would find it: under JSON, 1 as a key is "1", and a tuple a list.
                if mine is not MISSING:
                    mine = self._serializer.loads(self._serialize(key, mine))
                merged = merge(str(key), base, mine, current)
                if merged is not MISSING:
                    self._values[key] = self._replant(live, merged)
                    self._removed.discard(field)
                else:
                    self._removed.add(field)
            if stored:
                self._stored[field] = stored
            else:
                self._stored.pop(field, None)
            self._atoms.pop(key, None)

    @_alone
    def refresh(self, stored: Mapping[bytes, bytes], owner: bytes = record.NOBODY) -> None:
        """Take what the store holds now, and keep on top of it what was changed here.

        ``owner`` is the tag of the user whose it is now.

        Raises TypeError, as ``delta`` and ``rebase`` do.
        """
        if self._cleared:
            return
        changed = {change.field for change in self.changes().fields}
        self._owner = owner
        moved = {
            field: stored.get(field, b"")
            for field in self._stored.keys() | stored.keys()
            if stored.get(field) != self._stored.get(field)
        }
        self.rebase({field: moved.pop(field) for field in changed & moved.keys()})
        for field, now in moved.items():
            self._stored.pop(field, None)
            self._removed.discard(field)
            self._set_aside.discard(field)
            self._settled.pop(field, None)
            if now:
                self._stored[field] = now
            try:
                key = self._key(field)
            except Exception as error:
                if now:
                    self._put_aside(field, field, error)
                continue
            self._values.pop(key, None)
            self._atoms.pop(key, None)
            if now:
                self._waiting[field] = None
            else:
                self._waiting.pop(field, None)

    @_alone
    def snapshot(self) -> Snapshot:
        """Return what is changed here and not in the store, for ``restore``.

        Raises TypeError, as ``delta`` does.
        """
        return Snapshot(self.changes(), dict(self._added), self._stored, self._owner)

    @_alone
    def restore(self, snapshot: Snapshot) -> None:
        """Forget what was changed since the snapshot.

        Nothing must have been saved since.
        """
        self._values, self._atoms, self._added, self._removed = {}, {}, {}, set()
        self._stored, self._owner = snapshot.stored, snapshot.owner
        self._cleared = snapshot.changes.cleared
        self._waiting = dict.fromkeys(
            field for field in self._stored if field not in self._set_aside and not self._cleared
        )
        for change in snapshot.changes.fields:
            key = self._key(change.field)
            if change.operation is Operation.REMOVE:
                self._waiting.pop(change.field, None)
                self._removed.add(change.field)
            elif change.operation is Operation.ADD:
                self.increment(key, int(change.operand))
            else:
                self[key] = record.unpack(
                    bytes(record.VERSION_BYTES) + change.operand, self._serializer
                )
        self._added = dict(snapshot.added)
        self._unsettle()

    def as_stored(self, key: str) -> bool:
        """Return whether a key's value, or its absence, is what the store is known to hold."""
        field = record.field_of(key, self._serializer)
        if self._cleared:
            return False
        if key in self:
            return self._if_changed(key, field, self._values[key]) is None
        return field not in self._stored or field in self._set_aside

    # What a copy needs.

    @_alone
    def state(self) -> dict[str, Any]:
        """Return all that this knows, each part a copy, for ``resume``.

        Without what it reads with, and the guard: they may be bound to their process.
        """
        bound = ("_serializer", "_on_unreadable", "_guard")
        return {name: copy(value) for name, value in vars(self).items() if name not in bound}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Know what another one knew, whose ``state`` this is."""
        vars(self).update(state)

    # What ``modified`` needs.

    @_alone
    def settle(self) -> None:
        """Let ``changed_in_place`` look only at what changes from now on."""
        self._unsettle()
        with suppress(TypeError):
            self._settled_missing = self._missing()
        for key, value in self._values.items():
            with suppress(TypeError):
                self._settled[self._field(key)] = self._serialize(key, value)

    def changed_in_place(self) -> bool:
        """Return whether a value differs from what was loaded, or settled; never raise."""
        try:
            if (self._removed or self._settled_missing) and (
                self._missing() != self._settled_missing
            ):
                return True
            # No any(): a generator for each answer.
            for key, value in list(self._values.items()):  # noqa: SIM110
                if self._differs(key, value):
                    return True
            return False
        except Exception:
            # The save will say which value it is that cannot be written.
            return True

    # Inside.

    def _is_unread(self, key: str) -> bool:
        """Return whether a key's value is stored and cannot be read."""
        self._find(key)
        return record.field_of(key, self._serializer) in self._set_aside

    def _changes_hands(self) -> bool:
        """Return whether somebody was logged in, and somebody else or nobody is now."""
        if USER_FIELD not in self._stored or USER_FIELD in self._waiting:
            return False
        if self._atoms.get(_USER, MISSING) is self._values.get(_USER):
            return False
        before = user_id(self._stored[USER_FIELD], self._serializer)
        owner = self._owner if before is None else record.user_tag(before)
        return self.user != owner

    @_alone
    def _forget(self) -> None:
        """Forget everything, what is stored included: it is another user's."""
        self._stored, self._waiting, self._owner = {}, {}, record.NOBODY
        self._values, self._atoms, self._added = {}, {}, {}
        self._removed, self._set_aside = set(), set()
        self._cleared = True
        self._unsettle()

    def _readable(self) -> list[tuple[bytes, bytes]]:
        """Return all fields whose values can be read, with codec and payload."""
        self._all()
        return list(self._packed())

    def _packed(self) -> Iterator[tuple[bytes, bytes]]:
        for key, value in list(self._values.items()):
            field = self._field(key)
            yield field, self._pack(key, field, value, self._serialize(key, value))

    def _all(self) -> dict[Any, Any]:
        for field in list(self._waiting):
            self._decode(field)
        return self._values

    def _find(self, key: object) -> bool:
        """Decode a key's value where nobody has asked for it yet; return whether there is one."""
        if isinstance(key, str):
            field = record.field_of(key, self._serializer)
            if field in self._waiting:
                self._decode(field)
        else:
            # Keys that are equal, such as 1 and 1.0, may be written differently.
            for field in [field for field in self._waiting if field.startswith(record.ODD_DATA)]:
                self._decode(field)
        return key in self._values

    @_alone
    def _decode(self, field: bytes) -> None:
        if field not in self._waiting:
            # Another thread has done it meanwhile.
            return
        key: Any = field
        try:
            key = record.key_of(field, self._serializer)
            value = record.unpack(self._stored[field], self._serializer)
        except Exception as error:
            fault = fault_of(lambda: self._unpacked(field), error)
            del self._waiting[field]
            self._put_aside(key, field, fault)
            return
        self._values[key] = value
        if type(value) in _ATOMS:
            self._atoms[key] = value
        del self._waiting[field]

    def _unpacked(self, field: bytes) -> tuple[Any, Any]:
        key = record.key_of(field, self._serializer)
        return key, record.unpack(self._stored[field], self._serializer)

    def _put_aside(self, key: Any, field: bytes, error: Exception) -> None:
        self._set_aside.add(field)
        self._on_unreadable(key, error)

    def _read(self, key: Any, stored: bytes) -> Any:
        if not stored:
            return MISSING
        try:
            return record.unpack(stored, self._serializer)
        except Exception as error:
            fault = fault_of(lambda: record.unpack(stored, self._serializer), error)
            self._on_unreadable(key, fault)
            return MISSING

    def _version(self, field: bytes) -> bytes:
        return record.version_of(self._stored.get(field, b""))

    def _field(self, key: Any) -> bytes:
        try:
            return record.field_of(key, self._serializer)
        except Exception as error:
            fault = fault_of(lambda: record.field_of(key, self._serializer), error)
            raise TypeError(
                f"session key {key!r}: {type(self._serializer).__name__} cannot write it: {fault}"
            ) from fault

    def _serialize(self, key: Any, value: Any) -> bytes:
        try:
            return self._serializer.dumps(value)
        except Exception as error:
            fault = fault_of(lambda: self._serializer.dumps(value), error)
            raise TypeError(
                f"session key {key!r}: {type(self._serializer).__name__} cannot write "
                f"{type(value).__name__}: {fault}"
            ) from fault

    def _is_sum(self, key: Any, field: bytes, value: Any) -> bool:
        if key not in self._added or type(value) is not int:
            return False
        base = self._read(key, self._stored.get(field, b""))
        if base is MISSING:
            base = 0
        return type(base) is int and value == base + self._added[key]

    def _sum(self, change: Change) -> bytes:
        """Return what an addition makes of a counter, as far as is known here; packed."""
        base = self._stored.get(change.field)
        number = record.unpack(base, self._serializer) if base else 0
        return record.pack_counter(number + int(change.operand))

    def _added_since(self, sent: Mapping[bytes, bytes]) -> dict[Any, int]:
        """Return what is still to be added, by key; ``sent`` has what the store holds by now."""
        added: dict[Any, int] = {}
        for key, by in self._added.items():
            field, value = self._field(key), self._values.get(key)
            is_sum = self._is_sum(key, field, value)
            packed = sent.get(field)
            if packed is not None and record.is_counter(bytes(record.VERSION_BYTES) + packed):
                left = value - int(packed[1:]) if type(value) is int else 0
                if is_sum or by == left:
                    added[key] = left
            elif is_sum and packed is None:
                added[key] = by
        return {key: by for key, by in added.items() if by}

    def _addition(self, key: Any, field: bytes, value: int) -> Change:
        """Return what adds to a counter, or what makes one of an integer that is none yet."""
        stored = self._stored.get(field)
        is_counter = stored is None or (record.is_counter(stored) and field not in self._set_aside)
        if is_counter and record.is_addable(value) and record.is_addable(self._added[key]):
            return Change(Operation.ADD, field, b"", b"%d" % self._added[key])
        packed = self._pack(key, field, value, self._serialize(key, value))
        return Change(Operation.SET_COUNTER, field, self._version(field), packed)

    def _pack(self, key: Any, field: bytes, value: Any, serialized: bytes) -> bytes:
        """Return a value as stored: an integer that is added to, or was before, as a counter."""
        if type(value) is int and record.is_addable(value):
            stored = self._stored.get(field)
            if self._is_sum(key, field, value) or (stored and record.is_counter(stored)):
                return record.pack_counter(value)
        return record.pack(serialized)

    def _if_changed(self, key: Any, field: bytes, value: Any) -> bytes | None:
        """Return the value's serialised bytes, or None if it is what is stored."""
        atom = self._atoms.get(key, MISSING)
        if same(atom, value):
            return None
        serialized = self._serialize(key, value)
        if type(atom) is type(value):
            return serialized
        stored = self._stored.get(field)
        if stored is None or field in self._set_aside:
            return serialized
        try:
            return None if self._is_stored(value, serialized, stored) else serialized
        except Exception:
            # What is stored could not be read, and nobody has tried.
            return serialized

    def _is_stored(self, value: Any, serialized: bytes, stored: bytes) -> bool:
        if record.is_counter(stored):
            return type(value) is int and value == record.unpack(stored, self._serializer)
        return self._is_same(serialized, record.serialized(stored))

    def _is_same(self, serialized: bytes, before: bytes) -> bool:
        """Return whether two values are the same to a reader, by what the serialiser made of them.

        It may write equal values in different ways.
        """
        if serialized == before:
            return True
        original = self._serializer.loads(before)
        return self._serializer.dumps(original) != before and same(
            original, self._serializer.loads(serialized)
        )

    def _replant(self, live: Any, merged: Any) -> Any:
        """Return ``merged`` inside ``live`` and its containers, which a view may still hold.

        Not where another session key holds one of them too: what was merged is this key's alone.
        """
        elsewhere = _containers(list(self._values.values()))
        return merged if _containers(live) & elsewhere else _planted(live, merged)

    def _unsettle(self) -> None:
        self._settled = {}
        self._settled_missing = set()

    def _missing(self) -> set[bytes]:
        return (self._removed & self._stored.keys()) - self._set_aside

    def _differs(self, key: Any, value: Any) -> bool:
        if not self._settled and self._atoms.get(key, MISSING) is value:
            return False
        field = self._field(key)
        if field in self._settled:
            return not self._is_same(self._serialize(key, value), self._settled[field])
        if self._is_sum(key, field, value):
            return bool(self._added[key])
        return self._if_changed(key, field, value) is not None

    def _key(self, field: bytes) -> Any:
        """Return the key under which the request knows a field."""
        key = record.key_of(field, self._serializer)
        if key in self._values:
            return key
        # Only a key that is no string can be written differently.
        odd = (k for k in self._values if not isinstance(k, str))
        return next((k for k in odd if record.field_of(k, self._serializer) == field), key)


def _containers(value: Any) -> set[int]:
    """Return the identities of all dicts and lists in a value."""
    found: set[int] = set()
    waiting = [value]
    while waiting:
        some = waiting.pop()
        if type(some) in (dict, list) and id(some) not in found:
            found.add(id(some))
            waiting.extend(some.values() if type(some) is dict else some)
    return found


def _planted(live: Any, merged: Any) -> Any:
    if type(live) is dict and type(merged) is dict:
        before = dict(live)
        live.clear()
        live.update((key, _planted(before.get(key), value)) for key, value in merged.items())
        return live
    if type(live) is list and type(merged) is list:
        live[:] = merged
        return live
    return merged
