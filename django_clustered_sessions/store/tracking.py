"""A connection over which the store tells what has changed: CLUSTERED_SESSIONS_NEAR_READS.

One for each process, or event loop, and node of the store, with CLIENT TRACKING in its default
mode: the store remembers which keys were read over it, and tells once when one of them changes.
Replies and such tellings come in one stream, so each reply is applied before what was told after
it, and an answer to a question that was sent at ``t`` proves that all has been applied that was
told before ``t``: the lease. No thread listens. The code that reads takes what has arrived.

redis-py connects and greets. Then the socket is used here alone, without blocking.
"""

from __future__ import annotations

import asyncio
import logging
import math
import select
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import Context
from functools import partial
from typing import Any, Final, cast
from weakref import proxy, ref

import hiredis
from redis.connection import DefaultParser
from redis.exceptions import RedisError, ResponseError

from django_clustered_sessions.conf import conf
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol.effects import Trip
from django_clustered_sessions.protocol.faults import fault_of

from . import clock, connections
from .attempt import pack
from .cluster import Addressed, NodeAddress, Nodes
from .errors import unavailable

logger = logging.getLogger("django_clustered_sessions.store")

#: Bytes that are received at once.
_CHUNK: Final = 65536

#: Seconds until a node is asked again for a channel that was lost or not got: at first, and at
#: most, by doubling; and after it has refused to track.
_FIRST_RETRY_S: Final = 0.5
_LONGEST_RETRY_S: Final = 30.0
_REFUSED_RETRY_S: Final = 60.0

#: Seconds for which a cluster's map of slots is believed without asking: a node does not tell that
#: another one has taken a slot from it.
_MAP_S: Final = 1.0

#: Questions that wait to be sent along with another one. All of them fit the socket's buffer.
_MOST_ALONG: Final = 100

#: Errors of a connection; ReferenceError: its pool is no more, as settings have changed.
_LOST: Final = (OSError, RedisError, hiredis.HiredisError, ReferenceError)

_NOTHING: Final = object()
#: Stand for the payload: of a question that any answer but an error answers, and of one for the
#: role, which proves nothing else.
_ANY: Final = b""
_ROLE: Final = b"role"
_packed: Final[Any] = cast(Any, hiredis.pack_command)

#: Makes of replies, the time of the question and the channel's generation then, None where the
#: replies are outdated, what the asker gets. It is called before anything is applied that was told
#: after the replies.
Take = Callable[[list[Any], float, object], Any]


class _Turn:
    """The right to use something."""


class _Turns:
    """The turn to use something, for one at a time.

    Not a lock: a signal's exception may come between its taking and the line that gives it back.
    """

    def __init__(self) -> None:
        turn = _Turn()
        self._free, self._ref = [turn], ref(turn)

    def take(self) -> _Turn | None:
        """Return the turn, None where another has it."""
        try:
            return self._free.pop()
        except IndexError:
            return None

    def give_back(self, turn: _Turn) -> None:
        """Let another take it."""
        self._free.append(turn)

    @property
    def is_lost(self) -> bool:
        """True if it went with the code that had it."""
        return self._ref() is None


class _Question:
    """Commands that were sent, and what has come of them; a PING has the payload to answer.

    One that was asked along with another has nobody who waits for it.
    """

    __slots__ = (
        "count",
        "generation",
        "is_along",
        "is_answered",
        "payload",
        "replies",
        "result",
        "sent_s",
        "take",
        "waiter",
    )

    def __init__(
        self,
        count: int,
        generation: object,
        take: Take | None,
        payload: bytes | None = None,
        *,
        is_along: bool = False,
    ) -> None:
        self.count, self.take, self.payload, self.is_along = count, take, payload, is_along
        self.generation: object | None = generation
        self.replies: list[Any] = []
        self.result: Any = None
        self.is_answered = False
        self.waiter: asyncio.Future[None] | None = None
        # Before the commands are sent: the answer proves no more.
        self.sent_s = clock.now_s()


class Channel:
    """One tracked connection, to the node of a pool.

    ``invalidate`` is called with each key that the store tells of. ``is_of_cluster``: the node
    answers a PING also when it has lost its slots.
    """

    def __init__(
        self,
        connection: Any,
        pool: Any,
        invalidate: Callable[[str], None],
        *,
        is_of_cluster: bool,
    ) -> None:
        self._connection, self._invalidate = connection, invalidate
        # The channels of a pool live as long as it does.
        self._pool: Any = proxy(pool)
        self._is_of_cluster = is_of_cluster
        self._socket: Any = connection._sock
        self._socket.setblocking(False)
        self._is_tls = isinstance(self._socket, ssl.SSLSocket)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._reader: Any = hiredis.Reader(notEnoughData=_NOTHING)
        self._buffer = bytearray(_CHUNK)
        self._questions: deque[_Question] = deque()
        self._along: dict[str, tuple[Trip, Take]] = {}
        self._turns = _Turns()
        self._watched_by: asyncio.AbstractEventLoop | None = None
        self._pings = 0
        self._is_pinged = False
        # A primary when it was greeted; unknown where a site greets by a function of its own.
        self._role_asked_s = connection.greeted_at_s if connection.handshake_metadata else -math.inf
        #: All that the store has told by then has been applied, by clock.now_s().
        self.lease_s = -math.inf
        #: Another one whenever everything is in doubt that was read over this channel.
        self.generation: object = object()
        self.is_open = True

    @property
    def is_usable(self) -> bool:
        """True if it is open and leads to the primary, as far as is known."""
        if not self.is_open or self._turns.is_lost:
            return False
        is_at_primary = getattr(self._connection, "is_at_primary", None)
        return is_at_primary is None or is_at_primary()

    def doubt(self) -> None:
        """Take all that was read over this channel for outdated."""
        self.generation = object()

    def lose(self) -> None:
        """Close it, and count its lease as lost if it was open."""
        self._count_loss()
        self.close()

    def close(self) -> None:
        """Doubt all, and close the connection; a thread that is using it closes it at its end."""
        self._drop()
        if (turn := self._turns.take()) or self._turns.is_lost:
            self._hang_up()
        if turn:
            self._turns.give_back(turn)

    def drain(self) -> None:
        """Apply what the store has told so far, without waiting; nothing while another does."""
        if not (turn := self._turns.take()):
            return
        try:
            self._receive()
        except BaseException as error:
            self._fail(error)
        self._turns.give_back(turn)

    def renew(self, record: str) -> None:
        """Ask for a new lease, and do not wait for the answer; once until it has come.

        ``record`` is a key of the node's.
        """
        if self._is_pinged or not (turn := self._turns.take()):
            return
        try:
            self._is_pinged = True
            self._pings += 1
            payload = str(self._pings).encode()
            if self._is_of_cluster:
                self._send([_packed(("EXISTS", record))], payload=_ANY)
            else:
                self._send([_packed(("PING", payload))], payload=payload)
        except BaseException as error:
            self._fail(error)
        self._turns.give_back(turn)

    def ask_along(self, record: str, trip: Trip, take: Take) -> None:
        """Ask about a record along with the next question, and do not wait for the answer.

        The last such question about a record counts, and of very many records not all are asked.
        """
        if len(self._along) < _MOST_ALONG:
            self._along[record] = trip, take

    def ask(self, trip: Trip, take: Take, seconds: float) -> Any:
        """Return what ``take`` makes of the replies to a trip.

        None where another thread is using the channel, and where there is no answer in time, nor
        will there be: then it is closed.
        """
        if seconds <= 0 or not (turn := self._turns.take()):
            return None
        result = None
        try:
            question = self._send(pack(trip, self._pool), take)
            deadline = question.sent_s + seconds
            while not question.is_answered:
                left_s = deadline - clock.now_s()
                if left_s <= 0 or not self.is_open:
                    # Of one that another thread has closed nothing is received any more.
                    raise TimeoutError("no answer in time")
                self._poll.poll(math.ceil(left_s * 1000))
                self._receive()
            result = question.result
        except BaseException as error:
            self._fail(error)
        if not self.is_open:
            self._hang_up()
        self._turns.give_back(turn)
        return result

    async def aask(self, trip: Trip, take: Take, seconds: float) -> Any:
        """See ask(); several tasks may ask at once."""
        if seconds <= 0:
            return None
        loop = asyncio.get_running_loop()
        try:
            question = self._send(pack(trip, self._pool), take)
            if self._watched_by is None:
                # By its number: an event loop of uvloop takes no TLS socket. In an empty context:
                # while many read, the loop would keep that of the first one's request.
                Context().run(loop.add_reader, self._socket.fileno(), self._on_readable)
                self._watched_by = loop
            question.waiter = loop.create_future()
            async with asyncio.timeout(seconds):
                await question.waiter
        except asyncio.CancelledError:
            # The answer comes all the same, to the code that receives next.
            raise
        except BaseException as error:
            # A signal's exception too: what was not sent must not get another question's answer.
            self._fail(error)
            return None
        return question.result

    def _on_readable(self) -> None:
        self.drain()
        if self.is_open and not any(question.waiter for question in self._questions):
            self._unwatch()

    def _unwatch(self) -> None:
        loop, self._watched_by = self._watched_by, None
        if loop is not None and not loop.is_closed():
            loop.remove_reader(self._socket.fileno())

    def _send(
        self, commands: Sequence[bytes], take: Take | None = None, payload: bytes | None = None
    ) -> _Question:
        if not self.is_open:
            raise ConnectionError("the channel was closed")
        question = _Question(len(commands), self.generation, take, payload)
        self._questions.append(question)
        packed = b"".join(commands)
        if self._along:
            # Other threads go on adding to the one that they have found.
            along, self._along = self._along, {}
            for trip, its_take in list(along.values()):
                question_along = _Question(len(trip), self.generation, its_take, is_along=True)
                self._questions.append(question_along)
                packed += b"".join(pack(trip, self._pool))
        if not self._is_of_cluster and (
            question.sent_s - self._role_asked_s > conf.near_max_age / 2
        ):
            # A replica answers all else as a primary does, and each answer renews the lease.
            self._role_asked_s = question.sent_s
            self._questions.append(_Question(1, self.generation, None, _ROLE))
            packed += _packed(("HELLO",))
        # Some kilobytes at most: there is room for them, or the store reads nothing.
        if self._socket.send(packed) < len(packed):
            raise ConnectionError("the store does not read")
        return question

    def _receive(self) -> None:
        """Apply all that has arrived, in its order."""
        while self.is_open:
            try:
                count = self._socket.recv_into(self._buffer)
            except (BlockingIOError, ssl.SSLWantReadError):
                return
            if not count:
                raise ConnectionError("the store closed the connection")
            self._reader.feed(self._buffer, 0, count)
            while (message := self._reader.gets()) is not _NOTHING:
                if isinstance(message, hiredis.PushNotification):
                    self._told(message)
                else:
                    self._answered(message)
            # Under TLS bytes may lie in the TLS object, of which the socket knows nothing.
            if count < _CHUNK and not self._is_tls:
                return

    def _told(self, message: list[Any]) -> None:
        if message[0] != b"invalidate":
            return
        if self._questions and self._questions[0].replies:
            # Between two replies to one question, as from a full table at its second command: what
            # the first one told may be outdated.
            self._questions[0].generation = None
        if message[1] is None:
            self.doubt()  # A database was emptied.
            counters.add(near_invalidations=1)
            return
        for key in message[1]:
            self._invalidate(key.decode("utf-8", "surrogateescape"))
        counters.add(near_invalidations=len(message[1]))

    def _answered(self, reply: Any) -> None:
        if not self._questions:
            # Nothing is sure any more.
            raise ConnectionError("an answer to nothing")
        question = self._questions[0]
        question.replies.append(reply)
        if len(question.replies) < question.count:
            return
        self._questions.popleft()
        if question.payload is _ROLE:
            if _is_of_replica(reply):
                raise ConnectionError("it is a replica now")
            return
        if question.payload is not None:
            self._is_pinged = False
        if any(isinstance(one, hiredis.ReplyError) for one in question.replies):
            if self._is_of_cluster:
                # The slot has moved, or the node is cut off from the others.
                self.doubt()
        else:
            if question.payload not in (None, _ANY, reply):
                raise ConnectionError("an answer to something else")
            if question.take is not None:
                take = partial(
                    question.take, question.replies, question.sent_s, question.generation
                )
                try:
                    question.result = take()
                except Exception as error:
                    if question.is_along:
                        fault = fault_of(take, error)
                        logger.error("an answer cannot be understood", exc_info=fault)
                        raise ConnectionError("an answer cannot be understood") from fault
                    question.result = error
            # The last thing: all that came before has been applied.
            self.lease_s = max(self.lease_s, question.sent_s)
        question.is_answered = True
        if question.waiter is not None and not question.waiter.done():
            question.waiter.set_result(None)

    def _fail(self, error: BaseException) -> None:
        """Close the channel after an error; raise what is no error of the connection's.

        The exception of a signal may be an Exception, as Celery's soft time limit is one.
        """
        self._count_loss()
        self._drop()
        self._hang_up()
        if isinstance(error, _LOST):
            logger.debug("a tracked connection is lost: %s: %s", type(error).__name__, error)
        else:
            raise error

    def _count_loss(self) -> None:
        if self.is_open:
            counters.add(near_leases_lost=1)

    def _drop(self) -> None:
        self.is_open, self.generation, self.lease_s = False, object(), -math.inf

    def _hang_up(self) -> None:
        self._unwatch()
        self._connection.disconnect()
        for question in self._questions:
            if question.waiter is not None and not question.waiter.done():
                question.waiter.set_result(None)


class _Node:
    """The channel to one node, and when to ask for another one."""

    def __init__(self, *, is_of_cluster: bool) -> None:
        self._is_of_cluster = is_of_cluster
        self.channel: Channel | None = None
        self._turns = _Turns()
        self._retry_at_s = -math.inf
        self._retry_s = _FIRST_RETRY_S

    def usable(self) -> Channel | None:
        """Return the channel, None where there is none that may be used."""
        channel = self.channel
        if channel is None or channel.is_usable:
            return channel
        channel.lose()
        if self.channel is channel:
            self.channel = None
        return None

    def close(self) -> None:
        """Close the channel."""
        if self.channel is not None:
            self.channel.close()

    @property
    def may_open(self) -> bool:
        """True if a channel may be asked for."""
        return time.monotonic() >= self._retry_at_s

    def open(self, pool: Any, invalidate: Callable[[str], None], seconds: float) -> Channel | None:
        """Open a channel over a connection as the pool's; return None where there is none."""
        if self._turns.is_lost:
            self._turns = _Turns()
        if pool.breaker.is_open or not (turn := self._turns.take()):
            return None
        if self.channel is not None or not self.may_open:
            # Another thread has asked since this one looked.
            self._turns.give_back(turn)
            return self.channel
        try:
            connection = greeted(pool, seconds)
            self.channel = Channel(connection, pool, invalidate, is_of_cluster=self._is_of_cluster)
            self._retry_s = _FIRST_RETRY_S
        except ResponseError as error:
            self._retry_s = _REFUSED_RETRY_S
            _warn(error)
        except (RedisError, OSError) as error:
            logger.debug("no tracked connection: %s: %s", type(error).__name__, error)
        finally:
            self._retry_at_s = time.monotonic() + self._retry_s
            self._retry_s = min(self._retry_s * 2, _LONGEST_RETRY_S)
            self._turns.give_back(turn)
        return self.channel


class Channels:
    """The channels of this process, or of one event loop: one for each node."""

    def __init__(self) -> None:
        self._nodes: dict[NodeAddress | None, _Node] = {}
        self._slots: object = None
        self._is_closed = False

    def usable(self, pool: Any, record: str) -> Channel | None:
        """Return the channel to the node that has a record, None where there is none to use."""
        node = self._node(pool, record)
        return node.usable() if node else None

    def open(
        self, pool: Any, record: str, invalidate: Callable[[str], None], seconds: float
    ) -> Channel | None:
        """Return the channel that leads to a record, opened if need be; None where none is had."""
        node = self._node(pool, record)
        if node is None:
            return None
        if (channel := node.usable()) or not node.may_open:
            return channel
        return self._open(node, record, invalidate, seconds)

    async def aopen(
        self, pool: Any, record: str, invalidate: Callable[[str], None], seconds: float
    ) -> Channel | None:
        """See open()."""
        node = self._node(pool, record)
        if node is None:
            return None
        if (channel := node.usable()) or not node.may_open:
            return channel
        # redis-py's greeting for synchronous use; once for each loop.
        return await asyncio.to_thread(self._open, node, record, invalidate, seconds)

    def _open(
        self, node: _Node, record: str, invalidate: Callable[[str], None], seconds: float
    ) -> Channel | None:
        try:
            return node.open(_pool_of(record), invalidate, seconds)
        finally:
            if self._is_closed:
                # Meanwhile: a thread goes on where its event loop ends.
                node.close()

    def close(self) -> None:
        """Close all of them, and what is being opened, as their pool ends."""
        self._is_closed = True
        for node in list(self._nodes.values()):
            node.close()

    def _node(self, pool: Any, record: str) -> _Node | None:
        address = None
        if isinstance(pool, Nodes):
            slots = pool.slot_map
            generation = slots.generation
            if generation is not self._slots:
                primaries = slots.primaries
                for address, node in list(self._nodes.items()):
                    if address not in primaries:
                        self._nodes.pop(address, None)
                        node.close()
                    elif node.channel is not None:
                        # A copy must not come back with a slot that has moved away and back again.
                        node.channel.doubt()
                # Last: another thread may come in between, and a signal's exception.
                self._slots = generation
            if clock.now_s() - slots.asked_at_s > _MAP_S:
                slots.doubt()
            if slots.is_stale:
                return None
            address = pool.node(record)
        # Another thread may take it out.
        found = self._nodes.get(address)
        return found or self._nodes.setdefault(address, _Node(is_of_cluster=address is not None))


def greeted(pool: Any, seconds: float) -> Any:
    """Return a new connection as a pool's, greeted and tracked, which no pool knows.

    Raises redis-py's errors: ResponseError where the store does not track for this user, and
    ConnectionError where it is a replica: it may lag behind, or have lost its primary.
    """
    # No password in a local: a traceback would show it.
    connection = pool.connection_class(
        **pool.connection_kwargs
        | {
            "protocol": 3,
            "parser_class": DefaultParser,
            "socket_connect_timeout": seconds,
            "socket_timeout": seconds,
        }
    )
    connection.greeted_at_s = clock.now_s()
    connection.greeted_by_s = time.monotonic() + seconds
    try:
        connection.connect()
        # The greeting itself is a HELLO, whose reply redis-py keeps.
        if _is_of_replica(connection.handshake_metadata):
            raise ConnectionError("it leads to a replica")
        connection.send_command("CLIENT", "TRACKING", "ON", check_health=False)
        # Before the first read: what is read earlier is not told of.
        if connection.read_response() != b"OK":
            raise ResponseError("CLIENT TRACKING ON was not answered by OK")
    except BaseException:
        connection.disconnect()
        raise
    return connection


def _is_of_replica(hello: Any) -> bool:
    """Return whether a reply to HELLO is a replica's; an error, as of a busy store, is none."""
    return isinstance(hello, dict) and hello.get(b"role") in (b"replica", b"slave")


def try_out(seconds: float) -> None:
    """See whether the store tracks for this user.

    Raises SessionStoreUnavailable.
    """
    try:
        greeted(_pool_of(""), seconds).disconnect()
    except (RedisError, OSError) as error:
        raise unavailable(error) from error


def here() -> tuple[Any, Channels]:
    """Return the pool of this process, or of the running event loop, and its channels."""
    # Not get_running_loop(): off a loop, an exception on each call.
    off_loop = asyncio._get_running_loop() is None
    pool: Any = connections.pool() if off_loop else connections.apool()
    channels = pool.channels
    # A forked process has other pools, and leaves the channels to its parent with those.
    return pool, channels if channels else vars(pool).setdefault("channels", Channels())


def _pool_of(record: str) -> Any:
    pool = connections.pool()
    if isinstance(pool, Nodes):
        return pool.pool(Addressed.to(pool.node(record), (), 0.0))
    return pool


def _warn(error: ResponseError) -> None:
    global _has_warned
    if not _has_warned:
        _has_warned = True
        logger.warning(
            "the session store does not tell this process of changes, so each read asks it, as "
            "with CLUSTERED_SESSIONS_NEAR_READS = 'checked': %s. See the rights in "
            "docs/near-reads.md, and that no proxy is in between.",
            error,
        )


_has_warned = False
