"""Sessions that are encrypted in the store."""

from __future__ import annotations

import asyncio
import io
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from traceback import TracebackException
from typing import Any

import pytest
import redis
from django.contrib.auth import HASH_SESSION_KEY, SESSION_KEY
from django.contrib.auth.models import User
from django.contrib.sessions.backends.file import SessionStore as FileSession
from django.core.exceptions import ImproperlyConfigured
from django.core.management import CommandError, call_command
from django.core.signing import JSONSerializer
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory
from hypothesis import given
from hypothesis import strategies as st

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.decorators import session_fresh
from django_clustered_sessions.encryption import Keys
from django_clustered_sessions.events import Event
from django_clustered_sessions.management.commands.sessionevents import Worker
from django_clustered_sessions.middleware import ClusteredSessionMiddleware
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol.record import FIRST, LAST, PAST, Meta, session_id
from django_clustered_sessions.protocol.sealing import Seal, Unopened
from django_clustered_sessions.session.near_cache import near_cache
from django_clustered_sessions.signals import session_ended
from django_clustered_sessions.store import runner
from tests.gateways import place
from tests.serializers import PickleSerializer

FIRST_KEY, SECOND_KEY, THIRD_KEY = "01" * 32, "02" * 32, "03" * 32
SECRET = "a word that no thief may read"


@pytest.fixture(autouse=True)
def encrypted(store: redis.Redis, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_ENCRYPTION_KEYS = [FIRST_KEY]


@pytest.fixture
def be(settings: Any) -> Callable[..., None]:
    """Give ``be(key, ...)``, which makes this process one that has these keys."""

    def with_keys(*keys: str) -> None:
        settings.CLUSTERED_SESSIONS_ENCRYPTION_KEYS = list(keys)
        near_cache.clear()

    return with_keys


def created(**values: Any) -> str:
    session = SessionStore()
    session.update({"word": SECRET, **values})
    session.create()
    return session.session_key or ""


def seen(key: str | None) -> dict[str, Any]:
    near_cache.clear()
    return dict(SessionStore(key).items())


def fields(store: redis.Redis, key: str | None) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = store.hgetall(place(key).record)
    return found


def key_ids(store: redis.Redis, key: str) -> set[bytes]:
    return {
        value[9:13]
        for field, value in fields(store, key).items()
        if field[:2] == b"d:" and value[8:9] == b"e"
    }


@pytest.mark.parametrize("serializer", [JSONSerializer, PickleSerializer])
def test_store_has_no_value_in_plain(store: redis.Redis, settings: Any, serializer: type) -> None:
    settings.SESSION_SERIALIZER = f"{serializer.__module__}.{serializer.__qualname__}"
    values = {"long": [SECRET] * 500, "hash": "ab" * 32, "when": None, "deep": {SECRET: [1, 2.5]}}
    key = created(**values)
    session = SessionStore(key)
    session["word2"] = SECRET
    session.save()
    assert seen(key) == {**values, "word": SECRET, "word2": SECRET}
    stored = fields(store, key)
    assert {value[8:9] for field, value in stored.items() if field[:2] == b"d:"} == {b"e"}
    plain = serializer().dumps(SECRET)
    assert not any(word in whole for whole in stored.values() for word in (plain, SECRET.encode()))


def test_fresh_view_after_a_copy_reads_and_writes_encrypted(
    store: redis.Redis, settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_NEAR_READS = "tracked"
    settings.CLUSTERED_SESSIONS_NEAR_MAX_AGE = 60.0
    key = created(n=1)
    # The second one is served from a copy.
    SessionStore(key).load()
    request = RequestFactory().get("/")
    request.COOKIES = {"sessionid": key}

    def page(request: HttpRequest) -> HttpResponse:
        request.session["word2"] = SECRET
        return HttpResponse(str(request.session.get("n")))

    def hidden(request: HttpRequest) -> HttpResponse:
        before = counters.counts["near_reads"]
        assert request.session["word"] == SECRET
        assert counters.counts["near_reads"] == before + 1
        return session_fresh(page)(request)

    assert ClusteredSessionMiddleware(hidden)(request).content == b"1"
    assert not any(SECRET.encode() in value for value in fields(store, key).values())
    assert seen(key) == {"word": SECRET, "n": 1, "word2": SECRET}


def test_async_twins_read_and_write_the_same(store: redis.Redis) -> None:
    key = created()

    async def use() -> Any:
        session = SessionStore(key)
        await session.aset("more", [SECRET])
        await session.asave()
        return await SessionStore(key).aget("more")

    assert asyncio.run(use()) == [SECRET]
    assert seen(key)["more"] == [SECRET]


def test_what_is_only_read_is_not_written(store: redis.Redis) -> None:
    key = created(cart={"x": 1})
    before = fields(store, key)
    session = SessionStore(key)
    assert session["cart"] == {"x": 1}
    assert not session.modified
    session.save()
    assert {f: v for f, v in fields(store, key).items() if f[:2] == b"d:"} == {
        f: v for f, v in before.items() if f[:2] == b"d:"
    }
    session["cart"]["x"] = 2
    session.save()
    after = fields(store, key)
    assert after[b"d:word"] == before[b"d:word"]
    assert after[b"d:cart"] != before[b"d:cart"]


def test_counters_stay_plain_and_lose_no_count(store: redis.Redis) -> None:
    key = created(was_set=3)
    sessions = [SessionStore(key) for _ in range(3)]
    for session in sessions:
        session.increment("hits")
        session.increment("was_set")
    for session in sessions:
        session.save()
    assert seen(key) == {"word": SECRET, "hits": 3, "was_set": 6}
    assert fields(store, key)[b"d:hits"][8:] == b"i3"


def test_encrypted_changes_of_others_are_merged(store: redis.Redis) -> None:
    key = created(cart=["tea"], _messages='["one"]')
    one, two = SessionStore(key), SessionStore(key)
    one["cart"].append("ham")
    one["_messages"] = '["one","two"]'
    two["cart"].append("jam")
    two["_messages"] = '["one","three"]'
    two["other"] = 1
    one.save()
    two.save()
    assert seen(key)["cart"] == ["tea", "ham", "jam"]
    assert json.loads(seen(key)["_messages"]) == ["one", "two", "three"]


def test_near_cache_holds_what_the_store_holds(store: redis.Redis) -> None:
    key = created()
    session = SessionStore(key)
    session["word"] = SECRET + "!"
    session.save()
    known = near_cache.get(place(key).record)
    assert known is not None
    assert known.values[b"d:word"] == fields(store, key)[b"d:word"]
    assert SessionStore(key)["word"] == SECRET + "!"


# Moves.


def test_values_are_read_after_many_moves(store: redis.Redis) -> None:
    """Also those that were written before the first one, and between two of them."""
    key = created()
    for number in range(20):
        session = SessionStore(key)
        session.cycle_key()
        session[f"n{number}"] = number
        session.save()
        key = session.session_key or ""
    assert seen(key) == {"word": SECRET, **{f"n{number}": number for number in range(20)}}
    session = SessionStore(key)
    session.clear()
    session["new"] = 1
    session.save()
    for _ in range(9):
        session = SessionStore(key)
        session.cycle_key()
        session.save()
        key = session.session_key or ""
    assert seen(key) == {"new": 1}
    # The names that nothing needs any more are gone.
    assert len(fields(store, key)[PAST]) < 200


def test_key_moves_without_a_load_of_the_view(store: redis.Redis) -> None:
    key = created()
    near_cache.clear()
    session = SessionStore(key)
    session.cycle_key()
    session.save()
    assert seen(session.session_key) == {"word": SECRET}


def test_late_request_writes_into_the_successor(store: redis.Redis) -> None:
    key = created(**{SESSION_KEY: "1", "cart": ["tea"]})
    late = SessionStore(key)
    assert late["cart"] == ["tea"]
    mover = SessionStore(key)
    mover.cycle_key()
    mover["cart"].append("ham")
    mover["theirs"] = SECRET
    mover.save()
    late["cart"].append("jam")
    late["mine"] = SECRET
    late.save()
    assert seen(mover.session_key) == {
        "word": SECRET,
        "theirs": SECRET,
        "mine": SECRET,
        SESSION_KEY: "1",
        "cart": ["tea", "ham", "jam"],
    }


def test_new_session_takes_the_values_of_the_old_along(store: redis.Redis) -> None:
    session = SessionStore(created())
    session.get("word")
    old = session.session_key
    session.create()
    assert session.session_key != old
    assert seen(session.session_key) == seen(old) == {"word": SECRET}


@pytest.mark.parametrize("user", ["1", "2"])
def test_new_session_takes_unreadable_values_of_its_user_only(
    store: redis.Redis, settings: Any, user: str
) -> None:
    key = created(**{SESSION_KEY: "1"})
    settings.SESSION_SERIALIZER = "tests.serializers.PickleSerializer"
    near_cache.clear()
    session = SessionStore(key)
    session["odd"] = {1, 2}
    session.save()
    settings.SESSION_SERIALIZER = "django.core.signing.JSONSerializer"
    near_cache.clear()
    session = SessionStore(key)
    assert "odd" not in session
    session[SESSION_KEY] = user
    session.create()
    assert (b"d:odd" in fields(store, session.session_key)) is (user == "1")


def test_copies_of_session_objects_take_no_key_along(store: redis.Redis) -> None:
    key = created()
    session = SessionStore(key)
    session.cycle_key()
    session["cart"] = [1]
    session.save()
    session = SessionStore(session.session_key)
    assert session["word"] == SECRET
    pickled = pickle.dumps(session)
    assert bytes.fromhex(FIRST_KEY) not in pickled
    assert FIRST_KEY.encode() not in pickled
    for number, copied in enumerate((pickle.loads(pickled), deepcopy(session))):
        assert copied["cart"] == [1]
        copied["cart"].append(f"copy {number}")
        copied.save()
    assert seen(session.session_key)["cart"] == [1, "copy 0", "copy 1"]


# Keys.


def test_first_key_writes_and_all_read(store: redis.Redis, be: Callable[..., None]) -> None:
    key = created()
    be(SECOND_KEY, FIRST_KEY)
    session = SessionStore(key)
    assert session["word"] == SECRET
    session["more"] = 1
    session.save()
    assert len(key_ids(store, key)) == 2
    be(FIRST_KEY, SECOND_KEY)
    assert seen(key) == {"word": SECRET, "more": 1}


@pytest.mark.parametrize("keys", [[SECOND_KEY], [], ["plain"], ["plain", SECOND_KEY]])
def test_values_without_their_key_are_set_aside(
    store: redis.Redis, be: Callable[..., None], keys: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    key = created()
    before = counters.counts["values_set_aside"]
    be(*keys)
    session = SessionStore(key)
    assert dict(session.items()) == {}
    session["new"] = 1
    session.save()
    assert counters.counts["values_set_aside"] == before + 1
    assert session_id(key)[:12] in caplog.text
    assert SECRET not in caplog.text
    be(FIRST_KEY, SECOND_KEY)
    assert seen(key) == {"word": SECRET, "new": 1}


def test_unreadable_values_survive_moves_by_nodes_without_their_key(
    store: redis.Redis, be: Callable[..., None]
) -> None:
    """Moves take turns: by one that has both keys, by one that lacks the first."""
    key = created()
    for number in range(6):
        be(*([SECOND_KEY] if number % 2 == 0 else [FIRST_KEY, SECOND_KEY]))
        session = SessionStore(key)
        session.cycle_key()
        session[f"n{number}"] = number
        session.save()
        key = session.session_key or ""
    be(SECOND_KEY, FIRST_KEY)
    assert seen(key) == {"word": SECRET, **{f"n{number}": number for number in range(6)}}


def test_encryption_is_turned_on_and_off_without_a_loss(
    store: redis.Redis, be: Callable[..., None]
) -> None:
    be()
    key = created()
    assert fields(store, key)[b"d:word"][8:9] == b"s"
    be("plain", FIRST_KEY)
    assert seen(key) == {"word": SECRET}
    for keys, codec in (([FIRST_KEY], b"e"), (["plain", FIRST_KEY], b"s")):
        be(*keys)
        session = SessionStore(key)
        session["word"] = SECRET + str(codec)
        session.save()
        assert fields(store, key)[b"d:word"][8:9] == codec
        assert seen(key) == {"word": SECRET + str(codec)}


# Moved or cut by hand.


def others_and_mine(store: redis.Redis) -> tuple[str, str]:
    others, mine = created(**{SESSION_KEY: "1", HASH_SESSION_KEY: "x"}), created()
    near_cache.clear()
    return others, mine


@pytest.mark.parametrize("way", ["field", "record", "renamed", "with past"])
def test_value_is_worth_nothing_in_another_session(store: redis.Redis, way: str) -> None:
    others, mine = others_and_mine(store)
    if way == "with past":
        session = SessionStore(others)
        session.cycle_key()
        session.save()
        others = session.session_key or ""
    stored, target = fields(store, others), place(mine).record
    if way == "renamed":
        store.rename(place(others).record, target)
    elif way == "field":
        store.hset(target, mapping={f: v for f, v in stored.items() if f[:2] == b"d:"})
    else:
        store.delete(target)
        store.hset(target, mapping=stored)
    assert seen(mine) == {}


def test_value_is_worth_nothing_in_another_field(store: redis.Redis) -> None:
    key = created(other=1)
    stored = fields(store, key)
    store.hset(place(key).record, b"d:other", stored[b"d:word"])
    assert seen(key) == {"word": SECRET}


def test_session_from_before_a_login_gets_none_of_it(store: redis.Redis) -> None:
    """A visitor's key may be known to somebody else, who can write to the store."""
    before = created()
    visitors = fields(store, before)
    session = SessionStore(before)
    session.cycle_key()
    session[SESSION_KEY] = "1"
    session.save()
    stored = fields(store, session.session_key)
    store.delete(place(before).record)
    store.hset(place(before).record, mapping=stored | {b"m:": visitors[b"m:"]})
    assert seen(before) == {"word": SECRET}


@pytest.mark.parametrize("field", [b"d:word", PAST])
def test_cut_values_are_set_aside(store: redis.Redis, field: bytes) -> None:
    session = SessionStore(created(n=1))
    session.cycle_key()
    session.save()
    record, whole = place(session.session_key).record, fields(store, session.session_key)[field]
    for length in range(len(whole)):
        store.hset(record, field, whole[:length])
        assert "word" not in seen(session.session_key)
    for at in range(9 if field != PAST else 0, len(whole)):
        store.hset(record, field, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert "word" not in seen(session.session_key)
    store.hset(record, field, whole)
    assert seen(session.session_key) == {"word": SECRET, "n": 1}


@given(st.binary(max_size=400), st.binary(max_size=80))
def test_no_bytes_raise_but_unopened(past: bytes, stored: bytes) -> None:
    seal = Seal(Keys([FIRST_KEY]), session_id("key"), past)
    try:
        assert seal.open(b"d:a", b"version8" + stored) == b"version8" + stored
    except Unopened:
        assert stored[:1] == b"e"
    seal.open_client(stored)
    seal.moved(session_id("other"), {b"d:a": b"version8" + stored})


def test_other_users_get_nothing_that_cannot_be_read(
    store: redis.Redis, be: Callable[..., None]
) -> None:
    key = created(**{SESSION_KEY: "1"})
    be(SECOND_KEY)
    session = SessionStore(key)
    session[SESSION_KEY] = "2"
    session.save()
    be(SECOND_KEY, FIRST_KEY)
    assert seen(key) == {SESSION_KEY: "2"}


# Users and clients.


@pytest.fixture
def tracking(settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_TRACK_CLIENTS = True


def visit(view: Callable[[Any], Any], key: str | None = None) -> str | None:
    request = RequestFactory(REMOTE_ADDR="192.0.2.7", HTTP_USER_AGENT="Fox/1").get("/")
    if key:
        request.COOKIES["sessionid"] = key

    def get_response(request: Any) -> Any:
        view(request.session)
        return HttpResponse()

    response = ClusteredSessionMiddleware(get_response)(request)
    assert response.status_code == 200
    cookie = response.cookies.get("sessionid")
    return cookie.value if cookie else key


def test_clients_are_encrypted_and_read(store: redis.Redis, tracking: None) -> None:
    ann = User(pk=1)
    key = visit(lambda session: session.update({SESSION_KEY: "1"}))
    for _ in range(10):
        key = visit(lambda session: (session.get("x"), session.cycle_key()), key)
    (info,) = registry.sessions_of(ann)
    assert info.user_id == "1"
    for client in (info.first, info.last):
        assert client is not None
        assert (client.address, client.user_agent) == ("192.0.2.7", "Fox/1")
    stored = fields(store, key)
    assert stored[FIRST][:1] == stored[LAST][:1] == b"e"
    assert not any(b"192.0.2.7" in value for value in stored.values())


def test_clients_without_their_key_are_unknown(
    store: redis.Redis, tracking: None, be: Callable[..., None]
) -> None:
    visit(lambda session: session.update({SESSION_KEY: "1"}))
    be(SECOND_KEY)
    (info,) = registry.sessions_of(User(pk=1))
    assert (info.user_id, info.first, info.last) == (None, None, None)


@pytest.fixture
def ended() -> Iterator[list[Any]]:
    told: list[Any] = []

    def note(**about: Any) -> None:
        told.append((about["user_id"], about["reason"]))

    session_ended.connect(note)
    yield told
    session_ended.disconnect(note)


@pytest.mark.django_db  # The worker closes connections to the database.
@pytest.mark.parametrize("has_moved", [False, True])
def test_signals_and_events_tell_the_user(
    store: redis.Redis, ended: list[Any], settings: Any, has_moved: bool
) -> None:
    settings.CLUSTERED_SESSIONS_EVENTS_KEPT = 1000
    key = created(**{SESSION_KEY: "1"})
    if has_moved:
        session = SessionStore(key)
        session.cycle_key()
        session.save()
        key = session.session_key or ""
        assert ended.pop() == ("1", "replaced")
    assert registry.end_session(session_id(key))
    key = created(**{SESSION_KEY: "2"})
    session = SessionStore(key)
    session.flush()
    assert ended == [("1", "ended"), ("2", "logout")]
    found: list[Event] = []
    Worker(found.append, 60).run(once=True)
    assert sorted(event.kind for event in found) == ["created"] * 2 + ["ended"] * (2 + has_moved)
    assert {event.user_id for event in found} == {"1", "2"}


@pytest.mark.django_db  # The worker closes connections to the database.
def test_expired_session_is_told_with_its_user(store: redis.Redis, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_EVENTS_KEPT = 1000
    session = SessionStore(created(**{SESSION_KEY: "1"}))
    session.cycle_key()
    session["more"] = 1
    session.set_expiry(-1)
    session.save()
    found: list[Event] = []
    Worker(found.append, 60).run(once=True)
    assert [event.user_id for event in found if event.kind == "expired"] == ["1"]


def test_sessions_of_the_old_engine_come_in_encrypted(
    store: redis.Redis, settings: Any, tmp_path: Path
) -> None:
    settings.SESSION_FILE_PATH = str(tmp_path)
    old = FileSession()
    old["word"] = SECRET
    old.create()
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = "django.contrib.sessions.backends.file"
    assert SessionStore(old.session_key)["word"] == SECRET
    assert fields(store, old.session_key)[b"d:word"][8:9] == b"e"
    assert seen(old.session_key) == {"word": SECRET}
    session = SessionStore(old.session_key)
    session["more"] = 1
    session.save()
    call_command("sessionimport", "--back", stdout=io.StringIO())
    assert FileSession(old.session_key).load() == {"word": SECRET, "more": 1}


# sessionrekey.


def rekey(*arguments: str, code: int = 0) -> dict[str, Any]:
    out = io.StringIO()
    try:
        call_command("sessionrekey", "--format", "json", *arguments, stdout=out, stderr=out)
        assert code == 0
    except SystemExit as exit_:
        assert exit_.code == code
    answer: dict[str, Any] = json.loads(out.getvalue())
    return answer


def test_rekey_leaves_nothing_of_the_old_key(
    store: redis.Redis, be: Callable[..., None], tracking: None
) -> None:
    """Also values that were plain, that were moved, and the clients."""
    be()
    keys = [created(cart=[1]), visit(lambda session: session.update({SESSION_KEY: "1"})) or ""]
    be(FIRST_KEY)
    keys.append(visit(lambda session: session.update({SESSION_KEY: "2"})) or "")
    session = SessionStore(created(n=1))
    session.cycle_key()
    session.increment("hits")
    session.save()
    keys.append(session.session_key or "")
    before = [seen(key) for key in keys]
    lives = [(store.pttl(place(key).record), fields(store, key)[b"m:"]) for key in keys]
    be(SECOND_KEY, FIRST_KEY)
    would_be = rekey("--dry-run")
    assert any(key_ids(store, key) for key in keys)
    found = rekey()
    assert found["fields"] == would_be["fields"] > 0
    assert (found["sessions"], found["renewed"], found["unopened"]) == (4, 4, 0)
    assert rekey()["renewed"] == 0
    be(SECOND_KEY)
    assert [seen(key) for key in keys] == before
    assert all(
        info.first and info.last for user in ("1", "2") for info in registry.sessions_of(user)
    )
    for key, (left_ms, meta) in zip(keys, lives, strict=True):
        stored = fields(store, key)
        assert left_ms - 60_000 < store.pttl(place(key).record) <= left_ms
        assert stored[b"m:"][2:10] == meta[2:10]
        sizes = sum(len(f) + len(v) for f, v in stored.items() if f[:2] == b"d:")
        assert Meta.parse(stored[b"m:"]).size == sizes


def test_rekey_writes_plain_where_that_is_asked_for(
    store: redis.Redis, be: Callable[..., None]
) -> None:
    session = SessionStore(created())
    session.cycle_key()
    session.save()
    be("plain", FIRST_KEY)
    assert rekey()["renewed"] == 1
    be()
    assert seen(session.session_key) == {"word": SECRET}
    assert PAST not in fields(store, session.session_key)


def test_rekey_leaves_alone_what_no_key_opens(store: redis.Redis, be: Callable[..., None]) -> None:
    be(THIRD_KEY)
    lost = created(n=1)
    be(FIRST_KEY)
    created()
    be(SECOND_KEY, FIRST_KEY)
    found = rekey(code=3)
    assert (found["renewed"], found["unopened"], found["finished"]) == (1, 2, True)
    be(THIRD_KEY)
    assert seen(lost) == {"word": SECRET, "n": 1}


def test_rekey_and_writers_lose_nothing(
    store: redis.Redis, be: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request writes, and another moves its session, between the command's read and its write."""
    keys = [created(n=0, cart=[]) for _ in range(3)]
    be(SECOND_KEY, FIRST_KEY)
    late = [SessionStore(key) for key in keys]
    for session in late:
        assert session["n"] == 0
    done: set[int] = set()
    run = runner.run

    def write(records: set[str]) -> None:
        for number, key in enumerate(keys):
            if number not in done and place(key).record in records:
                done.add(number)
                writer = SessionStore(key)
                writer["n"] += 1
                writer["cart"].append("tea")
                writer.save()
                if number == 0:
                    writer.cycle_key()
                    writer.save()
                    keys[0] = writer.session_key or ""

    def meanwhile(flow: Any, *rest: Any) -> Any:
        def stepped() -> Any:
            reply = None
            while True:
                try:
                    step = flow.send(reply)
                except StopIteration as stop:
                    return stop.value
                if step[0].script and step[0].script.name == "rekey":
                    write({call.keys[0] for call in step})
                reply = yield step

        return run(stepped(), *rest)

    monkeypatch.setattr(runner, "run", meanwhile)
    rekey()
    monkeypatch.undo()
    assert len(done) == 3
    for session in late[1:]:
        session["late"] = 1
        session.save()
    be(SECOND_KEY)
    whole = {"word": SECRET, "n": 1, "cart": ["tea"]}
    assert [seen(key) for key in keys] == [whole, whole | {"late": 1}, whole | {"late": 1}]


def test_request_goes_on_that_loaded_before_the_rekey(
    store: redis.Redis, be: Callable[..., None]
) -> None:
    key = created(cart=["tea"])
    be(SECOND_KEY, FIRST_KEY)
    session = SessionStore(key)
    session["cart"].append("ham")
    rekey()
    merged = counters.counts["conflicts_merged"]
    session.save()
    assert counters.counts["conflicts_merged"] == merged
    be(SECOND_KEY)
    assert seen(key)["cart"] == ["tea", "ham"]


def test_broken_off_rekey_is_gone_on_with(
    store: redis.Redis, be: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [created() for _ in range(20)]
    be(SECOND_KEY, FIRST_KEY)
    run, renewed = runner.run, 0

    def until_some_are_done(flow: Any) -> Any:
        nonlocal renewed
        found = run(flow)
        renewed += found.renewed
        if renewed >= 5:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(runner, "run", until_some_are_done)
    with pytest.raises(SystemExit) as exit_:
        call_command("sessionrekey", stdout=io.StringIO(), stderr=io.StringIO())
    assert exit_.value.code == 130
    monkeypatch.undo()
    assert rekey()["renewed"] == 20 - renewed
    be(SECOND_KEY)
    assert all(seen(key) == {"word": SECRET} for key in keys)


def test_rekey_without_keys_says_so(store: redis.Redis, be: Callable[..., None]) -> None:
    for keys in ([], ["plain"]):
        be(*keys)
        with pytest.raises(CommandError, match="has no key"):
            call_command("sessionrekey")


def test_no_error_shows_a_key(store: redis.Redis, be: Callable[..., None]) -> None:
    key = created()
    be(FIRST_KEY, SECOND_KEY[:-2])
    with pytest.raises(
        ImproperlyConfigured, match="entry 2 is 46 bytes when decoded, and not 32"
    ) as told:
        SessionStore(key).get("word")
    traceback = TracebackException.from_exception(told.value, capture_locals=True)
    assert FIRST_KEY not in "".join(traceback.format())
    assert str(bytes.fromhex(FIRST_KEY)) not in "".join(traceback.format())


def test_missing_package_shows_no_key(
    store: redis.Redis, be: Callable[..., None], monkeypatch: Any
) -> None:
    key = created()
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    be(FIRST_KEY)
    with pytest.raises(ImproperlyConfigured, match="needs cryptography: install") as told:
        SessionStore(key).get("word")
    traceback = TracebackException.from_exception(told.value, capture_locals=True)
    assert FIRST_KEY not in "".join(traceback.format())
