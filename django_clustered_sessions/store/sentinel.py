"""The primary by the Sentinels' account, asked again every second.

A connection stays where it was made, and a primary that was cut off from its Sentinels goes on
taking writes after another was promoted. So one thread of this process asks all Sentinels, off the
request path, and a connection that leads elsewhere is dropped before it is lent. A thread or task
that connects waits for that thread's next answer.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final, NamedTuple, cast

import redis
from redis import asyncio as aioredis
from redis.exceptions import RedisError
from redis.sentinel import MasterNotFoundError

from . import clock
from .errors import SentinelsSlow
from .greeting import Connection, SSLConnection
from .tls import AsyncSSLConnection

logger = logging.getLogger("django_clustered_sessions.store")

#: The Sentinels are asked so often, in seconds.
INTERVAL_S: Final = 1.0
#: The watcher ends after so many intervals in which no connection was lent.
IDLE_INTERVALS: Final = 60
#: An answer is believed for so many intervals: a process that was stopped has none that is younger.
BELIEVED_INTERVALS: Final = 3
#: A Sentinel that did not answer is left alone for so long, in seconds, while others do.
REST_S: Final = 5.0

Address = tuple[str, int]


class Answer(NamedTuple):
    """A primary that Sentinels name, and the number of the failover that made it one."""

    address: Address
    epoch: int


class SentinelWatcher:
    """Knows the primary of one service; its thread runs while connections are lent.

    ``options`` are those of a connection to a Sentinel. Each answer has the epoch of the failover
    it knows of, and the latest counts: a Sentinel that was cut off together with the old primary
    still names that one.
    """

    def __init__(
        self, service: str, sentinels: Sequence[Address], options: Mapping[str, Any]
    ) -> None:
        self.service = service
        self._sentinels, self._options = sentinels, options
        self.start_anew()

    def start_anew(self) -> None:
        """Forget all: the child of a fork has neither the thread nor the connections."""
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        self._asking: list[Future[Address]] = []
        self._thread: threading.Thread | None = None
        self._is_used = self._is_closed = False
        self._known: Answer | None = None
        #: Time before the Sentinels were asked that told it, by clock.now_s().
        self._asked_at_s = -math.inf
        #: True if no Sentinel has answered the last time.
        self._are_silent = False

    @property
    def is_running(self) -> bool:
        """True while the thread looks."""
        # Asked of the thread itself: an exception may have ended it, or a signal's its start.
        return self._thread is not None and self._thread.is_alive()

    def clients(self) -> list[redis.Redis]:
        """Return a new client for each Sentinel."""
        return [redis.Redis(host, port, **self._options) for host, port in self._sentinels]

    def survey(self) -> list[Mapping[str, Any] | None]:
        """Ask each Sentinel for all that it knows of the service; None where it does not tell."""
        states: list[Mapping[str, Any] | None] = []
        for client in self.clients():
            try:
                state: Mapping[str, Any] | None = _state(client, self.service)
            except (RedisError, OSError):
                state = None
            states.append(state)
            client.close()
        return states

    def names(self, host: str, port: int) -> bool:
        """Return whether a connection to that address may be lent.

        What was told too long ago is not believed while the Sentinels can be asked.
        """
        self._is_used = True
        known, age_s = self._known, clock.now_s() - self._asked_at_s
        if known is None or known.address != (host, port):
            return False
        return age_s <= BELIEVED_INTERVALS * INTERVAL_S or self._are_silent

    def answer(self) -> Future[Address]:
        """Return the address that the Sentinels will name, or MasterNotFoundError.

        While all Sentinels are silent, the last known primary is the answer at once.
        """
        asked: Future[Address] = Future()
        with self._lock:
            if self._are_silent and self._known is not None:
                self._is_used = True
                self._tell([asked], self._known.address)
            else:
                self._asking.append(asked)
            if not self.is_running:
                self._start()
        self._wanted.set()
        return asked

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="session-store-watcher", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            # The interpreter ends; what counts is reported at its exit.
            asking, self._asking = self._asking, []
            self._tell(asking, MasterNotFoundError(str(error)))

    def close(self) -> None:
        """End the thread with its connections, soon."""
        self._is_closed = True
        self._wanted.set()

    def _run(self) -> None:
        clients = self.clients()
        rests_until: dict[redis.Redis, float] = {}
        idle = 0
        while not self._ends(idle):
            self._wanted.wait(INTERVAL_S)
            self._wanted.clear()
            idle = 0 if self._is_used or self._asking else idle + 1
            self._is_used = False
            self._look(clients, rests_until)
        for client in clients:
            client.close()

    def _ends(self, idle: int) -> bool:
        """Stop when idle. The next caller finds no cached primary and restarts the thread."""
        with self._lock:
            if (idle < IDLE_INTERVALS and not self._is_closed) or self._asking:
                return False
            self._thread = self._known = None
            return True

    def _look(self, clients: Sequence[redis.Redis], rests_until: dict[redis.Redis, float]) -> None:
        with self._lock:
            asking, self._asking = self._asking, []
        best, answered, why = None, 0, ""
        now_s = clock.now_s()
        awake = [client for client in clients if rests_until.get(client, now_s) <= now_s]
        # Those that have not answered lately come last: the others are not to be waited for.
        awake.sort(key=lambda client: rests_until.get(client, 0.0))
        for client in awake or clients:
            try:
                found = self._ask(client)
            except Exception as error:
                # No other code would catch it, and all callers would wait for a dead thread.
                rests_until[client] = clock.now_s() + REST_S
                why = why or f"{type(error).__name__}: {error}"
                continue
            answered += 1
            if found is None:
                why = "it is down, say the Sentinels"
                continue
            if best is None or found.epoch > best.epoch:
                best = found
            if self._known is None or best.epoch >= self._known.epoch:
                # At once: the next Sentinel may hang.
                self._learn(best, now_s)
                asking = self._tell(asking, best.address)
        if best is not None and answered * 2 > len(clients):
            # Sentinels that were set up anew count their failovers from 0.
            self._learn(best, now_s)
        outcome: Address | MasterNotFoundError
        if self._known is not None and (best is not None or not answered):
            # No Sentinel that can be asked knows better.
            outcome = self._known.address
        else:
            outcome = MasterNotFoundError(f"no primary {self.service!r}: {why}")
        if answered:
            # Also if they name none: then they have promoted none.
            self._asked_at_s = now_s
        with self._lock:
            self._are_silent = not answered
            if self._are_silent:
                # The next look would take as long, and come to the same.
                asking, self._asking = [*asking, *self._asking], []
        self._tell(asking, outcome)

    def _ask(self, client: redis.Redis) -> Answer | None:
        """Return whom a Sentinel names, None where it takes that one for down."""
        state = _state(client, self.service)
        if state["is_sdown"] or state["is_odown"] or not state["is_master"]:
            return None
        return Answer((state["ip"], state["port"]), state["config-epoch"])

    def _learn(self, answer: Answer, asked_at_s: float) -> None:
        before, self._known, self._asked_at_s = self._known, answer, asked_at_s
        if before is not None and before.address != answer.address:
            addresses = ["{}:{}".format(*one.address) for one in (before, answer)]
            logger.warning("the primary of %s was %s and is now %s", self.service, *addresses)

    def _tell(
        self, asking: list[Future[Address]], answer: Address | Exception
    ) -> list[Future[Address]]:
        for asked in asking:
            if not asked.set_running_or_notify_cancel():
                continue
            if isinstance(answer, Exception):
                asked.set_exception(answer)
            else:
                asked.set_result(answer)
        return []


def _state(client: Any, service: str) -> Mapping[str, Any]:
    # Not sentinel_master(), which raises TypeError in redis-py 5.1 to 7.0.
    return cast(Mapping[str, Any], client.execute_command("SENTINEL MASTER", service))


class _Watched:
    """A connection to the primary that the Sentinels name when it is made."""

    host: str
    port: int

    def __init__(self, *, watcher: SentinelWatcher, **options: Any) -> None:
        super().__init__(**options)
        self._watcher = watcher

    def is_at_primary(self) -> bool:
        """Return whether what it leads to is still the primary."""
        return self._watcher.names(self.host, self.port)


def _slow(patience_s: float) -> SentinelsSlow:
    return SentinelsSlow(f"the Sentinels have not answered within {patience_s:.1f} s")


class WatchedConnection(_Watched, Connection):
    """See _Watched; over TCP."""

    def _connect(self) -> Any:
        patience: Any = self.socket_connect_timeout
        try:
            self.host, self.port = self._watcher.answer().result(patience)
        except TimeoutError:
            raise _slow(patience) from None
        return super()._connect()


class WatchedTLSConnection(WatchedConnection, SSLConnection):
    """See _Watched; over TLS."""


class AsyncWatchedConnection(_Watched, aioredis.Connection):
    """See WatchedConnection."""

    async def _connect(self) -> None:
        patience: Any = self.socket_connect_timeout
        deadline = asyncio.get_running_loop().time() + patience
        try:
            async with asyncio.timeout_at(deadline):
                self.host, self.port = await asyncio.wrap_future(self._watcher.answer())
        except TimeoutError:
            raise _slow(patience) from None
        async with asyncio.timeout_at(deadline):
            await super()._connect()  # type: ignore[no-untyped-call]


class AsyncWatchedTLSConnection(AsyncWatchedConnection, AsyncSSLConnection):
    """See WatchedTLSConnection."""


_lock = threading.Lock()
_watcher: SentinelWatcher | None = None


def watcher(
    service: str, sentinels: Sequence[Address], options: Mapping[str, Any]
) -> SentinelWatcher:
    """Return this process's watcher; it is made for what was asked first, until forget()."""
    global _watcher
    with _lock:
        if _watcher is None:
            _watcher = SentinelWatcher(service, sentinels, options)
        return _watcher


def forget() -> None:
    """End the watcher: another entry names the store now."""
    global _watcher
    with _lock:
        old, _watcher = _watcher, None
    if old is not None:
        old.close()


def _start_anew() -> None:
    global _lock
    _lock = threading.Lock()
    if _watcher is not None:
        _watcher.start_anew()


os.register_at_fork(after_in_child=_start_anew)
