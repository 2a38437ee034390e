"""Time that a request may wait in vain: a quick answer gives it back, and nothing else does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_clustered_sessions.store.budget import Budget, PerTrip, RequestBudget


def test_quick_answers_use_nothing_up() -> None:
    budget = RequestBudget(2.0)
    for _ in range(10_000):
        budget.answered(0.001)
    assert budget.left == 2.0


def test_quick_answer_gives_back_what_failures_took() -> None:
    budget = RequestBudget(2.0)
    budget.spend(1.5)
    assert budget.left == 0.5
    budget.answered(0.01)
    assert budget.left == 2.0


def test_slow_answers_use_it_up() -> None:
    budget = RequestBudget(2.0)
    for _ in range(4):
        budget.answered(0.5)
    assert budget.left == 0.0


@given(st.lists(st.floats(0, 3)))
def test_failures_take_no_more_than_there_is(trips: list[float]) -> None:
    budget = RequestBudget(2.0)
    for seconds in trips:
        budget.spend(min(seconds, budget.left))
    assert sum(trips) < 2.0 or budget.left < 1e-9


@pytest.mark.parametrize("seconds", [0.001, 1.0])
def test_trip_to_a_cluster_gets_nothing_back(seconds: float) -> None:
    budget = Budget(2.0)
    budget.answered(seconds)
    assert budget.left == pytest.approx(2.0 - seconds)


def test_each_trip_of_work_that_has_time_has_all() -> None:
    budget = PerTrip(2.0)
    budget.spend(1.9)
    budget.answered(1.9)
    assert budget.left == 2.0
