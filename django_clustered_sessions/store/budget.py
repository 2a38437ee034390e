"""The time for which the store may keep a request waiting."""

from __future__ import annotations

from typing import Final

#: A trip is quick that takes no more than this share of the budget.
_QUICK: Final = 0.1


class Budget:
    """Seconds that some trips may take together."""

    #: A trip that is answered as fast as this, in seconds, takes nothing away.
    quick_s: float = 0.0

    def __init__(self, seconds: float) -> None:
        self.all = self.left = seconds

    def spend(self, seconds: float) -> None:
        """Take away what a trip took that failed, or a pause."""
        self.left = max(self.left - seconds, 0.0)

    def answered(self, seconds: float) -> None:
        """Take away what a trip took that was answered."""
        self.spend(seconds)


class RequestBudget(Budget):
    """Seconds that a request may wait in vain.

    A quick answer shows that the store is well, and gives all of them back: a view that saves its
    progress ten thousand times has waited for nothing.
    """

    def __init__(self, seconds: float) -> None:
        self.all = self.left = seconds
        self.quick_s = seconds * _QUICK

    def answered(self, seconds: float) -> None:
        """See Budget.answered()."""
        if seconds <= self.quick_s:
            self.left = self.all
        else:
            self.spend(seconds)


class PerTrip(Budget):
    """The same seconds for each trip, for what takes many and has time."""

    def spend(self, seconds: float) -> None:
        """Take away nothing."""
