"""Real stores, and a proxy that counts and breaks: what the tests run against."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from django_clustered_sessions.embedded import EmbeddedStore, EmbeddedStoreError

#: Ports that servers of tests may have. The system gives connections the ports from 32768 on, so
#: none of them takes one of these, nor that of the bus of a cluster's node.
PORTS: Final = range(12_000, 22_000)

#: The port of the bus of a cluster's node is the node's own and this.
CLUSTER_BUS: Final = 10_000


def _free_ports() -> Iterator[int]:
    """Yield ports that are free on loopback, each reserved for this process until it ends.

    The reservation is a lock on one byte of a file, so that processes that run tests side by side
    do not take the same port between the moment it is found free and the start of the server.
    """
    # One file for all of a user's on the machine: forks of tests/mutation have temporary folders of
    # their own, and tests/newest/run has another root, but this machine's /dev.
    shared = Path("/dev/shm")
    folder = shared if shared.is_dir() else Path(tempfile.gettempdir())
    with (folder / f"dcs-ports-{os.getuid()}").open("wb") as reserved:
        # The order is of no consequence to a test, so it does not depend on the seed of the run.
        for port in random.SystemRandom().sample(PORTS, len(PORTS)):
            with suppress(OSError):
                fcntl.lockf(reserved, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
                for number in (port, port + CLUSTER_BUS):
                    socket.create_server(("127.0.0.1", number)).close()
                yield port


_ports = _free_ports()


def free_port() -> int:
    """Return a TCP port of loopback that no other test gets, with one for a cluster's bus."""
    return next(_ports)


def wait_for(condition: Callable[[], Any], what: str, *, timeout_s: float = 10.0) -> Any:
    """Return the condition's first true value; fail when there is none within ``timeout_s``.

    A store that refuses or resets the connection counts as not yet: a Sentinel, for one, cuts
    all clients of a replica that it promotes.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        with suppress(redis.ConnectionError):
            if value := condition():
                return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s} s in vain: {what}")
        # Between two looks; what is waited for is the condition.
        time.sleep(0.005)


def raw_client(url: str, **options: Any) -> redis.Redis:
    """Return a client that sends every command once: no retries, sockets of 5 s."""
    options = {"socket_timeout": 5.0, "retry": Retry(NoBackoff(), 0)} | options
    return redis.Redis.from_url(url, **options)


class StoreServer(EmbeddedStore):
    """Run a real store on a port of loopback and on a unix socket, in a folder of its own.

    ``flags`` are appended to the command line and win over the defaults, for example
    ``"--requirepass", "secret"`` or ``"--replicaof", "127.0.0.1 6380"``. ``config`` is the text
    of a configuration file, which ``--sentinel`` needs; the server may rewrite it. The port stays
    the same over restarts. The bundled binary is built without TLS, Debian's redis-server with it.
    Use as a context manager, or call `start` and `close`.
    """

    def __init__(
        self, *flags: str, binary: Path | None = None, port: int | None = None, config: str = ""
    ) -> None:
        self.port = port or free_port()
        network = ("--bind", "127.0.0.1", "--port", str(self.port))
        # A replica syncs at once, and nobody waits for one that lags when the test is over.
        hurry = ("--repl-diskless-sync-delay", "0", "--shutdown-timeout", "0")
        # Not pytest's tmp_path: the path of a unix socket has at most 107 bytes.
        folder = Path(tempfile.mkdtemp(prefix="dcs-"))
        super().__init__(folder, *network, *hurry, *flags, binary=binary)
        self.config_path = self.folder / "store.conf"
        self.config_path.write_text(config)

    @property
    def url(self) -> str:
        """Return the TCP address, without a database."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def unix_url(self) -> str:
        """Return the address of the unix socket."""
        return super().url

    def command(self) -> Sequence[str]:
        binary, *defaults = super().command()
        return [binary, str(self.config_path), *defaults]

    def client(self, **options: Any) -> redis.Redis:
        """Return a raw client; ``options`` are redis-py's, such as ``db`` or ``password``."""
        return raw_client(self.url, **options)

    def restart(self) -> None:
        """Stop and start on the same port; what was not persisted is gone."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """End the process at once with SIGKILL, as a power cut would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def pause(self) -> None:
        """Stop the process from running with SIGSTOP; its sockets stay open and silent."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        # Only from here on is it certain that nothing is answered any more.
        os.waitpid(self.process.pid, os.WUNTRACED)

    def resume(self) -> None:
        """Let a paused process run on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Stop the process and remove its folder."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> StoreServer:
        try:
            self.start()
        except EmbeddedStoreError:
            self.close()
            raise
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


class CountingProxy:
    """Stand between clients and a store, count what passes, and break it where a test says so.

    A round trip is a change of direction: bytes of the client after bytes of the store, per
    connection. The handshake of a new connection (HELLO, SELECT, ...) counts too, so warm the
    client up, then `reset`. Use as a context manager, or call `close`.
    """

    def __init__(self, upstream_port: int) -> None:
        self.upstream_port = upstream_port
        self.port = free_port()
        self._lock = threading.Lock()
        self._flowing = threading.Event()
        self._flowing.set()
        self._links: set[_Link] = set()
        self._faults: list[_Fault] = []
        self._listener: socket.socket | None = None
        self.reset()
        self.accept()

    @property
    def url(self) -> str:
        """Return the TCP address of the proxy, without a database."""
        return f"redis://127.0.0.1:{self.port}"

    def reset(self) -> None:
        """Set all counts to zero; connections stay as they are."""
        with self._lock:
            #: Connections accepted.
            self.connections = 0
            #: What clients sent, one entry of raw bytes for each round trip.
            self.requests: list[bytearray] = []
            #: Bytes from the store to clients.
            self.bytes_received = 0

    @property
    def round_trips(self) -> int:
        """Return how many round trips have begun since the last `reset`."""
        return len(self.requests)

    @property
    def bytes_sent(self) -> int:
        """Return the bytes from clients to the store since the last `reset`."""
        with self._lock:
            return sum(map(len, self.requests))

    def cut_next(
        self, where: Literal["request", "reply", "half"], *, times: int = 1, matching: bytes = b""
    ) -> None:
        """Cut the connection of each of the next ``times`` round trips that hold ``matching``.

        ``"request"``: the store never sees it. ``"reply"``: the store has executed it, and the
        client gets not one byte of the reply. ``"half"``: the client gets half of the reply.
        """
        with self._lock:
            self._faults += [_Fault(where, matching) for _ in range(times)]

    def cut(self) -> None:
        """Cut every connection that is open now."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.close()

    def stall(self) -> None:
        """Hold replies back from now on; requests still reach the store."""
        self._flowing.clear()

    def resume(self) -> None:
        """Let replies pass again, first the ones held back."""
        self._flowing.set()

    def refuse(self) -> None:
        """Refuse new connections, as a host without a store does, and cut the open ones."""
        listener, self._listener = self._listener, None
        if listener is not None:
            # Wakes the thread in accept(); close() alone would leave the port listening.
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.cut()

    def accept(self) -> None:
        """Accept connections again, on the same port."""
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port))
            threading.Thread(target=self._serve, args=(self._listener,), daemon=True).start()

    def close(self) -> None:
        """Refuse everything and let every held reply go nowhere."""
        self.refuse()
        self.resume()

    def __enter__(self) -> CountingProxy:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                store = socket.create_connection(("127.0.0.1", self.upstream_port))
            except OSError:
                client.close()
                continue
            link = _Link(client, store)
            with self._lock:
                self.connections += 1
                self._links.add(link)
            if listener is not self._listener:
                # refuse() came between accept() and the line above.
                link.close()
            for pump in (self._pump_requests, self._pump_replies):
                threading.Thread(target=pump, args=(link,), daemon=True).start()

    def _pump_requests(self, link: _Link) -> None:
        while data := link.receive(link.client):
            # A large command arrives in pieces; it is one request all the same.
            with self._lock:
                if link.replied:
                    link.replied, link.fault, link.request = False, None, bytearray()
                    self.requests.append(link.request)
                link.request += data
                if link.fault is None:
                    link.fault = self._take_fault(link.request)
                cut = link.fault == "request"
            if cut or not link.send(link.store, data):
                break
        self._end(link)

    def _take_fault(self, request: bytearray) -> str | None:
        for fault in self._faults:
            if fault.matching in request:
                self._faults.remove(fault)
                return fault.where
        return None

    def _pump_replies(self, link: _Link) -> None:
        while data := link.receive(link.store):
            with self._lock:
                self.bytes_received += len(data)
                link.replied = True
                fault = link.fault
            self._flowing.wait()
            if fault == "half":
                link.send(link.client, data[: len(data) // 2])
            if fault is not None or not link.send(link.client, data):
                break
        self._end(link)

    def _end(self, link: _Link) -> None:
        link.close()
        with self._lock:
            self._links.discard(link)


@dataclass(frozen=True)
class _Fault:
    where: str
    matching: bytes


@dataclass(eq=False)
class _Link:
    """Pair a client's connection with the one to the store that stands for it."""

    client: socket.socket
    store: socket.socket
    request: bytearray = field(default_factory=bytearray)
    replied: bool = True
    fault: str | None = None

    def receive(self, end: socket.socket) -> bytes:
        """Return the next bytes of one end, none when it is closed."""
        try:
            return end.recv(1 << 20)
        except OSError:
            return b""

    def send(self, end: socket.socket, data: bytes) -> bool:
        """Tell whether one end took the bytes."""
        try:
            end.sendall(data)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close both ends, and wake the threads that read from them."""
        for end in (self.client, self.store):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def lent(pool: Any) -> Any:
    """Return a connection of a pool of the package's; it has to be taken back, and to connect."""
    return pool.lend(deadline_s())


async def alent(pool: Any) -> Any:
    """See lent()."""
    return await pool.lend(deadline_s())


def deadline_s() -> float:
    """Return a time of time.monotonic() by which anything is done."""
    return time.monotonic() + 20
