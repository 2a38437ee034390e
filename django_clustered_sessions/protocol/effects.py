"""The steps that a flow may yield, and the replies that its drivers send. Pure.

A *trip* is a tuple of calls that go to the store together and come back together: one round trip.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from .scripts import Script

T = TypeVar("T")

Argument = bytes | str | int


class Call(NamedTuple):
    """A command of a trip: a script with its keys, or a plain command (``script`` None)."""

    script: Script | None
    keys: tuple[str, ...]
    arguments: tuple[Argument, ...]


def plain(*words: Argument, key: str | None = None) -> Call:
    """Return a plain command, with the key behind its first word."""
    return Call(None, () if key is None else (key,), words)


Trip = tuple[Call, ...]


class Everywhere(Trip):
    """A call to each primary of the store, without keys; its replies are one of each."""


@dataclass(frozen=True, slots=True)
class Wait:
    """A blocking read of the lists ``mailboxes``; its reply is True if there was something in one.

    None where the read failed, long before its time perhaps.
    """

    mailboxes: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Pause:
    """A time without a question to the store."""

    seconds: float


@dataclass(frozen=True, slots=True)
class OutsideCall:
    """A call to another system than the store, and its native async twin.

    Without a twin the call is made in a thread. The reply is its result, or its exception.
    """

    call: Callable[[], Any]
    twin: Callable[[], Awaitable[Any]] | None = None


#: A step that goes to the store.
Asks = Trip | Wait

#: Any step of a flow.
Step = Trip | Wait | Pause | OutsideCall

#: An operation as a generator: it yields a step, and is sent the reply.
Flow = Generator[Step, Any, T]


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of ``size``, the last one shorter."""
    upcoming = iter(items)
    while batch := list(islice(upcoming, size)):
        yield batch
