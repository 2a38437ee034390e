"""How what a process counts gets into the store: along with a trip, and at the process's end."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Sequence
from typing import Final, TypeVar

from django.core.exceptions import ImproperlyConfigured

from . import commands, connections, drivers, flows
from .commands import Call, Flow, Trip
from .conf import conf
from .counters import MAXIMA, NAMES, counters
from .drivers import Budget
from .exceptions import SessionStoreUnavailable
from .record import bucket_tag

T = TypeVar("T")

logger = logging.getLogger("django_clustered_sessions")

#: What a process gives the store at its end, in seconds.
_LAST_BUDGET_S: Final = 0.5


class Report:
    """The figures that ride along with one flow's first trip, if they are due."""

    def __init__(self) -> None:
        self._counts: Sequence[int] = ()

    def board(self, trip: Trip) -> Call | None:
        """Return the call that is to ride along, or None."""
        self._counts = counters.take()
        return _call(commands.figures_beside(trip), self._counts) if self._counts else None

    def lost(self) -> None:
        """Keep the figures for another trip."""
        counters.put_back(self._counts)
        self._counts = ()


def reporting(flow: Flow[T]) -> Flow[T]:
    """Return the flow, with the figures on its first trip if they are due."""
    return flows.riding(flow, Report()) if counters.are_due else flow


def report_the_rest() -> None:
    """Send what no trip has taken along; a store that is away then does without."""
    counts = counters.take(now=True)
    if counts:
        call = _call(f"{bucket_tag(conf.key_prefix, 0)}:figures", counts)
        try:
            drivers.run(_send(call), connections.pool, Budget(_LAST_BUDGET_S))
        except (SessionStoreUnavailable, ImproperlyConfigured) as error:
            logger.debug("the last figures of this process are lost: %s", error)


def _call(figures: str, counts: Sequence[int]) -> Call:
    marked = [f"^{n}" if name in MAXIMA else n for name, n in zip(NAMES, counts, strict=True)]
    return commands.stats(figures, conf.node_name, counters.clock_offset_ms, marked)


def _send(call: Call) -> Flow[None]:
    yield (call,)


atexit.register(report_the_rest)
