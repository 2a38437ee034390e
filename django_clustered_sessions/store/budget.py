"""The time for which the store may keep a request waiting."""

from __future__ import annotations

from typing import Final

#: A trip is quick that takes no more than this share of the budget.
_QUICK: Final = 0.1


class Budget:
    """Seconds that some trips may take together."""

    def __init__(self, seconds: float) -> None:
        self._all = self._left = seconds

    @property
    def left(self) -> float:
        """Seconds that are left, 0 at least."""
        return max(self._left, 0.0)

    def spend(self, seconds: float) -> None:
        """Take away what a trip took that failed, or a pause."""
        self._left -= seconds

    def answered(self, seconds: float) -> None:
        """Take away what a trip took that was answered."""
        self.spend(seconds)


class RequestBudget(Budget):
    """Seconds that a request may wait in vain.

    A quick answer shows that the store is well, and gives all of them back: a view that saves its
    progress ten thousand times has waited for nothing.
    """

    def answered(self, seconds: float) -> None:
        """See Budget.answered()."""
        if seconds <= self._all * _QUICK:
            self._left = self._all
        else:
            self.spend(seconds)


class PerTrip(Budget):
    """The same seconds for each trip, for what takes many and has time."""

    def spend(self, seconds: float) -> None:
        """Take away nothing."""
