"""Runner of stateful property tests, with their error messages."""

from __future__ import annotations

import inspect
from typing import Any

from hypothesis import HealthCheck, core
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test


def run(machine: type[RuleBasedStateMachine], name: str, **options: Any) -> None:
    """Run a machine many times; ``name`` selects its test with pytest's ``-k``.

    ``options`` are hypothesis' settings. The seed is that of the whole run: see
    ``pytest_configure``.
    """
    try:
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            machine,
            settings=hypothesis_settings(
                stateful_step_count=40,
                database=None,
                suppress_health_check=list(HealthCheck),
                **options,
            ),
        )
    except BaseException as error:
        where = inspect.getfile(machine)
        error.add_note(
            f"replay: pytest {where} -k '{name}' --randomly-seed={core.global_force_seed}"
        )
        raise
