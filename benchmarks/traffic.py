"""Round trips and bytes of one request, counted by a proxy, and statements to the database."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from .engines import Engine, Requests
from .scenarios import Scenario


class Traffic(NamedTuple):
    """Medians of some requests: round trips to store and database, bytes to and from the store."""

    trips: int
    bytes_sent: int
    bytes_received: int


def count(engine: Engine, scenario: Scenario, proxy: Any, requests: int) -> Traffic:
    """Count what requests of one engine and scenario cost, on warm connections.

    The engine has to be pointed at the proxy. A cold read's near cache is emptied before each.
    """
    from django.db import connection
    from django.test.utils import CaptureQueriesContext

    from django_clustered_sessions.session.renewals import renew_the_rest

    # As many sessions as requests, so that each is seen a second time in the second half.
    subject = Requests(engine, scenario, requests)
    for request in subject.prepare(requests):
        subject.run(request)
    counts = []
    for _ in range(requests):
        (request,) = subject.prepare(1)
        # Those of earlier requests would leave at any moment.
        renew_the_rest()
        proxy.reset()
        with CaptureQueriesContext(connection) as queries:
            subject.run(request)
        counts.append((proxy.round_trips + len(queries), proxy.bytes_sent, proxy.bytes_received))
    trips, sent, received = (int(statistics.median(each)) for each in zip(*counts, strict=True))
    return Traffic(trips, sent, received)
