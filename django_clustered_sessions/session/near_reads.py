"""Read a session without a trip: CLUSTERED_SESSIONS_NEAR_READS = "tracked".

A copy is served that was the store's current session at some moment within the last NEAR_MAX_AGE
seconds: when it was asked for, or, if the store tells of its changes, at any moment up to which all
tellings have been applied. See ``store.tracking``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, cast

from django_clustered_sessions.conf import conf
from django_clustered_sessions.monitoring.counters import AGES, counters
from django_clustered_sessions.protocol import flows
from django_clustered_sessions.protocol.commands import records
from django_clustered_sessions.protocol.commands.script_calls import milliseconds
from django_clustered_sessions.protocol.effects import Flow, OutsideCall
from django_clustered_sessions.protocol.flows import Committed, Read
from django_clustered_sessions.protocol.record import (
    NOBODY,
    Damaged,
    Loaded,
    Meta,
    NewerFormat,
    SessionKeys,
)
from django_clustered_sessions.protocol.session_data import SessionData
from django_clustered_sessions.store import clock, tracking
from django_clustered_sessions.store.budget import Budget

from .near_cache import Copy, near_cache
from .state import SessionState


def is_for(state: SessionState) -> bool:
    """Return whether a load without a lock may do without a trip."""
    return (
        conf.on_conflict != "error"
        and conf.near_cache_bytes > 0
        and not state.policy.is_fresh
        and state.lock.grant is None
        and not state.end_count
        and not state.has_moved
        and not state.has_moved_on
    )


def load(state: SessionState, keys: SessionKeys) -> Flow[Read]:
    """Read a session from its copy, over the tracked connection, or as ever. See flows.load().

    Raises Damaged, NewerFormat.
    """
    pool, channels = tracking.here()
    channel = channels.usable(pool, keys.record)
    if channel is not None:
        channel.drain()
        if found := _served(channel, keys):
            state.is_copy = True
            return found
    state.is_copy = False
    known, budget = near_cache.get(keys.record), cast(Budget, state.operation_budget)
    # As any trip, which is repeated on another connection in the other half.
    started_s, seconds = time.monotonic(), budget.left / 2
    answer: Any = channel
    if channel is None or not channel.is_open:
        way: Any = pool, keys.record, near_cache.invalidate, seconds
        answer = yield OutsideCall(partial(channels.open, *way), partial(channels.aopen, *way))
    if isinstance(answer, tracking.Channel):
        reading = flows.load(keys, known=known)
        left_s = seconds - (time.monotonic() - started_s)
        asking: Any = next(reading), partial(_take, keys, reading), left_s
        answer = yield OutsideCall(partial(answer.ask, *asking), partial(answer.aask, *asking))
    took_s = time.monotonic() - started_s
    if isinstance(answer, Read):
        budget.answered(took_s)
        return answer
    budget.spend(took_s)
    if isinstance(answer, Exception):
        raise answer
    return (yield from flows.load(keys, known=known))


class Sending(NamedTuple):
    """A write that is about to be sent: the time, and the channel with its generation then."""

    channel: tracking.Channel
    sent_s: float
    generation: object


def sending(keys: SessionKeys) -> Sending | None:
    """Forget the copy of a session before a write is sent; return None where nothing is tracked.

    The reply may be lost, and then nothing is known of the session.
    """
    near_cache.forget_copy(keys.record)
    pool, channels = tracking.here()
    channel = channels.usable(pool, keys.record)
    return Sending(channel, clock.now_s(), channel.generation) if channel else None


def written(
    state: SessionState, keys: SessionKeys, data: SessionData, outcome: Committed, sending: Sending
) -> Copy | None:
    """Return a copy of a session that was written whole: it was the store's since it was sent.

    The store does not tell of changes to it until it is read again, which the channel's next
    question does: a session that each of its requests changes is then read without a trip too.
    """
    found, alive = state.found, outcome.alive
    if found is None or found.meta.version != alive.before or outcome.changes.expiry_changed:
        return None
    values = dict(data.stored)
    meta = found.meta._replace(
        version=outcome.version,
        deadline_ms=alive.deadline_ms,
        size=sum(map(len, values)) + sum(map(len, values.values())),
        seen_ms=alive.now_ms,
        user=state.owner or NOBODY,
    )
    channel, sent_s, generation = sending
    channel.ask_along(keys.record, records.described([keys]), partial(_take_metas, [keys]))
    now = Loaded(meta, values, found.clients, found.past)
    return Copy(now, state.lifetime.seen_ms, clock.now_s(), sent_s, generation, is_tracked=False)


def track_again(all_keys: Sequence[SessionKeys]) -> Flow[None]:
    """Track sessions again that this process has renewed, which was a change for the store too."""
    pool, channels = tracking.here()
    of_channel: dict[tracking.Channel, list[SessionKeys]] = {}
    for keys in all_keys:
        if channel := channels.usable(pool, keys.record):
            of_channel.setdefault(channel, []).append(keys)
    for channel, some in of_channel.items():
        asking: Any = (records.described(some), partial(_take_metas, some), conf.store_timeout / 2)
        yield OutsideCall(partial(channel.ask, *asking), partial(channel.aask, *asking))


def _take_metas(
    all_keys: Sequence[SessionKeys], replies: list[Any], sent_s: float, generation: object
) -> None:
    """Keep copies of sessions whose values are as they are known."""
    *described, told = replies
    now_ms = milliseconds(told)
    for keys, (packed,) in zip(all_keys, described, strict=True):
        known = near_cache.get(keys.record)
        if known is None or packed is None or generation is None:
            continue
        with suppress(Damaged, NewerFormat):
            meta = Meta.parse(packed)
            if meta.version == known.version:
                found = Loaded(meta, known.values, past=known.past)
                copy = Copy(found, now_ms, clock.now_s(), sent_s, generation, is_tracked=True)
                near_cache.hold(keys.record, copy, conf.near_cache_bytes)


def _take(
    keys: SessionKeys, reading: Flow[Read], replies: list[Any], sent_s: float, generation: object
) -> Read:
    """Finish a read, and keep a copy before anything is applied that was told after it."""
    try:
        reading.send(replies)
    except StopIteration as done:
        read: Read = done.value
    # Of a session that is missing the store tells nothing.
    if isinstance(read.found, Loaded) and generation is not None:
        copy = Copy(read.found, read.now_ms, clock.now_s(), sent_s, generation, is_tracked=True)
        near_cache.hold(keys.record, copy, conf.near_cache_bytes)
    return read


def _served(channel: tracking.Channel, keys: SessionKeys) -> Read | None:
    """Return a copy's session if it is fresh enough.

    The order counts: a copy that is there after the lease was read has not been invalidated by
    anything that was told before it.
    """
    lease_s = channel.lease_s
    copy = near_cache.copy(keys.record)
    if copy is None or copy.generation is not channel.generation:
        return None
    now_s = clock.now_s()
    proven_s = max(copy.current_at_s, lease_s) if copy.is_tracked else copy.current_at_s
    age_s = now_s - proven_s
    if age_s > conf.near_max_age:
        return None
    now_ms = copy.now_ms + round((now_s - copy.seen_at_s) * 1000)
    if copy.found.meta.deadline_ms <= now_ms:
        return None
    if copy.is_tracked and now_s - lease_s > conf.near_max_age / 2:
        channel.renew(keys.record)
    counters.measure(AGES, round(age_s * 1000))
    return Read(copy.found, now_ms, is_known=True, saved=copy.found.meta.size)
