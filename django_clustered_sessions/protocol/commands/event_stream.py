"""Read and trim the streams of events, and sweep expired sessions out of the indexes."""

from __future__ import annotations

from typing import Any

from django_clustered_sessions.protocol.effects import Call, Trip, plain
from django_clustered_sessions.protocol.options import kept_per_bucket
from django_clustered_sessions.protocol.record import bucket_tag

from .script_calls import Status, parse, scripted


def events_waiting(prefix: str, bucket: int) -> Call:
    """Ask how many events of a bucket are not finished."""
    return plain("XLEN", key=_events(prefix, bucket))


def take(prefix: str, bucket: int, most: int, lease_ms: int) -> Call:
    """Build ``lua/take.lua``: take at most so many events of a bucket, to be finished in time."""
    return scripted("take", (_events(prefix, bucket),), most, lease_ms)


def parse_take(reply: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Read the reply of ``take``: each event's id in the stream, and its fields."""
    status, _, rest = parse(reply)
    taken = []
    for entry, flat in rest if status is Status.DONE else ():
        words = iter(flat)
        taken.append((entry, dict(zip(words, words, strict=True))))
    return taken


def finish(prefix: str, bucket: int, entry: bytes) -> Trip:
    """Remove an event that was handled.

    In this order: an entry that is acknowledged and not deleted would stay for ever.
    """
    key = _events(prefix, bucket)
    return plain("XDEL", entry, key=key), plain("XACK", "workers", entry, key=key)


def give_back(prefix: str, bucket: int, entry: bytes, lease_ms: int) -> Call:
    """Give back an event that was not handled: the next worker may take it."""
    claim = ("workers", "worker", 0, entry, "IDLE", lease_ms, "JUSTID")
    return plain("XCLAIM", *claim, key=_events(prefix, bucket))


def sweep(prefix: str, bucket: int, events_kept: int) -> Call:
    """Build ``lua/sweep.lua`` for one bucket under the setting KEY_PREFIX.

    ``events_kept`` as in WriteOptions.
    """
    tag = bucket_tag(prefix, bucket)
    keys = (f"{tag}:index", f"{tag}:users", f"{tag}:events")
    return scripted("sweep", keys, kept_per_bucket(events_kept))


def parse_sweep(reply: Any) -> int:
    """Return how many sessions have left a bucket's index."""
    status, _, rest = parse(reply)
    return rest[0] if status is Status.DONE else 0


def _events(prefix: str, bucket: int) -> str:
    return f"{bucket_tag(prefix, bucket)}:events"
