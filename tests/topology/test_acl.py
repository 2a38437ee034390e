"""The rules of docs/deploy-store.md: enough for everything, and not one command too many."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from random import Random
from typing import Any

import pytest
import redis
from django.core.management import CommandError, call_command
from redis.crc import key_slot

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.checks.store import check_store
from django_clustered_sessions.conf import conf
from django_clustered_sessions.exceptions import ClusteredSessionError, SessionStoreUnavailable
from django_clustered_sessions.management.commands.sessionevents import Worker
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol.record import BUCKETS, bucket_tag
from django_clustered_sessions.session.near_cache import near_cache
from django_clustered_sessions.store import connections, sharing
from tests.clocks import Ages, is_answered
from tests.clusters import ClusterServers
from tests.conftest import use_store
from tests.gateways import place
from tests.locking import Threads, new_session, outcome, wait_for_queue
from tests.pages import page
from tests.servers import StoreServer, wait_for

pytestmark = pytest.mark.usefixtures("no_databases")

PAGE = page("deploy-store.md")
CLUSTER_PAGE = page("cluster.md")

#: The rule of who uses sessions, and what else who looks at statistics needs.
(RULE,) = re.findall(r"^ACL SETUSER site on .*(?:\n +.*)*", PAGE, re.MULTILINE)
(MORE,) = re.findall(r"^ACL SETUSER site (\+zrange.*)$", PAGE, re.MULTILINE)
#: And who handles events.
(OF_EVENTS,) = re.findall(r"^ACL SETUSER site (\+xadd.*)$", PAGE, re.MULTILINE)
#: And who reads without a round trip.
(OF_TRACKED,) = re.findall(r"^ACL SETUSER site (\+client.*)$", PAGE, re.MULTILINE)

#: What else is needed on a cluster.
(CLUSTER,) = re.findall(r"^ACL SETUSER site (\+cluster.*)$", CLUSTER_PAGE, re.MULTILINE)

COMMANDS = re.findall(r"\+\S+", RULE)
STATISTICS = MORE.split()
EVENTS = OF_EVENTS.split()
TRACKED = OF_TRACKED.split()


@pytest.fixture(scope="module")
def server(store_server: StoreServer) -> Iterator[StoreServer]:
    with StoreServer("--appendonly", "yes", binary=store_server.binary) as started:
        yield started


@pytest.fixture
def admin(server: StoreServer, settings: Any) -> Iterator[redis.Redis]:
    """Point the settings at the user ``site``; give a client that may do all, in an empty store."""
    use_store(settings, f"redis://site:secret@127.0.0.1:{server.port}/1")
    # So that each load renews.
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = 600
    # A lock that cannot be given up is waited for.
    settings.CLUSTERED_SESSIONS_LOCK_LEASE = 1.0
    settings.CLUSTERED_SESSIONS_LOCK_WAIT = 5.0
    with server.client(decode_responses=True) as client:
        client.flushall()
        client.script_flush()
        client.acl_log_reset()
        yield client


def allow(admin: redis.Redis, rule: str, *commands: str) -> None:
    """Give the user a password, the rule's keys, and these commands."""
    terms = re.sub(r"\+\S+", "", rule).replace(">PASSWORD", ">secret").split()
    admin.execute_command("ACL SETUSER", "site", "reset")
    admin.execute_command(*terms, *commands)
    # A user that is reset loses its connections, and the pool does not know yet.
    connections.pool().disconnect()
    connections.waiting_pool().disconnect()


#: It is not compressed to less than 2 kB, below which a session is read whole.
LARGE = "".join(map(chr, Random(0).choices(range(33, 127), k=4000)))


def denied(admin: redis.Redis) -> set[str]:
    """Return which commands the user was denied, besides the client's name for itself."""
    return {entry["object"].lower() for entry in admin.acl_log()} - {"client|setinfo"}


def wait_for_a_lock(client: Callable[[str], redis.Redis], key: str) -> None:
    """Let a thread wait until it is woken; it has ended when this returns."""

    def wait() -> None:
        with SessionStore(key).lock() as waiter:
            waiter.increment("hits")

    with Threads() as threads, client(place(key).record) as raw:
        with SessionStore(key).lock():
            waiting = threads.start(wait)
            wait_for_queue(raw, key, 1)
        outcome(waiting)


def use_everything(server: StoreServer) -> None:
    """Do with sessions what a site can do."""
    with server.client(db=1) as raw, raw.pipeline(transaction=False) as pipeline:
        # In each bucket one that has expired, of which a new session takes note.
        for bucket in range(BUCKETS):
            pipeline.zadd(f"{bucket_tag(conf.key_prefix, bucket)}:index", {"A" * 43: -1})
        pipeline.execute()
    use_all(lambda key: server.client(db=1))


def use_all(client: Callable[[str], redis.Redis]) -> None:
    """Do with sessions what a site can do; ``client`` gives a raw client of who has a key."""
    session = SessionStore()
    session["n"], session["user"] = 1, LARGE
    session.save()
    key = session.session_key
    # By a script, which leaves out what is known here.
    assert SessionStore(key)["n"] == 1
    session["n"] += 1
    session.increment("hits")
    del session["user"]
    session.save()
    SessionStore(key).load()
    near_cache.clear()
    assert SessionStore(key).load() == {"n": 2, "hits": 1}
    first, second = SessionStore(key), SessionStore(key)
    first["a"], second["b"] = 1, 2
    first["n"], second["n"] = 3, 4
    first.save()
    second.save()
    with SessionStore(key).lock() as locked:
        locked["n"] = 5
        locked.commit()
    wait_for_a_lock(client, key or "")
    assert session.exists(key)
    sliding = SessionStore(key)
    sliding.cycle_key()
    sliding.clear()
    sliding["n"] = 5
    sliding.save()
    asyncio.run(use_asynchronously(sliding.session_key))
    sliding["_auth_user_id"] = "1"
    sliding.save()
    other = SessionStore()
    other["_auth_user_id"] = "1"
    other.save()
    assert registry.end_sessions_of(1, keep=sliding) == 1
    sliding.flush()
    assert not SessionStore().exists(key)


async def use_asynchronously(key: str | None) -> None:
    session = SessionStore(key)
    await session.aset("n", 6)
    await session.asave()
    async with session.alock():
        await session.aset("n", 7)
    # Some of them share a connection.
    await asyncio.gather(*(SessionStore(key).aload() for _ in range(6)))


def look_at_everything() -> None:
    """Ask for statistics, locks and the checks of a deployment."""
    session = SessionStore()
    session["n"] = 1
    session.save()
    call_command("sessionstats", format="json", stdout=io.StringIO())
    call_command("sessionstats", locks=True, stdout=io.StringIO())
    assert check_store() == []


def test_list_of_all_sessions_needs_one_more_command(admin: redis.Redis) -> None:
    session = SessionStore()
    session["n"] = 1
    allow(admin, RULE, *COMMANDS)
    session.save()
    start = str(session.public_id)[:12]
    for look in (lambda: list(registry.matching()), lambda: registry.find(start)):
        with pytest.raises(SessionStoreUnavailable):
            look()
    allow(admin, RULE, *COMMANDS, "+zrange")
    assert [one.id for one in registry.matching()] == [session.public_id]
    assert [one.id for one in registry.page(9).sessions] == [session.public_id]
    assert registry.find(start)


def handle_events() -> None:
    """Let an event happen, and workers take it, give it back, and handle it."""
    SessionStore().save()

    def stop(event: Any) -> None:
        stopping.stop.set()
        SessionStore().save()

    stopping = Worker(stop, 60)
    stopping.pace = 2
    for _ in range(2):
        SessionStore().save()
    stopping.handle_all()
    found: list[Any] = []
    Worker(found.append, 60).run(once=True)
    assert len(found) == 3


def read_without_a_trip(settings: Any, ages: Ages) -> None:
    """Read a session until the store is asked no more, and PINGs were answered."""
    settings.CLUSTERED_SESSIONS_NEAR_READS = "tracked"
    settings.CLUSTERED_SESSIONS_NEAR_MAX_AGE = 60.0
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = None
    key = new_session(n=1)
    counters.clear()
    for _ in range(4):
        assert SessionStore(key)["n"] == 1
        wait_for(lambda: is_answered(key), "the store has answered")
        ages.go_on(36.0)
    # Without an answer to a PING the next but one has a read that asks.
    asked = counters.counts["loads"] - counters.counts["near_reads"]
    assert asked == 1


@pytest.mark.each_server
def test_rule_of_tracked_reads_is_enough(
    admin: redis.Redis, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(admin, RULE, *COMMANDS, *TRACKED)
    read_without_a_trip(settings, Ages(monkeypatch))
    assert denied(admin) == set()


@pytest.mark.each_server
@pytest.mark.parametrize("missing", TRACKED)
def test_each_command_for_tracked_reads_is_needed(
    missing: str, admin: redis.Redis, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(admin, RULE, *COMMANDS, *(command for command in TRACKED if command != missing))
    with suppress(AssertionError):
        read_without_a_trip(settings, Ages(monkeypatch))
    assert missing[1:] in denied(admin)


@pytest.mark.each_server
def test_rule_is_enough(admin: redis.Redis, server: StoreServer) -> None:
    allow(admin, RULE, *COMMANDS)
    use_everything(server)
    assert denied(admin) == set()


@pytest.mark.each_server
def test_rule_of_statistics_is_enough(admin: redis.Redis) -> None:
    allow(admin, RULE, *COMMANDS, *STATISTICS)
    look_at_everything()
    assert denied(admin) == set()


@pytest.mark.each_server
def test_rule_of_events_is_enough(admin: redis.Redis, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_EVENTS_KEPT = 1000
    allow(admin, RULE, *COMMANDS, *EVENTS)
    handle_events()
    assert denied(admin) == set()


@pytest.mark.parametrize("missing", EVENTS)
def test_each_command_for_events_is_needed(missing: str, admin: redis.Redis, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_EVENTS_KEPT = 1000
    granted = [command for command in (*COMMANDS, *EVENTS) if command != missing]
    allow(admin, RULE, *granted)
    with suppress(ClusteredSessionError, AssertionError):
        handle_events()
    assert missing[1:] in denied(admin)


@pytest.mark.parametrize("missing", COMMANDS)
def test_each_command_is_needed(missing: str, admin: redis.Redis, server: StoreServer) -> None:
    allow(admin, RULE, *(command for command in COMMANDS if command != missing))
    with suppress(ClusteredSessionError, AssertionError):
        use_everything(server)
    assert missing[1:] in denied(admin)


@pytest.mark.each_server
def test_without_marks_each_has_a_connection_of_its_own(
    admin: redis.Redis, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "_has_warned", False)
    allow(admin, RULE, *(command for command in COMMANDS if command != "+ping"), *STATISTICS)
    keys = [new_session(n=n) for n in range(20)]

    async def go() -> None:
        connected = []
        for _ in range(3):
            found = await asyncio.gather(*(SessionStore(key).aget("n") for key in keys))
            assert found == list(range(20))
            connected.append(admin.info("stats")["total_connections_received"])
        # Nobody tries to share again.
        assert connected[1] == connected[2]

    asyncio.run(go())
    asyncio.run(go())
    (warning,) = [one for one in caplog.messages if "share" in one]
    assert "ping" in warning.lower()
    assert [message.id for message in check_store()] == ["clustered_sessions.I003"]


@pytest.mark.parametrize("missing", STATISTICS)
def test_each_command_for_statistics_is_needed(missing: str, admin: redis.Redis) -> None:
    granted = [command for command in (*COMMANDS, *STATISTICS) if command != missing]
    allow(admin, RULE, *granted)
    with suppress(CommandError, AssertionError):
        look_at_everything()
    assert missing[1:] in denied(admin)


@pytest.mark.each_server
def test_keys_of_others_are_out_of_reach(admin: redis.Redis, server: StoreServer) -> None:
    allow(admin, RULE, *COMMANDS, *STATISTICS)
    admin.set("cache:x", "secret")
    with server.client(username="site", password="secret") as site:
        for command in (("HGETALL", "cache:x"), ("EXISTS", "cache:x"), ("BLPOP", "cache:x", 1)):
            with pytest.raises(redis.exceptions.NoPermissionError):
                site.execute_command(*command)
        for command in (
            ("KEYS", "*"),
            ("FLUSHALL",),
            ("CONFIG", "SET", "save", ""),
            ("PUBLISH", "a", "b"),
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                site.execute_command(*command)


# A cluster.


@pytest.fixture(scope="module")
def servers(store_server: StoreServer) -> Iterator[ClusterServers]:
    with ClusterServers(binary=store_server.binary) as started:
        yield started


def allow_everywhere(servers: ClusterServers, settings: Any, *commands: str) -> None:
    """Begin anew with a user of these commands on all nodes."""
    servers.flush()
    servers.use(settings, USERNAME="site", PASSWORD="secret")
    for one in servers.primaries:
        with one.client() as admin:
            allow(admin, RULE, *commands)
            admin.script_flush()
            admin.acl_log_reset()


def denied_anywhere(servers: ClusterServers) -> set[str]:
    clients = [one.client(decode_responses=True) for one in servers.primaries]
    return set[str]().union(*map(denied, clients))


def use_cluster(servers: ClusterServers, times: int) -> None:
    """Do all so many times, and read a session that is ahead of its slot."""
    for _ in range(times):
        use_all(servers.client)
    key = new_session(n=1)
    record = place(key).record
    home = servers.owner(record)
    target = next(one for one in servers.primaries if one is not home)
    with servers.moving(key_slot(record.encode()), home, target):
        servers.migrate(key_slot(record.encode()), home, target, record)
        # A script, at hand here; and not.
        assert SessionStore(key).load() == {"n": 1}
        near_cache.clear()
        assert SessionStore(key).load() == {"n": 1}


@pytest.mark.each_server
def test_rules_are_enough_on_a_cluster(servers: ClusterServers, settings: Any) -> None:
    allow_everywhere(servers, settings, *COMMANDS, *CLUSTER.split())
    # Two keys of a session are on different nodes twice in three times.
    use_cluster(servers, 5)
    assert denied_anywhere(servers) == set()


@pytest.mark.each_server
def test_rules_of_statistics_are_enough_on_a_cluster(
    servers: ClusterServers, settings: Any
) -> None:
    allow_everywhere(servers, settings, *COMMANDS, *CLUSTER.split(), *STATISTICS)
    new_session(n=1)
    call_command("sessionstats", format="json", stdout=io.StringIO())
    call_command("sessionstats", locks=True, stdout=io.StringIO())
    check_store()
    assert denied_anywhere(servers) == set()


@pytest.mark.parametrize("missing", CLUSTER.split())
def test_each_command_for_a_cluster_is_needed(
    servers: ClusterServers, settings: Any, missing: str
) -> None:
    granted = (command for command in CLUSTER.split() if command != missing)
    allow_everywhere(servers, settings, *COMMANDS, *granted)
    # A denied redirection, or map of the slots, is asked for again until then.
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 2.0
    with suppress(ClusteredSessionError, AssertionError):
        use_cluster(servers, 1)
    assert missing[1:] in denied_anywhere(servers)
