"""Wait until replicas or disks have a write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from django_clustered_sessions.protocol.effects import Call, Trip, plain
from django_clustered_sessions.protocol.options import SyncOptions
from django_clustered_sessions.protocol.results import Acknowledged

from .script_calls import CLOCK, Status, milliseconds

#: Writes that users rely on. A renewed deadline is none.
_RELIED_ON: Final = frozenset({"create", "commit", "rotate", "leave", "end"})

#: Index of the argument by which a touch is written in any case.
_ALWAYS: Final = 1


def relied_on(trip: Trip) -> int | None:
    """Return the place in a trip of a write that users rely on, None where there is none."""
    return next((at for at, call in enumerate(trip) if _is_relied_on(call)), None)


def _is_relied_on(call: Call) -> bool:
    name = call.script.name if call.script else ""
    return name in _RELIED_ON or (name == "touch" and call.arguments[_ALWAYS] == 1)


def acknowledge(sync: SyncOptions) -> Trip:
    """Ask how many replicas have this connection's writes, and then for the store's clock.

    Both go behind the write on its own trip: WAIT in a script is refused, and on another
    connection it asks about other writes.
    """
    if sync.fsync:
        wait = plain("WAITAOF", 1, sync.replicas, sync.timeout_ms)
    else:
        wait = plain("WAIT", sync.replicas, sync.timeout_ms)
    return wait, CLOCK


def parse_acknowledged(write: Call, reply: Any, waited: Any, clock: Any) -> Acknowledged | None:
    """Read the replies to a write and to ``acknowledge``; None where nothing was written."""
    if isinstance(reply, Exception) or not _has_written(write, reply):
        return None
    after_ms = milliseconds(clock) - reply[1]
    if isinstance(waited, Exception):
        return Acknowledged(0, False, after_ms, str(waited))
    on_disk, replicas = waited if isinstance(waited, list) else (0, waited)
    return Acknowledged(replicas, bool(on_disk), after_ms)


def _has_written(write: Call, reply: Sequence[Any]) -> bool:
    if reply[0] == Status.DONE:
        return True
    # A session that was ended before: its tombstone is written again.
    ends = write.script is not None and write.script.name == "end"
    return ends and reply[0] == Status.GONE and reply[2] != b""


def is_acknowledgement(call: Call) -> bool:
    """Return whether a call is WAIT or WAITAOF: an error in reply says nothing of the write."""
    return call.script is None and call.arguments[0] in ("WAIT", "WAITAOF")
