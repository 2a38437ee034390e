"""Schedules that break a wrong order of steps of tracked reads, each with what it breaks.

That variant is the package's own text with a line changed. It has to fail the schedule, and the
package has to pass it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from types import ModuleType
from typing import Any, Final, NamedTuple

import pytest
import redis

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.session import load, near_reads, save
from django_clustered_sessions.session.near_cache import NearCache, near_cache
from django_clustered_sessions.store import tracking
from tests.conftest import DATABASE, use_store
from tests.elsewhere import Elsewhere, started
from tests.gateways import load_scripts
from tests.locking import Threads, new_session, outcome
from tests.servers import CountingProxy, StoreServer, free_port, wait_for
from tests.topologies import follows

MAX_AGE_S: Final = 0.3
#: Seconds within which a change is told on this machine, however busy.
TOLD_S: Final = 3.0


class Site(NamedTuple):
    """All that a schedule needs: two sessions among them."""

    store: redis.Redis
    server: StoreServer
    proxy: CountingProxy
    elsewhere: Elsewhere
    settings: Any
    monkeypatch: pytest.MonkeyPatch
    key: str
    other: str

    def limit(self, age_s: float) -> None:
        """Set the bound."""
        self.settings.CLUSTERED_SESSIONS_NEAR_MAX_AGE = age_s


@pytest.fixture
def site(
    store: redis.Redis,
    store_server: StoreServer,
    proxy: CountingProxy,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Site]:
    near_cache.clear()
    load_scripts(store)
    settings.CLUSTERED_SESSIONS_NEAR_READS = "tracked"
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 4.0
    with started(f"{store_server.url}/{DATABASE}") as elsewhere:
        keys = new_session(n=1), new_session(n=1)
        yield Site(store, store_server, proxy, elsewhere, settings, monkeypatch, *keys)


def read(key: str) -> Any:
    return SessionStore(key).get("n")


def wait_until(at_s: float) -> None:
    wait_for(lambda: time.monotonic() > at_s, "time goes by")


# The schedules.


def a_link_is_dead(site: Site) -> None:
    """The replies of the tracked connection are swallowed, and nothing is closed."""
    site.limit(MAX_AGE_S)
    assert read(site.key) == 1
    site.proxy.swallow("replies", of=b"TRACKING")
    site.elsewhere.write(site.key, n=2)
    wait_until(time.monotonic() + MAX_AGE_S)
    assert read(site.key) == 2


def a_change_has_been_told(site: Site) -> None:
    """The news has arrived, and the proof of the copy is still good for a minute."""
    site.limit(60.0)
    assert read(site.key) == 1
    site.elsewhere.write(site.key, n=2)
    wait_for(lambda: read(site.key) == 2, "the change is seen", timeout_s=TOLD_S)


def a_thread_rests_beside_its_copy(site: Site) -> None:
    """It has its copy in hand, and goes on when another thread has renewed the lease."""
    site.limit(MAX_AGE_S)
    assert read(site.key) == read(site.other) == 1
    copy, done = NearCache.copy, []

    def rests(cache: NearCache, record: str) -> Any:
        found = copy(cache, record)
        if not done:
            done.append(record)
            site.elsewhere.write(site.key, n=2)
            wait_until(time.monotonic() + MAX_AGE_S)
            read(site.other)
        return found

    site.monkeypatch.setattr(NearCache, "copy", rests)
    assert read(site.key) == 2
    assert done


def news_come_between_a_reply_and_its_copy(site: Site) -> None:
    """The session changes when its reply has been read, and another thread takes the news."""
    site.limit(60.0)
    assert read(site.other) == 1
    hold, done = NearCache.hold, []

    def rests(cache: NearCache, *arguments: Any) -> Any:
        if not done:
            done.append(True)
            received = site.proxy.bytes_received
            site.elsewhere.write(site.key, n=2)
            wait_for(lambda: site.proxy.bytes_received > received, "the news is here")
            with Threads() as threads:
                for _ in range(20):
                    outcome(threads.start(read, site.other))
        return hold(cache, *arguments)

    site.monkeypatch.setattr(NearCache, "hold", rests)
    assert read(site.key) == 1
    assert done
    wait_for(lambda: read(site.key) == 2, "the change is seen", timeout_s=TOLD_S)


def the_store_does_not_track(site: Site) -> None:
    """It has refused to, and answers reads as before."""
    site.limit(60.0)
    rights = ("on", ">secret", "~*", "+@all", "-client|tracking")
    site.store.execute_command("ACL SETUSER", "untracked", *rights)
    use_store(site.settings, f"redis://untracked:secret@127.0.0.1:{site.server.port}/{DATABASE}")
    assert read(site.key) == 1
    site.elsewhere.write(site.key, n=2)
    wait_for(lambda: read(site.key) == 2, "the change is seen", timeout_s=TOLD_S)


def the_connection_is_another_one(site: Site) -> None:
    """One session is read over the new connection, and another one was over the old one."""
    site.limit(60.0)
    assert read(site.key) == read(site.other) == 1
    for client in site.store.client_list():
        if "t" in client["flags"]:
            site.store.client_kill_filter(_id=client["id"])
    site.elsewhere.write(site.key, n=2)
    wait_for(lambda: len(tracked(site.store)) == 1 or not read(site.other), "it is open again")
    assert read(site.key) == 2


def the_store_is_emptied(site: Site) -> None:
    """It tells that of all keys at once, and of none by its name."""
    site.limit(60.0)
    assert read(site.key) == 1
    site.store.flushall()
    wait_for(lambda: read(site.key) is None, "it is seen", timeout_s=TOLD_S)


def the_table_is_full(site: Site) -> None:
    """The store forgets a key between two commands of one read, and tells that in between."""
    site.limit(60.0)
    assert read(site.other) == 1
    site.store.config_set("tracking-table-max-keys", 1)
    try:
        for _ in range(20):
            key = new_session(n=1)
            assert read(key) == 1
            site.elsewhere.write(key, n=2)
            wait_for(lambda: read(key) == 2, "the change is seen", timeout_s=TOLD_S)  # noqa: B023
    finally:
        site.store.config_set("tracking-table-max-keys", 1_000_000)


def an_answer_is_an_error(site: Site) -> None:
    """It is no answer of a store that has told all: a script is running there."""
    # Long: a reader that is not let run for half of it asks the store anew, in the variant too.
    age_s = 12 * MAX_AGE_S
    site.limit(age_s)
    assert read(site.key) == 1
    site.store.config_set("busy-reply-threshold", 10)
    with Threads() as threads:
        ending = threads.start(run_for_ever, site.server)
        began_s = time.monotonic()
        try:
            wait_for(lambda: is_busy(site.store), "it is busy")
            while time.monotonic() < began_s + 2 * age_s:
                try:
                    read(site.key)
                except Exception:
                    break
            else:
                pytest.fail("a session was served for which nothing was proven")
        finally:
            wait_for(lambda: is_killed(site.store), "it is over")
            outcome(ending)
            site.store.config_set("busy-reply-threshold", 5000)


def a_write_of_its_own_is_lost(site: Site) -> None:
    """The reply to it never came, so the process knows nothing of its session."""
    site.limit(60.0)
    assert read(site.key) == 1
    session = SessionStore(site.key)
    session["n"] = 2
    site.proxy.cut_next("reply", times=2, matching=b"EVALSHA")
    site.proxy.swallow("replies", of=b"TRACKING")
    with pytest.raises(Exception, match="store"):
        session.save()
    assert read(site.key) == 2


def a_balancer_leads_new_connections_elsewhere(site: Site) -> None:
    """The store was made a replica that cannot reach its primary, and answers all the same."""
    # Another visitor keeps the lease up, and is served without a trip.
    a_replica_goes_on_answering(site, lambda: read(site.other))


def many_new_visitors_come_to_a_replica(site: Site) -> None:
    """Each of their reads asks the store, so that the lease is never old."""
    a_replica_goes_on_answering(site, lambda: read(token_hex(16)) is None)


def a_replica_goes_on_answering(site: Site, visit: Callable[[], object]) -> None:
    """The connections that are opened now lead to another store, where a session changes."""
    site.limit(MAX_AGE_S)
    assert read(site.key) == read(site.other) == 1
    with another_like(site) as new, site_is_replica(site):
        site.proxy.upstream_port = new.port
        for client in site.store.client_list():
            if "t" not in client["flags"]:
                site.store.client_kill_filter(_id=client["id"], skipme=True)
        with started(f"{new.url}/{DATABASE}") as elsewhere:
            elsewhere.write(site.key, n=2)
            until_s = time.monotonic() + MAX_AGE_S
            while time.monotonic() <= until_s:
                assert visit()
            assert read(site.key) == 2


def a_balancer_leads_the_channel_to_a_replica(site: Site) -> None:
    """It has lost its primary, to which the other connections lead."""
    site.limit(60.0)
    with another_like(site) as replica:
        with replica.client() as client:
            client.replicaof("127.0.0.1", free_port())
        site.proxy.upstream_port = replica.port
        site.elsewhere.write(site.key, n=2)
        assert read(site.key) == 2


@contextmanager
def another_like(site: Site) -> Iterator[StoreServer]:
    """Run a store of its own with the same content."""
    with StoreServer(binary=site.server.binary) as other, other.client() as client:
        client.replicaof("127.0.0.1", site.server.port)
        wait_for(lambda: follows(other), "it has copied all")
        client.replicaof("no", "one")
        yield other


@contextmanager
def site_is_replica(site: Site) -> Iterator[None]:
    site.store.replicaof("127.0.0.1", free_port())
    try:
        yield
    finally:
        site.store.replicaof("no", "one")


def tracked(store: redis.Redis) -> list[Any]:
    return [client for client in store.client_list() if "t" in client["flags"]]


def run_for_ever(server: StoreServer) -> None:
    with server.client(socket_timeout=30.0) as client, pytest.raises(redis.RedisError):
        client.eval("while true do end", 0)


def is_busy(store: redis.Redis) -> bool:
    try:
        store.ping()
    except redis.RedisError:
        return True
    return False


def is_killed(store: redis.Redis) -> bool:
    try:
        return bool(store.script_kill())
    except redis.RedisError as error:
        return "NOTBUSY" in str(error)


class Variant(NamedTuple):
    """A change of a module's text, and the schedule that breaks it."""

    schedule: Callable[[Site], None]
    module: ModuleType
    changes: tuple[tuple[str, str], ...]


VARIANTS: Final = {
    "no lease": Variant(
        a_link_is_dead,
        near_reads,
        (
            (
                "proven_s = max(copy.current_at_s, lease_s) if copy.is_tracked",
                "proven_s = now_s if 1",
            ),
        ),
    ),
    "no drain": Variant(a_change_has_been_told, near_reads, (("        channel.drain()\n", ""),)),
    "copy before lease": Variant(
        a_thread_rests_beside_its_copy,
        near_reads,
        (
            ("    lease_s = channel.lease_s\n", ""),
            (
                "    copy = near_cache.copy(keys.record)\n",
                "    copy = near_cache.copy(keys.record)\n    lease_s = channel.lease_s\n",
            ),
        ),
    ),
    "put not atomic with drain": Variant(
        news_come_between_a_reply_and_its_copy,
        near_reads,
        (
            (
                "        copy = Copy(read.found, read.now_ms, clock.now_s(), sent_s, "
                "generation, is_tracked=True)\n        near_cache.hold(keys.record, copy, "
                "conf.near_cache_bytes)\n",
                "        _later.append(Copy(read.found, read.now_ms, clock.now_s(), sent_s, "
                "generation, is_tracked=True))\n",
            ),
            (
                "        budget.answered(took_s)\n",
                "        budget.answered(took_s)\n"
                "        near_cache.hold(keys.record, _later.pop(), conf.near_cache_bytes)\n",
            ),
            ("from .state import SessionState\n", "from .state import SessionState\n_later = []\n"),
        ),
    ),
    "tracked before OK": Variant(
        the_store_does_not_track,
        tracking,
        (
            (
                '        if connection.read_response() != b"OK":\n'
                '            raise ResponseError("CLIENT TRACKING ON was not answered by OK")\n',
                "        try:\n            connection.read_response()\n"
                "        except ResponseError:\n            pass\n",
            ),
        ),
    ),
    "kept across a reconnect": Variant(
        the_connection_is_another_one,
        tracking,
        (
            ("        self.generation: object = object()\n", '        self.generation = "same"\n'),
            (
                "self.is_open, self.generation, self.lease_s = False, object(), -math.inf",
                "self.is_open, self.lease_s = False, -math.inf",
            ),
        ),
    ),
    "deaf to an emptied store": Variant(
        the_store_is_emptied, tracking, (("self.doubt()  # A database was emptied.", "pass"),)
    ),
    "news within an answer": Variant(
        the_table_is_full, tracking, (("self._questions[0].generation = None", "pass"),)
    ),
    "errors renew": Variant(
        an_answer_is_an_error,
        tracking,
        (
            (
                "if any(isinstance(one, hiredis.ReplyError) for one in question.replies):",
                "if not question.payload and any("
                "isinstance(one, hiredis.ReplyError) for one in question.replies):",
            ),
            ("if question.payload not in (None, _ANY, reply):", "if False:"),
        ),
    ),
    "blind to the role": Variant(
        a_balancer_leads_new_connections_elsewhere,
        tracking,
        (("if _is_of_replica(reply):", "if False:"),),
    ),
    "the role is asked with a PING alone": Variant(
        many_new_visitors_come_to_a_replica,
        tracking,
        (("        if not self._is_of_cluster and (\n", "        if payload and (\n"),),
    ),
    "tracked by a replica": Variant(
        a_balancer_leads_the_channel_to_a_replica,
        tracking,
        (("if _is_of_replica(connection.handshake_metadata):", "if False:"),),
    ),
    "copy kept beside a write": Variant(
        a_write_of_its_own_is_lost,
        near_reads,
        (("    near_cache.forget_copy(keys.record)\n", ""),),
    ),
}


@contextmanager
def changed(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the package with a variant of one of its modules."""
    text = Path(variant.module.__file__ or "").read_text("utf-8")
    for old, new in variant.changes:
        assert text.count(old) == 1, f"the variant does not fit the module any more: {old}"
        text = text.replace(old, new)
    module = ModuleType(variant.module.__name__)
    module.__package__ = variant.module.__package__
    exec(compile(text, variant.module.__file__ or "", "exec"), vars(module))
    users = {
        near_reads: ((load, "near_reads"), (save, "near_reads")),
        tracking: ((near_reads, "tracking"),),
    }
    for user, name in users[variant.module]:
        monkeypatch.setattr(user, name, module)
    yield


@pytest.mark.parametrize("name", VARIANTS)
def test_schedule_keeps_the_bound(name: str, site: Site) -> None:
    VARIANTS[name].schedule(site)


@pytest.mark.parametrize("name", VARIANTS)
def test_schedule_finds_the_variant(name: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        changed(VARIANTS[name], monkeypatch),
        pytest.raises((AssertionError, pytest.fail.Exception)),
    ):
        VARIANTS[name].schedule(site)
