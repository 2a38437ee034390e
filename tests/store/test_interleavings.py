"""Requests on one session, interleaved at random, against a plain model of what is promised.

The model is written from the promises, not from the code: it keeps values and stamps in dicts, and
what two requests made of one value it works out as additions to what both had loaded. After every
step the store has to hold what the model holds: the same values, of the same writes, and the same
requests in the queues for the same locks.

A failure prints the steps, and the command that replays them.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextvars import Context
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import pytest
import redis
from django.contrib.sessions.backends.base import UpdateError
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.decorators import Access
from django_clustered_sessions.exceptions import SessionConflict, SessionLockLost
from django_clustered_sessions.protocol.commands import lock_queue
from django_clustered_sessions.protocol.effects import Trip, Wait
from django_clustered_sessions.protocol.flows import Flow
from django_clustered_sessions.protocol.record import FORMAT, Locker, Meta, SessionKeys
from django_clustered_sessions.session import leases, load, lock_scope, rotate, save
from django_clustered_sessions.session.request_policy import Policy
from django_clustered_sessions.store import connections, drivers
from django_clustered_sessions.store.budget import Budget
from tests import machines
from tests.conftest import DATABASE, use_store
from tests.servers import StoreServer

pytestmark = pytest.mark.each_server

AGE_S = 14 * 24 * 60 * 60
EXPIRY = "_session_expiry"

#: What a request may end with, other than well.
Refused = (UpdateError, SessionConflict, SessionLockLost)


class Nothing:
    def __bool__(self) -> bool:
        return False

    def __deepcopy__(self, memo: Any) -> Nothing:
        return self

    def __repr__(self) -> str:
        return "NOTHING"


NOTHING = Nothing()


def same(one: Any, other: Any) -> bool:
    """Return whether JSON values are the same: True is not 1, and 1 is not 1.0."""
    if one is NOTHING or other is NOTHING:
        return one is other
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def additions(base: Any, side: Any) -> Any:
    """Return what a side added to what was loaded, at any depth."""
    if type(base) is type(side) is dict:
        parts = {k: additions(base[k], v) if k in base else v for k, v in side.items()}
        return {k: v for k, v in parts.items() if v is not NOTHING} or NOTHING
    if type(base) is type(side) is list and same(side[: len(base)], base):
        return side[len(base) :] or NOTHING
    return NOTHING


def joined(base: Any, mine: Any, theirs: Any) -> Any:
    """Return what becomes of a value that two requests changed, mine being the later save."""
    if same(mine, base) or same(mine, theirs):
        return theirs
    kinds = {type(value) for value in (base, mine, theirs) if value is not NOTHING}
    if kinds not in ({dict}, {list}):
        return mine
    empty = kinds.pop()()
    before = base if base is not NOTHING else empty
    if not mine or not theirs:
        if mine and type(mine) is list and not same(mine[: len(before)], before):
            return mine
        if (added := additions(before, theirs or mine)) is not NOTHING:
            return added
        # Whether it is there at all is for the last who changed that.
        last = theirs if (mine is NOTHING) == (base is NOTHING) else mine
        return NOTHING if last is NOTHING else empty
    if type(mine) is dict:
        keys = [*theirs, *(key for key in mine if key not in theirs)]
        parts = {
            key: joined(before.get(key, NOTHING), mine.get(key, NOTHING), theirs.get(key, NOTHING))
            for key in keys
        }
        return {key: value for key, value in parts.items() if value is not NOTHING}
    if same(mine[: len(before)], before) and same(theirs[: len(before)], before):
        return before + theirs[len(before) :] + mine[len(before) :]
    return mine


@dataclass
class Cell:
    """A stored value, which write put it there, and whether the store itself can add to it."""

    value: Any
    stamp: int
    is_counter: bool = False


@dataclass(eq=False)
class Ticket:
    """One request's wish for a lock: its token in the store, and the mail that wakes the next.

    It waits for the mail of the one before it, and for that of the session with this key.
    """

    token: str = ""
    mail: int = 0
    before: Ticket | None = None
    key: str = ""


@dataclass
class Lock:
    """State of a lock: its holder, whether the lease is over, and the queue."""

    holder: Ticket
    is_over: bool = False
    queue: list[Ticket] = field(default_factory=list)

    def tokens(self) -> list[str]:
        return [ticket.token for ticket in (self.holder, *self.queue)]


@dataclass
class World:
    """Expected content of the store: sessions by key, their locks, and why others have ended."""

    sessions: dict[str, dict[str, Cell]] = field(default_factory=dict)
    locks: dict[str, Lock] = field(default_factory=dict)
    graves: dict[str, str] = field(default_factory=dict)
    #: Mail of sessions that have ended, or left their key.
    ended: Counter[str] = field(default_factory=Counter)
    writes: int = 0

    def stamp(self) -> int:
        self.writes += 1
        return self.writes

    def bury(self, key: str, reason: str) -> None:
        if self.sessions.pop(key, None) is not None:
            self.graves[key] = reason
            self.dismiss(key)

    def dismiss(self, key: str) -> Lock | None:
        """Wake all who wait for what is no more."""
        if lock := self.locks.pop(key, None):
            self.ended[key] += len(lock.queue)
        return lock

    def hand_on(self, key: str, by: Ticket | None = None) -> None:
        """Give a lock to the first who waits, who is woken if it is the holder that gives."""
        queue = self.locks.pop(key).queue
        if queue:
            self.locks[key] = Lock(queue[0], queue=queue[1:])
            if by:
                by.mail += 1

    def acquire(self, key: str, ticket: Ticket) -> bool:
        """Return whether the lock is the ticket's now; else it is in the queue."""
        lock = self.locks.get(key)
        if lock and lock.is_over and lock.holder is not ticket:
            self.hand_on(key)
        lock = self.locks.setdefault(key, Lock(ticket))
        if lock.holder is ticket:
            lock.is_over = False
        elif ticket not in lock.queue:
            lock.queue.append(ticket)
        if lock.holder is not ticket:
            place = lock.queue.index(ticket)
            ticket.key, ticket.before = key, lock.queue[place - 1] if place else lock.holder
        return lock.holder is ticket

    def release(self, ticket: Ticket) -> None:
        for key, lock in list(self.locks.items()):
            if lock.holder is ticket:
                self.hand_on(key, ticket)
            elif ticket in lock.queue:
                lock.queue.remove(ticket)
                ticket.mail += 1

    def may_write(self, key: str, ticket: Ticket | None) -> bool:
        """Return whether a lock lets a write pass: its holder's, or anybody's once it is over."""
        lock = self.locks.get(key)
        if lock is None or lock.holder is ticket:
            return lock is not None or ticket is None
        if lock.is_over and lock.queue:
            self.hand_on(key)
            return False
        return lock.is_over and ticket is None


#: Stops before each round trip with "ask", before each wait for mail with "wait"; is sent whether
#: there was some.
Steps = Generator[str, Any, Any]


@dataclass
class Request:
    """Expectations and steps of one request."""

    world: World
    policy: str
    key: str | None
    loaded: bool = False
    cleared: bool = False
    why: str | None = None
    #: The lock that it holds, as far as it knows, and the one that it has asked for last.
    grant: Ticket | None = None
    asked: Ticket | None = None
    base: dict[str, Cell] = field(default_factory=dict)
    mine: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    saved: set[str] = field(default_factory=set)

    def load(self) -> None:
        if self.loaded:
            return
        self.loaded = True
        if self.key is None:
            return
        if (session := self.world.sessions.get(self.key)) is None:
            self.vanish(self.key)
            return
        self.base = {name: replace(cell) for name, cell in session.items()}
        self.mine = {name: deepcopy(cell.value) for name, cell in session.items()}

    def vanish(self, key: str) -> None:
        self.key, self.why, self.grant = None, self.world.graves.get(key, ""), None

    def clear(self) -> None:
        self.loaded, self.cleared = True, True
        self.base, self.mine, self.counts = {}, {}, {}

    def increment(self, name: str, by: int) -> int:
        self.load()
        self.mine[name] = self.mine.get(name, 0) + by
        self.counts[name] = self.counts.get(name, 0) + by
        total: int = self.mine[name]
        return total

    def loaded_value(self, name: str) -> Any:
        return self.base[name].value if name in self.base else NOTHING

    def counted(self, name: str) -> bool:
        """Return whether all that happened to a value is that it was counted up or down."""
        loaded = self.loaded_value(name)
        value = self.mine.get(name)
        return name in self.counts and same(value, (loaded or 0) + self.counts[name])

    def changes(self) -> set[str]:
        return {
            name
            for name in self.base.keys() | self.mine.keys()
            if (self.counts[name] != 0 if self.counted(name) else self.differs(name))
        }

    def differs(self, name: str) -> bool:
        # In the order in which a dict is: another order is another text, and so a change.
        before, now = self.loaded_value(name), self.mine.get(name, NOTHING)
        if before is NOTHING or now is NOTHING:
            return before is not now
        return json.dumps(before) != json.dumps(now)

    def taking(self, key: str, *, then_reads: bool) -> Steps:
        """Take the lock of a session, and read it with that; give whether it is there."""
        self.asked = ticket = Ticket()
        is_woken, steps = True, "ask"
        while True:
            yield steps
            if is_there := key in self.world.sessions:
                is_taken = self.world.acquire(key, ticket)
            if not is_there or is_taken:
                if then_reads and not is_woken:
                    yield "ask"
                return is_there
            is_woken = yield "wait"

    def locked_loading(self) -> Steps:
        """Load under the lock, as a request of LOCKING="all" does."""
        key = self.key
        if (yield from self.taking(key, then_reads=True)):
            self.grant = self.asked
        self.load()

    def locking(self) -> Steps:
        """Take the lock and load afresh, as lock() does; what was changed goes on top."""
        key = self.key
        is_there = yield from self.taking(key, then_reads=True)
        if not is_there or (session := self.world.sessions.get(key)) is None:
            self.vanish(key)
            raise UpdateError
        self.grant = self.asked
        if not self.loaded:
            self.load()
        elif not self.cleared:
            changes = self.changes()
            moved = {
                name
                for name in self.base.keys() | session.keys()
                if self.stamp_of(name, self.base) != self.stamp_of(name, session)
            }
            self.rebase(moved & changes, session)
            for name in moved - changes:
                self.know(name, session)
                self.mine.pop(name, None)
                if name in session:
                    self.mine[name] = deepcopy(session[name].value)

    def finishing(self, is_modified: bool) -> Steps:
        """Write and give up the lock, as the middleware does."""
        if not is_modified:
            yield "ask"
            self.world.release(self.grant)
            self.grant = None
            return
        try:
            yield from self.committing(release=True)
            # A new counter that was added nothing to: it is not written, and counts as saved.
            self.saved = self.changes()
        except SessionConflict:
            yield "ask"
            self.world.release(self.grant)
            self.grant = None
            raise

    def saving(self) -> Steps:
        if self.key is None:
            if self.why == "rotated":
                raise UpdateError
            yield from self.creating()
        elif not self.loaded:
            yield "ask"
            if self.key not in self.world.sessions:
                raise UpdateError
        else:
            yield from self.committing()

    def creating(self) -> Steps:
        yield "ask"
        stamp = self.world.stamp()
        self.base = {name: self.cell(name, stamp) for name in self.mine}
        self.loaded, self.cleared, self.why, self.counts = True, False, None, {}
        self.key = "new"

    def committing(self, release: bool = False) -> Steps:
        key, fence, own, conflicts = self.key, self.grant, None, 0
        while True:
            changes = self.changes()
            yield "ask"
            session = self.world.sessions.get(key)
            is_write, queues = bool(changes or self.cleared), False
            if session is None:
                self.grant = None
                raise UpdateError
            if is_write and not self.world.may_write(key, fence):
                if fence and not own:
                    self.grant = None
                    raise SessionLockLost("", "")
                queues = True
            else:
                sums = {name for name in changes if self.counted(name)}
                clashing = {name for name in changes if self.clashes(name, name in sums, session)}
                if not clashing:
                    self.write(session, changes)
                    self.written(key, fence, is_write, release)
                    self.grant = None if own or release else self.grant
                    return
                conflicts += not sums.issuperset(clashing)
                if self.policy == "error" and not sums.issuperset(clashing):
                    if own:
                        yield "ask"
                        self.world.release(own)
                    raise SessionConflict("", sorted(clashing))
                self.rebase(clashing, session)
                queues = fence is None and conflicts >= 3
            if queues:
                if not (yield from self.taking(key, then_reads=False)):
                    self.grant = None
                    raise UpdateError
                fence = own = self.asked
                release = True

    def written(self, key: str, fence: Ticket | None, is_write: bool, release: bool) -> None:
        """Let a lock end with what was written under it, or past one whose lease is over."""
        if fence and release:
            self.world.release(fence)
        elif fence is None and is_write and key in self.world.locks:
            self.world.hand_on(key)

    def rebase(self, names: set[str], session: dict[str, Cell]) -> None:
        """Merge what others wrote meanwhile."""
        for name in names:
            theirs = session[name].value if name in session else NOTHING
            if self.counted(name):
                self.mine[name] = (theirs or 0) + self.counts[name]
                self.know(name, session)
                continue
            merged = joined(self.loaded_value(name), self.mine.pop(name, NOTHING), theirs)
            self.know(name, session)
            if merged is not NOTHING:
                self.mine[name] = deepcopy(merged)

    def clashes(self, name: str, is_sum: bool, session: dict[str, Cell]) -> bool:
        """Return whether the store refuses a change: an addition only to what is no counter."""
        if self.cleared:
            return False
        if is_sum and (name not in self.base or self.base[name].is_counter):
            return name in session and not session[name].is_counter
        if (self.policy == "overwrite" and not is_sum) or not (
            name in session or name in self.mine
        ):
            return False
        return self.stamp_of(name, self.base) != self.stamp_of(name, session)

    def cell(self, name: str, stamp: int) -> Cell:
        """Return a value as it is to be stored: what is or was counted, and is a number still."""
        value = self.mine[name]
        was_counter = name in self.base and self.base[name].is_counter
        is_counter = self.counted(name) or (was_counter and type(value) is int)
        return Cell(deepcopy(value), stamp, is_counter)

    @staticmethod
    def stamp_of(name: str, cells: dict[str, Cell]) -> int:
        return cells[name].stamp if name in cells else 0

    def know(self, name: str, session: dict[str, Cell]) -> None:
        if name in session:
            self.base[name] = replace(session[name], value=deepcopy(session[name].value))
        else:
            self.base.pop(name, None)

    def write(self, session: dict[str, Cell], changes: set[str]) -> None:
        counted = {name for name in changes if self.counted(name)}
        if self.cleared:
            session.clear()
        stamp = self.world.stamp()
        for name in changes:
            cell = self.cell(name, stamp) if name in self.mine else None
            if cell and name in counted:
                before = session[name].value if name in session else 0
                self.mine[name] = cell.value = before + self.counts[name]
            if cell:
                session[name] = cell
            else:
                session.pop(name, None)
            self.know(name, session)
        if changes or self.cleared:
            self.cleared, self.counts = False, {}

    def rotating(self) -> Steps:
        if self.key is None and self.why == "rotated":
            return
        key, is_gone = self.key, self.key is None
        if key is not None and self.loaded and (self.changes() or self.cleared):
            try:
                yield from self.committing()
            except UpdateError:
                is_gone = True
        fence, own = self.grant, None
        while not is_gone:
            yield "ask"
            if key not in self.world.sessions:
                break
            if self.world.may_write(key, fence):
                session = self.world.sessions.pop(key)
                self.world.graves[key] = "rotated"
                lock = self.world.dismiss(key)
                self.key = "new"
                self.world.sessions[self.key] = session
                if lock and self.grant:
                    # As it is: moving is no renewal, and a lease that was over is over there too.
                    self.world.locks[self.key] = Lock(self.grant, lock.is_over)
                return
            if fence and not own:
                self.grant = None
                raise SessionLockLost("", "")
            is_gone = not (yield from self.taking(key, then_reads=False))
            fence = own = self.asked
        # It had nobody logged in, so that a session of its own takes nothing from anybody.
        if key is not None and self.loaded and self.world.graves.get(key) != "rotated":
            raise UpdateError
        self.grant = None
        yield from self.creating()


def once(trip: Trip) -> Flow[Any]:
    return (yield trip)


class LockedPolicy(Policy):
    """Policy of a request with LOCKING="all"."""

    access = Access.LOCKED


def locked_loading(session: SessionStore) -> Flow[None]:
    """Load as whatever touches the session first does."""
    session.state.data = yield from load.load(session.state)


@dataclass
class Slot:
    """One request: the real one and the model's, and what both are in the middle of.

    Each runs in a context of its own, as a request has a thread or a task of its own.
    """

    session: SessionStore
    request: Request
    is_async: bool
    context: Context = field(default_factory=Context)
    steps: Flow[None] | None = None
    step: Trip | Wait | None = None
    model: Steps | None = None


# Few names and few sessions, so that requests often meet; endings are rare, or they never would.
names = st.sampled_from(["cart", "cart", "any", "seen"])
counters = st.sampled_from(["n", "m"])
rarely = st.sampled_from([False] * 7 + [True])
inner_keys = st.sampled_from(["a", "b"])
leaves = st.sampled_from([None, True, False, 0, 1, 1.0, -1, "", "x", "[1]"])
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(inner_keys, inner, max_size=3),
    max_leaves=5,
)
slots = st.integers(0, 2)
edits = st.tuples(
    st.lists(inner_keys, max_size=2),
    st.sampled_from(["add", "add", "remove", "empty"]),
    inner_keys,
    values,
)


def edit(value: Any, path: list[str], action: str, key: str, argument: Any) -> None:
    """Change a container in place, at the end of a path as far as there is one."""
    for step in path:
        if isinstance(value, dict) and isinstance(value.get(step), (dict, list)):
            value = value[step]
    if isinstance(value, dict):
        if action == "add":
            value[key] = deepcopy(argument)
        elif action == "remove":
            value.pop(key, None)
    elif isinstance(value, list):
        if action == "add":
            value.append(deepcopy(argument))
        elif action == "remove":
            value[:1] = []
    if action == "empty" and isinstance(value, (dict, list)):
        value.clear()


#: Keys that are no records: what belongs to a bucket, and mailboxes.
NO_RECORD = re.compile(rb":([a-z]+|[0-9a-f]{16})$")


class Interleavings(RuleBasedStateMachine):
    """Three requests at a time, on sessions that they share, lock, end, move and lose."""

    client: ClassVar[redis.Redis]
    runner: ClassVar[asyncio.Runner]
    policy: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.client.flushdb()
        self.world = World()
        self.slots: list[Slot] = []
        self.unknown: list[str] = []
        self.done: list[tuple[Trip, bool]] = []
        self.versions: dict[tuple[str, str], tuple[int, bytes]] = {}

    def teardown(self) -> None:
        """Leave nobody behind in the waiting room."""
        for slot in self.slots:
            if slot.steps is not None:
                slot.context.run(slot.steps.close)

    # The two ways to do one thing.

    def call(self, slot: Slot, sync: Callable[[], Any], twin: Callable[[], Awaitable[Any]]) -> Any:
        if not slot.is_async:
            return slot.context.run(sync)

        async def go() -> Any:
            return await twin()

        return self.runner.run(go(), context=slot.context)

    def send(self, slot_is_async: bool, trip: Trip) -> Any:
        budget = Budget(5.0)
        if not slot_is_async:
            return drivers.run(once(trip), connections.pool, budget)

        async def go() -> Any:
            return await drivers.arun(once(trip), connections.apool, budget)

        return self.runner.run(go())

    def both(self, slot: Slot, real: Callable[[], Any], model: Steps) -> None:
        """Do a thing for real and in the model; both have to end alike."""
        errors: list[type | None] = []
        for do in (real, lambda: list(model)):
            try:
                do()
                errors.append(None)
            except Refused as error:
                errors.append(type(error))
        self.ended(slot, *errors)

    def ended(self, slot: Slot, real: type | None, model: type | None) -> None:
        assert real == model, f"{real} instead of {model}"
        assert slot.session.is_locked == (slot.request.grant is not None)
        if real:
            # That request is over; the next one comes with the cookie that is good now.
            self.replace(slot, next(iter(self.world.sessions), None))
        elif slot.request.key == "new":
            self.named(slot)

    def named(self, slot: Slot) -> None:
        """Take over the key that was drawn for a session."""
        key = slot.session.session_key
        assert key is not None
        assert key not in self.world.sessions, "a key that somebody else's session has"
        assert key not in self.world.graves, "a key that was buried"
        assert key not in self.unknown, "a key that a client made up"
        slot.request.key = key
        moved = self.world.sessions.pop("new", None)
        if moved is None:
            base = slot.request.base
            moved = {name: replace(c, value=deepcopy(c.value)) for name, c in base.items()}
        self.world.sessions[key] = moved
        if lock := self.world.locks.pop("new", None):
            self.world.locks[key] = lock

    def replace(self, slot: Slot, key: str | None) -> None:
        """End a request, without another write, and begin the next."""
        s, grant = slot.session, slot.request.grant
        assert s.is_locked == (grant is not None)
        self.call(
            slot,
            lambda: s.run(s.state.lock.releasing(), ""),
            lambda: s.arun(s.state.lock.releasing()),
        )
        if grant:
            self.world.release(grant)
        slot.context = Context()
        slot.session = SessionStore(key)
        slot.request = Request(self.world, self.policy, key)

    def free(self, number: int) -> Slot | None:
        slot = self.slots[number]
        return None if slot.steps is not None else slot

    # Requests come and go.

    @initialize(first=st.dictionaries(names, values), is_async=st.lists(st.booleans(), min_size=3))
    def open(self, first: dict[str, Any], is_async: list[bool]) -> None:
        session = SessionStore()
        session.update(deepcopy(first))
        session.save()
        key = session.session_key
        assert key is not None
        stamp = self.world.stamp()
        self.world.sessions[key] = {k: Cell(deepcopy(v), stamp) for k, v in first.items()}
        for number in range(3):
            request = Request(self.world, self.policy, key)
            self.slots.append(Slot(SessionStore(key), request, is_async[number]))

    @rule(number=slots, which=st.integers(0, 9), is_async=st.booleans())
    def begin(self, number: int, which: int, is_async: bool) -> None:
        if (slot := self.free(number)) is None:
            return
        keys = list(self.world.sessions) or [None]
        slot.is_async = is_async
        self.replace(slot, keys[which % len(keys)])

    @precondition(lambda self: self.world.sessions)
    @rule(
        name=names,
        changes=st.lists(edits, min_size=3, max_size=3),
        order=st.lists(slots, max_size=9),
        repeated=st.booleans(),
        locks=rarely,
    )
    def meet(
        self, name: str, changes: list[Any], order: list[int], repeated: bool, locks: bool
    ) -> None:
        """Three requests of one page change one thing, and their saves get in each other's way."""
        free = [number for number in range(3) if self.free(number)]
        for number in free:
            self.replace(self.slots[number], next(iter(self.world.sessions)))
            self.read(number, name)
        for number, how in zip(free, changes, strict=False):
            if self.slots[number].request.mine.get(name, NOTHING) is NOTHING:
                self.set_value(number, name, how[-1])
            self.edit_in_place(number, name, how, 1)
        for number in order and free:
            if locks and number == free[0]:
                self.lock(number)
            else:
                self.start_saving(number, False)
        for number in order:
            self.deliver(number, repeated, False)

    @rule(number=slots, which=st.integers(0, 9), is_known=st.booleans(), now=rarely)
    def begin_with_a_dead_key(self, number: int, which: int, is_known: bool, now: bool) -> None:
        if not now or (slot := self.free(number)) is None:
            return
        if not is_known or not self.world.graves:
            self.unknown.append(secrets.token_hex(16))
            self.replace(slot, self.unknown[-1])
        else:
            self.replace(slot, list(self.world.graves)[which % len(self.world.graves)])

    # Reading and changing.

    @rule(number=slots, name=names | counters)
    def read(self, number: int, name: str) -> None:
        if slot := self.free(number):
            s = slot.session
            value = self.call(slot, lambda: s.get(name, NOTHING), lambda: s.aget(name, NOTHING))
            slot.request.load()
            assert same(value, slot.request.mine.get(name, NOTHING))
            assert s.session_key == slot.request.key
            self.seen(slot)

    @rule(number=slots)
    def read_all(self, number: int) -> None:
        if slot := self.free(number):
            found = dict(self.call(slot, slot.session.items, slot.session.aitems))
            slot.request.load()
            assert same(found, slot.request.mine)
            self.seen(slot)

    def seen(self, slot: Slot) -> None:
        """Every change is seen, however it was made."""
        assert slot.session.modified or slot.request.changes() <= slot.request.saved

    @rule(number=slots, name=names, value=values)
    def set(self, number: int, name: str, value: Any) -> None:
        self.set_value(number, name, value)

    @rule(number=slots, name=counters, value=st.integers(-3, 3))
    def set_number(self, number: int, name: str, value: int) -> None:
        self.set_value(number, name, value)

    def set_value(self, number: int, name: str, value: Any) -> None:
        if slot := self.free(number):
            s, own = slot.session, deepcopy(value)
            self.call(slot, lambda: s.__setitem__(name, own), lambda: s.aset(name, own))
            slot.request.load()
            slot.request.mine[name] = deepcopy(value)

    @rule(number=slots, name=names | counters)
    def delete_value(self, number: int, name: str) -> None:
        if slot := self.free(number):
            s = slot.session
            self.call(slot, lambda: s.pop(name, None), lambda: s.apop(name, None))
            slot.request.load()
            slot.request.mine.pop(name, None)

    @rule(number=slots, name=names, how=edits, times=st.integers(1, 2))
    def edit_in_place(self, number: int, name: str, how: Any, times: int) -> None:
        if slot := self.free(number):
            s = slot.session
            value = self.call(slot, lambda: s.get(name), lambda: s.aget(name))
            slot.request.load()
            for _ in range(times):
                edit(value, *how)
                edit(slot.request.mine.get(name), *how)
            self.seen(slot)

    @rule(number=slots, name=counters, by=st.integers(-2, 3))
    def increment(self, number: int, name: str, by: int) -> None:
        if slot := self.free(number):
            s = slot.session
            told = self.call(slot, lambda: s.increment(name, by), lambda: s.aincrement(name, by))
            assert told == slot.request.increment(name, by)

    @rule(number=slots, now=rarely)
    def clear(self, number: int, now: bool) -> None:
        if now and (slot := self.free(number)):
            slot.session.clear()
            slot.request.clear()

    @rule(number=slots, seconds=st.sampled_from([None, 0, 100, 5000]))
    def set_expiry(self, number: int, seconds: int | None) -> None:
        if slot := self.free(number):
            s = slot.session
            self.call(slot, lambda: s.set_expiry(seconds), lambda: s.aset_expiry(seconds))
            slot.request.load()
            slot.request.mine.pop(EXPIRY, None)
            if seconds is not None:
                slot.request.mine[EXPIRY] = seconds

    # Locks.

    @precondition(lambda self: self.world.sessions)
    @rule(number=slots, which=st.integers(0, 9), is_async=st.booleans())
    def begin_locked(self, number: int, which: int, is_async: bool) -> None:
        if slot := self.free(number):
            slot.is_async = is_async
            self.replace(slot, list(self.world.sessions)[which % len(self.world.sessions)])
            slot.session.state.policy = LockedPolicy()
            self.start(slot, locked_loading(slot.session), slot.request.locked_loading())

    @rule(number=slots)
    def lock(self, number: int) -> None:
        """Enter session.lock() with what was changed so far."""
        if (slot := self.free(number)) and slot.request.key and not slot.request.grant:
            self.start(slot, lock_scope.lock(slot.session.state), slot.request.locking())

    @rule(number=slots)
    def finish(self, number: int) -> None:
        """Write and release, as the middleware does at the end of a request."""
        if (slot := self.free(number)) and slot.request.grant:
            s = slot.session
            self.start(slot, lock_scope.commit(s.state), slot.request.finishing(s.modified))

    @precondition(lambda self: self.world.sessions)
    @rule(
        name=names,
        value=values,
        by=st.integers(-2, 3),
        order=st.lists(slots, min_size=3, max_size=20),
        repeated=st.booleans(),
        silent_at=st.none() | st.integers(0, 9),
        in_doubt=st.booleans(),
    )
    def queue(
        self,
        name: str,
        value: Any,
        by: int,
        order: list[int],
        repeated: bool,
        silent_at: int | None,
        in_doubt: bool,
    ) -> None:
        """Three requests of one page lock the session, change it and finish."""
        for number in range(3):
            self.begin_locked(number, 0, number % 2 == 0)
        for at, number in enumerate(order):
            if at == silent_at and self.world.locks:
                self.be_silent(0, True)
            if self.free(number) is None:
                self.deliver(number, repeated, in_doubt)
            else:
                self.set_value(number, name, value)
                self.increment(number, "n", by)
                self.finish(number)

    @precondition(lambda self: self.world.locks)
    @rule(which=st.integers(0, 9), now=rarely)
    def be_silent(self, which: int, now: bool) -> None:
        """A lease is over."""
        if now:
            key = list(self.world.locks)[which % len(self.world.locks)]
            self.world.locks[key].is_over = True
            record = self.place(key).record
            packed = self.client.hget(record, "m:lock")
            self.client.hset(record, "m:lock", packed[:16] + bytes(6) + packed[22:])

    def is_contested(self, slot: Slot) -> bool:
        """Return whether a write would have to wait for another request."""
        lock = self.world.locks.get(slot.request.key or "")
        return lock is not None and lock.holder is not slot.request.grant

    # Whole operations.

    @rule(numbers=st.lists(slots, min_size=1, max_size=3, unique=True))
    def save(self, numbers: list[int]) -> None:
        for slot in filter(None, map(self.free, numbers)):
            s = slot.session
            if self.is_contested(slot):
                self.start(slot, save.save(s.state), slot.request.saving())
                continue
            began = time.monotonic()
            self.both(slot, partial(self.call, slot, s.save, s.asave), slot.request.saving())
            s = slot.session
            if s.session_key and slot.request.loaded and not slot.request.changes():
                record = self.place(s.session_key).record
                most_s = self.client.pttl(record) / 1000
                age_s, took_s = s.get_expiry_age(), time.monotonic() - began
                # Late by the way of a reply, which was another's where this one had none to ask.
                assert self.client.pttl(record) / 1000 <= age_s <= math.ceil(most_s + took_s) + 1

    @rule(number=slots, now=rarely)
    def cycle_key(self, number: int, now: bool) -> None:
        if now and (slot := self.free(number)):
            s = slot.session
            if self.is_contested(slot):
                self.start(slot, rotate.rotate(s.state), slot.request.rotating())
                return
            self.both(
                slot, lambda: self.call(slot, s.cycle_key, s.acycle_key), slot.request.rotating()
            )

    @rule(number=slots, now=rarely)
    def flush(self, number: int, now: bool) -> None:
        if now and (slot := self.free(number)):
            self.call(slot, slot.session.flush, slot.session.aflush)
            slot.request.clear()
            if slot.request.key:
                self.world.bury(slot.request.key, "flushed")
            slot.request.key = slot.request.why = slot.request.grant = None
            assert slot.session.session_key is None

    @rule(number=slots, now=rarely)
    def delete(self, number: int, now: bool) -> None:
        if now and (slot := self.free(number)):
            self.call(slot, slot.session.delete, slot.session.adelete)
            slot.request.why = None
            if slot.request.key:
                self.world.bury(slot.request.key, "flushed")
                slot.request.grant = None

    @precondition(lambda self: self.world.sessions)
    @rule(which=st.integers(0, 9), now=rarely)
    def end_by_another(self, which: int, now: bool) -> None:
        if not now:
            return
        key = list(self.world.sessions)[which % len(self.world.sessions)]
        SessionStore().delete(key)
        self.world.bury(key, "deleted")

    @precondition(lambda self: self.world.sessions)
    @rule(which=st.integers(0, 9), now=rarely)
    def expire(self, which: int, now: bool) -> None:
        if not now:
            return
        key = list(self.world.sessions)[which % len(self.world.sessions)]
        record = self.place(key).record
        self.client.pexpire(record, 0)
        del self.world.sessions[key]
        self.world.locks.pop(key, None)
        # No packet is under way for as long as a session lives: what made it is not repeated now.
        self.done = [(trip, kind) for trip, kind in self.done if record not in trip[0].keys]

    # One round trip at a time: what happens between a refused write and the next try.

    @rule(number=slots, is_move=rarely)
    def start_saving(self, number: int, is_move: bool) -> None:
        if slot := self.free(number):
            s, request = slot.session, slot.request
            self.start(
                slot,
                rotate.rotate(s.state) if is_move else save.save(s.state),
                request.rotating() if is_move else request.saving(),
            )

    def start(self, slot: Slot, steps: Flow[None], model: Steps) -> None:
        slot.steps, slot.model = steps, model
        # As the object's own run() does.
        slot.session.state.operation_budget = Budget(5.0)
        self.advance(slot, None)

    @rule(number=slots, is_repeated=st.booleans(), in_doubt=rarely)
    def deliver(self, number: int, is_repeated: bool, in_doubt: bool) -> None:
        slot = self.slots[number]
        step = slot.step
        if slot.steps is None or step is None:
            return
        asked = slot.request.asked
        if isinstance(step, Wait):
            assert asked is not None
            assert asked.before is not None
            boxes = step.mailboxes
            mail = asked.before.mail, self.world.ended[asked.key]
            assert [self.client.llen(box) for box in boxes] == [*mail]
            if in_doubt:
                # A slice of the wait is over, or the connection broke off.
                self.advance(slot, False)
            elif any(mail):
                self.client.lpop(boxes[0] if mail[0] else boxes[1])
                asked.before.mail -= mail[0] > 0
                self.world.ended[asked.key] -= mail[0] == 0
                self.advance(slot, True)
            return
        if step[0].script and step[0].script.name == "acquire":
            assert asked is not None
            asked.token = str(step[0].arguments[0])
        replies = self.send(slot.is_async, step)
        if is_repeated:
            again = self.send(slot.is_async, step)
            for call, first, second in zip(step, replies, again, strict=True):
                # A lock that was released is no more its holder's, and reading has no status.
                if call.script and call.script.name not in ("release", "fetch"):
                    assert first[0] == second[0]
                    # The new values of what was counted.
                    assert first[4:5] == second[4:5] or call.script.name != "commit"
        writes = step[0].script and step[0].script.name not in ("acquire", "fetch")
        if writes and replies[0][0] == 1:
            self.done.append((step, slot.is_async))
        self.advance(slot, replies)

    def advance(self, slot: Slot, replies: Any) -> None:
        assert slot.steps is not None
        assert slot.model is not None
        is_woken = replies if isinstance(slot.step, Wait) else None
        errors: list[type | None] = []
        kinds: list[str] = []
        for step in (lambda: slot.steps.send(replies), lambda: slot.model.send(is_woken)):
            try:
                asks = slot.context.run(step)
                if not isinstance(asks, str):
                    slot.step, asks = asks, "wait" if isinstance(asks, Wait) else "ask"
                kinds.append(asks)
                errors.append(StopAsyncIteration)
            except StopIteration:
                errors.append(None)
            except Refused as error:
                errors.append(type(error))
        if errors == [StopAsyncIteration] * 2:
            assert kinds[0] == kinds[1]
            return
        slot.steps = slot.step = slot.model = None
        self.ended(slot, *errors)

    @precondition(lambda self: self.done)
    @rule(which=st.integers(0, 9))
    def deliver_late(self, which: int) -> None:
        """Deliver again a trip that was answered, from a connection that was given up."""
        trip, is_async = self.done[which % len(self.done)]
        self.send(is_async, trip)

    # What has to hold at any time.

    def place(self, key: str) -> SessionKeys:
        return SessionKeys.of("session", key)

    @invariant()
    def the_store_holds_what_the_model_holds(self) -> None:
        known = {self.place(key).record: key for key in self.world.sessions}
        buried = {self.place(key).record for key in self.world.graves}
        with self.client.pipeline(transaction=False) as pipeline:
            pipeline.keys("*")
            for place in map(self.place, self.world.sessions):
                pipeline.hgetall(place.record)
                pipeline.pttl(place.record)
                pipeline.zscore(place.index, place.id)
                pipeline.hget(place.locks, place.id)
            keys, *rest = pipeline.execute()
        records = {k.decode() for k in keys if not NO_RECORD.search(k)}
        assert records <= known.keys() | buried, "a session that nobody made"
        answers = iter(rest)
        for key, cells in self.world.sessions.items():
            raw = next(answers)
            self.holds(key, cells, raw, next(answers), next(answers))
            lock = self.world.locks.get(key)
            tokens = lock.tokens() if lock else []
            assert raw.get(b"m:lock", b"")[:16].decode() == "".join(tokens[:1])
            # A lock that nobody waits for may be in the record alone.
            listed = [one.token for one in Locker.parse_all(next(answers) or b"")]
            assert listed == tokens or (listed, len(tokens)) == ([], 1)
        for record in buried:
            assert self.client.hkeys(record) == [b"m:end"], "not only a tombstone"

    def holds(
        self, key: str, cells: dict[str, Cell], raw: dict[bytes, bytes], pttl: int, score: float
    ) -> None:
        fields = {name[2:].decode(): value for name, value in raw.items() if name[:2] == b"d:"}
        found = {name: json.loads(value[9:]) for name, value in fields.items()}
        assert same(found, {name: cell.value for name, cell in cells.items()})
        for name, cell in cells.items():
            assert (fields[name][8:9] == b"i") == cell.is_counter
            # Written when the model says so, and at no other time.
            stamp, version = self.versions.get((key, name), (0, b""))
            assert (stamp == cell.stamp) == (version == fields[name][:8]) or stamp == 0
            self.versions[key, name] = cell.stamp, fields[name][:8]
        meta = Meta.parse(raw[b"m:"])
        assert raw[b"m:"][0] == FORMAT
        data = {name: value for name, value in raw.items() if name[:2] == b"d:"}
        assert meta.size == sum(len(name) + len(value) for name, value in data.items())
        seconds = cells[EXPIRY].value if EXPIRY in cells else None
        assert 0 <= (seconds or AGE_S) * 1000 - pttl < 10_000
        assert abs(score) == meta.deadline_ms


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


LONG = (pytest.mark.full, pytest.mark.timeout(600))

#: Most runs go on for longer, and all of them only where there is time.
RUNS = [
    pytest.param("merge", 20, id="merge-short"),
    pytest.param("overwrite", 5, id="overwrite-short"),
    pytest.param("error", 5, id="error-short"),
    pytest.param("merge", 100, id="merge-long", marks=LONG),
    pytest.param("overwrite", 30, id="overwrite-long", marks=LONG),
    pytest.param("error", 30, id="error-long", marks=LONG),
]


@pytest.mark.parametrize(("policy", "examples"), RUNS)
def test_interleaved_requests_keep_the_promises(
    store: redis.Redis,
    store_server: StoreServer,
    settings: Any,
    runner: asyncio.Runner,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    examples: int,
) -> None:
    use_store(settings, f"{store_server.unix_url}?db={DATABASE}")
    settings.CLUSTERED_SESSIONS_ON_CONFLICT = policy
    # No wait and no lease is over before a step says so.
    for name in ("LOCK_WAIT", "LOCK_LEASE", "LOCK_MAX_HOLD"):
        setattr(settings, f"CLUSTERED_SESSIONS_{name}", 3600)
    settings.CLUSTERED_SESSIONS_LOCK_MAX_WAITERS = 24
    monkeypatch.setattr(lock_queue, "CLAIM_MS", 3_600_000)
    monkeypatch.setattr(leases.Renewer, "keep", lambda self, grant: None)

    class Machine(Interleavings):
        pass

    Machine.client, Machine.runner, Machine.policy = store, runner, policy
    length = "long" if examples > 20 else "short"
    machines.run(Machine, f"{policy} and {length}", max_examples=examples)


class DigitsForOthers:
    """A serialiser in whose bytes digits are something else, as in MessagePack's."""

    def dumps(self, obj: Any) -> bytes:
        return bytes([obj]) if type(obj) is int else json.dumps(obj).encode()

    def loads(self, data: bytes) -> Any:
        return data[0] if len(data) == 1 else json.loads(data)


def test_number_that_was_set_is_counted_up_in_any_serialiser(
    store: redis.Redis, settings: Any
) -> None:
    settings.SESSION_SERIALIZER = f"{__name__}.DigitsForOthers"
    first = SessionStore()
    first["n"] = 53
    first.save()
    requests = [SessionStore(first.session_key) for _ in range(3)]
    for session in requests:
        session.increment("n")
    for session in requests:
        session.save()
    assert requests[-1]["n"] == SessionStore(first.session_key)["n"] == 56
