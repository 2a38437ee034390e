"""The session engine: ``SESSION_ENGINE = "django_clustered_sessions.backend"``.

Everything that may talk to the store is a flow, written once; a public method and its ``a`` twin
run the same one. Flows never touch ``self._session``: that would load synchronously, on an event
loop too.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final, Self, TypeVar, cast

from django.conf import settings
from django.contrib.sessions.backends.base import (
    VALID_KEY_CHARS,
    CreateError,
    SessionBase,
    UpdateError,
)
from django.core.exceptions import SynchronousOnlyOperation
from django.utils.crypto import get_random_string
from django.utils.timezone import make_naive

from . import connections, drivers, flows
from .commands import Alive, Exists, Expiry, Flow, Gone, Sync, Terms
from .conf import Nonstop, conf
from .counters import counters
from .decorators import Access, Marks
from .drivers import Budget
from .exceptions import (
    ClusteredSessionError,
    SessionLockLost,
    SessionLockTimeout,
    SessionNotReplicated,
    SessionReadOnly,
    SessionStoreUnavailable,
)
from .fields import Delta, Fields, Snapshot
from .flows import Read
from .hold import Hold
from .lifetime import Lifetime
from .locks import Asking
from .near import Known, near_cache
from .record import (
    VERSION_BYTES,
    Damaged,
    EndReason,
    Loaded,
    Mode,
    Place,
    Serializer,
)
from .replication import Replication, wanted
from .reporting import reporting
from .usage import Usage, write_header

T = TypeVar("T")

logger = logging.getLogger("django_clustered_sessions")

_NOT_GIVEN: Final = object()
_EXPIRY: Final = "_session_expiry"


@dataclass(frozen=True, slots=True)
class Memory:
    """What a session had changed and not saved when its lock was entered, after so many writes."""

    is_outermost: bool
    fields: Fields | None
    snapshot: Snapshot | None
    modified: bool
    writes: int


class SessionStore(SessionBase):
    """A session in Redis or Valkey; every method in a synchronous and a native async form.

    Beyond Django's contract, a session is written by what changed, an in-place change counts
    without ``modified = True``, and a store that is away raises SessionStoreUnavailable instead
    of logging anybody out.
    """

    #: What made the session unusable during this request, the store's outage or its lock; the
    #: middleware looks at it.
    failure: ClusteredSessionError | None = None
    #: Whether it was read from this process's near cache alone, for the store is away.
    is_local: bool = False
    #: How the request uses its session.
    usage: Usage = Usage()
    #: Why there was no session under the key that this object was made with, once it has looked.
    ended: EndReason | None = None
    #: Whether a load also renews the session's deadline, on the same trip.
    renew_on_load: bool = False
    #: Whether this request's use of the session has renewed its deadline.
    renewed: bool = False
    #: Whether ``commit()`` or ``lock()`` has written it, so that its cookie is due.
    committed: bool = False
    #: Whether its request is over, so that nobody would give up a lock that it took unasked.
    is_over: bool = False
    #: The store's time for this request; without one, each operation has its own.
    budget: Budget | None = None

    _fields: Fields | None = None
    _modified: bool = False
    _tolerates_outage: bool = False
    #: Whether something failed that the request must not go on without, such as a logout.
    _failure_stands: bool = False
    #: Whether this request moved the session to another key, of which the browser has to learn.
    _has_moved: bool = False
    _unanswered: tuple[Delta, bytes] | None = None
    _writes: int = 0
    #: How many times ``lock()`` is entered.
    _entered: int = 0
    #: Version of the record that ``_fields`` is all of; empty where nobody knows.
    _version: bytes = b""
    #: The session as the store had it when it was last loaded.
    _found: Loaded | None = None
    #: The place that was worked out last, behind prefix and key.
    _placed: tuple[tuple[str, str], Place] | None = None

    def __init__(self, session_key: str | None = None) -> None:
        super().__init__(session_key)
        self._lifetime = Lifetime()
        self._hold = Hold()
        self._replication = Replication()

    # Reading and changing, where Django's base class does not do already.

    def _get_session(self, no_load: bool = False) -> Fields:
        self.accessed = True
        if self._fields is None:
            if no_load or self.session_key is None:
                self._fields = self._new_fields()
            else:
                self._fields = self.run(self.loading(), "aload() or aget()")
        return self._fields

    async def _aget_session(self, no_load: bool = False) -> Fields:
        self.accessed = True
        if self._fields is None:
            if no_load or self.session_key is None:
                self._fields = self._new_fields()
            else:
                self._fields = await self.arun(self.loading())
        return self._fields

    _session = property(_get_session)

    @property
    def _session_cache(self) -> Fields:
        if self._fields is None:
            raise AttributeError("the session has not been loaded")
        return self._fields

    @_session_cache.setter
    def _session_cache(self, values: Mapping[Any, Any]) -> None:
        self._fields = self._new_fields(cleared=True)
        self._fields.update(values)

    @_session_cache.deleter
    def _session_cache(self) -> None:
        self._fields = None

    @property
    def modified(self) -> bool:
        """Whether there is something to save: it was said so, or a value has changed."""
        return self._modified or (self._fields is not None and self._fields.changed_in_place())

    @modified.setter
    def modified(self, value: bool) -> None:
        self._modified = bool(value)
        if not value and self._fields is not None:
            self._fields.settle()

    def is_empty(self) -> bool:
        """Return whether there is neither a key nor data; never load."""
        return not self.session_key and not self._fields

    def pop(self, key: Any, default: Any = _NOT_GIVEN) -> Any:
        """Remove a key and return its value, or ``default`` where there is none."""
        return self._pop(self._get_session(), key, default)

    async def apop(self, key: Any, default: Any = _NOT_GIVEN) -> Any:
        """See pop()."""
        return self._pop(await self._aget_session(), key, default)

    def _pop(self, fields: Fields, key: Any, default: Any) -> Any:
        # Not Django's: it assigns ``modified`` to itself, which here compares every value.
        if key in fields:
            self._modified = True
        return fields.pop(key) if default is _NOT_GIVEN else fields.pop(key, default)

    def increment(self, key: Any, by: int = 1) -> int:
        """Add ``by`` to an integer, 0 if absent, and return it as far as is known here.

        The sum is made in the store when the session is saved, so that no count is lost,
        whatever other requests do.

        Raises TypeError where the value is no integer.
        """
        self.modified = True
        return self._get_session().increment(key, by)

    async def aincrement(self, key: Any, by: int = 1) -> int:
        """See increment()."""
        self.modified = True
        return (await self._aget_session()).increment(key, by)

    def tolerate_outage(self) -> None:
        """Let this request go on without its session while the store is away.

        The session then reads as empty, changes to it are dropped, and the cookie stays: as with
        CLUSTERED_SESSIONS_NONSTOP = "noop", for this request. A login and a logout raise
        SessionStoreUnavailable all the same.
        """
        self._tolerates_outage = True

    @property
    def nonstop(self) -> Nonstop:
        """What this session does while the store is away, a value of CLUSTERED_SESSIONS_NONSTOP."""
        return "noop" if self._tolerates_outage else self.usage.nonstop

    @property
    def goes_on(self) -> bool:
        """Whether the store has failed this request, which goes on without it."""
        return self.outage is not None and not self._failure_stands and self.nonstop != "exception"

    def fail(self, error: ClusteredSessionError) -> None:
        """Take note of what made the session unusable, in spite of what ``nonstop`` allows."""
        self.failure = error
        self._failure_stands = self._failure_stands or self.nonstop != "exception"

    @property
    def outage(self) -> SessionStoreUnavailable | None:
        """What made the store unusable during this request."""
        return self.failure if isinstance(self.failure, SessionStoreUnavailable) else None

    @property
    def unreplicated(self) -> SessionNotReplicated | None:
        """The error of the last write, where it landed and too few replicas acknowledged it."""
        return self._replication.shortfall

    # The lock.

    @contextmanager
    def lock(self) -> Iterator[Self]:
        """Give this object the session to itself: a context manager.

        It takes the lock, loads afresh, with what was not saved yet on top, and on a clean exit
        writes and releases. On an exception what was changed inside is forgotten. It may be
        entered again inside; only the outermost exit releases.

        Entering raises SessionLockTimeout, UpdateError where the session was ended, and
        SessionStoreUnavailable; leaving raises what ``save()`` does, and SessionLockLost.
        """
        before = self.run(self._entering(), "alock()")
        try:
            yield self
        except BaseException:
            self.run(self._leaving(before, is_clean=False), "alock()")
            raise
        self.run(self._leaving(before, is_clean=True), "alock()")

    @asynccontextmanager
    async def alock(self) -> AsyncIterator[Self]:
        """See lock(); for ``async with``."""
        before = await self.arun(self._entering())
        try:
            yield self
        except BaseException:
            await self.arun(self._leaving(before, is_clean=False))
            raise
        await self.arun(self._leaving(before, is_clean=True))

    @property
    def is_locked(self) -> bool:
        """Whether this object holds the session's lock, as far as it knows."""
        return self._hold.grant is not None

    def commit(self) -> None:
        """Write what has changed and give up the lock, before the response.

        What is changed afterwards is saved without the lock.

        Raises what ``save()`` does, and SessionLockLost.
        """
        self.run(self.committing(), "acommit()")

    async def acommit(self) -> None:
        """See commit()."""
        await self.arun(self.committing())

    def lock_headers(self) -> dict[str, str]:
        """Return headers for a request that this one makes to its own site for the same session.

        That request then runs under this one's lock and need not wait for it. Good for as long as
        the lock is held; without a lock there are none. Never send them to another site.
        """
        grant = self._hold.grant
        return write_header(grant.place.id, grant.token) if grant else {}

    def obey(self, marks: Marks) -> None:
        """Take what the decorators of the view that begins say."""
        if late := self._obeying(marks):
            self.run(late, "aobey()")

    async def aobey(self, marks: Marks) -> None:
        """See obey()."""
        if late := self._obeying(marks):
            await self.arun(late)

    def _obeying(self, marks: Marks) -> Flow[None] | None:
        """Return what is left to do where the session was loaded before the marks were known."""
        is_news = self.usage.obey(marks)
        if marks.nonstop == "exception" and self.outage is not None:
            # A middleware was content with less before the mark was known.
            raise self.outage
        if self._fields is None or self.session_key is None or marks.access is None:
            return None
        if marks.access is Access.LOCKED:
            return None if self._hold.grant else self._locking_late()
        if self._hold.grant and is_news and not self._hold.grant.is_inside and not self._entered:
            return self.releasing()
        return None

    def _locking_late(self) -> Flow[None]:
        yield from self.locking()
        if self.is_over:
            yield from self.releasing()

    @property
    def store_seen_s_ago(self) -> float:
        """Seconds since the store last told about this session, infinite if it has not."""
        return time.monotonic() - self._lifetime.seen_at_s

    def encode(self, session_dict: Mapping[Any, Any]) -> str:
        """Return the given values serialised, compressed and signed, as Django's engines do."""
        return super().encode(dict(session_dict))

    # Expiry: the store's clock decides.

    def get_expiry_age(self, **kwargs: Any) -> int:
        """Return the seconds until the session expires, by the store's clock once it is known.

        With ``modification`` or ``expiry``: Django's arithmetic, the latter without a load.
        """
        if not kwargs and (left_s := self._left_s(self._fields_unless_told())) is not None:
            return math.ceil(left_s)
        return super().get_expiry_age(**kwargs)

    async def aget_expiry_age(self, **kwargs: Any) -> int:
        """See get_expiry_age()."""
        if "expiry" not in kwargs:
            await self._aget_session()
        return self.get_expiry_age(**kwargs)

    def get_expiry_date(self, **kwargs: Any) -> datetime:
        """Return when the session expires, by the store's clock once it is known.

        With ``modification`` or ``expiry``: Django's arithmetic, the latter without a load.
        """
        if not kwargs and self._left_s(self._fields_unless_told()) is not None:
            deadline = cast(datetime, self._lifetime.deadline)
            return deadline if settings.USE_TZ else make_naive(deadline)
        return super().get_expiry_date(**kwargs)

    async def aget_expiry_date(self, **kwargs: Any) -> datetime:
        """See get_expiry_date()."""
        if "expiry" not in kwargs:
            await self._aget_session()
        return self.get_expiry_date(**kwargs)

    def set_expiry(self, value: datetime | timedelta | int | None) -> None:
        """Set when the session expires, as Django does.

        A timedelta counts from the store's now, so a node whose clock is wrong sets it right.
        """
        super().set_expiry(value)
        self._lifetime.note(value, self._get_session().get(_EXPIRY))

    async def aset_expiry(self, value: datetime | timedelta | int | None) -> None:
        """See set_expiry()."""
        await super().aset_expiry(value)
        self._lifetime.note(value, (await self._aget_session()).get(_EXPIRY))

    def get_expire_at_browser_close(self) -> bool:
        """Return whether the cookie ends with the browser.

        Needs no load where the store has told on another trip.
        """
        if self._fields is not None or self._lifetime.mode is None:
            return super().get_expire_at_browser_close()
        if self._lifetime.mode is Mode.DEFAULT:
            return bool(settings.SESSION_EXPIRE_AT_BROWSER_CLOSE)
        return self._lifetime.mode is Mode.BROWSER

    def _fields_unless_told(self) -> Fields | None:
        """Load, unless the store has told on another trip how long the session lives."""
        return self._fields if self._lifetime.left_s is not None else self._get_session()

    def _left_s(self, fields: Fields | None) -> float | None:
        """Return the store's remaining time, or None where this request has set another."""
        if fields is not None and not fields.as_stored(_EXPIRY):
            return None
        return self._lifetime.left_s

    def _expiry(self, fields: Fields) -> Expiry:
        return self._lifetime.expiry(fields.get(_EXPIRY))

    # Django's operations on the store.

    def load(self) -> dict[Any, Any]:
        """Return the stored values as a dict; empty, and the key None, if there is no session.

        Raises SessionStoreUnavailable.
        """
        return self.run(self.loading(), "aload()").copy()

    async def aload(self) -> dict[Any, Any]:
        """See load()."""
        return (await self.arun(self.loading())).copy()

    def exists(self, session_key: str | None) -> bool:
        """Return whether there is a session under this key.

        Raises SessionStoreUnavailable.
        """
        return self.run(self._asking(session_key), "aexists()")

    async def aexists(self, session_key: str | None) -> bool:
        """See exists()."""
        return await self.arun(self._asking(session_key))

    def create(self) -> None:
        """Store this session under a new key.

        Raises SessionStoreUnavailable, SessionTooLarge; SessionNotReplicated, once it is stored.
        """
        self.run(self.creating(), "acreate()")

    async def acreate(self) -> None:
        """See create()."""
        await self.arun(self.creating())

    def save(self, must_create: bool = False) -> None:
        """Write what has changed; with ``must_create``, store as a new session under this key.

        Raises UpdateError where the session was ended, CreateError where ``must_create`` finds
        one, SessionConflict, SessionTooLarge, SessionStoreUnavailable; TypeError, naming the
        session key, for a value that the serialiser refuses; and, once it is written,
        SessionNotReplicated. After that one, a save with nothing to write asks the replicas again.
        """
        self.run(self.saving(must_create), "asave()")

    async def asave(self, must_create: bool = False) -> None:
        """See save()."""
        await self.arun(self.saving(must_create))

    def delete(self, session_key: str | None = None) -> None:
        """End the session under this key, this one if None; no request brings it back.

        Raises SessionStoreUnavailable; SessionNotReplicated, once it is ended.
        """
        self.run(self._ending(session_key), "adelete()")

    async def adelete(self, session_key: str | None = None) -> None:
        """See delete()."""
        await self.arun(self._ending(session_key))

    def flush(self) -> None:
        """End this session, and have an empty one without a key.

        Raises SessionStoreUnavailable; SessionNotReplicated, once it is done.
        """
        with self._forgetting():
            super().flush()

    async def aflush(self) -> None:
        """See flush()."""
        with self._forgetting():
            await super().aflush()

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        try:
            yield
        except SessionNotReplicated:
            # Django's would have done that next.
            self._session_key = None
            raise

    def cycle_key(self) -> None:
        """Move the session to a new key, with everything that the store holds of it.

        Raises UpdateError where the session was ended, SessionConflict, SessionTooLarge,
        SessionStoreUnavailable; SessionNotReplicated, once it has moved.
        """
        self.run(self._rotating(), "acycle_key()")

    async def acycle_key(self) -> None:
        """See cycle_key()."""
        await self.arun(self._rotating())

    @classmethod
    def clear_expired(cls) -> None:
        """Do nothing: the store expires sessions by itself."""

    @classmethod
    async def aclear_expired(cls) -> None:
        """See clear_expired()."""

    # The flows behind them.

    def loading(self) -> Flow[Fields]:
        """Load the session; with ``renew_on_load`` or an idle timeout, renew it as well."""
        key = self.session_key
        if key is None:
            return self._new_fields()
        if isinstance(self.failure, SessionLockTimeout | SessionLockLost):
            # It was told so before, to somebody who did not listen.
            raise self.failure
        place = self._place(key)
        renews = self.usage.touches and (self.renew_on_load or conf.idle_timeout)
        terms = self._terms() if renews else None
        asking = (
            self._hold.asking(place, self.usage, capped=True)
            if self._locks_on_load(place)
            else None
        )
        try:
            read = yield from flows.load(place, terms, asking, self._known(place))
        except SessionLockTimeout as error:
            self.failure = error
            raise self._hold.not_locked(error, self.usage) from None
        except Damaged as damage:
            logger.warning("session %s is damaged and not used: %s", place.id[:12], damage)
            self._vanish(EndReason.UNKNOWN)
            return self._new_fields()
        except SessionStoreUnavailable as error:
            if asking and not self._is_lock_optional:
                raise
            return self._read_without_store(place, error)
        loaded = self._loaded(place, asking, read)
        if self.is_over:
            # Its client left while a thread waited here.
            yield from self.releasing()
        self.renewed = loaded is not None and terms is not None
        return self._new_fields(loaded)

    def _read_without_store(self, place: Place, error: SessionStoreUnavailable) -> Fields:
        """Return what there is to read while the store is away, or raise its error."""
        if self.nonstop == "exception":
            raise error
        if self.nonstop == "noop":
            self._go_on_without_store(error)
            return self._new_fields()
        known, life = self._known(place), near_cache.life(place.record)
        if known is None or life is None or life.left_s(time.monotonic()) <= 0:
            raise error
        self._go_on_without_store(error)
        self.is_local = True
        self._lifetime.recall(life)
        counters.add(local_reads=1)
        return self._new_fields(known)

    def _go_on_without_store(self, error: SessionStoreUnavailable) -> None:
        self.failure = error
        if not error.is_told:
            logger.warning("%s goes on: %s", self.usage.route or "a request", error)

    @property
    def _is_lock_optional(self) -> bool:
        """Whether the view said itself that it can do without, and did not ask for the lock."""
        return self._tolerates_outage or self.usage.lock_is_optional

    def _may_drop(self, must_create: bool) -> bool:
        """Return whether a write may be dropped while the store is away.

        Never one without which a login or a logout would only look like one, nor one under a lock.
        """
        if must_create or self._has_moved or self.nonstop not in ("noop", "local_reads"):
            return False
        if self._hold.grant and not self._is_lock_optional:
            return False
        return self._fields is None or not self._fields.changes_user

    def _loaded(self, place: Place, asking: Asking | None, read: Read) -> Loaded | None:
        """Take what a load found, and the lock that came with it; None: the session is gone."""
        self._hold.take(place, asking, read.turn)
        found = read.found
        if isinstance(found, EndReason):
            counters.add(loads=1)
            if found is EndReason.UNKNOWN and near_cache.misses(place.record, time.monotonic()):
                logger.warning(
                    "the session store knows nothing of session %s, which it had a short while "
                    "ago: it has come back without some of its data, or without all of it, and "
                    "whose sessions are gone is logged out",
                    place.id[:12],
                )
            near_cache.drop(place.record)
            self._vanish(found)
            return None
        self._see(place, read.now_ms, found.meta.deadline_ms, found.meta.mode)
        if read.is_known:
            counters.add(loads=1, near_hits=1, near_bytes_saved=found.meta.size)
        else:
            counters.add(loads=1)
            if conf.near_cache_bytes:
                known = Known(found.meta.version, found.values)
                near_cache.put(place.record, known, conf.near_cache_bytes, self._lifetime.life)
        self._version, self._found = found.meta.version, found
        return found

    def creating(self) -> Flow[None]:
        """Store the session under a new key."""
        fields = self._get_session(no_load=True)
        while not (yield from self._inserting(fields, self._new_key())):
            pass
        self.ended = None
        self.modified = True
        self._answer()

    def saving(self, must_create: bool = False, release: bool = False) -> Flow[None]:
        """Write what has changed; with ``release``, give up the lock as well.

        While the store is away the changes are dropped, where that is wanted and does no harm.
        """
        try:
            if self.outage is not None and self.nonstop != "exception":
                # Nothing is written on top of what was not read, though it may be back by now.
                raise self.outage
            yield from self._saving(must_create, release)
        except SessionStoreUnavailable as error:
            if not self._may_drop(must_create):
                raise
            self._go_on_without_store(error)

    def _saving(self, must_create: bool, release: bool) -> Flow[None]:
        if not self._may_write():
            return
        key = self.session_key
        if key is None:
            if self.ended is EndReason.ROTATED:
                raise UpdateError("the session has moved to another key, as at a login")
            yield from self.creating()
        elif must_create:
            fields = self._get_session(no_load=True)
            if not (yield from self._inserting(fields, key)):
                raise CreateError
            self._answer()
        elif self._fields is None:
            # Also what was renewed a moment ago may be gone by now.
            self.renewed = False
            yield from self.renewing()
            if self.ended is not None:
                raise UpdateError
        elif gone := (yield from self._committing(key, self._fields, release)):
            raise UpdateError(f"the session is gone{_because(gone.reason)}")
        else:
            self._answer()

    def renewing(self) -> Flow[None]:
        """Renew the session's deadline, unless its load has."""
        key = self.session_key
        if key is None or self.renewed or self.goes_on:
            return
        place = self._place(key)
        try:
            found = yield from flows.touch(place, self._terms())
        except SessionStoreUnavailable as error:
            if self.nonstop == "exception":
                raise
            self._go_on_without_store(error)
            return
        if isinstance(found, Gone):
            self._vanish(found.reason)
        else:
            self._see(place, found.now_ms, found.deadline_ms, found.mode)
            self.renewed = True

    def _committing(
        self, key: str, fields: Fields, release: bool = False, *, waits: bool = True
    ) -> Flow[Gone | None]:
        place = self._place(key)
        merge_lost = conf.on_lock_lost == "merge" and conf.on_conflict == "merge"
        try:
            committing = flows.commit(
                place,
                fields,
                self._expiry,
                self._terms(),
                self._token_of,
                partial(self._hold.asking, place, self.usage, capped=False),
                self._hold.fence(release=release),
                merge_lost=merge_lost,
                again=self.unreplicated is not None,
            )
            sync = self._sync() if waits else None
            outcome = yield from self._replication.awaited(place, committing, sync)
        except SessionLockTimeout as error:
            raise self._hold.not_locked(error, self.usage) from None
        except SessionLockLost as error:
            self.failure = self._hold.refused(error)
            raise
        self._unanswered = None
        if isinstance(outcome, Gone):
            self._hold.let_go()
            return outcome
        self._writes += 1
        if outcome.turn:
            # The commit had to take a lock of its own, which ended with it.
            self._hold.count(outcome.turn)
            self._hold.lose()
        if release:
            self._hold.let_go()
        alive = outcome.alive
        self._see(place, alive.now_ms, alive.deadline_ms, alive.mode)
        self.renewed = True
        if outcome.version:
            before = outcome.alive.before
            is_all = before != b"" and before == self._version
            self._wrote(place, fields, outcome.version, is_all=is_all)
        counters.add(
            commits=1,
            fields_written=len(outcome.delta.changes),
            fields_held=fields.size,
            conflicts_merged=outcome.merged,
            conflicts_overwritten=outcome.alive.overwritten,
        )
        return None

    def _as_loaded(self) -> Loaded | None:
        """Return the session as it was loaded, None where it has been written since."""
        found = self._found
        return found if found and found.meta.version == self._version else None

    def _see(self, place: Place, now_ms: int, deadline_ms: int, mode: Mode | None = None) -> None:
        """Take what the store said of the session's deadline, for later requests too."""
        self._lifetime.see(now_ms, deadline_ms, mode)
        if life := self._lifetime.life:
            near_cache.renew(place.record, life)

    def _known(self, place: Place) -> Known | None:
        return near_cache.get(place.record) if conf.near_cache_bytes else None

    def _wrote(self, place: Place, fields: Fields, version: bytes, *, is_all: bool) -> None:
        """Keep at hand what was written, if it ``is_all`` that the record has now."""
        self._version = version if is_all else b""
        if not is_all:
            near_cache.drop(place.record)
        elif conf.near_cache_bytes:
            known = Known(version, fields.stored)
            near_cache.put(place.record, known, conf.near_cache_bytes, self._lifetime.life)

    def _token_of(self, delta: Delta) -> bytes:
        """Return a new token; the last one where the same write is tried again unanswered.

        A view may save again after an outage, and the first write may have landed.
        """
        if self._unanswered is None or self._unanswered[0] != delta:
            self._unanswered = delta, _token()
        return self._unanswered[1]

    def _inserting(self, fields: Fields, key: str) -> Flow[bool]:
        values, token, expiry = fields.everything(), _token(), self._expiry(fields)
        place = self._place(key)
        creating = flows.create(place, values, expiry, self._terms(), token)
        found = yield from self._replication.awaited(place, creating, self._sync())
        if isinstance(found, Exists):
            return False
        fields.created(values, token)
        self._session_key = key
        self._writes += 1
        self._lifetime.see(found.now_ms, found.deadline_ms)
        self._wrote(place, fields, token, is_all=True)
        self.renewed = True
        counters.add(created=1, commits=1, fields_written=len(values), fields_held=len(values))
        return True

    def _rotating(self) -> Flow[None]:
        key, fields = self.session_key, self._fields
        if self.outage is not None and self.nonstop != "exception":
            # The cookie stays as it is, and so the session has to stay under its key.
            raise self.outage
        if not self._may_write():
            return
        found: Alive | Gone | Exists | None = None
        if key is not None and fields is not None and fields.delta():
            # The move comes after it, and what has the one has the other.
            found = yield from self._committing(key, fields, waits=False)
        while key is not None and not isinstance(found, Alive | Gone):
            new_key = self._new_key()
            place, new_place = self._place(key), self._place(new_key)
            asks = partial(self._hold.asking, place, self.usage, capped=False)
            rotating = flows.rotate(
                place,
                new_place,
                self._terms(),
                _token,
                asks,
                self._hold.fence(),
                apart=connections.is_cluster(),
                found=self._as_loaded(),
            )
            near_cache.drop(place.record)
            try:
                found = yield from self._replication.awaited(new_place, rotating, self._sync())
            except SessionLockTimeout as error:
                raise self._hold.not_locked(error, self.usage) from None
            except SessionLockLost as error:
                self.failure = self._hold.refused(error)
                raise
        # Two clicks on "log in": the second one's session has moved meanwhile. It had nobody
        # logged in, so a session of its own takes nothing from anybody.
        if (
            isinstance(found, Gone)
            and fields is not None
            and (found.reason is not EndReason.ROTATED or fields.has_stored_user)
        ):
            raise UpdateError(f"the session is gone{_because(found.reason)}")
        self._has_moved = True
        if isinstance(found, Alive):
            self._session_key, self._found = new_key, None
            self._hold.move(new_place)
            near_cache.end(place.record)
            self._lifetime.see(found.now_ms, found.deadline_ms)
            self.renewed = True
            self.modified = True
            self._answer()
        else:
            self._hold.let_go()
            yield from self.creating()

    def locking(self) -> Flow[None]:
        """Take the lock and load afresh; what was not saved yet goes on top."""
        if self.goes_on and self.outage is not None:
            raise self.outage
        if self.session_key is None:
            yield from self.creating()
        place = self._place(self.session_key or "")
        asking = self._hold.asking(place, self.usage, capped=True)
        try:
            read = yield from flows.load(place, None, asking, self._known(place))
        except SessionLockTimeout as error:
            raise self._hold.not_locked(error, self.usage) from None
        except Damaged as damage:
            yield from self.releasing()
            raise UpdateError(f"the session is damaged: {damage}") from damage
        loaded = self._loaded(place, asking, read)
        if loaded is None:
            raise UpdateError(f"the session is gone{_because(self.ended)}")
        if self._fields is None:
            self._fields = self._new_fields(loaded)
        else:
            self._fields.refresh(loaded.values)

    def committing(self) -> Flow[None]:
        """Write what has changed and give up the lock."""
        try:
            if self.modified and not self.is_empty():
                yield from self.saving(release=True)
                self.committed = True
                self.modified = False
        except Exception:
            yield from self.releasing()
            raise
        yield from self.releasing()

    def releasing(self) -> Flow[None]:
        """Give up the lock, or the place in its queue, if there is one."""
        yield from self._hold.releasing()

    def closing(self) -> Flow[None]:
        """Give up the lock, or the place in its queue: the request is over."""
        self.is_over = True
        yield from self.releasing()

    def _entering(self) -> Flow[Memory]:
        is_outermost = not self.is_locked
        if is_outermost:
            # Where the request locks its session anyway, its own lock is the outermost.
            is_outermost = self._fields is not None or self.usage.access is not Access.LOCKED
            yield from self.locking()
        fields = self._fields
        snapshot = None if fields is None else fields.snapshot()
        self._entered += 1
        return Memory(is_outermost, fields, snapshot, self._modified, self._writes)

    def _leaving(self, before: Memory, *, is_clean: bool) -> Flow[None]:
        self._entered -= 1
        if not is_clean:
            if before.snapshot and before.fields and before.writes == self._writes:
                before.fields.restore(before.snapshot)
                self._fields = before.fields
            else:
                self._fields = None
            self._modified = before.modified
        if before.is_outermost:
            yield from self.committing() if is_clean else self.releasing()
            if is_clean and self.goes_on and self.outage is not None:
                # Dropped, where who locks wants to know that it has landed.
                raise self.outage

    def _locks_on_load(self, place: Place) -> bool:
        if self._hold.grant is not None or self.is_over:
            return False
        access = self.usage.access
        return access is Access.LOCKED or (
            access is Access.UNLOCKED and bool(self.usage.outer_token(place.id))
        )

    def _may_write(self) -> bool:
        """Return whether the view may change its session.

        Raises SessionReadOnly where it may not, and errors are wanted.
        """
        if self.usage.access is not Access.READ_ONLY or self._hold.grant is not None:
            return True
        if self.session_key and not (self._fields and self._fields.delta()):
            return True
        error = SessionReadOnly(self.usage.route)
        if conf.on_read_only_change == "error":
            raise error
        logger.warning("%s", error)
        return False

    def _asking(self, session_key: str | None) -> Flow[bool]:
        if not session_key:
            return False
        return (yield from flows.exists(self._place(session_key)))

    def _ending(self, session_key: str | None) -> Flow[None]:
        key, reason = session_key, EndReason.DELETED
        if not key:
            # A logout is one, also where the session has moved meanwhile: the cookie goes.
            key, reason, self.ended = self.session_key, EndReason.FLUSHED, None
        if key is None:
            return
        place, replication = self._place(key), Replication()
        near_cache.drop(place.record)
        ending = flows.end(place, reason)
        is_news = yield from replication.awaited(place, ending, self._sync())
        near_cache.end(place.record)
        if is_news:
            counters.add(ended=1)
        if key == self.session_key:
            self._hold.let_go()
        replication.answer()

    def _answer(self) -> None:
        """Say so if too few replicas have acknowledged what was just written.

        Raises SessionNotReplicated.
        """
        try:
            self._replication.answer()
        except SessionNotReplicated:
            # Written all the same: nothing is left to be saved, and the cookie is due.
            self.committed, self.modified = True, False
            raise

    # How a flow runs.

    def run(self, flow: Flow[T], twin: str) -> T:
        """Run a flow; ``twin`` is what to await instead on an event loop.

        Raises SynchronousOnlyOperation on a running event loop.
        """
        if _on_event_loop():
            raise SynchronousOnlyOperation(
                "The session cannot talk to its store synchronously on an event loop. "
                f"Use await request.session.{twin}, or load the session before."
            )
        started_s, sent_s = time.monotonic(), time.time()
        try:
            result = drivers.run(
                reporting(flow),
                connections.pool,
                self._budget(),
                connections.waiting_pool,
            )
        except SessionStoreUnavailable as error:
            self.fail(error)
            raise
        self._note_clock(started_s, sent_s)
        return result

    async def arun(self, flow: Flow[T]) -> T:
        """See run()."""
        started_s, sent_s = time.monotonic(), time.time()
        try:
            result = await drivers.arun(
                reporting(flow),
                connections.apool,
                self._budget(),
                connections.awaiting_pool,
            )
        except SessionStoreUnavailable as error:
            self.fail(error)
            raise
        self._note_clock(started_s, sent_s)
        return result

    def _budget(self) -> Budget:
        return self.budget or Budget(conf.store_timeout)

    def _note_clock(self, started_s: float, sent_s: float) -> None:
        if self._lifetime.seen_at_s > started_s:
            counters.observe_clock(self._lifetime.seen_ms, sent_s, time.time())

    # Small things.

    def _place(self, session_key: str) -> Place:
        asked = conf.key_prefix, session_key
        if self._placed is None or self._placed[0] != asked:
            self._placed = asked, Place.of(*asked)
        return self._placed[1]

    def _terms(self) -> Terms:
        return Terms(
            default_age_ms=round(self.get_session_cookie_age() * 1000),
            idle_ms=round((conf.idle_timeout or 0) * 1000),
            max_bytes=conf.max_bytes,
            replay_ms=round(conf.store_timeout * 2000),
            on_conflict=conf.on_conflict,
        )

    def _sync(self) -> Sync | None:
        return wanted(self._budget().left)

    def _new_key(self) -> str:
        return get_random_string(32, VALID_KEY_CHARS)

    def _new_fields(self, loaded: Loaded | Known | None = None, *, cleared: bool = False) -> Fields:
        return Fields(
            cast(Serializer, self.serializer()),
            loaded.values if loaded else None,
            cleared=cleared,
            on_unreadable=self._note_unreadable,
        )

    def _note_unreadable(self, key: Any, error: Exception) -> None:
        counters.add(values_set_aside=1)
        logger.warning(
            "session %s: the value of %r cannot be read and is set aside: %s: %s",
            self._place(self.session_key or "").id[:12],
            key,
            type(error).__name__,
            error,
        )

    def _vanish(self, reason: EndReason) -> None:
        self._hold.let_go()
        self._session_key = None
        self.ended = reason


def _on_event_loop() -> bool:
    # Not get_running_loop(): off a loop, an exception on each call.
    loop = asyncio._get_running_loop()
    return loop is not None and not os.environ.get("DJANGO_ALLOW_ASYNC_UNSAFE")


def _because(reason: EndReason | None) -> str:
    return f" ({reason.value})" if reason else ""


def _token() -> bytes:
    return secrets.token_bytes(VERSION_BYTES)
