"""Cluster statistics for OpenTelemetry: observable instruments of ``opentelemetry-api``.

Needs the extra ``opentelemetry``. The statistics come from the store and cover all nodes, so let
only one of a site's processes call ``instrument()``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Final

from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation, get_meter_provider

from . import __version__
from .exceptions import SessionStoreUnavailable
from .monitoring import collect, metrics
from .monitoring.metrics import Family
from .monitoring.statistics import Statistics

logger = logging.getLogger("django_clustered_sessions")

#: Sessions measured in a collection, to estimate the memory of all.
SAMPLE: Final = 100

#: Greatest age of statistics in seconds, so that one collection asks the store once.
_FRESH_S: Final = 1.0

_UNITS: Final = {"seconds": "s", "bytes": "By", "": "1"}


def instrument(provider: MeterProvider | None = None) -> None:
    """Register an instrument for each metric with a provider, the global one if None.

    While the store is away, ``store_up`` is 0 and the others have no values.
    """
    provider = provider or get_meter_provider()
    meter = provider.get_meter("django_clustered_sessions", __version__)
    latest = _Latest()
    meter.create_observable_gauge(
        f"{metrics.PREFIX}.store_up",
        [lambda options: [Observation(int(latest.figures() is not None))]],
        description="1 if the store answered, else 0.",
    )
    for family in metrics.families():
        for name, kind, observe in _instruments(family):
            create = (
                meter.create_observable_counter
                if kind == "counter"
                else meter.create_observable_gauge
            )
            create(
                name,
                [partial(_observed, latest, observe)],
                unit="1" if name.endswith(".count") else _UNITS[family.unit],
                description=family.help,
            )


Observe = Callable[[Statistics], Iterable[Observation]]


def _instruments(family: Family) -> Iterator[tuple[str, str, Observe]]:
    """Yield name, kind and numbers. OpenTelemetry names have dots and no units."""
    name = f"{metrics.PREFIX}.{family.name.removeprefix(metrics.PREFIX)[1:]}"
    if family.unit:
        name = name.removesuffix(f"_{family.unit}")
    if family.kind != "histogram":
        yield name, family.kind, partial(_numbers, family)
        return
    # OpenTelemetry has no observable histogram.
    yield f"{name}.count", "counter", partial(_counts, family)
    yield f"{name}.sum", "counter", partial(_numbers, family)


def _numbers(family: Family, figures: Statistics) -> Iterator[Observation]:
    for sample in family.samples(figures):
        yield Observation(sample.number, dict(zip(family.labels, sample.labels, strict=True)))


def _counts(family: Family, figures: Statistics) -> Iterator[Observation]:
    for sample in family.samples(figures):
        _, count = sample.classes[-1]
        yield Observation(count, dict(zip(family.labels, sample.labels, strict=True)))


def _observed(latest: _Latest, observe: Observe, options: CallbackOptions) -> list[Observation]:
    figures = latest.figures()
    return [] if figures is None else list(observe(figures))


class _Latest:
    """Current statistics, collected once for all instruments of a collection."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked_at = float("-inf")
        self._figures: Statistics | None = None

    def figures(self) -> Statistics | None:
        """Return the statistics, None while the store is away."""
        with self._lock:
            if time.monotonic() - self._asked_at > _FRESH_S:
                try:
                    self._figures = collect.figures(SAMPLE)
                except SessionStoreUnavailable as error:
                    logger.debug("no figures: %s", error)
                    self._figures = None
                self._asked_at = time.monotonic()
            return self._figures
