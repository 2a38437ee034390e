"""Cluster statistics for Prometheus: a collector for ``prometheus_client``.

Needs the extra ``prometheus``. The statistics come from the store and cover all nodes and
processes, so scrape one process only: each would export the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from .exceptions import SessionStoreUnavailable
from .monitoring import collect, metrics
from .monitoring.statistics import Statistics

#: Sessions measured in a scrape, to estimate the memory of all.
SAMPLE = 100


class SessionCollector(Collector):
    """Collector that asks the store at each scrape; during an outage it exports ``store_up`` alone.

    ``registry.register(SessionCollector())``. Synchronous: do not call it on an event loop.
    """

    def describe(self) -> Iterable[Metric]:
        """Return nothing, so that registering it does not ask the store."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield the current metrics."""
        try:
            figures = collect.figures(SAMPLE)
        except SessionStoreUnavailable:
            yield _up(False)
        else:
            yield _up(True)
            yield from metrics_of(figures)


def metrics_of(figures: Statistics) -> Iterator[Metric]:
    """Yield the metrics of the statistics."""
    for family in metrics.families():
        if family.kind == "histogram":
            histogram = HistogramMetricFamily(family.name, family.help, labels=family.labels)
            for sample in family.samples(figures):
                histogram.add_metric(sample.labels, sample.classes, sample.number)
            yield histogram
        else:
            kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
            metric = kind(family.name, family.help, labels=family.labels)
            for sample in family.samples(figures):
                metric.add_metric(sample.labels, sample.number)
            yield metric


def text(figures: Statistics) -> str:
    """Return the statistics in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_FixedCollector(figures))
    return generate_latest(registry).decode()


class _FixedCollector(Collector):
    def __init__(self, figures: Statistics) -> None:
        self._figures = figures

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        yield _up(True)
        yield from metrics_of(self._figures)


def _up(is_up: bool) -> Metric:
    name = f"{metrics.PREFIX}_store_up"
    return GaugeMetricFamily(name, "1 if the store answered, else 0.", value=int(is_up))
