"""A store that is away, refuses or breaks off: 503, the cookie alone, nothing lost or doubled."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from django.contrib.auth import alogout, logout
from django.http import HttpRequest, HttpResponse
from django.template import RequestContext, Template

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.protocol.effects import Wait
from django_clustered_sessions.store import connections, drivers
from django_clustered_sessions.store.budget import Budget
from tests.conftest import DATABASE, use_store
from tests.gateways import Browser, View, load_scripts, place, records
from tests.pairs import pairwise
from tests.servers import CountingProxy, StoreServer, lent, wait_for

COOKIE = "sessionid"


@pytest.fixture(params=["wsgi", "asgi"])
def browser(request: pytest.FixtureRequest, settings: Any) -> Browser:
    return Browser(settings, asgi=request.param == "asgi")


@pytest.fixture
def own_server(server_binary: Path, settings: Any) -> Iterator[Callable[..., StoreServer]]:
    """Start a server of the test's own, with flags, and point the settings at it."""
    started: list[StoreServer] = []

    def start(*flags: str, **options: Any) -> StoreServer:
        server = StoreServer(*flags, binary=server_binary)
        started.append(server)
        server.start()
        use_store(settings, f"{server.url}/{DATABASE}", **options)
        return server

    yield start
    for server in started:
        server.close()


def untouched(request: HttpRequest) -> HttpResponse:
    return HttpResponse("untouched")


def read(request: HttpRequest) -> HttpResponse:
    return HttpResponse(repr(request.session.get("n")))


def write(request: HttpRequest) -> HttpResponse:
    request.session["n"] = 1
    return HttpResponse("written")


def increment(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(request.session.increment("n")))


def cycle(request: HttpRequest) -> HttpResponse:
    request.session.cycle_key()
    return HttpResponse()


async def aread(request: HttpRequest) -> HttpResponse:
    return HttpResponse(repr(await request.session.aget("n")))


async def awrite(request: HttpRequest) -> HttpResponse:
    await request.session.aset("n", 1)
    return HttpResponse("written")


async def aincrement(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(await request.session.aincrement("n")))


async def acycle(request: HttpRequest) -> HttpResponse:
    await request.session.acycle_key()
    return HttpResponse()


def log_out(request: HttpRequest) -> HttpResponse:
    logout(request)
    return HttpResponse()


async def alog_out(request: HttpRequest) -> HttpResponse:
    await alogout(request)
    return HttpResponse()


def assert_503(response: Any) -> None:
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) > 0
    assert not response.cookies


# Away, wherever the session is touched.


def catch(request: HttpRequest) -> HttpResponse:
    try:
        return read(request)
    except SessionStoreUnavailable:
        return HttpResponse("pretends that nothing happened")


async def auser(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(await request.auser()))


def template(source: str) -> View:
    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse(Template(source).render(RequestContext(request)))

    return view


VIEWS = [
    read,
    aread,
    write,
    awrite,
    cycle,
    acycle,
    auser,
    catch,
    template("{% if user.is_authenticated %}in{% endif %}"),
    template("{% if not user.is_authenticated %}anonymous{% else %}in{% endif %}"),
    template("{{ user }}"),
]


@pairwise(
    view=VIEWS,
    browser=["wsgi", "asgi"],
    every_request=[False, True],
    indirect=["browser"],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_store_away_in_the_view_is_a_503_until_it_is_back(
    browser: Browser,
    proxy: CountingProxy,
    settings: Any,
    caplog: pytest.LogCaptureFixture,
    every_request: bool,
    view: View,
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = every_request
    browser.visit(write)
    proxy.refuse()
    assert_503(browser.visit(view))
    assert browser.key not in caplog.text
    proxy.accept()
    assert browser.visit(view).status_code == 200
    assert browser.visit(read).content == b"1"


class Peeking:
    """A middleware inside of ours that uses the session; its error reaches us as a 500."""

    def __init__(self, get_response: View) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        request.session.get("n")
        return self.get_response(request)


def test_store_away_in_an_inner_middleware_is_a_503(
    browser: Browser, proxy: CountingProxy, settings: Any
) -> None:
    settings.MIDDLEWARE = [*settings.MIDDLEWARE, f"{__name__}.Peeking"]
    browser.visit(write)
    proxy.refuse()
    assert_503(browser.visit(untouched))
    proxy.accept()
    assert browser.visit(untouched).status_code == 200


@pytest.mark.parametrize(
    ("browser", "status"), [("wsgi", 200), ("asgi", 302), ("wsgi", 404)], indirect=["browser"]
)
def test_store_away_in_the_save_at_the_end_is_a_503(
    browser: Browser, proxy: CountingProxy, status: int
) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        request.session["n"] = 2
        proxy.refuse()
        return HttpResponse(status=status)

    browser.visit(write)
    assert_503(browser.visit(view))
    proxy.accept()
    assert browser.visit(read).content == b"1"


def test_store_away_for_a_first_visit_is_a_503(browser: Browser, proxy: CountingProxy) -> None:
    proxy.refuse()
    assert_503(browser.visit(write))
    assert browser.visit(read).content == b"None"


@pytest.mark.parametrize(
    ("browser", "every_request"), [("wsgi", False), ("asgi", True)], indirect=["browser"]
)
def test_store_away_is_no_matter_where_nobody_needs_it(
    browser: Browser, proxy: CountingProxy, settings: Any, every_request: bool
) -> None:
    browser.visit(write)
    settings.SESSION_SAVE_EVERY_REQUEST = every_request
    proxy.refuse()
    response = browser.visit(untouched)
    if every_request:
        assert_503(response)
    else:
        assert response.status_code == 200


def test_outage_shows_the_page_of_the_site(
    browser: Browser, proxy: CountingProxy, settings: Any, tmp_path: Path
) -> None:
    (tmp_path / "503.html").write_text("<h1>Back soon</h1>")
    settings.TEMPLATES = [settings.TEMPLATES[0] | {"DIRS": [tmp_path]}]
    browser.visit(write)
    proxy.refuse()
    response = browser.visit(read)
    assert_503(response)
    assert response.content == b"<h1>Back soon</h1>"
    assert response.headers["Content-Type"].startswith("text/html")


def test_developer_is_told_why_and_what_to_do(
    browser: Browser, settings: Any, tmp_path: Path
) -> None:
    (tmp_path / "503.html").write_text("<h1>Back soon</h1>")
    settings.TEMPLATES = [settings.TEMPLATES[0] | {"DIRS": [tmp_path]}]
    settings.DEBUG = True
    use_store(settings, "redis://127.0.0.1:1/1")
    lines = []
    for _ in range(10):
        response = browser.visit(write)
        assert_503(response)
        lines += response.content.decode().splitlines()
    # The breaker opens meanwhile: a request that is answered without asking tells as much.
    assert any("was not asked" in line for line in lines)
    advice = "Start a store by manage.py sessionserver, or correct LOCATION in CACHES['sessions']."
    for line in lines:
        assert " connecting to 127.0.0.1:1." in line
        assert line.endswith(advice)
    assert len(lines) == 10


def test_developer_is_told_that_the_store_refuses(
    own_server: Callable[..., StoreServer], browser: Browser, settings: Any
) -> None:
    settings.DEBUG = True
    own_server("--requirepass", "open sesame")
    response = browser.visit(write)
    assert_503(response)
    (line,) = response.content.decode().splitlines()
    assert line.startswith(
        "Sessions cannot be used: the session store refused: it wants a password"
    )
    assert "sessionserver" not in line


def test_tolerant_view_goes_on_without_its_session(browser: Browser, proxy: CountingProxy) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        request.session.tolerate_outage()
        answer = f"{request.session.get('n')} {request.user}"
        request.session["n"] = 2
        return HttpResponse(answer)

    browser.visit(write)
    proxy.refuse()
    response = browser.visit(view)
    assert response.status_code == 200
    assert response.content == b"None AnonymousUser"
    assert not response.cookies
    proxy.accept()
    assert browser.visit(read).content == b"1"


def test_tolerant_view_goes_on_though_its_save_fails(
    browser: Browser, proxy: CountingProxy
) -> None:
    async def view(request: HttpRequest) -> HttpResponse:
        request.session.tolerate_outage()
        await request.session.aset("n", 2)
        proxy.refuse()
        return HttpResponse()

    browser.visit(write)
    for _ in range(2):
        response = browser.visit(view)
        assert response.status_code == 200
        assert not response.cookies
    proxy.accept()
    assert browser.visit(read).content == b"1"


def test_store_back_within_a_tolerant_request_gets_nothing(
    browser: Browser, proxy: CountingProxy
) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        request.session.tolerate_outage()
        request.session["cart"] = {}
        proxy.accept()
        request.session["n"] = 2
        request.session.save()
        return HttpResponse()

    browser.visit(write)
    proxy.refuse()
    assert browser.visit(view).status_code == 200
    assert SessionStore(browser.key).load() == {"n": 1}


@pytest.mark.parametrize(
    ("browser", "rotate"), [("wsgi", cycle), ("asgi", acycle)], indirect=["browser"]
)
def test_store_back_within_a_tolerant_request_moves_nothing(
    browser: Browser, proxy: CountingProxy, rotate: View
) -> None:
    # Nobody would learn of the new key: the cookie stays.
    def view(request: HttpRequest) -> Any:
        request.session.tolerate_outage()
        request.session.get("n")
        proxy.accept()
        return rotate(request)

    async def aview(request: HttpRequest) -> Any:
        request.session.tolerate_outage()
        await request.session.aget("n")
        proxy.accept()
        return await rotate(request)

    browser.visit(write)
    proxy.refuse()
    assert_503(browser.visit(aview if rotate is acycle else view))
    assert browser.visit(read).content == b"1"


# Replies that are lost, and stores that fall silent.


# How a trip is sent again, wherever it broke off, is tested in tests/store/test_replays.py.


def lost(view: View, aview: View) -> pytest.MarkDecorator:
    """Return a mark for a test whose write is lost, in a synchronous and an awaiting request."""
    cases = [("wsgi", view, "reply"), ("asgi", aview, "half")]
    return pytest.mark.parametrize(
        ("browser", "view", "where"), cases, ids=["sync", "async"], indirect=["browser"]
    )


@pytest.fixture
def breakable(proxy: CountingProxy, store: redis.Redis) -> CountingProxy:
    """Give a proxy to a store that knows the scripts: a cut hits a write, not a refusal."""
    load_scripts(store)
    return proxy


@pytest.mark.parametrize("where", ["request", "reply", "half"])
@pytest.mark.parametrize(
    ("browser", "view"), [("wsgi", increment), ("asgi", aincrement)], indirect=["browser"]
)
def test_lost_increment_counts_once(
    browser: Browser, breakable: CountingProxy, where: Any, view: View
) -> None:
    browser.visit(increment)
    breakable.cut_next(where, matching=b"EVALSHA")
    assert browser.visit(view).status_code == 200
    assert SessionStore(browser.key).load() == {"n": 2}


@pytest.mark.each_server
@lost(increment, aincrement)
def test_lost_increment_by_a_forgotten_script_counts_once(
    browser: Browser, breakable: CountingProxy, store: redis.Redis, where: Any, view: View
) -> None:
    browser.visit(increment)
    store.script_flush()
    breakable.cut_next(where, matching=b"\r\nEVAL\r\n")
    connections = breakable.connections
    assert browser.visit(view).status_code == 200
    assert breakable.connections > connections
    assert SessionStore(browser.key).load() == {"n": 2}


@lost(write, awrite)
def test_lost_creation_makes_one_record(
    browser: Browser, breakable: CountingProxy, store: redis.Redis, where: Any, view: View
) -> None:
    browser.visit(write)
    browser.key = ""
    breakable.cut_next(where, matching=b"EVALSHA")
    assert browser.visit(view).status_code == 200
    assert SessionStore(browser.key).load() == {"n": 1}
    assert len(records(store)) == 2


@lost(cycle, acycle)
def test_lost_rotation_moves_the_session_once(
    browser: Browser, breakable: CountingProxy, store: redis.Redis, where: Any, view: View
) -> None:
    browser.visit(write)
    before = browser.key
    breakable.cut_next(where, matching=b"EVALSHA")
    assert browser.visit(view).status_code == 200
    assert browser.key != before
    assert records(store) == [place(browser.key).record.encode()]
    assert SessionStore(browser.key).load() == {"n": 1}


@lost(log_out, alog_out)
def test_lost_logout_logs_out(
    browser: Browser, breakable: CountingProxy, store: redis.Redis, where: Any, view: View
) -> None:
    browser.visit(write)
    breakable.cut_next(where, matching=b"EVALSHA")
    assert browser.visit(view).status_code == 200
    assert records(store) == []


@lost(increment, aincrement)
def test_increment_lost_twice_counts_once_at_most(
    browser: Browser, breakable: CountingProxy, where: Any, view: View
) -> None:
    browser.visit(increment)
    breakable.cut_next(where, matching=b"EVALSHA", times=2)
    assert_503(browser.visit(view))
    assert SessionStore(browser.key).load() in ({"n": 1}, {"n": 2})


def test_writes_of_others_before_a_replay_are_kept(
    breakable: CountingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = SessionStore()
    session.increment("n")
    session.save()
    mine = SessionStore(session.session_key)
    mine.increment("n")
    reconnect = redis.Connection.connect
    others: list[int] = []

    def meanwhile(self: redis.Connection) -> None:
        if not others and self.port == breakable.port and self._sock is None:
            others.append(1)
            for _ in range(3):
                other = SessionStore(session.session_key)
                other.increment("n")
                other.save()
        reconnect(self)

    monkeypatch.setattr(redis.Connection, "connect", meanwhile)
    breakable.cut_next("reply", matching=b"EVALSHA")
    mine.save()
    assert others
    # Its own answer is the first one; the store knows of all.
    assert mine["n"] == 2
    assert SessionStore(session.session_key).load() == {"n": 5}


@pytest.mark.parametrize(
    ("browser", "view"),
    [
        ("wsgi", read),
        ("asgi", aread),
        pytest.param("asgi", increment, marks=pytest.mark.full),
        pytest.param("wsgi", aincrement, marks=pytest.mark.full),
    ],
    indirect=["browser"],
)
def test_silent_store_is_a_503_until_it_answers(
    browser: Browser, proxy: CountingProxy, settings: Any, view: View
) -> None:
    browser.visit(increment)
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 0.2
    wait_for(lambda: browser.visit(read).status_code == 200, "it has a connection again")
    proxy.stall()
    assert_503(browser.visit(view))
    proxy.resume()
    wait_for(lambda: browser.visit(read).status_code == 200, "it is answered again")
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 15.0
    assert SessionStore(browser.key).load() == {"n": 1}


@pytest.mark.full
@pytest.mark.parametrize(
    ("browser", "view"), [("wsgi", read), ("asgi", aread), ("asgi", awrite)], indirect=["browser"]
)
def test_frozen_store_is_a_503_until_it_runs(
    browser: Browser,
    own_server: Callable[..., StoreServer],
    settings: Any,
    view: View,
) -> None:
    server = own_server()
    browser.visit(write)
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 0.2
    wait_for(lambda: browser.visit(read).status_code == 200, "it has a connection again")
    server.pause()
    for _ in range(3):
        assert_503(browser.visit(view))
    server.resume()
    wait_for(lambda: browser.visit(read).content == b"1", "the store is asked again")


def test_silence_costs_no_more_than_the_budget(
    proxy: CountingProxy, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Asks how long the sockets may wait, not how long it took.
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 4.0

    def answers() -> bool:
        with suppress(SessionStoreUnavailable):
            return not SessionStore().exists("x" * 32)
        return False

    wait_for(answers, "it has a connection")
    waits: list[float] = []

    def noting(wait: Any) -> Any:
        def noted(self: socket.socket, *args: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                waits.append(self.gettimeout() or float("inf"))
            return wait(self, *args)

        return noted

    monkeypatch.setattr(socket.socket, "connect", noting(socket.socket.connect))
    monkeypatch.setattr(socket.socket, "recv_into", noting(socket.socket.recv_into))
    proxy.stall()
    with pytest.raises(SessionStoreUnavailable):
        SessionStore("x" * 32).load()
    # The first answer, the new connection, its greeting.
    assert len(waits) == 3
    assert waits[0] <= 2.0
    assert waits[0] + max(waits[1:]) <= 4.0
    proxy.resume()
    # What was short for the last trip's sake is not so for the next.
    wait_for(answers, "it has a connection again")
    assert lent(connections.pool()).socket_connect_timeout == 4.0


@pytest.mark.parametrize("before_s", [0.5, 7.5, 30.0])
def test_wait_for_a_lock_is_not_cut_off_by_an_older_limit(
    before_s: float, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Asks how long the socket may wait, not how long it took.
    limits: list[float] = []
    receive = socket.socket.recv_into

    def noting(self: socket.socket, *args: Any) -> Any:
        limits.append(self.gettimeout() or float("inf"))
        return receive(self, *args)

    def waiting(seconds: float) -> Any:
        return (yield Wait(("mailbox",), seconds))

    monkeypatch.setattr(socket.socket, "recv_into", noting)
    for seconds in (before_s, 8.0):
        store.rpush("mailbox", "x")
        limits.clear()
        assert drivers.run(waiting(seconds), connections.pool, Budget(1)) is True
        assert seconds <= limits[-1] <= seconds + 1


# Stores that answer that they cannot.


@pytest.mark.full
@pytest.mark.each_server
@pytest.mark.parametrize("browser", ["asgi"], indirect=True)
def test_loading_store_is_a_503_until_it_has_loaded(
    browser: Browser, own_server: Callable[..., StoreServer]
) -> None:
    # 50 ms a key, and a look at the clients after each: twenty seconds, until it is told to hurry.
    server = own_server(
        *("--save", "900 1", "--key-load-delay", "50000"),
        *("--loading-process-events-interval-bytes", "1024", "--rdbcompression", "no"),
    )
    browser.visit(write)
    with server.client(db=DATABASE) as client:
        for number in range(400):
            client.set(f"ballast {number}", "x" * 4096)
    server.stop()
    server.spawn()

    def refuses() -> bool:
        with server.client() as client:
            try:
                client.get("ballast 1")
            except redis.BusyLoadingError:
                return True
            except redis.ConnectionError:
                return False
        raise AssertionError("it has loaded before anybody asked")

    wait_for(refuses, "the store says that it is loading")
    with pytest.raises(SessionStoreUnavailable, match="LOADING"):
        SessionStore("x" * 32).load()
    assert_503(browser.visit(read))
    assert_503(browser.visit(aread))
    with server.client() as client:
        client.config_set("key-load-delay", 0)
    server.wait_until_ready()
    wait_for(lambda: browser.visit(read).content == b"1", "the store has loaded")


@pytest.mark.each_server
def test_replica_refuses_writes_with_a_503(
    browser: Browser, own_server: Callable[..., StoreServer]
) -> None:
    server = own_server()
    browser.visit(write)
    with server.client() as client:
        client.replicaof("127.0.0.1", "1")
        assert_503(browser.visit(increment))
        with pytest.raises(SessionStoreUnavailable, match=r"replica.*READONLY"):
            SessionStore(browser.key).delete()
        client.replicaof("NO", "ONE")
    assert browser.visit(increment).content == b"2"


@pytest.fixture
def full(store: redis.Redis) -> Iterator[Callable[[], None]]:
    yield lambda: store.config_set("maxmemory", "1") and None
    store.config_set("maxmemory", "0")


@pytest.mark.each_server
def test_full_store_loses_nothing(
    browser: Browser, store: redis.Redis, settings: Any, full: Callable[[], None]
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = True
    browser.visit(write)
    before = store.hgetall(place(browser.key).record)
    full()
    for view in (increment, aincrement, cycle, acycle):
        assert_503(browser.visit(view))
    assert browser.visit(read).content == b"1"
    with pytest.raises(SessionStoreUnavailable, match="maxmemory"):
        SessionStore().create()
    assert len(records(store)) == 1
    after = store.hgetall(place(browser.key).record)
    assert {k: v for k, v in after.items() if k != b"m:"} == {
        k: v for k, v in before.items() if k != b"m:"
    }
    store.config_set("maxmemory", "0")
    assert browser.visit(increment).content == b"2"


@pytest.mark.each_server
def test_full_store_lets_people_log_out(
    browser: Browser, store: redis.Redis, full: Callable[[], None]
) -> None:
    browser.visit(write)
    full()
    assert browser.visit(alog_out if browser.asgi else log_out).status_code == 200
    assert records(store) == []


@pytest.mark.each_server
@pytest.mark.parametrize(
    ("browser", "options", "says"),
    [
        ("wsgi", {}, "NOAUTH|password"),
        ("asgi", {"PASSWORD": "wrong"}, "WRONGPASS|password"),
    ],
    ids=["none", "wrong"],
    indirect=["browser"],
)
def test_wrong_password_is_a_503_that_does_not_tell_it(
    own_server: Callable[..., StoreServer],
    settings: Any,
    browser: Browser,
    options: dict[str, str],
    says: str,
) -> None:
    server = own_server("--requirepass", "open sesame", **options)
    assert_503(browser.visit(write))
    with pytest.raises(SessionStoreUnavailable, match=says) as caught:
        SessionStore("x" * 32).load()
    assert "sesame" not in str(caught.value)
    use_store(settings, f"{server.url}/{DATABASE}", PASSWORD="open sesame")
    assert browser.visit(write).status_code == 200
    assert browser.visit(read).content == b"1"


@pytest.mark.each_server
@pytest.mark.parametrize("browser", ["asgi"], indirect=True)
def test_password_set_while_the_site_runs_is_a_503(
    own_server: Callable[..., StoreServer], browser: Browser
) -> None:
    server = own_server()
    browser.visit(write)
    with server.client() as client:
        client.config_set("requirepass", "open sesame")
        client.auth("open sesame")
        client.client_kill_filter(_type="normal", skipme=True)
        assert_503(browser.visit(read))
        assert_503(browser.visit(aread))
        client.config_set("requirepass", "")
    assert browser.visit(read).content == b"1"


@pytest.mark.each_server
def test_user_without_permission_gets_a_503(
    own_server: Callable[..., StoreServer], settings: Any, browser: Browser
) -> None:
    server = own_server()
    with server.client() as client:
        client.execute_command(
            *("ACL", "SETUSER", "site", "on", ">pass", "~*", "+@all", "-evalsha", "-eval")
        )
        use_store(settings, f"{server.url}/{DATABASE}", USERNAME="site", PASSWORD="pass")
        assert_503(browser.visit(write))
        with pytest.raises(SessionStoreUnavailable, match="permission"):
            SessionStore().create()
        client.execute_command("ACL", "SETUSER", "site", "+evalsha", "+eval")
    assert browser.visit(write).status_code == 200


@pytest.mark.each_server
@pytest.mark.parametrize(
    ("browser", "view"), [("wsgi", increment), ("asgi", aincrement)], indirect=["browser"]
)
def test_forgotten_scripts_are_sent_again(
    browser: Browser, store: redis.Redis, settings: Any, view: View
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = True
    for expected in (1, 2, 3):
        store.script_flush()
        assert browser.visit(view).content == str(expected).encode()
    store.script_flush()
    assert browser.visit(read).content == b"3"


# Stores that are restarted.


@pytest.mark.parametrize(
    ("browser", "end"),
    [("wsgi", StoreServer.stop), ("asgi", StoreServer.kill)],
    ids=["wsgi-stop", "asgi-kill"],
    indirect=["browser"],
)
def test_store_restarted_between_two_requests_serves_again(
    browser: Browser,
    own_server: Callable[..., StoreServer],
    end: Callable[[StoreServer], None],
) -> None:
    server = own_server("--appendonly", "yes", "--appendfsync", "always")
    browser.visit(increment)
    end(server)
    assert_503(browser.visit(increment))
    assert_503(browser.visit(aincrement))
    server.start()
    assert browser.visit(increment).content == b"2"
    end(server)
    server.start()
    assert browser.visit(aincrement).content == b"3"


async def test_store_restarted_under_one_event_loop_serves_again(
    own_server: Callable[..., StoreServer],
) -> None:
    server = own_server("--appendonly", "yes", "--appendfsync", "always")
    session = SessionStore()
    await session.aset("n", 1)
    await session.asave()
    for _ in range(2):
        server.kill()
        with pytest.raises(SessionStoreUnavailable):
            await SessionStore(session.session_key).aload()
        server.start()
        assert await SessionStore(session.session_key).aload() == {"n": 1}
    server.restart()
    assert await SessionStore(session.session_key).aload() == {"n": 1}


async def test_many_at_once_survive_a_cut(store: redis.Redis, proxy: CountingProxy) -> None:
    session = SessionStore()
    await session.acreate()

    async def add() -> None:
        mine = SessionStore(session.session_key)
        await mine.aincrement("n")
        await mine.asave()

    async def look() -> None:
        assert await SessionStore().aexists(session.session_key)

    for _ in range(3):
        await asyncio.gather(*(look() for _ in range(10)))
        tasks = [asyncio.create_task(add()) for _ in range(10)]
        await asyncio.sleep(0)
        proxy.cut()
        await asyncio.gather(*tasks)
    assert await SessionStore(session.session_key).aload() == {"n": 30}


# Sockets.


def open_sockets() -> set[str]:
    """Return this process's sockets, each by the number that the kernel gives it."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        # The folder itself is among them, and closed by now.
        with suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/self/fd/{name}"))
    return {link for link in found if link.startswith("socket:")}


def clients(store: redis.Redis) -> set[str]:
    """Return the store's clients, each by the number that the store gives it."""
    return {client["id"] for client in store.client_list()}


@pytest.mark.full
def test_many_async_views_under_wsgi_leave_no_socket(settings: Any, store: redis.Redis) -> None:
    # A new connection for each of so many, on a machine that may be busy.
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 60
    browser = Browser(settings)

    async def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse(str(await request.session.aincrement("n")))

    browser.visit(view)
    # Those of other tests may still be closing.
    sockets, known = open_sockets(), clients(store)
    for _ in range(200):
        browser.request("/")
    assert browser.request("/").content == b"202"
    assert open_sockets() <= sockets
    wait_for(lambda: clients(store) <= known, "the store has no client more")
    assert connections.working_pools.by_loop == connections.waiting_pools.by_loop == {}


@pytest.mark.full
def test_fork_has_connections_of_its_own(store_server: StoreServer, store: redis.Redis) -> None:
    code = f"""
import os
import django
from django.conf import settings
settings.configure(
    SESSION_CACHE_ALIAS="sessions",
    CACHES={{
        "sessions": {{
            "BACKEND": "django_redis.cache.RedisCache",
            "LOCATION": "{store_server.url}/{DATABASE}",
        }},
    }},
)
django.setup()
import redis
from django_clustered_sessions.store import connections
from django_clustered_sessions.backend import SessionStore

session = SessionStore()
session["n"] = 0
session.save()

def work():
    for _ in range(200):
        mine = SessionStore(session.session_key)
        mine.increment("n")
        mine.save()
    return redis.Redis(connection_pool=connections.pool()).client_id()

reader, writer = os.pipe()
child = os.fork()
if not child:
    os.write(writer, str(work()).encode())
    os._exit(0)
mine = work()
_, status = os.waitpid(child, 0)
assert status == 0
assert int(os.read(reader, 100)) != mine
print(SessionStore(session.session_key)["n"])
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=100
    )
    assert done.stdout == "400\n", done.stderr


def test_late_reply_is_not_taken_for_the_next(settings: Any) -> None:
    """A refusal ends the wait for a trip's replies; what is left of them comes later."""
    listener = socket.create_server(("127.0.0.1", 0))
    refused = threading.Event()

    def serve() -> None:
        for turn in range(2):
            client, _ = listener.accept()
            with client:
                while b"HGETALL" not in (request := client.recv(65536)):
                    client.sendall(b"+OK\r\n" * request.count(b"\r\n*") + b"+OK\r\n")
                if turn == 0:
                    client.sendall(b"-LOADING it is\r\n")
                    assert refused.wait(60)
                    # The second half of the first trip, where the second trip would read it.
                    client.recv(65536)
                    client.sendall(b"*2\r\n$1\r\n1\r\n$1\r\n1\r\n" * 3)
                else:
                    client.sendall(b"*0\r\n*2\r\n$1\r\n1\r\n$1\r\n1\r\n")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with listener:
        use_store(settings, f"redis://127.0.0.1:{listener.getsockname()[1]}/0")
        with pytest.raises(SessionStoreUnavailable, match="LOADING"):
            SessionStore("x" * 32).load()
        refused.set()
        session = SessionStore("x" * 32)
        assert session.load() == {}
        thread.join(10)
        assert not thread.is_alive()
