"""Use a connection: lend, connect, send, read, take back. The only twins.

A connection is sound from the end of its greeting or exchange to the beginning of the next one. An
exchange that is broken off in between, at whatever line, leaves one that is not sound, and that
connects anew before it is used again: no request reads the replies to another one's commands.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from redis.exceptions import RedisError, ResponseError, TimeoutError

from .attempt import Attempt, Connect
from .errors import unavailable
from .redis_parser import SHORTEST_S, TripParser


def perform(attempt: Attempt, pool: Any) -> list[Any]:
    """Do what an attempt asks for, over one connection of a pool; return what it returns.

    Raises what the attempt raises.
    """
    connection: Any = None
    try:
        act = next(attempt)
        while True:
            try:
                if isinstance(act, Connect):
                    if connection is None:
                        connection = pool.lend(act.deadline)
                    if act.anew or not connection.is_sound or not connection.is_connected:
                        connect(connection, act.deadline, anew=act.anew)
                    done: Any = None
                else:
                    done = exchange(connection, act.commands, act.deadline)
            except Exception as error:
                act = attempt.throw(error)
            else:
                act = attempt.send(done)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    finally:
        attempt.close()
        if connection is not None:
            pool.take_back(connection)


async def aperform(attempt: Attempt, pool: Any) -> list[Any]:
    """See perform()."""
    connection: Any = None
    try:
        act = next(attempt)
        while True:
            try:
                if isinstance(act, Connect):
                    if connection is None:
                        connection = await pool.lend(act.deadline)
                    if act.anew or not connection.is_sound or not connection.is_connected:
                        await aconnect(connection, act.deadline, anew=act.anew)
                    done: Any = None
                else:
                    done = await aexchange(connection, act.commands, act.deadline)
            except Exception as error:
                act = attempt.throw(error)
            else:
                act = attempt.send(done)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    finally:
        attempt.close()
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
    elif connection.is_connected:
        return
    left_s = _left_s(deadline)
    patience = connection.socket_connect_timeout, connection.socket_timeout
    connection.is_sound = False
    try:
        connection.socket_connect_timeout = connection.socket_timeout = left_s
        connection.connect()
    except BaseException:
        # redis-py closes it after its own errors only, and a signal's exception is none.
        connection.disconnect()
        raise
    finally:
        connection.socket_connect_timeout, connection.socket_timeout = patience
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
            await connection.connect()
        heed(cancels)
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
    connection.is_sound = True


def exchange(connection: Any, commands: Sequence[bytes], deadline: float) -> list[Any]:
    """Send commands and read their replies; an error reply stands among them.

    Raises redis-py's errors.
    """
    if not commands:
        return []
    connection.is_sound = False
    try:
        parser: TripParser = connection._parser
        parser.limit(deadline)
        connection.send_packed_command([b"".join(commands)], check_health=False)
        replies = parser.read_all(len(commands), deadline)
    except BaseException:
        connection.disconnect()
        raise
    connection.is_sound = True
    return replies


async def aexchange(connection: Any, commands: Sequence[bytes], deadline: float) -> list[Any]:
    """See exchange()."""
    if not commands:
        return []
    replies: list[Any] = []
    connection.is_sound = False
    try:
        # Not redis-py's own limits: one for each reply, and a reply that is late would be None.
        async with asyncio.timeout(max(deadline - time.monotonic(), SHORTEST_S)):
            cancels = cancellations()
            await connection.send_packed_command(b"".join(commands), check_health=False)
            heed(cancels)
            for _ in commands:
                try:
                    replies.append(await connection.read_response())
                except ResponseError as error:
                    replies.append(error)
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
    connection.is_sound = True
    return replies


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
