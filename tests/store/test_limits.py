"""A user's number of sessions has a limit, which logins at once on several nodes do not exceed.

`node` is such a node, in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import redis
from django.conf import settings
from django.contrib.auth import alogin, login, logout
from django.contrib.auth.forms import AuthenticationForm
from django.contrib.auth.models import User
from django.contrib.sessions.backends.base import UpdateError
from django.contrib.sessions.exceptions import SessionInterrupted
from django.core.exceptions import SynchronousOnlyOperation
from django.forms.utils import ErrorDict
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionLimitReached, SessionStoreUnavailable
from django_clustered_sessions.middleware import ClusteredSessionMiddleware
from django_clustered_sessions.protocol import login_limit
from django_clustered_sessions.protocol.commands import users
from django_clustered_sessions.protocol.effects import Flow, Trip
from django_clustered_sessions.protocol.login_limit import Limit
from django_clustered_sessions.protocol.record import (
    EndReason,
    SessionKeys,
    claims_key,
    session_id,
    user_tag,
)
from django_clustered_sessions.session.near_cache import near_cache
from django_clustered_sessions.store import connections, drivers
from django_clustered_sessions.store.budget import Budget
from tests.children import finish, line, python
from tests.clusters import ClusterServers
from tests.conftest import DATABASE, use_store
from tests.locking import Threads, outcome
from tests.logins import BACKEND, alog_in, log_in
from tests.pages import block
from tests.servers import CountingProxy, StoreServer, wait_for

ANN, BOB = User(pk=1, username="ann"), User(pk=2, username="bob")
CLAIMS = claims_key("session", user_tag(1))

#: What may come of a login where others log in at the same time.
Refused = (SessionLimitReached, UpdateError)


# A node.


def work(how: str, user: User, times: int) -> Counter[str]:
    """Log in again and again, each time with a new browser; return what came of it."""
    came: Counter[str] = Counter()
    with asyncio.Runner() as runner:
        for _ in range(times):
            try:
                if how == "sync":
                    log_in(user)
                else:
                    runner.run(alog_in(user))
            except Refused as error:
                came[type(error).__name__] += 1
            else:
                came["in"] += 1
    return came


def node(url: str, how: str, most: int, on_limit: str, times: int) -> None:
    """Log a user in, in two threads, and print what came of it as JSON."""
    forget_last_login()
    use_store(settings, url)
    settings.CLUSTERED_SESSIONS_MAX_SESSIONS_PER_USER = most
    settings.CLUSTERED_SESSIONS_ON_SESSION_LIMIT = on_limit
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 30
    print("ready", flush=True)
    sys.stdin.readline()
    with Threads() as threads:
        working = [threads.start(work, how, ANN, times) for _ in range(2)]
    print(json.dumps(sum(map(outcome, working), Counter())), flush=True)


def forget_last_login(patch: Callable[..., None] = setattr) -> None:
    """Let logging in write nothing into the user's row; there is no database."""

    async def asave(self: User, **kwargs: Any) -> None: ...

    patch(User, "save", lambda self, **kwargs: None)
    patch(User, "asave", asave)


# The tests.


@pytest.fixture(autouse=True)
def _no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_last_login(monkeypatch.setattr)


@pytest.fixture
def limit(settings: Any) -> Callable[..., None]:
    """Give what sets the limit."""

    def set_limit(most: int, on_limit: str = "end_oldest") -> None:
        settings.CLUSTERED_SESSIONS_MAX_SESSIONS_PER_USER = most
        settings.CLUSTERED_SESSIONS_ON_SESSION_LIMIT = on_limit

    return set_limit


def ids(user: User) -> set[str]:
    return {entry.id for entry in registry.sessions_of(user)}


def public_ids(*sessions: SessionStore) -> set[str]:
    return {session_id(session.session_key or "") for session in sessions}


def begin(user: User = ANN) -> SessionStore:
    """Log a user in, and leave the login unwritten: its view runs still, or its process died."""
    request = HttpRequest()
    request.session = SessionStore()
    login(request, user, backend=BACKEND)
    return request.session


def lapse(store: redis.Redis) -> None:
    """Let all claims be as old as can be."""
    for claimed in store.zrange(CLAIMS, 0, -1):
        store.zadd(CLAIMS, {claimed: 1})


def claims(store: redis.Redis) -> set[str]:
    return {claimed.decode() for claimed in store.zrange(CLAIMS, 0, -1)}


@pytest.mark.parametrize("how", ["sync", "async"])
def test_newest_sessions_stay(store: redis.Redis, limit: Any, how: str) -> None:
    limit(2)

    def enter(user: User) -> SessionStore:
        return log_in(user) if how == "sync" else asyncio.run(alog_in(user))

    bobs = [enter(BOB), enter(BOB)]
    sessions = []
    for _ in range(4):
        sessions.append(enter(ANN))
        assert ids(ANN) == public_ids(*sessions[-2:])
        tick(store)
    for session in sessions[:2]:
        late = SessionStore(session.session_key)
        assert late.load() == {} and late.state.ended is EndReason.LIMIT
    assert ids(BOB) == public_ids(*bobs)


def tick(store: redis.Redis) -> None:
    """Wait for the store's next millisecond."""
    before = store.time()[1] // 1000
    wait_for(lambda: store.time()[1] // 1000 != before, "the clock")


@pytest.mark.parametrize("how", ["sync", "async"])
def test_one_login_too_many_is_refused(store: redis.Redis, limit: Any, how: str) -> None:
    limit(2, "refuse")
    first, second = log_in(ANN), log_in(ANN)
    request = HttpRequest()
    request.session = SessionStore()
    with pytest.raises(SessionLimitReached) as caught:
        if how == "sync":
            login(request, ANN, backend=BACKEND)
        else:
            asyncio.run(alogin(request, ANN, backend=BACKEND))
    assert caught.value.limit == 2
    assert "_auth_user_id" not in request.session
    # It is of use still, and whoever logs out elsewhere makes room.
    request.session["tried"] = True
    request.session.save()
    assert ids(ANN) == public_ids(first, second)
    first.flush()
    login(request, ANN, backend=BACKEND)
    request.session.save()
    assert ids(ANN) == public_ids(second, request.session)
    assert SessionStore(request.session.session_key)["tried"] is True


SYNC: dict[str, Callable[[SessionStore], Any]] = {
    "item": lambda session: session.__setitem__("_auth_user_id", "1"),
    "update": lambda session: session.update({"x": 1, "_auth_user_id": "1"}),
    "pairs": lambda session: session.update([("_auth_user_id", "1")]),
    "setdefault": lambda session: session.setdefault("_auth_user_id", "1"),
}
ASYNC: dict[str, Callable[[SessionStore], Awaitable[Any]]] = {
    "aset": lambda session: session.aset("_auth_user_id", "1"),
    "aupdate": lambda session: session.aupdate({"x": 1, "_auth_user_id": "1"}),
    "asetdefault": lambda session: session.asetdefault("_auth_user_id", "1"),
}


@pytest.mark.parametrize("way", [*SYNC, *ASYNC])
def test_every_way_to_log_in_is_counted(store: redis.Redis, limit: Any, way: str) -> None:
    limit(1, "refuse")

    async def awaited(session: SessionStore) -> None:
        await ASYNC[way](session)

    def enter(session: SessionStore) -> SessionStore:
        if way in SYNC:
            SYNC[way](session)
        else:
            asyncio.run(awaited(session))
        return session

    stored = SessionStore()
    stored.create()
    session = enter(SessionStore())
    with pytest.raises(SessionLimitReached):
        enter(stored)
    session.save()
    with pytest.raises(SessionLimitReached):
        enter(SessionStore())
    assert ids(ANN) == public_ids(session)


def test_a_login_past_all_accessors_is_refused_by_its_write(store: redis.Redis, limit: Any) -> None:
    limit(1, "refuse")
    log_in(ANN)
    stored, new, given = SessionStore(), SessionStore(), SessionStore("k" * 32)
    stored.create()
    for session in (stored, new, given):
        session._session["_auth_user_id"] = "1"
        with pytest.raises(SessionLimitReached):
            session.save(must_create=session is given)
    assert registry.count_of(ANN) == 1


def test_session_that_is_logged_in_is_counted_once(store: redis.Redis, limit: Any) -> None:
    limit(1, "refuse")
    session = log_in(ANN)
    for _ in range(3):
        log_in(ANN, session)
        session.cycle_key()
        session.save()
        session = SessionStore(session.session_key)
        SessionStore(session.session_key).cycle_key()
        (entry,) = registry.sessions_of(ANN)
        key = next(
            key for key in store.scan_iter(f"session:*:{entry.id}") if store.hexists(key, "m:")
        )
        assert store.hexists(key, "d:_auth_user_id")
        registry.end_session(entry.id)
        session = log_in(ANN)


@pytest.mark.parametrize("way", ["logout", "ended", "deleted", "expired", "evicted"])
def test_session_that_is_no_more_makes_room_at_once(
    store: redis.Redis, limit: Any, way: str
) -> None:
    limit(1, "refuse")
    session = log_in(ANN)
    place = SessionKeys.of("session", session.session_key or "")
    match way:
        case "logout":
            request = HttpRequest()
            request.session, request.user = session, ANN
            logout(request)
        case "ended":
            registry.end_session(place.id)
        case "deleted":
            SessionStore().delete(session.session_key)
        case "expired":
            session.set_expiry(1)
            session.save()
            wait_for(lambda: not store.exists(place.record), "the session to expire")
        case "evicted":
            store.delete(place.record)
    assert registry.count_of(ANN) == 0
    again = log_in(ANN)
    assert ids(ANN) == public_ids(again)


def test_a_lower_limit_takes_effect_with_the_next_login(store: redis.Redis, limit: Any) -> None:
    sessions = []
    for _ in range(5):
        sessions.append(log_in(ANN))
        tick(store)
    limit(2)
    newest = log_in(ANN)
    assert ids(ANN) == public_ids(sessions[-1], newest)


def test_a_login_that_is_not_written_yet_counts(store: redis.Redis, limit: Any) -> None:
    limit(1, "refuse")
    session = begin()
    assert registry.count_of(ANN) == 0
    with pytest.raises(SessionLimitReached):
        begin()
    session.save()
    assert ids(ANN) == public_ids(session)


def test_a_login_that_was_never_written_makes_room_in_the_end(
    store: redis.Redis, limit: Any
) -> None:
    limit(1, "refuse")
    begin()
    with pytest.raises(SessionLimitReached):
        begin()
    assert 0 < store.pttl(CLAIMS) <= login_limit.lapse_ms(10, 15)
    lapse(store)
    session = log_in(ANN)
    assert ids(ANN) == public_ids(session)


def test_login_on_its_way_is_ended_last(store: redis.Redis, limit: Any) -> None:
    limit(2)
    log_in(ANN)
    on_its_way = begin()
    newest = log_in(ANN)
    on_its_way.save()
    assert ids(ANN) == public_ids(on_its_way, newest)
    first, second, third = begin(), begin(), begin()
    with pytest.raises(UpdateError, match="limit"):
        first.save()
    second.save()
    third.save()
    assert ids(ANN) == public_ids(second, third)


def test_a_session_that_another_user_has_by_now_is_not_ended(
    store: redis.Redis, limit: Any
) -> None:
    limit(1)
    shared = SessionStore()
    shared.create()
    SessionStore(shared.session_key)["_auth_user_id"] = "1"
    shared["_auth_user_id"] = "2"
    shared.save()
    with pytest.raises(SessionLimitReached):
        begin()
    assert ids(BOB) == public_ids(shared)
    lapse(store)
    log_in(ANN)
    assert ids(BOB) == public_ids(shared)


def middleware(view: Callable[[HttpRequest], HttpResponse]) -> Callable[[], HttpResponse]:
    """Return what makes a request of a new browser to a view, under the middleware."""

    def get_response(request: HttpRequest) -> HttpResponse:
        try:
            return view(request)
        except Exception as error:
            answer = between.process_exception(request, error)
            return answer or HttpResponse(status=500)

    between = ClusteredSessionMiddleware(get_response)
    return lambda: between(RequestFactory().get("/"))


def test_a_view_that_fails_after_its_login_gives_the_place_back(
    store: redis.Redis, limit: Any
) -> None:
    limit(1, "refuse")

    def view(request: HttpRequest) -> HttpResponse:
        login(request, ANN, backend=BACKEND)
        assert len(claims(store)) == 1
        raise RuntimeError("the view")

    assert middleware(view)().status_code == 500
    assert claims(store) == set()
    log_in(ANN)


def test_a_login_whose_write_may_have_landed_keeps_its_claim(
    proxy: CountingProxy, store: redis.Redis, limit: Any, settings: Any
) -> None:
    limit(1, "refuse")
    settings.SESSION_SERIALIZER = "django.contrib.sessions.serializers.JSONSerializer"

    def view(request: HttpRequest) -> HttpResponse:
        login(request, ANN, backend=BACKEND)
        proxy.cut_next("reply", times=2)
        return HttpResponse()

    assert middleware(view)().status_code == 503
    assert len(claims(store)) == 1
    assert registry.count_of(ANN) == 1
    with pytest.raises(SessionLimitReached):
        begin()


def test_a_login_that_takes_long_claims_its_place_anew(
    store: redis.Redis, limit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(1, "refuse")
    monkeypatch.setattr(login_limit, "FRESH_S", 0.0)
    slow = begin()
    lapse(store)
    other = log_in(ANN)
    with pytest.raises(SessionLimitReached):
        slow.save()
    limit(1)
    slow.save()
    assert ids(ANN) == public_ids(slow)
    assert SessionStore(other.session_key).load() == {}


def test_refusal_that_nobody_catches_is_a_403(
    store: redis.Redis, limit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(1, "refuse")

    def at_once(request: HttpRequest) -> HttpResponse:
        login(request, ANN, backend=BACKEND)
        return HttpResponse()

    def too_late(request: HttpRequest) -> HttpResponse:
        login(request, ANN, backend=BACKEND)
        lapse(store)
        log_in(ANN)
        return HttpResponse()

    monkeypatch.setattr(login_limit, "FRESH_S", 0.0)
    for view in (too_late, at_once):
        response = middleware(view)()
        assert response.status_code == 403
        assert "Retry-After" not in response.headers
        assert b"log out elsewhere" in response.content
        assert "sessionid" not in response.cookies or view is at_once
    assert registry.count_of(ANN) == 1


def test_the_form_of_the_documentation_says_so(store: redis.Redis, limit: Any) -> None:
    limit(1, "refuse")
    found: dict[str, Any] = {}
    exec(block("limits.md", "LoginView"), found)
    log_in(ANN)
    request = RequestFactory().post("/")
    request.session = SessionStore()
    form = AuthenticationForm(request)
    form.cleaned_data, form.user_cache, form._errors = {}, ANN, ErrorDict()
    ANN.backend = BACKEND
    view = found["Login"]()
    view.setup(request)
    response = view.form_valid(form)
    assert response.status_code == 200
    assert form.non_field_errors() == ["You are logged in 1 times. Log out elsewhere first."]


def test_login_that_was_ended_on_its_way_is_told(store: redis.Redis, limit: Any) -> None:
    limit(1)

    def view(request: HttpRequest) -> HttpResponse:
        login(request, ANN, backend=BACKEND)
        log_in(ANN)
        return HttpResponse()

    with pytest.raises(SessionInterrupted):
        middleware(view)()
    assert registry.count_of(ANN) == 1


async def test_a_synchronous_login_on_an_event_loop_names_the_twin(limit: Any) -> None:
    limit(1)
    with pytest.raises(SynchronousOnlyOperation, match=r"alogin\(\).*aset\(\)"):
        SessionStore()["_auth_user_id"] = "1"


def test_a_store_that_is_away_lets_nobody_in(
    proxy: CountingProxy, limit: Any, settings: Any
) -> None:
    limit(1)
    session = SessionStore()
    session.create()
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 1.0
    proxy.refuse()
    with pytest.raises(SessionStoreUnavailable):
        session["_auth_user_id"] = "1"
    assert "_auth_user_id" not in session


@pytest.mark.parametrize("damage", ["another type", "junk", "a foreign session"])
def test_claims_that_were_damaged_by_hand_lock_nobody_out(
    store: redis.Redis, limit: Any, damage: str
) -> None:
    limit(1, "refuse")
    match damage:
        case "another type":
            store.set(CLAIMS, "x")
        case "junk":
            store.zadd(CLAIMS, {b"\xff\xfe": 9e15, "": 9e15, "x" * 50: 9e15})
        case "a foreign session":
            store.zadd(CLAIMS, {"a" * 43: 9e15})
    session = log_in(ANN)
    assert ids(ANN) == public_ids(session)


def test_session_that_moves_while_a_login_looks_is_counted(store: redis.Redis, limit: Any) -> None:
    """The move is from a bucket that is looked at late to one that was looked at before."""
    limit(1, "refuse")
    session = log_in(ANN)
    while bucket(session) < 900:
        session.cycle_key()
    session.save()
    lapse(store)
    other = SessionStore()
    other.create()
    place = SessionKeys.of("session", other.session_key or "")
    bound = Limit(1, False, 60_000)
    flow = login_limit.claim(place, "session", "1", bound, _must_not_end, lambda: 0.0)
    step = next(flow)
    assert isinstance(step, tuple) and len(step) == 2 * 1024
    replies = ask(step[: 2 * 900])
    key = session.session_key
    while bucket(session) >= 900 or session.session_key == key:
        session.cycle_key()
    replies += ask(step[2 * 900 :])
    assert not any(listed for listed in replies[1::2])
    with pytest.raises(SessionLimitReached):
        step = flow.send(replies)
        while True:
            step = flow.send(ask(step))  # type: ignore[arg-type]


def _must_not_end(places: Any) -> Flow[None]:
    raise AssertionError(places)
    yield ()


def bucket(session: SessionStore) -> int:
    return int(SessionKeys.of("session", session.session_key or "").index.split("{")[1][:3], 16)


def ask(trip: Trip) -> list[Any]:
    def flow() -> Flow[list[Any]]:
        return list((yield trip))

    return drivers.run(flow(), connections.pool, Budget(15.0))


def test_a_look_that_is_old_is_not_relied_on(store: redis.Redis, limit: Any) -> None:
    """Its process stood still before it claimed: the claim of who has come since may be over."""
    limit(1, "refuse")
    session = SessionStore()
    session.create()
    place = SessionKeys.of("session", session.session_key or "")
    now = iter([0.0, 10.0, 10.0, 10.0, 10.0])
    flow = login_limit.claim(
        place, "session", "1", Limit(1, False, 60_000), _must_not_end, lambda: next(now)
    )
    step = next(flow)
    replies = ask(step)  # type: ignore[arg-type]
    log_in(ANN)
    lapse(store)
    with pytest.raises(SessionLimitReached):
        step = flow.send(replies)
        while True:
            step = flow.send(ask(step))  # type: ignore[arg-type]


@pytest.mark.parametrize("before, ended, trips", [(0, 0, 2), (1, 0, 4), (2, 1, 5), (4, 3, 7)])
def test_limit_costs_a_login_so_many_trips(
    store: redis.Redis,
    limit: Any,
    monkeypatch: pytest.MonkeyPatch,
    before: int,
    ended: int,
    trips: int,
) -> None:
    """Beyond load, rotation and commit: the look, what it found, the ends, the claim."""
    for _ in range(before):
        log_in(ANN)
    anonymous = SessionStore()
    anonymous.create()
    near_cache.clear()
    limit(2)
    made: list[Trip] = []
    pool = connections.pool
    # Not by a proxy: a look is so long that its replies begin before its end.
    monkeypatch.setattr(connections, "pool", lambda step: made.append(step) or pool(step))
    log_in(ANN, SessionStore(anonymous.session_key))
    assert len(made) == 3 + trips
    assert registry.count_of(ANN) == before + 1 - ended


def note_looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note each bucket that is asked whether it has sessions of a user."""
    looks: list[int] = []

    def counted(prefix: str, number: int, user: bytes) -> Trip:
        # In one step, for threads do it at once.
        looks.append(number)
        return build(prefix, number, user)

    build = users.counted
    monkeypatch.setattr(users, "counted", counted)
    return looks


def test_a_storm_of_logins_asks_each_index_once_a_login(
    store: redis.Redis, limit: Any, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, rounds = 16, 3
    limit(at_once)
    looks = note_looks(monkeypatch)
    # A machine that stands still makes no look an old one.
    monkeypatch.setattr(login_limit, "LOOK_S", 1000.0)
    together = threading.Barrier(at_once)

    def view(request: HttpRequest) -> HttpResponse:
        login(request, ANN, backend=BACKEND)
        return HttpResponse()

    def work() -> list[int]:
        statuses = []
        for _ in range(rounds):
            together.wait()
            statuses.append(middleware(view)().status_code)
        return statuses

    working = [threads.start(work) for _ in range(at_once)]
    assert [outcome(future) for future in working] == [[200] * rounds] * at_once
    assert set(Counter(looks).values()) == {at_once * rounds}
    assert registry.count_of(ANN) == at_once


@pytest.mark.parametrize("on_limit", ["refuse", pytest.param("end_oldest", marks=pytest.mark.full)])
def test_two_nodes_at_once_never_exceed_the_limit(
    store: redis.Redis, store_server: StoreServer, on_limit: str
) -> None:
    most, times = 2, 3
    code = "import django; django.setup(); from tests.store.test_limits import node; node(*{})"
    url = f"{store_server.url}/{DATABASE}"
    environment = os.environ | {"DJANGO_SETTINGS_MODULE": "tests.settings"}
    with ExitStack() as started:
        nodes = [
            started.enter_context(
                python(
                    *("-W", "error", "-c", code.format((url, how, most, on_limit, times))),
                    env=environment,
                    stdin=subprocess.PIPE,
                )
            )
            for how in ("sync", "async")
        ]
        for node in nodes:
            assert line(node) == "ready\n"
        for node in nodes:
            assert node.stdin
            node.stdin.write("\n")
            node.stdin.flush()
        seen = [registry.count_of(ANN)]
        while any(node.poll() is None for node in nodes):
            seen.append(registry.count_of(ANN))
        told = finish(*nodes)
    assert max(seen) <= most
    came = sum((Counter(json.loads(one)) for one in told), Counter())
    assert sum(came.values()) == 2 * 2 * times
    assert registry.count_of(ANN) == most
    if on_limit == "refuse":
        assert came == {"in": most, "SessionLimitReached": 4 * times - most}
    else:
        assert came["SessionLimitReached"] == 0 and came["in"] >= most


@pytest.fixture(scope="module")
def servers(store_server: StoreServer) -> Iterator[ClusterServers]:
    with ClusterServers(binary=store_server.binary) as started:
        yield started


@pytest.mark.full
@pytest.mark.parametrize("on_limit", ["refuse", "end_oldest"])
def test_logins_on_a_cluster_never_exceed_the_limit(
    servers: ClusterServers, settings: Any, limit: Any, threads: Threads, on_limit: str
) -> None:
    servers.flush()
    servers.use(settings)
    limit(2, on_limit)
    working = [threads.start(work, how, ANN, 3) for how in ("sync", "async", "sync")]
    seen = [registry.count_of(ANN)]
    while not all(future.done() for future in working):
        seen.append(registry.count_of(ANN))
    came = sum((outcome(future) for future in working), Counter())
    assert max(seen) <= 2
    assert registry.count_of(ANN) == 2
    assert came["in"] == 2 if on_limit == "refuse" else came["in"] >= 2
    assert sum(came.values()) == 9
