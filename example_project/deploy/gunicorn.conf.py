"""How gunicorn runs a node behind HAProxy: on SIGTERM it first lets HAProxy look elsewhere."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

#: Seconds between SIGTERM and the end of accepting. HAProxy looks every second and gives an answer
#: up to three seconds; what it sends meanwhile is served.
DRAIN_S = 5

# What is missing fails here, and not at a visitor's first request.
for name in ("SHOP_BIND", "SHOP_NODE", "SHOP_SECRET_KEY", "SHOP_STORE", "SHOP_DATABASE"):
    if not os.environ.get(name):
        raise SystemExit(f"{name} is not set: see docs/deploy.md")

bind = os.environ["SHOP_BIND"]
worker_class = "gthread"
workers = int(os.environ.get("SHOP_WORKERS", "2"))
threads = 8

# From SIGTERM on: the drain, then what the longest request may take.
graceful_timeout = DRAIN_S + 25

# HAProxy takes a new connection for each request: see haproxy.cfg.
keepalive = 0

# Its default path is one per user, so two nodes on a machine would share it.
control_socket_disable = True


def post_worker_init(worker: Any) -> None:
    """Have a worker go on for ``DRAIN_S`` after SIGTERM, while its health page answers 404.

    By itself gunicorn stops accepting at once, but its port stays open until the last request is
    done: the kernel takes connections that nobody will serve, and resets them at the end.
    """
    from shop.health import leaving

    def leave(number: int, frame: Any) -> None:
        if leaving.is_set():
            return
        leaving.set()
        stop = threading.Timer(DRAIN_S, worker.handle_exit, (number, None))
        stop.daemon = True
        stop.start()

    signal.signal(signal.SIGTERM, leave)
    signal.siginterrupt(signal.SIGTERM, False)
