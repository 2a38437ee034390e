"""How what a process counts gets into the store: along with a trip, and at the process's end."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Sequence
from typing import Final, TypeVar

from django.core.exceptions import ImproperlyConfigured

from django_clustered_sessions.conf import conf
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.monitoring.counters import MAXIMA, MINIMA, NAMES, Past, counters
from django_clustered_sessions.protocol import commands, flows
from django_clustered_sessions.protocol.effects import Call, Flow, Trip
from django_clustered_sessions.protocol.record import bucket_tag
from django_clustered_sessions.store import connections, drivers
from django_clustered_sessions.store.budget import Budget

T = TypeVar("T")

logger = logging.getLogger("django_clustered_sessions")

#: What a process gives the store at its end, in seconds.
_LAST_BUDGET_S: Final = 0.5


class Report:
    """The figures that ride along with one flow's first trip, if they are due."""

    def __init__(self) -> None:
        self._counts: Sequence[int] = ()
        self._past: Sequence[Past] = ()

    def board(self, trip: Trip) -> Call | None:
        """Return the call that is to ride along, or None."""
        self._counts = counters.take()
        if not self._counts:
            return None
        self._past = counters.take_past()
        return _call(commands.bucket_beside(trip), self._counts, self._past)

    def lost(self) -> None:
        """Keep the figures for another trip."""
        counters.put_back(self._counts)
        counters.put_back_past(self._past)
        self._counts, self._past = (), ()


def reporting(flow: Flow[T]) -> Flow[T]:
    """Return the flow, with the figures on its first trip if they are due."""
    return flows.riding(flow, Report()) if counters.are_due else flow


def report_the_rest() -> None:
    """Send what no trip has taken along; a store that is away then does without."""
    counts = counters.take(now=True)
    if counts:
        past = counters.take_past(now=True)
        call = _call(bucket_tag(conf.key_prefix, 0), counts, past)
        try:
            drivers.run(_send(call), connections.pool, Budget(_LAST_BUDGET_S))
        except (SessionStoreUnavailable, ImproperlyConfigured) as error:
            logger.debug("the last figures of this process are lost: %s", error)


def _call(bucket: str, counts: Sequence[int], past: Sequence[Past]) -> Call:
    marks = dict.fromkeys(MAXIMA, "^") | dict.fromkeys(MINIMA, "v")
    marked = [
        f"{marks[name]}{n}" if name in marks else n for name, n in zip(NAMES, counts, strict=True)
    ]
    return commands.stats(bucket, conf.node_name, counters.clock_offset_ms, marked, past)


def _send(call: Call) -> Flow[None]:
    yield (call,)


atexit.register(report_the_rest)
