"""Run a flow over this process's connections: pools, budget and riding figures, said once.

What a process counts rides on the first trip of a flow when it is due, and leaves at the
process's end otherwise.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Sequence
from typing import Final, TypeVar

from django.core.exceptions import ImproperlyConfigured

from django_clustered_sessions.conf import conf
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.monitoring.counters import MAXIMA, MINIMA, NAMES, Past, counters
from django_clustered_sessions.protocol import riders
from django_clustered_sessions.protocol.commands import statistics
from django_clustered_sessions.protocol.effects import Call, Flow, Step, Trip
from django_clustered_sessions.protocol.record import bucket_tag

from . import connections, drivers
from .budget import Budget, PerTrip

T = TypeVar("T")

logger = logging.getLogger("django_clustered_sessions")

#: Seconds that a process gives the store at its end.
_LAST_BUDGET_S: Final = 0.5


def run(flow: Flow[T], budget: Budget | None = None) -> T:
    """Run a flow synchronously; without a ``budget`` each trip has STORE_TIMEOUT.

    Raises SessionStoreUnavailable, and what the flow raises.
    """
    try:
        step: Step | None = next(flow)
    except StopIteration as stop:
        # Nothing to ask: so it is with most of the requests' ends.
        return stop.value  # type: ignore[no-any-return]
    budget = budget or PerTrip(conf.store_timeout)
    if counters.are_due:
        flow, step = riders.riding(flow, Figures(), step), None
    return drivers.run(flow, connections.pool, budget, connections.waiting_pool, step)


async def arun(flow: Flow[T], budget: Budget | None = None) -> T:
    """See run()."""
    try:
        step: Step | None = next(flow)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    budget = budget or PerTrip(conf.store_timeout)
    if counters.are_due:
        flow, step = riders.riding(flow, Figures(), step), None
    return await drivers.arun(flow, connections.apool, budget, connections.awaiting_pool, step)


def report_the_rest() -> None:
    """Send what no trip has taken along; a store that is away then does without."""
    counts = counters.drain(now=True)
    if counts:
        past = counters.drain_past(now=True)
        call = _call(bucket_tag(conf.key_prefix, 0), counts, past)
        try:
            drivers.run(_send(call), connections.pool, Budget(_LAST_BUDGET_S))
        except (SessionStoreUnavailable, ImproperlyConfigured) as error:
            logger.debug("the last figures of this process are lost: %s", error)


class Figures:
    """The figures that ride along with one flow's first trip: see `riders.Rider`."""

    def __init__(self) -> None:
        self._counts: Sequence[int] = ()
        self._past: Sequence[Past] = ()

    def board(self, trip: Trip) -> Call | None:
        """Return the call that is to ride along, or None."""
        if type(trip) is not tuple or not trip[0].keys:
            # It goes to no bucket.
            return None
        self._counts = counters.drain()
        if not self._counts:
            return None
        self._past = counters.drain_past()
        return _call(statistics.bucket_beside(trip), self._counts, self._past)

    def lost(self) -> None:
        """Keep the figures for another trip."""
        counters.put_back(self._counts)
        counters.put_back_past(self._past)
        self._counts, self._past = (), ()


def _call(bucket: str, counts: Sequence[int], past: Sequence[Past]) -> Call:
    marks = dict.fromkeys(MAXIMA, "^") | dict.fromkeys(MINIMA, "v")
    marked = [
        f"{marks[name]}{n}" if name in marks else n for name, n in zip(NAMES, counts, strict=True)
    ]
    return statistics.stats(bucket, conf.node_name, counters.clock_offset_ms, marked, past)


def _send(call: Call) -> Flow[None]:
    yield (call,)


atexit.register(report_the_rest)
