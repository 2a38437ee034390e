"""Use a connection: lend, connect, send, read, take back. The only twins.

redis-py connects and greets. From then on the socket, or the transport of an event loop, is used
here without it: that takes half of the time. A connection is sound from the end of its greeting or
exchange to the beginning of the next one. An exchange that is broken off in between, at whatever
line, leaves one that is not sound, and that connects anew before it is used again: no request reads
the replies to another one's commands.
"""

from __future__ import annotations

import asyncio
import builtins
import math
import time
from collections.abc import Coroutine, Generator, Sequence
from contextlib import closing
from contextvars import Context
from functools import partial
from types import coroutine
from typing import Any, Final

import hiredis
from redis.exceptions import (
    ConnectionError,
    InvalidResponse,
    RedisError,
    TimeoutError,
)

from django_clustered_sessions.protocol.effects import Trip

from .attempt import Connect, attempt, is_clean, pack
from .cluster import Addressed
from .errors import SHORTEST_S, refusal, unavailable

#: By how much a socket's timeout may be too short at most, in seconds; and by a tenth. Less than
#: the grace that a blocking read is given.
_LITTLE_S: Final = 0.1

#: Largest number of receptions after the deadline, each for SHORTEST_S at most: what came while
#: this process was stopped is read, and what comes bit by bit is not waited for.
_MOST_LATE: Final = 1000

_BUFFER_BYTES: Final = 64 * 1024

#: What a reader has before a reply is complete.
INCOMPLETE: Final = object()


def perform(trip: Trip, pool: Any, seconds: float) -> list[Any]:
    """Ask a node of the store, over one connection of its pool; return its replies.

    Nearly always one exchange over an idle connection is all that there is to do. Where it is not,
    ``attempt`` says what else is.

    Raises SessionStoreUnavailable.
    """
    connection: Any = None
    first: Any = None
    if type(trip) is Addressed:
        seconds = min(seconds, trip.seconds)
    deadline = time.monotonic() + seconds
    try:
        if pool.idle and seconds > 0 and not pool.breaker.failures:
            try:
                connection = pool.lend(deadline)
                if connection.is_sound and connection._sock is not None:
                    first = exchange(connection, pack(trip, pool), deadline - seconds / 2)
                    if is_clean(first):
                        return first  # type: ignore[no-any-return]
            except (RedisError, OSError) as error:
                first = error
        with closing(attempt(trip, pool, deadline, has_begun=first is not None)) as acts:
            act = next(acts)
            if first is not None:
                act = acts.throw(first) if isinstance(first, Exception) else acts.send(first)
            while True:
                try:
                    done: Any = None
                    if isinstance(act, Connect):
                        connection = connection or pool.lend(act.deadline)
                        connect(connection, act.deadline, anew=act.anew)
                    else:
                        done = exchange(connection, act.commands, act.deadline)
                except Exception as error:
                    act = acts.throw(error)
                else:
                    act = acts.send(done)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    finally:
        # The traceback of an error refers to this frame: neither would end before a collection.
        first = None
        if connection is not None:
            pool.take_back(connection)


async def aperform(trip: Trip, pool: Any, seconds: float, first: Any = None) -> list[Any]:
    """See perform(); ``first`` is what came of the trip elsewhere, and is not enough."""
    connection: Any = None
    if type(trip) is Addressed:
        seconds = min(seconds, trip.seconds)
    deadline = time.monotonic() + seconds
    try:
        if first is None and pool.idle and seconds > 0 and not pool.breaker.failures:
            try:
                connection = await pool.lend(deadline)
                if connection.is_sound and connection.is_connected:
                    first = await aexchange(connection, pack(trip, pool), deadline - seconds / 2)
                    if is_clean(first):
                        return first  # type: ignore[no-any-return]
            except (RedisError, OSError) as error:
                first = error
        with closing(attempt(trip, pool, deadline, has_begun=first is not None)) as acts:
            act = next(acts)
            if first is not None:
                act = acts.throw(first) if isinstance(first, Exception) else acts.send(first)
            while True:
                try:
                    done: Any = None
                    if isinstance(act, Connect):
                        connection = connection or await pool.lend(act.deadline)
                        await aconnect(connection, act.deadline, anew=act.anew)
                    else:
                        if connection is None:
                            connection = await pool.lend(act.deadline)
                            await aconnect(connection, act.deadline)
                        done = await aexchange(connection, act.commands, act.deadline)
                except Exception as error:
                    act = acts.throw(error)
                else:
                    act = acts.send(done)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    finally:
        # The traceback of an error refers to this frame: neither would end before a collection.
        first = None
        if connection is not None:
            pool.take_back(connection)


def read_alone(pool: Any, command: bytes, seconds: float) -> Any:
    """Return the reply to one command that may wait for so long, or the error in place of it.

    There is no wait for a connection: one is to spare, or that is the error.
    """
    connection: Any = None
    try:
        connection = pool.lend(time.monotonic())
        deadline = time.monotonic() + seconds
        connect(connection, deadline)
        (reply,) = exchange(connection, [command], deadline)
    except (RedisError, OSError) as error:
        return error
    finally:
        if connection is not None:
            pool.take_back(connection)
    return reply


async def aread_alone(pool: Any, command: bytes, seconds: float) -> Any:
    """See read_alone()."""
    connection: Any = None
    try:
        connection = await pool.lend(time.monotonic())
        deadline = time.monotonic() + seconds
        await aconnect(connection, deadline)
        (reply,) = await aexchange(connection, [command], deadline)
    except (RedisError, OSError) as error:
        return error
    finally:
        if connection is not None:
            pool.take_back(connection)
    return reply


def address(pool: Any, seconds: float) -> str:
    """Return where a pool's connections lead: ``HOST:PORT`` or the path of a socket.

    Raises SessionStoreUnavailable.
    """
    deadline = time.monotonic() + seconds
    connection: Any = None
    try:
        connection = pool.lend(deadline)
        connect(connection, deadline)
        return str(getattr(connection, "path", "") or f"{connection.host}:{connection.port}")
    except (RedisError, OSError) as error:
        raise unavailable(error) from error
    finally:
        if connection is not None:
            pool.take_back(connection)


def connect(connection: Any, deadline: float, *, anew: bool = False) -> None:
    """Connect, unless that is done; only this time, the deadline limits connecting and greeting.

    Raises redis-py's errors.
    """
    if anew or not connection.is_sound:
        connection.disconnect()
    elif connection._sock is not None:
        return
    _left_s(deadline)
    connection.is_sound = False
    try:
        connection.greeted_by_s = deadline
        connection.connect()
        connection.reader, connection.buffer = reader_of(connection), bytearray(_BUFFER_BYTES)
    except BaseException:
        # redis-py closes it after its own errors only, and a signal's exception is none.
        connection.disconnect()
        raise
    finally:
        connection.greeted_by_s = math.inf
    connection.is_sound = True


async def aconnect(connection: Any, deadline: float, *, anew: bool = False) -> None:
    """See connect()."""
    if anew or not connection.is_sound:
        await connection.disconnect(nowait=True)
    elif connection.is_connected:
        return
    left_s = _left_s(deadline)
    cancels = cancellations()
    connection.is_sound = False
    try:
        async with asyncio.timeout(left_s):
            await _without_context(connection.connect())
        heed(cancels)
        connection.replies = _Replies(connection, reader_of(connection))
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
    connection.is_sound = True


@coroutine
def _without_context(work: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Await ``work`` in an empty context.

    An event loop keeps the context in which a connection was made as long as the connection, and
    with it all that a site has put there: the request for one.
    """
    # Not by a task: a signal's exception would leave it behind, with a connection that is lent.
    context, step = Context(), work.send
    argument: Any = None
    while True:
        try:
            awaited = context.run(step, argument)
        except StopIteration as done:
            return done.value
        finally:
            # An error that was thrown in refers to this frame by its traceback.
            argument = None
        try:
            step, argument = work.send, (yield awaited)
        except BaseException as error:
            step, argument = work.throw, error


def exchange(connection: Any, commands: Sequence[bytes], deadline: float) -> list[Any]:
    """Send commands and read their replies; an error reply stands among them.

    Raises redis-py's errors.
    """
    if not commands:
        return []
    replies: list[Any] = []
    late = 0
    connection.is_sound = False
    try:
        # Another thread may take them from the connection, if settings change.
        socket, reader, buffer = connection._sock, connection.reader, connection.buffer
        if socket is None:
            raise ConnectionError("another thread has closed the connection")
        _limit(socket, deadline)
        socket.sendall(b"".join(commands))
        while len(replies) < len(commands):
            if (late := late + _limit(socket, deadline)) > _MOST_LATE:
                raise TimeoutError("no reply in time")
            if not (count := socket.recv_into(buffer)):
                raise ConnectionError("the store closed the connection")
            reader.feed(buffer, 0, count)
            while len(replies) < len(commands) and (reply := reader.gets()) is not INCOMPLETE:
                if isinstance(reply, ConnectionError):
                    # A store that is loading: no other reply is worth the wait.
                    raise reply
                replies.append(reply)
    except BaseException as error:
        connection.disconnect()
        if isinstance(error, builtins.TimeoutError):
            raise TimeoutError("no reply in time") from error
        if isinstance(error, OSError):
            raise ConnectionError(f"the connection is lost: {error}") from error
        raise
    # A reply too many would be the first one to the next commands.
    connection.is_sound = not reader.has_data()
    return replies


async def aexchange(connection: Any, commands: Sequence[bytes], deadline: float) -> list[Any]:
    """See exchange()."""
    if not commands:
        return []
    connection.is_sound = False
    try:
        data = b"".join(commands)
        replies: list[Any] = await connection.replies.to(data, len(commands), deadline)
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
    connection.is_sound = not connection.replies.are_too_many
    return replies


class _Replies(asyncio.Protocol):
    """The replies that an event loop's transport gets, from when its connection is greeted.

    The streams, by which redis-py greets, learn of the end of it alone.
    """

    def __init__(self, connection: Any, reader: hiredis.Reader) -> None:
        self._connection, self._reader = connection, reader
        self._transport: Any = connection._writer.transport
        self._streams: Any = self._transport.get_protocol()
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[list[Any]] | None = None
        self._found: list[Any] = []
        self._count = 0
        self._transport.set_protocol(self)

    async def to(self, data: bytes, count: int, deadline: float) -> list[Any]:
        """Send commands and return as many replies, by a time of time.monotonic()."""
        if self._transport.is_closing():
            raise ConnectionError("the store closed the connection")
        self._waiter, self._found, self._count = self._loop.create_future(), [], count
        left_s = max(deadline - time.monotonic(), SHORTEST_S)
        timer = self._loop.call_later(left_s, self._end, TimeoutError("no reply in time"))
        try:
            self._transport.write(data)
            return await self._waiter
        finally:
            self._waiter = None
            timer.cancel()

    @property
    def are_too_many(self) -> bool:
        """True if more has come than was asked for."""
        return bool(self._reader.has_data())

    def data_received(self, data: bytes) -> None:
        """Take what has come; what nobody has asked for ends the connection."""
        reader, found, count = self._reader, self._found, self._count
        try:
            reader.feed(data)
            while len(found) < count and (reply := reader.gets()) is not INCOMPLETE:
                if isinstance(reply, ConnectionError):
                    raise reply
                found.append(reply)
        except Exception as error:
            self._end(error)
            return
        if self._waiter is None:
            self._connection.is_sound = False
        elif len(found) == count and not self._waiter.done():
            self._waiter.set_result(found)

    def connection_lost(self, error: Exception | None) -> None:
        """Learn that the connection is no more."""
        self._connection.is_sound = False
        self._end(ConnectionError(f"the connection is lost: {error or 'the store closed it'}"))
        self._streams.connection_lost(error)

    def _end(self, error: Exception) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)


def reader_of(connection: Any) -> hiredis.Reader:
    """Return a new reader of replies, with errors of redis-py among them."""
    return hiredis.Reader(
        protocolError=InvalidResponse,
        replyError=partial(refusal, connection._parser.parse_error),
        notEnoughData=INCOMPLETE,
    )


def _limit(socket: Any, deadline: float) -> bool:
    """Let no sending or receiving wait beyond a time of time.monotonic(); return if it is over.

    To set a socket's timeout is a call of the system, so one that is a little too short stays.
    """
    left_s = max(deadline - time.monotonic(), SHORTEST_S)
    shortest_s = left_s - min(left_s / 10, _LITTLE_S)
    if not shortest_s <= (socket.gettimeout() or 0) <= left_s:
        socket.settimeout(left_s)
    return left_s <= SHORTEST_S


def cancellations() -> int:
    """Return how many times the running task was cancelled."""
    task = asyncio.current_task()
    return task.cancelling() if task else 0


def heed(cancels: int) -> None:
    """Raise CancelledError if the running task was cancelled since and that was lost.

    In Python 3.11 ``wait_for``, which redis-py uses, may lose it. The request of a client that has
    left would then go on to its end.
    """
    if cancellations() > cancels:
        raise asyncio.CancelledError


def _left_s(deadline: float) -> float:
    """Return the seconds until a deadline. Raises redis-py's TimeoutError where there are none."""
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        # A process that was stopped meanwhile: the store may have forgotten the write.
        raise TimeoutError("no reply in time")
    return left_s
