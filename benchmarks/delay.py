"""A proxy that makes a store as far away as one on a network: a process of its own.

    python -m benchmarks.delay STORE_PORT PORT MILLISECONDS

Each direction holds what passes back for half of the time. What the proxy itself takes comes on
top, so `distance` measures the round trip that comes of it.
"""

from __future__ import annotations

import ctypes
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

#: Times there and back to a store on a network, in ms: in one data centre, and between two.
DELAYS_MS: Final = (0.5, 2.0)


def serve(store_port: int, port: int, delay_s: float) -> None:
    """Pass on what comes, late, until the process is ended."""
    if sys.platform == "linux":
        # PR_SET_TIMERSLACK: timers of 250 us that are not 50 us late.
        ctypes.CDLL(None).prctl(29, 1)
    listener = socket.create_server(("127.0.0.1", port))
    print("ready", flush=True)
    while True:
        client, _ = listener.accept()
        store = socket.create_connection(("127.0.0.1", store_port))
        for end in (client, store):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for source, target in ((client, store), (store, client)):
            threading.Thread(target=_pump, args=(source, target, delay_s / 2), daemon=True).start()


def _pump(source: socket.socket, target: socket.socket, delay_s: float) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 20):
            time.sleep(delay_s)
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextmanager
def delayed(store_port: int, port: int, delay_ms: float) -> Iterator[None]:
    """Run the proxy for a while."""
    command = [sys.executable, "-m", __name__, str(store_port), str(port), str(delay_ms)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.terminate()


def distance(url: str) -> float:
    """Return the median time of a PING there and back, in ms."""
    import redis

    times = []
    with redis.Redis.from_url(url) as client:
        for _ in range(100):
            before = time.perf_counter()
            client.ping()
            times.append((time.perf_counter() - before) * 1000)
    return statistics.median(times)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) / 1000)
