"""How much is asked on a trip to the buckets, and what stands in for an answer that is damage."""

from __future__ import annotations

from typing import Any, Final

from django_clustered_sessions.protocol.record import Damaged

#: Buckets, pages of an index, or sessions that one trip asks for.
PER_TRIP: Final = 64


def undamaged(reply: Any, instead: Any) -> Any:
    """Return a reply, or something else instead of damage: a key of another type."""
    return instead if isinstance(reply, Damaged) else reply
