"""The meaning of redis-py's errors: repeat or not, away or not, and the advice. Pure."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any, Final, cast

from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    MaxConnectionsError,
    NoPermissionError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.sentinel import MasterNotFoundError

from django_clustered_sessions.exceptions import SessionStoreUnavailable

#: The advice to a site's operator, by an error reply's first word.
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

#: The first word of a reply that redis-py 6 cuts off when it makes an error of it, by what is left:
#: the error's class, or the beginning of its text. Of an exchange ``refusal`` keeps it; these are
#: errors of redis-py's greeting.
_CUT_OFF: Final[dict[type[Exception], str]] = {
    BusyLoadingError: "LOADING",
    NoPermissionError: "NOPERM",
}
_CUT_OFF_AUTHENTICATION: Final = {"Authentication": "NOAUTH", "invalid": "WRONGPASS"}

#: Of these, the ones by which a store says that it cannot answer anybody.
_NOT_READY: Final = frozenset({"LOADING", "CLUSTERDOWN", "MASTERDOWN", "BUSY"})

#: The least that a store is given to answer, in seconds: 0 would mean not to wait at all.
SHORTEST_S: Final = 0.001

#: redis-py's errors for a trip that did not get through. Its TimeoutError is none of Python's.
LOST: Final = (ConnectionError, TimeoutError, builtins.TimeoutError)


class SentinelsSlow(MasterNotFoundError):
    """The Sentinels have not answered yet; nothing is known of the primary by that."""


class AllLent(MaxConnectionsError):
    """This process has no connection to spare; nothing is known of the store by that."""

    def __init__(self, most: int) -> None:
        super().__init__(
            f"all {most} connections of this process are lent: raise max_connections in the "
            "sessions' CACHES entry"
        )


def is_lost(error: BaseException | None) -> bool:
    """Return whether it is unknown if the store has done what it was asked.

    redis-py derives refusals, such as LOADING or a wrong password, from the same classes.
    """
    return type(error) in LOST


def is_mended_by_connecting(error: Exception) -> bool:
    """Return whether a fresh connection may help: no reply, or one by what is no primary now."""
    plain = _plain(error)
    return is_lost(plain) or isinstance(plain, ReadOnlyError)


def refusal(parse: Callable[[str], Exception], text: str) -> Exception:
    """Return the error that a reply is; ``parse`` is redis-py's."""
    try:
        error: Any = parse(text)
    except ValueError:
        # As of a MOVED without an address.
        return ResponseError(text)
    if getattr(error, "status_code", None) is None:
        error.status_code = text.partition(" ")[0]
    return cast(Exception, error)


def unavailable(error: Exception) -> SessionStoreUnavailable:
    """Return the SessionStoreUnavailable for an error of redis-py or of a socket."""
    error = _plain(error)
    text = str(error) or "no reply in time"
    word = _word(error, text)
    answers = isinstance(error, ResponseError | AuthenticationError)
    if advice := _ADVICE.get(word):
        found = SessionStoreUnavailable(
            f"the session store refused: {advice} ({word}: {text.removeprefix(f'{word} ')})"
        )
        found.is_away = word in _NOT_READY
    else:
        happened = "refused" if answers else "does not answer"
        found = SessionStoreUnavailable(f"the session store {happened}: {text}")
        found.is_away = not answers
    if isinstance(error, MaxConnectionsError | SentinelsSlow):
        found.is_away = None
    return found


def _word(error: Exception, text: str) -> str:
    """Return the first word of the reply that an error was."""
    word: str | None = getattr(error, "status_code", None) or _CUT_OFF.get(type(error))
    first = text.partition(" ")[0]
    if isinstance(error, AuthenticationError) and word is None:
        word = _CUT_OFF_AUTHENTICATION.get(first)
    # Of what has no code of its own, the first word says what it is about.
    return first if word in (None, "ERR") else word


def _plain(error: Exception) -> Exception:
    """Return what happened: redis-py wraps a refusal while it connects asynchronously."""
    return error.__cause__ if isinstance(error.__cause__, RedisError) else error
