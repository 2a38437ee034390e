"""The difference between a session's values here and those in the store.

It is found by comparing, so that an in-place change counts and a mere read does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from . import record, sealing
from .lazy_values import LazyValues
from .merge import MISSING, merge, replanted, same
from .record import EXPIRY_FIELD, USER_FIELD, USER_KEY, Serializer
from .sealing import Seal, Unopened


class Operation(StrEnum):
    """Operation of a commit on a field."""

    SET = "="
    #: SET that is refused where others changed the field, whatever ON_CONFLICT says.
    SET_COUNTER = "#"
    REMOVE = "-"
    ADD = "+"


class Change(NamedTuple):
    """A field's change, as ``lua/commit.lua`` takes it.

    ``loaded`` is the version it is based on, empty where there was none.
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
        return self.cleared or EXPIRY_FIELD in [change.field for change in self.fields]

    @property
    def changes_user(self) -> bool:
        """True if a user logs in or out by this, or everything is removed."""
        return self.cleared or USER_FIELD in [change.field for change in self.fields]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The changes of a session at some time, the stored fields then, and their user's tag.

    ``settled`` are the changes among them that ``settle`` has let pass.
    """

    changes: Changes
    added: Mapping[Any, int]
    stored: dict[bytes, bytes]
    owner: bytes
    settled: Mapping[bytes, bytes]
    settled_missing: Set[bytes]


class TrackedValues(LazyValues):
    """A session's values, and their changes since they were loaded or written.

    ``owner`` is the tag of the user to whom the stored values belong; ``cleared`` is True if all
    stored values are to be removed first. What looks at more than one key holds the guard.
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
        seal: Seal | None = None,
    ) -> None:
        self.serializer = serializer
        self.on_unreadable = on_unreadable
        self.guard = guard or nullcontext()
        self.seal = seal
        self.stored = dict(stored or {})
        self.live = {}
        self.undecoded = dict.fromkeys(self.stored)
        self.atoms = {}
        self.set_aside = set()
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
        if key == USER_KEY and self.is_unread(key) and self.owner != record.user_tag(value):
            self.forget()
        if isinstance(key, str):
            self.undecoded.pop(record.DATA + key.encode(*record.ENCODING), None)
        else:
            self.get(key)
        self.live[key] = value
        if self.removed:
            self.removed.discard(self.field(key))

    def remove(self, key: Any) -> None:
        """Remove a key that there is."""
        del self.live[key]
        self.removed.add(self.field(key))

    def increment(self, key: Any, by: int) -> int:
        """Add to an integer, 0 where there is none, and return the sum.

        Raises TypeError where the value is no integer.
        """
        with self.guard:
            number = self.get(key, 0)
            for operand in (number, by):
                if not isinstance(operand, int) or isinstance(operand, bool):
                    raise TypeError(f"session key {key!r} cannot be incremented: {operand!r}")
            self.put(key, number + by)
            self.added[key] = self.added.get(key, 0) + by
            return self.live[key]  # type: ignore[no-any-return]

    # Compare.

    @property
    def user_id(self) -> str | None:
        """Key of the user who is logged in."""
        key = self.get(USER_KEY)
        return None if key is None else str(key)

    @property
    def user(self) -> bytes:
        """Tag of the user who is logged in, also of one who cannot be read."""
        user_id = self.user_id
        if user_id is not None:
            return record.user_tag(user_id)
        return self.owner if self.is_unread(USER_KEY) else record.NOBODY

    def changes(self) -> Changes:
        """Return the differences from the fields that the store is known to hold.

        All values are set anew where the user is another one: a value that cannot be read is not
        the new user's.

        Raises TypeError, naming the key, for a value that the serialiser refuses.
        """
        with self.guard:
            if self._changes_hands():
                anew = (
                    Change(Operation.SET, field, b"", value) for field, value in self._readable()
                )
                return Changes(tuple(anew), cleared=True)
            found: dict[bytes, Change] = {}
            sums: set[bytes] = set()
            for key, value in list(self.live.items()):
                if self.atoms.get(key, MISSING) is value:
                    continue
                field = self.field(key)
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

    def sealed(self, changes: Changes) -> Changes:
        """Return changes with their values encrypted, where values are."""
        seal = self.seal
        if seal is None:
            return changes
        fields = (
            change._replace(operand=seal.seal(change.field, change.operand))
            if change.operation in (Operation.SET, Operation.SET_COUNTER)
            else change
            for change in changes.fields
        )
        return changes._replace(fields=tuple(fields))

    def everything(self, seal: Seal | None = None) -> list[tuple[bytes, bytes]]:
        """Return all fields with codec and payload, those that were never decoded included.

        Fields that cannot be read are left out where the user is another one than was stored.
        ``seal`` is that of the session to which they go, None without encryption. What is encrypted
        and no key opens does not go there: nothing could read it there.

        Raises TypeError, naming the key, for a value that the serialiser refuses.
        """
        with self.guard:
            if seal is not None:
                return [
                    (field, seal.seal(field, packed)) for field, packed in self._opened().items()
                ]
            if self._changes_hands():
                return self._readable()
            packed = {
                field: stored[record.VERSION_BYTES :]
                for field, stored in self.stored.items()
                if field in self.set_aside
            }
            for field in self.undecoded:
                packed[field] = self.stored[field][record.VERSION_BYTES :]
            packed.update(self._packed())
            return list(packed.items())

    def as_stored(self, key: str) -> bool:
        """Return whether a key's value, or its absence, is as the store is known to hold it."""
        if self.cleared:
            return False
        field = record.field_of(key, self.serializer)
        if key in self.live or field in self.undecoded:
            value = self.get(key, MISSING)
            if value is not MISSING:
                return self._if_changed(key, field, value) is None
        return field not in self.stored or field in self.set_aside

    def settle(self) -> None:
        """Let ``changed_in_place`` look only at later changes."""
        with self.guard:
            self._unsettle()
            with suppress(TypeError):
                self.settled_missing = self._missing()
            for key, value in self.live.items():
                with suppress(TypeError):
                    self.settled[self.field(key)] = self.serialize(key, value)

    def changed_in_place(self) -> bool:
        """Return whether a value differs from the one loaded, or settled; never raise."""
        try:
            if (self.removed or self.settled_missing) and self._missing() != self.settled_missing:
                return True
            for key, value in list(self.live.items()):
                if not self.settled and self.atoms.get(key, MISSING) is value:
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
        with self.guard:
            sums, added = iter(counters), {}
            if self.added:
                sent = {
                    change.field: self._sum(change)
                    if change.operation is Operation.ADD
                    else change.operand
                    for change in changes.fields
                }
                added = self._added_since(sent)
            if changes.cleared:
                self.stored, self.set_aside = {}, set()
                self.cleared = False
            for change in changes.fields:
                if change.operation is Operation.REMOVE:
                    self.stored.pop(change.field, None)
                    continue
                operand = change.operand
                if change.operation is Operation.ADD:
                    number = next(sums)
                    operand = record.pack_counter(number)
                    key = self.key(change.field)
                    if self._is_sum(key, change.field, self.live.get(key)):
                        self.live[key] = number + added.get(key, 0)
                self.stored[change.field] = version + operand
                self.set_aside.discard(change.field)
            self.added = added
            self.atoms = {}
            self._unsettle()

    def created(
        self, fields: list[tuple[bytes, bytes]], version: bytes, seal: Seal | None = None
    ) -> None:
        """Take note that a new record now holds ``fields`` under ``version``. See written()."""
        with self.guard:
            self.seal = seal
            added = self._added_since(dict(fields))
            self.stored = {field: version + packed for field, packed in fields}
            self.atoms = {}
            self.cleared = False
            self.added = added
            self._unsettle()

    def rebase(self, theirs: Mapping[bytes, bytes]) -> None:
        """Merge others' concurrent writes into this copy.

        ``theirs`` has the fields in conflict as they are stored now, empty where there is none.

        Raises TypeError where an integer was to be added to and is none any more.
        """
        with self.guard:
            for field, stored in theirs.items():
                key = self.key(field)
                base = self.read(key, field, self.stored.get(field, b""))
                mine = live = self.live.pop(key, MISSING)
                current = self.read(key, field, stored)
                if stored and current is MISSING:
                    self.set_aside.add(field)
                if self._is_sum(key, field, mine):
                    by = self.added.pop(key)
                    if current is not MISSING:
                        self.live[key] = current
                    self.increment(key, by)
                else:
                    # As a reader would find it: under JSON, 1 as a key is "1", and a tuple a list.
                    if mine is not MISSING:
                        mine = self.serializer.loads(self.serialize(key, mine))
                    merged = merge(str(key), base, mine, current)
                    if merged is not MISSING:
                        self.live[key] = replanted(live, merged, list(self.live.values()))
                        self.removed.discard(field)
                    else:
                        self.removed.add(field)
                if stored:
                    self.stored[field] = stored
                else:
                    self.stored.pop(field, None)
                self.atoms.pop(key, None)

    def refresh(
        self,
        stored: Mapping[bytes, bytes],
        owner: bytes = record.NOBODY,
        seal: Seal | None = None,
    ) -> None:
        """Take over the fields that the store holds now, and keep the changes made here.

        ``owner`` is the tag of the user to whom they belong now, ``seal`` the seal of them.

        Raises TypeError, as ``changes`` and ``rebase`` do.
        """
        with self.guard:
            if self.cleared:
                return
            changed = {change.field for change in self.changes().fields}
            self.owner, self.seal = owner, seal
            before = self.stored
            moved = {
                field: stored.get(field, b"")
                for field in before.keys() | stored.keys()
                if stored.get(field) != before.get(field)
            }
            self.rebase({field: moved.pop(field) for field in changed & moved.keys()})
            for field, now in moved.items():
                self.removed.discard(field)
                self.settled.pop(field, None)
                self.replace(field, now)

    def snapshot(self) -> Snapshot:
        """Return the changes that the store does not have, for ``restore``.

        Raises TypeError, as ``changes`` does.
        """
        with self.guard:
            return Snapshot(
                self.changes(),
                dict(self.added),
                self.stored,
                self.owner,
                dict(self.settled),
                frozenset(self.settled_missing),
            )

    def restore(self, snapshot: Snapshot) -> None:
        """Forget the changes since the snapshot.

        Nothing must have been saved since.
        """
        with self.guard:
            self.live, self.atoms, self.added, self.removed = {}, {}, {}, set()
            self.stored, self.owner = snapshot.stored, snapshot.owner
            self.cleared = snapshot.changes.cleared
            self.undecoded = dict.fromkeys(
                field for field in self.stored if field not in self.set_aside and not self.cleared
            )
            for change in snapshot.changes.fields:
                key = self.key(change.field)
                if change.operation is Operation.REMOVE:
                    self.undecoded.pop(change.field, None)
                    self.removed.add(change.field)
                elif change.operation is Operation.ADD:
                    self.increment(key, int(change.operand))
                else:
                    packed = bytes(record.VERSION_BYTES) + change.operand
                    self.put(key, record.unpack(packed, self.serializer))
            self.added = dict(snapshot.added)
            self.settled = dict(snapshot.settled)
            self.settled_missing = set(snapshot.settled_missing)

    # Inside.

    def _changes_hands(self) -> bool:
        """Return whether a user was logged in, and another one or none is now."""
        if USER_FIELD not in self.stored or USER_FIELD in self.undecoded:
            return False
        if self.atoms.get(USER_KEY, MISSING) is self.live.get(USER_KEY):
            return False
        before = sealing.user_id(self.stored[USER_FIELD], self.serializer, self.seal)
        owner = self.owner if before is None else record.user_tag(before)
        return self.user != owner

    def forget(self) -> None:
        """Forget everything, the stored fields included: they are another user's."""
        with self.guard:
            super().forget()
            self.owner, self.cleared = record.NOBODY, True
            self.added, self.removed = {}, set()
            self._unsettle()

    def _readable(self) -> list[tuple[bytes, bytes]]:
        """Return all fields whose values can be read, with codec and payload."""
        self.all()
        return list(self._packed())

    def _opened(self) -> dict[bytes, bytes]:
        """Return all fields that can be opened, with codec and payload before encryption."""
        if self._changes_hands():
            return dict(self._readable())
        self.all()
        packed = {}
        for field in self.set_aside & self.stored.keys():
            with suppress(Unopened):
                packed[field] = self.opened(field, self.stored[field])[record.VERSION_BYTES :]
        packed.update(self._packed())
        return packed

    def _packed(self) -> Iterator[tuple[bytes, bytes]]:
        for key, value in list(self.live.items()):
            field = self.field(key)
            yield field, self._pack(key, field, value, self.serialize(key, value))

    def _version(self, field: bytes) -> bytes:
        return self.stored.get(field, b"")[: record.VERSION_BYTES]

    def _missing(self) -> set[bytes]:
        return (self.removed & self.stored.keys()) - self.set_aside

    def _unsettle(self) -> None:
        self.settled = {}
        self.settled_missing = set()

    def _is_sum(self, key: Any, field: bytes, value: Any) -> bool:
        if key not in self.added or type(value) is not int:
            return False
        base = self.read(key, field, self.stored.get(field, b""))
        if base is MISSING:
            base = 0
        return type(base) is int and value == base + self.added[key]

    def _sum(self, change: Change) -> bytes:
        """Return the expected result of an addition to a counter; packed."""
        base = self.stored.get(change.field)
        number = record.unpack(base, self.serializer) if base else 0
        return record.pack_counter(number + int(change.operand))

    def _added_since(self, sent: Mapping[bytes, bytes]) -> dict[Any, int]:
        """Return the sums still to be added, by key; ``sent`` are fields the store has by now."""
        added: dict[Any, int] = {}
        for key, by in self.added.items():
            field, value = self.field(key), self.live.get(key)
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
        stored = self.stored.get(field)
        is_counter = stored is None or (record.is_counter(stored) and field not in self.set_aside)
        if is_counter and record.is_addable(value) and record.is_addable(self.added[key]):
            return Change(Operation.ADD, field, b"", b"%d" % self.added[key])
        packed = self._pack(key, field, value, self.serialize(key, value))
        return Change(Operation.SET_COUNTER, field, self._version(field), packed)

    def _pack(self, key: Any, field: bytes, value: Any, serialized: bytes) -> bytes:
        """Return a value as stored: an integer that is added to, or was before, as a counter."""
        if type(value) is int:
            is_counter = record.is_counter(self.stored.get(field, b"")) or (
                key in self.added and self._is_sum(key, field, value)
            )
            if is_counter and record.is_addable(value):
                return record.pack_counter(value)
        return record.pack(serialized)

    def _differs(self, key: Any, value: Any) -> bool:
        field = self.field(key)
        if field in self.settled:
            serialized = self.serialize(key, value)
            return not self._is_same(serialized, self.settled[field])
        if key in self.added and self._is_sum(key, field, value):
            return bool(self.added[key])
        return self._if_changed(key, field, value) is not None

    def _if_changed(self, key: Any, field: bytes, value: Any) -> bytes | None:
        """Return the value's serialised bytes, or None if it is the stored one."""
        atom = self.atoms.get(key, MISSING)
        if same(atom, value):
            return None
        serialized = self.serialize(key, value)
        if type(atom) is type(value):
            return serialized
        stored = self.stored.get(field)
        if stored is None or field in self.set_aside:
            return serialized
        try:
            stored = self.opened(field, stored)
            return None if self._is_stored(value, serialized, stored) else serialized
        except Exception:
            # The stored value cannot be read, and was not asked for before.
            return serialized

    def _is_stored(self, value: Any, serialized: bytes, stored: bytes) -> bool:
        if record.is_counter(stored):
            return type(value) is int and value == record.unpack(stored, self.serializer)
        return self._is_same(serialized, record.serialized(stored))

    def _is_same(self, serialized: bytes, before: bytes) -> bool:
        """Return whether two serialised values are the same to a reader.

        The serialiser may write equal values in different ways.
        """
        if serialized == before:
            return True
        serializer = self.serializer
        original = serializer.loads(before)
        return serializer.dumps(original) != before and same(original, serializer.loads(serialized))
