"""Registry of sessions by user: list, count, find and end them.

A session is named by its public id, never by its session key: the id serves to find and end a
session, and does not give access to it. A user is given as a user object or a primary key.
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

#: Most passes over a user's sessions. A pass may miss a session whose key is cycled meanwhile,
#: so passes are repeated until one finds nothing.
_LOOKS: Final = 10


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as its user and the site's staff may see it.

    ``id`` is its public id, 43 characters. Times are aware and by the store's clock: ``created`` is
    the time of its creation or of the user's login, ``last_seen`` that of the last write or
    renewal. ``user_id`` is the user's primary key as a string, None if nobody is logged in.
    ``first`` and ``last`` are the clients at the login and at the last use, with the setting
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
    """Return the sessions in which a user is logged in, last used first.

    ``current`` is the session, or its public id, to mark as the current one.

    Raises SessionStoreUnavailable; ValueError for a user without a primary key and an invalid id.
    """
    return _infos(_run(listed_of(_user_key(user))), current)


async def asessions_of(
    user: object, *, current: SessionBase | str | None = None
) -> list[SessionInfo]:
    """See sessions_of()."""
    return _infos(await _arun(listed_of(_user_key(user))), current)


def count_of(user: object) -> int:
    """Return the number of sessions in which a user is logged in. Raises as ``sessions_of``."""
    return len(_run(listed_of(_user_key(user))))


async def acount_of(user: object) -> int:
    """See count_of()."""
    return len(await _arun(listed_of(_user_key(user))))


def find(public_id: str, *, current: SessionBase | str | None = None) -> SessionInfo | None:
    """Return the session with a public id, None if there is none.

    Raises SessionStoreUnavailable; ValueError for an invalid id.
    """
    found = _run(user_index.one(_session_keys(public_id)))
    return _info(found, _public_id(current)) if found else None


async def afind(public_id: str, *, current: SessionBase | str | None = None) -> SessionInfo | None:
    """See find()."""
    found = await _arun(user_index.one(_session_keys(public_id)))
    return _info(found, _public_id(current)) if found else None


def end_session(public_id: str) -> bool:
    """End the session with a public id; return whether there was one.

    The next request that carries its cookie is anonymous, on every node.

    Raises SessionStoreUnavailable; SessionNotReplicated, after ending it; ValueError for an
    invalid id.
    """
    notices = PendingSignals()
    return bool(_run(_ending([_session_keys(public_id)], notices), notices))


async def aend_session(public_id: str) -> bool:
    """See end_session()."""
    notices = PendingSignals()
    return bool(await _arun(_ending([_session_keys(public_id)], notices), notices))


def end_sessions_of(user: object, keep: SessionBase | str | None = None) -> int:
    """End all sessions in which a user is logged in; return how many there were.

    ``keep`` is a session, or its public id, to leave alone: usually the user's current one.

    Raises as ``end_session``; ValueError for a user without a primary key and an invalid ``keep``,
    before anything is ended.
    """
    notices = PendingSignals()
    return _run(_ending_all(user, keep, notices), notices)


async def aend_sessions_of(user: object, keep: SessionBase | str | None = None) -> int:
    """See end_sessions_of()."""
    notices = PendingSignals()
    return await _arun(_ending_all(user, keep, notices), notices)


def _ending_all(user: object, keep: SessionBase | str | None, notices: PendingSignals) -> Flow[int]:
    kept, key, ended = _public_id(keep), _user_key(user), 0
    unreplicated = None
    for look in range(_LOOKS):
        found = yield from listed_of(key)
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
    """Return the site's session class, which is the sender of its signals."""
    return cast(type, import_string(f"{settings.SESSION_ENGINE}.SessionStore"))


def listed_of(key: str) -> Flow[list[Listed]]:
    return user_index.of_user(conf.key_prefix, key, conf.events_kept)


def _session_keys(public_id: str) -> SessionKeys:
    return SessionKeys.of_id(conf.key_prefix, public_id)


def _user_key(user: object) -> str:
    """Return the user's key as ``login()`` stores it. Raises ValueError if there is none."""
    if isinstance(user, Model):
        user = None if user.pk is None else user._meta.pk.value_to_string(user)
    if user is None or getattr(user, "is_anonymous", False):
        raise ValueError("this user has no primary key, and so no sessions")
    return str(user)


def _public_id(session: SessionBase | str | None) -> str | None:
    if isinstance(state := getattr(session, "state", None), SessionState):
        return state.public_id
    if isinstance(session, SessionBase):
        return session_id(session.session_key) if session.session_key else None
    return None if session is None else _session_keys(session).id


def _infos(found: Sequence[Listed], current: SessionBase | str | None) -> list[SessionInfo]:
    current_id = _public_id(current)
    return [_info(one, current_id) for one in found]


def _info(found: Listed, current_id: str | None) -> SessionInfo:
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
