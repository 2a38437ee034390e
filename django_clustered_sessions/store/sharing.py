"""Let requests of one event loop that run at once share a connection: a line.

A few have connections of their own. What the others ask goes over a line: all that is asked in one
turn of the event loop is sent together, and the replies come in the same order. Behind the
commands of each question goes its mark, a PING with a text that no other question has and nobody
can guess. A question is answered only if its mark has come right behind as many replies as it has
commands. So nobody gets the reply to another one's question, whatever is lost or not counted, as
where an exception of a signal comes between two lines of this code or of the event loop's. In any
doubt the line is closed, and what was asked is repeated without it.

A read is never behind a write, for while a failover pauses writes reads are answered.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Sequence
from contextvars import Context
from copy import copy
from typing import Any, Final

from redis.exceptions import ConnectionError, RedisError, TimeoutError

from django_clustered_sessions.protocol.effects import Trip

from . import exchange
from .attempt import is_clean, pack
from .cluster import Addressed
from .errors import SHORTEST_S, AllLent

logger = logging.getLogger("django_clustered_sessions.store")

#: So many requests at once have a connection each: their marks would cost more than is spared.
_APART: Final = 2

#: Plain commands that may go over a line. They read, and little.
_READS: Final = frozenset({"HEXISTS", "HGET", "HGETALL", "HMGET", "TIME", "ZCOUNT", "ZSCORE"})

#: The largest question that goes over a line, in calls and in bytes.
_MOST_CALLS: Final = 8
_MOST_BYTES: Final = 8 * 1024

#: Bytes that are under way over a line at most. The system takes so many at once.
_MOST_ASKED_BYTES: Final = 32 * 1024
#: Bytes that have come of a reply that is not complete: behind a large one nothing is asked.
_MOST_AWAITED_BYTES: Final = 64 * 1024

#: Of so many connections that a pool may have one may be a line.
_SHARE: Final = 8

#: What a mark is made of: hexadecimal digits of its line's secret, and of its number.
_DIGITS: Final = 12
_PING: Final = b"*2\r\n$4\r\nPING\r\n$%d\r\n%%b\r\n" % (2 * _DIGITS)


def aperform(trip: Trip, pool: Any, seconds: float) -> Awaitable[list[Any]]:
    """Ask a node of the store, over a line while several ask; return its replies.

    Raises SessionStoreUnavailable.
    """
    if pool.lent >= _APART and pool.shares and not pool.breaker.failures:
        if type(trip) is Addressed:
            seconds = min(seconds, trip.seconds)
        if seconds > 0 and (only_reads := _only_reads(trip)) is not None:
            commands = pack(trip, pool)
            size = sum(map(len, commands))
            if size <= _MOST_BYTES and (line := _line(pool, only_reads, size)):
                return _over(line, commands, trip, pool, seconds)
    return exchange.aperform(trip, pool, seconds)


async def _over(
    line: Line, commands: Sequence[bytes], trip: Trip, pool: Any, seconds: float
) -> list[Any]:
    deadline = time.monotonic() + seconds
    first: Any = None
    try:
        try:
            first = await line.ask(commands, deadline - seconds / 2)
            if is_clean(first):
                return first  # type: ignore[no-any-return]
        except (RedisError, OSError) as error:
            first = error
        return await exchange.aperform(trip, pool, deadline - time.monotonic(), first)
    finally:
        # See exchange.perform().
        first = None


def _only_reads(trip: Trip) -> bool | None:
    """Return whether a trip only reads, None for one that may take its time and goes alone."""
    if len(trip) > _MOST_CALLS:
        return None
    only_reads = True
    for call in trip:
        if call.script is None:
            if call.arguments[0] not in _READS:
                return None
        elif not call.script.reads_only:
            only_reads = False
    return only_reads


def _line(pool: Any, only_reads: bool, size: int) -> Line | None:
    """Return a line that has room for so many bytes, a new one perhaps, None if all are full."""
    for line in pool.lines:
        if line.only_reads is only_reads and line.has_room(size):
            return line  # type: ignore[no-any-return]
    if len(pool.open_lines()) >= pool.max_connections // _SHARE:
        return None
    try:
        line = Line(pool, only_reads)
    except AllLent:
        return None
    pool.lines.append(line)
    return line


class _Question:
    """Commands that were asked, and the replies so far; ``answer`` gets them, or an error."""

    __slots__ = ("answer", "count", "data", "deadline", "mark", "replies")

    def __init__(
        self, mark: bytes, count: int, data: bytes, deadline: float, answer: asyncio.Future[Any]
    ) -> None:
        self.mark, self.count, self.data = mark, count, data
        self.deadline, self.answer = deadline, answer
        self.replies: list[Any] = []


class Line(asyncio.Protocol):
    """A connection that requests share; ``only_reads``: for those that read.

    It begins to connect at once, and is not connected again once it was closed.
    """

    def __init__(self, pool: Any, only_reads: bool) -> None:
        self.only_reads, self.is_open = only_reads, True
        self._pool, self._connection = pool, pool.make()
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._unsent: deque[_Question] = deque()
        self._sent: deque[_Question] = deque()
        self._sending: asyncio.Handle | None = None
        self._is_writing = self._is_leaving = False
        self._asked = self._asked_bytes = self._awaited_bytes = 0
        self._secret = secrets.token_hex(_DIGITS // 2).encode()
        deadline = time.monotonic() + self._connection.socket_connect_timeout
        # Not in the context of the request that comes first, which would live as long. Not every
        # factory of tasks takes one as an argument.
        self._connecting = Context().run(
            self._loop.create_task, exchange.aconnect(self._connection, deadline)
        )
        self._connecting.add_done_callback(self._connected, context=Context())

    def has_room(self, size: int) -> bool:
        """Return whether a question of so many bytes may be asked."""
        if not self.is_open or self._is_leaving:
            return False
        leads_wrong = self._transport is not None and not self._pool.leads_right(self._connection)
        # All who ask may be cancelled before they find the line silent.
        if leads_wrong or (self._sent and self._sent[0].deadline < time.monotonic()):
            self.leave()
            return False
        return (
            self._asked_bytes + size <= _MOST_ASKED_BYTES
            and self._awaited_bytes <= _MOST_AWAITED_BYTES
        )

    async def ask(self, commands: Sequence[bytes], deadline: float) -> list[Any]:
        """Send commands and return their replies, by a time of time.monotonic().

        What is cancelled is not sent any more, or its replies are dropped when they come. Raises
        redis-py's errors.
        """
        self._asked += 1
        mark = b"%s%0*x" % (self._secret, _DIGITS, self._asked)
        data = b"".join(commands) + _PING % mark
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._unsent.append(_Question(mark, len(commands), data, deadline, answer))
        self._asked_bytes += len(data)
        if self._sending is None:
            # With what others ask in this turn of the loop.
            self._sending = self._loop.call_soon(self._send)
        left_s = max(deadline - time.monotonic(), SHORTEST_S)
        timer = self._loop.call_later(left_s, self._is_late, answer)
        try:
            found = await answer
        finally:
            timer.cancel()
            if self._is_leaving:
                self.leave()
        if isinstance(found, Exception):
            raise _own(found) from found.__cause__
        return found  # type: ignore[no-any-return]

    def close(self, error: Exception | None = None) -> None:
        """Close the connection; what is under way gets the error, or that it is lost."""
        self.is_open = False
        if self._transport is None:
            self._connecting.cancel()
        else:
            self._transport.abort()
            # redis-py warns of one that it takes for open.
            self._connection._writer = self._connection._reader = None
        for questions in (self._sent, self._unsent):
            while questions:
                answer = questions.popleft().answer
                if not answer.done():
                    answer.set_result(error or ConnectionError("the connection is lost"))

    @property
    def is_asked(self) -> bool:
        """True if somebody waits for an answer."""
        return not all(question.answer.done() for question in (*self._sent, *self._unsent))

    def leave(self) -> None:
        """Take no more questions, and close when nobody waits for an answer."""
        self._is_leaving = True
        if not self.is_asked:
            self.close()

    def _is_late(self, answer: asyncio.Future[Any]) -> None:
        if not answer.done():
            self._is_leaving = True
            answer.set_result(TimeoutError("no reply in time"))

    def _connected(self, connecting: asyncio.Task[None]) -> None:
        error = None if connecting.cancelled() else connecting.exception()
        if connecting.cancelled() or error is not None:
            self.close(error if isinstance(error, Exception) else None)
            return
        self._reader = exchange.reader_of(self._connection)
        self._transport = self._connection._writer.transport
        self._before = self._transport.get_protocol()
        self._transport.set_protocol(self)
        if self._transport.get_extra_info("ssl_object") is None:
            self._transport.set_write_buffer_limits(0)
        if self.is_open:
            self._send()
        else:
            self.close()

    # Sending. A command that had lost its end would swallow the next one, of another request. So
    # nothing is sent behind what was not sent as a whole, here and at once. Under TLS the store
    # would notice.

    def _send(self) -> None:
        """Send all that was asked since the last time, and is still waited for."""
        self._sending = None
        if self._transport is None or not self.is_open:
            return
        if self._is_writing:
            self.close()
            return
        parts: list[bytes] = []
        while self._unsent:
            question = self._unsent.popleft()
            if question.answer.done():
                self._asked_bytes -= len(question.data)
            else:
                self._sent.append(question)
                parts.append(question.data)
        self._is_writing = True
        self._transport.write(b"".join(parts))
        self._is_writing = False

    def pause_writing(self) -> None:
        """Close the line, for the event loop would send the rest later."""
        self.close(ConnectionError("the store does not read"))

    # Receiving.

    def data_received(self, data: bytes) -> None:
        """Take what has come; what is not as it has to be closes the line."""
        try:
            self._reader.feed(data)
            self._awaited_bytes += len(data)
            while (reply := self._reader.gets()) is not exchange.INCOMPLETE:
                self._awaited_bytes = 0
                self._take(reply)
        except Exception as error:
            self.close(ConnectionError(f"the connection is lost: {error}"))

    def _take(self, reply: Any) -> None:
        if not self._sent:
            raise ConnectionError("a reply to nothing")
        question = self._sent[0]
        if len(question.replies) < question.count:
            question.replies.append(reply)
        elif reply == question.mark:
            if not question.answer.done():
                question.answer.set_result(question.replies)
            self._asked_bytes -= len(question.data)
            self._sent.popleft()
        else:
            # A store that is loading or busy is another time able to.
            if reply == b"PONG" or getattr(reply, "status_code", None) in ("NOPERM", "ERR"):
                _go_without(self._pool, reply)
            # Not the reply itself, which may be of anybody's session.
            came = reply if isinstance(reply, Exception) else "a reply to another question"
            raise ConnectionError(f"in place of a mark came {came}")

    def connection_lost(self, error: Exception | None) -> None:
        """Learn that the connection is no more."""
        why = error or "the store closed it"
        self.close(ConnectionError(f"the connection is lost: {why}"))
        self._before.connection_lost(error)


def _own(error: Exception) -> Exception:
    """Return an error of one's own: a traceback keeps all that it has come through."""
    try:
        return copy(error)
    except Exception:
        # As of a site's credential provider, whose errors are made of other arguments.
        return error


def _go_without(pool: Any, reply: Any) -> None:
    global _has_warned
    pool.shares = False
    if not _has_warned:
        _has_warned = True
        logger.warning(
            "requests that run at once do not share connections to the session store: %s. See the "
            "rights in docs/deploy-store.md.",
            reply if isinstance(reply, Exception) else "it answers PING without its text",
        )


_has_warned = False
