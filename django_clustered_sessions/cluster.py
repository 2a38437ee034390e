"""The django-redis connection factory that declares the store a cluster."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, ClassVar

from redis.cluster import RedisCluster


class ClusterConnectionFactory:
    """Declare in a django-redis entry of CACHES that its LOCATION names nodes of a cluster.

    Sessions use connections of their own. Users of the entry through ``caches`` share one redis-py
    cluster client for each set of start-up nodes. django-redis' operations on several keys work
    if all keys are in one slot.
    """

    _clients: ClassVar[dict[str, RedisCluster]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options

    def connect(self, url: str) -> RedisCluster:
        """Return the client of the cluster; the URL names one of its nodes."""
        with self._lock:
            if url not in self._clients:
                given = {
                    "username": self._options.get("USERNAME"),
                    "password": self._options.get("PASSWORD"),
                    "socket_timeout": self._options.get("SOCKET_TIMEOUT"),
                    "socket_connect_timeout": self._options.get("SOCKET_CONNECT_TIMEOUT"),
                    **(self._options.get("CONNECTION_POOL_KWARGS") or {}),
                }
                keywords = {name: value for name, value in given.items() if value is not None}
                self._clients[url] = RedisCluster.from_url(url, **keywords)
            return self._clients[url]

    def disconnect(self, connection: RedisCluster) -> None:
        """Close a client's connections; the client opens new ones on its next use."""
        connection.disconnect_connection_pools()  # type: ignore[no-untyped-call]
