"""Registry of sessions: list those of a user or of all, count, find and end them.

A session is named by its public id, never by its session key: the id serves to find and end a
session, and does not give access to it. A user is given as a user object or a primary key.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Final, Self, TypedDict, TypeVar, Unpack, cast

from django.conf import settings
from django.contrib.sessions.backends.base import SessionBase
from django.db.models import Model
from django.utils.asyncio import async_unsafe
from django.utils.module_loading import import_string

from . import encryption
from .conf import PREFIX, conf
from .exceptions import SessionIdAmbiguous, SessionNotReplicated
from .monitoring.counters import counters
from .protocol import all_sessions, sealing, user_index
from .protocol.all_sessions import FEW, FIRST_PLACE, MORE, Group
from .protocol.commands.index import Place
from .protocol.effects import Flow, batches
from .protocol.record import (
    BUCKETS,
    ID_LENGTH,
    EndReason,
    Serializer,
    SessionKeys,
    milliseconds_of,
    moment,
    session_id,
)
from .protocol.results import Ended
from .protocol.sealing import Seal
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

#: Fewest characters by which a session is found.
SHORTEST_START: Final = 4
_START = re.compile(rf"[A-Za-z0-9_-]{{{SHORTEST_START},{ID_LENGTH}}}")

_PLACE = re.compile(rf"([0-9]{{1,16}})\.([0-9]{{1,4}})\.(.{{{ID_LENGTH}}})")

#: Most sessions that ``page`` looks at, so that a filter that few pass costs a page a bounded time.
_MOST_LOOKED_AT: Final = 5000
#: Sessions that it looks at on one trip.
_LOOKED_AT_ONCE: Final = 200

#: Told how many sessions were looked at, and of how many.
Progress = Callable[[int, int], object]


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

    The first 4 characters or more will do, such as the 12 that logs have.

    Raises SessionStoreUnavailable; SessionIdAmbiguous, a ValueError, if several sessions have ids
    that begin so; ValueError for what no id begins with.
    """
    return _run(_found(public_id, current))


async def afind(public_id: str, *, current: SessionBase | str | None = None) -> SessionInfo | None:
    """See find()."""
    return await _arun(_found(public_id, current))


class Filters(TypedDict, total=False):
    """Conditions that a session has to meet, all of them; None is none.

    ``user`` is a user or a primary key; ``address`` an IP address or a network such as
    ``10.0.0.0/8``, of the login or of the last use, and needs the setting TRACK_CLIENTS.
    ``idle_since``: not seen since then. ``created_before``: begun, or logged in, before then.
    """

    user: object
    address: str | None
    idle_since: datetime | None
    created_before: datetime | None


def matching(
    *, progress: Progress | None = None, **filters: Unpack[Filters]
) -> Iterator[SessionInfo]:
    """Return an iterator over all sessions that pass the ``filters``, in no order.

    It asks the store as it goes, so its memory is bounded. Sessions that begin, end or move to
    another key meanwhile may be missed. ``progress`` is called as often as the store is asked.

    Raises ValueError for a filter that cannot be used; SessionStoreUnavailable on the way.
    """
    return _matching(_Wanted.by(**filters), progress)


def amatching(
    *, progress: Progress | None = None, **filters: Unpack[Filters]
) -> AsyncIterator[SessionInfo]:
    """See matching(); for ``async for``."""
    return _amatching(_Wanted.by(**filters), progress)


def _matching(wanted: _Wanted, progress: Progress | None) -> Iterator[SessionInfo]:
    groups = _run(_groups(wanted))
    for number, group in enumerate(groups, 1):
        yield from _run(_fitting(wanted, group))
        _tell(progress, groups, number)


async def _amatching(wanted: _Wanted, progress: Progress | None) -> AsyncIterator[SessionInfo]:
    groups = await _arun(_groups(wanted))
    for number, group in enumerate(groups, 1):
        for found in await _arun(_fitting(wanted, group)):
            yield found
        _tell(progress, groups, number)


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a list of sessions; ``after`` names the place to go on from, None at the end."""

    sessions: Sequence[SessionInfo]
    after: str | None


def page(
    count: int,
    *,
    after: str | None = None,
    current: SessionBase | str | None = None,
    **filters: Unpack[Filters],
) -> Page:
    """Return the next ``count`` sessions that pass the ``filters``, the latest expiry first.

    That is the last used first, for sessions that live equally long. A page looks at some
    thousand sessions at most, so it may have fewer of those that it looks for, even none, and
    still say where to go on.

    Raises SessionStoreUnavailable; ValueError for a filter or an ``after`` that cannot be used.
    """
    return _run(_page(_Wanted.by(**filters), count, _place(after), _public_id(current)))


async def apage(
    count: int,
    *,
    after: str | None = None,
    current: SessionBase | str | None = None,
    **filters: Unpack[Filters],
) -> Page:
    """See page()."""
    return await _arun(_page(_Wanted.by(**filters), count, _place(after), _public_id(current)))


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


def end_sessions(public_ids: Iterable[str]) -> int:
    """End the sessions with these public ids; return how many there were.

    Raises as ``end_session``; ValueError before anything is ended.
    """
    notices = PendingSignals()
    return _run(_ending(list(map(_session_keys, public_ids)), notices), notices)


async def aend_sessions(public_ids: Iterable[str]) -> int:
    """See end_sessions()."""
    notices = PendingSignals()
    return await _arun(_ending(list(map(_session_keys, public_ids)), notices), notices)


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
        replication, sync = Replication(), wanted()
        flow = user_index.end(group, EndReason.ENDED, conf.events_kept)
        found = yield from replication.awaited(group[0], flow, sync)
        ended += (one for _, one in found)
        if session_ended.has_listeners(_engine()):
            for keys, one in found:
                user = encryption.user_told(keys.id, one.user, _serializer())
                notices.ended(keys, user, EndReason.ENDED)
        replications.append(replication)
        for keys in group:
            near_cache.end(keys.record)
    counters.ended(one.lifetime_ms for one in ended)
    for replication in replications:
        replication.answer()
    return len(ended)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Filters as they are applied: the key of the user, a network, times that are aware."""

    user: str | None
    network: IPv4Network | IPv6Network | None
    idle_since: datetime | None
    created_before: datetime | None

    @classmethod
    def by(
        cls,
        user: object = None,
        address: str | None = None,
        idle_since: datetime | None = None,
        created_before: datetime | None = None,
    ) -> Self:
        if address is not None and not conf.track_clients:
            raise ValueError(f"sessions have no addresses: {PREFIX}TRACK_CLIENTS is off")
        return cls(
            None if user is None else _user_key(user),
            None if address is None else ip_network(address, strict=False),
            _aware(idle_since),
            _aware(created_before),
        )

    def fits(self, found: SessionInfo) -> bool:
        """Return whether a session of the user, if one is wanted, passes the other filters."""
        return (
            (self.idle_since is None or found.last_seen < self.idle_since)
            and (self.created_before is None or found.created < self.created_before)
            and (
                self.network is None
                or any(_is_in(client, self.network) for client in (found.first, found.last))
            )
        )


def _aware(at: datetime | None) -> datetime | None:
    return None if at is None else moment(milliseconds_of(at))


def _is_in(client: Client | None, network: IPv4Network | IPv6Network) -> bool:
    try:
        return client is not None and ip_address(client.address) in network
    except ValueError:
        return False


def _found(public_id: str, current: SessionBase | str | None) -> Flow[SessionInfo | None]:
    if len(public_id) == ID_LENGTH:
        found = yield from user_index.one(_session_keys(public_id))
        return _info(found, _public_id(current)) if found else None
    if not _START.fullmatch(public_id):
        raise ValueError(
            f"{public_id!r} is no session's public id, nor its first {SHORTEST_START} characters "
            "or more"
        )
    several = yield from all_sessions.starting_with(conf.key_prefix, public_id)
    if len(several) > 1:
        raise SessionIdAmbiguous(public_id, sorted(one.keys.id for one in several))
    return _info(several[0], _public_id(current)) if several else None


def _groups(wanted: _Wanted) -> Flow[list[Group]]:
    if wanted.user is not None:
        return [Group((), 0)]
    return (yield from all_sessions.groups(conf.key_prefix))


def _fitting(wanted: _Wanted, group: Group) -> Flow[list[SessionInfo]]:
    if wanted.user is not None:
        found = yield from listed_of(wanted.user)
    else:
        found = yield from all_sessions.of_buckets(conf.key_prefix, group.buckets)
    return [info for one in found if wanted.fits(info := _info(one, None))]


def _tell(progress: Progress | None, groups: Sequence[Group], number: int) -> None:
    if progress is not None:
        sizes = [group.size for group in groups]
        progress(sum(sizes[:number]), sum(sizes))


def _page(wanted: _Wanted, count: int, last: Place, current_id: str | None) -> Flow[Page]:
    found: list[SessionInfo] = []
    looked_at = 0
    while looked_at < _MOST_LOOKED_AT:
        places = yield from _places_after(last, wanted, MORE if looked_at else FEW)
        if not places:
            return Page(found, None)
        for some in batches(places, _LOOKED_AT_ONCE):
            listed = yield from all_sessions.listed(conf.key_prefix, (place.id for place in some))
            infos = {one.keys.id.encode(): _info(one, current_id) for one in listed}
            for place in some:
                info = infos.get(place.id)
                if info and wanted.fits(info):
                    if len(found) == count:
                        return Page(found, _name_of(last))
                    found.append(info)
                last = place
            looked_at += len(some)
    return Page(found, _name_of(last))


def _places_after(last: Place, wanted: _Wanted, each: int) -> Flow[list[Place]]:
    if wanted.user is None:
        return (yield from all_sessions.latest(conf.key_prefix, last, each))
    listed = yield from listed_of(wanted.user)
    # In one list, whatever the bucket.
    places = (Place(one.meta.deadline_ms, 0, one.keys.id.encode()) for one in listed)
    return sorted((place for place in places if place < last), reverse=True)


def _name_of(place: Place) -> str:
    return f"{place.deadline_ms}.{place.bucket}.{place.id.decode('ascii', 'replace')}"


def _place(name: str | None) -> Place:
    """Return the place that ``_name_of`` names. Raises ValueError for another string."""
    if name is None:
        return FIRST_PLACE
    if not (match := _PLACE.fullmatch(name)) or int(match[2]) >= BUCKETS:
        raise ValueError(f"{name!r} is no place to go on from")
    return Place(int(match[1]), int(match[2]), match[3].encode())


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
    meta, seal = found.meta, encryption.seal_of(found.keys.id, found.past)
    return SessionInfo(
        id=found.keys.id,
        user_id=sealing.user_id(found.user, _serializer(), seal),
        created=moment(meta.created_ms),
        last_seen=moment(meta.seen_ms),
        expires=moment(meta.deadline_ms),
        is_current=found.keys.id == current_id,
        first=_client(found.first, seal),
        last=_client(found.last, seal),
    )


def _client(stored: bytes, seal: Seal | None) -> Client | None:
    if not conf.track_clients:
        return None
    return Client.parse(seal.open_client(stored) if seal else stored)


def _serializer() -> Serializer:
    return cast(Serializer, import_string(settings.SESSION_SERIALIZER)())
