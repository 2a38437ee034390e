"""The session engine: ``SESSION_ENGINE = "django_clustered_sessions.backend"``.

Django's face: a public method and its ``a`` twin run the same flow of ``session``.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import cache
from types import FunctionType, ModuleType
from typing import Any, Final, Self, TypeVar, cast

from django.conf import settings
from django.contrib.auth import SESSION_KEY as USER
from django.contrib.sessions.backends.base import SessionBase
from django.core.exceptions import SynchronousOnlyOperation
from django.utils.module_loading import import_string
from django.utils.timezone import is_aware, make_naive

from .conf import conf, site
from .decorators import Marks
from .exceptions import SessionNotReplicated, SessionStoreUnavailable
from .protocol.effects import Flow
from .protocol.record import HiddenKey, Mode
from .protocol.session_data import SessionData
from .session import end, load, lock_scope, login_age, rotate, save
from .session.blocks import ablock, block
from .session.operation_lock import to_its_end
from .session.request_policy import write_header
from .session.state import EXPIRY, LockScope, SessionState
from .store import runner
from .store.budget import Budget, RequestBudget

T = TypeVar("T")

_NOT_GIVEN: Final = object()


@cache
def _place(path: str) -> tuple[ModuleType, str]:
    """Return the module and the name that a dotted path leads to. Raises ImportError."""
    import_string(path)
    module, _, name = path.rpartition(".")
    return sys.modules[module], name


#: Seconds to give up a lock that was not got, or whose block was broken off.
GIVING_UP_S: Final = 0.5

#: The twins to await, in an error about a method that loads.
_ANY_TWIN: Final = (
    'aget(), aset() or the "a" twin of what was called; once one of them has loaded the session,'
    " it is read and changed without the store"
)


class SessionStore(SessionBase):
    """A session in Redis or Valkey; every method in a synchronous and a native async form.

    Beyond Django's contract, a session is written by what changed, an in-place change counts
    without ``modified = True``, and a store that is away raises SessionStoreUnavailable instead
    of logging anybody out.
    """

    def __init__(self, session_key: str | None = None) -> None:
        # Not SessionBase's: it would come back to this class for each thing that it sets.
        self.state = state = SessionState(self, _IS_EMPTY)
        # The class of now, as Django has it: one that a test has put there counts.
        state.serializer = getattr(*_place(site.SESSION_SERIALIZER))
        self.accessed = False
        if cast(Any, self)._validate_session_key(session_key):
            state.session_key = session_key

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has and a pickle: the key, the values, and what is to be saved.

        Neither the lock nor what became of the request, which are the original's. What was not
        read because the store was away is left out; a copy loads it.
        """
        state = self.state
        data = state.data if state.failure is None else None
        own = {name: value for name, value in vars(self).items() if name != "state"}
        return own | {
            "session_key": state.session_key,
            "serializer": state.serializer,
            "ended": state.ended,
            "is_marked_modified": state.is_marked_modified,
            "values": None if data is None else data.state(),
        }

    def __setstate__(self, copied: dict[str, Any]) -> None:
        SessionStore.__init__(self, copied.pop("session_key"))
        state = self.state
        state.serializer, state.ended = copied.pop("serializer"), copied.pop("ended")
        state.is_marked_modified = copied.pop("is_marked_modified")
        if (values := copied.pop("values")) is not None:
            state.data = state.new_data()
            state.data.resume(values)
        vars(self).update(copied)

    # What Django's base class keeps, and this one has in its state.

    def _get_session_key(self) -> str | None:
        return self.state.session_key

    def _set_session_key(self, value: Any) -> None:
        self.state.session_key = value if cast(Any, self)._validate_session_key(value) else None

    session_key = property(_get_session_key)
    _session_key = property(_get_session_key, _set_session_key)

    @property
    def serializer(self) -> type:
        """The class that SESSION_SERIALIZER names."""
        return self.state.serializer

    @serializer.setter
    def serializer(self, value: type) -> None:
        self.state.serializer = value

    @property
    def modified(self) -> bool:
        """True if there is something to save: it was said so, or a value has changed."""
        return self.state.is_modified

    @modified.setter
    def modified(self, value: bool) -> None:
        state = self.state
        state.is_marked_modified = bool(value)
        if not value and state.data is not None:
            # The changes in place are forgotten with it.
            state.data.settle()

    # What became of the session.

    @property
    def is_locked(self) -> bool:
        """True if this object holds the session's lock, as far as it knows."""
        return self.state.lock.grant is not None

    @property
    def is_local(self) -> bool:
        """True if it was read from this process's near cache alone, for the store is away."""
        return self.state.is_local

    @property
    def outage(self) -> SessionStoreUnavailable | None:
        """The error that made the store unusable during this request."""
        return self.state.outage

    @property
    def public_id(self) -> str | None:
        """The session's public id, None where it has no key."""
        return self.state.public_id

    # Reading and changing, where Django's base class does not do already.

    def _get_session(self, no_load: bool = False, twin: str = _ANY_TWIN) -> SessionData:
        self.accessed = True
        state = self.state
        if state.data is None:
            if no_load or state.session_key is None:
                return state.unloaded_data()
            if state.asked_thread is not None and state.is_asked():
                return state.new_data()
            return self.run(load.fill(state), twin)
        return state.data

    async def _aget_session(self, no_load: bool = False) -> SessionData:
        self.accessed = True
        state = self.state
        if state.data is None:
            if no_load or state.session_key is None:
                return state.unloaded_data()
            return await self.arun(load.fill(state))
        return state.data

    _session = property(_get_session)

    @property
    def _session_cache(self) -> SessionData:
        if self.state.data is None:
            raise AttributeError("the session has not been loaded")
        return self.state.data

    @_session_cache.setter
    def _session_cache(self, values: Mapping[Any, Any]) -> None:
        self.state.data = self.state.new_data(cleared=True)
        self.state.data.update(values)

    @_session_cache.deleter
    def _session_cache(self) -> None:
        self.state.data = None

    def is_empty(self) -> bool:
        """Return whether there is neither a key nor data; never load."""
        return not (self.state.session_key or self.state.data)

    def __setitem__(self, key: Any, value: Any) -> None:
        if key == USER:
            self._admit(value)
        super().__setitem__(key, value)

    async def aset(self, key: Any, value: Any) -> None:
        """Set a key. Raises SessionLimitReached where that is a login too many."""
        if key == USER:
            await self._aadmit(value)
        await super().aset(key, value)

    def update(self, dict_: Any) -> None:  # type: ignore[override]
        """Set some keys. Raises SessionLimitReached where that is a login too many."""
        values = dict(dict_)
        self._admit(values.get(USER))
        super().update(values)

    async def aupdate(self, dict_: Any) -> None:
        """See update()."""
        values = dict(dict_)
        await self._aadmit(values.get(USER))
        await super().aupdate(values)

    def _admit(self, user: object) -> None:
        """Let a user log in, if that is not once too often."""
        if user is None or conf.max_sessions_per_user is None:
            return
        if _on_event_loop():
            raise SynchronousOnlyOperation(
                "With CLUSTERED_SESSIONS_MAX_SESSIONS_PER_USER a login asks the session store, "
                "which cannot be done synchronously on an event loop. Use await alogin(), or "
                "await request.session.aset()."
            )
        self.run(save.admit(self.state, self._get_session(), user), "aset()")

    async def _aadmit(self, user: object) -> None:
        """See _admit()."""
        if user is not None and conf.max_sessions_per_user is not None:
            data = await self._aget_session()
            await self.arun(save.admit(self.state, data, user))

    def pop(self, key: Any, default: Any = _NOT_GIVEN) -> Any:
        """Remove a key and return its value, or ``default`` where there is none."""
        return self._pop(self._get_session(twin="apop()"), key, default)

    async def apop(self, key: Any, default: Any = _NOT_GIVEN) -> Any:
        """See pop()."""
        return self._pop(await self._aget_session(), key, default)

    def _pop(self, data: SessionData, key: Any, default: Any) -> Any:
        # Not Django's: it assigns ``modified`` to itself, which here compares every value.
        if key in data:
            self.state.is_marked_modified = True
        return data.pop(key) if default is _NOT_GIVEN else data.pop(key, default)

    def increment(self, key: Any, by: int = 1) -> int:
        """Add ``by`` to an integer, 0 if absent, and return it as far as is known here.

        The sum is made in the store when the session is saved, so that no count is lost,
        whatever other requests do.

        Raises TypeError where the value is no integer.
        """
        self.modified = True
        return self._get_session(twin="aincrement()").increment(key, by)

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
        self.state.tolerates_outage = True

    # Recent logins.

    def login_age(self) -> float | None:
        """Return the seconds since the user logged in or confirmed it, by the store's clock.

        None if nobody is logged in. Raises SessionStoreUnavailable.
        """
        self.accessed = True
        return self.run(login_age.age_s(self.state), "alogin_age()")

    async def alogin_age(self) -> float | None:
        """See login_age()."""
        self.accessed = True
        return await self.arun(login_age.age_s(self.state))

    def confirm_login(self) -> None:
        """Note that the user has just proved once more who it is, such as by a passkey.

        Saved with the session: ``decorators.recent_login`` lets the user pass for some minutes.
        The session gets a new key, as at a login: a stolen cookie gains nothing, and is worthless.
        If another request has given it one meanwhile, nothing is noted.

        Raises ValueError if nobody is logged in, UpdateError if the session was ended, and what
        ``cycle_key()`` does.
        """
        self.accessed = True
        self.run(login_age.confirm(self.state), "aconfirm_login()")

    async def aconfirm_login(self) -> None:
        """See confirm_login()."""
        self.accessed = True
        await self.arun(login_age.confirm(self.state))

    # The lock.

    @block
    def lock(self, name: str = "") -> Iterator[Self]:
        """Give this object the session to itself: a context manager.

        It takes the lock, loads afresh, with what was not saved yet on top, and on a clean exit
        writes and releases. On an exception what was changed inside is forgotten. It may be
        entered again, inside or by another task that shares this object: the last exit writes and
        releases, and nothing is forgotten while another task is inside. ``name`` says what for, in
        ``sessionstats --locks`` and in the errors of those who wait: 100 characters at most.

        Entering raises SessionLockTimeout, UpdateError where the session was ended, and
        SessionStoreUnavailable; leaving raises what ``save()`` does, and SessionLockLost.
        """
        self.accessed = True
        scope = LockScope(threading.get_ident())
        try:
            try:
                self.run(lock_scope.enter(self.state, scope, name), "alock()")
                yield self
                self.run(lock_scope.leave(self.state, scope), "alock()")
            except BaseException:
                self.run(lock_scope.break_off(self.state, scope), "alock()", self._brief())
                raise
        finally:
            # A signal's exception may have come while that was done.
            if not lock_scope.has_left(self.state, scope):
                self.run(lock_scope.break_off(self.state, scope), "alock()", self._brief())

    @ablock
    async def alock(self, name: str = "") -> AsyncIterator[Self]:
        """See lock(); for ``async with``."""
        self.accessed = True
        scope = LockScope(asyncio.current_task())
        try:
            await self.arun(lock_scope.enter(self.state, scope, name))
            yield self
            await self.arun(lock_scope.leave(self.state, scope))
        except BaseException:
            await to_its_end(self.arun(lock_scope.break_off(self.state, scope), self._brief()))
            raise

    def commit(self) -> None:
        """Write what has changed and give up the lock, before the response.

        What is changed afterwards is saved without the lock.

        Raises what ``save()`` does, and SessionLockLost.
        """
        self.run(lock_scope.commit(self.state), "acommit()")

    async def acommit(self) -> None:
        """See commit()."""
        await self.arun(lock_scope.commit(self.state))

    def lock_headers(self) -> dict[str, str]:
        """Return headers for a request that this one makes to its own site for the same session.

        That request then runs under this one's lock and need not wait for it. Good for as long as
        the lock is held; without a lock there are none. Never send them to another site.
        """
        grant = self.state.lock.grant
        return write_header(grant.keys.id, grant.token) if grant else {}

    def apply_marks(self, marks: Marks) -> None:
        """Take what the decorators of the view that begins say."""
        if late := lock_scope.apply_marks(self.state, marks):
            self.run(late, "aapply_marks()")

    async def aapply_marks(self, marks: Marks) -> None:
        """See apply_marks()."""
        if late := lock_scope.apply_marks(self.state, marks):
            await self.arun(late)

    def encode(self, session_dict: Mapping[Any, Any]) -> str:
        """Return the given values serialised, compressed and signed, as Django's engines do."""
        return super().encode(dict(session_dict))

    # Expiry: the store's clock decides.

    def get_expiry_age(self, **kwargs: Any) -> int:
        """Return the seconds until the session expires, by the store's clock once it is known.

        With ``modification`` or ``expiry``: Django's arithmetic, the latter without a load.
        """
        if not kwargs and (left_s := self._left_s()) is not None:
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
        if not kwargs and self._left_s() is not None:
            return self._expiry_date()
        return super().get_expiry_date(**kwargs)

    def _expiry_date(self) -> datetime:
        """Return when the session expires; to the microsecond where a date says so."""
        data = self.state.data
        value = None if data is None else data.get(EXPIRY)
        if self.state.lifetime.is_deadline(value):
            date = super().get_expiry_date(expiry=value)
            if is_aware(date) == settings.USE_TZ:
                return date
        deadline = cast(datetime, self.state.lifetime.deadline)
        return deadline if settings.USE_TZ else make_naive(deadline)

    async def aget_expiry_date(self, **kwargs: Any) -> datetime:
        """See get_expiry_date()."""
        if "expiry" not in kwargs:
            await self._aget_session()
        return self.get_expiry_date(**kwargs)

    def expires_at(self) -> datetime | None:
        """Return when the session ends if it is not used any more, None where none is stored.

        An aware datetime, by the store's clock. To ask is no use of the session, and no trip
        where the request has loaded it. What was not saved yet does not count.

        Raises SessionStoreUnavailable.
        """
        self.accessed = True
        if not self._is_end_known:
            self.run(load.look(self.state), "aexpires_at()")
        return self._end

    async def aexpires_at(self) -> datetime | None:
        """See expires_at()."""
        self.accessed = True
        if not self._is_end_known:
            await self.arun(load.look(self.state))
        return self._end

    @property
    def left_s(self) -> float | None:
        """Seconds until ``expires_at()``, None where no session is known yet, or no more."""
        self.accessed = True
        left_s = self.state.lifetime.left_s
        return left_s if self.session_key and left_s and left_s > 0 else None

    @property
    def most_left_s(self) -> float | None:
        """Seconds until the session ends even if it is used, None where nothing ends it so.

        Known of a session that was loaded and not written since.
        """
        if self.left_s is None or (found := self.state.as_loaded) is None:
            return None
        return self.state.lifetime.until_s(self.state.limit_ms(found.meta))

    @property
    def is_at_hand(self) -> bool:
        """True if all of that is known without a trip: it is as loaded, or none is stored."""
        self.accessed = True
        if self.outage is not None or not self.session_key:
            return self.outage is None
        return self.state.data is not None and self.state.as_loaded is not None

    @property
    def _is_end_known(self) -> bool:
        return not self.session_key or self.state.lifetime.life is not None

    @property
    def _end(self) -> datetime | None:
        return self.state.lifetime.deadline if self.left_s else None

    def set_expiry(self, value: datetime | timedelta | int | None) -> None:
        """Set when the session expires, as Django does.

        A timedelta counts from the store's now, so a node whose clock is wrong sets it right.
        """
        super().set_expiry(value)
        self.state.lifetime.note(value, self._get_session().get(EXPIRY))

    async def aset_expiry(self, value: datetime | timedelta | int | None) -> None:
        """See set_expiry()."""
        await super().aset_expiry(value)
        self.state.lifetime.note(value, (await self._aget_session()).get(EXPIRY))

    def get_expire_at_browser_close(self) -> bool:
        """Return whether the cookie ends with the browser.

        Needs no load where the store has told on another trip.
        """
        if self.state.data is not None or self.state.lifetime.mode is None:
            return super().get_expire_at_browser_close()
        if self.state.lifetime.mode is Mode.DEFAULT:
            return bool(site.SESSION_EXPIRE_AT_BROWSER_CLOSE)
        return self.state.lifetime.mode is Mode.BROWSER

    def _left_s(self) -> float | None:
        """Return the store's remaining time, or None where this request has set another.

        Loads, unless the store has told on another trip how long the session lives.
        """
        self.accessed = True
        state = self.state
        data = self._get_session() if state.lifetime.life is None else state.data
        if data is not None and not data.as_stored(EXPIRY):
            return None
        return state.lifetime.left_s

    # Django's operations on the store.

    def load(self) -> dict[Any, Any]:
        """Return the stored values as a dict; empty, and the key None, if there is no session.

        Raises SessionStoreUnavailable.
        """
        return self.run(load.load(self.state), "aload()").copy()

    async def aload(self) -> dict[Any, Any]:
        """See load()."""
        return (await self.arun(load.load(self.state))).copy()

    def exists(self, session_key: str | None) -> bool:
        """Return whether there is a session under this key.

        Raises SessionStoreUnavailable.
        """
        flow = load.exists(self.state, HiddenKey.of(session_key))
        del session_key
        return self.run(flow, "aexists()")

    async def aexists(self, session_key: str | None) -> bool:
        """See exists()."""
        flow = load.exists(self.state, HiddenKey.of(session_key))
        del session_key
        return await self.arun(flow)

    def create(self) -> None:
        """Store this session under a new key.

        Raises SessionStoreUnavailable, SessionTooLarge; SessionNotReplicated, once it is stored.
        """
        self.accessed = True
        self.run(save.create(self.state), "acreate()")

    async def acreate(self) -> None:
        """See create()."""
        self.accessed = True
        await self.arun(save.create(self.state))

    def save(self, must_create: bool = False) -> None:
        """Write what has changed; with ``must_create``, store as a new session under this key.

        Raises UpdateError where the session was ended, CreateError where ``must_create`` finds
        one, SessionConflict, SessionTooLarge, SessionStoreUnavailable; TypeError, naming the
        session key, for a value that the serialiser refuses; and, once it is written,
        SessionNotReplicated. After that one, a save with nothing to write asks the replicas again.
        """
        self.accessed = True
        self.run(save.save_as_asked(self.state, must_create), "asave()")

    async def asave(self, must_create: bool = False) -> None:
        """See save()."""
        self.accessed = True
        await self.arun(save.save_as_asked(self.state, must_create))

    def delete(self, session_key: str | None = None) -> None:
        """End the session under this key, this one if None; no request brings it back.

        Raises SessionStoreUnavailable; SessionNotReplicated, once it is ended.
        """
        flow = end.end(self.state, HiddenKey.of(session_key))
        del session_key
        self.run(flow, "adelete(), for flush() aflush()")

    async def adelete(self, session_key: str | None = None) -> None:
        """See delete()."""
        flow = end.end(self.state, HiddenKey.of(session_key))
        del session_key
        await self.arun(flow)

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
        self.accessed = True
        self.run(rotate.rotate(self.state), "acycle_key()")

    async def acycle_key(self) -> None:
        """See cycle_key()."""
        self.accessed = True
        await self.arun(rotate.rotate(self.state))

    @classmethod
    def clear_expired(cls) -> None:
        """Do nothing: the store expires sessions by itself."""

    @classmethod
    async def aclear_expired(cls) -> None:
        """See clear_expired()."""

    # How a flow runs.

    def _brief(self) -> Budget:
        """Return what giving up the lock may take, where something was broken off: not long."""
        return self.state.budget or Budget(min(conf.store_timeout, GIVING_UP_S))

    def run(self, flow: Flow[T], twin: str, budget: Budget | None = None) -> T:
        """Run a flow; ``twin`` is what to await instead on an event loop.

        Raises SynchronousOnlyOperation on a running event loop.
        """
        # Not get_running_loop(): off a loop, an exception on each call.
        if asyncio._get_running_loop() is not None and _on_event_loop():
            raise SynchronousOnlyOperation(
                "The session cannot talk to its store synchronously on an event loop. "
                f"Use await request.session.{twin}."
            )
        state = self.state
        try:
            with state.operations.lock:
                outer = state.operation_budget
                try:
                    budget = budget or state.budget or RequestBudget(conf.store_timeout)
                    state.operation_budget = budget
                    return runner.run(flow, budget)
                except SessionStoreUnavailable as error:
                    state.fail(error)
                    raise
                except BaseException:
                    if state.lock.asked:
                        # Broken off, while the lock was asked for or given up.
                        runner.run(state.lock.releasing(), self._brief())
                    raise
                finally:
                    state.operation_budget = outer
        finally:
            if state.signals:
                state.signals.send(type(self))

    async def arun(
        self, flow: Flow[T], budget: Budget | None = None, *, out_of_turn: bool = False
    ) -> T:
        """See run(); ``out_of_turn``: beside what a thread of the request may be at."""
        state = self.state
        try:
            if not out_of_turn:
                await state.operations.aenter()
            outer = state.operation_budget
            try:
                budget = budget or state.budget or RequestBudget(conf.store_timeout)
                state.operation_budget = budget
                return await runner.arun(flow, budget)
            except SessionStoreUnavailable as error:
                state.fail(error)
                raise
            except BaseException as error:
                if state.lock.asked and not isinstance(error, GeneratorExit):
                    await to_its_end(runner.arun(state.lock.releasing(), self._brief()))
                raise
            finally:
                state.operation_budget = outer
                if not out_of_turn:
                    state.operations.leave()
        finally:
            if state.signals:
                await state.signals.asend(type(self))


_IS_EMPTY: Final = cast(FunctionType, SessionStore.is_empty)


def _on_event_loop() -> bool:
    # Not get_running_loop(): off a loop, an exception on each call.
    loop = asyncio._get_running_loop()
    return loop is not None and not os.environ.get("DJANGO_ALLOW_ASYNC_UNSAFE")
