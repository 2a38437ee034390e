"""The working copy of a session's values, between load and save."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any, Final

from . import record
from .changes import Changes, ChangeTracker, Snapshot
from .lazy_values import LazyValues
from .merge import MISSING
from .record import USER_FIELD, USER_KEY, Serializer

#: Parts that a copy does not take along: they may be bound to their process.
_BOUND: Final = frozenset({"serializer", "on_unreadable", "guard", "values"})


class SessionData(MutableMapping[Any, Any]):
    """A session's values by key: decoded when they are asked for, compared when they are saved.

    ``stored`` has each field's bytes as loaded (version, codec, payload), ``owner`` is the tag of
    the user to whom they belong. ``on_unreadable`` is called with a key (or the raw field) whose
    value cannot be read. Such a value is set aside: invisible, and kept in the store unless the key
    is set anew, or the user is another one from then on. With a user who cannot be read, all stored
    values count as set aside when another user is set. ``guard`` is a reentrant lock, where threads
    share the session.

    Not a dict on purpose: a dict that decodes late hands out values not decoded yet through
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
        self._guard = guard or nullcontext()
        self._values = LazyValues(serializer, stored, on_unreadable, self._guard)
        self._tracker = ChangeTracker(self._values, owner, cleared)

    # The mapping.

    def __getitem__(self, key: Any) -> Any:
        value = self.get(key, MISSING)
        if value is MISSING:
            raise KeyError(key)
        return value

    def get(self, key: Any, default: Any = None) -> Any:
        """Return a key's value, or ``default``; without an exception, unlike Mapping's."""
        values = self._values
        value = values.live.get(key, MISSING)
        if value is MISSING and values.find(key):
            value = values.live[key]
        return default if value is MISSING else value

    def __setitem__(self, key: Any, value: Any) -> None:
        self._tracker.put(key, value)

    def __delitem__(self, key: Any) -> None:
        if key not in self:
            raise KeyError(key)
        self._tracker.remove(key)

    def __contains__(self, key: object) -> bool:
        return key in self._values.live or self._values.find(key)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values.all())

    def __len__(self) -> int:
        return len(self._values.all())

    def __bool__(self) -> bool:
        return bool(self._values.live) or bool(self._values.all())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self._values.stored)} stored>"

    def copy(self) -> dict[Any, Any]:
        """Return all values as a plain dict."""
        return dict(self._values.all())

    def update(self, *others: Any, **named: Any) -> None:
        """Set some keys, the user's first: the others then are that user's."""
        values = dict(*others, **named)
        if USER_KEY in values:
            self[USER_KEY] = values.pop(USER_KEY)
        super().update(values)

    def increment(self, key: Any, by: int) -> int:
        """Add to an integer and return its new value, as far as this request knows.

        Raises TypeError where the value is no integer.
        """
        with self._guard:
            return self._tracker.increment(key, by)

    # Facts about the session.

    @property
    def size(self) -> int:
        """Number of fields that the store is known to hold of this session."""
        return len(self._values.stored)

    @property
    def stored(self) -> dict[bytes, bytes]:
        """Raw fields that the store is known to hold."""
        return dict(self._values.stored)

    @property
    def has_stored_user(self) -> bool:
        """True if a user was logged in when this was loaded."""
        return USER_FIELD in self._values.stored

    @property
    def user_id(self) -> str | None:
        """Key of the user who is logged in."""
        return self._tracker.user_id

    @property
    def user(self) -> bytes:
        """Tag of the user who is logged in, also of one who cannot be read."""
        return self._tracker.user

    # Changes: see ChangeTracker.

    def changes(self) -> Changes:
        """Return the differences from the fields that the store is known to hold.

        Raises TypeError, naming the key, for a value that the serialiser refuses.
        """
        with self._guard:
            return self._tracker.changes()

    def everything(self) -> list[tuple[bytes, bytes]]:
        """Return all fields with codec and payload.

        Raises TypeError, naming the key, for a value that the serialiser refuses.
        """
        with self._guard:
            return self._tracker.everything()

    def as_stored(self, key: str) -> bool:
        """Return whether a key's value, or its absence, is as the store is known to hold it."""
        return self._tracker.is_as_stored(key)

    def changed_in_place(self) -> bool:
        """Return whether a value differs from the one loaded, or settled; never raise."""
        return self._tracker.changed_in_place()

    def settle(self) -> None:
        """Let ``changed_in_place`` look only at later changes."""
        with self._guard:
            self._tracker.settle()

    def written(self, changes: Changes, version: bytes, counters: list[int]) -> None:
        """Take note that the store now holds ``changes`` under ``version``.

        ``counters`` are the new values of the fields that were added to, in the order of the
        changes. Later changes are still to be written.
        """
        with self._guard:
            self._tracker.written(changes, version, counters)

    def created(self, fields: list[tuple[bytes, bytes]], version: bytes) -> None:
        """Take note that a new record now holds ``fields`` under ``version``. See written()."""
        with self._guard:
            self._tracker.created(fields, version)

    def rebase(self, theirs: Mapping[bytes, bytes]) -> None:
        """Merge others' concurrent writes into this copy.

        ``theirs`` has the fields in conflict as they are stored now, empty where there is none.

        Raises TypeError where an integer was to be added to and is none any more.
        """
        with self._guard:
            self._tracker.rebase(theirs)

    def refresh(self, stored: Mapping[bytes, bytes], owner: bytes = record.NOBODY) -> None:
        """Take over the fields that the store holds now, and keep the changes made here.

        ``owner`` is the tag of the user to whom they belong now.

        Raises TypeError, as ``changes`` and ``rebase`` do.
        """
        with self._guard:
            self._tracker.refresh(stored, owner)

    def snapshot(self) -> Snapshot:
        """Return the changes that the store does not have, for ``restore``.

        Raises TypeError, as ``changes`` does.
        """
        with self._guard:
            return self._tracker.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Forget the changes since the snapshot.

        Nothing must have been saved since.
        """
        with self._guard:
            self._tracker.restore(snapshot)

    # A copy of the whole.

    def state(self) -> dict[str, Any]:
        """Return copies of all parts but those that may be bound to their process."""
        with self._guard:
            parts = vars(self._values) | vars(self._tracker)
            return {name: copy(value) for name, value in parts.items() if name not in _BOUND}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take over another object's ``state``."""
        for part in (self._values, self._tracker):
            known = vars(part)
            known.update({name: value for name, value in state.items() if name in known})
