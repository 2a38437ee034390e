"""The cluster's figures for Prometheus: a collector for ``prometheus_client``.

Needs the extra ``prometheus``. The figures come from the store, so one process that is scraped
tells of all nodes and all their processes, and each would tell the same.
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

#: How many sessions a scrape measures, for the memory of all.
SAMPLE = 100


class SessionCollector(Collector):
    """Asks the store at each scrape; while it is away, tells that alone.

    ``registry.register(SessionCollector())``. Synchronous: not on an event loop.
    """

    def describe(self) -> Iterable[Metric]:
        """Return nothing: to be registered it need not be asked, so the store may be away."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of now."""
        try:
            figures = collect.figures(SAMPLE)
        except SessionStoreUnavailable:
            yield _up(False)
        else:
            yield _up(True)
            yield from told(figures)


def told(figures: Statistics) -> Iterator[Metric]:
    """Yield the metrics that figures make."""
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
    """Return the figures in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Told(figures))
    return generate_latest(registry).decode()


class _Told(Collector):
    def __init__(self, figures: Statistics) -> None:
        self._figures = figures

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        yield _up(True)
        yield from told(self._figures)


def _up(is_up: bool) -> Metric:
    name = f"{metrics.PREFIX}_store_up"
    return GaugeMetricFamily(name, "Whether the store answered.", value=int(is_up))
