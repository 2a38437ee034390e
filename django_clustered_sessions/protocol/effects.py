"""What a flow may ask for, step by step, and what its drivers send back. Pure.

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
    """One command of a trip: a script with its keys, or a plain command (``script`` None)."""

    script: Script | None
    keys: tuple[str, ...]
    arguments: tuple[Argument, ...]


def plain(*words: Argument, key: str | None = None) -> Call:
    """Return a plain command, with the key behind its first word."""
    return Call(None, () if key is None else (key,), words)


Trip = tuple[Call, ...]


class Everywhere(Trip):
    """One call to each primary of the store, without keys; its replies are one of each."""


@dataclass(frozen=True, slots=True)
class Wait:
    """A blocking read of the list ``mailbox``; its reply is whether there was something in it.

    None where the read failed, long before its time perhaps.
    """

    mailbox: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Pause:
    """A time in which nothing is asked."""

    seconds: float


@dataclass(frozen=True, slots=True)
class OutsideCall:
    """Something that is asked of another than the store, as a call and as its native async twin.

    Without a twin the call is made in a thread. The reply is what it returns, or the exception.
    """

    call: Callable[[], Any]
    twin: Callable[[], Awaitable[Any]] | None = None


#: What a flow asks of a store.
Asks = Trip | Wait

#: What a flow asks, or how long it waits.
Step = Trip | Wait | Pause | OutsideCall

#: An operation as a generator: it yields a step, and is sent the reply.
Flow = Generator[Step, Any, T]


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of ``size``, the last one of what is left."""
    upcoming = iter(items)
    while batch := list(islice(upcoming, size)):
        yield batch
