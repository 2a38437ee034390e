"""Import and export of all sessions at once, for ``manage.py sessionimport``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from django.contrib.sessions.backends.base import UpdateError

from django_clustered_sessions.encryption import seal_of
from django_clustered_sessions.protocol import flows
from django_clustered_sessions.protocol.commands import records
from django_clustered_sessions.protocol.effects import Flow
from django_clustered_sessions.protocol.options import WriteOptions
from django_clustered_sessions.protocol.record import (
    Damaged,
    EndReason,
    HiddenKey,
    Serializer,
    SessionKeys,
)
from django_clustered_sessions.protocol.session_data import SessionData

from .old_engine import Unreadable, ask, store_of, unavailable
from .on_demand import adopt, find, note


def take_over_all(
    session_keys: Sequence[HiddenKey],
    prefix: str,
    options: WriteOptions,
    serializer: Serializer,
    *,
    is_dry: bool,
) -> Flow[Counter[str]]:
    """Take over some sessions on two round trips; return the number of each outcome.

    ``is_dry``: change nothing, count only. Raises SessionStoreUnavailable.
    """
    came: Counter[str] = Counter()
    all_keys = [SessionKeys.of(prefix, key.value) for key in session_keys]
    replies = yield tuple(call for keys in all_keys for call in records.adopted(keys))
    calls, ready = [], []
    for at, (key, keys) in enumerate(zip(session_keys, all_keys, strict=True)):
        was_moved, is_here = records.parse_adopted(replies[2 * at : 2 * at + 2])
        if was_moved or is_here:
            came["here already" if is_here else "ended here"] += 1
            continue
        try:
            packed = yield from find(key, keys, serializer)
        except Unreadable:
            came["unreadable"] += 1
            continue
        if packed is None:
            came["expired or empty"] += 1
            continue
        came.update(f"lost {what}" for what in packed.lost)
        calls.append(adopt(keys, packed, options))
        ready.append((keys, packed))
    if is_dry or not calls:
        came["moved"] += len(calls)
        return came
    replies = yield tuple(calls)
    for (keys, packed), reply in zip(ready, replies, strict=True):
        came["moved" if note(keys, packed, reply) else "here already"] += 1
    return came


def write_back(
    session_keys: Sequence[HiddenKey], prefix: str, serializer: Serializer, *, is_dry: bool
) -> Flow[Counter[str]]:
    """Write sessions that were taken over back to the old engine; see ``take_over_all``."""
    came: Counter[str] = Counter()
    all_keys = [SessionKeys.of(prefix, key.value) for key in session_keys]
    replies = yield tuple(call for keys in all_keys for call in records.adopted(keys))
    for at, (key, keys) in enumerate(zip(session_keys, all_keys, strict=True)):
        was_moved, is_here = records.parse_adopted(replies[2 * at : 2 * at + 2])
        if not was_moved:
            came["never moved"] += 1
            continue
        try:
            came[
                (yield from _write_one_back(key, keys, serializer, is_here=is_here, is_dry=is_dry))
            ] += 1
        except Damaged:
            came["unreadable"] += 1
    return came


def _write_one_back(
    key: HiddenKey, keys: SessionKeys, serializer: Serializer, *, is_here: bool, is_dry: bool
) -> Flow[str]:
    found = (yield from flows.load(keys)).found if is_here else EndReason.UNKNOWN
    store = store_of(key)
    try:
        if isinstance(found, EndReason):
            if not is_dry:
                yield from ask(store.delete, store.adelete)
            return "ended here"
        seal = seal_of(keys.id, found.past)
        store._session_cache = SessionData(serializer, found.values, seal=seal).copy()
        if not is_dry:
            yield from ask(store.save, store.asave)
    except UpdateError:
        return "gone there"
    except Exception as error:
        raise unavailable(error, key) from error
    return "moved"
