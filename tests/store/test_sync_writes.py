"""Synchronous writes: what is acknowledged is on replicas, and what is not is said to be not."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth import login, logout
from django.contrib.auth.models import User
from django.core.management import call_command
from django.http import HttpRequest, HttpResponse

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionNotReplicated, SessionStoreUnavailable
from django_clustered_sessions.monitoring import counters as counters_module
from django_clustered_sessions.monitoring.counters import NAMES, counters
from django_clustered_sessions.protocol.scripts import script
from django_clustered_sessions.session import save
from django_clustered_sessions.store import runner
from django_clustered_sessions.store.budget import Budget
from tests import round_trips
from tests.conftest import DATABASE, store_binary, use_store
from tests.gateways import Browser, load_scripts, place, wait_for_replicas
from tests.locking import Threads, outcome
from tests.servers import CountingProxy, StoreServer, wait_for
from tests.topologies import Replicated

BACKEND = "django.contrib.auth.backends.ModelBackend"

warm = round_trips.warm


@pytest.fixture(scope="module")
def topology(server_binary: Path) -> Iterator[Replicated]:
    """A primary with two replicas, for all tests of this module."""
    with Replicated(replicas=2, binary=server_binary) as started:
        yield started


@pytest.fixture
def replicated(topology: Replicated, settings: Any) -> Iterator[Replicated]:
    """Point the settings at the primary; a write waits for one replica, with patience."""
    with topology.primary.client(db=DATABASE) as client:
        client.flushall()
        load_scripts(client)
    topology.use(settings, DATABASE)
    settings.CLUSTERED_SESSIONS_SYNC_REPLICAS = 1
    # No bound here is the point, unless a test says so.
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 60.0
    yield topology
    for replica in topology.replicas:
        replica.resume()


@pytest.fixture
def silent(replicated: Replicated, monkeypatch: pytest.MonkeyPatch) -> Replicated:
    """Stop the replicas; a write waits for a moment only."""
    wait_for_replicas(monkeypatch, 0.05)
    for replica in replicated.replicas:
        replica.pause()
    return replicated


@pytest.fixture
def between(replicated: Replicated, settings: Any) -> Iterator[CountingProxy]:
    """Put a counting proxy before the primary."""
    with CountingProxy(replicated.primary.port) as proxy:
        use_store(settings, f"{proxy.url}/{DATABASE}")
        yield proxy


def synchronously(session: SessionStore, name: str, *arguments: Any) -> Any:
    """Call a session's method by its name."""
    return getattr(session, name)(*arguments)


def asynchronously(session: SessionStore, name: str, *arguments: Any) -> Any:
    """Call the asynchronous twin of a session's method."""
    return async_to_sync(getattr(session, f"a{name}"))(*arguments)


@pytest.fixture(params=["sync", "async"])
def do(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Give both ways to call a session's method by its name."""
    return synchronously if request.param == "sync" else asynchronously


@pytest.fixture(params=["wsgi", "asgi"])
def browser(request: pytest.FixtureRequest, settings: Any) -> Browser:
    return Browser(settings, asgi=request.param == "asgi")


def speak(replicated: Replicated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the replicas run on, and have patience with them."""
    wait_for_replicas(monkeypatch, 20.0)
    for replica in replicated.replicas:
        replica.resume()


def stored(**values: Any) -> SessionStore:
    """Return a session that is stored, without waiting for anybody."""
    session = SessionStore()
    session.update(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("django_clustered_sessions.session.save.wanted", lambda budget: None)
        session.create()
        session.modified = False
    return session


def held(server: StoreServer, key: str | None) -> Any:
    """Return what a server has under a session's key."""
    with server.client(db=DATABASE) as client:
        return client.hgetall(place(key or "").record)


def count(name: str) -> int:
    return counters.counts[name]


# Each write that users rely on: what it does with a stored session.


def create(session: SessionStore, do: Any) -> None:
    do(session, "create")


def change(session: SessionStore, do: Any) -> None:
    session["n"] = 2
    do(session, "save")


def cycle(session: SessionStore, do: Any) -> None:
    do(session, "cycle_key")


def flush(session: SessionStore, do: Any) -> None:
    do(session, "flush")


#: Each with the script that does it.
WRITES = {"create": create, "commit": change, "rotate": cycle, "end": flush}


@pytest.mark.each_server
@pytest.mark.parametrize("replicas", [1, 2])
def test_write_that_returns_is_on_replicas(
    replicated: Replicated, settings: Any, do: Any, replicas: int
) -> None:
    settings.CLUSTERED_SESSIONS_SYNC_REPLICAS = replicas
    waits, shortfalls = count("sync_waits"), count("sync_shortfalls")
    session = SessionStore()
    keys = []
    for write in WRITES.values():
        write(session, do)
        keys.append(session.session_key or keys[-1])
        for key in keys:
            on_primary = held(replicated.primary, key)
            copies = [held(replica, key) for replica in replicated.replicas]
            assert on_primary
            assert copies.count(on_primary) >= replicas
    assert keys[0] == keys[1] != keys[2]
    assert count("sync_waits") == waits + 4
    assert count("sync_shortfalls") == shortfalls


def test_new_session_is_on_replicas_before_its_first_answer(
    replicated: Replicated, browser: Browser, settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_SYNC_REPLICAS = 2

    def view(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 1
        return HttpResponse()

    assert browser.visit(view).status_code == 200
    on_primary = held(replicated.primary, browser.key)
    assert on_primary[b"d:n"]
    assert [held(replica, browser.key) for replica in replicated.replicas] == [on_primary] * 2


@pytest.mark.each_server
@pytest.mark.parametrize("name", WRITES)
def test_write_with_too_few_replicas_says_so(silent: Replicated, do: Any, name: str) -> None:
    session = stored(n=1)
    with pytest.raises(SessionNotReplicated) as caught:
        WRITES[name](session, do)
    assert (caught.value.acknowledged, caught.value.asked) == (0, 1)
    assert "0 of 1 replicas said within 50 ms" in str(caught.value)
    assert place(session.session_key or "").id not in str(caught.value)


@pytest.mark.each_server
def test_one_replica_of_two_is_too_few(
    silent: Replicated, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent.replicas[0].resume()
    settings.CLUSTERED_SESSIONS_SYNC_REPLICAS = 2
    # So that the one that runs is not late, also where the machine stands still.
    wait_for_replicas(monkeypatch, 4.0)
    with pytest.raises(SessionNotReplicated) as caught:
        change(stored(n=1), synchronously)
    assert (caught.value.acknowledged, caught.value.asked) == (1, 2)


def test_unacknowledged_save_is_known_as_written(silent: Replicated, do: Any) -> None:
    session = stored(n=1)
    with pytest.raises(SessionNotReplicated):
        change(session, do)
    assert not session.modified
    assert SessionStore(session.session_key)["n"] == 2
    # Nothing to merge: the object knows what it has written.
    merged = count("conflicts_merged")
    session["n"] = 3
    with pytest.raises(SessionNotReplicated):
        do(session, "save")
    assert SessionStore(session.session_key)["n"] == 3
    assert count("conflicts_merged") == merged


def test_unacknowledged_cycle_key_keeps_the_new_key(silent: Replicated, do: Any) -> None:
    session = stored(n=1)
    old = session.session_key
    with pytest.raises(SessionNotReplicated):
        cycle(session, do)
    assert session.session_key not in (None, old)
    assert SessionStore(session.session_key)["n"] == 1
    assert held(silent.primary, old) == {b"m:end": b"rotated"}


def test_unacknowledged_flush_has_ended_the_session(silent: Replicated, do: Any) -> None:
    session = stored(n=1)
    old = session.session_key
    with pytest.raises(SessionNotReplicated):
        flush(session, do)
    assert (session.session_key, session.is_empty()) == (None, True)
    assert held(silent.primary, old) == {b"m:end": b"flushed"}
    # Asked once more.
    with pytest.raises(SessionNotReplicated):
        do(SessionStore(), "delete", old)


def test_unacknowledged_end_names_its_session(silent: Replicated) -> None:
    session = stored(n=1)
    with pytest.raises(SessionNotReplicated, match=place(session.session_key or "").id[:12]):
        session.flush()


def test_unacknowledged_commit_gives_up_the_lock(silent: Replicated) -> None:
    session = stored(n=1)
    with pytest.raises(SessionNotReplicated), session.lock():
        session["n"] = 2
    assert not session.is_locked
    assert b"m:lock" not in held(silent.primary, session.session_key)
    with pytest.raises(SessionNotReplicated):
        session.increment("hits")
        session.commit()
    assert SessionStore(session.session_key).load() == {"n": 2, "hits": 1}


async def test_unacknowledged_asynchronous_commit_gives_up_the_lock(
    silent: Replicated,
) -> None:
    session = SessionStore()
    with pytest.raises(SessionNotReplicated):
        await session.acreate()
    with pytest.raises(SessionNotReplicated):
        async with session.alock():
            session["n"] = 2
    assert not session.is_locked
    assert await SessionStore(session.session_key).aget("n") == 2


@pytest.mark.parametrize("write", [create, change], ids=["create", "change"])
def test_repeated_save_asks_the_replicas_again(
    silent: Replicated, monkeypatch: pytest.MonkeyPatch, do: Any, write: Any
) -> None:
    session = stored(n=1)
    with pytest.raises(SessionNotReplicated):
        write(session, do)
    with pytest.raises(SessionNotReplicated):
        do(session, "save")
    speak(silent, monkeypatch)
    do(session, "save")
    on_primary = held(silent.primary, session.session_key)
    assert on_primary in [held(replica, session.session_key) for replica in silent.replicas]
    assert session.state.replication.shortfall is None
    waits = count("sync_waits")
    do(session, "save")
    assert count("sync_waits") == waits


@pytest.mark.parametrize("name", WRITES)
def test_shortfall_is_logged_where_a_warning_is_wanted(
    silent: Replicated, settings: Any, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    settings.CLUSTERED_SESSIONS_ON_SYNC_SHORTFALL = "warn"
    shortfalls = count("sync_shortfalls")
    WRITES[name](stored(n=1), synchronously)
    (record,) = caplog.records
    assert (record.levelname, "0 of 1 replicas" in record.getMessage()) == ("WARNING", True)
    assert count("sync_shortfalls") == shortfalls + 1


@pytest.mark.parametrize("name", ["create", "save", "cycle_key"])
def test_wait_for_replicas_is_no_offset_of_the_clock(
    silent: Replicated, settings: Any, monkeypatch: pytest.MonkeyPatch, do: Any, name: str
) -> None:
    """Nor does the session live for so much longer."""
    session = SessionStore() if name == "create" else stored(n=1)
    session["n"] = 2
    settings.CLUSTERED_SESSIONS_ON_SYNC_SHORTFALL = "warn"
    wait_for_replicas(monkeypatch, 3.0)
    do(session, name)
    assert abs(counters.clock_offset_ms) < 1000
    before_s = session.state.lifetime.left_s
    with silent.primary.client(db=DATABASE) as client:
        left_s = client.pttl(place(session.session_key or "").record) / 1000
    after_s = session.state.lifetime.left_s
    assert before_s is not None and after_s is not None
    # However long it took to ask for it.
    assert after_s - 1.0 < left_s < before_s + 1.0


def test_write_waits_for_nobody_where_it_is_off(
    silent: Replicated, settings: Any, between: Any
) -> None:
    settings.CLUSTERED_SESSIONS_SYNC_REPLICAS = 0
    session = SessionStore()
    for write in WRITES.values():
        write(session, synchronously)
    assert not [request for request in between.requests if b"WAIT" in request]


# The answer to a request.


def test_unacknowledged_change_is_answered_with_503(
    silent: Replicated, settings: Any, browser: Browser
) -> None:
    browser.key = stored(n=1).session_key or ""
    key = browser.key

    def view(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 2
        return HttpResponse("well")

    response = browser.visit(view)
    assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
    assert b"could not be secured" in response.content
    assert browser.key == key
    assert SessionStore(key)["n"] == 2


def test_unacknowledged_first_write_sets_its_cookie(silent: Replicated, browser: Browser) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 1
        return HttpResponse()

    assert browser.visit(view).status_code == 503
    assert SessionStore(browser.key)["n"] == 1


def log_in(request: HttpRequest) -> HttpResponse:
    login(request, User(pk=1, username="ada", password="md5$secret"), BACKEND)
    return HttpResponse()


@pytest.fixture
def no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """A login notes when it was; do without."""
    monkeypatch.setattr(User, "save", lambda *args, **kwargs: None)


def test_unacknowledged_login_leaves_no_dead_key_behind(
    silent: Replicated, monkeypatch: pytest.MonkeyPatch, browser: Browser, no_database: None
) -> None:
    browser.key = stored(cart=["tea"]).session_key or ""
    old = browser.key
    assert browser.visit(log_in).status_code == 503
    assert browser.key not in ("", old)
    assert SessionStore(browser.key).load() == {"cart": ["tea"]}
    speak(silent, monkeypatch)
    assert browser.visit(log_in).status_code == 200
    session = SessionStore(browser.key)
    assert (session["cart"], session["_auth_user_id"]) == (["tea"], "1")


def test_login_with_an_unacknowledged_last_write_sets_its_cookie(
    replicated: Replicated, browser: Browser, no_database: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser.key = stored(cart=["tea"]).session_key or ""
    old = browser.key

    def view(request: HttpRequest) -> HttpResponse:
        response = log_in(request)
        wait_for_replicas(monkeypatch, 0.05)
        for replica in replicated.replicas:
            replica.pause()
        return response

    assert browser.visit(view).status_code == 503
    assert browser.key not in ("", old)
    session = SessionStore(browser.key)
    assert (session["cart"], session["_auth_user_id"]) == (["tea"], "1")


def test_unacknowledged_logout_takes_the_cookie_away(silent: Replicated, browser: Browser) -> None:
    browser.key = stored(n=1, _auth_user_id="1").session_key or ""
    old = browser.key

    def view(request: HttpRequest) -> HttpResponse:
        logout(request)
        return HttpResponse()

    response = browser.visit(view)
    assert response.status_code == 503
    assert response.cookies["sessionid"]["max-age"] == 0
    assert held(silent.primary, old) == {b"m:end": b"flushed"}


def test_view_may_go_on_without_an_acknowledgement(silent: Replicated, browser: Browser) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 1
        try:
            request.session.save()
        except SessionNotReplicated:
            return HttpResponse("on it")
        return HttpResponse("done")

    assert browser.visit(view).content == b"on it"
    assert SessionStore(browser.key)["n"] == 1


def test_warning_changes_no_answer(silent: Replicated, settings: Any, browser: Browser) -> None:
    settings.CLUSTERED_SESSIONS_ON_SYNC_SHORTFALL = "warn"

    def view(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 1
        return HttpResponse()

    assert browser.visit(view).status_code == 200
    assert SessionStore(browser.key)["n"] == 1


# What it costs.


#: The cases that write, and one that does not.
CASES = [
    case
    for case in round_trips.CASES
    if case.id in ("read", "change", "change, every request", "first write", "login", "logout")
]


@pytest.mark.parametrize(("before", "every_request", "use", "ause", "expected"), CASES)
def test_waiting_for_replicas_adds_no_round_trip(
    warm: CountingProxy,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    before: str | None,
    every_request: bool,
    use: Any,
    ause: Any,
    expected: int,
) -> None:
    # Nobody replicates this store.
    settings.CLUSTERED_SESSIONS_SYNC_REPLICAS = 1
    wait_for_replicas(monkeypatch, 0.001)
    settings.CLUSTERED_SESSIONS_ON_SYNC_SHORTFALL = "warn"
    settings.SESSION_SAVE_EVERY_REQUEST = every_request
    assert round_trips.cost(warm, before, use) == (expected, 0)
    waits = [request.count(b"\r\nWAIT\r\n") for request in warm.requests]
    writes = [sum(request.count(script(name).sha) for name in WRITES) for request in warm.requests]
    assert waits == writes
    assert sum(writes) or expected < 2
    assert async_to_sync(round_trips.acost)(warm, before, ause) == (expected, 0)


# What looks like an acknowledgement, and is none.


@pytest.mark.each_server
@pytest.mark.parametrize("name", WRITES)
def test_repeated_write_is_not_taken_for_replicated(
    silent: Replicated, between: CountingProxy, name: str
) -> None:
    """On its new connection nothing was written before: WAIT would have nothing to wait for."""
    session = stored(n=1)
    between.cut_next("reply", matching=script(name).sha)
    with pytest.raises(SessionNotReplicated):
        WRITES[name](session, synchronously)
    assert between._faults == []


@pytest.mark.each_server
def test_repeated_expiry_is_not_taken_for_replicated(
    silent: Replicated, between: CountingProxy
) -> None:
    session = stored(n=1)
    session.set_expiry(-1)
    between.cut_next("reply", matching=script("commit").sha)
    with pytest.raises(SessionNotReplicated):
        session.save()
    assert between._faults == []


@pytest.mark.each_server
@pytest.mark.parametrize("name", WRITES)
def test_write_by_an_unknown_script_asks_the_replicas_again(
    silent: Replicated, between: CountingProxy, do: Any, name: str
) -> None:
    session = stored(n=1)
    between.cut()
    with silent.primary.client() as client:
        client.script_flush()
    with pytest.raises(SessionNotReplicated):
        WRITES[name](session, do)
    (_, *told) = [bytes(request) for request in between.requests if b"WAIT" in request]
    assert len(told) == 1 and b"\r\nEVAL\r\n" in told[0]


@pytest.mark.parametrize("name", WRITES)
def test_unknown_script_of_figures_does_not_count_them_twice(
    silent: Replicated, monkeypatch: pytest.MonkeyPatch, between: CountingProxy, name: str
) -> None:
    session = stored(n=1)
    with silent.primary.client(db=DATABASE) as client:
        client.script_flush()
        for known in WRITES:
            client.script_load(script(known).source)
        figures = iter([(1,) * len(NAMES)])
        monkeypatch.setattr(counters_module.Counters, "are_due", True)
        monkeypatch.setattr(counters_module.Counters, "drain", lambda self: next(figures, ()))
        with pytest.raises(SessionNotReplicated):
            WRITES[name](session, synchronously)
        (key,) = client.keys("*:figures")
        (line,) = client.hvals(key)
    assert line.split()[2:] == [b"1"] * len(NAMES)


@pytest.mark.each_server
def test_store_that_denies_wait_is_a_shortfall(
    replicated: Replicated, settings: Any, do: Any
) -> None:
    with replicated.primary.client() as client:
        client.execute_command("ACL SETUSER deaf on >secret ~* &* +@all -wait")
    use_store(settings, f"redis://deaf:secret@127.0.0.1:{replicated.primary.port}/{DATABASE}")
    errors = count("store_errors")
    session = stored(n=1)
    with pytest.raises(SessionNotReplicated, match="no permissions to run the .wait. command"):
        change(session, do)
    assert SessionStore(session.session_key)["n"] == 2
    assert count("store_errors") == errors


@pytest.mark.each_server
def test_store_without_waitaof_is_a_shortfall(
    replicated: Replicated, settings: Any, do: Any
) -> None:
    """Redis 7.0 has no WAITAOF, and this store no append-only file."""
    settings.CLUSTERED_SESSIONS_SYNC_FSYNC = True
    session = stored(n=1)
    with pytest.raises(SessionNotReplicated, match="WAITAOF"):
        change(session, do)
    assert SessionStore(session.session_key)["n"] == 2


@pytest.mark.each_server
def test_replica_takes_no_write(replicated: Replicated, settings: Any, do: Any) -> None:
    use_store(settings, f"{replicated.replicas[0].url}/{DATABASE}")
    session = SessionStore()
    with pytest.raises(SessionStoreUnavailable, match="replica"):
        create(session, do)
    assert session.session_key is None


@pytest.mark.full
def test_write_waits_for_the_disks_of_replicas(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "--appendonly", "yes", "--appendfsync", "always"
    with Replicated(*flags, replicas=1, binary=store_binary("valkey")) as topology:
        topology.use(settings, DATABASE)
        settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 60.0
        settings.CLUSTERED_SESSIONS_SYNC_FSYNC = True
        for replicas in (0, 1):
            settings.CLUSTERED_SESSIONS_SYNC_REPLICAS = replicas
            session = SessionStore()
            session.create()
            session.flush()
        wait_for_replicas(monkeypatch, 0.05)
        topology.replicas[0].pause()
        with pytest.raises(SessionNotReplicated, match="have it on disk"):
            SessionStore().create()
        topology.replicas[0].resume()


@pytest.mark.full
def test_waiting_for_replicas_is_no_store_error(
    replicated: Replicated, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for replica in replicated.replicas:
        replica.pause()
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 4.0
    settings.CLUSTERED_SESSIONS_ON_SYNC_SHORTFALL = "warn"
    errors = count("store_errors")
    session = stored(n=1)
    session.state.budget = Budget(4.0)
    session["n"] = 2
    session.save()
    assert SessionStore(session.session_key)["n"] == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert count("store_errors") == errors


def test_wait_outside_a_request_is_of_its_operations_time(
    replicated: Replicated, do: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a write that comes after a slow claim of a place among a user's sessions."""
    given: list[Any] = []
    for name in ("run", "arun"):
        run = getattr(runner, name)
        monkeypatch.setattr(
            runner, name, lambda flow, budget, run=run: given.append(budget) or run(flow, budget)
        )
    monkeypatch.setattr(save, "wanted", lambda budget: given.append(budget))
    session = SessionStore()
    session["n"] = 1
    do(session, "save")
    assert given[0] is given[1] is not None


def test_statistics_tell_how_long_acknowledgements_take(
    replicated: Replicated, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def figures(**options: Any) -> str:
        stdout = io.StringIO()
        call_command("sessionstats", stdout=stdout, **options)
        return stdout.getvalue()

    assert json.loads(figures(format="json"))["sync"] == {"acknowledged_after_ms": None}
    assert "Synchronous" not in figures()
    counts = dict.fromkeys(NAMES, 0) | {"sync_waits": 4, "sync_shortfalls": 1, "sync_wait_ms": 4}
    with replicated.primary.client(db=DATABASE) as client:
        line = " ".join(map(str, [1, 0, *counts.values()]))
        client.hset("session:{000}:figures", "web-1", line)
        assert json.loads(figures(format="json"))["sync"] == {"acknowledged_after_ms": 1.33}
        assert (
            "Synchronous writes: 3 of 4 were acknowledged, after 1.33 ms in the mean." in figures()
        )


# A primary that dies.


@pytest.mark.full
@pytest.mark.each_server
def test_acknowledged_writes_outlast_their_primary(
    settings: Any, threads: Threads, server_binary: Path
) -> None:
    with Replicated(replicas=1, sentinels=3, binary=server_binary) as topology:
        topology.use(settings, DATABASE)
        settings.CLUSTERED_SESSIONS_SYNC_REPLICAS = 1
        is_over = threading.Event()
        written: list[tuple[str, list[int]]] = []
        ended: list[str] = []

        def write() -> None:
            session = SessionStore()
            session.create()
            acknowledged: list[int] = []
            written.append((session.session_key or "", acknowledged))
            number = 0
            while not is_over.is_set():
                number += 1
                used = SessionStore(session.session_key)
                try:
                    used["log"] = [*used.get("log", []), number]
                    used.increment("hits")
                    used.save()
                    acknowledged.append(number)
                except (SessionNotReplicated, SessionStoreUnavailable):
                    continue

        def come_and_go() -> None:
            while not is_over.is_set():
                try:
                    session = SessionStore()
                    session.create()
                    key = session.session_key or ""
                    session.flush()
                    ended.append(key)
                except (SessionNotReplicated, SessionStoreUnavailable):
                    continue

        running = [threads.start(work) for work in (write, write, write, come_and_go)]
        wait_for(
            lambda: (
                len(written) == 3
                and all(len(numbers) > 40 for _, numbers in written)
                and len(ended) > 40
            ),
            "all have written",
            timeout_s=30.0,
        )
        topology.primary.kill()
        is_over.set()
        for one in running:
            outcome(one)
        promoted = topology.promoted()
        # What is asked is the promoted one, without anything of this process in between.
        use_store(settings, f"{promoted.url}/{DATABASE}")
        settings.CLUSTERED_SESSIONS_NEAR_CACHE_BYTES = 0
        for key, numbers in written:
            session = SessionStore(key)
            assert set(numbers) <= set(session["log"])
            assert session["hits"] >= len(numbers)
        assert not [key for key in ended if SessionStore().exists(key)]
