"""Build a script's call and read the head of its reply; ask the store for its clock.

Times are ms; a reply's first two items are its status and the store's clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, Final

from django_clustered_sessions.protocol.effects import Argument, Call, plain
from django_clustered_sessions.protocol.record import Damaged, NewerFormat
from django_clustered_sessions.protocol.scripts import script


class Status(IntEnum):
    """First item of each script's reply, as ``lua/prelude.lua`` has it."""

    DONE = 1
    GONE = 0
    EXISTS = -1
    CONFLICT = -2
    TOO_LARGE = -3
    NEWER = -4
    INSIDE = 2
    HELD = -5
    FULL = -6
    LOST = -7


_STATUSES: Final = {status.value: status for status in Status}


def scripted(name: str, keys: Iterable[str], *arguments: Argument) -> Call:
    """Return a call of ``lua/<name>.lua``."""
    return Call(script(name), tuple(keys), arguments)


def parse(reply: Any) -> tuple[Status, int, list[Any]]:
    """Return a reply's status, the store's clock in ms, and the other items; damage is GONE.

    Raises NewerFormat.
    """
    if isinstance(reply, Damaged):
        return Status.GONE, 0, [b""]
    if isinstance(reply, Exception):
        raise reply
    status, now_ms, *rest = reply
    if status == Status.NEWER:
        raise NewerFormat
    return _STATUSES[status], now_ms, rest


def whole(reply: Any) -> Any:
    """Return a reply, or raise the exception that stands in its place."""
    if isinstance(reply, Exception):
        raise reply
    return reply


#: Asks for the store's clock; ``milliseconds`` reads the reply.
CLOCK: Final = plain("TIME")


def milliseconds(clock: Sequence[bytes]) -> int:
    """Return the reply to TIME in ms."""
    seconds, microseconds = clock
    return int(seconds) * 1000 + int(microseconds) // 1000
