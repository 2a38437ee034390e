"""Write sessions with the key that writes now, bucket by bucket."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Final, NamedTuple

from .commands import records
from .commands.script_calls import CLOCK
from .effects import Flow, batches, plain
from .record import ID_LENGTH, Damaged, Loaded, NewerFormat, bucket_tag
from .sealing import Seal
from .user_index import places_of

#: Sessions that are read on one round trip.
_PER_TRIP: Final = 100


class Rekeyed(NamedTuple):
    """Numbers of sessions: all of them, and those that were written anew or are to be.

    ``fields`` is the number of fields written in these, ``unopened`` that of fields that no key
    opens; ``skipped`` that of sessions of a newer release.
    """

    sessions: int = 0
    renewed: int = 0
    fields: int = 0
    unopened: int = 0
    skipped: int = 0

    def plus(self, other: Rekeyed) -> Rekeyed:
        """Return the sums."""
        return Rekeyed(*map(sum, zip(self, other, strict=True)))


def rekey(
    prefix: str, bucket: int, seal_of: Callable[[str, bytes], Seal], *, is_dry: bool
) -> Flow[Rekeyed]:
    """Write the sessions of a bucket anew that another key has written, or none.

    ``prefix`` is the setting KEY_PREFIX; ``seal_of`` returns the seal of a public id and a past.
    ``is_dry``: change nothing, count only.

    Raises SessionStoreUnavailable.
    """
    (members,) = yield (plain("ZRANGE", 0, -1, key=f"{bucket_tag(prefix, bucket)}:index"),)
    ids = () if isinstance(members, Damaged) else (member[:ID_LENGTH] for member in members)
    done = Rekeyed()
    for some in batches(places_of(prefix, ids).values(), _PER_TRIP):
        *replies, clock = yield (*(plain("HGETALL", key=keys.record) for keys in some), CLOCK)
        calls = []
        for keys, reply in zip(some, replies, strict=True):
            try:
                found = Loaded.parse(_fields(reply, clock))
            except NewerFormat:
                done = done.plus(Rekeyed(sessions=1, skipped=1))
                continue
            except Damaged:
                continue
            if isinstance(found, Loaded):
                renewed = seal_of(keys.id, found.past).renewed(found)
                done = done.plus(Rekeyed(sessions=1, unopened=renewed.unopened))
                if renewed.fields:
                    calls.append((records.rekey(keys, renewed.fields), len(renewed.fields)))
        if is_dry or not calls:
            done = done.plus(Rekeyed(renewed=len(calls), fields=sum(count for _, count in calls)))
            continue
        for reply in (yield tuple(call for call, _ in calls)):
            with suppress(NewerFormat):
                done = done.plus(Rekeyed(renewed=1, fields=records.parse_rekey(reply)))
    return done


def _fields(reply: object, clock: object) -> dict[bytes, bytes]:
    fields, _ = records.parse_read((reply, clock))
    if not isinstance(fields, dict):
        raise Damaged("its record is no hash")
    return fields
