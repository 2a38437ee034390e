"""The difference between a session's values here and those in the store.

It is found by comparing, so that an in-place change counts and a mere read does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from . import record
from .lazy_values import LazyValues
from .merge import MISSING, merge, replanted, same
from .record import EXPIRY_FIELD, USER_FIELD, USER_KEY


class Operation(StrEnum):
    """Operation of a commit on a field."""

    SET = "="
    #: SET that is refused where others changed the field, whatever ON_CONFLICT says.
    SET_COUNTER = "#"
    REMOVE = "-"
    ADD = "+"


class Change(NamedTuple):
    """A field's change: ``loaded`` is the version it is based on, empty where there was none.

    ``operand`` is the value to set as codec and payload, the decimal number to add, or empty.
    """

    operation: Operation
    field: bytes
    loaded: bytes
    operand: bytes


class Changes(NamedTuple):
    """A request's changes; with ``cleared``, after all stored values are removed.

    ``sums`` are the fields that are added to.
    """

    fields: tuple[Change, ...]
    cleared: bool
    sums: frozenset[bytes] = frozenset()

    def __bool__(self) -> bool:
        return self.cleared or bool(self.fields)

    @property
    def expiry_changed(self) -> bool:
        """True if ``_session_expiry`` is among the changes."""
        return self._is_about(EXPIRY_FIELD)

    @property
    def changes_user(self) -> bool:
        """True if a user logs in or out by this, or everything is removed."""
        return self._is_about(USER_FIELD)

    def _is_about(self, field: bytes) -> bool:
        return self.cleared or any(change.field == field for change in self.fields)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The changes of a session at some time, the stored fields then, and their user's tag."""

    changes: Changes
    added: Mapping[Any, int]
    stored: dict[bytes, bytes]
    owner: bytes


class ChangeTracker:
    """Changes to a session's values since they were loaded or written.

    ``owner`` is the tag of the user to whom the stored values belong; ``cleared`` is True if all
    stored values are to be removed first. A caller holds the guard of ``values``, unless it only
    reads or sets one key.
    """

    def __init__(self, values: LazyValues, owner: bytes, cleared: bool) -> None:
        self.values = values
        self.owner = owner
        self.cleared = cleared
        self.removed: set[bytes] = set()
        #: Sums added to integers, by key, that the store does not have yet.
        self.added: dict[Any, int] = {}
        #: Serialised values, and the removed fields, as they were when ``settle`` was called.
        self.settled: dict[bytes, bytes] = {}
        self.settled_missing: set[bytes] = set()

    # Change.

    def put(self, key: Any, value: Any) -> None:
        """Set a key. A new user's values do not include those of a user who cannot be read."""
        values = self.values
        if key == USER_KEY and values.is_unread(key) and self.owner != record.user_tag(value):
            self._forget()
        if isinstance(key, str):
            values.undecoded.pop(record.field_of(key, values.serializer), None)
        else:
            values.find(key)
        values.live[key] = value
        if self.removed:
            self.removed.discard(values.field(key))

    def remove(self, key: Any) -> None:
        """Remove a key that there is."""
        del self.values.live[key]
        self.removed.add(self.values.field(key))

    def increment(self, key: Any, by: int) -> int:
        """Add to an integer, 0 where there is none, and return the sum.

        Raises TypeError where the value is no integer.
        """
        live = self.values.live
        number = live[key] if key in live or self.values.find(key) else 0
        for operand in (number, by):
            if not isinstance(operand, int) or isinstance(operand, bool):
                raise TypeError(f"session key {key!r} cannot be incremented: {operand!r}")
        self.put(key, number + by)
        self.added[key] = self.added.get(key, 0) + by
        return self.values.live[key]  # type: ignore[no-any-return]

    # Compare.

    @property
    def user_id(self) -> str | None:
        """Key of the user who is logged in."""
        live = self.values.live
        key = live[USER_KEY] if USER_KEY in live or self.values.find(USER_KEY) else None
        return None if key is None else str(key)

    @property
    def user(self) -> bytes:
        """Tag of the user who is logged in, also of one who cannot be read."""
        user_id = self.user_id
        if user_id is not None:
            return record.user_tag(user_id)
        return self.owner if self.values.is_unread(USER_KEY) else record.NOBODY

    def changes(self) -> Changes:
        """Return the differences from the fields that the store is known to hold.

        All values are set anew where the user is another one: a value that cannot be read is not
        the new user's.

        Raises TypeError, naming the key, for a value that the serialiser refuses.
        """
        if self._changes_hands():
            anew = (Change(Operation.SET, field, b"", value) for field, value in self._readable())
            return Changes(tuple(anew), cleared=True)
        values = self.values
        found: dict[bytes, Change] = {}
        sums: set[bytes] = set()
        for key, value in list(values.live.items()):
            if values.atoms.get(key, MISSING) is value:
                continue
            field = values.field(key)
            if key in self.added and self._is_sum(key, field, value):
                if self.added[key]:
                    found[field] = self._addition(key, field, value)
                    sums.add(field)
            elif (serialized := self._if_changed(key, field, value)) is not None:
                packed = self._pack(key, field, value, serialized)
                found[field] = Change(Operation.SET, field, self._version(field), packed)
        for field in self._missing():
            found[field] = Change(Operation.REMOVE, field, self._version(field), b"")
        return Changes(tuple(found.values()), self.cleared, frozenset(sums))

    def everything(self) -> list[tuple[bytes, bytes]]:
        """Return all fields with codec and payload, those that were never decoded included.

        Fields that cannot be read are left out where the user is another one than was stored.

        Raises TypeError, naming the key, for a value that the serialiser refuses.
        """
        if self._changes_hands():
            return self._readable()
        values = self.values
        packed = {
            field: stored[record.VERSION_BYTES :]
            for field, stored in values.stored.items()
            if field in values.set_aside
        }
        for field in values.undecoded:
            packed[field] = values.stored[field][record.VERSION_BYTES :]
        packed.update(self._packed())
        return list(packed.items())

    def is_as_stored(self, key: str) -> bool:
        """Return whether a key's value, or its absence, is as the store is known to hold it."""
        values = self.values
        if self.cleared:
            return False
        field = record.field_of(key, values.serializer)
        if key in values.live or values.find(key):
            return self._if_changed(key, field, values.live[key]) is None
        return field not in values.stored or field in values.set_aside

    def settle(self) -> None:
        """Let ``changed_in_place`` look only at later changes."""
        self._unsettle()
        with suppress(TypeError):
            self.settled_missing = self._missing()
        for key, value in self.values.live.items():
            with suppress(TypeError):
                self.settled[self.values.field(key)] = self.values.serialize(key, value)

    def changed_in_place(self) -> bool:
        """Return whether a value differs from the one loaded, or settled; never raise."""
        values = self.values
        try:
            if (self.removed or self.settled_missing) and self._missing() != self.settled_missing:
                return True
            for key, value in list(values.live.items()):
                if not self.settled and values.atoms.get(key, MISSING) is value:
                    continue
                if self._differs(key, value):
                    return True
            return False
        except Exception:
            # The save will name the value that cannot be written.
            return True

    # Take over the fields of the store.

    def written(self, changes: Changes, version: bytes, counters: list[int]) -> None:
        """Take note that the store now holds ``changes`` under ``version``.

        ``counters`` are the new values of the fields that were added to, in the order of the
        changes. Later changes are still to be written.
        """
        values, sums = self.values, iter(counters)
        added = self._added_since(
            {
                change.field: self._sum(change)
                if change.operation is Operation.ADD
                else change.operand
                for change in changes.fields
            }
        )
        if changes.cleared:
            values.stored, values.set_aside = {}, set()
            self.cleared = False
        for change in changes.fields:
            if change.operation is Operation.REMOVE:
                values.stored.pop(change.field, None)
                continue
            operand = change.operand
            if change.operation is Operation.ADD:
                number = next(sums)
                operand = record.pack_counter(number)
                key = values.key(change.field)
                if self._is_sum(key, change.field, values.live.get(key)):
                    values.live[key] = number + added.get(key, 0)
            values.stored[change.field] = version + operand
            values.set_aside.discard(change.field)
        self.added = added
        values.atoms = {}
        self._unsettle()

    def created(self, fields: list[tuple[bytes, bytes]], version: bytes) -> None:
        """Take note that a new record now holds ``fields`` under ``version``. See written()."""
        added = self._added_since(dict(fields))
        self.values.stored = {field: version + packed for field, packed in fields}
        self.values.atoms = {}
        self.cleared = False
        self.added = added
        self._unsettle()

    def rebase(self, theirs: Mapping[bytes, bytes]) -> None:
        """Merge others' concurrent writes into this copy.

        ``theirs`` has the fields in conflict as they are stored now, empty where there is none.

        Raises TypeError where an integer was to be added to and is none any more.
        """
        values = self.values
        for field, stored in theirs.items():
            key = values.key(field)
            base = values.read(key, values.stored.get(field, b""))
            mine = live = values.live.pop(key, MISSING)
            current = values.read(key, stored)
            if stored and current is MISSING:
                values.set_aside.add(field)
            if self._is_sum(key, field, mine):
                by = self.added.pop(key)
                if current is not MISSING:
                    values.live[key] = current
                self.increment(key, by)
            else:
                # As a reader would find it: under JSON, 1 as a key is "1", and a tuple a list.
                if mine is not MISSING:
                    mine = values.serializer.loads(values.serialize(key, mine))
                merged = merge(str(key), base, mine, current)
                if merged is not MISSING:
                    values.live[key] = replanted(live, merged, list(values.live.values()))
                    self.removed.discard(field)
                else:
                    self.removed.add(field)
            if stored:
                values.stored[field] = stored
            else:
                values.stored.pop(field, None)
            values.atoms.pop(key, None)

    def refresh(self, stored: Mapping[bytes, bytes], owner: bytes) -> None:
        """Take over the fields that the store holds now, and keep the changes made here.

        ``owner`` is the tag of the user to whom they belong now.

        Raises TypeError, as ``changes`` and ``rebase`` do.
        """
        if self.cleared:
            return
        changed = {change.field for change in self.changes().fields}
        self.owner = owner
        before = self.values.stored
        moved = {
            field: stored.get(field, b"")
            for field in before.keys() | stored.keys()
            if stored.get(field) != before.get(field)
        }
        self.rebase({field: moved.pop(field) for field in changed & moved.keys()})
        for field, now in moved.items():
            self.removed.discard(field)
            self.settled.pop(field, None)
            self.values.replace(field, now)

    def snapshot(self) -> Snapshot:
        """Return the changes that the store does not have, for ``restore``.

        Raises TypeError, as ``changes`` does.
        """
        return Snapshot(self.changes(), dict(self.added), self.values.stored, self.owner)

    def restore(self, snapshot: Snapshot) -> None:
        """Forget the changes since the snapshot.

        Nothing must have been saved since.
        """
        values = self.values
        values.live, values.atoms, self.added, self.removed = {}, {}, {}, set()
        values.stored, self.owner = snapshot.stored, snapshot.owner
        self.cleared = snapshot.changes.cleared
        values.undecoded = dict.fromkeys(
            field for field in values.stored if field not in values.set_aside and not self.cleared
        )
        for change in snapshot.changes.fields:
            key = values.key(change.field)
            if change.operation is Operation.REMOVE:
                values.undecoded.pop(change.field, None)
                self.removed.add(change.field)
            elif change.operation is Operation.ADD:
                self.increment(key, int(change.operand))
            else:
                packed = bytes(record.VERSION_BYTES) + change.operand
                self.put(key, record.unpack(packed, values.serializer))
        self.added = dict(snapshot.added)
        self._unsettle()

    # Inside.

    def _changes_hands(self) -> bool:
        """Return whether a user was logged in, and another one or none is now."""
        values = self.values
        if USER_FIELD not in values.stored or USER_FIELD in values.undecoded:
            return False
        if values.atoms.get(USER_KEY, MISSING) is values.live.get(USER_KEY):
            return False
        before = record.user_id(values.stored[USER_FIELD], values.serializer)
        owner = self.owner if before is None else record.user_tag(before)
        return self.user != owner

    def _forget(self) -> None:
        """Forget everything, the stored fields included: they are another user's."""
        with self.values.guard:
            self.values.forget()
            self.owner, self.cleared = record.NOBODY, True
            self.added, self.removed = {}, set()
            self._unsettle()

    def _readable(self) -> list[tuple[bytes, bytes]]:
        """Return all fields whose values can be read, with codec and payload."""
        self.values.all()
        return list(self._packed())

    def _packed(self) -> Iterator[tuple[bytes, bytes]]:
        values = self.values
        for key, value in list(values.live.items()):
            field = values.field(key)
            yield field, self._pack(key, field, value, values.serialize(key, value))

    def _version(self, field: bytes) -> bytes:
        return record.version_of(self.values.stored.get(field, b""))

    def _missing(self) -> set[bytes]:
        return (self.removed & self.values.stored.keys()) - self.values.set_aside

    def _unsettle(self) -> None:
        self.settled = {}
        self.settled_missing = set()

    def _is_sum(self, key: Any, field: bytes, value: Any) -> bool:
        if key not in self.added or type(value) is not int:
            return False
        base = self.values.read(key, self.values.stored.get(field, b""))
        if base is MISSING:
            base = 0
        return type(base) is int and value == base + self.added[key]

    def _sum(self, change: Change) -> bytes:
        """Return the expected result of an addition to a counter; packed."""
        base = self.values.stored.get(change.field)
        number = record.unpack(base, self.values.serializer) if base else 0
        return record.pack_counter(number + int(change.operand))

    def _added_since(self, sent: Mapping[bytes, bytes]) -> dict[Any, int]:
        """Return the sums still to be added, by key; ``sent`` are fields the store has by now."""
        added: dict[Any, int] = {}
        for key, by in self.added.items():
            field, value = self.values.field(key), self.values.live.get(key)
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
        """Return the change that adds to a counter, or makes one of another integer."""
        values = self.values
        stored = values.stored.get(field)
        is_counter = stored is None or (record.is_counter(stored) and field not in values.set_aside)
        if is_counter and record.is_addable(value) and record.is_addable(self.added[key]):
            return Change(Operation.ADD, field, b"", b"%d" % self.added[key])
        packed = self._pack(key, field, value, values.serialize(key, value))
        return Change(Operation.SET_COUNTER, field, self._version(field), packed)

    def _pack(self, key: Any, field: bytes, value: Any, serialized: bytes) -> bytes:
        """Return a value as stored: an integer that is added to, or was before, as a counter."""
        if type(value) is int and record.is_addable(value):
            stored = self.values.stored.get(field)
            if self._is_sum(key, field, value) or (stored and record.is_counter(stored)):
                return record.pack_counter(value)
        return record.pack(serialized)

    def _differs(self, key: Any, value: Any) -> bool:
        field = self.values.field(key)
        if field in self.settled:
            serialized = self.values.serialize(key, value)
            return not self._is_same(serialized, self.settled[field])
        if key in self.added and self._is_sum(key, field, value):
            return bool(self.added[key])
        return self._if_changed(key, field, value) is not None

    def _if_changed(self, key: Any, field: bytes, value: Any) -> bytes | None:
        """Return the value's serialised bytes, or None if it is the stored one."""
        values = self.values
        atom = values.atoms.get(key, MISSING)
        if same(atom, value):
            return None
        serialized = values.serialize(key, value)
        if type(atom) is type(value):
            return serialized
        stored = values.stored.get(field)
        if stored is None or field in values.set_aside:
            return serialized
        try:
            return None if self._is_stored(value, serialized, stored) else serialized
        except Exception:
            # The stored value cannot be read, and was not asked for before.
            return serialized

    def _is_stored(self, value: Any, serialized: bytes, stored: bytes) -> bool:
        if record.is_counter(stored):
            return type(value) is int and value == record.unpack(stored, self.values.serializer)
        return self._is_same(serialized, record.serialized(stored))

    def _is_same(self, serialized: bytes, before: bytes) -> bool:
        """Return whether two serialised values are the same to a reader.

        The serialiser may write equal values in different ways.
        """
        if serialized == before:
            return True
        serializer = self.values.serializer
        original = serializer.loads(before)
        return serializer.dumps(original) != before and same(original, serializer.loads(serialized))
