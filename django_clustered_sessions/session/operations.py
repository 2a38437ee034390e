"""What a session does with the store: each operation a flow, written once for sync and async.

``backend`` runs them. Flows never touch ``self._session``: that would load synchronously, on an
event loop too.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from base64 import b32encode
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar, cast

from django.contrib.auth import HASH_SESSION_KEY as HASH
from django.contrib.auth import SESSION_KEY as USER
from django.contrib.sessions.backends.base import CreateError, SessionBase, UpdateError

from django_clustered_sessions.conf import Nonstop, conf
from django_clustered_sessions.decorators import Access
from django_clustered_sessions.exceptions import (
    ClusteredSessionError,
    SessionLockLost,
    SessionLockTimeout,
    SessionNotReplicated,
    SessionReadOnly,
    SessionStoreUnavailable,
)
from django_clustered_sessions.importing import on_demand
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol import flows
from django_clustered_sessions.protocol.effects import Flow
from django_clustered_sessions.protocol.flows import Read
from django_clustered_sessions.protocol.locks import LockRequest
from django_clustered_sessions.protocol.options import Expiry, SyncOptions, WriteOptions
from django_clustered_sessions.protocol.record import (
    DATA,
    NOBODY,
    NODE_BYTES,
    VERSION_BYTES,
    CachedSession,
    Damaged,
    EndReason,
    HiddenKey,
    Loaded,
    Meta,
    Mode,
    SessionKeys,
    node_tag,
    user_tag,
)
from django_clustered_sessions.protocol.results import Alive, Exists, Gone
from django_clustered_sessions.protocol.session_data import (
    USER_FIELD,
    Changes,
    SessionData,
    Snapshot,
    user_id,
)
from django_clustered_sessions.signals import PendingSignals, session_created, session_ended
from django_clustered_sessions.store import connections
from django_clustered_sessions.store.budget import Budget, RequestBudget

from .lifetime import Lifetime
from .lock import SessionLock
from .login_limit import LoginLimit
from .near_cache import Life, Renewal, near_cache
from .operation_lock import OperationLock
from .replication import Replication, wanted
from .request_policy import Policy
from .value_serializer import serializer_of

T = TypeVar("T")

logger = logging.getLogger("django_clustered_sessions")

#: The session key that Django's ``set_expiry()`` sets.
EXPIRY: Final = "_session_expiry"


_LOCK_ERRORS: Final = (SessionLockTimeout, SessionLockLost)


@dataclass(eq=False, slots=True)
class Scope:
    """One block of ``lock()``: what was changed and not saved when it began, after so many writes.

    ``by`` is the thread or task that it is of. ``may_forget``: it has begun and not ended, so what
    was changed in it is forgotten if it fails.
    """

    by: object
    fields: SessionData | None = None
    snapshot: Snapshot | None = None
    modified: bool = False
    writes: int = 0
    may_forget: bool = False


class Operations(SessionBase):
    """What one session object knows of its session, and the flows by which it learns and writes."""

    #: What made the session unusable during this request, the store's outage or its lock; the
    #: middleware looks at it.
    failure: ClusteredSessionError | None = None
    #: Whether it was read from this process's near cache alone, for the store is away.
    is_local: bool = False
    #: How the request uses its session.
    usage: Policy = Policy()
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
    #: Whether this request moved the session to another key, of which the browser has to learn.
    has_moved: bool = False
    #: The store's time for this request; without one, each operation has its own.
    budget: Budget | None = None

    _fields: SessionData | None = None
    _modified: bool = False
    _tolerates_outage: bool = False
    #: Whether something failed that the request must not go on without, such as a logout.
    _failure_stands: bool = False
    _unanswered: tuple[Changes, bytes] | None = None
    _writes: int = 0
    #: Whether the lock ends with the last block of ``lock()``, and not with the request.
    _ends_with_scopes: bool = False
    #: Version of the record that ``_fields`` is all of; empty where nobody knows.
    _version: bytes = b""
    #: The session as the store had it when it was last loaded.
    _found: Loaded | None = None
    #: The tag of the user whose session it is in the store, None while nobody knows.
    _owner: bytes | None = None
    #: Where the session goes on since others have cycled its key, and the key of before.
    _successor: tuple[str | None, SessionKeys] | None = None

    def __init__(self, session_key: str | None = None) -> None:
        super().__init__(session_key)
        self._lifetime = Lifetime()
        self._hold = SessionLock()
        self._turns = OperationLock()
        #: The blocks of ``lock()`` that are open, in any thread or task.
        self._scopes: set[Scope] = set()
        self._replication = Replication()
        self._notices = PendingSignals()
        self._admission = LoginLimit(self._notices)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has and a pickle: the key, the values, and what is to be saved.

        Neither the lock nor what became of the request, which are the original's. What was not
        read because the store was away is left out; a copy loads it.
        """
        fields = self._fields if self.failure is None else None
        return {
            "session_key": self.session_key,
            "serializer": self.serializer,
            "accessed": self.accessed,
            "ended": self.ended,
            "_modified": self._modified,
            "values": None if fields is None else fields.state(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        Operations.__init__(self, state.pop("session_key"))
        values = state.pop("values")
        vars(self).update(state)
        if values is not None:
            self._fields = self._new_fields()
            self._fields.resume(values)

    @property
    def modified(self) -> bool:
        """Whether there is something to save: it was said so, or a value has changed."""
        return self._modified or (self._fields is not None and self._fields.changed_in_place())

    @modified.setter
    def modified(self, value: bool) -> None:
        self._modified = bool(value)
        if not value and self._fields is not None:
            self._fields.settle()

    @property
    def is_locked(self) -> bool:
        """Whether this object holds the session's lock, as far as it knows."""
        return self._hold.grant is not None

    @property
    def has_moved_on(self) -> bool:
        """Whether others have cycled the key, and this object works where the session goes on.

        Nobody here knows the new key: ``session_key`` stays, and no cookie may say it.
        """
        return self._successor is not None and self._successor[0] == self.session_key

    @property
    def public_id(self) -> str | None:
        """The session's public id, None where it has no key."""
        return self._place(self.session_key).id if self.session_key else None

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

    def _limit_ms(self, meta: Meta) -> float:
        """Return until when the session may be used, ms by the store's clock; infinite for ever."""
        limit_ms = meta.span_ms if meta.mode is Mode.ABSOLUTE else math.inf
        if conf.absolute_timeout is not None:
            limit_ms = min(limit_ms, meta.created_ms + conf.absolute_timeout * 1000)
        return limit_ms

    def _deadline_ms(self, meta: Meta) -> int:
        """Return when the session ends, also where the limit was set after its deadline was."""
        if conf.absolute_timeout is None:
            return meta.deadline_ms
        return round(min(meta.deadline_ms, self._limit_ms(meta)))

    def _expiry(self, fields: SessionData) -> Expiry:
        return self._lifetime.expiry(fields.get(EXPIRY))

    # The flows.

    def filling(self) -> Flow[SessionData]:
        """Return the session's values; load them unless that was done, by another task for one."""
        if self._fields is None:
            self._fields = yield from self.loading()
        return self._fields

    def loading(self) -> Flow[SessionData]:
        """Load the session; with ``renew_on_load`` or an idle timeout, renew it as well."""
        keys = self._here
        if keys is None:
            return self._new_fields()
        if isinstance(self.failure, _LOCK_ERRORS):
            # It was told so before, to somebody who did not listen.
            raise self.failure
        renews = self.usage.touches and (self.renew_on_load or conf.idle_timeout)
        options = self._terms() if renews else None
        life = self._renewed_just_now(keys, options) if options else None
        if life:
            options = None
        locks, joins = self._locks_on_load(keys)
        try:
            keys, lock_request, read = yield from self._reading(
                options, asks=locks or joins, joins=joins
            )
        except SessionLockTimeout as error:
            self.failure = error
            raise self._hold.not_locked(error, self.usage) from None
        except Damaged as damage:
            logger.warning("session %s is damaged and not used: %s", keys.id[:12], damage)
            self._vanish(EndReason.UNKNOWN)
            return self._new_fields()
        except SessionStoreUnavailable as error:
            if locks and not self._is_lock_optional:
                raise
            return self._read_without_store(keys, error)
        loaded = yield from self._loaded(keys, lock_request, read)
        if loaded and options:
            self._lifetime.renewal = Renewal(loaded.meta.seen_ms, options.ages)
            self._keep_life(keys)
        if self.is_over:
            # Its client left while a thread waited here.
            yield from self.releasing()
        self.renewed = loaded is not None and (
            options is not None
            or (life is not None and loaded.meta.deadline_ms >= life.deadline_ms)
        )
        if renews and not self.renewed:
            # Somebody has shortened its life meanwhile: the answer makes up for it.
            self.renew_on_load = True
        return self._new_fields(loaded)

    def _reading(
        self, options: WriteOptions | None, *, asks: bool, joins: bool = False
    ) -> Flow[tuple[SessionKeys, LockRequest | None, Read]]:
        """Read the session; return where that was, and how its lock was asked for."""
        while True:
            keys = cast(SessionKeys, self._here)
            lock_request = self._hold.lock_request(keys, self.usage, capped=True) if asks else None
            read = yield from flows.load(
                keys, options, lock_request, self._known(keys), joins=joins
            )
            if not isinstance(read.found, EndReason):
                break
            # Who has waited for the lock had seen the session before it moved.
            self._owner = self._owner or read.whose or None
            if not (yield from self._finding(keys, read.found)):
                return keys, lock_request, read
        if conf.absolute_timeout is None:
            return keys, lock_request, read
        if read.found.meta.created_ms + self._terms().absolute_ms > read.now_ms:
            return keys, lock_request, read
        # Its deadline is from before the timeout was set; a renewal lets it expire.
        yield from flows.touch(keys, self._terms())
        near_cache.end(keys.record)
        return keys, lock_request, read._replace(found=EndReason.UNKNOWN)

    def _looking(self) -> Flow[None]:
        """Ask how long the session lives, which is no use of it."""
        keys = self._here
        if keys is None or self.goes_on:
            return
        try:
            meta, now_ms = yield from flows.look(keys)
        except Damaged:
            return
        except SessionStoreUnavailable as error:
            self._read_without_store(keys, error)
            return
        if meta:
            self._see(keys, now_ms, self._deadline_ms(meta), meta.mode)

    def _finding(self, keys: SessionKeys, reason: EndReason) -> Flow[bool]:
        """Find what is not at its place; return whether it may be at ``self._here`` now."""
        if reason is EndReason.ROTATED:
            return (yield from self._following(keys))
        return reason is EndReason.UNKNOWN and (yield from self._moving_in(keys))

    def _following(self, keys: SessionKeys) -> Flow[bool]:
        """Go on where the session does whose key others have cycled, if it is still this user's.

        Only what was loaded before is followed: a key that somebody brings later is worth nothing.
        """
        if not self._whose or keys != self._here:
            return False
        successor = yield from flows.follow(keys, conf.key_prefix, self._whose)
        if successor is None:
            return False
        near_cache.end(keys.record)
        self._successor = self._session_key, successor
        return True

    def _moving_in(self, keys: SessionKeys, key: HiddenKey | None = None) -> Flow[bool]:
        """Take over from the site's old engine what the store knows nothing of.

        ``key`` is the one of the session at ``place``, None where that is this one. Return whether
        the session may be in the store now.
        """
        if not conf.migrate_from:
            return False
        key = key or HiddenKey.of(self.session_key)
        if key is None:
            return False
        serializer = serializer_of(self.serializer)
        return (yield from on_demand.take_over(key, keys, self._terms(), serializer))

    def _read_without_store(self, keys: SessionKeys, error: SessionStoreUnavailable) -> SessionData:
        """Return what there is to read while the store is away, or raise its error."""
        if self.nonstop == "exception":
            raise error
        if self.nonstop == "noop":
            self._go_on_without_store(error)
            return self._new_fields()
        known, life = self._known(keys), near_cache.life(keys.record)
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
        if must_create or self.has_moved or self.nonstop not in ("noop", "local_reads"):
            return False
        if self._hold.grant and not self._is_lock_optional:
            return False
        return self._fields is None or not self._fields.changes().changes_user

    def _loaded(
        self, keys: SessionKeys, lock_request: LockRequest | None, read: Read
    ) -> Flow[Loaded | None]:
        """Take what a load found, and the lock that came with it; None: the session is gone."""
        self._hold.take(keys, lock_request, read.turn)
        found = read.found
        if isinstance(found, EndReason):
            counters.add(loads=1)
            if found is EndReason.UNKNOWN and near_cache.misses(keys.record, time.monotonic()):
                logger.warning(
                    "the session store knows nothing of session %s, which it had a short while "
                    "ago: it has come back without some of its data, or without all of it, and "
                    "whose sessions are gone is logged out",
                    keys.id[:12],
                )
            near_cache.drop(keys.record)
            self._vanish(found)
            return None
        if self._is_anothers(found.meta.user):
            yield from self.releasing()
            self._vanish(EndReason.ROTATED)
            return None
        self._see(keys, read.now_ms, self._deadline_ms(found.meta), found.meta.mode)
        if read.is_known:
            counters.add(loads=1, near_hits=1, near_bytes_saved=found.meta.size)
        else:
            counters.add(loads=1)
            if conf.near_cache_bytes:
                known = CachedSession(found.meta.version, found.values)
                near_cache.put(keys.record, known, conf.near_cache_bytes, self._lifetime.life)
        self._version, self._found, self._owner = found.meta.version, found, found.meta.user
        return found

    def creating(self) -> Flow[None]:
        """Store the session under a new key."""
        fields = self._without_loading()
        while not (yield from self._inserting(fields, HiddenKey(self._new_key()))):
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
        keys = self._here
        if keys is None:
            if self.ended is EndReason.ROTATED and self._without_loading().user == NOBODY:
                # Not for a login, which has a session of its own.
                raise UpdateError("the session has moved to another key, as at a login")
            yield from self.creating()
        elif must_create:
            fields = self._without_loading()
            if not (yield from self._inserting(fields, HiddenKey(self.session_key or ""))):
                raise CreateError
            self._answer()
        elif self._fields is None:
            # Also what was renewed a moment ago may be gone by now.
            self.renewed = False
            yield from self.renewing()
            if self.ended is not None:
                raise UpdateError
        elif gone := (yield from self._committing(keys, self._fields, release)):
            raise UpdateError(f"the session is gone{_because(gone.reason)}")
        else:
            self._answer()

    def _admitting(self, fields: SessionData, user: object) -> Flow[None]:
        """Claim a place among a user's sessions, before the user is set."""
        if self.goes_on and self.outage is not None:
            raise self.outage
        if fields.user == user_tag(user) and fields.as_stored(USER):
            return
        if self.session_key is None:
            if not self._may_write():
                return
            # There has to be one that can be ended while it is on its way.
            yield from self.creating()
        keys = cast(SessionKeys, self._here)
        yield from self._admission.claiming(keys, str(user), self._sync())

    def renewing(self) -> Flow[None]:
        """Renew the session's deadline, unless its load has."""
        keys = self._here
        if keys is None or self.renewed or self.goes_on:
            return
        try:
            found = yield from flows.touch(keys, self._terms())
            while isinstance(found, Gone) and (yield from self._finding(keys, found.reason)):
                keys = cast(SessionKeys, self._here)
                found = yield from flows.touch(keys, self._terms())
        except SessionStoreUnavailable as error:
            if self.nonstop == "exception":
                raise
            self._go_on_without_store(error)
            return
        if isinstance(found, Gone):
            self._vanish(found.reason)
        else:
            self._see(keys, found.now_ms, found.deadline_ms, found.mode)
            self.renewed = True

    def _committing(
        self, keys: SessionKeys, fields: SessionData, release: bool = False, *, waits: bool = True
    ) -> Flow[Gone | None]:
        options = self._terms()
        if conf.max_sessions_per_user is not None and fields.changes().changes_user:
            if fields.user != NOBODY:
                yield from self._admission.claiming(keys, str(fields[USER]), self._sync())
            self._admission.writing()
        merge_lost = conf.on_lock_lost == "merge" and conf.on_conflict == "merge"
        try:
            committing = flows.commit(
                keys,
                fields,
                self._expiry,
                options,
                self._token_of,
                partial(self._hold.lock_request, keys, self.usage, capped=False),
                self._hold.fence(release=release),
                whose=self._whose,
                merge_lost=merge_lost,
                again=self.unreplicated is not None,
            )
            # Others have moved it on, so that no move of this request's comes after.
            sync = self._sync() if waits or self.has_moved_on else None
            outcome = yield from self._replication.awaited(keys, committing, sync)
        except SessionLockTimeout as error:
            raise self._hold.not_locked(error, self.usage) from None
        except SessionLockLost as error:
            self.failure = self._hold.refused(error)
            raise
        self._unanswered = None
        if isinstance(outcome, Gone):
            if (yield from self._finding(keys, outcome.reason)):
                here = cast(SessionKeys, self._here)
                return (yield from self._committing(here, fields, release, waits=waits))
            self._hold.let_go()
            return outcome
        self._writes += 1
        if outcome.changes.changes_user:
            self._owner = fields.user
        if outcome.turn:
            # The commit had to take a lock of its own, which ended with it.
            self._hold.count(outcome.turn)
            self._hold.lose()
        if release:
            self._hold.let_go()
        alive = outcome.alive
        self._lifetime.see(alive.now_ms, alive.deadline_ms, alive.mode)
        self._lifetime.renewal = Renewal(alive.now_ms, options.ages)
        self.renewed = True
        if outcome.version:
            is_all = alive.before != b"" and alive.before == self._version
            self._wrote(keys, fields, outcome.version, is_all=is_all)
        else:
            self._keep_life(keys)
        counters.add(
            commits=1,
            fields_written=len(outcome.changes.fields),
            fields_held=fields.size,
            conflicts_merged=outcome.merged,
            conflicts_overwritten=alive.overwritten,
            expired=int(alive.deadline_ms <= alive.now_ms),
            node_hops=int(_is_elsewhere(alive.before)),
        )
        return None

    @property
    def _whose(self) -> bytes:
        """The tag of the user whose the session has to be still, empty for anybody's.

        What an anonymous visitor does counts also once somebody has logged in there.
        """
        return self._owner if self._owner and self._owner != NOBODY else b""

    def _is_anothers(self, user: bytes) -> bool:
        """Return whether a session is not the user's any more whose this object has it."""
        is_whose = self._fields is not None or self.has_moved_on
        return is_whose and self._whose not in (b"", user)

    def _without_loading(self) -> SessionData:
        """Return the values that this object has, which are none where nothing was loaded."""
        self.accessed = True
        if self._fields is None:
            self._fields = self._new_fields()
        return self._fields

    def _as_loaded(self) -> Loaded | None:
        """Return the session as it was loaded, None where it has been written since."""
        found = self._found
        return found if found and found.meta.version == self._version else None

    def _see(
        self, keys: SessionKeys, now_ms: int, deadline_ms: int, mode: Mode | None = None
    ) -> None:
        """Take what the store said of the session's deadline, for later requests too."""
        self._lifetime.see(now_ms, deadline_ms, mode)
        self._keep_life(keys)

    def _keep_life(self, keys: SessionKeys) -> None:
        """Take note of when the session ends and was renewed last, for later requests."""
        if life := self._lifetime.life:
            near_cache.renew(keys.record, life)

    def _renewed_just_now(self, keys: SessionKeys, options: WriteOptions) -> Life | None:
        """Return what is known of a session that was renewed within this second, None of others.

        Another renewal would change nothing.
        """
        life = near_cache.life(keys.record)
        if life is None or not life.is_renewed(time.monotonic(), options.ages):
            return None
        self._lifetime.renewal = life.renewal
        return life

    def _known(self, keys: SessionKeys) -> CachedSession | None:
        return near_cache.get(keys.record) if conf.near_cache_bytes else None

    def _wrote(
        self, keys: SessionKeys, fields: SessionData, version: bytes, *, is_all: bool
    ) -> None:
        """Keep at hand what was written, if it ``is_all`` that the record has now."""
        self._version = version if is_all else b""
        if not is_all:
            near_cache.drop(keys.record)
        elif conf.near_cache_bytes:
            known = CachedSession(version, fields.stored)
            near_cache.put(keys.record, known, conf.near_cache_bytes, self._lifetime.life)

    def _token_of(self, changes: Changes) -> bytes:
        """Return a new token; the last one where the same write is tried again unanswered.

        A view may save again after an outage, and the first write may have landed.
        """
        if self._unanswered is None or self._unanswered[0] != changes:
            self._unanswered = changes, _token()
        return self._unanswered[1]

    def _inserting(self, fields: SessionData, key: HiddenKey) -> Flow[bool]:
        values, token, expiry = fields.everything(), _token(), self._expiry(fields)
        keys, user = self._place(key.value), fields.user
        is_limited = fields.user_id is not None and conf.max_sessions_per_user is not None
        if is_limited:
            # A login is a commit, to a session that is there.
            values, user = [pair for pair in values if pair[0] != USER_FIELD], NOBODY
        creating = flows.create(keys, values, expiry, self._terms(), token, user)
        found = yield from self._replication.awaited(keys, creating, self._sync())
        if isinstance(found, Exists):
            return False
        fields.created(values, token)
        self._session_key, self._owner = key.value, user
        self._writes += 1
        self._lifetime.see(found.now_ms, found.deadline_ms)
        self._wrote(keys, fields, token, is_all=True)
        self.renewed = True
        counters.add(
            created=1,
            commits=1,
            fields_written=len(values),
            fields_held=len(values),
            expired=found.swept + int(found.deadline_ms <= found.now_ms),
        )
        if found.deadline_ms > found.now_ms and session_created.has_listeners(type(self)):
            self._notices.created(keys, fields.user_id)
        if is_limited and (gone := (yield from self._committing(keys, fields))):
            raise UpdateError(f"the session is gone{_because(gone.reason)}")
        return True

    def _rotating(self) -> Flow[None]:
        keys, fields = self._here, self._fields
        if self.outage is not None and self.nonstop != "exception":
            # The cookie stays as it is, and so the session has to stay under its key.
            raise self.outage
        if not self._may_write():
            return
        if keys is None and self.ended is EndReason.ROTATED:
            # It has moved before this request came. A new session would take its cookie's place,
            # so there is none before somebody logs in.
            return
        if conf.max_sessions_per_user is not None and keys is not None and fields is None:
            # Whose it is has to be known.
            fields = self._fields = yield from self.loading()
            keys = self._here
        found: Alive | Gone | Exists | None = None
        if keys is not None and fields is not None and fields.changes():
            # The move comes after it, and what has the one has the other.
            found = yield from self._committing(keys, fields, waits=False)
            keys = self._here
        while keys is not None and not isinstance(found, Alive | Gone):
            if self.has_moved_on and fields is not None and fields.user_id is not None:
                # Others have cycled the key meanwhile, and that is as good.
                self._answer()
                return
            new_key = HiddenKey(self._new_key())
            new_place = self._place(new_key.value)
            asks = partial(self._hold.lock_request, keys, self.usage, capped=False)
            rotating = flows.rotate(
                keys,
                new_place,
                self._terms(),
                _token,
                asks,
                self._hold.fence(),
                apart=connections.is_cluster(),
                # What is at hand may not say from where the session was used.
                found=None if conf.track_clients else self._as_loaded(),
            )
            near_cache.drop(keys.record)
            if fields is not None:
                yield from self._admission.moving(new_place, fields.user)
            try:
                found = yield from self._replication.awaited(new_place, rotating, self._sync())
            except SessionLockTimeout as error:
                raise self._hold.not_locked(error, self.usage) from None
            except SessionLockLost as error:
                self.failure = self._hold.refused(error)
                raise
            if isinstance(found, Gone) and (yield from self._finding(keys, found.reason)):
                keys = self._here
                found = None
        # Two clicks on "log in": the second one's session has moved meanwhile. It had nobody
        # logged in, so a session of its own takes nothing from anybody.
        if (
            isinstance(found, Gone)
            and fields is not None
            and (found.reason is not EndReason.ROTATED or fields.has_stored_user)
        ):
            raise UpdateError(f"the session is gone{_because(found.reason)}")
        self.has_moved = True
        if keys is not None and isinstance(found, Alive):
            counters.add(expired=found.swept)
            old_key = HiddenKey.of(self.session_key)
            self._session_key, self._found = new_key.value, None
            self._hold.move(new_place)
            near_cache.end(keys.record)
            self._lifetime.see(found.now_ms, found.deadline_ms)
            self.renewed = True
            self.modified = True
            if session_ended.has_listeners(type(self)):
                user = fields.user_id if fields is not None else None
                self._notices.ended(keys, user, EndReason.ROTATED, new_place)
            if old_key and conf.migrate_from:
                yield from on_demand.leave(old_key)
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
        try:
            keys, lock_request, read = yield from self._reading(None, asks=True)
        except SessionLockTimeout as error:
            raise self._hold.not_locked(error, self.usage) from None
        except Damaged as damage:
            yield from self.releasing()
            raise UpdateError(f"the session is damaged: {damage}") from damage
        loaded = yield from self._loaded(keys, lock_request, read)
        if loaded is None:
            raise UpdateError(f"the session is gone{_because(self.ended)}")
        if self._fields is None:
            self._fields = self._new_fields(loaded)
        else:
            self._fields.refresh(loaded.values, loaded.meta.user)

    def committing(self) -> Flow[None]:
        """Write what has changed and give up the lock."""
        try:
            if self.modified and not self.is_empty():
                yield from self.saving(release=True)
                self.committed = True
                # Not by the setter: what another task has changed since is still to be written.
                self._modified = False
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
        if self._hold.is_asked_for:
            yield from self.releasing()
        if self._admission.is_pending:
            yield from self._admission.giving_back()

    def entering(self, scope: Scope) -> Flow[None]:
        """Begin a block of ``lock()``: take the lock, unless this object has it."""
        is_first = not self._scopes
        self._scopes.add(scope)
        if not self.is_locked:
            # Where the request locks its session anyway, its own lock is the outermost.
            if is_first or not self._ends_with_scopes:
                locks_anyway = self._fields is None and self.usage.access is Access.LOCKED
                self._ends_with_scopes = not locks_anyway
            yield from self.locking()
        elif is_first:
            self._ends_with_scopes = False
        scope.fields, scope.modified, scope.writes = self._fields, self._modified, self._writes
        scope.snapshot = None if self._fields is None else self._fields.snapshot()
        scope.may_forget = True

    def leaving(self, scope: Scope) -> Flow[None]:
        """End a block of ``lock()`` cleanly; with the last one, write and give up the lock."""
        scope.may_forget = False
        self._scopes.discard(scope)
        for other in self._scopes:
            # What this block has changed stands, though another task's goes on and may fail.
            other.may_forget = other.may_forget and other.by == scope.by
        if self._scopes or not self._ends_with_scopes:
            return
        yield from self.committing()
        if self.goes_on and self.outage is not None:
            # Dropped, where a caller that locks wants to know that it has landed.
            raise self.outage

    def breaking_off(self, scope: Scope) -> Flow[None]:
        """End a block of ``lock()`` that failed, wherever; with the last one, give up the lock.

        What was changed inside is forgotten, except while another task is inside as well. May be
        done twice.
        """
        if scope.may_forget and {other.by for other in self._scopes} == {scope.by}:
            if scope.snapshot and scope.fields and scope.writes == self._writes:
                scope.fields.restore(scope.snapshot)
                self._fields = scope.fields
            else:
                self._fields = None
            self._modified = scope.modified
        scope.may_forget = False
        self._scopes.discard(scope)
        if not self.has_left(scope):
            yield from self.releasing()

    def has_left(self, scope: Scope) -> bool:
        """Return whether nothing is left to do for a block of ``lock()`` that has ended."""
        if scope in self._scopes:
            return False
        return bool(self._scopes) or not (self._ends_with_scopes and self._hold.is_asked_for)

    def _locks_on_load(self, keys: SessionKeys) -> tuple[bool, bool]:
        """Return whether a load takes the lock, and whether it joins an outer request in its own.

        The latter is for a view that asks for none: the header is no reason to wait for anybody.
        """
        if self._hold.grant is not None or self.is_over:
            return False, False
        access = self.usage.access
        is_unlocked = access is Access.UNLOCKED
        return access is Access.LOCKED, is_unlocked and bool(self.usage.outer_token(keys.id))

    def _may_write(self) -> bool:
        """Return whether the view may change its session.

        Raises SessionReadOnly where it may not, and errors are wanted.
        """
        if self.usage.access is not Access.READ_ONLY or self._hold.grant is not None:
            return True
        if self.session_key and not (self._fields and self._fields.changes()):
            return True
        error = SessionReadOnly(self.usage.route)
        if conf.on_read_only_change == "error":
            raise error
        logger.warning("%s", error)
        return False

    def _asking(self, key: HiddenKey | None) -> Flow[bool]:
        if key is None:
            return False
        keys = self._place(key.value)
        if (yield from flows.exists(keys)):
            return True
        if (yield from self._moving_in(keys, key)):
            return (yield from flows.exists(keys))
        return False

    def _ending(self, key: HiddenKey | None) -> Flow[None]:
        reason = EndReason.DELETED
        if key is None:
            # A logout is one, also where the session has moved meanwhile: the cookie goes.
            key, reason, self.ended = HiddenKey.of(self.session_key), EndReason.FLUSHED, None
        if key is None:
            return
        keys, replication = self._place(key.value), Replication()
        near_cache.drop(keys.record)
        ending = flows.end(keys, reason, conf.events_kept)
        ended = yield from replication.awaited(keys, ending, self._sync())
        if not ended and (
            (yield from self._following_to_end(keys)) or (yield from self._moving_in(keys, key))
        ):
            # Only what was here leaves a trace that no request in flight gets past.
            keys = self._place(key.value)
            ending = flows.end(keys, reason, conf.events_kept)
            ended = yield from replication.awaited(keys, ending, self._sync())
        if ended and session_ended.has_listeners(type(self)):
            user = user_id(ended.user, serializer_of(self.serializer))
            self._notices.ended(keys, user, reason)
        if conf.migrate_from:
            yield from on_demand.leave(key)
        near_cache.end(keys.record)
        if ended:
            counters.ended([ended.lifetime_ms])
        if keys == self._here:
            self._hold.let_go()
            self._lifetime, self._owner = Lifetime(), None
        replication.answer()

    def _following_to_end(self, keys: SessionKeys) -> Flow[bool]:
        """Follow the session that is to be ended; not with a user's hash from before its move.

        Django flushes a session whose hash is not the user's any more, as this object's is not
        after a new password; the one that goes on has the new hash, and its cookie stays.
        """
        before = self._found
        if not (yield from self._following(keys)):
            return False
        now = (yield from flows.load(cast(SessionKeys, self._here))).found
        if before and isinstance(now, Loaded) and _hash_in(now) != _hash_in(before):
            self._vanish(EndReason.ROTATED)
            return False
        return True

    def _answer(self) -> None:
        """Say so if too few replicas have acknowledged what was just written.

        Raises SessionNotReplicated.
        """
        try:
            self._replication.answer()
        except SessionNotReplicated:
            # Written all the same: nothing is left to be saved, and the cookie is due.
            self.committed, self._modified = True, False
            raise

    def _budget(self) -> Budget:
        return self.budget or RequestBudget(conf.store_timeout)

    # Small things.

    @property
    def _here(self) -> SessionKeys | None:
        """Where this session is kept, None without a key: what flows hold in the key's place."""
        key = self.session_key
        return None if key is None else self._place(key)

    def _place(self, session_key: str) -> SessionKeys:
        if self._successor is not None and self._successor[0] == session_key:
            return self._successor[1]
        return SessionKeys.of(conf.key_prefix, session_key)

    def _terms(self) -> WriteOptions:
        return WriteOptions(
            default_age_ms=round(self.get_session_cookie_age() * 1000),
            idle_ms=round((conf.idle_timeout or 0) * 1000),
            absolute_ms=round((conf.absolute_timeout or 0) * 1000),
            max_bytes=conf.max_bytes,
            replay_ms=round(conf.store_timeout * 2000),
            on_conflict=conf.on_conflict,
            client=self.usage.client if conf.track_clients else b"",
            events_kept=conf.events_kept,
        )

    def _sync(self) -> SyncOptions | None:
        return wanted(self._budget().left)

    def _new_key(self) -> str:
        # As Django's: 32 of its characters, 160 bits. Asking the system for each one takes 50 us.
        return b32encode(secrets.token_bytes(20)).decode().lower()

    def _new_fields(
        self, loaded: Loaded | CachedSession | None = None, *, cleared: bool = False
    ) -> SessionData:
        return SessionData(
            serializer_of(self.serializer),
            loaded.values if loaded else None,
            owner=loaded.meta.user if isinstance(loaded, Loaded) else NOBODY,
            cleared=cleared,
            on_unreadable=partial(_note_unreadable, self._here),
            guard=self._turns.values,
        )

    def _vanish(self, reason: EndReason) -> None:
        self._hold.let_go()
        self._session_key = self._owner = None
        self.ended = reason


def _note_unreadable(keys: SessionKeys | None, key: Any, error: Exception) -> None:
    # Not a method: a session that its own values know would live until Python looks for cycles.
    counters.add(values_set_aside=1)
    logger.warning(
        "session %s: the value of %r cannot be read and is set aside: %s: %s",
        keys.id[:12] if keys else "without a key",
        key,
        type(error).__name__,
        error,
    )


def _hash_in(found: Loaded) -> bytes:
    return found.values.get(DATA + HASH.encode(), b"")[VERSION_BYTES:]


def _because(reason: EndReason | None) -> str:
    return f" ({reason.value})" if reason else ""


def _token() -> bytes:
    return node_tag(conf.node_name) + secrets.token_bytes(VERSION_BYTES - NODE_BYTES)


def _is_elsewhere(version: bytes) -> bool:
    """Return whether another node has written a version; not where there is none."""
    return version != b"" and not version.startswith(node_tag(conf.node_name))
