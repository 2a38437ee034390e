"""How a property test made of steps runs: it tells its seed when it fails, and replays from it."""

from __future__ import annotations

import inspect
import os
import secrets
from typing import Any, Final

from hypothesis import HealthCheck, seed
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

#: The environment variable that replays a run.
SEED: Final = "CLUSTERED_SESSIONS_SEED"


def run(machine: type[RuleBasedStateMachine], name: str, **options: Any) -> None:
    """Run a machine many times; ``name`` is what pytest's ``-k`` picks its test by.

    ``options`` are hypothesis' settings.
    """
    number = int(os.environ.get(SEED) or secrets.randbits(32))
    try:
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            seed(number)(machine),
            settings=hypothesis_settings(
                stateful_step_count=40,
                database=None,
                suppress_health_check=list(HealthCheck),
                **options,
            ),
        )
    except BaseException as error:
        where = inspect.getfile(machine)
        error.add_note(f"replay: {SEED}={number} pytest {where} -k '{name}'")
        raise
