"""The Lua files as a store has them: their digests, and the key that one of them makes."""

from __future__ import annotations

from hashlib import sha1
from importlib.resources import files
from typing import Any

import redis
from redis.crc import key_slot

from django_clustered_sessions.protocol import scripts
from django_clustered_sessions.protocol.commands import lock_queue, records
from django_clustered_sessions.protocol.effects import Call, Flow
from django_clustered_sessions.protocol.options import Expiry, LockOptions, WriteOptions
from django_clustered_sessions.protocol.record import Mode, SessionKeys
from django_clustered_sessions.store import connections, drivers
from django_clustered_sessions.store.budget import Budget

PLACE = SessionKeys.of("p", "some key")
TERMS = WriteOptions(1000, 0, 0, 100, 4000, "merge")
LOCKING = LockOptions(10_000, 8000, 120_000, 16, b"node GET /")
HOLDER, WAITER = "1" * 16, "2" * 16


def test_mailbox_is_in_the_slot_of_its_record(store: redis.Redis) -> None:
    def ask(*calls: Call) -> None:
        def flow() -> Flow[Any]:
            yield calls

        drivers.run(flow(), connections.pool, Budget(30.0))

    create = records.create(PLACE, b"12345678", Expiry(Mode.DEFAULT, 0), [(b"d:a", b"s1")], TERMS)
    ask(create, *(lock_queue.acquire(PLACE, who, LOCKING, 10_000) for who in (HOLDER, WAITER)))
    before = set(store.keys())
    ask(lock_queue.release(PLACE, HOLDER))
    assert set(store.keys()) - before == {PLACE.mailbox(WAITER).encode()}
    assert store.type(PLACE.mailbox(WAITER)) == b"list"
    assert store.pttl(PLACE.mailbox(WAITER)) > 0
    passed = lock_queue.release(PLACE, WAITER).keys
    assert {key_slot(key.encode()) for key in (*passed, PLACE.mailbox(WAITER))} == {
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
