"""The stored form of a session, byte by byte: other releases read it too."""

from __future__ import annotations

import json

import pytest
from django.contrib.sessions.serializers import JSONSerializer
from hypothesis import given
from hypothesis import strategies as st

from django_clustered_sessions.protocol import record
from django_clustered_sessions.protocol.record import (
    Damaged,
    EndReason,
    Loaded,
    Meta,
    Mode,
    NewerFormat,
    SessionKeys,
    session_id,
)

META = bytes.fromhex(
    "01"
    + "73"
    + "0102030405060708"
    + "01a1fc54000a"
    + "01a2446d0bf8"
    + "000000002710"
    + "0000002f"
    + "01a1fc550000"
    + "7573657274616738"
)
SERIALIZER = JSONSerializer()


def test_key_in_the_store_is_the_hash_of_the_session_key():
    place = SessionKeys.of("session", "abcdefgh")
    assert place.record == "session:{271}:nFbMUbN0w7oYkhDVttS_V3kNNRyWxHwCGQ7PHkMGNas"
    assert place.record.endswith(":" + session_id("abcdefgh"))
    assert place.index == place.record.rpartition(":")[0] + ":index"
    assert "abcdefgh" not in place.record


@given(st.text())
def test_any_session_key_has_a_place_among_1024_buckets(session_key):
    place = SessionKeys.of("session", session_key)
    assert len(place.id) == 43
    assert 0 <= int(place.record[9:12], 16) < record.BUCKETS


def test_meta_is_read_as_the_scripts_pack_it():
    assert Meta.parse(META) == Meta(
        mode=Mode.SLIDING,
        version=bytes(range(1, 9)),
        created_ms=0x01A1FC54000A,
        deadline_ms=0x01A2446D0BF8,
        span_ms=10_000,
        size=47,
        seen_ms=0x01A1FC550000,
        user=b"usertag8",
    )


@pytest.mark.parametrize("packed", [b"", META[:-1], META + b"x", b"\x01?" + META[2:]])
def test_meta_of_another_shape_is_damage(packed):
    with pytest.raises(Damaged):
        Meta.parse(packed)


def test_newer_format_is_refused_and_says_what_to_do():
    with pytest.raises(NewerFormat, match="newer release"):
        Loaded.parse({b"m:": b"\x02" + META[1:]})


def test_load_tells_a_session_from_an_ended_one():
    assert Loaded.parse({}) is EndReason.UNKNOWN
    assert Loaded.parse({b"m:end": b"rotated"}) is EndReason.ROTATED
    assert Loaded.parse({b"m:end": b"a reason of the future"}) is EndReason.DELETED
    with pytest.raises(Damaged):
        Loaded.parse({b"d:a": b"12345678s1"})
    found = Loaded.parse({b"m:": META, b"m:lock": b"", b"d:a": b"12345678s1"})
    assert found.values == {b"d:a": b"12345678s1"}


@given(st.binary(max_size=20_000))
def test_packing_keeps_the_bytes(serialized):
    assert record.serialized(b"12345678" + record.pack(serialized)) == serialized


@given(st.binary(min_size=16, max_size=64).map(bytes.hex))
def test_hexadecimal_strings_take_half_the_room(text):
    packed = record.pack(SERIALIZER.dumps(text))
    assert packed[:1] == b"h" and len(packed) == 1 + len(text) // 2
    assert record.unpack(b"12345678" + packed, SERIALIZER) == text


def test_large_values_are_compressed():
    packed = record.pack(json.dumps("x" * 10_000).encode())
    assert packed[:1] == b"z" and len(packed) < 200


def test_unknown_codec_is_damage():
    with pytest.raises(Damaged, match="codec"):
        record.unpack(b"12345678?1", SERIALIZER)


@given(st.one_of(st.text(), st.text(alphabet=st.characters(categories=["Cs"]))))
def test_string_key_is_its_own_field(key):
    assert record.key_of(record.field_of(key, SERIALIZER), SERIALIZER) == key


@pytest.mark.parametrize(
    ("key", "read_back"), [(1, "1"), (None, "null"), (True, "true"), (1.5, "1.5")]
)
def test_other_keys_become_what_the_serialiser_makes_of_them(key, read_back):
    assert record.key_of(record.field_of(key, SERIALIZER), SERIALIZER) == read_back


class Repr:
    """A serialiser that keeps the types of keys, as pickle does."""

    def dumps(self, obj):
        return repr(obj).encode()

    def loads(self, data):
        return eval(data)  # noqa: S307


@pytest.mark.parametrize("key", [1, None, (1, "a"), 1.5])
def test_serialiser_that_keeps_keys_gets_them_back(key):
    assert record.key_of(record.field_of(key, Repr()), Repr()) == key


def test_claims_of_a_user_are_in_the_bucket_of_ten_bits() -> None:
    user = bytes.fromhex("ffc0000000000000")
    assert record.claims_key("session", user) == f"session:{{3ff}}:logins-{user.hex()}"
