"""The clock for ages."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.conftest import require

OFFSET_S = 100_000
DIFFERENCE = (
    "import time; from django_clustered_sessions.store import clock;"
    "print(clock.now_s() - time.monotonic())"
)


def test_clock_counts_the_time_of_a_suspended_machine() -> None:
    """A namespace of time has a machine that was suspended for so long."""
    command = [sys.executable, "-c", DIFFERENCE]
    unshare = require(shutil.which("unshare"), "unshare")
    suspended = [str(unshare), "--fork", "--time", "--boottime", str(OFFSET_S), *command]
    there = subprocess.run(suspended, capture_output=True, text=True, check=False)
    if there.returncode:
        pytest.skip(f"no namespace of time: {there.stderr}")
    here = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(there.stdout) - float(here.stdout) > OFFSET_S / 2
