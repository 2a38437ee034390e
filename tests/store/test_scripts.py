"""The Lua files as a store has them: their digests, and the keys that they touch."""

from __future__ import annotations

from collections import Counter
from hashlib import sha1
from importlib.resources import files
from typing import Any

import pytest
import redis
from redis.crc import key_slot

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.protocol import scripts
from django_clustered_sessions.protocol.changes import Change, Changes, Operation
from django_clustered_sessions.protocol.commands import (
    event_stream,
    lock_queue,
    records,
    script_calls,
    statistics,
    users,
)
from django_clustered_sessions.protocol.effects import Call
from django_clustered_sessions.protocol.options import Expiry, Fence, LockOptions, WriteOptions
from django_clustered_sessions.protocol.record import NOBODY, Ages, Mode, SessionKeys, user_tag
from django_clustered_sessions.protocol.scripts import Script
from django_clustered_sessions.store import connections
from tests.gateways import place
from tests.locking import ask, claim, free, new_session, new_token, queue, seize

PLACE = SessionKeys.of("p", "some key")
TERMS = WriteOptions(Ages(1000), 100, 4000, "merge")
LOCKING = LockOptions(10_000, 8000, 120_000, 16, b"node GET /")
HOLDER, WAITER = "1" * 16, "2" * 16


def test_mailbox_is_in_the_slot_of_its_record(store: redis.Redis) -> None:
    create = records.create(PLACE, b"12345678", Expiry(Mode.DEFAULT, 0), [(b"d:a", b"s1")], TERMS)
    ask(create, *(lock_queue.acquire(PLACE, who, LOCKING, 10_000) for who in (HOLDER, WAITER)))
    before = set(store.keys())
    ask(lock_queue.release(PLACE, HOLDER))
    assert set(store.keys()) - before == {PLACE.mailbox(HOLDER).encode()}
    assert store.type(PLACE.mailbox(HOLDER)) == b"list"
    assert store.pttl(PLACE.mailbox(HOLDER)) > 0
    passed = lock_queue.release(PLACE, HOLDER).keys
    assert {key_slot(key.encode()) for key in (*passed, PLACE.ended_mailbox)} == {
        key_slot(PLACE.record.encode())
    }


def test_digest_of_a_script_is_the_one_the_store_computes(store: redis.Redis) -> None:
    for path in files("django_clustered_sessions.protocol").joinpath("lua").iterdir():
        if not path.read_bytes().startswith(b"#!lua"):
            continue  # An include.
        script = scripts.script(path.name.removesuffix(".lua"))
        assert script.sha == sha1(script.source).hexdigest().encode()
        loaded = store.script_load(script.source)
        assert (loaded if isinstance(loaded, bytes) else loaded.encode()) == script.sha


#: Comes before a script: only keys that were passed in may be used.
GUARD = b"""
local given, store = {}, redis
for _, key in ipairs(KEYS) do
  given[key] = true
end
local redis = {call = function(command, ...)
  local words, first, last = {...}, 1, 1
  if command == "TIME" then
    last = 0
  elseif command == "RENAME" or command == "DEL" or command == "EXISTS" then
    last = #words
  elseif command == "XGROUP" or command == "XINFO" then
    first, last = 2, 2
  elseif command == "XREADGROUP" then
    first, last = #words - 1, #words - 1
  end
  for i = first, last do
    if not given[words[i]] then
      error({err = command .. " of a key that was not passed in: " .. tostring(words[i])})
    end
  end
  return store.call(command, ...)
end}
"""


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Run all scripts behind the guard; count the calls."""
    called: Counter[str] = Counter()

    def script(name: str) -> Script:
        called[name] += 1
        whole = scripts.script(name)
        first_line, _, rest = whole.source.partition(b"\n")
        source = first_line + GUARD + rest
        return Script(name, source, sha1(source).hexdigest().encode(), whole.reads_only)

    monkeypatch.setattr(script_calls, "script", script)
    return called


def test_guard_refuses_a_key_that_was_not_passed_in(store: redis.Redis) -> None:
    source = b"#!lua" + GUARD + b"return redis.call('GET', KEYS[1] .. ARGV[1])"
    assert store.eval(source, 1, "a", "") is None
    with pytest.raises(redis.ResponseError, match="GET of a key that was not passed in: ab"):
        store.eval(source, 1, "a", "b")


def done(*calls: Call) -> Any:
    """Return the reply to the last of some calls. Raises the error that one of them replies."""
    replies = [script_calls.whole(ask(call)) for call in calls]
    return replies[-1]


def contended(*, lease_ms: int = 60_000) -> tuple[str, str, list[str]]:
    """Return the key of a session, the token that holds its lock, and two that wait for it."""
    key = new_session(n=1, _auth_user_id="5")
    token, waiting = seize(key), [new_token(), new_token()]
    for each in waiting:
        claim(key, each)
    claim(key, token, lease_ms=lease_ms)
    return key, token, waiting


@pytest.mark.each_server
def test_scripts_touch_no_key_that_was_not_passed_in(
    store: redis.Redis, settings: Any, guarded: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.CLUSTERED_SESSIONS_EVENTS_KEPT = 1000
    settings.CLUSTERED_SESSIONS_TRACK_CLIENTS = True
    terms = TERMS._replace(events_kept=1000, client=b"a client")
    mine = user_tag("5")

    def commit(key: str, *changes: Change, token: bytes = b"", **options: Any) -> Any:
        options = {"expiry": None, "options": terms} | options
        return done(
            records.commit(
                place(key),
                token or new_token()[:8].encode(),
                changes=Changes(changes, False),
                **options,
            )
        )

    more = Change(Operation.ADD, b"d:hits", b"", b"1")
    # Reading, counting, a repetition, the notes of writes, another user, no user.
    key = new_session(n=1)
    for number in range(3):
        commit(key, more, token=b"token  %d" % number)
    for number in (0, 2):
        commit(key, more, token=b"token  %d" % number)
    done(*records.fetch(place(key), b"known.."))
    done(records.touch(place(key), terms, always=True))
    hits = store.hget(place(key).record, "d:hits")
    done(records.rekey(place(key), {b"d:hits": (hits, hits + b"0"), b"m:past": (b"", b"x")}))
    for user in (mine, user_tag("6"), NOBODY):
        commit(key, more, user=user)
    # A lock that others wait for: given up by a commit, a release, a waiter, and over.
    key, token, waiting = contended()
    commit(key, more, fence=Fence(token, release=True))
    free(key, waiting[0])
    claim(key, third := new_token())
    done(lock_queue.renew(place(key), waiting[1], 8000, 120_000))
    free(key, third)
    assert len(queue(store, key)) == 1
    key, token, waiting = contended(lease_ms=1)
    commit(key, more)
    commit(key, more, fence=Fence(token))
    # All that ends or moves a session that others wait for.
    commit(contended()[0], more, expiry=Expiry(Mode.FROM_NOW, -1))
    key, token, _ = contended()
    commit(key, more, expiry=Expiry(Mode.FROM_NOW, -1), fence=Fence(token))
    SessionStore(contended()[0]).flush()
    for is_cluster in (False, True):
        monkeypatch.setattr(connections, "is_cluster", lambda now=is_cluster: now)
        with (session := SessionStore(new_session(n=1, _auth_user_id="5"))).lock():
            claim(str(session.session_key), new_token())
            session.cycle_key()
    # Users, events, statistics, another engine's sessions.
    registry.end_sessions_of(5)
    index = place(key)
    done(users.owned("session", int(index.index[9:12], 16), mine))
    done(users.unlist(index, mine, 1000))
    done(users.claim("session", mine, index.id, 1, 60_000, [], []))
    done(
        records.adopt(
            SessionKeys.of("session", "x" * 32),
            b"12345678",
            Expiry(Mode.DEFAULT, 0),
            [(b"d:a", b"s1")],
            terms,
            mine,
            10_000,
            10_000,
        )
    )
    for bucket in range(1024):
        done(
            event_stream.sweep("session", bucket, 1000), event_stream.take("session", bucket, 9, 1)
        )
    done(statistics.stats("session:{000}", "node", 0, [1]))
    assert set(guarded) == {
        path.name.removesuffix(".lua")
        for path in files("django_clustered_sessions.protocol").joinpath("lua").iterdir()
        if path.read_bytes().startswith(b"#!lua")
    }
