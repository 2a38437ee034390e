"""Who is logged in where, and ending their sessions.

A session is named by its public id, never by its key: who knows an id can end a session where this
module is called, and cannot use it. A user is given as a user object or a primary key.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, TypeVar, cast

from django.conf import settings
from django.contrib.sessions.backends.base import SessionBase
from django.db.models import Model
from django.utils.asyncio import async_unsafe
from django.utils.module_loading import import_string

from .conf import conf
from .exceptions import SessionNotReplicated
from .monitoring.counters import counters
from .protocol import user_index
from .protocol.effects import Flow
from .protocol.record import EndReason, Serializer, SessionKeys, moment, session_id, user_id
from .protocol.results import Ended
from .protocol.user_index import Listed
from .session.client_info import Client
from .session.near_cache import near_cache
from .session.replication import Replication, wanted
from .session.state import SessionState
from .signals import PendingSignals, session_ended
from .store import runner

T = TypeVar("T")

#: A session that moves to a new key meanwhile may be missed by a look, so one more finds nothing.
_LOOKS: Final = 10


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as its user and the site's staff may see it.

    ``id`` is its public id, 43 characters. Times are aware and by the store's clock: ``created`` is
    when it began or its user logged in, ``last_seen`` when it was last written or renewed.
    ``user_id`` is the user's primary key as a string, None where nobody is logged in. ``first`` and
    ``last`` are from where it was used, since the user logged in and lately: with the setting
    TRACK_CLIENTS, else None.
    """

    id: str
    user_id: str | None
    created: datetime
    last_seen: datetime
    expires: datetime
    is_current: bool = False
    first: Client | None = None
    last: Client | None = None


def sessions_of(user: object, *, current: SessionBase | str | None = None) -> list[SessionInfo]:
    """Return the sessions in which a user is logged in, the last used first.

    ``current`` is the session, or its public id, that is marked as the current one.

    Raises SessionStoreUnavailable; ValueError for a user without a primary key, and for what is no
    id.
    """
    return _entries(_run(_of_user(_key(user))), current)


async def asessions_of(
    user: object, *, current: SessionBase | str | None = None
) -> list[SessionInfo]:
    """See sessions_of()."""
    return _entries(await _arun(_of_user(_key(user))), current)


def count_of(user: object) -> int:
    """Return in how many sessions a user is logged in. Raises what ``sessions_of`` does."""
    return len(_run(_of_user(_key(user))))


async def acount_of(user: object) -> int:
    """See count_of()."""
    return len(await _arun(_of_user(_key(user))))


def find(public_id: str, *, current: SessionBase | str | None = None) -> SessionInfo | None:
    """Return the session with a public id, None where there is none.

    Raises SessionStoreUnavailable; ValueError for what is no id.
    """
    found = _run(user_index.one(_place(public_id)))
    return _entry(found, _id(current)) if found else None


async def afind(public_id: str, *, current: SessionBase | str | None = None) -> SessionInfo | None:
    """See find()."""
    found = await _arun(user_index.one(_place(public_id)))
    return _entry(found, _id(current)) if found else None


def end_session(public_id: str) -> bool:
    """End the session with a public id; return whether there was one.

    The next request that carries its cookie is anonymous, on every node.

    Raises SessionStoreUnavailable; SessionNotReplicated, once it is ended; ValueError for what is
    no id.
    """
    notices = PendingSignals()
    return bool(_run(_ending([_place(public_id)], notices), notices))


async def aend_session(public_id: str) -> bool:
    """See end_session()."""
    notices = PendingSignals()
    return bool(await _arun(_ending([_place(public_id)], notices), notices))


def end_sessions_of(user: object, keep: SessionBase | str | None = None) -> int:
    """End all sessions in which a user is logged in; return how many there were.

    ``keep`` is a session, or its public id, that goes on: the user's own, usually.

    Raises what ``end_session`` does, ValueError for a user without a primary key and for a ``keep``
    that is no id, before anything is ended.
    """
    notices = PendingSignals()
    return _run(_ending_all(user, keep, notices), notices)


async def aend_sessions_of(user: object, keep: SessionBase | str | None = None) -> int:
    """See end_sessions_of()."""
    notices = PendingSignals()
    return await _arun(_ending_all(user, keep, notices), notices)


def _ending_all(user: object, keep: SessionBase | str | None, notices: PendingSignals) -> Flow[int]:
    kept, key, ended = _id(keep), _key(user), 0
    unreplicated = None
    for look in range(_LOOKS):
        found = yield from _of_user(key)
        all_keys = [one.keys for one in found if one.keys.id != kept]
        if look and not all_keys:
            break
        try:
            ended += yield from _ending(all_keys, notices)
        except SessionNotReplicated as error:
            unreplicated = error
            ended += len(all_keys)
    if unreplicated:
        raise unreplicated
    return ended


def _ending(all_keys: Iterable[SessionKeys], notices: PendingSignals) -> Flow[int]:
    replications: list[Replication] = []
    ended: list[Ended] = []
    for group in user_index.by_bucket(all_keys):
        replication, sync = Replication(), wanted(conf.store_timeout)
        flow = user_index.end(group, EndReason.ENDED, conf.events_kept)
        found = yield from replication.awaited(group[0], flow, sync)
        ended += (one for _, one in found)
        if session_ended.has_listeners(_engine()):
            for keys, one in found:
                notices.ended(keys, _user_id(one.user), EndReason.ENDED)
        replications.append(replication)
        for keys in group:
            near_cache.end(keys.record)
    counters.ended(one.lifetime_ms for one in ended)
    for replication in replications:
        replication.answer()
    return len(ended)


@async_unsafe("Use the function's a twin on an event loop, such as aend_session().")
def _run(flow: Flow[T], notices: PendingSignals | None = None) -> T:
    try:
        return runner.run(flow)
    finally:
        if notices:
            notices.send(_engine())


async def _arun(flow: Flow[T], notices: PendingSignals | None = None) -> T:
    try:
        return await runner.arun(flow)
    finally:
        if notices:
            await notices.asend(_engine())


def _engine() -> type:
    """Return the class of the site's sessions, the sender of signals about them."""
    return cast(type, import_string(f"{settings.SESSION_ENGINE}.SessionStore"))


def _of_user(key: str) -> Flow[list[Listed]]:
    return user_index.of_user(conf.key_prefix, key, conf.events_kept)


def _place(public_id: str) -> SessionKeys:
    return SessionKeys.of_id(conf.key_prefix, public_id)


def _key(user: object) -> str:
    """Return what ``login()`` keeps of a user. Raises ValueError where there is nothing."""
    if isinstance(user, Model):
        user = None if user.pk is None else user._meta.pk.value_to_string(user)
    if user is None or getattr(user, "is_anonymous", False):
        raise ValueError("this user has no primary key, and so no sessions")
    return str(user)


def _id(session: SessionBase | str | None) -> str | None:
    if isinstance(state := getattr(session, "state", None), SessionState):
        return state.public_id
    if isinstance(session, SessionBase):
        return session_id(session.session_key) if session.session_key else None
    return None if session is None else _place(session).id


def _entries(found: Sequence[Listed], current: SessionBase | str | None) -> list[SessionInfo]:
    current_id = _id(current)
    return [_entry(one, current_id) for one in found]


def _entry(found: Listed, current_id: str | None) -> SessionInfo:
    meta = found.meta
    return SessionInfo(
        id=found.keys.id,
        user_id=_user_id(found.user),
        created=moment(meta.created_ms),
        last_seen=moment(meta.seen_ms),
        expires=moment(meta.deadline_ms),
        is_current=found.keys.id == current_id,
        first=Client.parse(found.first) if conf.track_clients else None,
        last=Client.parse(found.last) if conf.track_clients else None,
    )


def _user_id(stored: bytes) -> str | None:
    return user_id(stored, cast(Serializer, import_string(settings.SESSION_SERIALIZER)()))
