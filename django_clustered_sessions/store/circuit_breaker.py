"""A breaker for each node of the store: while it is away, requests are refused at once.

It opens after a few failed trips in a row. Then one trip at a time is let through, at intervals
that grow up to a second or so, until one is answered. A refusal of the store, a full one's for
example, is an answer. A wait for a lock uses connections of its own and is not counted.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final

from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.monitoring.counters import counters

logger = logging.getLogger("django_clustered_sessions")

#: Failed trips in a row that open a breaker.
FAILURES: Final = 3
#: Seconds until the first probe, and the longest that they come to by doubling. A probe
#: has as long for itself: one that a silent store has swallowed does not keep the next one waiting.
#: A store that is back is found within about a second.
FIRST_PROBE_S: Final = 0.2
LONGEST_PROBE_S: Final = 0.5


class _Trip(AbstractContextManager[float | None]):
    """A trip to a node; a probe, which finds out whether it is back, gives the time it has."""

    def __init__(self, breaker: CircuitBreaker, is_probe: bool) -> None:
        self._breaker, self._is_probe = breaker, is_probe

    def __enter__(self) -> float | None:
        return self._breaker.probe_s if self._is_probe else None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        breaker = self._breaker
        if error is None and not breaker.failures and breaker.opened_at_s is None:
            # All is well, as nearly always.
            return
        breaker.ended(error, self._is_probe)


class CircuitBreaker:
    """The circuit breaker of one node: opened by failed trips, closed by an answer."""

    def __init__(
        self,
        node: str,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.node = node
        self._clock, self._chance = clock, chance
        self._trip, self._probe = _Trip(self, False), _Trip(self, True)
        self.reset()

    def reset(self) -> None:
        """Start anew, as after a fork."""
        self._lock = threading.Lock()
        #: Failed trips in a row.
        self.failures = 0
        #: The time at which it opened, None while it is closed.
        self.opened_at_s: float | None = None
        self._why = ""
        #: The time at which the next probe may begin; during a probe, the end of its time.
        self.probe_at_s = 0.0
        self.probe_s = FIRST_PROBE_S

    @property
    def is_open(self) -> bool:
        """True if the node is taken to be away."""
        return self.opened_at_s is not None

    def trip(self) -> AbstractContextManager[float | None]:
        """Return a context in which to ask the node something, which learns what comes of it.

        It gives the seconds that a probe has, None for any other trip.

        Raises SessionStoreUnavailable at once while the node is away.
        """
        is_probe = self.opened_at_s is not None and self._admit()
        return self._probe if is_probe else self._trip

    def ended(self, error: BaseException | None, is_probe: bool) -> None:
        """Learn from how a trip has ended."""
        if error is None:
            self._answered()
        elif not isinstance(error, SessionStoreUnavailable) or error.is_away is None:
            # Broken off, by a client that has left for one: nothing is known of the node.
            if is_probe:
                with self._lock:
                    self.probe_at_s = self._clock()
        elif error.is_away:
            self._failed(error, is_probe)
        else:
            self._answered()

    def _admit(self) -> bool:
        """Return whether this trip is the one that finds out whether the node is back."""
        with self._lock:
            if self.opened_at_s is None:
                return False
            now_s = self._clock()
            if now_s >= self.probe_at_s:
                # Not a flag: a signal's exception may come before the probe has begun.
                self.probe_at_s = now_s + self.probe_s
                return True
            away_s = now_s - self.opened_at_s
        counters.add(nonstop_trips=1)
        counters.away(away_s)
        error = SessionStoreUnavailable(
            f"the session store at {self.node} has been away for {away_s:.1f} s and was not asked: "
            f"{self._why}"
        )
        error.is_told = True
        raise error

    def _failed(self, error: SessionStoreUnavailable, is_probe: bool) -> None:
        with self._lock:
            self.failures += 1
            self._why = str(error)
            opens = self.opened_at_s is None and self.failures >= FAILURES
            if opens:
                self.opened_at_s, self.probe_s = self._clock(), FIRST_PROBE_S
                self._schedule()
            elif is_probe:
                self.probe_s = min(self.probe_s * 2, LONGEST_PROBE_S)
                self._schedule()
            error.is_told = self.is_open
            away_s = self._clock() - (self.opened_at_s or 0.0)
        if error.is_told:
            counters.away(away_s)
        if opens:
            counters.add(breaker_opened=1)
            logger.error(
                "the session store at %s is away, and is asked by one request at a time until it "
                "answers: %s",
                *(self.node, error),
            )

    def _answered(self) -> None:
        with self._lock:
            opened_at_s = self.opened_at_s
            self.failures, self.opened_at_s = 0, None
            away_s = 0.0 if opened_at_s is None else self._clock() - opened_at_s
        if opened_at_s is not None:
            counters.away(away_s)
            logger.warning("the session store at %s is back after %.1f s", self.node, away_s)

    def _schedule(self) -> None:
        # Processes that lost the store together do not come back to it together.
        self.probe_at_s = self._clock() + self.probe_s * (0.5 + self._chance() / 2)


class Breakers:
    """The breakers of this process, one for each node, whichever pools lead there."""

    def __init__(self) -> None:
        self.nodes: dict[str, CircuitBreaker] = {}

    def of(self, node: str) -> CircuitBreaker:
        """Return a node's breaker; ``node`` is what the log calls it."""
        return self.nodes.setdefault(node, CircuitBreaker(node))

    def forget(self) -> None:
        """Give new pools new breakers; the old ones keep theirs."""
        self.nodes = {}

    def reset(self) -> None:
        """Close all, as in a forked process: what its parent saw is the parent's."""
        for breaker in self.nodes.values():
            breaker.reset()


breakers = Breakers()
os.register_at_fork(after_in_child=breakers.reset)
