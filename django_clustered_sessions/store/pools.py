"""Pools of connections: redis-py's, lent with a deadline and without a check of each loan.

A connection that has died is found out by the exchange on it, which is repeated anyway. A
connection that is lost with the code that borrowed it, as by a signal, is closed with it and makes
room for another.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Final
from weakref import WeakSet, ref

import redis
from redis import asyncio as aioredis

from .circuit_breaker import CircuitBreaker
from .errors import AllLent

#: Seconds between two looks for asynchronous connections that were idle all the time.
_SPARE_S: Final = 60.0


class _Lender:
    """Idle connections of either kind of pool; the last one that came back is lent first."""

    breaker: CircuitBreaker
    has_read_only_words = True
    #: The tracked connections beside it, once there are any: see ``tracking``.
    channels: Any = None
    #: True if nobody borrows any more, and what comes back is closed.
    is_over = False
    idle: list[Any]
    _in_use_connections: WeakSet[Any]

    def take_back(self, connection: Any) -> None:
        """Take a connection back."""
        self.idle.append(connection)
        if self.is_over:
            self._close_idle()

    def end(self) -> None:
        """Close the connections, those that are lent when they come back."""
        self.is_over = True
        self._close_idle()

    def _close_idle(self) -> None:
        while self.idle:
            # Another thread may take the last one.
            with suppress(IndexError):
                connection = self.idle.pop()
                # At once, not when it is collected: a request that waits makes another one.
                self._in_use_connections.discard(connection)
                self._close(connection)

    def _close(self, connection: Any) -> None:
        connection.disconnect()

    def leave(self) -> None:
        """Use no connection again that is open: they lead to what is no primary any more."""
        for connection in list(self.idle):
            connection.is_sound = False


class Pool(_Lender, redis.ConnectionPool):
    """Connections for synchronous use; as many as ``max_connections``, and one more is refused."""

    def reset(self) -> None:
        """Start without connections."""
        super().reset()
        self.idle = []
        self._in_use_connections: WeakSet[Any] = WeakSet()  # type: ignore[assignment]

    def lend(self, deadline: float) -> Any:
        """Return a connection that is idle, or a new one, which has yet to connect.

        Raises AllLent; ``deadline``, of time.monotonic(), is how long a pool may wait that waits.
        """
        try:
            return self.idle.pop()
        except IndexError:
            pass
        with self._lock:
            if len(self._in_use_connections) >= self.max_connections:
                raise AllLent(self.max_connections)
            self._created_connections = len(self._in_use_connections)
            connection: Any = self.make_connection()
            connection.is_sound = True
            self._in_use_connections.add(connection)
        return connection


class AsyncPool(_Lender, aioredis.ConnectionPool):
    """See Pool; for one event loop."""

    #: True if requests may share connections, as far as is known.
    shares = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.idle = []
        #: The connections that are shared, beside those that are lent: see ``sharing``.
        self.lines: list[Any] = []
        self._in_use_connections: WeakSet[Any] = WeakSet()  # type: ignore[assignment]
        #: So many have been idle all the time since the last look, at the beginning of ``idle``.
        self._spare = 0
        self._look_at_s = time.monotonic() + _SPARE_S

    @property
    def lent(self) -> int:
        """Number of connections that are lent."""
        return len(self._in_use_connections) - len(self.idle)

    async def lend(self, deadline: float) -> Any:
        """See Pool.lend()."""
        if time.monotonic() >= self._look_at_s:
            await self._close_spare()
        try:
            connection = self.idle.pop()
        except IndexError:
            connection = self.make()
            self._in_use_connections.add(connection)
        self._spare = min(self._spare, len(self.idle))
        return connection

    async def _close_spare(self) -> None:
        """Close what nobody has needed lately, as after many requests at once."""
        spare, self.idle = self.idle[: self._spare], self.idle[self._spare :]
        self._spare, self._look_at_s = len(self.idle), time.monotonic() + _SPARE_S
        self._in_use_connections.difference_update(spare)
        for connection in spare:
            await connection.disconnect(nowait=True)

    def make(self) -> Any:
        """Return a new connection, which has yet to connect.

        Raises AllLent.
        """
        if self._is_full():
            # One that nobody uses now makes room, or fewer requests at once could be served.
            if unused := [line for line in self.lines if not line.is_asked]:
                unused[0].close()
            if self._is_full():
                raise AllLent(self.max_connections)
        connection: Any = self.make_connection()  # type: ignore[no-untyped-call]
        connection.is_sound = True
        return connection

    def open_lines(self) -> list[Any]:
        """Return the connections that are shared, without those that were closed."""
        self.lines = [line for line in self.lines if line.is_open]
        return self.lines

    def _is_full(self) -> bool:
        return len(self._in_use_connections) + len(self.open_lines()) >= self.max_connections

    def leads_right(self, connection: Any) -> bool:
        """Return whether a connection leads to the server that is to be asked."""
        return True

    async def disconnect(self, inuse_connections: bool = True) -> None:
        """Close all connections."""
        for line in self.lines:
            line.close()
        await super().disconnect(inuse_connections)
        # The event loop closes those that were shared in its next turn.
        await asyncio.sleep(0)

    def leave(self) -> None:
        """See Pool.leave(). The connections that are shared are among them."""
        super().leave()
        for line in self.lines:
            line.leave()

    def end(self) -> None:
        """See Pool.end()."""
        super().end()
        # What is still under way makes no line, which nobody would leave.
        self.shares = False
        for line in self.lines:
            line.leave()

    def _close(self, connection: Any) -> None:
        # Not redis-py's, which is to be awaited.
        if connection.is_connected:
            connection._writer.transport.abort()
            connection._writer = connection._reader = None


class _Permit:
    """The right to one connection."""


class BlockingPool(Pool):
    """Connections for synchronous use; where all are lent, the next borrower waits for one."""

    def reset(self) -> None:
        """See Pool.reset()."""
        super().reset()
        #: Permits that are free; a dead reference stands for one that was lost with its borrower.
        self._free: SimpleQueue[_Permit | ref[_Permit]] = SimpleQueue()
        self._refs: dict[int, ref[_Permit]] = {}
        for number in range(self.max_connections):
            self._free.put(self._permit(number))

    def _permit(self, number: int) -> _Permit:
        permit = _Permit()
        # Not ``__del__``, between whose lines a signal's exception could come.
        self._refs[number] = ref(permit, self._free.put)
        return permit

    def lend(self, deadline: float) -> Any:
        """See Pool.lend()."""
        try:
            permit = self._free.get(timeout=max(deadline - time.monotonic(), 0))
        except Empty:
            raise AllLent(self.max_connections) from None
        if not isinstance(permit, _Permit):
            lost = permit
            permit = self._permit(next(n for n, one in self._refs.items() if one is lost))
        connection = super().lend(deadline)
        connection.permit = permit
        return connection

    def take_back(self, connection: Any) -> None:
        """See Pool.take_back()."""
        permit, connection.permit = connection.permit, None
        super().take_back(connection)
        self._free.put(permit)


class AsyncBlockingPool(AsyncPool):
    """See BlockingPool; for one event loop."""

    shares = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._free = asyncio.Semaphore(self.max_connections)

    async def lend(self, deadline: float) -> Any:
        """See Pool.lend()."""
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
                await self._free.acquire()
        except TimeoutError:
            raise AllLent(self.max_connections) from None
        try:
            return await super().lend(deadline)
        except BaseException:
            self._free.release()
            raise

    def take_back(self, connection: Any) -> None:
        """See Pool.take_back()."""
        super().take_back(connection)
        self._free.release()


class SentinelPool(Pool):
    """Connections to the primary that the Sentinels name; see watching."""

    def lend(self, deadline: float) -> Any:
        """See Pool.lend(); one that leads elsewhere will connect anew."""
        connection = super().lend(deadline)
        connection.is_sound = connection.is_sound and connection.is_at_primary()
        return connection


class AsyncSentinelPool(AsyncPool):
    """See SentinelPool."""

    async def lend(self, deadline: float) -> Any:
        """See SentinelPool.lend()."""
        connection = await super().lend(deadline)
        connection.is_sound = connection.is_sound and connection.is_at_primary()
        return connection

    def leads_right(self, connection: Any) -> bool:
        """See AsyncPool.leads_right()."""
        return bool(connection.is_at_primary())
