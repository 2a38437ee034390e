"""Counting of the requests of a process that wait for a lock."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from django_clustered_sessions.protocol.record import SessionKeys
from django_clustered_sessions.session.leases import waiting_room
from tests.locking import Threads, outcome

KEYS = [SessionKeys.of("session", f"{n:032x}") for n in range(8)]
ROUNDS = 10_000


@pytest.fixture
def busy() -> Iterator[None]:
    """Let threads interrupt each other at nearly each line."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval_s)


@pytest.mark.usefixtures("busy")
def test_waiters_are_counted_while_others_come_and_go(threads: Threads) -> None:
    def wait(keys: SessionKeys) -> int:
        return sum(came_in(keys) for _ in range(ROUNDS))

    def came_in(keys: SessionKeys) -> bool:
        with waiting_room.entered(keys) as has_room:
            assert has_room == (waiting_room.waiting(keys.record) == 1)
            return has_room

    started = [threads.start(wait, keys) for keys in KEYS]
    assert not any(waiting_room.is_full(keys) for _ in range(ROUNDS) for keys in KEYS)
    assert [outcome(thread) for thread in started] == [ROUNDS] * len(KEYS)
    assert not any(waiting_room.waiting(keys.record) for keys in KEYS)


def test_only_so_many_of_a_session_come_in() -> None:
    keys, other = KEYS[:2]
    with waiting_room.entered(keys), waiting_room.entered(keys) as second:
        assert second
        with waiting_room.entered(keys) as third, waiting_room.entered(other) as of_another:
            assert not third
            assert of_another
    with waiting_room.entered(keys) as again:
        assert again
