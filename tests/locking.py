"""Locks and queues as the store holds them, and threads, for tests of locking."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import redis

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.protocol.commands import lock_queue
from django_clustered_sessions.protocol.effects import Call, Flow
from django_clustered_sessions.protocol.options import LockOptions
from django_clustered_sessions.protocol.record import LOCK, Lock, Locker
from django_clustered_sessions.protocol.results import Gone, Held, Taken
from django_clustered_sessions.store import connections, drivers
from django_clustered_sessions.store.budget import Budget
from tests.gateways import place
from tests.servers import wait_for

#: Bound of all waits in seconds; a test that waits so long fails.
BOUND_S = 20.0

#: Name of the holder of a lock that `seize` took.
ELSEWHERE = "node-b GET /slow/<int:pk>/"


class Threads:
    """Threads that do one thing each and must have ended at the end. A context manager."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []

    def start(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Start ``work`` in a new thread; `outcome` has its result."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(work(*arguments))
            except BaseException as error:
                future.set_exception(error)

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        return future

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *args: object) -> None:
        for thread in self._threads:
            thread.join(BOUND_S)
            assert not thread.is_alive(), "a thread has not ended"


def outcome(future: Future[Any]) -> Any:
    """Wait for the work, within bounds; return its result or raise its error."""
    return future.result(BOUND_S)


def new_session(**values: Any) -> str:
    """Store a session and return its key."""
    session = SessionStore()
    session.update(values or {"n": 0})
    session.create()
    return session.session_key or ""


def ask(*calls: Call) -> Any:
    """Return the store's reply to the last of some calls, sent together."""

    def flow() -> Flow[Any]:
        return (yield calls)

    return drivers.run(flow(), connections.pool, Budget(5.0))[-1]


def claim(
    key: str,
    token: str,
    *,
    wait_ms: int = 60_000,
    lease_ms: int = 60_000,
    most: int = 16,
    name: str = ELSEWHERE,
    inside: str = "",
) -> Taken | Held | Gone:
    """Request a session's lock as a waiter that never reads its mailbox."""
    terms = LockOptions(wait_ms, lease_ms, 120_000, most, name.encode())
    return lock_queue.parse_acquire(
        ask(lock_queue.acquire(place(key), token, terms, wait_ms, inside))
    )


def seize(key: str, lease_ms: int = 60_000) -> str:
    """Acquire a session's lock as a request on another node, and return its fencing token."""
    token = new_token()
    assert isinstance(claim(key, token, lease_ms=lease_ms), Taken)
    return token


def free(key: str, token: str) -> int | None:
    """Release a lock, or leave the queue."""
    return lock_queue.parse_release(ask(lock_queue.release(place(key), token)))


def new_token() -> str:
    return secrets.token_hex(8)


def owner(store: redis.Redis, key: str) -> str:
    """Return the fencing token of the lock's holder, empty if the lock is free."""
    packed = store.hget(place(key).record, LOCK)
    return packed[:16].decode() if packed else ""


def lease_end_ms(store: redis.Redis, key: str) -> int:
    """Return the end of the lease by the store's clock; 0 if the lock is free."""
    packed = store.hget(place(key).record, LOCK)
    return int.from_bytes(packed[16:22]) if packed else 0


def now_ms(store: redis.Redis) -> int:
    seconds, microseconds = store.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


def queue(store: redis.Redis, key: str) -> list[Locker]:
    """Return the holder and the waiters, in order."""
    with store.pipeline() as both:
        both.hget(place(key).record, LOCK)
        both.hget(place(key).locks, place(key).id)
        packed, packed_entries = both.execute()
    entries = Locker.parse_all(packed_entries or b"")
    if not packed:
        assert entries == []
        return []
    lock = Lock.parse(packed)
    if lock.is_listed:
        assert entries[0].token == lock.token
        return entries
    assert entries == []
    return [Locker(lock.token, lock.lease_end_ms, lock.since_ms, lock.name)]


def wait_for_queue(store: redis.Redis, key: str, waiting: int) -> None:
    """Wait until the given number of requests waits for the lock."""
    wait_for(lambda: len(queue(store, key)) == waiting + 1, f"{waiting} to wait")


def sleepers(store: redis.Redis) -> list[dict[str, Any]]:
    """Return the connections in a blocking read."""
    return [
        client
        for client in store.client_list()
        if client["cmd"] == "blpop" and "b" in client["flags"]
    ]


def wait_for_sleepers(store: redis.Redis, number: int) -> list[dict[str, Any]]:
    """Wait until the given number of connections is in a blocking read."""
    return wait_for(
        lambda: len(found := sleepers(store)) == number and found, f"{number} blocking reads"
    )
