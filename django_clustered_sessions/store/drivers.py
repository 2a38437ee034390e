"""The only two loops that run a flow: one synchronously, one asynchronously."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from asgiref.sync import sync_to_async

from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol.effects import (
    Asks,
    Flow,
    OutsideCall,
    Pause,
    Step,
    Trip,
    Wait,
)

from .attempt import blocking_read, checked
from .budget import Budget
from .cluster import Addressed, Nodes
from .exchange import aread_alone, cancellations, heed, perform, read_alone
from .pools import AsyncPool, Pool
from .sharing import aperform

T = TypeVar("T")

#: Seconds that a blocking read may take longer than it was asked to.
_GRACE_S: Final = 0.25

#: Seconds after which a waiting flow asks again if a blocking read is not possible.
_DOUBT_S: Final = 0.05


def run(
    flow: Flow[T],
    pool: Callable[[Asks], Pool | Nodes],
    budget: Budget,
    waiting: Callable[[Asks], Pool | Nodes] | None = None,
    step: Step | None = None,
) -> T:
    """Run a flow over connections of ``pool(step)``, which is asked only if there is a trip.

    What waits uses a connection of ``waiting(step)``, and does not spend the budget. ``step`` is
    the first one of a flow that has begun.

    Raises SessionStoreUnavailable, and what the flow raises.
    """
    try:
        if step is None:
            step = next(flow)
        while True:
            if not isinstance(step, tuple):
                step = flow.send(rest(step, waiting or pool))
                continue
            started = time.monotonic()
            try:
                at = pool(step)
                if isinstance(at, Nodes):
                    replies = _ask_nodes(step, at, budget.left)
                else:
                    replies = perform(step, at, budget.left)
            except SessionStoreUnavailable as error:
                budget.spend(time.monotonic() - started)
                # What a trip to a cluster is made of is no trip of its own.
                counters.add(store_errors=int(not isinstance(step, Addressed)))
                step = flow.throw(error)
            else:
                took_s = time.monotonic() - started
                if took_s > budget.quick_s or budget.left < budget.all:
                    budget.answered(took_s)
                step = flow.send(replies)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    finally:
        # One that is broken off leaves the waiting room now, and not with its exception's end.
        flow.close()


async def arun(
    flow: Flow[T],
    pool: Callable[[Asks], AsyncPool | Nodes],
    budget: Budget,
    waiting: Callable[[Asks], AsyncPool | Nodes] | None = None,
    step: Step | None = None,
) -> T:
    """See run()."""
    cancels = cancellations()
    try:
        if step is None:
            step = next(flow)
        while True:
            if not isinstance(step, tuple):
                mail = await arest(step, waiting or pool)
                heed(cancels)
                step = flow.send(mail)
                continue
            started = time.monotonic()
            try:
                at = pool(step)
                if isinstance(at, Nodes):
                    replies = await _aask_nodes(step, at, budget.left)
                else:
                    replies = await aperform(step, at, budget.left)
                heed(cancels)
            except SessionStoreUnavailable as error:
                budget.spend(time.monotonic() - started)
                # What a trip to a cluster is made of is no trip of its own.
                counters.add(store_errors=int(not isinstance(step, Addressed)))
                step = flow.throw(error)
            else:
                took_s = time.monotonic() - started
                if took_s > budget.quick_s or budget.left < budget.all:
                    budget.answered(took_s)
                step = flow.send(replies)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    finally:
        # One that is broken off leaves the waiting room now, and not with its exception's end.
        flow.close()


def _ask_nodes(trip: Trip, nodes: Nodes, seconds: float) -> list[Any]:
    """Ask the nodes of a cluster to which a trip goes; return its replies."""
    budget = Budget(seconds)
    return checked(trip, run(nodes.asking(trip, budget), nodes.pool, budget))


async def _aask_nodes(trip: Trip, nodes: Nodes, seconds: float) -> list[Any]:
    """See _ask_nodes()."""
    budget = Budget(seconds)
    return checked(trip, await arun(nodes.asking(trip, budget), nodes.pool, budget))


def rest(step: Wait | Pause | OutsideCall, pools: Callable[[Asks], Any]) -> Any:
    """Do what is no trip: read a mailbox, sleep, or ask another than the store."""
    if isinstance(step, OutsideCall):
        try:
            return step.call()
        except Exception as error:
            return error
    if isinstance(step, Pause):
        time.sleep(step.seconds)
        return False
    mail = read_alone(pools(step), blocking_read(step), step.seconds + _GRACE_S)
    if isinstance(mail, Exception):
        time.sleep(min(step.seconds, _DOUBT_S))
        return None
    return mail is not None


async def arest(step: Wait | Pause | OutsideCall, pools: Callable[[Asks], Any]) -> Any:
    """See rest()."""
    if isinstance(step, OutsideCall):
        try:
            return await (step.twin or sync_to_async(step.call))()
        except Exception as error:
            return error
    if isinstance(step, Pause):
        await asyncio.sleep(step.seconds)
        return False
    mail = await aread_alone(pools(step), blocking_read(step), step.seconds + _GRACE_S)
    if isinstance(mail, Exception):
        await asyncio.sleep(min(step.seconds, _DOUBT_S))
        return None
    return mail is not None
