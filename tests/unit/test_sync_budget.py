"""Time that a write waits for replicas, of the time that its request has left."""

from __future__ import annotations

from typing import Any

import pytest

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.protocol.effects import Flow
from django_clustered_sessions.session.replication import wanted
from django_clustered_sessions.store.budget import Budget


@pytest.mark.parametrize(("left_s", "waits_ms"), [(4.0, 1600), (2.0, 800), (0.1, 40), (0.0, 1)])
def test_wait_for_replicas_fits_into_what_is_left(
    settings: Any, left_s: float, waits_ms: int
) -> None:
    settings.CLUSTERED_SESSIONS_SYNC_REPLICAS = 1
    sync = wanted(Budget(left_s))
    assert sync is not None
    assert sync.timeout_ms == waits_ms


def test_operation_inside_another_leaves_that_ones_budget() -> None:
    session = SessionStore()

    def inner() -> Flow[Budget | None]:
        return session.state.operation_budget
        yield ()

    def outer() -> Flow[tuple[Budget | None, Budget | None]]:
        return session.run(inner(), "aget()", its), session.state.operation_budget
        yield ()

    its, own = Budget(0.0), Budget(2.0)
    assert session.run(outer(), "aget()", own) == (its, own)
    assert session.state.operation_budget is None
