"""The pairs that stand for all combinations in other tests are all there."""

from __future__ import annotations

from itertools import combinations, product

from tests.pairs import pairwise


def test_any_two_values_of_two_parameters_meet() -> None:
    columns = {"a": "12", "b": "345", "c": "67", "d": "89xyz"}
    names, cases = pairwise(**columns).args
    assert names == list(columns)
    met = {pair for case in cases for pair in combinations(case, 2)}
    assert met == {pair for two in combinations(columns.values(), 2) for pair in product(*two)}
    assert len(cases) < 20


def test_pairs_stay_the_same() -> None:
    assert pairwise(a="12", b="34").args == pairwise(a="12", b="34").args


@pairwise(kind=[[], {}], number=[1, 2])
def test_values_need_not_be_hashable(kind: object, number: int) -> None:
    assert kind in ([], {}) and number in (1, 2)
