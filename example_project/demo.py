#!/usr/bin/env python
"""Run the shop on two nodes that share their sessions, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import errno
import os
import secrets
import shlex
import shutil
import signal
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

HERE = Path(__file__).resolve().parent
PYTHON = sys.executable

#: Seconds that a process has for answering after its start.
START_TIMEOUT = 60.0

#: Seconds that a process has for ending after SIGTERM.
STOP_TIMEOUT = 8.0

#: Lines of a process's output that are shown when it fails.
LAST_LINES = 15

#: First and last line of a mail that a node prints, by ``shop/mail.py``.
MAIL_BEGINS = f"{'-- mail ':-<79}"
MAIL_ENDS = "-" * 79

if sys.platform == "linux":
    _prctl = ctypes.CDLL(None).prctl

    def die_with(parent: int) -> Callable[[], None]:
        """Return what a child calls first so that it gets SIGTERM when ``parent`` is gone."""

        def ask_kernel() -> None:
            _prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)

        return ask_kernel

else:

    def die_with(parent: int) -> None:
        """Return nothing: only Linux tells a child of its parent's end."""


class DemoError(Exception):
    """The demo cannot start or go on; the message says why and what to do."""


@dataclass
class Child:
    """Run one process in a group of its own, so that Ctrl-C reaches only the demo.

    Its output is shown if ``verbose``, or if it fails; the mails in it are always shown.
    """

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    verbose: bool
    process: asyncio.subprocess.Process = field(init=False)
    output: deque[str] = field(init=False, default_factory=lambda: deque(maxlen=LAST_LINES))
    reader: asyncio.Task[None] = field(init=False)
    is_in_mail: bool = field(init=False, default=False)

    async def start(self) -> None:
        """Start the process."""
        # Not asyncio's own pipe: with that, wait() returns only when all who inherited it are gone.
        ours, theirs = os.pipe()
        self.process = await asyncio.create_subprocess_exec(
            *self.command,
            cwd=HERE,
            env=self.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=theirs,
            stderr=asyncio.subprocess.STDOUT,
            process_group=0,
            preexec_fn=die_with(os.getpid()),
        )
        os.close(theirs)
        self.reader = asyncio.create_task(self.read(os.fdopen(ours, "rb")))

    async def read(self, pipe: BinaryIO) -> None:
        """Keep the last lines of the output; show mails, and all of it when asked to."""
        lines = asyncio.StreamReader(limit=2**20)
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(lines), pipe
        )
        async for line in lines:
            text = line.decode(errors="replace").rstrip()
            self.output.append(f"  {self.name:<10} | {text}")
            self.is_in_mail = text == MAIL_BEGINS or (self.is_in_mail and text != MAIL_ENDS)
            if self.verbose:
                say(self.output[-1])
            elif self.is_in_mail or text == MAIL_ENDS:
                say(f"  {text}")

    async def ended(self) -> str:
        """Wait for the end of the process and say what it was."""
        code = await self.process.wait()
        # A worker of a killed gunicorn would answer once more.
        self.signal_group(signal.SIGKILL)
        await self.reader
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit status {code}"

    def again(self) -> str:
        """Return the line of a shell that starts the process once more."""
        changed = {
            name: value for name, value in self.environment.items() if os.environ.get(name) != value
        }
        variables = shlex.join(f"{name}={value}" for name, value in changed.items())
        return f"cd {shlex.quote(str(HERE))} && env {variables} {shlex.join(self.command)}"

    async def stop(self) -> None:
        """End the process; kill its group when it takes too long."""
        if self.process.returncode is None:
            self.process.terminate()
        with suppress(TimeoutError):
            await asyncio.wait_for(self.process.wait(), STOP_TIMEOUT)
        self.signal_group(signal.SIGKILL)
        await self.process.wait()

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to all that is left of the process and its own children."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


@dataclass(frozen=True)
class Node:
    """Describe one node: its name and colour, and the server that runs it."""

    name: str
    colour: str
    server: str

    def command(self, port: int) -> Sequence[str]:
        """Return the command line that serves the shop on a port of loopback."""
        if self.server.startswith("gunicorn"):
            return [PYTHON, "-m", "gunicorn", "shop.wsgi", "--bind", f"127.0.0.1:{port}"]
        where = ["--host", "127.0.0.1", "--port", str(port)]
        graceful = ["--lifespan", "off", "--timeout-graceful-shutdown", "3"]
        return [PYTHON, "-m", "uvicorn", "shop.asgi:application", *where, *graceful]


NODES = (
    Node("terracotta", "#a8452a", "gunicorn, WSGI"),
    Node("cobalt", "#2a4fa8", "uvicorn, ASGI"),
)

STATE_REQUEST = b"GET /Cart/state.json HTTP/1.0\r\nHost: localhost\r\n\r\n"


class Demo:
    """Start the store and the nodes, watch them, and stop them."""

    def __init__(
        self,
        ports: tuple[int, int],
        store_port: int,
        folder: Path,
        *,
        encryption_keys: str,
        verbose: bool,
    ) -> None:
        self.ports = ports
        self.store_port = store_port
        self.folder = folder
        self.encryption_keys = encryption_keys
        self.verbose = verbose
        self.children: list[Child] = []

    async def run(self) -> int:
        """Run until Ctrl-C, SIGTERM, or the loss of the store or of all nodes."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in signals:
            loop.add_signal_handler(number, task.cancel)
        try:
            await self.start_and_watch()
        except asyncio.CancelledError:
            say("\nStopping.")
        except DemoError as error:
            print(error, file=sys.stderr, flush=True)
            return 1
        finally:
            # Whoever asks a second time does not want to wait.
            for number in signals:
                loop.add_signal_handler(number, self.kill)
            # The store, which was started first, ends last.
            for group in (self.children[1:], self.children[:1]):
                await asyncio.gather(*(child.stop() for child in group))
        return 0

    async def start_and_watch(self) -> None:
        """Start everything, say what to try, and report what dies."""
        self.check_ports()
        say("Starting the store and two nodes ...")
        store = await self.start(
            "store",
            *manage("sessionserver", "--port", str(self.store_port), "--dir", str(self.folder)),
        )
        await self.migrate()
        await until_ready(store, self.store_port, b"PING\r\n", b"+PONG")
        nodes = [await self.start_node(node) for node in NODES]
        for node, port in zip(nodes, self.ports, strict=True):
            await until_ready(node, port, STATE_REQUEST, b" 200 ")
        self.explain(store, nodes)
        await self.watch(store, nodes)

    def check_ports(self) -> None:
        """Refuse to start where a port is taken."""
        for port in self.ports:
            if is_taken(port):
                first, second = (port + 100 for port in self.ports)
                raise DemoError(
                    f"Port {port} is taken by another program. Move the nodes to other ports, "
                    f"for example: make demo PORTS={first},{second}"
                )
        if is_taken(self.store_port):
            raise DemoError(
                f"Port {self.store_port} is taken by another program. Without --store-port the "
                "store takes a free one."
            )

    async def start(self, name: str, *command: str, **environment: str) -> Child:
        """Start a process that shares the store and the database with the others."""
        paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        child = Child(
            name,
            command,
            os.environ
            | {
                "DJANGO_SETTINGS_MODULE": "shop.settings",
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "PYTHONUNBUFFERED": "1",
                "SHOP_STORE": self.store_url,
                "SHOP_DATABASE": str(self.folder / "shop.sqlite3"),
                "SHOP_ENCRYPTION_KEYS": self.encryption_keys,
            }
            | environment,
            self.verbose,
        )
        await child.start()
        self.children.append(child)
        return child

    async def migrate(self) -> None:
        """Make the database and the demo user."""
        child = await self.start("migrate", *manage("migrate"))
        how = await child.ended()
        self.children.remove(child)
        if child.process.returncode:
            raise failed(child, f"The database could not be made ({how}).")

    async def start_node(self, node: Node) -> Child:
        """Start one node, which knows the other one's name and port."""
        place = NODES.index(node)
        peer = NODES[1 - place]
        return await self.start(
            node.name,
            *node.command(self.ports[place]),
            SHOP_NODE=node.name,
            SHOP_COLOUR=node.colour,
            SHOP_PORT=str(self.ports[place]),
            SHOP_PEER=peer.name,
            SHOP_PEER_COLOUR=peer.colour,
            SHOP_PEER_PORT=str(self.ports[1 - place]),
        )

    def explain(self, store: Child, nodes: Sequence[Child]) -> None:
        """Say where the nodes are and what to try."""
        urls = [self.url(place) for place in range(len(nodes))]
        kind = "encrypted" if self.encryption_keys else "Valkey or Redis"
        rows = [
            *((node.name, url, node.server) for node, url in zip(NODES, urls, strict=True)),
            ("store", self.store_url, kind),
        ]
        pids = [child.process.pid for child in (*nodes, store)]
        table = [
            f"  {name:<11} {url:<29} {what:<16} pid {pid}"
            for (name, url, what), pid in zip(rows, pids, strict=True)
        ]
        say("\nOne shop, two nodes, one session:\n")
        say("\n".join(table))
        say(
            "\nTry this:\n"
            "  1. Put something into the cart on one node, follow the link to the other: it is "
            "there.\n"
            "  2. Log in on either: you are logged in on both. The mail about it is shown here; "
            "its link\n     ends that login, in any browser.\n"
            f"  3. Stop a node (kill -9 {pids[0]}) and reload the other: nothing is "
            "lost.\n"
            f"  4. Pause the store (kill -STOP {pids[2]}): a page says so after two seconds. "
            f"Resume\n     it (kill -CONT {pids[2]}): you are still logged in.\n\n"
            "Ctrl-C stops everything."
        )

    @property
    def store_url(self) -> str:
        """Return the store's address, as the nodes are told it."""
        return f"redis://127.0.0.1:{self.store_port}/0"

    def url(self, place: int) -> str:
        """Return a node's address."""
        return f"http://localhost:{self.ports[place]}/Cart/"

    async def watch(self, store: Child, nodes: Sequence[Child]) -> None:
        """Report each node that dies; raise when the store or the last node does."""
        alive = list(nodes)
        ends = {asyncio.create_task(child.ended()): child for child in (store, *nodes)}
        while True:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                child = ends.pop(task)
                self.children.remove(child)
                how = task.result()
                if child is store:
                    raise failed(child, f"The store died ({how}): stopping the nodes.")
                alive.remove(child)
                if not alive:
                    raise failed(child, f"{child.name} died ({how}): all nodes are dead, stopping.")
                other = alive[0]
                say(
                    f"\n{child.name} died ({how}). {other.name} goes on, with every session: "
                    f"{self.url(nodes.index(other))}\n"
                    f"Start it again, in another terminal:\n  {child.again()}"
                )

    def kill(self) -> None:
        """End all processes at once."""
        for child in self.children:
            child.signal_group(signal.SIGKILL)


def manage(*arguments: str) -> Sequence[str]:
    """Return the command line of one of Django's commands."""
    return [PYTHON, str(HERE / "manage.py"), *arguments]


async def until_ready(child: Child, port: int, question: bytes, answer: bytes) -> None:
    """Return once a process answers; raise with its last output when it ends or takes too long."""
    try:
        async with asyncio.timeout(START_TIMEOUT):
            while not await answers(port, question, answer):
                if child.process.returncode is not None:
                    raise failed(child, f"{child.name} did not start ({await child.ended()}).")
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise failed(child, f"{child.name} did not answer in {START_TIMEOUT:.0f} s.") from None


async def answers(port: int, question: bytes, answer: bytes) -> bool:
    """Tell whether the first line of the answer to a question holds what is expected."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    try:
        writer.write(question)
        return answer in await reader.readline()
    except OSError:
        return False
    finally:
        writer.close()


def failed(child: Child, reason: str) -> DemoError:
    """Return the error that gives a reason and, unless it has been shown, the child's output."""
    return DemoError("\n".join([reason, *([] if child.verbose else child.output)]))


def key_in(folder: Path) -> str:
    """Return the encryption key of a folder of data, made at its first use."""
    path = folder / "encryption.key"
    if not (path.exists() and path.read_text()):
        path.touch(0o600)
        path.write_text(secrets.token_urlsafe(32))
    return path.read_text()


def is_taken(port: int) -> bool:
    """Tell whether something listens on a port of loopback, over IPv4 or IPv6."""
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
    return False


def free_port() -> int:
    """Return a port of loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def say(text: str) -> None:
    """Print at once; go on in silence where nobody reads any more."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def two_ports(text: str) -> tuple[int, int]:
    """Read ``9081,9082``."""
    first, second = map(int, text.split(","))
    if first == second or not all(0 < port < 65536 for port in (first, second)):
        raise ValueError(text)
    return first, second


two_ports.__name__ = "pair of ports"  # argparse shows it


def main() -> int:
    """Run the demo as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--ports",
        type=two_ports,
        default=(9081, 9082),
        metavar="A,B",
        help="ports of the two nodes (9081,9082)",
    )
    parser.add_argument(
        "--store-port", type=int, metavar="N", help="port of the store (a free one)"
    )
    parser.add_argument(
        "--dir", type=Path, help="folder to keep the data in (none: a new one, removed at the end)"
    )
    parser.add_argument(
        "--encrypt", action="store_true", help="encrypt carts and logins in the store"
    )
    parser.add_argument("--verbose", action="store_true", help="show the output of all processes")
    options = parser.parse_args()
    folder = options.dir or Path(tempfile.mkdtemp(prefix="clustered-sessions-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    encryption_keys = os.environ.get("SHOP_ENCRYPTION_KEYS", "")
    if options.encrypt and not encryption_keys:
        encryption_keys = key_in(folder)
    demo = Demo(
        options.ports,
        options.store_port or free_port(),
        folder.resolve(),
        encryption_keys=encryption_keys,
        verbose=options.verbose,
    )
    try:
        return asyncio.run(demo.run())
    finally:
        if options.dir is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
