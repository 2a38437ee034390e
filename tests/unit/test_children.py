"""Processes of other tests are bounded by what is judged here."""

from __future__ import annotations

import select
import sys
import time

import pytest

from tests.children import LIFE_S, finish, forked, line, python

HANGS = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '1000'])"


def test_process_that_hangs_is_killed_with_what_it_started() -> None:
    began_s = time.monotonic()
    # Its own process has the pipe too, so that the end of both ends the reading.
    with python("-c", HANGS, life_s=1.0) as process, pytest.raises(AssertionError):
        while True:
            line(process)
    assert process.returncode == -9
    assert time.monotonic() - began_s < LIFE_S


def test_process_ends_with_its_test() -> None:
    with pytest.raises(ZeroDivisionError), python("-c", HANGS) as process:
        line(process)
        raise ZeroDivisionError
    assert process.returncode == -9


def test_process_that_fails_is_an_error() -> None:
    with python("-c", "1 / 0") as process, pytest.raises(AssertionError, match="division"):
        finish(process)
    with python("-c", "print(1)") as one, python("-c", "print(2)") as other:
        assert finish(one, other) == ["1\n", "2\n"]


def test_fork_tells_what_it_found_or_is_an_error() -> None:
    assert forked(lambda: b"found") == b"found"
    with pytest.raises(AssertionError):
        forked(lambda: b"%d" % (1 // 0))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_what_a_killed_process_has_started_ends_with_it() -> None:
    starts = (
        "import subprocess; from tests.children import bound;"
        "subprocess.run(bound(['sh', '-c', 'echo begun; exec sleep 1000']))"
    )
    with python("-c", starts) as process:
        assert line(process) == "begun\n"
        process.kill()
        # Both have the pipe, so that it is at its end when both have ended.
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], LIFE_S / 2)[0]
        assert process.stdout.read() == ""
