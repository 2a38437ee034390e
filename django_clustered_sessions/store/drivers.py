"""The only two loops that talk to the store: one runs a flow synchronously, one asynchronously.

redis-py by default repeats a command up to ten times after a timeout. Here a trip is repeated
once, on a fresh connection, within the same budget: every write carries a token, and the record
keeps its answer for longer than that.
"""

from __future__ import annotations

import asyncio
import builtins
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar, cast

import hiredis
import redis
from asgiref.sync import sync_to_async
from redis import asyncio as aioredis
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    MaxConnectionsError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)

from django_clustered_sessions.counters import counters
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.protocol.commands import is_acknowledgement, is_passenger
from django_clustered_sessions.protocol.record import Damaged
from django_clustered_sessions.protocol.steps import (
    Argument,
    Asks,
    Call,
    Elsewhere,
    Flow,
    Pause,
    Step,
    Trip,
    Wait,
)

from .nodes import Addressed, Nodes, is_lost
from .replies import SHORTEST_S, Replies

T = TypeVar("T")
Pool = redis.ConnectionPool | Nodes
AsyncPool = aioredis.ConnectionPool | Nodes

#: What an error reply's first word means to whoever runs the site.
_ADVICE: Final = {
    "LOADING": "it is loading its data after a start; it will answer when it is done",
    "READONLY": "it is a replica: point the sessions' CACHES entry at the primary, or at Sentinel",
    "OOM": "it is full: raise maxmemory, or move caches to a server of their own",
    "NOAUTH": "it wants a password: set it in the sessions' CACHES entry",
    "WRONGPASS": "it does not accept user or password: correct them in the sessions' CACHES entry",
    "NOPERM": "its user lacks a permission: see the ACL rule in the documentation",
    "MISCONF": "it cannot write its data to disk: see its own log",
    "NOREPLICAS": "it has fewer replicas than its min-replicas-to-write",
    "CLUSTERDOWN": "the cluster has lost slots: see CLUSTER INFO",
    "ASK": "a slot of the cluster is being moved, and takes its time: see CLUSTER NODES",
    "MOVED": "it is a node of a cluster: the sessions' CACHES entry has to say so, see cluster.md",
    "TRYAGAIN": "a slot of the cluster is being moved, and takes its time: see CLUSTER NODES",
    "MASTERDOWN": "it is a replica that has lost its primary",
    "DB": "it has no database of that number: correct the sessions' CACHES entry, or its databases",
    "BUSY": "it is busy with a script: see its slow log",
}

#: Of these, the ones by which a store says that it cannot answer anybody.
_NOT_READY: Final = frozenset({"LOADING", "CLUSTERDOWN", "MASTERDOWN", "BUSY"})

#: A command's words, as the protocol has them; hiredis' stubs know of one word only.
_packed: Final[Callable[[tuple[Argument | bytes, ...]], bytes]] = cast(Any, hiredis.pack_command)

#: What redis-py says where a blocking pool has no connection to spare.
_ALL_LENT: Final = "No connection available."

#: What a blocking read may take longer than it was asked to, in seconds.
_GRACE_S: Final = 0.25

#: Where a blocking read is not possible, whoever waits looks again after so long, in seconds.
_DOUBT_S: Final = 0.05


class Budget:
    """Seconds that the store operations of one request may take together."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    @property
    def left(self) -> float:
        """Seconds that are left, 0 at least."""
        return max(self._left, 0.0)

    def spend(self, seconds: float) -> None:
        """Take away what an operation took."""
        self._left -= seconds


class PerTrip(Budget):
    """The same seconds for each trip, for what takes many and has time."""

    def spend(self, seconds: float) -> None:
        """Take away nothing."""


def run(
    flow: Flow[T],
    pool: Callable[[Asks], Pool],
    budget: Budget,
    waiting: Callable[[Asks], Pool] | None = None,
    step: Step | None = None,
) -> T:
    """Run a flow over connections of ``pool(step)``, which is asked only if there is a trip.

    What waits uses a connection of ``waiting(step)``, and does not spend the budget. ``step`` is
    the first one of a flow that has begun.

    Raises SessionStoreUnavailable, and what the flow raises.
    """
    try:
        if step is None:
            step = next(flow)
        while True:
            if not isinstance(step, tuple):
                step = flow.send(_rest(step, waiting or pool))
                continue
            started = time.monotonic()
            try:
                replies = _send(step, pool(step), budget.left)
            except SessionStoreUnavailable as error:
                budget.spend(time.monotonic() - started)
                # What a trip to a cluster is made of is no trip of its own.
                counters.add(store_errors=int(not isinstance(step, Addressed)))
                step = flow.throw(error)
            else:
                budget.spend(time.monotonic() - started)
                step = flow.send(replies)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    finally:
        # One that is broken off leaves the waiting room now, and not with its exception's end.
        flow.close()


async def arun(
    flow: Flow[T],
    pool: Callable[[Asks], AsyncPool],
    budget: Budget,
    waiting: Callable[[Asks], AsyncPool] | None = None,
    step: Step | None = None,
) -> T:
    """See run()."""
    cancels = _cancels()
    try:
        if step is None:
            step = next(flow)
        while True:
            if not isinstance(step, tuple):
                mail = await _arest(step, waiting or pool)
                _heed(cancels)
                step = flow.send(mail)
                continue
            started = time.monotonic()
            try:
                replies = await _asend(step, pool(step), budget.left)
                _heed(cancels)
            except SessionStoreUnavailable as error:
                budget.spend(time.monotonic() - started)
                # What a trip to a cluster is made of is no trip of its own.
                counters.add(store_errors=int(not isinstance(step, Addressed)))
                step = flow.throw(error)
            else:
                budget.spend(time.monotonic() - started)
                step = flow.send(replies)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    finally:
        # One that is broken off leaves the waiting room now, and not with its exception's end.
        flow.close()


def _rest(step: Wait | Pause | Elsewhere, pools: Callable[[Asks], Any]) -> Any:
    """Do what is no trip: read a mailbox, sleep, or ask another than the store."""
    if isinstance(step, Elsewhere):
        try:
            return step.call()
        except Exception as error:
            return error
    if isinstance(step, Pause):
        time.sleep(step.seconds)
        return False
    return _read_mailbox(step, pools)


async def _arest(step: Wait | Pause | Elsewhere, pools: Callable[[Asks], Any]) -> Any:
    """See _rest()."""
    if isinstance(step, Elsewhere):
        try:
            return await (step.twin or sync_to_async(step.call))()
        except Exception as error:
            return error
    if isinstance(step, Pause):
        await asyncio.sleep(step.seconds)
        return False
    return await _aread_mailbox(step, pools)


def _read_mailbox(wait: Wait, pools: Callable[[Asks], Any]) -> bool | None:
    """Return False where nothing came, None at once where nobody knows."""
    connection: Any = None
    pool = pools(wait)
    try:
        connection = pool.get_connection()
        deadline = time.monotonic() + wait.seconds + _GRACE_S
        (mail,) = _exchange(connection, [_blocking_read(wait)], deadline)
    except (RedisError, OSError) as error:
        mail = error
    finally:
        if connection is not None:
            pool.release(connection)
    if isinstance(mail, Exception):
        time.sleep(min(wait.seconds, _DOUBT_S))
        return None
    return mail is not None


async def _aread_mailbox(wait: Wait, pools: Callable[[Asks], Any]) -> bool | None:
    """See _read_mailbox()."""
    connection: Any = None
    pool = pools(wait)
    try:
        deadline = time.monotonic() + wait.seconds + _GRACE_S
        async with asyncio.timeout(wait.seconds + _GRACE_S):
            connection = await pool.get_connection()
        (mail,) = await _aexchange(connection, [_blocking_read(wait)], deadline)
    except (RedisError, OSError) as error:
        mail = error
    finally:
        if connection is not None:
            await pool.release(connection)
    if isinstance(mail, Exception):
        await asyncio.sleep(min(wait.seconds, _DOUBT_S))
        return None
    return mail is not None


def _blocking_read(wait: Wait) -> bytes:
    # A timeout of 0 would be for ever.
    seconds = f"{max(wait.seconds, SHORTEST_S):.3f}"
    return _packed(("BLPOP", wait.mailbox, seconds))


def _guarded(send: Callable[[Trip, Any, float], list[Any]]) -> Callable[..., list[Any]]:
    """Let the breaker of a pool's node decide whether it is asked.

    What stands for several nodes has none: they are asked through here one by one.
    """

    def guarded(trip: Trip, pool: Any, seconds: float) -> list[Any]:
        breaker = getattr(pool, "breaker", None)
        if breaker is None:
            return send(trip, pool, seconds)
        with breaker.trip():
            return send(trip, pool, seconds)

    return guarded


def _aguarded(
    send: Callable[[Trip, Any, float], Awaitable[list[Any]]],
) -> Callable[..., Awaitable[list[Any]]]:
    """See _guarded()."""

    async def guarded(trip: Trip, pool: Any, seconds: float) -> list[Any]:
        breaker = getattr(pool, "breaker", None)
        if breaker is None:
            return await send(trip, pool, seconds)
        with breaker.trip():
            return await send(trip, pool, seconds)

    return guarded


@_guarded
def _send(trip: Trip, pool: Any, seconds: float) -> list[Any]:
    if isinstance(pool, Nodes):
        budget = Budget(seconds)
        return _checked(trip, run(pool.asking(trip, budget), pool.pool, budget))
    if isinstance(trip, Addressed):
        seconds = min(seconds, trip.seconds)
    deadline = _deadline(seconds)
    connection: Any = None
    try:
        connection = pool.get_connection()
        if not connection.is_connected:
            _reconnect(connection, deadline)
        try:
            return _ask(connection, trip, deadline - seconds / 2)
        except (ConnectionError, TimeoutError, ReadOnlyError) as error:
            if not _wants_another(error):
                raise
            _reconnect(connection, deadline)
            return _ask(connection, trip, deadline)
    except (RedisError, OSError) as error:
        raise _unavailable(error) from error
    finally:
        if connection is not None:
            pool.release(connection)


@_aguarded
async def _asend(trip: Trip, pool: Any, seconds: float) -> list[Any]:
    if isinstance(pool, Nodes):
        budget = Budget(seconds)
        return _checked(trip, await arun(pool.asking(trip, budget), pool.pool, budget))
    if isinstance(trip, Addressed):
        seconds = min(seconds, trip.seconds)
    deadline = _deadline(seconds)
    connection: Any = None
    try:
        async with asyncio.timeout(seconds):
            connection = await pool.get_connection()
            try:
                return await _aask(connection, trip, deadline - seconds / 2)
            except (
                *(ConnectionError, TimeoutError, ReadOnlyError),
                builtins.TimeoutError,
            ) as error:
                if not _wants_another(error):
                    raise
                await connection.disconnect(nowait=True)
                await connection.connect()
                return await _aask(connection, trip, deadline)
    except (RedisError, OSError) as error:
        raise _unavailable(error) from error
    finally:
        if connection is not None:
            await pool.release(connection)


def _reconnect(connection: Any, deadline: float) -> None:
    """Connect anew; only this time, what is left of the budget limits connecting and greeting."""
    patience = connection.socket_connect_timeout, connection.socket_timeout
    left = deadline - time.monotonic()
    if left <= 0:
        # A process that was stopped meanwhile: the store may have forgotten the write.
        raise TimeoutError("no reply in time")
    connection.disconnect()
    try:
        connection.socket_connect_timeout = connection.socket_timeout = left
        connection.connect()
    finally:
        connection.socket_connect_timeout, connection.socket_timeout = patience


def _ask(connection: Any, trip: Trip, deadline: float) -> list[Any]:
    """Send a trip and return its replies; scripts that the store does not know go as source."""
    replies = _exchange(connection, _pack(trip), deadline)
    if _has_error(replies):
        places = _unknown(trip, replies)
        packed = _pack([trip[at] for at in places], by_source=True)
        for at, reply in zip(places, _exchange(connection, packed, deadline), strict=True):
            replies[at] = reply
        return _judged(trip, replies)
    return replies


async def _aask(connection: Any, trip: Trip, deadline: float) -> list[Any]:
    """See _ask()."""
    replies = await _aexchange(connection, _pack(trip), deadline)
    if _has_error(replies):
        places = _unknown(trip, replies)
        packed = _pack([trip[at] for at in places], by_source=True)
        again = await _aexchange(connection, packed, deadline)
        for at, reply in zip(places, again, strict=True):
            replies[at] = reply
        return _judged(trip, replies)
    return replies


def _exchange(connection: Any, commands: list[bytes], deadline: float) -> list[Any]:
    """Send commands and read their replies; an error reply stands among them."""
    if not commands:
        return []
    try:
        replies: Replies = connection._parser
        if connection.is_connected:
            replies.limit(deadline)
        connection.send_packed_command([b"".join(commands)], check_health=False)
        return replies.read_all(len(commands), deadline)
    except BaseException:
        # A broken off exchange leaves replies behind that the next one would take for its own.
        connection.disconnect()
        raise


async def _aexchange(connection: Any, commands: list[bytes], deadline: float) -> list[Any]:
    """See _exchange()."""
    replies: list[Any] = []
    try:
        # Not redis-py's own limits: one for each reply, and a reply that is late would be None.
        async with asyncio.timeout(max(deadline - time.monotonic(), SHORTEST_S)):
            if commands:
                cancels = _cancels()
                await connection.send_packed_command(b"".join(commands), check_health=False)
                _heed(cancels)
            for _ in commands:
                try:
                    replies.append(await connection.read_response())
                except ResponseError as error:
                    replies.append(error)
    except BaseException:
        # A cancelled exchange leaves replies behind that the next one would take for its own.
        await connection.disconnect(nowait=True)
        raise
    return replies


def _cancels() -> int:
    """Return how many times the running task was cancelled."""
    task = asyncio.current_task()
    return task.cancelling() if task else 0


def _heed(cancels: int) -> None:
    """Raise CancelledError where the running task was cancelled since, and nobody has heard of it.

    What connects or sends within ``wait_for``, as redis-py does where it has limits of its own, may
    forget it in Python 3.11. A client that has left would then be waited for to the end.
    """
    if _cancels() > cancels:
        raise asyncio.CancelledError


def _deadline(seconds: float) -> float:
    if seconds <= 0:
        raise SessionStoreUnavailable(
            "the session store has used up this request's CLUSTERED_SESSIONS_STORE_TIMEOUT"
        )
    return time.monotonic() + seconds


def _wants_another(error: Exception) -> bool:
    """Return whether a fresh connection may help: no reply, or one by what is no primary now."""
    plain = _plain(error)
    return is_lost(plain) or isinstance(plain, ReadOnlyError)


def _pack(trip: Sequence[Call], *, by_source: bool = False) -> list[bytes]:
    """Return the trip's commands packed; ``by_source``: the store does not know the scripts."""
    packed = []
    for script, keys, arguments in trip:
        if script is None:
            command = (*str(arguments[0]).split(), *keys, *arguments[1:])
        else:
            word, body = script.by_source if by_source else script.by_sha
            command = (word, body, len(keys), *keys, *arguments)
        packed.append(_packed(command))
    return packed


def _has_error(replies: Sequence[Any]) -> bool:
    # No any(): a generator for each trip.
    for reply in replies:  # noqa: SIM110
        if isinstance(reply, Exception):
            return True
    return False


def _unknown(trip: Trip, replies: Sequence[Any]) -> list[int]:
    """Return the places of the calls that are sent once more.

    Those are the scripts that the store does not know, and what comes after one, as it may build on
    it. Nothing builds on a passenger.
    """
    places: list[int] = []
    builds = False
    for at, reply in enumerate(replies):
        is_unknown = isinstance(reply, NoScriptError)
        if is_unknown or builds:
            places.append(at)
        builds = builds or (is_unknown and not is_passenger(trip, at))
    return places


def _judged(trip: Trip, replies: list[Any]) -> list[Any]:
    """Return the replies of one node, with the errors in them where the trip is addressed to it.

    Raises ReadOnlyError, and what ``_checked`` raises.
    """
    if isinstance(trip, Addressed):
        return replies
    for reply in replies:
        if isinstance(reply, ReadOnlyError):
            raise reply
    return _checked(trip, replies)


def _checked(trip: Trip, replies: list[Any]) -> list[Any]:
    """Return the replies, or raise for the first that says that the store cannot.

    A record of the wrong type is damage to one session, and is left to the parser. So is a store
    that does not tell who has a write, for it has done the write, and figures that it does not
    take: they are written, where all else is read perhaps.
    """
    for at, reply in enumerate(replies):
        # Of one call that went everywhere there are many replies.
        its = at % len(trip)
        is_aside = is_acknowledgement(trip[its]) or is_passenger(trip, its)
        if is_aside and isinstance(reply, ResponseError):
            continue
        if isinstance(reply, ResponseError) and str(reply).startswith("WRONGTYPE"):
            replies[at] = Damaged("its key holds another type")
        elif isinstance(reply, Exception):
            raise _unavailable(reply) from reply
    return replies


def _plain(error: Exception) -> Exception:
    """Return what happened: redis-py wraps a refusal while it connects asynchronously."""
    return error.__cause__ if isinstance(error.__cause__, RedisError) else error


def _unavailable(error: Exception) -> SessionStoreUnavailable:
    error = _plain(error)
    text = str(error) or "no reply in time"
    word = getattr(error, "status_code", None)
    if word in (None, "ERR"):
        # Of what has no code of its own, the first word says what it is about.
        word = text.partition(" ")[0]
    answers = isinstance(error, ResponseError | AuthenticationError)
    if advice := _ADVICE.get(word):
        unavailable = SessionStoreUnavailable(
            f"the session store refused: {advice} ({word}: {text.removeprefix(f'{word} ')})"
        )
        unavailable.is_away = word in _NOT_READY
    else:
        happened = "refused" if answers else "does not answer"
        unavailable = SessionStoreUnavailable(f"the session store {happened}: {text}")
        unavailable.is_away = not answers
    if isinstance(error, MaxConnectionsError) or text == _ALL_LENT:
        # It is this process that has no connection to spare.
        unavailable.is_away = None
    return unavailable
