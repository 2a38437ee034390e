"""Many sessions at once, written by the package's own script in pipelines."""

from __future__ import annotations

import pickle
from binascii import crc_hqx
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from secrets import token_bytes
from typing import Any, Final

from django_clustered_sessions.protocol import record
from django_clustered_sessions.protocol.commands import records
from django_clustered_sessions.protocol.options import Expiry, WriteOptions
from django_clustered_sessions.protocol.record import Ages, Mode, SessionKeys
from django_clustered_sessions.protocol.scripts import script

from .scenarios import LOGGED_IN

_AGE_MS: Final = 14 * 24 * 60 * 60 * 1000
_TERMS: Final = WriteOptions(Ages(_AGE_MS), 1 << 20, 4000, "merge")
_AT_ONCE: Final = 500
_SLOTS: Final = 16384


def session_key(number: int) -> str:
    """Return the key of a session that was filled in by its number."""
    return blake2b(str(number).encode(), digest_size=16).hexdigest()


def primary_of(bucket: int, primaries: int) -> int:
    """Return which of a cluster's primaries has a bucket, each with as many of the slots."""
    slot = crc_hqx(f"{bucket:03x}".encode(), 0) % _SLOTS
    return slot * primaries // _SLOTS


def server_of(key: str, servers: int) -> int:
    """Return which of some primaries has a session."""
    return primary_of(int(SessionKeys.of("", key).index.partition("{")[2][:3], 16), servers)


def fill(clients: Sequence[Any], numbers: Iterable[int], user: str | None = None) -> None:
    """Create logged-in sessions, of a user or each of its own; ``clients`` are the primaries'."""
    from django.contrib.sessions.serializers import JSONSerializer

    serializer = JSONSerializer()
    fields = [
        (record.field_of(name, serializer), record.pack(serializer.dumps(value)))
        for name, value in LOGGED_IN.items()
    ]

    def command(number: int) -> tuple[int, Sequence[Any]]:
        key = session_key(number)
        expiry = Expiry(Mode.DEFAULT, 0)
        place = SessionKeys.of("session", key)
        call = records.create(
            place, token_bytes(8), expiry, fields, _TERMS, record.user_tag(user or number)
        )
        words = ("EVALSHA", call.script.sha, len(call.keys), *call.keys, *call.arguments)
        return server_of(key, len(clients)), words

    for client in clients:
        client.script_load(script("create").source)
    send(clients, map(command, numbers))


def fill_like_cache_engine(client: Any, numbers: Iterable[int]) -> None:
    """Create what Django's cache engine stores for the same sessions."""
    value = pickle.dumps(dict(LOGGED_IN), -1)
    name = ":1:django.contrib.sessions.cache"
    send([client], ((0, ("SETEX", name + session_key(n), _AGE_MS // 1000, value)) for n in numbers))


def send(clients: Sequence[Any], all_words: Iterable[tuple[int, Sequence[Any]]]) -> None:
    pipes = [client.pipeline(transaction=False) for client in clients]
    for number, (server, words) in enumerate(all_words, 1):
        pipes[server].execute_command(*words)
        if not number % _AT_ONCE:
            for pipe in pipes:
                pipe.execute()
    for pipe in pipes:
        pipe.execute()
