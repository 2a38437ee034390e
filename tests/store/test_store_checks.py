"""System checks of a store that tells its settings, refuses to, or is away."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from django.core.checks import CheckMessage, run_checks

from django_clustered_sessions.checks import store as module
from django_clustered_sessions.checks.store import check_store
from django_clustered_sessions.store import connections
from django_clustered_sessions.store.entries import django_redis
from tests.conftest import use_store
from tests.servers import StoreServer
from tests.store.test_sharing import NoEcho


def ids(messages: list[CheckMessage]) -> list[str]:
    return [message.id.removeprefix("clustered_sessions.") for message in messages if message.id]


def test_check_command_asks_the_store_for_a_deployment() -> None:
    found = run_checks(include_deployment_checks=True)
    assert "clustered_sessions.W006" in [message.id for message in found]


def test_store_that_is_away_is_warned_of() -> None:
    (message,) = check_store()
    assert message.id == "clustered_sessions.W006"
    assert "\n" not in message.msg
    assert "refused" in message.msg


def test_store_that_is_away_is_to_be_started(settings: Any) -> None:
    (message,) = check_store()
    assert message.hint
    assert "manage.py sessionserver" in message.hint
    assert "CACHES['sessions']" in message.hint


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://127.0.0.1:{port}/1", "wants a password"),
        ("redis://:other@127.0.0.1:{port}/1", "not accept user or password"),
        ("redis://other:secret@127.0.0.1:{port}/1", "not accept user or password"),
        ("redis://:secret@127.0.0.1:{port}/99", "no database of that number"),
    ],
    ids=["no password", "password", "user", "database"],
)
def test_store_that_refuses_is_said_to_have_answered(
    lasting: redis.Redis, settings: Any, url: str, words: str
) -> None:
    lasting.config_set("requirepass", "secret")
    use_store(settings, url.format(port=lasting.get_connection_kwargs()["port"]))
    (message,) = check_store()
    assert message.id == "clustered_sessions.W006"
    assert message.msg.startswith("The store refused: it ")
    assert words in message.msg
    assert "CACHES['sessions']" in str(message.hint)
    assert "\n" not in message.msg
    for secret in ("secret", "other"):
        assert secret not in message.msg + str(message.hint)


def test_port_without_tls_is_suspected(store_server: StoreServer, settings: Any) -> None:
    # It is waited for: the server takes the greeting for the beginning of a command.
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 0.2
    use_store(settings, f"rediss://127.0.0.1:{store_server.port}/1")
    (message,) = check_store()
    assert message.id == "clustered_sessions.W006"
    assert "could not be asked by TLS" in message.msg
    assert "see that this port speaks TLS, or write redis://" in str(message.hint)


def test_silent_store_is_warned_of(store_server: StoreServer, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 0.05
    use_store(settings, f"{store_server.url}/1")
    store_server.pause()
    try:
        assert ids(check_store()) == ["W006"]
    finally:
        store_server.resume()


@pytest.fixture
def lasting(store_server: StoreServer, settings: Any) -> Iterator[redis.Redis]:
    """Point the settings at a store with an append-only file; yield a client that may do all.

    The user that the settings name is made by ``admit``.
    """
    with (
        StoreServer("--appendonly", "yes", binary=store_server.binary) as server,
        server.client() as client,
    ):
        use_store(settings, f"redis://site:secret@127.0.0.1:{server.port}/1")
        yield client


def admit(client: redis.Redis, *rules: str) -> None:
    """Let the site's user do everything, but for the rules."""
    client.execute_command("ACL SETUSER site on >secret ~* +@all", *rules)


def test_checks_follow_the_settings_of_the_store(
    lasting: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    admit(lasting)
    assert check_store() == []
    for name, value, expected in (
        ("maxmemory-policy", "volatile-lru", ["W007"]),
        ("maxmemory-policy", "noeviction", []),
        ("appendonly", "no", ["W008"]),
        ("save", "3600 1", []),
    ):
        lasting.config_set(name, value)
        assert ids(check_store()) == expected, (name, value)
    # As if Sentinels had named it.
    monkeypatch.setattr(connections, "watcher", object)
    assert ids(check_store()) == ["W017"]
    lasting.config_set("min-replicas-to-write", 1)
    assert check_store() == []


@pytest.mark.parametrize(
    ("forbidden", "expected"),
    [
        # What is wanted of CONFIG is only asked for without an append-only file.
        ("-config", []),
        ("-info", ["I001", "I001", "I001"]),
    ],
)
def test_forbidden_commands_leave_checks_undone(
    forbidden: str, expected: list[str], lasting: redis.Redis
) -> None:
    admit(lasting, forbidden)
    messages = check_store()
    assert ids(messages) == expected
    assert all(message.hint and "NOPERM" in message.msg for message in messages)
    assert all(message.level < 30 for message in messages)


def test_forbidden_config_leaves_the_disk_unchecked(lasting: redis.Redis) -> None:
    lasting.config_set("appendonly", "no")
    admit(lasting, "-config")
    (message,) = check_store()
    assert message.id == "clustered_sessions.I001"
    assert "on disk" in message.msg


def test_clock_ahead_of_the_store_is_warned_of(
    store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = time.time
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: now_s() + 3600))
    began_s = time.monotonic()
    (message,) = (found for found in check_store() if str(found.id).endswith("W009"))
    took_s = time.monotonic() - began_s
    (ahead_s,) = re.findall(r"(\d+\.\d) s ahead of", message.msg)
    # The store is asked on a trip, somewhere within which it reads its own clock.
    assert abs(float(ahead_s) - 3600) <= took_s + 0.1


def test_store_without_replicas_is_warned_of(store: redis.Redis, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_SYNC_REPLICAS = 1
    assert "W014" in ids(check_store())


def test_store_that_is_no_cluster_is_warned_of(
    store: redis.Redis, store_server: StoreServer, settings: Any
) -> None:
    """The other way round is in test_cluster: clustered_sessions.W019."""
    use_store(settings, store_server.url, CONNECTION_FACTORY=django_redis.CLUSTER)
    assert ids(check_store()) == ["W008", "W019"]


def test_store_that_does_not_track_is_warned_of(lasting: redis.Redis, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_NEAR_READS = "tracked"
    port = lasting.get_connection_kwargs()["port"]
    use_store(settings, f"redis://127.0.0.1:{port}/1")
    assert ids(check_store()) == []
    rights = ("on", ">secret", "~*", "+@all", "-client|tracking")
    lasting.execute_command("ACL SETUSER", "untracked", *rights)
    use_store(settings, f"redis://untracked:secret@127.0.0.1:{port}/1")
    (message,) = check_store()
    assert message.id == "clustered_sessions.W021"
    assert "client|tracking" in message.msg


def test_store_that_refuses_marks_is_told_of(lasting: redis.Redis, settings: Any) -> None:
    port = lasting.get_connection_kwargs()["port"]
    lasting.execute_command("ACL SETUSER", "unmarked", "on", ">secret", "~*", "+@all", "-ping")
    use_store(settings, f"redis://unmarked:secret@127.0.0.1:{port}/1")
    (message,) = check_store()
    assert message.id == "clustered_sessions.I003"
    assert "ping" in message.msg


@pytest.mark.parametrize("answer", [b"+PONG\r\n", b"$4\r\nPONG\r\n", b"+OK\r\n"])
def test_proxy_that_answers_ping_is_told_of(
    lasting: redis.Redis, settings: Any, answer: bytes
) -> None:
    with NoEcho(lasting.get_connection_kwargs()["port"], answer) as proxy:
        use_store(settings, f"{proxy.url}/1")
        (message,) = check_store()
    assert message.id == "clustered_sessions.I003"
    assert "without its text" in message.msg
