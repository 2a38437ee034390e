"""Size of a trip to the buckets, and the substitute for damaged replies."""

from __future__ import annotations

from typing import Any, Final

from django_clustered_sessions.protocol.record import Damaged

#: Buckets, pages of an index, or sessions read on one round trip.
PER_TRIP: Final = 64


def undamaged(reply: Any, instead: Any) -> Any:
    """Return a reply, or ``instead`` if the key has another type."""
    return instead if isinstance(reply, Damaged) else reply
