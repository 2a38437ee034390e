"""Import of one session, when a request brings its session key."""

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
from django_clustered_sessions.encryption import seal_of
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

from .old_engine import Found, Unreadable, ask, look, redacted, store_of

logger = logging.getLogger("django_clustered_sessions")

#: Time in ms that the mark of a taken-over session outlasts the session's longest life: for so
#: long nodes with the old engine may keep their copy alive.
_BESIDE_MS: Final = 30 * 24 * 60 * 60 * 1000


@dataclass(frozen=True, slots=True)
class Packed:
    """Session of the old engine in the form of the store.

    ``lost`` are the keys of values that the serialiser refuses, each with the value's type.
    """

    fields: Sequence[tuple[bytes, bytes]]
    user: bytes
    expiry: Expiry
    left_ms: int
    lost: Sequence[str]


def pack(found: Found, serializer: Serializer) -> Packed:
    """Return a session in the form of the store.

    Raises Unreadable for an invalid ``_session_expiry``.
    """
    values = dict(found.values)
    if isinstance(value := values.get("_session_expiry"), datetime):
        # Old releases of Django, with pickled sessions, stored a datetime.
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
    with_user = SessionData(serializer)
    with_user.update(values)
    return Packed(list(fields.items()), with_user.user, expiry, left_ms, lost)


def find(key: HiddenKey, keys: SessionKeys, serializer: Serializer) -> Flow[Packed | None]:
    """Look a session up and pack it; return None if there is none.

    Raises SessionStoreUnavailable and Unreadable; counts both, and logs the latter.
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
    """Take over a session that the store does not have; return whether it may have it now.

    Raises SessionStoreUnavailable if the store or the old engine fails.
    """
    was_moved, is_here = records.parse_adopted((yield records.adopted(keys)))
    if was_moved or is_here:
        # If it is here, another request has just taken it over.
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
    """Delete an ended session in the old engine too, for nodes that still use that engine."""
    if not conf.migrate_from or not (key.value.isascii() and key.value.isprintable()):
        return
    try:
        store = store_of(key)
        yield from ask(lambda: store.delete(key.value), lambda: store.adelete(key.value))
    except SuspiciousOperation:
        return
    except Exception as error:
        # No error: the session has ended here, and its mark prevents a second take-over.
        logger.warning(
            "a session that has ended is still in the session engine %s: %s: %s",
            conf.migrate_from,
            type(error).__name__,
            redacted(key, error),
        )


def adopt(keys: SessionKeys, packed: Packed, options: WriteOptions) -> Call:
    """Return the call that stores a session and marks it as taken over."""
    memory_ms = max(packed.left_ms, options.ages.default_ms) + _BESIDE_MS
    fields = packed.fields
    if seal := seal_of(keys.id):
        fields = [(field, seal.seal(field, value)) for field, value in fields]
    return records.adopt(
        keys,
        node_tag(conf.node_name) + secrets.token_bytes(VERSION_BYTES - NODE_BYTES),
        packed.expiry,
        fields,
        options,
        packed.user,
        packed.left_ms,
        memory_ms,
    )


def note(keys: SessionKeys, packed: Packed, reply: Any) -> bool:
    """Count the outcome of ``adopt``; return whether it took the session over."""
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
