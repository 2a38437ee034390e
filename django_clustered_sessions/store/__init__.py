"""The way to the store: connections, drivers, a cluster's nodes, Sentinels, the breaker."""

from __future__ import annotations
