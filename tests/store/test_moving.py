"""Moving in: each session of the old engine is taken over once, and never comes back from there."""

from __future__ import annotations

import datetime as dt
import io
import json
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import django
import pytest
import redis
from asgiref.sync import sync_to_async
from django.contrib.sessions.backends import db, file
from django.core.cache import caches
from django.core.exceptions import ImproperlyConfigured
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from django.http import HttpRequest, HttpResponse
from django.test import Client, override_settings
from django.urls import path as route
from django.utils import timezone

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.importing import old_engine as old_engines
from django_clustered_sessions.importing import on_demand
from django_clustered_sessions.importing.old_engine import Pickled, engine
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol.commands import records
from django_clustered_sessions.protocol.effects import OutsideCall
from django_clustered_sessions.protocol.record import (
    EndReason,
    HiddenKey,
    Mode,
    SessionKeys,
    session_id,
)
from django_clustered_sessions.store import connections
from tests.children import LIFE_S, finish, line, python
from tests.conftest import DATABASE, use_store
from tests.servers import wait_for

ENGINES = "django.contrib.sessions.backends."
REDIS_SESSIONS = "redis_sessions.session"
AGE_S = 14 * 24 * 3600

pytestmark = pytest.mark.django_db(transaction=True)


def kept_in(cache: str, engine: str = ENGINES + "cache") -> dict[str, str]:
    """Return the setting for an old engine with its sessions in another cache than the new."""
    return {"ENGINE": engine, "CACHE": cache}


class Old:
    """The engine that the site comes from, used as nodes that still have it do."""

    def __init__(self, path: str) -> None:
        self.path = path

    def session(self, key: str | None = None) -> Any:
        with override_settings(SESSION_CACHE_ALIAS="old"):
            return import_module(self.path).SessionStore(key)

    def create(self, values: dict[str, Any], *, expiry: Any = None) -> str:
        session = self.session()
        session.update(values)
        if expiry is not None:
            session.set_expiry(expiry)
        session.create()
        return str(session.session_key)

    def read(self, key: str) -> dict[str, Any]:
        return dict(self.session(key).load())

    def let_live(self, key: str, left_s: int) -> None:
        """Let a session have so long to live, as if it had been saved a while ago."""
        session = self.session(key)
        if hasattr(session, "_cache"):
            session._cache.touch(session.cache_key, left_s)
        if isinstance(session, db.SessionStore):
            until = timezone.now() + dt.timedelta(seconds=left_s)
            session.model.objects.filter(session_key=key).update(expire_date=until)
        elif isinstance(session, file.SessionStore):
            saved_s = time.time() + left_s - AGE_S
            os.utime(session._key_to_file(key), (saved_s, saved_s))
        elif hasattr(session, "server"):
            session.server.expire(session.get_real_stored_key(key), left_s)


def old_engine(path: str, store: redis.Redis, settings: Any, folder: Path) -> Old:
    """Let the site come from an engine, whose cache is another database of the same server."""
    if path == REDIS_SESSIONS and not _is_installed("redis_sessions"):
        if os.environ.get("CLUSTERED_SESSIONS_REQUIRE_ALL") == "1":
            pytest.fail("django-redis-sessions is not installed")
        pytest.skip("django-redis-sessions is not installed")
    port = store.connection_pool.connection_kwargs["port"]
    settings.CACHES = settings.CACHES | {
        "old": {
            "BACKEND": "django_redis.cache.RedisCache",
            "LOCATION": f"redis://127.0.0.1:{port}/{DATABASE + 1}",
        },
        "plain": {
            "BACKEND": "django.core.cache.backends.redis.RedisCache",
            "LOCATION": f"redis://127.0.0.1:{port}/{DATABASE + 1}",
        },
    }
    settings.SESSION_FILE_PATH = str(folder)
    with suppress(AttributeError):
        del file.SessionStore._storage_path
    if path == REDIS_SESSIONS:
        at = import_module("redis_sessions.settings")
        at.SESSION_REDIS_PORT, at.SESSION_REDIS_DB, at.SESSION_REDIS_PREFIX = (
            *(port, DATABASE + 1),
            "old",
        )
        import_module(path).RedisServer._RedisServer__redis.clear()
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = kept_in("old", path)
    settings.CLUSTERED_SESSIONS_MIGRATE_PICKLE = True
    return Old(path)


def _is_installed(module: str) -> bool:
    try:
        import_module(module)
    except ImportError:
        return False
    return True


@pytest.fixture(params=[ENGINES + "db"])
def old(request: Any, store: redis.Redis, settings: Any, tmp_path: Path) -> Iterator[Old]:
    counters.clear()
    yield old_engine(request.param, store, settings, tmp_path)
    with suppress(AttributeError):
        del file.SessionStore._storage_path


PLAIN = [ENGINES + name for name in ("db", "cached_db", "cache", "file")]


def redis_sessions(*values: Any) -> Any:
    """Return parameters of a test, of which the engine of django-redis-sessions is the first."""
    ignore = pytest.mark.filterwarnings("ignore::DeprecationWarning")
    return pytest.param(REDIS_SESSIONS, *values, marks=ignore)


def every_engine(test: Any) -> Any:
    return pytest.mark.parametrize("old", [*PLAIN, redis_sessions()], indirect=True)(test)


def asked() -> int:
    return counters.counts["takeovers_asked"]


def taken() -> int:
    return counters.counts["takeovers"]


def let_the_tombstone_go(store: redis.Redis, key: str) -> None:
    """Do what ten minutes do to what an ended session leaves behind."""
    store.delete(SessionKeys.of("session", key).record)


def sessions(store: redis.Redis) -> set[bytes]:
    """Return the keys of all there is in the store of sessions: nothing, after a bogus cookie."""
    return set(store.scan_iter("session:*"))


# Taken over, with what it was.


@every_engine
def test_session_is_taken_over_once_with_what_it_has(old: Old) -> None:
    key = old.create({"cart": {"tea": 2}, "_auth_user_id": "7"})
    session = SessionStore(key)
    assert session["cart"] == {"tea": 2}
    assert session.session_key == key
    assert (asked(), taken()) == (1, 1)
    # The old one is left to those who still use it.
    assert old.read(key)["cart"] == {"tea": 2}
    assert [entry.id for entry in registry.sessions_of(7)] == [session_id(key)]
    session["cart"]["tea"] = 3
    session.save()
    assert SessionStore(key)["cart"] == {"tea": 3}
    assert (asked(), taken()) == (1, 1)


def close_database() -> None:
    """Close the connection of the thread in which Django asks for an event loop."""
    if connection.connection is not None:
        # Not close(), which keeps a database in memory.
        connection.connection.close()
        connection.connection = None


@every_engine
async def test_session_is_taken_over_by_native_methods(
    old: Old, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await sync_to_async(old.create)({"cart": {"tea": 2}})

    def refuse(self: Any) -> None:
        raise AssertionError("the synchronous method on an event loop")

    with monkeypatch.context() as patch:
        patch.setattr(db.SessionStore, "_get_session_from_db", refuse)
        patch.setattr(db.SessionStore, "delete", refuse)
        session = SessionStore(key)
        assert await session.aget("cart") == {"tea": 2}
        assert (asked(), taken()) == (1, 1)
        await session.aflush()
        assert await SessionStore(key).aload() == {}
    assert (asked(), taken()) == (1, 1)
    assert not await sync_to_async(old.read)(key)
    await sync_to_async(close_database)()


@every_engine
def test_session_keeps_what_is_left_of_its_life(old: Old) -> None:
    key = old.create({"n": 1})
    old.let_live(key, 1000)
    session = SessionStore(key)
    assert session["n"] == 1
    assert 990 < session.get_expiry_age() <= 1000
    # From then on it slides as any other.
    session.modified = True
    session.save()
    assert AGE_S - 10 < SessionStore(key).get_expiry_age() <= AGE_S


def test_a_cache_of_django_tells_what_is_left(old: Old, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = kept_in("plain")
    with override_settings(SESSION_CACHE_ALIAS="plain"):
        session = import_module(ENGINES + "cache").SessionStore()
        session["n"] = 1
        session.save()
        session._cache.touch(session.cache_key, 1000)
    assert 990 < SessionStore(session.session_key).get_expiry_age() <= 1000


def test_the_session_in_a_signed_cookie_is_taken_over(old: Old, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = ENGINES + "signed_cookies"
    cookie = Old(ENGINES + "signed_cookies").session()
    cookie["n"] = 1
    cookie.save()
    key = cookie.session_key
    session = SessionStore(key)
    assert (session["n"], session.session_key) == (1, key)
    session.flush()
    for each in (key, key[:-1] + "x", "forged"):
        assert SessionStore(each).load() == {}
    assert taken() == 1


@every_engine
def test_session_keeps_how_it_expires(old: Old) -> None:
    until = dt.datetime.now(dt.UTC) + dt.timedelta(hours=2)
    for expiry, mode, least, most in (
        (600, Mode.SLIDING, 590, 600),
        (0, Mode.BROWSER, AGE_S - 10, AGE_S),
        (until, Mode.ABSOLUTE, 7190, 7200),
    ):
        key = old.create({"n": 1}, expiry=expiry)
        session = SessionStore(key)
        session.load()
        assert session.state.lifetime.mode is mode
        assert least < session.get_expiry_age() <= most
        assert session.get_expire_at_browser_close() is (expiry == 0)


def test_a_span_of_its_own_slides_by_that_again(old: Old) -> None:
    key = old.create({"n": 1}, expiry=600)
    old.let_live(key, 60)
    session = SessionStore(key)
    assert session["n"] == 1
    assert 50 < session.get_expiry_age() <= 60
    session["n"] = 2
    session.save()
    assert 590 < SessionStore(key).get_expiry_age() <= 600


@every_engine
def test_expired_or_empty_session_is_not_taken_over(old: Old, store: redis.Redis) -> None:
    expired, empty = old.create({"n": 1}), old.create({})
    old.let_live(expired, 1)
    if old.path.endswith(("db", "file")):
        old.let_live(expired, -1)
    wait_for(lambda: not old.read(expired), "it has expired there")
    for key in (expired, empty):
        assert SessionStore(key).load() == {}
    assert (asked(), taken()) == (2, 0)
    assert sessions(store) == set()


@pytest.mark.parametrize("old", [ENGINES + "file"], indirect=True)
def test_an_expired_file_is_not_followed_by_a_new_one(old: Old) -> None:
    key = old.create({"n": 1})
    old.let_live(key, -1)
    assert SessionStore(key).load() == {}
    assert os.listdir(old.session().storage_path) == []


# Never again.


def flush(session: SessionStore) -> None:
    session.flush()


def end_by_id(session: SessionStore) -> None:
    assert registry.end_session(session_id(session.session_key or ""))


def cycle(session: SessionStore) -> None:
    session.cycle_key()


def expire(session: SessionStore) -> None:
    """Do what a timeout does that is shorter than the old engine's."""
    with redis.Redis(connection_pool=connections.pool()) as raw:
        raw.delete(SessionKeys.of("session", session.session_key or "").record)


#: How an old engine deletes is its own; that it is asked to, depends on the end.
@pytest.mark.parametrize(
    ("old", "end"),
    [
        *((engine, flush) for engine in PLAIN),
        redis_sessions(flush),
        (ENGINES + "cached_db", cycle),
        (ENGINES + "cache", end_by_id),
        (ENGINES + "file", expire),
    ],
    indirect=["old"],
)
def test_session_that_has_ended_here_does_not_come_back(
    old: Old, store: redis.Redis, end: Callable[[SessionStore], None]
) -> None:
    key = old.create({"_auth_user_id": "7", "n": 1})
    session = SessionStore(key)
    assert session["n"] == 1
    end(session)
    assert SessionStore(key).load() == {}
    let_the_tombstone_go(store, key)
    for _ in range(2):
        late = SessionStore(key)
        assert late.load() == {}
        assert late.state.ended is EndReason.UNKNOWN
        assert not SessionStore().exists(key)
    assert (asked(), taken()) == (1, 1)
    # Where the key is known, nodes with the old engine learn of it too.
    assert (old.read(key) == {}) == (end in (flush, cycle))


@pytest.mark.parametrize(
    ("old", "how"),
    [
        (ENGINES + "db", "flush"),
        (ENGINES + "file", "flush"),
        (ENGINES + "cached_db", "delete"),
        (ENGINES + "cache", "delete"),
        (ENGINES + "db", "cycle_key"),
        redis_sessions("cycle_key"),
    ],
    indirect=["old"],
)
def test_end_without_a_load_is_one(old: Old, store: redis.Redis, how: str) -> None:
    key = old.create({"n": 1})
    session = SessionStore(key)
    if how == "delete":
        SessionStore().delete(key)
    else:
        getattr(session, how)()
    let_the_tombstone_go(store, key)
    assert SessionStore(key).load() == {}
    assert old.read(key) == {}
    assert session.load() == ({"n": 1} if how == "cycle_key" else {})


def test_a_rollback_of_the_request_brings_nothing_back(old: Old, store: redis.Redis) -> None:
    key = old.create({"n": 1})
    with suppress(ZeroDivisionError), transaction.atomic():
        session = SessionStore(key)
        assert session["n"] == 1
        session.flush()
        raise ZeroDivisionError
    assert old.read(key) == {"n": 1}
    let_the_tombstone_go(store, key)
    assert SessionStore(key).load() == {}


def test_a_request_in_flight_brings_nothing_back(old: Old, store: redis.Redis) -> None:
    key = old.create({"n": 1})
    place, session = SessionKeys.of("session", key), SessionStore(key)
    late = on_demand.take_over(
        HiddenKey(key), place, session.state.write_options(), session.serializer()
    )
    asking = next(late)
    step = late.send([store.zscore(place.index.replace("index", "moved"), place.id), 0])
    assert isinstance(step, OutsideCall) and asking
    row = step.call()
    session.flush()
    let_the_tombstone_go(store, key)
    (adopt,) = late.send(row)
    reply = store.evalsha(adopt.script.sha, len(adopt.keys), *adopt.keys, *adopt.arguments)
    with pytest.raises(StopIteration):
        late.send([reply])
    assert SessionStore(key).load() == {}
    assert taken() == 1


def test_two_at_once_take_a_session_over_once(old: Old, store: redis.Redis) -> None:
    key = old.create({"n": 1})
    place, late_one = SessionKeys.of("session", key), SessionStore(key)
    late = on_demand.take_over(
        HiddenKey(key), place, late_one.state.write_options(), late_one.serializer()
    )
    next(late)
    row = late.send([None, 0]).call()
    first = SessionStore(key)
    first["n"] += 1
    first.save()
    (adopt,) = late.send(row)
    reply = store.evalsha(adopt.script.sha, len(adopt.keys), *adopt.keys, *adopt.arguments)
    with pytest.raises(StopIteration) as stopped:
        late.send([reply])
    assert stopped.value.value is True
    assert late_one["n"] == 2
    assert taken() == 1


def test_session_that_is_here_already_stays(old: Old, store: redis.Redis) -> None:
    key = old.create({"n": 1})
    place, session = SessionKeys.of("session", key), SessionStore(key)
    late = on_demand.take_over(
        HiddenKey(key), place, session.state.write_options(), session.serializer()
    )
    next(late)
    row = late.send([None, 0]).call()
    session._session_cache = {"n": "native"}
    session.save(must_create=True)
    (adopt,) = late.send(row)
    assert store.eval(adopt.script.source, len(adopt.keys), *adopt.keys, *adopt.arguments)[0] == -1
    assert SessionStore(key)["n"] == "native"


def test_session_taken_over_meanwhile_is_no_logout(old: Old, store: redis.Redis) -> None:
    key = old.create({"n": 1})
    place, session = SessionKeys.of("session", key), SessionStore(key)
    late = on_demand.take_over(
        HiddenKey(key), place, session.state.write_options(), session.serializer()
    )
    assert next(late) == records.adopted(place)
    # Between the load that found nothing and this question.
    assert SessionStore(key)["n"] == 1
    score = store.zscore(place.index.replace("index", "moved"), place.id)
    with pytest.raises(StopIteration) as stopped:
        late.send([score, 1])
    assert stopped.value.value is True


def test_takeover_is_remembered_for_longer_than_the_session(old: Old, store: redis.Redis) -> None:
    key = old.create({"n": 1})
    long = old.create({"n": 1}, expiry=dt.datetime.now(dt.UTC) + dt.timedelta(days=100))
    for each, days in ((key, 14 + 30), (long, 100 + 30)):
        assert SessionStore(each)["n"] == 1
        place = SessionKeys.of("session", each)
        moved = place.index.replace("index", "moved")
        left_s = store.zscore(moved, place.id) / 1000 - time.time()
        assert days * 86400 - 60 < left_s <= days * 86400
        assert abs(store.pttl(moved) / 1000 - left_s) < 60


# Bogus cookies, and what cannot be read.


@every_engine
def test_bogus_cookie_creates_nothing(old: Old, store: redis.Redis) -> None:
    for key in ("b" * 32, "no\0good." * 4, "ümläut" * 6, "x y;z" * 8, "b" * 4000):
        session = SessionStore(key)
        assert session.load() == {}
        assert session.session_key is None
        assert not SessionStore().exists(key)
        SessionStore(key).flush()
        SessionStore().delete(key)
        assert sessions(store) == set(), key
    assert taken() == 0
    if "file" in old.path:
        assert os.listdir(old.session().storage_path) == []


def test_a_bogus_cookie_costs_one_question(old: Old, django_assert_num_queries: Any) -> None:
    with django_assert_num_queries(1):
        session = SessionStore("b" * 32)
        assert session.get("a") is None
        assert session.get("b") is None


def test_what_is_no_pickle_is_counted_and_left(
    old: Old, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = kept_in("old")
    key = "k" * 32
    client = caches["old"].client.get_client()
    client.set(caches["old"].make_key(f"django.contrib.sessions.cache{key}"), b"\x80no pickle")
    assert SessionStore(key).load() == {}
    assert counters.counts["takeovers_failed"] == 1
    assert "is not taken over: ValueError" in caplog.text
    assert key not in caplog.text


def test_what_the_serializer_refuses_stays_behind(
    old: Old, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = kept_in("old")
    key = Old(ENGINES + "cache").create({"_auth_user_id": "7", "when": dt.date(2026, 1, 1), "n": 1})
    assert SessionStore(key).load() == {"_auth_user_id": "7", "n": 1}
    assert counters.counts["takeover_values_lost"] == 1
    assert "'when' (date)" in caplog.text
    assert key not in caplog.text


def test_a_session_larger_than_allowed_is_taken_and_cannot_grow(old: Old, settings: Any) -> None:
    key = old.create({"much": "x" * 1000 + os.urandom(500).hex()})
    settings.CLUSTERED_SESSIONS_MAX_BYTES = 100
    assert len(SessionStore(key)["much"]) == 2000


# Pickles.


class Bomb:
    def __reduce__(self) -> Any:
        return (os._exit, (77,))


@pytest.mark.parametrize(
    ("backend", "options", "is_pickled"),
    [
        ("django.core.cache.backends.locmem.LocMemCache", {}, True),
        ("django.core.cache.backends.db.DatabaseCache", {}, True),
        ("django.core.cache.backends.redis.RedisCache", {}, True),
        ("django_redis.cache.RedisCache", {}, True),
        (
            "django_redis.cache.RedisCache",
            {"SERIALIZER": "django_redis.serializers.pickle.PickleSerializer"},
            True,
        ),
        ("django_redis.cache.RedisCache", {"SERIALIZER": "site.Own"}, True),
        (
            "django_redis.cache.RedisCache",
            {"SERIALIZER": "django_redis.serializers.json.JSONSerializer"},
            False,
        ),
    ],
)
def test_pickles_are_refused_unless_asked_for_by_name(
    old: Old, settings: Any, backend: str, options: dict[str, Any], is_pickled: bool
) -> None:
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = kept_in("old")
    location = settings.CACHES["old"]["LOCATION"] if "redis" in backend else "table"
    settings.CACHES = settings.CACHES | {
        "old": {"BACKEND": backend, "LOCATION": location, "OPTIONS": options}
    }
    assert engine()
    settings.CLUSTERED_SESSIONS_MIGRATE_PICKLE = False
    if is_pickled:
        with pytest.raises(Pickled, match="runs code"):
            engine()
    else:
        assert engine()


def test_a_pickle_that_nobody_has_asked_for_is_not_read(old: Old, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_MIGRATE_PICKLE = False
    key = "k" * 32
    for kind in ("cache", "cached_db"):
        name = caches["old"].make_key(f"django.contrib.sessions.{kind}{key}")
        caches["old"].client.get_client().set(name, pickle.dumps(Bomb()))
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = kept_in("old")
    with pytest.raises(ImproperlyConfigured, match="pickles"):
        SessionStore(key).load()
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = kept_in("old", ENGINES + "cached_db")
    assert SessionStore(key).load() == {}


# Requests.


def show(request: HttpRequest) -> HttpResponse:
    return HttpResponse(json.dumps(request.session.get("n")))


def touch_nothing(request: HttpRequest) -> HttpResponse:
    return HttpResponse("")


def add(request: HttpRequest) -> HttpResponse:
    request.session["n"] += 1
    return HttpResponse(f"{request.session.is_locked}")


async def ashow(request: HttpRequest) -> HttpResponse:
    return HttpResponse(json.dumps(await request.session.aget("n")))


@pytest.fixture
def client(settings: Any, client: Client) -> Client:
    settings.ROOT_URLCONF = (
        route("", show),
        route("async/", ashow),
        route("nothing/", touch_nothing),
        route("add/", add),
    )
    settings.MIDDLEWARE = [settings.MIDDLEWARE[0]]
    return client


def come(client: Client, key: str) -> None:
    client.cookies["sessionid"] = key


@every_engine
def test_a_visitor_stays(old: Old, client: Client) -> None:
    come(client, key := old.create({"n": 1}))
    response = client.get("/")
    assert response.content == b"1"
    assert client.cookies["sessionid"].value == key


def test_a_visitor_stays_whose_session_the_view_does_not_touch(
    old: Old, client: Client, settings: Any
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = True
    come(client, key := old.create({"n": 1}))
    old.let_live(key, 1000)
    response = client.get("/nothing/")
    assert response.cookies["sessionid"].value == key
    assert response.cookies["sessionid"]["max-age"] == AGE_S
    assert SessionStore(key)["n"] == 1
    assert taken() == 1


def test_a_visitor_s_lock_is_taken_with_the_session(
    old: Old, client: Client, settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_LOCKING = "all"
    come(client, key := old.create({"n": 1}))
    assert client.post("/add/").content == b"True"
    other = old.create({"n": 1})
    with SessionStore(other).lock() as session:
        assert session.is_locked
        session["n"] += 1
    settings.CLUSTERED_SESSIONS_LOCKING = "off"
    assert [SessionStore(each)["n"] for each in (key, other)] == [2, 2]
    assert taken() == 2


def test_save_without_a_load_wins(old: Old) -> None:
    key = old.create({"n": 1, "m": 2})
    session = SessionStore(key)
    session.clear()
    session["n"] = 5
    session.save()
    assert SessionStore(key).load() == {"n": 5}


@pytest.mark.parametrize("path", ["/", "/async/"])
def test_an_old_engine_that_is_away_is_not_a_logout(
    old: Old, client: Client, settings: Any, path: str
) -> None:
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = kept_in("old")
    key = Old(ENGINES + "cache").create({"n": 1})
    known = SessionStore()
    known["n"] = 7
    known.save()
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = kept_in("away")
    settings.CACHES = settings.CACHES | {
        "away": settings.CACHES["old"] | {"LOCATION": "redis://127.0.0.1:1/2"}
    }
    come(client, key)
    response = client.get(path)
    assert response.status_code == 503
    assert "sessionid" not in response.cookies
    assert counters.counts["takeovers_failed"] == 1
    # Who is here already does not notice.
    come(client, known.session_key or "")
    assert client.get(path).content == b"7"
    with pytest.raises(SessionStoreUnavailable, match=f"{ENGINES}cache") as raised:
        SessionStore(key).load()
    assert key not in str(raised.value)
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = kept_in("old")
    come(client, key)
    assert client.get(path).content == b"1"


def test_a_logout_stands_while_the_old_engine_is_away(
    old: Old, settings: Any, store: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = kept_in("old")
    key = Old(ENGINES + "cache").create({"n": 1})
    session = SessionStore(key)
    assert session["n"] == 1
    settings.CACHES = settings.CACHES | {
        "away": settings.CACHES["old"] | {"LOCATION": "redis://127.0.0.1:1/2"}
    }
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = kept_in("away")
    session.flush()
    assert "is still in the session engine" in caplog.text
    assert key not in caplog.text
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = kept_in("old")
    let_the_tombstone_go(store, key)
    assert SessionStore(key).load() == {}


# In processes of their own.


def in_process(
    work: str, settings: Any, **arguments: Any
) -> AbstractContextManager[subprocess.Popen[str]]:
    """Do ``work`` in a process of its own, see `main`."""
    given = {
        "work": work,
        "database": settings.DATABASES["default"] | {"NAME": arguments.pop("database")},
        "caches": settings.CACHES,
        **arguments,
    }
    return python("-m", "tests.store.test_moving", json.dumps(given, default=str))


@pytest.fixture
def on_disk(old: Old, settings: Any, tmp_path: Path) -> Iterator[str]:
    """Have the old engine's table in a file, for other processes."""
    target = tmp_path / "old.sqlite3"
    with connection.schema_editor() as editor:
        sql, _ = editor.table_sql(db.SessionStore.get_model_class())
    with sqlite3.connect(target) as made:
        made.execute(sql)
    made.close()
    yield str(target)


def fill(database: str, number: int) -> list[str]:
    rows = []
    session = db.SessionStore()
    for n in range(number):
        key = session._get_new_session_key()
        until = timezone.now() + dt.timedelta(days=7)
        rows.append((key, session.encode({"n": n}), f"{until:%Y-%m-%d %H:%M:%S.%f}"))
    with sqlite3.connect(database) as filled:
        filled.executemany(
            "INSERT INTO django_session (session_key, session_data, expire_date) VALUES (?, ?, ?)",
            rows,
        )
    filled.close()
    return [row[0] for row in rows]


@pytest.mark.full
def test_two_processes_take_each_over_once(on_disk: str, settings: Any, store: redis.Redis) -> None:
    keys = fill(on_disk, 60)
    with (
        in_process("load", settings, database=on_disk, keys=keys) as one,
        in_process("load", settings, database=on_disk, keys=keys) as other,
    ):
        found = [json.loads(printed) for printed in finish(one, other)]
    assert [each["n"] for each in found] == [list(range(60))] * 2
    assert sum(each["takeovers"] for each in found) == 60


@pytest.mark.full
def test_an_import_that_was_killed_is_run_again(
    on_disk: str, settings: Any, store: redis.Redis
) -> None:
    number = 600
    fill(on_disk, number)

    def here() -> int:
        return sum(store.zcard(key) for key in store.scan_iter("session:*:index"))

    with in_process("import", settings, database=on_disk, stops_at=number // 2) as first:
        assert line(first) == "half of them\n"
        first.kill()
        first.communicate(timeout=LIFE_S)
    assert first.returncode == -signal.SIGKILL
    some = here()
    assert 0 < some <= number // 2
    with in_process("import", settings, database=on_disk) as again:
        (printed,) = finish(again)
    counts = summary(printed)
    assert counts == {"taken over": number - some, "here already": some}
    assert here() == number


# The command.


def run(*arguments: str) -> tuple[dict[str, int], int]:
    """Run the command; return its summary and its exit code."""
    stdout, code = io.StringIO(), 0
    try:
        call_command("sessionimport", *arguments, stdout=stdout)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    return summary(stdout.getvalue()), code


def summary(output: str) -> dict[str, int]:
    lines = (line.split(maxsplit=1) for line in output.splitlines())
    return {text: int(count.replace(",", "")) for count, text in lines}


@every_engine
def test_the_command_moves_all(old: Old, store: redis.Redis) -> None:
    keys = [old.create({"n": n}) for n in range(110)]
    dead, ended = old.create({"n": 1}), old.create({"n": 1})
    old.let_live(dead, 1)
    wait_for(lambda: not old.read(dead), "it is over")
    assert SessionStore(ended)["n"] == 1
    assert registry.end_session(session_id(ended))
    let_the_tombstone_go(store, ended)
    assert SessionStore(keys[7])["n"] == 7
    before = sessions(store)
    counted, code = run("--dry-run")
    assert counted["would be taken over"] == 109 and code == 0
    assert sessions(store) == before
    counted, code = run()
    assert code == 0
    assert counted.pop("expired or empty", 1) >= 1
    assert counted == {"taken over": 109, "here already": 1, "ended here since": 1}
    for n, key in enumerate(keys):
        assert SessionStore(key)["n"] == n
    counted, code = run()
    assert code == 0
    assert counted.pop("expired or empty", 1) >= 1
    assert counted == {"taken over": 0, "here already": 110, "ended here since": 1}


def test_the_command_says_what_it_cannot_move(old: Old, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = kept_in("old")
    cache = Old(ENGINES + "cache")
    for _ in range(3):
        cache.create({"when": dt.date(2026, 1, 1), "n": 1})
    name = caches["old"].make_key(f"django.contrib.sessions.cache{'k' * 32}")
    caches["old"].client.get_client().set(name, b"\x80no pickle")
    # Of cached_db, whose names begin with the same words.
    caches["old"].set(f"django.contrib.sessions.cached_db{'k' * 32}", {"n": 1})
    counted, code = run("--dry-run")
    lost = "without 'when' (date), which SESSION_SERIALIZER cannot write"
    assert counted == {
        "would be taken over": 3,
        "unreadable, left alone: see the log": 1,
        f"would be {lost}": 3,
    }
    assert code == 3
    counted, code = run()
    assert counted == {"taken over": 3, "unreadable, left alone: see the log": 1, lost: 3}
    assert code == 3


def test_the_command_refuses_what_makes_no_sense(old: Old, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = kept_in("plain")
    with pytest.raises(
        CommandError, match="does not tell which sessions it has in the cache 'plain'"
    ):
        run()
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = ENGINES + "signed_cookies"
    with pytest.raises(CommandError, match="does not tell which sessions it has: each is taken"):
        run()
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = None
    with pytest.raises(CommandError, match="MIGRATE_FROM is not set: name the engine"):
        run()
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = ENGINES + "db"
    settings.SESSION_ENGINE = ENGINES + "db"
    with pytest.raises(CommandError, match="Switch first"):
        run()


def test_command_stops_where_either_store_is_away(old: Old, settings: Any) -> None:
    old.create({"n": 1})
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = kept_in("away")
    away = settings.CACHES["old"] | {"LOCATION": "redis://127.0.0.1:1/2"}
    settings.CACHES = settings.CACHES | {"away": away}
    with pytest.raises(CommandError, match="cannot be asked"):
        run()
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = ENGINES + "db"
    use_store(settings, "redis://127.0.0.1:1/1")
    with pytest.raises(CommandError, match="does not answer"):
        run()


@every_engine
def test_way_back_brings_the_old_engine_up_to_date(old: Old) -> None:
    changed, ended, left, gone = (old.create({"n": n}) for n in range(4))
    session = SessionStore(changed)
    session["n"] = "changed"
    session.set_expiry(600)
    session.save()
    for key in (ended, gone):
        assert SessionStore(key)["n"]
    registry.end_session(session_id(ended))
    new = SessionStore()
    new["n"] = "new"
    new.save()
    counted, code = run("--back", "--dry-run")
    told = {"would be brought up to date there": 2, "ended here, would be deleted there": 1}
    assert (counted, code) == (told | {"never taken over, left alone": 1}, 0)
    assert old.read(changed) == {"n": 0}
    counted, code = run("--back")
    told = {"brought up to date there": 2, "ended here, deleted there": 1}
    assert (counted, code) == (told | {"never taken over, left alone": 1}, 0)
    found = old.read(changed)
    assert found == {"n": "changed", "_session_expiry": 600}
    assert [old.read(key) for key in (ended, left, gone)] == [{}, {"n": 2}, {"n": 3}]
    assert old.read(new.session_key or "") == {}


# In the process.


def until_killed(keys: Iterator[str], number: int) -> Iterator[str]:
    """Yield so many keys, and say so; no more come."""
    yield from islice(keys, number)
    print("half of them", flush=True)
    signal.pause()


def main() -> None:
    given = json.loads(sys.argv[1])
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
    from django.conf import settings

    settings.DATABASES = {"default": given["database"]}
    settings.CACHES = given["caches"]
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = ENGINES + "db"
    django.setup()
    if given["work"] == "import":
        if number := given.get("stops_at"):
            found = old_engines.keys
            old_engines.keys = lambda: until_killed(found(), number)
        call_command("sessionimport")
        return
    # What is counted is not to leave for the store.
    counters.left_at = float("inf")
    found = [SessionStore(key)["n"] for key in given["keys"]]
    print(json.dumps({"n": found, "takeovers": taken()}))


if __name__ == "__main__":
    main()
