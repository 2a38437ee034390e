"""Child processes of tests: they end with the test, and every wait for them is bounded."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

#: The folder that holds the package and the tests.
ROOT: Final = Path(__file__).parent.parent

#: Longest life of a child process in seconds. It is killed then, so that every read from it and
#: every wait for it ends, and the test fails.
LIFE_S: Final = 60.0

#: Python program that asks the kernel for a SIGKILL when the starting thread ends, then execs.
_LAUNCH: Final = """
import ctypes, os, sys
parent, *command = sys.argv[1:]
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(parent):
    os.execvp(command[0], command)
"""


def bound(command: Sequence[str | Path]) -> list[str]:
    """Return a command line for a process that ends with the thread that starts it, on Linux.

    Tests start all processes by it, because a test run that is killed with SIGKILL cleans nothing
    up. ``preexec_fn`` of subprocess is unsafe: a fork that runs Python beside other threads may
    hang.
    """
    words = [str(word) for word in command]
    if sys.platform != "linux":
        return words
    return [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *words]


def end_with_parent() -> None:
    """Bind this process to the thread that has started it, on Linux: see `bound`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@contextmanager
def python(
    *arguments: str,
    interpreter: str | Path = sys.executable,
    life_s: float = LIFE_S,
    **options: Any,
) -> Iterator[subprocess.Popen[str]]:
    """Run Python with its output in pipes; kill it at the end, or when its time is over.

    ``options`` are those of `subprocess.Popen`. Its own child processes are killed with it.
    """
    defaults: dict[str, Any] = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = bound([interpreter, *arguments])
    process = subprocess.Popen(command, text=True, start_new_session=True, **(defaults | options))
    alarm = threading.Timer(life_s, _kill, [process])
    alarm.daemon = True
    alarm.start()
    try:
        yield process
    finally:
        alarm.cancel()
        _kill(process)
        process.communicate(timeout=LIFE_S)


def child(module: str, *arguments: str) -> AbstractContextManager[subprocess.Popen[str]]:
    """Run ``python -m module arguments`` with warnings as errors; see `python`."""
    return python("-W", "error", "-m", module, *arguments)


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    """Wait for processes, which must succeed, and return their output."""
    printed = [process.communicate(timeout=LIFE_S) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), printed
    return [output for output, _ in printed]


def line(process: subprocess.Popen[str]) -> str:
    """Return the next line that a process prints; fail if it ends instead."""
    assert process.stdout is not None
    found = process.stdout.readline()
    assert found, process.communicate(timeout=LIFE_S)
    return found


def forked(work: Callable[[], bytes]) -> bytes:
    """Run ``work`` in a fork of this process, where it must not fail; return its result."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Python warns because of other threads; the fork does not use them.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        status = 1
        # The fork sets its own alarm, because this process may be killed before.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(LIFE_S))
        try:
            os.write(writing, work())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return told


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill a running process and its child processes."""
    # Its children may hold the output open after its end. macOS may refuse to kill the group then.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
