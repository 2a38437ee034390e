"""How gunicorn runs a node; it reads this file from the folder it is started in."""

from __future__ import annotations

worker_class = "gthread"
threads = 4
graceful_timeout = 3
# Its default path is one per user, so two nodes would share it.
control_socket_disable = True
