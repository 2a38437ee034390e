"""A test of this folder fails where it reaches for a store: see ``conftest.py``."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from contextlib import AbstractContextManager

import pytest

from django_clustered_sessions.backend import SessionStore


def refused() -> AbstractContextManager[object]:
    return pytest.raises(pytest.fail.Exception, match="belongs in tests/store")


@pytest.mark.parametrize("name", ["server_binary", "store_server", "store", "proxy"])
def test_fixtures_of_a_store_are_refused(name: str, request: pytest.FixtureRequest) -> None:
    with refused():
        request.getfixturevalue(name)


def test_connections_are_refused() -> None:
    with refused():
        socket.create_connection(("127.0.0.1", 1))
    with refused():
        SessionStore().exists("a" * 32)
    with refused():
        asyncio.run(SessionStore().aexists("a" * 32))


def test_programs_are_refused() -> None:
    with refused():
        subprocess.run(["valkey-server", "--version"])
