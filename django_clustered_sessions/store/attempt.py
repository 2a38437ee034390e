"""A trip to one node: repeated once, with scripts as source where they are unknown. Pure.

redis-py by default repeats a command up to ten times after a timeout. Here a trip is repeated
once, on a fresh connection, within the same budget: every write carries a token, and the record
keeps its answer for longer than that.

A generator, as flows are: it yields what to do with a connection, is sent the replies, and is
thrown the errors. ``exchange`` does it, synchronously and asynchronously.
"""

from __future__ import annotations

import re
import time
from collections.abc import Generator, Sequence
from typing import Any, Final, NamedTuple, Protocol, cast

import hiredis
from redis.exceptions import NoScriptError, ReadOnlyError, RedisError, ResponseError

from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.protocol.commands.replication import is_acknowledgement
from django_clustered_sessions.protocol.commands.statistics import is_passenger
from django_clustered_sessions.protocol.effects import Argument, Call, Trip, Wait
from django_clustered_sessions.protocol.record import Damaged

from .circuit_breaker import CircuitBreaker
from .cluster import Addressed
from .errors import LOST, SHORTEST_S, is_mended_by_connecting, unavailable

#: A command's words, as the protocol has them; hiredis' stubs know of one word only.
_packed: Final[Any] = cast(Any, hiredis.pack_command)

#: The refusal of a command that a store does not have, in the words of Redis and of others.
_UNKNOWN_WORD: Final = re.compile(r"unknown command\W+(EVALSHA|EVAL)_RO\b", re.IGNORECASE)


class Connect(NamedTuple):
    """Have a connection, by a time of time.monotonic(); ``anew``: not one that was used before."""

    deadline: float
    anew: bool = False


class Exchange(NamedTuple):
    """Send commands and read as many replies, by a time of time.monotonic()."""

    commands: Sequence[bytes]
    deadline: float


Attempt = Generator[Connect | Exchange, Any, list[Any]]


class Node(Protocol):
    """The knowledge that this process has of a node, kept by a pool of connections to it.

    A store without ``EVALSHA_RO`` and ``EVAL_RO`` is told once: ``has_read_only_words``.
    """

    breaker: CircuitBreaker
    has_read_only_words: bool

    def leave(self) -> None:
        """Use no connection again that is open: they lead to what is no primary any more."""


def attempt(
    trip: Trip,
    node: Node,
    deadline: float,
    *,
    has_begun: bool = False,
) -> Attempt:
    """Ask a node by a time of time.monotonic(), and return its replies.

    What is addressed to a node may have errors among them. ``has_begun``: the first exchange is
    done, over a connection that was idle, or that requests share. It is yielded all the same, and
    what came of it is to be sent or thrown.

    Raises SessionStoreUnavailable.
    """
    with node.breaker.trip() as probe_s:
        left_s = deadline - time.monotonic()
        is_probe = probe_s is not None
        if left_s <= 0 and not has_begun:
            raise SessionStoreUnavailable(
                "the session store has used up this request's CLUSTERED_SESSIONS_STORE_TIMEOUT"
            )
        if probe_s is not None:
            deadline = min(deadline, time.monotonic() + probe_s)
        try:
            if not has_begun:
                # A probe has no time for a connection that may lead nowhere since.
                yield Connect(deadline, anew=is_probe)
                # A pool may have kept it waiting, which is no reason to doubt the connection.
                left_s = deadline - time.monotonic()
            try:
                in_time = deadline if is_probe else deadline - left_s / 2
                return (yield from _asking(trip, node, in_time))
            except (*LOST, ReadOnlyError) as error:
                if isinstance(error, ReadOnlyError):
                    node.leave()
                if is_probe or not is_mended_by_connecting(error):
                    raise
                yield Connect(deadline, anew=True)
                return (yield from _asking(trip, node, deadline))
        except (RedisError, OSError) as error:
            raise unavailable(error) from error


def blocking_read(wait: Wait) -> bytes:
    """Return the packed command that waits for a mailbox."""
    # A timeout of 0 would be for ever.
    return cast(bytes, _packed(("BLPOP", *wait.mailboxes, f"{max(wait.seconds, SHORTEST_S):.3f}")))


def checked(trip: Trip, replies: list[Any]) -> list[Any]:
    """Return the replies, or raise for the first that says that the store cannot.

    A record of the wrong type is damage to one session, and is left to the parser. So is a store
    that does not tell how many replicas have a write, for it has done the write, and figures that
    it does not take: they are written, where all else is read perhaps.

    Raises SessionStoreUnavailable.
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
            raise unavailable(reply) from reply
    return replies


def pack(trip: Sequence[Call], node: Node, *, by_source: bool = False) -> list[bytes]:
    """Return a trip to a node packed; ``by_source``: the node does not know the scripts."""
    packed = []
    command: tuple[Argument | bytes, ...]
    for script, keys, arguments in trip:
        if script is None:
            command = (*str(arguments[0]).split(), *keys, *arguments[1:])
        else:
            word, body = script.by_source if by_source else script.by_sha
            if not node.has_read_only_words:
                word = word.removesuffix("_RO")
            command = (word, body, len(keys), *keys, *arguments)
        # Not numbers: hiredis ends the process where a signal's exception meets it writing one.
        packed.append(_packed(tuple([str(w) if type(w) is int else w for w in command])))
    return packed


def is_clean(replies: Sequence[Any]) -> bool:
    """Return whether there is no error among a node's replies."""
    # No any(): a generator for each trip.
    for reply in replies:  # noqa: SIM110
        if isinstance(reply, Exception):
            return False
    return True


def _asking(trip: Trip, node: Node, deadline: float) -> Attempt:
    """Send a trip and return its replies; scripts that the store does not know go as source."""
    replies: list[Any] = yield Exchange(pack(trip, node), deadline)
    if is_clean(replies):
        return replies
    if any(map(_is_unknown_word, replies)):
        node.has_read_only_words = False
    if positions := _unknown(trip, replies):
        packed = pack([trip[at] for at in positions], node, by_source=True)
        again = yield Exchange(packed, deadline)
        for at, reply in zip(positions, again, strict=True):
            replies[at] = reply
    if isinstance(trip, Addressed):
        return replies
    for reply in replies:
        if isinstance(reply, ReadOnlyError):
            raise reply
    return checked(trip, replies)


def _unknown(trip: Trip, replies: Sequence[Any]) -> list[int]:
    """Return the places of the calls that are sent once more.

    Those are the scripts that the store does not know, or has no word for, and what comes after
    one, as it may build on it. Nothing builds on a passenger.
    """
    positions: list[int] = []
    builds = False
    for at, reply in enumerate(replies):
        is_unknown = isinstance(reply, NoScriptError) or _is_unknown_word(reply)
        if is_unknown or builds:
            positions.append(at)
        builds = builds or (is_unknown and not is_passenger(trip, at))
    return positions


def _is_unknown_word(reply: Any) -> bool:
    """Return whether the store has no command of its own for scripts that only read."""
    return isinstance(reply, ResponseError) and bool(_UNKNOWN_WORD.search(str(reply)))
