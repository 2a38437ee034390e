"""``manage.py sessionserver``: run the embedded store in the foreground."""

from __future__ import annotations

import fcntl
import os
import socket
from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from django_clustered_sessions.embedded import (
    SESSION_FLAGS,
    EmbeddedStoreError,
    find_binary,
    is_ready,
)

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ListeningAddress(NamedTuple):
    """Address that the store listens on: a unix socket, or a host and port."""

    host: str = "127.0.0.1"
    port: int = 6379
    socket_path: Path | None = None

    def __str__(self) -> str:
        if self.socket_path is not None:
            return f"unix://{self.socket_path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"redis://{host}:{self.port}"


class Command(BaseCommand):
    """Become the embedded store, at the address that the site's settings name."""

    help = (
        "Runs a Valkey or Redis server for sessions in the foreground, for development. It keeps "
        "its data in a folder; Ctrl-C saves and stops it. By default it listens where "
        'CACHES[SESSION_CACHE_ALIAS]["LOCATION"] points, if that is this machine, and asks for the '
        "password given there; else on 127.0.0.1:6379."
    )
    # Checks may need the store, and this command starts it.
    requires_system_checks = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--port", type=port_number, help="TCP port (default: the one of the settings, or 6379)"
        )
        parser.add_argument(
            "--bind",
            metavar="ADDRESS",
            help="address to listen on (default: loopback only). Without a password the server "
            "refuses clients from other machines",
        )
        parser.add_argument(
            "--dir",
            type=Path,
            help="folder for the data, made if missing "
            "(default: .sessionstore in BASE_DIR, or in the current folder)",
        )

    def handle(
        self, *, port: int | None, bind: str | None, dir: Path | None, **options: Any
    ) -> None:
        location, password = site_store()
        try:
            address = listening_address(location, port=port, bind=bind)
            binary = find_binary()
        except (EmbeddedStoreError, ValueError) as error:
            raise CommandError(str(error)) from error
        refuse_if_taken(address)
        folder = claim_folder(dir or Path(getattr(settings, "BASE_DIR", "")) / ".sessionstore")
        if location and urlsplit(location).hostname not in (None, *LOOPBACK):
            self.stderr.write("The site's settings name a store on another machine, not this one.")
        self.stdout.write(f"Sessions at {address}, kept in {folder}. Ctrl-C saves and stops.")
        self.stdout.flush()
        # The server replaces this process, so Ctrl-C reaches it directly.
        os.execv(binary, [str(binary), *server_flags(address, folder, password)])


def port_number(text: str) -> int:
    """Return the TCP port. Raises ArgumentTypeError if it is invalid."""
    if text.isdecimal() and 0 < int(text) < 65_536:
        return int(text)
    raise ArgumentTypeError(f"{text!r} is not a port between 1 and 65535")


def site_store() -> tuple[str, str | None]:
    """Return the first URL of ``SESSION_CACHE_ALIAS``, empty if there is none, and the password."""
    entry: dict[str, Any] = settings.CACHES.get(settings.SESSION_CACHE_ALIAS, {})
    location = entry.get("LOCATION") or ""
    url = location.split(",")[0] if isinstance(location, str) else location[0]
    password = urlsplit(url).password
    if password is not None:
        return url, unquote(password)
    return url, entry.get("OPTIONS", {}).get("PASSWORD")


def listening_address(location: str, *, port: int | None, bind: str | None) -> ListeningAddress:
    """Return the address to listen on: by the options, else a local ``location``, else the default.

    Raises ValueError for a ``location`` with an invalid port.
    """
    url = urlsplit(location)
    if url.scheme == "unix" and port is None and bind is None:
        return ListeningAddress(socket_path=Path(unquote(url.path)).absolute())
    if url.scheme not in ("redis", "valkey") or url.hostname not in LOOPBACK:
        url = SplitResult("redis", "", "", "", "")
    return ListeningAddress(
        bind or (url.hostname or ListeningAddress().host).replace("localhost", "127.0.0.1"),
        port or url.port or ListeningAddress().port,
    )


def refuse_if_taken(address: ListeningAddress) -> None:
    """Raise CommandError if another process listens at the address."""
    if address.socket_path is not None:
        if is_ready(address.socket_path):
            raise CommandError(f"A store answers at {address} already.")
        return
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        socket.create_server((address.host, address.port), family=family).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise CommandError(
            f"Cannot listen at {address}: {reason}. Choose another port with --port."
        ) from error


def claim_folder(folder: Path) -> Path:
    """Make the folder, readable by this user only, and lock it until this process ends.

    The lock keeps a second server from appending to the same file, which would destroy it.
    """
    folder = folder.absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n")
        lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise CommandError(f"Cannot keep data in {folder}: {error.strerror}.") from error
    os.set_inheritable(lock, True)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CommandError(f"Another store uses {folder}: name a folder by --dir.") from error
    return folder


def server_flags(address: ListeningAddress, folder: Path, password: str | None) -> list[str]:
    """Return the server's command line: every write is appended to a file, fsynced each second."""
    if address.socket_path is not None:
        network = ["--port", "0", "--unixsocket", str(address.socket_path)]
    else:
        network = ["--bind", address.host, "--port", str(address.port)]
    flags = [*network, "--dir", str(folder), "--appendonly", "yes", "--save", "", *SESSION_FLAGS]
    return [*flags, "--requirepass", password] if password else flags
