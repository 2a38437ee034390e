"""Hold the tests of this folder to what they are for: code that needs no store to be right."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from typing import Any, NoReturn

import pytest


def refuse(what: str) -> NoReturn:
    """Fail the test that runs."""
    pytest.fail(f"a test in tests/unit {what}: it belongs in tests/store, or a folder above")


@pytest.fixture(scope="session")
def server_binary() -> NoReturn:
    """Refuse what ``store``, ``store_server`` and ``proxy`` are made with."""
    refuse("asks for a store")


@pytest.fixture(autouse=True)
def _no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections, and programs other than this Python."""
    for thread in threading.enumerate():
        if thread.name == "session-store-watcher":
            # Of a test of another folder, in the same process: it was told to end, and still asks.
            thread.join(30)
    start = subprocess.Popen.__init__

    def connect(self: socket.socket, address: Any) -> NoReturn:
        # Who connects closes it after an OSError only, and this is none: no code may take it for an
        # outage.
        self.close()
        refuse(f"connects to {address!r}")

    def start_python(self: subprocess.Popen, args: Any, *more: Any, **named: Any) -> None:
        if isinstance(args, str) or args[0] != sys.executable:
            refuse(f"starts {args!r}")
        start(self, args, *more, **named)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", connect)
    monkeypatch.setattr(subprocess.Popen, "__init__", start_python)
