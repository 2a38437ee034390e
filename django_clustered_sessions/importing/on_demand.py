"""One session, when a request brings its key."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from django.core.exceptions import SuspiciousOperation

from django_clustered_sessions.conf import conf
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol.commands import records
from django_clustered_sessions.protocol.effects import Call, Flow
from django_clustered_sessions.protocol.options import Expiry, WriteOptions
from django_clustered_sessions.protocol.record import (
    NODE_BYTES,
    VERSION_BYTES,
    HiddenKey,
    Serializer,
    SessionKeys,
    milliseconds_of,
    node_tag,
)
from django_clustered_sessions.protocol.results import Alive
from django_clustered_sessions.protocol.session_data import SessionData

from .old_engine import Found, Unreadable, ask, look, store_of, without

logger = logging.getLogger("django_clustered_sessions")

#: How long beyond its longest life a session that was taken over is remembered, in ms: for so
#: long nodes with the old engine may keep theirs alive.
_BESIDE_MS: Final = 30 * 24 * 60 * 60 * 1000


@dataclass(frozen=True, slots=True)
class Packed:
    """A session of the old engine as the store is to have it.

    ``lost`` are the keys of values that the serialiser refuses, each with the value's type.
    """

    fields: Sequence[tuple[bytes, bytes]]
    user: bytes
    expiry: Expiry
    left_ms: int
    lost: Sequence[str]


def pack(found: Found, serializer: Serializer) -> Packed:
    """Return a session as the store is to have it.

    Raises Unreadable where its ``_session_expiry`` makes no sense.
    """
    values = dict(found.values)
    if isinstance(value := values.get("_session_expiry"), datetime):
        # As releases of Django stored it that had pickled sessions.
        values["_session_expiry"] = value.isoformat()
    fields: dict[bytes, bytes] = {}
    lost = []
    for key, value in values.items():
        one = SessionData(serializer)
        try:
            one[key] = value
            fields.update(one.everything())
        except TypeError:
            lost.append(f"{key!r} ({type(value).__name__})")
    try:
        expiry = Expiry.of(values.get("_session_expiry"))
    except (TypeError, ValueError) as error:
        raise Unreadable(f"_session_expiry: {error}") from error
    left_ms = milliseconds_of(found.until) - round(time.time() * 1000)
    whose = SessionData(serializer)
    whose.update(values)
    return Packed(list(fields.items()), whose.user, expiry, left_ms, lost)


def find(key: HiddenKey, keys: SessionKeys, serializer: Serializer) -> Flow[Packed | None]:
    """Look a session up and pack it; None where there is none.

    Raises SessionStoreUnavailable, Unreadable: both are counted, the latter is in the log too.
    """
    counters.add(takeovers_asked=1)
    try:
        found = yield from look(key)
        return pack(found, serializer) if found else None
    except SessionStoreUnavailable:
        counters.add(takeovers_failed=1)
        raise
    except Unreadable as error:
        counters.add(takeovers_failed=1)
        logger.warning("session %s is not taken over: %s", keys.id[:12], error)
        raise


def take_over(
    key: HiddenKey, keys: SessionKeys, options: WriteOptions, serializer: Serializer
) -> Flow[bool]:
    """Take a session over that the store knows nothing of; return whether it may be there now.

    Raises SessionStoreUnavailable where the store or the old engine fails.
    """
    was_moved, is_here = records.parse_adopted((yield records.adopted(keys)))
    if was_moved or is_here:
        # Here: another request was faster, a moment ago.
        return is_here
    try:
        packed = yield from find(key, keys, serializer)
    except Unreadable:
        return False
    if packed is None:
        return False
    (reply,) = yield (adopt(keys, packed, options),)
    note(keys, packed, reply)
    return True


def leave(key: HiddenKey) -> Flow[None]:
    """Delete a session that has ended here in the old engine too, for nodes that still use it."""
    if not conf.migrate_from or not (key.value.isascii() and key.value.isprintable()):
        return
    try:
        store = store_of(key)
        yield from ask(lambda: store.delete(key.value), lambda: store.adelete(key.value))
    except SuspiciousOperation:
        return
    except Exception as error:
        # It has ended here, and is not taken over again.
        logger.warning(
            "a session that has ended is still in the session engine %s: %s: %s",
            conf.migrate_from,
            type(error).__name__,
            without(key, error),
        )


def adopt(keys: SessionKeys, packed: Packed, options: WriteOptions) -> Call:
    """Return the call that stores a session and marks it as taken over."""
    memory_ms = max(packed.left_ms, options.default_age_ms) + _BESIDE_MS
    return records.adopt(
        keys,
        node_tag(conf.node_name) + secrets.token_bytes(VERSION_BYTES - NODE_BYTES),
        packed.expiry,
        packed.fields,
        options,
        packed.user,
        packed.left_ms,
        memory_ms,
    )


def note(keys: SessionKeys, packed: Packed, reply: Any) -> bool:
    """Count what ``adopt`` came to; return whether the session was taken over by it."""
    found = records.parse_create(reply)
    if not isinstance(found, Alive):
        return False
    counters.add(created=1, expired=found.swept, takeovers=1, takeover_values_lost=len(packed.lost))
    if packed.lost:
        logger.warning(
            "session %s is taken over without what SESSION_SERIALIZER cannot write: %s",
            keys.id[:12],
            ", ".join(packed.lost),
        )
    return True
