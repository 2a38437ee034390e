"""A login counts a user's sessions while one of them is written or moves, in every order of steps.

The login's trips are sent call by call, and between any two of them may come the next trip of the
session that moves. A few buckets are enough, and make a look short.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import redis
from django.contrib.auth.models import User

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionLimitReached
from django_clustered_sessions.protocol import flows, login_limit, user_index
from django_clustered_sessions.protocol.effects import Flow
from django_clustered_sessions.protocol.locks import LockRequest
from django_clustered_sessions.protocol.login_limit import Limit
from django_clustered_sessions.protocol.options import LockOptions, WriteOptions
from django_clustered_sessions.protocol.record import (
    Ages,
    EndReason,
    HiddenKey,
    SessionKeys,
    user_tag,
)
from django_clustered_sessions.session.near_cache import near_cache
from django_clustered_sessions.session.state import SessionState
from tests.gateways import place
from tests.locking import ask
from tests.store.test_registry_truth import BUCKETS, Keys

pytestmark = pytest.mark.each_server

ANN = User(pk=1, username="ann")
TERMS = WriteOptions(Ages(60_000), 1 << 20, 30_000, "merge")
LAPSE_MS = 60_000
ASKING = LockRequest(
    "a" * 16, LockOptions(60_000, 10_000, 120_000, 16, b"web-1"), 1000, lambda: None, nullcontext
)
ROOM = Limit(9, False, LAPSE_MS)

#: About as many calls as a login sends here.
CALLS = 24


class Case:
    """A user's older and newer session, which have claims, and a third one for the login.

    The login that is ``late`` is not written yet.
    """

    def __init__(self, keys: Keys, late: str) -> None:
        keys.restart()
        near_cache.clear()
        self.older, self.newer, self.third = (SessionStore() for _ in range(3))
        for session in (self.older, self.newer, self.third):
            session.create()
        self.new_keys = [keys.draw() for _ in range(2)]
        self.late = late
        for session in (self.older, self.newer):
            run(claimed(session, ROOM))
        for name in {"older", "newer"} - {late}:
            write(getattr(self, name))

    def moving(self, *, apart: bool) -> Flow[None]:
        """Move the older session, once it is written, to one new key after the other."""
        if self.late == "older":
            write(self.older)
            yield ()
        here = place_of(self.older)
        for number, key in enumerate(self.new_keys):
            new, token = place(key), bytes([number + 1]) * 8
            yield from login_limit.keep(new, "session", user_tag("1"), ROOM)
            asked = partial(flows.rotate, here, new, TERMS, partial(bytes, token), lambda: ASKING)
            yield from asked(apart=apart)
            here = new


def place_of(session: SessionStore) -> SessionKeys:
    return place(session.session_key or "")


def write(session: SessionStore) -> None:
    """Let the user be logged in there; the settings have no limit, so nothing is claimed."""
    session["_auth_user_id"] = "1"
    session.save()


def claimed(session: SessionStore, limit: Limit) -> Flow[None]:
    def end(places: Sequence[SessionKeys]) -> Flow[None]:
        for one in places:
            yield from flows.end(one, EndReason.LIMIT, 0)

    yield from login_limit.claim(place_of(session), "session", "1", limit, end, lambda: 0.0)


def run(flow: Flow[None], before_call: Callable[[], None] = lambda: None) -> None:
    """Run a flow, and send its trips call by call."""
    try:
        step: Any = next(flow)
        while True:
            replies = []
            for call in step:
                before_call()
                replies.append(ask(call))
            step = flow.send(replies)
    except StopIteration:
        pass


def interleaved(login: Flow[None], other: Flow[None], positions: Sequence[int]) -> None:
    """Run a login, and before its calls of these numbers a trip of another flow, then its rest."""
    left, number, replies = list(positions), 0, None

    def go_on() -> bool:
        nonlocal replies
        try:
            step: Any = other.send(replies)  # type: ignore[arg-type]
        except StopIteration:
            return False
        replies = [ask(call) for call in step]
        return True

    def before_call() -> None:
        nonlocal number
        while left and left[0] <= number:
            left.pop(0)
            go_on()
        number += 1

    try:
        run(login, before_call)
    finally:
        while go_on():
            pass


@pytest.fixture
def keys(store: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Keys:
    """Give the keys that new sessions get, all in a few buckets."""
    drawn = Keys()
    monkeypatch.setattr(SessionState, "new_key", lambda state: HiddenKey(drawn.draw()))
    monkeypatch.setattr(user_index, "BUCKETS", BUCKETS)
    return drawn


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("late", ["neither", "older", "newer"])
@pytest.mark.parametrize(("most", "ends_oldest"), [(3, False), (2, False), (2, True)])
@pytest.mark.parametrize("orders", [100, pytest.param(300, marks=pytest.mark.full)])
def test_move_is_counted_once_wherever_it_falls(
    store: redis.Redis,
    keys: Keys,
    apart: bool,
    late: str,
    most: int,
    ends_oldest: bool,
    orders: int,
) -> None:
    steps = (8 if apart else 4) + (late == "older")
    for _ in range(orders):
        positions = sorted(random.choices(range(CALLS), k=steps))
        store.flushdb()
        case = Case(keys, late)
        login = claimed(case.third, Limit(most, ends_oldest, LAPSE_MS))
        try:
            interleaved(login, case.moving(apart=apart), positions)
        except SessionLimitReached:
            # Copied and not yet left, a session is under both keys.
            assert most == 2 or apart, positions
        else:
            write(case.third)
        if late == "newer":
            write(case.newer)
        count = registry.count_of(ANN)
        assert count == most or (apart and count < most), positions
