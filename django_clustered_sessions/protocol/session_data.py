"""The working copy of a session's values, between load and save."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from copy import copy
from typing import Any, Final

from .changes import TrackedValues
from .merge import MISSING
from .record import USER_FIELD, USER_KEY

#: Parts that a copy does not take along: they may be bound to their process.
_BOUND: Final = frozenset({"serializer", "on_unreadable", "guard"})


class SessionData(TrackedValues, MutableMapping[Any, Any]):
    """A session's values by key: decoded when they are asked for, compared when they are saved.

    ``stored`` has each field's bytes as loaded (version, codec, payload), ``owner`` is the tag of
    the user to whom they belong. ``on_unreadable`` is called with a key (or the raw field) whose
    value cannot be read. Such a value is set aside: invisible, and kept in the store unless the key
    is set anew, or the user is another one from then on. With a user who cannot be read, all stored
    values count as set aside when another user is set. ``guard`` is a reentrant lock, where threads
    share the session. ``seal`` encrypts values for the store, None where they are not.

    Not a dict on purpose: a dict that decodes late hands out values not decoded yet through
    ``dict(x)``, ``{**x}`` and ``==``.
    """

    def __getitem__(self, key: Any) -> Any:
        value = self.get(key, MISSING)
        if value is MISSING:
            raise KeyError(key)
        return value

    __setitem__ = TrackedValues.put

    def __delitem__(self, key: Any) -> None:
        if key not in self:
            raise KeyError(key)
        self.remove(key)

    def __contains__(self, key: object) -> bool:
        return self.get(key, MISSING) is not MISSING

    def __iter__(self) -> Iterator[Any]:
        return iter(self.all())

    def __len__(self) -> int:
        return len(self.all())

    def __bool__(self) -> bool:
        return bool(self.live) or bool(self.all())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self.stored)} stored>"

    def copy(self) -> dict[Any, Any]:
        """Return all values as a plain dict."""
        return dict(self.all())

    def update(self, *others: Any, **named: Any) -> None:
        """Set some keys, the user's first: the others then are that user's."""
        values = dict(*others, **named)
        if USER_KEY in values:
            self[USER_KEY] = values.pop(USER_KEY)
        super().update(values)

    @property
    def has_stored_user(self) -> bool:
        """True if a user was logged in when this was loaded."""
        return USER_FIELD in self.stored

    # A copy of the whole.

    def state(self) -> dict[str, Any]:
        """Return copies of all parts but those that may be bound to their process."""
        with self.guard:
            return {name: copy(part) for name, part in vars(self).items() if name not in _BOUND}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take over another object's ``state``."""
        known = vars(self)
        known.update({name: part for name, part in state.items() if name in known})
