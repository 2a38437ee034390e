"""Put more calls on a flow's trips than the flow asks for: figures, and the wait for replicas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from .commands import replication
from .effects import Call, Flow, Step, Trip
from .options import SyncOptions
from .results import Acknowledged

T = TypeVar("T")


class Rider(Protocol):
    """A source of one more call for a flow's first trip."""

    def board(self, trip: Trip) -> Call | None:
        """Return the call that is to ride along, or None."""

    def lost(self) -> None:
        """Take note that the call did not arrive, as far as is known."""


def riding(flow: Flow[T], rider: Rider, step: Step | None = None) -> Flow[T]:
    """Run ``flow`` and let one more call ride on its first trip.

    ``step`` is the first one of a flow that has begun.

    Its reply says only whether it has arrived: an error does not. The passenger goes first: the
    calls behind a script that the store does not know are sent again with it, but not those behind
    a passenger, on which nothing builds.
    """
    return _between(flow, _Riding(rider), step)


def acknowledged(
    flow: Flow[T], sync: SyncOptions, heard: Callable[[Acknowledged], None]
) -> Flow[T]:
    """Run ``flow``, and let each write that users rely on wait for its replicas, on its own trip.

    ``heard`` is called for those that landed. The question to the replicas goes last: where the
    driver repeats a part of a trip, it repeats the question too, and only the last reply counts.
    """
    return _between(flow, _Acknowledging(sync, heard))


class _Between:
    """A layer between a flow and its driver, which changes nothing."""

    def asks(self, step: Step) -> Step:
        return step

    def answers(self, reply: Any) -> Any:
        return reply

    def lost(self) -> None:
        pass


class _Riding(_Between):
    def __init__(self, rider: Rider) -> None:
        self._rider = rider
        self._is_first, self._is_aboard, self._has_arrived = True, False, False

    def asks(self, step: Step) -> Step:
        passenger = None
        if self._is_first and isinstance(step, tuple):
            passenger = self._rider.board(step)
        self._is_first, self._is_aboard = False, passenger is not None
        return (passenger, *cast(Trip, step)) if passenger else step

    def answers(self, reply: Any) -> Any:
        self._has_arrived = True
        if not self._is_aboard:
            return reply
        passenger, *replies = reply
        if isinstance(passenger, Exception):
            self._rider.lost()
        return replies

    def lost(self) -> None:
        if not self._has_arrived:
            self._rider.lost()


class _Acknowledging(_Between):
    def __init__(self, sync: SyncOptions, heard: Callable[[Acknowledged], None]) -> None:
        self._sync, self._heard = sync, heard
        self._at: int | None = None

    def asks(self, step: Step) -> Step:
        self._at = None
        if isinstance(step, tuple) and (at := replication.relied_on(step)) is not None:
            self._at, self._write = at, step[at]
            return (*step, *replication.acknowledge(self._sync))
        return step

    def answers(self, reply: Any) -> Any:
        if self._at is None:
            return reply
        *replies, waited, clock = reply
        found = replication.parse_acknowledged(self._write, replies[self._at], waited, clock)
        if found:
            self._heard(found)
        return replies


def _between(flow: Flow[T], between: _Between, step: Step | None = None) -> Flow[T]:
    try:
        if step is None:
            step = next(flow)
        while True:
            try:
                reply = yield between.asks(step)
            except Exception as error:
                between.lost()
                step = flow.throw(error)
            else:
                step = flow.send(between.answers(reply))
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    finally:
        flow.close()
