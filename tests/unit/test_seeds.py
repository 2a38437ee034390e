"""One seed, which pytest-randomly prints, repeats what hypothesis draws."""

from __future__ import annotations

import pytest
from hypothesis import given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from tests import machines

#: What hypothesis draws by its seed alone. Numbers and texts also come from constants in modules
#: that have been imported by then.
FLIPS = st.lists(st.booleans(), min_size=20, max_size=20)


def drawn(number: int | None = None) -> list[list[bool]]:
    """Return what a property test draws, from the seed of this run where it is given none."""
    found: list[list[bool]] = []

    @hypothesis_settings(max_examples=5, database=None)
    @given(FLIPS)
    def draw(value: list[bool]) -> None:
        found.append(value)

    (seed(number)(draw) if number is not None else draw)()
    return found


def test_examples_come_from_the_seed_of_the_run(pytestconfig: pytest.Config) -> None:
    number = pytestconfig.getoption("randomly_seed", skip=True)
    assert drawn() == drawn(number) != drawn(number + 1)


def test_failed_machine_says_how_to_repeat_it(pytestconfig: pytest.Config) -> None:
    steps: list[list[bool]] = []

    class Failing(RuleBasedStateMachine):
        @rule(value=FLIPS)
        def step(self, value: list[bool]) -> None:
            steps.append(value)
            raise ValueError

    def fail() -> list[str]:
        steps.clear()
        with pytest.raises(ValueError) as caught:
            machines.run(Failing, "the name", max_examples=5)
        return caught.value.__notes__

    number = pytestconfig.getoption("randomly_seed", skip=True)
    seed_option = f"--randomly-seed={number}"
    assert f"replay: pytest {__file__} -k 'the name' {seed_option}" in fail()
    first = list(steps)
    fail()
    assert steps == first
