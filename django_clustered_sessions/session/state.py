"""The state of one session object. Nothing here asks the store."""

from __future__ import annotations

import logging
import math
import secrets
import threading
from base64 import b32encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MappingProxyType
from typing import Any, Final, TypeVar, cast
from weakref import ReferenceType, proxy, ref

from django.contrib.sessions.backends.base import SessionBase

from django_clustered_sessions.conf import Nonstop, conf, site
from django_clustered_sessions.encryption import seal_of
from django_clustered_sessions.exceptions import ClusteredSessionError, SessionStoreUnavailable
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol.changes import Changes, Snapshot
from django_clustered_sessions.protocol.options import Expiry, WriteOptions, bounded
from django_clustered_sessions.protocol.record import (
    NOBODY,
    NODE_BYTES,
    VERSION_BYTES,
    Ages,
    CachedSession,
    EndReason,
    HiddenKey,
    Loaded,
    Meta,
    Mode,
    Serializer,
    SessionKeys,
    node_tag,
)
from django_clustered_sessions.protocol.sealing import Seal
from django_clustered_sessions.protocol.session_data import SessionData
from django_clustered_sessions.signals import PendingSignals
from django_clustered_sessions.store.budget import Budget

from .client_info import Client
from .lifetime import Lifetime
from .lock import SessionLock
from .login_limit import LoginLimit
from .near_cache import Copy, near_cache
from .operation_lock import OperationLock
from .replication import Replication
from .request_policy import Policy
from .value_serializer import SHORTER

T = TypeVar("T")

logger = logging.getLogger("django_clustered_sessions")

#: The session key that Django's ``set_expiry()`` sets.
EXPIRY: Final = "_session_expiry"

#: Not called, for each request asks, unless a class, an object or a test has another one.
_COOKIE_AGE: Final = SessionBase.get_session_cookie_age


@dataclass(eq=False, slots=True)
class LockScope:
    """One block of ``lock()``: what was changed and not saved when it began, after so many writes.

    ``by`` is the thread or task that it is of. ``may_forget``: it has begun and not ended, so what
    was changed in it is forgotten if it fails.
    """

    by: object
    data: SessionData | None = None
    snapshot: Snapshot | None = None
    modified: bool = False
    write_count: int = 0
    end_count: int = 0
    may_forget: bool = False


class SessionState:
    """The knowledge of one session object: key, values, lock, lifetime, and its request.

    ``session`` is the object, which has its state: the state does not keep it alive.
    ``is_empty`` is the function that says of the object what the state says as well.
    """

    # Of the request.

    #: The use that the request makes of its session.
    policy: Policy = Policy()
    #: The store's time for this request; without one, each operation has its own.
    budget: Budget | None = None
    #: The store's time for the operation that runs, None while none does.
    operation_budget: Budget | None = None
    #: True if a load also renews the session's deadline, on the same trip.
    renew_on_load: bool = False
    #: True if this request's use of the session has renewed its deadline.
    renewed: bool = False
    #: True if ``commit()`` or ``lock()`` has written it, so that its cookie is due.
    committed: bool = False
    #: True if this request moved the session to another key, of which the browser has to learn.
    has_moved: bool = False
    #: True if the request is over, so that nothing would give up a lock that it took unasked.
    is_over: bool = False

    # Of a store that is away, or a lock that was not got.

    #: The error, of the store or of the lock, that made the session unusable during this request.
    failure: ClusteredSessionError | None = None
    #: True if something failed that the request must not go on without, such as a logout.
    failure_stands: bool = False
    #: True if the view goes on without its session while the store is away.
    tolerates_outage: bool = False
    #: True if the session was read from this process's near cache alone, for the store is away.
    is_local: bool = False

    # Of the session.

    #: True if it was last read from a copy, without a trip.
    is_copy: bool = False

    #: The serialiser's class, as Django's SessionBase has it.
    serializer: type
    #: True if the object's last answer to a flow needs values that are not loaded yet.
    needs_values: bool = False
    #: The session's values, None before the load.
    data: SessionData | None = None
    #: True if ``modified`` was set.
    is_marked_modified: bool = False
    #: The reason why there is no session under the key of this object, once it has looked.
    ended: EndReason | None = None
    #: The session as the store had it when it was last loaded.
    found: Loaded | None = None
    #: Record version that ``data`` fully reflects; b"" if unknown.
    version: bytes = b""
    #: The tag of the user whose session it is in the store, None if unknown.
    owner: bytes | None = None
    #: True if the lock ends with the last open block of ``lock()``, and not with the request.
    lock_ends_with_scopes: bool = False
    #: Number of times that this object's session was ended, or found to have ended.
    end_count: int = 0
    #: Number of this object's writes that have landed.
    write_count: int = 0
    #: The place where the session goes on whose key others have cycled, by its old key.
    _moved: Mapping[str | None, SessionKeys] = MappingProxyType({})
    #: The last write and its token, until the store has answered it.
    unanswered: tuple[Changes, bytes] | None = None
    #: The thread in which the object answers a flow.
    asked_thread: int | None = None

    def __init__(self, session: SessionBase, is_empty: FunctionType) -> None:
        self._session = cast(SessionBase, proxy(session))
        self._is_empty = is_empty
        self.sender = type(session)
        self.session_key: str | None = None
        self.lifetime = Lifetime()
        self.lock = SessionLock()
        self.operations = OperationLock()
        self.replication = Replication()
        self.signals = PendingSignals()
        self.login_limit = LoginLimit()
        #: The open blocks of ``lock()``, in any thread or task.
        self.lock_scopes: set[LockScope] = set()

    # The key.

    @property
    def keys(self) -> SessionKeys | None:
        """The keys of this session in the store, None without a session key."""
        if self.session_key is None:
            return None
        # No local that a traceback would show.
        moved = self._moved.get(self.session_key)
        return moved or SessionKeys.of(conf.key_prefix, self.session_key)

    def keys_of(self, session_key: str) -> SessionKeys:
        """Return where the session under a key is kept."""
        return self._moved.get(session_key) or SessionKeys.of(conf.key_prefix, session_key)

    @staticmethod
    def new_key() -> HiddenKey:
        """Return a new session key."""
        # As Django's: 32 of its characters, 160 bits. Asking the system for each one takes 50 us.
        return HiddenKey(b32encode(secrets.token_bytes(20)).decode().lower())

    @property
    def has_moved_on(self) -> bool:
        """True if others have cycled the key, and this object works where the session goes on.

        This process does not know the new key: ``session_key`` stays, and no cookie may say it.
        """
        return self.session_key in self._moved

    @property
    def public_id(self) -> str | None:
        """The session's public id, None where it has no key."""
        return self.keys.id if self.keys else None

    def follow(self, successor: SessionKeys) -> None:
        """Take note of where the session goes on under a key that this process does not know."""
        self._moved = {self.session_key: successor}

    def vanish(self, reason: EndReason) -> None:
        """Take note that there is no session under the key, and forget its values with it.

        A later save would bring them back, the user's login among them, under another key.
        """
        self.lock.let_go()
        self.session_key = self.owner = self.data = None
        self.is_marked_modified = False
        self.end_count += 1
        self.ended = reason

    # The values.

    def new_data(
        self, loaded: Loaded | CachedSession | None = None, *, cleared: bool = False
    ) -> SessionData:
        """Return the values as they were loaded; none without that."""
        return SessionData(
            SHORTER.get(self.serializer, self.serializer)(),
            loaded.values if loaded else None,
            owner=loaded.meta.user if isinstance(loaded, Loaded) else NOBODY,
            cleared=cleared,
            on_unreadable=partial(_note_unreadable, ref(self)),
            guard=self.operations.values,
            seal=self.seal(loaded.past if loaded else b"") if conf.encryption_keys else None,
        )

    def seal(self, past: bytes = b"") -> Seal | None:
        """Return the seal of the session's fields; None without encryption, or without a key.

        ``past`` is the record's.
        """
        keys = self.keys if conf.encryption_keys else None
        return seal_of(keys.id, past) if keys else None

    def unloaded_data(self) -> SessionData:
        """Return the values that this object has, which are none where nothing was loaded."""
        if self.data is None:
            self.data = self.new_data()
        return self.data

    @property
    def value_serializer(self) -> Serializer:
        """The serialiser of single values."""
        return SHORTER.get(self.serializer, self.serializer)()

    @property
    def is_modified(self) -> bool:
        """True if there is something to save: ``modified`` was set, or a value has changed."""
        return self.is_marked_modified or (self.data is not None and self.data.changed_in_place())

    def is_empty(self) -> bool:
        """Return whether there is neither a key nor a value, or a subclass says so; never load."""
        answer = self._session.is_empty
        if getattr(answer, "__func__", None) is self._is_empty:
            return not (self.session_key or self.data)
        return self._ask(answer)

    @property
    def _age_s(self) -> float:
        """Seconds that a session lives where nothing else is said."""
        answer = self._session.get_session_cookie_age
        if getattr(answer, "__func__", None) is _COOKIE_AGE:
            return cast(float, site.SESSION_COOKIE_AGE)
        return self._ask(answer)

    def _ask(self, question: Callable[[], T]) -> T:
        """Return the object's answer to a flow, during which it cannot load.

        A subclass that reads values before the load finds none, and ``needs_values`` says so.
        """
        self.needs_values, self.asked_thread = False, threading.get_ident()
        try:
            return question()
        finally:
            self.asked_thread = None

    def is_asked(self) -> bool:
        """Return whether the object is read to answer a flow, which then needs its values."""
        is_asked = self.asked_thread == threading.get_ident()
        self.needs_values = self.needs_values or is_asked
        return is_asked

    @property
    def whose(self) -> bytes:
        """The tag of the user whose the session has to be still, empty for anybody's.

        An anonymous visitor's changes count also after a login in that session.
        """
        return self.owner if self.owner and self.owner != NOBODY else b""

    # The store's answers.

    def see(
        self, keys: SessionKeys, now_ms: int, deadline_ms: int, mode: Mode | None = None
    ) -> None:
        """Take what the store said of the session's deadline, for later requests too."""
        near_cache.renew(keys.record, self.lifetime.see(now_ms, deadline_ms, mode))

    def keep_life(self, keys: SessionKeys) -> None:
        """Take note of when the session ends and was renewed last, for later requests."""
        if life := self.lifetime.life:
            near_cache.renew(keys.record, life)

    def wrote(
        self,
        keys: SessionKeys,
        data: SessionData,
        version: bytes,
        *,
        is_all: bool,
        copy: Copy | None = None,
    ) -> None:
        """Keep at hand what was written, if it ``is_all`` that the record has now."""
        self.version = version if is_all else b""
        if not is_all:
            near_cache.drop(keys.record)
        elif conf.near_cache_bytes:
            past = data.seal.past if data.seal else b""
            cached = CachedSession.of(version, dict(data.stored), past)
            near_cache.put(keys.record, cached, conf.near_cache_bytes, self.lifetime.life, copy)

    @property
    def as_loaded(self) -> Loaded | None:
        """The session as it was loaded, None where it has been written since."""
        found = self.found
        return found if found and found.meta.version == self.version else None

    def limit_ms(self, meta: Meta) -> float:
        """Return until when the session may be used, ms by the store's clock; infinite for ever."""
        limit_ms = meta.span_ms if meta.mode is Mode.ABSOLUTE else math.inf
        if conf.absolute_timeout is not None:
            limit_ms = min(limit_ms, meta.created_ms + conf.absolute_timeout * 1000)
        return limit_ms

    def deadline_ms(self, meta: Meta) -> int:
        """Return when the session ends, also where the limit was set after its deadline was."""
        return round(min(meta.deadline_ms, self.limit_ms(meta)))

    # What an operation is given.

    def write_options(self, seal: Seal | None = None) -> WriteOptions:
        """Return what the settings say about a write, and a subclass about the session's age.

        ``seal`` is that of a session to be created.
        """
        return WriteOptions(
            Ages(
                bounded(round(self._age_s * 1000)),
                round((conf.idle_timeout or 0) * 1000),
                round((conf.absolute_timeout or 0) * 1000),
            ),
            max_bytes=conf.max_bytes,
            replay_ms=round(conf.store_timeout * 2000),
            on_conflict=conf.on_conflict,
            client=self._client(seal) if conf.track_clients else b"",
            events_kept=conf.events_kept,
        )

    @property
    def client(self) -> Client | None:
        """From where the session is used; None outside of a request."""
        return Client.parse(self.policy.client)

    def _client(self, seal: Seal | None) -> bytes:
        """Return from where the session is used, packed; empty where it cannot be encrypted yet."""
        client = self.policy.client
        if not client or not conf.encryption_keys:
            return client
        seal = seal or (self.data.seal if self.data is not None else None) or self.seal()
        return seal.seal_client(client) if seal else b""

    def expiry(self, data: SessionData) -> Expiry:
        """Return how the session is to expire."""
        return self.lifetime.expiry(data.get(EXPIRY))

    def token_of(self, changes: Changes) -> bytes:
        """Return a new token; the last one where the same write is tried again unanswered.

        A view may save again after an outage, and the first write may have landed.
        """
        if self.unanswered is None or self.unanswered[0] != changes:
            self.unanswered = changes, new_token()
        return self.unanswered[1]

    # A store that is away.

    @property
    def outage(self) -> SessionStoreUnavailable | None:
        """The error that made the store unusable during this request."""
        return self.failure if isinstance(self.failure, SessionStoreUnavailable) else None

    @property
    def nonstop(self) -> Nonstop:
        """The behaviour while the store is away, a value of CLUSTERED_SESSIONS_NONSTOP."""
        return "noop" if self.tolerates_outage else self.policy.nonstop

    @property
    def goes_on(self) -> bool:
        """True if the store has failed this request, which goes on without it."""
        return self.outage is not None and not self.failure_stands and self.nonstop != "exception"

    def fail(self, error: ClusteredSessionError) -> None:
        """Take note of what made the session unusable, in spite of what ``nonstop`` allows."""
        self.failure = error
        self.failure_stands = self.failure_stands or self.nonstop != "exception"

    @property
    def is_lock_optional(self) -> bool:
        """True if the view said itself that it can do without, and did not ask for the lock."""
        return self.tolerates_outage or self.policy.lock_is_optional


def new_token() -> bytes:
    """Return the token of a write: this node's tag, and random bytes."""
    return node_tag(conf.node_name) + secrets.token_bytes(VERSION_BYTES - NODE_BYTES)


def is_elsewhere(version: bytes) -> bool:
    """Return whether another node has written a version; not where there is none."""
    return version != b"" and not version.startswith(node_tag(conf.node_name))


def because(reason: EndReason | None) -> str:
    """Return an error's words for why a session is gone."""
    return f" ({reason.value})" if reason else ""


def _note_unreadable(of: ReferenceType[SessionState], key: Any, error: Exception) -> None:
    # Not a method: a session that its own values know would live until Python looks for cycles.
    state = of()
    public_id = state.public_id if state else None
    counters.add(values_set_aside=1)
    logger.warning(
        "session %s: the value of %r cannot be read and is set aside: %s: %s",
        public_id[:12] if public_id else "without a key",
        key,
        type(error).__name__,
        error,
    )
