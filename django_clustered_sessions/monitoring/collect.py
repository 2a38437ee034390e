"""Collection of the cluster's statistics from the store and each of its servers."""

from __future__ import annotations

import time
from random import Random
from typing import TypeVar

from django_clustered_sessions.conf import conf
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.protocol.effects import Flow
from django_clustered_sessions.store import connections, drivers, runner
from django_clustered_sessions.store.budget import Budget

from . import server_info, statistics
from .server_info import Clock, Primary, StoreFacts
from .statistics import Statistics

T = TypeVar("T")


def figures(
    sample: int | None = 1000,
    *,
    top_users: int = 0,
    progress: statistics.Progress = lambda done, of: None,
) -> Statistics:
    """Return the current statistics, as ``manage.py sessionstats`` shows them.

    ``sample`` sessions are measured, chosen evenly; with None all, which is slow. ``progress`` is
    called with the numbers measured and to measure. ``top_users`` is the number of users with most
    sessions to count.

    Raises SessionStoreUnavailable.
    """
    # Include the counts of this process, which otherwise wait for the next due report.
    runner.report_the_rest()
    found = runner.run(
        statistics.collect(
            conf.key_prefix,
            time.time,
            sample=sample,
            random=Random(),
            top_users=top_users,
            progress=progress,
        )
    )
    found.primaries = _primaries(found.store)
    for one in found.primaries:
        for replica in one.replicas or ():
            replica.clock = _clock((replica.host, replica.port))
    if (watcher := connections.watcher()) is not None:
        found.sentinels = server_info.sentinels(watcher.service, watcher.survey())
    return found


def _primaries(store: StoreFacts) -> list[Primary]:
    """Return the primary, or all primaries of a cluster, each as it describes itself."""
    nodes = connections.nodes()
    if not nodes:
        return [server_info.primary(connections.address(), store)]
    found = []
    for node, slots in nodes.items():
        facts = _ask(node, server_info.store_facts(time.time))
        one = server_info.primary(f"{node.host}:{node.port}", facts)
        one.slots = slots
        found.append(one)
    return found


def _clock(replica: tuple[str, int]) -> Clock | None:
    """Ask a replica for its time; return None if it is unreachable from this node."""
    try:
        return _ask(replica, server_info.clock(time.time))
    except SessionStoreUnavailable:
        return None


def _ask(server: tuple[str, int], flow: Flow[T]) -> T:
    """Run a flow on one server of several."""
    pool = connections.pool_at(server)
    try:
        return drivers.run(flow, lambda step: pool, Budget(conf.store_timeout))
    finally:
        pool.disconnect()
