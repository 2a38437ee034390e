"""Fixtures for projects that test themselves against a real store; importing starts nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

# pytest imports this module in every project with the package installed, so it imports little.
if TYPE_CHECKING:
    from .embedded import EmbeddedStore


@pytest.fixture(scope="session")
def clustered_sessions_server() -> Iterator[EmbeddedStore]:
    """Run one embedded store for the whole test run, on a unix socket, with nothing on disk."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from .embedded import EmbeddedStore

    # Not tmp_path_factory: the path of a unix socket has at most 107 bytes.
    with TemporaryDirectory(prefix="sessions-") as folder, EmbeddedStore(Path(folder)) as server:
        yield server


@pytest.fixture
def clustered_sessions_store(clustered_sessions_server: EmbeddedStore) -> Iterator[EmbeddedStore]:
    """Keep the sessions of this test in an embedded store that is empty at its start.

    ``url`` of the fixture's value is the store's address, for a client of your own.
    """
    from django.conf import settings
    from django.test import override_settings

    clustered_sessions_server.flush()
    entry = {
        "BACKEND": "django_redis.cache.RedisCache",
        "LOCATION": clustered_sessions_server.url,
    }
    with override_settings(
        CACHES=settings.CACHES | {"clustered_sessions": entry},
        SESSION_CACHE_ALIAS="clustered_sessions",
        SESSION_ENGINE="django_clustered_sessions.backend",
    ):
        yield clustered_sessions_server
