"""The lifetime of a session as one request knows it, by the store's clock.

What the store said about the time that is left is carried on by a clock that nobody sets, so a
node whose own clock is wrong agrees with the others.
"""

from __future__ import annotations

import math
import time
from datetime import datetime, timedelta
from typing import Any

from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol.options import Expiry
from django_clustered_sessions.protocol.record import LATEST_MS, Ages, Meta, Mode, moment
from django_clustered_sessions.store import clock

from .near_cache import Life, Renewal


class Lifetime:
    """A session's deadline and mode, once the store has told them."""

    #: As it is kept beyond the request, None before the store has told it.
    life: Life | None = None
    #: The last renewal that is known.
    renewal: Renewal | None = None
    _from_now: tuple[Any, float] | None = None

    def see(self, now_ms: int, deadline_ms: int, mode: Mode | None = None) -> Life:
        """Take what the store said: its clock, the deadline (both ms) and, if it said, the mode.

        Return it for later requests.
        """
        now_s = clock.now_s()
        counters.clock_offset_ms = round(time.time() * 1000) - now_ms
        if mode is None and self.life is not None:
            mode = self.life.mode
        # An older release let a session end after the calendar's last day.
        self.life = life = Life(now_s, now_ms, min(deadline_ms, LATEST_MS), mode, self.renewal)
        return life

    def renewed(self, meta: Meta, ages: Ages) -> None:
        """Take note that the store was asked for a renewal, for later requests; after see().

        ``meta`` is the session's as it was loaded. Where the deadline did not move, it counts from
        an earlier use.
        """
        if life := self.life:
            behind_ms = max(meta.renewed_ms(life.seen_ms, ages) - life.deadline_ms, 0)
            self.renewal = Renewal(life.seen_ms - behind_ms, ages)
            self.life = Life(*life[:-1], self.renewal)

    def recall(self, life: Life) -> None:
        """Take what the store said to an earlier request."""
        self.life, self.renewal = life, life.renewal

    @property
    def mode(self) -> Mode | None:
        """The session's mode, None before the store has told it."""
        return self.life.mode if self.life else None

    @property
    def seen_s_ago(self) -> float:
        """Seconds since the store last told about this session, infinite if it has not."""
        return clock.now_s() - self.life.seen_at_s if self.life else math.inf

    @property
    def seen_ms(self) -> int:
        """The store's clock as last seen, in ms, 0 before it has told it."""
        return self.life.seen_ms if self.life else 0

    @property
    def now_ms(self) -> int:
        """The store's clock in ms, carried on since it has told it."""
        return self.seen_ms + round(self.seen_s_ago * 1000)

    @property
    def left_s(self) -> float | None:
        """Seconds until the session expires, or None while the store has said nothing."""
        return self.life.left_s(clock.now_s()) if self.life else None

    def until_s(self, at_ms: float) -> float | None:
        """Return the seconds until ``at_ms`` by the store's clock, None where that is never."""
        return None if at_ms == math.inf else (at_ms - self.seen_ms) / 1000 - self.seen_s_ago

    @property
    def deadline(self) -> datetime | None:
        """The time at which the session expires, None before the store has told it."""
        return moment(self.life.deadline_ms) if self.life else None

    def is_deadline(self, value: Any) -> bool:
        """Return whether a value of ``_session_expiry`` is the date at which the session expires.

        The store keeps that date in whole ms.
        """
        try:
            expiry = Expiry.of(value)
        except (TypeError, ValueError):
            return False
        deadline_ms = self.life.deadline_ms if self.life else None
        return expiry.mode is Mode.ABSOLUTE and expiry.bounded_ms == deadline_ms

    def note(self, setting: object, value: Any) -> None:
        """Remember what a ``_session_expiry`` was set by: a timedelta counts from the store's now.

        ``value`` is what Django keeps for it, a date that is as wrong as this node's clock.
        """
        if isinstance(setting, timedelta):
            self._from_now = value, clock.now_s() + setting.total_seconds()

    def expiry(self, value: Any) -> Expiry:
        """Return what the store is to make of a value of ``_session_expiry``.

        Raises ValueError or TypeError for one that is neither a number nor a date.
        """
        if value is not None and self._from_now is not None and self._from_now[0] == value:
            return Expiry(Mode.FROM_NOW, round((self._from_now[1] - clock.now_s()) * 1000))
        return Expiry.of(value)
