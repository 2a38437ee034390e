"""
Merge two requests' changes of one session value without a lock.

`merge()` is given the value that both requests loaded (base), the value that the other one has
stored since (theirs), and the value that is about to be written (mine, the later commit):

- A side that left the value alone takes the other's change; the same change twice is one change.
- Dicts are merged key by key, recursively. The order is theirs, then my new keys.
- Lists that both sides only appended to: base, their additions, my additions.
- A container that one side deleted or emptied: only additions by the other side survive, at any
  depth. When nothing was added, it stays deleted or empty.
- Django's `_messages`: a side appends to the list, or consumes it and starts a new one. The
  additions of both survive, and base too unless a side consumed it.
- All else is mine: scalars, also where one side deleted a nested key and the other changed it;
  lists changed in other ways; changed types; tuples; subclasses of dict and list; as a whole, a
  value that is too deeply nested for Python's recursion limit, or raises anything else.

Equal values have equal types: True, 1 and 1.0 differ, and NaN equals itself. Values whose `==`
gives no bool, such as arrays, are equal where their pickles are.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from enum import Enum
from typing import Any, Final

from .faults import fault_of

MESSAGES_KEY: Final = "_messages"


class Missing(Enum):
    """Type of `MISSING`."""

    MISSING = "missing"


MISSING: Final = Missing.MISSING
"""Stand-in for a value that is not there: not yet in base, or deleted by a side."""


def merge(key: str, base: Any, mine: Any, theirs: Any) -> Any:
    """
    Return the merged value of the top-level session key, or `MISSING` if it is to be deleted.

    No argument is changed. The result may hold objects of mine, never any of base or theirs.
    Whatever the values raise, this raises nothing.
    """
    rule = _merge_messages if key == MESSAGES_KEY else _merge
    try:
        return rule(base, mine, deepcopy(theirs))
    except Exception as error:
        fault_of(lambda: rule(base, mine, deepcopy(theirs)), error)
        return mine


def _merge(base: Any, mine: Any, theirs: Any) -> Any:
    versions = (base, mine, theirs)
    kinds = {type(version) for version in versions if version is not MISSING}
    if len(kinds) != 1 or (kind := kinds.pop()) not in _RULES:
        return _last_write(*versions)
    merged = _RULES[kind](*(kind() if version is MISSING else version for version in versions))
    # Whether the container is there at all is a value of its own; additions bring it back.
    deleted = _last_write(*(version is MISSING for version in versions))
    return MISSING if deleted and not merged else merged


def _last_write(base: Any, mine: Any, theirs: Any) -> Any:
    return theirs if same(mine, base) else mine


def _merge_dicts(base: Any, mine: Any, theirs: Any) -> Any:
    keys = theirs | mine
    if not theirs:
        # The side that emptied the dict counts as the last writer in it: a scalar changed there by
        # the other side is no addition.
        mine, theirs = theirs, mine
    merged = {
        key: _merge(*(version.get(key, MISSING) for version in (base, mine, theirs)))
        for key in keys
    }
    return {key: value for key, value in merged.items() if value is not MISSING}


def _merge_lists(base: Any, mine: Any, theirs: Any) -> Any:
    if same(mine, base):
        return theirs
    if same(mine, theirs) or any(side and not _continues(side, base) for side in (mine, theirs)):
        return mine
    return _join_additions(base, mine, theirs)


def _merge_messages(base: Any, mine: Any, theirs: Any) -> Any:
    versions = (base, mine, theirs)
    if same(mine, base) or same(theirs, base) or same(theirs, mine):
        return _merge(*versions)
    try:
        lists = [[] if version is MISSING else json.loads(version) for version in versions]
    except (TypeError, ValueError):
        return _merge(*versions)
    if not all(isinstance(messages, list) for messages in lists):
        return _merge(*versions)
    merged = _join_additions(*lists)
    return json.dumps(merged) if merged else MISSING


def _join_additions(base: Any, mine: Any, theirs: Any) -> Any:
    """Join base, unless a side dropped it, with each side's additions, or its new list."""
    size = len(base)
    i_kept, they_kept = _continues(mine, base), _continues(theirs, base)
    kept = mine[:size] if i_kept and they_kept else []
    return kept + (theirs[size:] if they_kept else theirs) + (mine[size:] if i_kept else mine)


def _continues(side: Any, base: Any) -> bool:
    return same(side[: len(base)], base)


def same(one: Any, other: Any) -> bool:
    """Return whether two values are equal and of equal types, at any depth."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return repr(one) == repr(other)  # tells -0.0 from 0.0 and finds NaN equal to itself
    with suppress(Exception):
        if isinstance(equal := one == other, bool):
            return equal
    with suppress(Exception):
        return pickle.dumps(one) == pickle.dumps(other)
    return False


def replanted(live: Any, merged: Any, others: Any) -> Any:
    """Return ``merged`` inside ``live`` and its containers, which a view may still hold.

    Not where one of the containers is in ``others`` too: a merged value is one key's alone.
    """
    return merged if _containers(live) & _containers(others) else _planted(live, merged)


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


_RULES: Final[dict[Any, Callable[[Any, Any, Any], Any]]] = {
    dict: _merge_dicts,
    list: _merge_lists,
}
