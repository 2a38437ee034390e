"""End a session for good."""

from __future__ import annotations

from contextlib import suppress
from typing import Final, cast

from django.contrib.auth import HASH_SESSION_KEY as HASH

from django_clustered_sessions.conf import conf
from django_clustered_sessions.encryption import seal_of, user_told
from django_clustered_sessions.importing import on_demand
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol import flows
from django_clustered_sessions.protocol.effects import Flow
from django_clustered_sessions.protocol.record import (
    DATA,
    VERSION_BYTES,
    EndReason,
    HiddenKey,
    Loaded,
    SessionKeys,
)
from django_clustered_sessions.protocol.sealing import Seal, Unopened
from django_clustered_sessions.signals import session_ended

from .lifetime import Lifetime
from .load import follow, move_in
from .near_cache import near_cache
from .replication import Replication, wanted
from .state import SessionState

_HASH_FIELD: Final = DATA + HASH.encode()


def end(state: SessionState, key: HiddenKey | None) -> Flow[None]:
    """End the session under a key, this one if None; no request brings it back."""
    reason = EndReason.DELETED
    if key is None:
        # A logout is one, also where the session has moved meanwhile: the cookie goes.
        key, reason, state.ended = HiddenKey.of(state.session_key), EndReason.FLUSHED, None
    if key is None:
        return
    keys, replication = state.keys_of(key.value), Replication()
    near_cache.drop(keys.record)
    ending = flows.end(keys, reason, conf.events_kept)
    ended = yield from replication.awaited(keys, ending, wanted(state.operation_budget))
    if not ended and (
        (yield from _follow_to_end(state, keys)) or (yield from move_in(state, keys, key))
    ):
        # Only what was here leaves a trace that no request in flight gets past.
        keys = state.keys_of(key.value)
        ending = flows.end(keys, reason, conf.events_kept)
        ended = yield from replication.awaited(keys, ending, wanted(state.operation_budget))
    if ended and session_ended.has_listeners(state.sender):
        user = user_told(keys.id, ended.user, state.value_serializer)
        state.signals.ended(keys, user, reason)
    yield from on_demand.leave(key)
    near_cache.end(keys.record)
    if ended:
        counters.ended([ended.lifetime_ms])
    if keys == state.keys:
        state.lock.let_go()
        state.lifetime, state.owner = Lifetime(), None
        state.end_count += 1
    replication.answer()


def _follow_to_end(state: SessionState, keys: SessionKeys) -> Flow[bool]:
    """Follow the session that is to be ended; not with a user's hash from before its move.

    Django flushes a session whose hash is not the user's any more, as this object's is not
    after a new password; the one that goes on has the new hash, and its cookie stays.
    """
    before = state.found
    if not (yield from follow(state, keys)):
        return False
    now = (yield from flows.load(cast(SessionKeys, state.keys))).found
    if (
        before
        and isinstance(now, Loaded)
        and _hash_in(now, state.seal(now.past)) != _hash_in(before, seal_of(keys.id, before.past))
    ):
        state.vanish(EndReason.ROTATED)
        return False
    return True


def _hash_in(found: Loaded, seal: Seal | None) -> bytes:
    stored = found.values.get(_HASH_FIELD, b"")
    if seal is not None:
        with suppress(Unopened):
            stored = seal.open(_HASH_FIELD, stored)
    return stored[VERSION_BYTES:]
