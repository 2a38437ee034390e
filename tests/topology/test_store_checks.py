"""System checks of a primary that Sentinels watch."""

from __future__ import annotations

from typing import Any

from django_clustered_sessions.checks.store import check_store
from tests.conftest import use_store
from tests.topologies import Replicated


def found() -> list[str | None]:
    return [message.id for message in check_store()]


def test_watched_primary_is_to_need_replicas_to_write(settings: Any) -> None:
    """Asked for with Sentinels only: without them no other is promoted."""
    with Replicated("--appendonly", "yes", sentinels=1) as topology:
        primary = topology.primary.client()
        topology.use(settings, 1)
        assert found() == ["clustered_sessions.W017"]
        primary.config_set("min-replicas-to-write", 1)
        assert found() == []
        topology.admit("site", "on", ">secret", "~*", "+@all", "-config")
        topology.use(settings, 1, user="site:secret")
        assert found() == ["clustered_sessions.I001"]
        use_store(settings, f"{topology.primary.url}/1")
        primary.config_set("min-replicas-to-write", 0)
        assert found() == []
