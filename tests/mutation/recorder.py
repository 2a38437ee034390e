"""Record which lines of the package, and which of its Lua scripts, each test executes.

The recorder writes every first hit at once, so that a process that a test kills has told all it
did. A copy of this file serves as ``sitecustomize`` of the processes that tests start, which is
why it imports nothing but the standard library.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import CodeType
from typing import Any, Final

#: Where the records go; unset: nothing is recorded.
FOLDER: Final = "MUTATION_RECORDS"

#: The test under which a process was started.
TEST: Final = "MUTATION_TEST"

PACKAGE: Final = "django_clustered_sessions"


class Recorder:
    """Write the lines that run, under the test that runs, to a file of this process."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.out = os.open(folder / f"{os.getpid()}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.prefix = f"{root / PACKAGE}{os.sep}"
        self.cut = len(str(root)) + 1
        self.begin(os.environ.get(TEST, ""))

    def begin(self, test: str) -> None:
        """Count what runs from here on for ``test``; empty: it runs for no test, as imports do."""
        os.environ[TEST] = test
        self.seen: set[tuple[str, int]] = set()
        os.write(self.out, f"# {test}\n".encode())

    def start(self) -> None:
        """Watch this process."""
        # Python 3.12 has it.
        monitoring: Any = sys.monitoring  # type: ignore[attr-defined, unused-ignore]
        tool, events = monitoring.COVERAGE_ID, monitoring.events
        monitoring.use_tool_id(tool, "mutation")

        def on_start(code: CodeType, offset: int) -> Any:
            if not code.co_filename.startswith(self.prefix):
                return monitoring.DISABLE
            monitoring.set_local_events(tool, code, events.LINE)
            if code.co_name != "scripted":
                return monitoring.DISABLE
            # The one place where calls of scripts are made: protocol/commands/script_calls.py.
            name = sys._getframe(1).f_locals["name"]
            return self.hit(f"{PACKAGE}/protocol/lua/{name}.lua", 0)

        def on_line(code: CodeType, line: int) -> None:
            self.hit(code.co_filename[self.cut :], line)

        monitoring.register_callback(tool, events.PY_START, on_start)
        monitoring.register_callback(tool, events.LINE, on_line)
        monitoring.set_events(tool, events.PY_START)

    def hit(self, file: str, line: int) -> None:
        """Write that a line ran, once per test."""
        if (file, line) not in self.seen:
            self.seen.add((file, line))
            os.write(self.out, f"{file}\t{line}\n".encode())


if __name__ == "sitecustomize" and FOLDER in os.environ:
    Recorder(Path(os.environ[FOLDER]), Path(__file__).parent).start()
