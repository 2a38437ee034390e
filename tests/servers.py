"""Real stores, and a proxy that counts and breaks connections, for tests."""

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

#: Ports of test servers. They, and the bus ports of cluster nodes, are below 32768, from where the
#: system assigns ports to connections.
PORTS: Final = range(12_000, 22_000)

#: Difference between the bus port of a cluster node and its own port.
CLUSTER_BUS: Final = 10_000


#: Bytes by which a connection is known: its greeting is among them.
_FIRST_BYTES: Final = 4096


def _free_ports() -> Iterator[int]:
    """Yield free ports on loopback, each reserved for this process until it ends.

    The reservation is a lock on one byte of a file, so that parallel test processes do not choose
    the same port between the check that it is free and the start of the server.
    """
    # One file for all runs of a user on the machine: forks of tests/mutation have temporary folders
    # of their own, and tests/newest/run has another root, but both share /dev.
    shared = Path("/dev/shm")
    folder = shared if shared.is_dir() else Path(tempfile.gettempdir())
    with (folder / f"dcs-ports-{os.getuid()}").open("wb") as reserved:
        # Tests do not depend on the order, so it need not follow the seed of the run.
        for port in random.SystemRandom().sample(PORTS, len(PORTS)):
            with suppress(OSError):
                fcntl.lockf(reserved, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
                for number in (port, port + CLUSTER_BUS):
                    socket.create_server(("127.0.0.1", number)).close()
                yield port


_ports = _free_ports()
#: Two threads of a test cannot be in a generator at once.
_one_by_one = threading.Lock()


def free_port() -> int:
    """Return a TCP port on loopback that no other test gets, nor the port of its cluster bus."""
    with _one_by_one:
        return next(_ports)


def wait_for(condition: Callable[[], Any], what: str, *, timeout_s: float = 10.0) -> Any:
    """Return the condition's first true value; fail if there is none within ``timeout_s``.

    A refused or reset connection counts as false: a Sentinel, for example, disconnects all clients
    of a replica that it promotes.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        with suppress(redis.ConnectionError):
            if value := condition():
                return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s} s in vain: {what}")
        # Interval of polling; the wait ends by the condition.
        time.sleep(0.005)


def raw_client(url: str, **options: Any) -> redis.Redis:
    """Return a client that never retries, with socket timeouts of 5 s."""
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
        # Replicas synchronise at once, and a shutdown does not wait for lagging ones.
        hurry = ("--repl-diskless-sync-delay", "0", "--shutdown-timeout", "0")
        # tmp_path of pytest may be too long: the path of a unix socket has at most 107 bytes.
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
        """Stop and start on the same port; data that is not on disk is lost."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """End the process at once with SIGKILL, as a power cut would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def pause(self) -> None:
        """Pause the process with SIGSTOP; its sockets stay open and silent."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        # Returns once the process has stopped, so no reply can follow.
        os.waitpid(self.process.pid, os.WUNTRACED)

    def resume(self) -> None:
        """Resume a paused process."""
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
    """Proxy between clients and a store that counts round trips and breaks connections.

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
            #: Requests of the clients: raw bytes, one item for each round trip.
            self.requests: list[bytearray] = []
            #: Bytes from the store to clients.
            self.bytes_received = 0

    @property
    def round_trips(self) -> int:
        """Return the number of round trips begun since the last `reset`."""
        return len(self.requests)

    @property
    def bytes_sent(self) -> int:
        """Return the bytes from clients to the store since the last `reset`."""
        with self._lock:
            return sum(map(len, self.requests))

    def cut_next(
        self, where: Literal["request", "reply", "half"], *, times: int = 1, matching: bytes = b""
    ) -> None:
        """Cut the connection of each of the next ``times`` round trips that contain ``matching``.

        ``"request"``: the store never receives it. ``"reply"``: the store executes it, and the
        client receives no byte of the reply. ``"half"``: the client receives half of the reply.
        """
        with self._lock:
            self._faults += [_Fault(where, matching) for _ in range(times)]

    def cut(self) -> None:
        """Cut all open connections."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.close()

    def stall(self) -> None:
        """Hold back all replies from now on; requests still reach the store."""
        self._flowing.clear()

    def resume(self) -> None:
        """Forward replies again, beginning with the held ones."""
        self._flowing.set()

    def swallow(self, what: Literal["requests", "replies"], *, of: bytes) -> None:
        """Swallow one direction of open connections from now on, and their end.

        Those are meant whose first requests contain ``of``; new ones are let through.
        """
        with self._lock:
            for link in self._links:
                if of in link.first:
                    link.swallowed = what

    def refuse(self) -> None:
        """Refuse new connections, like a host without a store, and cut the open ones."""
        listener, self._listener = self._listener, None
        if listener is not None:
            # Wakes the thread in accept(); after close() alone the port would still listen.
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
        """Refuse new connections, and drop all held replies."""
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
                # refuse() was called between accept() and the line above.
                link.close()
            for pump in (self._pump_requests, self._pump_replies):
                threading.Thread(target=pump, args=(link,), daemon=True).start()

    def _pump_requests(self, link: _Link) -> None:
        while data := link.receive(link.client):
            # A large command arrives in pieces, but counts as one request.
            with self._lock:
                link.first += data[: max(0, _FIRST_BYTES - len(link.first))]
                if link.swallowed == "requests":
                    continue
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
            if link.swallowed == "replies":
                continue
            if fault == "half":
                link.send(link.client, data[: len(data) // 2])
            if fault is not None or not link.send(link.client, data):
                break
        self._end(link)

    def _end(self, link: _Link) -> None:
        if link.swallowed:
            # The store's end of the connection is swallowed as well.
            link.store.close()
            return
        link.close()
        with self._lock:
            self._links.discard(link)


@dataclass(frozen=True)
class _Fault:
    where: str
    matching: bytes


@dataclass(eq=False)
class _Link:
    """Pair of a client's connection and its connection to the store."""

    client: socket.socket
    store: socket.socket
    request: bytearray = field(default_factory=bytearray)
    replied: bool = True
    fault: str | None = None
    #: The beginning of what the client has sent, and the direction that is swallowed.
    first: bytearray = field(default_factory=bytearray)
    swallowed: str = ""

    def receive(self, end: socket.socket) -> bytes:
        """Return the next bytes from one end, b"" when it is closed."""
        try:
            return end.recv(1 << 20)
        except OSError:
            return b""

    def send(self, end: socket.socket, data: bytes) -> bool:
        """Send the bytes to one end; return whether that succeeded."""
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
    """Lend a connection of one of the package's pools, not yet connected; give it back later."""
    return pool.lend(deadline_s())


async def alent(pool: Any) -> Any:
    """See lent()."""
    return await pool.lend(deadline_s())


def deadline_s() -> float:
    """Return a distant deadline by time.monotonic()."""
    return time.monotonic() + 20
