"""Add a node's counters to those that the store keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from django_clustered_sessions.protocol.effects import Call, Trip

from .script_calls import scripted

#: Silence after which the figures of a node join those of the former nodes, in ms.
SILENCE_MS: Final = 24 * 60 * 60 * 1000

#: Length of a slot of the history of the figures, in ms, and the number of slots kept: a day's.
SLOT_MS: Final = 5 * 60 * 1000

SLOTS: Final = 24 * 12


def stats(
    bucket: str,
    node: str,
    offset_ms: int,
    counts: Sequence[int | str],
    past: Sequence[tuple[int, Sequence[int]]] = (),
) -> Call:
    """Build ``lua/stats.lua``; ``"^3"`` among the counts: 3 at least, ``"v3"``: 3 at most.

    ``past`` are spans of time: the age of each, in ms, and the counts in it.
    """
    lines = (" ".join(map(str, (age_ms, *counted))) for age_ms, counted in past)
    return scripted(
        "stats",
        (f"{bucket}:figures", f"{bucket}:history"),
        node,
        offset_ms,
        SILENCE_MS,
        SLOT_MS,
        SLOTS,
        "\n".join(lines),
        *counts,
    )


def is_passenger(trip: Trip, at: int) -> bool:
    """Return whether a call of a trip is figures that ride along, without which it goes on."""
    script = trip[at].script
    return at == 0 and len(trip) > 1 and script is not None and script.name == "stats"


def bucket_beside(trip: Trip) -> str:
    """Return the start of the keys of the bucket that a trip goes to."""
    return trip[0].keys[0].rpartition(":")[0]
