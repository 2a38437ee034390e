"""The working copy of a session: what it decodes, and what it says has changed."""

from __future__ import annotations

import json
import pickle

import pytest
from django.contrib.sessions.serializers import JSONSerializer

from django_clustered_sessions.fields import Change, Fields, Operation

VERSION = b"loadedv1"


class Counting(JSONSerializer):
    """JSON that tells what it read and wrote."""

    def __init__(self):
        self.read = []
        self.written = []

    def dumps(self, obj):
        self.written.append(obj)
        return super().dumps(obj)

    def loads(self, data):
        self.read.append(data)
        return super().loads(data)


class Unstable:
    """A serialiser that never writes the same bytes twice."""

    def __init__(self):
        self.count = 0

    def dumps(self, obj):
        self.count += 1
        return pickle.dumps((self.count, obj))

    def loads(self, data):
        return pickle.loads(data)[1]


def stored(values, serializer=None):
    dumps = (serializer or JSONSerializer()).dumps
    return {f"d:{key}".encode(): VERSION + b"s" + dumps(value) for key, value in values.items()}


def fields(serializer=None, **values):
    return Fields(serializer or JSONSerializer(), stored(values, serializer))


def changes(fields):
    return {change.field: change for change in fields.delta().changes}


def test_only_what_is_asked_for_is_decoded():
    serializer = Counting()
    session = Fields(serializer, stored({"a": 1, "b": [2], "c": 3}))
    assert session["b"] == [2]
    assert serializer.read == [b"[2]"]


def test_whoever_takes_the_whole_gets_values_and_nothing_raw():
    for whole in (
        dict,
        lambda session: {**session},
        lambda session: session.copy(),
        lambda session: {key: session[key] for key in session},
        lambda session: dict(session.items()),
        lambda session: dict(zip(session.keys(), session.values(), strict=True)),
    ):
        assert whole(fields(a=1, b=[2])) == {"a": 1, "b": [2]}
    assert fields(a=1) == {"a": 1}
    assert len(fields(a=1, b=2)) == 2


def test_what_was_only_read_is_no_change():
    session = fields(a=1, b={"x": [1]}, c="s")
    assert session.copy()
    assert not session.delta()
    assert not session.changed_in_place()


def test_what_cannot_change_in_place_is_not_serialised_again():
    serializer = Counting()
    session = Fields(serializer, stored({"n": 1, "s": "text", "l": [1]}))
    session.copy()
    session.delta()
    assert serializer.written == [[1]]


def test_a_change_in_place_is_a_change():
    session = fields(cart={"tea": [1]}, other=1)
    session["cart"]["tea"].append(2)
    assert session.changed_in_place()
    assert session.delta().changes == (
        Change(Operation.SET, b"d:cart", VERSION, b's{"tea":[1,2]}'),
    )


def test_changed_and_changed_back_is_no_change():
    session = fields(cart={"tea": 1})
    session["cart"]["tea"] = 2
    session["cart"]["tea"] = 1
    session["new"] = 1
    del session["new"]
    assert not session.delta()


def test_the_same_value_of_another_type_is_a_change():
    session = fields(a=1)
    session["a"] = True
    assert changes(session)[b"d:a"].operand == b"strue"


def test_new_and_removed_keys():
    session = fields(a=1, b=2)
    session["c"] = 3
    del session["a"]
    assert changes(session) == {
        b"d:a": Change(Operation.REMOVE, b"d:a", VERSION, b""),
        b"d:c": Change(Operation.SET, b"d:c", b"", b"s3"),
    }


def test_bytes_that_are_not_stable_are_compared_as_values():
    serializer = Unstable()
    session = Fields(serializer, stored({"a": [1], "b": [2]}, serializer))
    session.copy()
    assert not session.delta()
    session["b"].append(3)
    assert set(changes(session)) == {b"d:b"}


def test_keys_that_json_makes_strings_of_are_one_field():
    session = fields(**{"1": "stored"})
    session[1] = "mine"
    assert changes(session) == {b"d:1": Change(Operation.SET, b"d:1", VERSION, b's"mine"')}


def test_clear_forgets_all_that_is_stored():
    session = Fields(JSONSerializer(), cleared=True)
    session["a"] = 1
    delta = session.delta()
    assert delta.cleared and delta.expiry_changed
    assert [change.field for change in delta.changes] == [b"d:a"]


def test_settled_changes_do_not_count_as_in_place_and_are_not_lost():
    session = fields(cart={"tea": 1}, other=[1])
    session["cart"]["tea"] = 2
    session.settle()
    assert not session.changed_in_place()
    assert set(changes(session)) == {b"d:cart"}
    session["other"].append(2)
    assert session.changed_in_place()
    assert set(changes(session)) == {b"d:cart", b"d:other"}


def test_a_removed_key_counts_as_changed_and_can_be_settled():
    session = fields(a=1)
    del session["a"]
    assert session.changed_in_place()
    session.settle()
    assert not session.changed_in_place()
    assert session.delta()


def test_what_the_serialiser_refuses_is_named_by_the_save_and_only_there():
    session = fields(cart={})
    session["cart"]["x"] = object()
    assert session.changed_in_place()
    session.settle()
    with pytest.raises(TypeError, match="'cart'.*JSONSerializer"):
        session.delta()
    with pytest.raises(TypeError, match="'cart'"):
        session.everything()


class TestUnreadable:
    """A value that cannot be read is set aside."""

    def session(self):
        told = []
        values = stored({"good": 1}) | {b"d:bad": VERSION + b"snot json", b"d:odd": VERSION + b"?"}
        session = Fields(
            JSONSerializer(), values, on_unreadable=lambda key, error: told.append(key)
        )
        return session, told

    def test_it_is_not_there_and_the_others_are(self):
        session, told = self.session()
        assert dict(session) == {"good": 1}
        assert "bad" not in session and session.get("odd") is None
        assert sorted(told) == ["bad", "odd"]

    def test_it_is_neither_written_nor_removed(self):
        session, _ = self.session()
        session["good"] = 2
        assert session.copy() == {"good": 2}
        assert set(changes(session)) == {b"d:good"}
        assert not Fields(JSONSerializer(), {b"d:bad": VERSION + b"?"}).delta()

    def test_it_moves_along_raw(self):
        session, _ = self.session()
        session.copy()
        assert dict(session.everything())[b"d:bad"] == b"snot json"

    def test_it_gives_way_to_a_new_value(self):
        session, _ = self.session()
        assert "bad" not in session
        session["bad"] = 1
        assert changes(session)[b"d:bad"] == Change(Operation.SET, b"d:bad", VERSION, b"s1")


class TestIncrement:
    """An integer that the store adds to."""

    def test_is_an_addition_and_not_a_value(self):
        session = Fields(JSONSerializer(), {b"d:n": VERSION + b"i5"})
        assert session.increment("n", 2) == 7
        assert session.increment("n", 1) == 8
        assert session.delta().changes == (Change(Operation.ADD, b"d:n", b"", b"3"),)

    def test_makes_a_counter_of_what_the_serialiser_wrote(self):
        session = fields(n=5)
        session.increment("n", 2)
        delta = session.delta()
        assert delta.changes == (Change(Operation.SET_COUNTER, b"d:n", VERSION, b"i7"),)
        assert delta.sums == {b"d:n"}

    def test_is_an_addition_again_where_somebody_else_made_the_counter(self):
        session = fields(n=5)
        session.increment("n", 2)
        session.rebase({b"d:n": b"version2i6"})
        assert session["n"] == 8
        assert session.delta().changes == (Change(Operation.ADD, b"d:n", b"", b"2"),)

    def test_of_what_lua_cannot_count_is_a_value(self):
        session = fields(n=2**60)
        session.increment("n", 2)
        assert changes(session)[b"d:n"].operand == b"s%d" % (2**60 + 2)

    def test_starts_at_zero(self):
        session = fields()
        assert session.increment("n", -1) == -1
        assert session.delta().changes == (Change(Operation.ADD, b"d:n", b"", b"-1"),)

    def test_by_nothing_is_no_change(self):
        session = fields(n=5)
        session.increment("n", 0)
        assert not session.delta()

    def test_of_a_value_set_here_is_a_value(self):
        session = fields(n=5)
        session["n"] = 10
        session.increment("n", 1)
        assert changes(session)[b"d:n"].operand == b"s11"

    def test_then_set_is_a_value(self):
        session = fields(n=5)
        session.increment("n", 1)
        session["n"] = 50
        assert changes(session)[b"d:n"].operand == b"s50"

    def test_then_removed_is_removed(self):
        session = fields(n=5)
        session.increment("n", 1)
        del session["n"]
        assert changes(session)[b"d:n"].operation is Operation.REMOVE

    @pytest.mark.parametrize("value", ["1", 1.5, True, None, [1]])
    def test_of_what_is_no_integer_is_refused(self, value):
        session = fields(n=value)
        with pytest.raises(TypeError, match="'n'"):
            session.increment("n", 1)
        with pytest.raises(TypeError, match="'m'"):
            session.increment("m", value)

    def test_after_it_was_written_the_counter_is_known(self):
        session = Fields(JSONSerializer(), {b"d:n": VERSION + b"i5"})
        session.increment("n", 1)
        session.written(session.delta(), b"version2", [9])
        assert session["n"] == 9
        assert not session.delta()
        session.increment("n", 1)
        assert session.delta().changes[0].operand == b"1"


def test_after_a_write_only_new_changes_count():
    session = fields(cart={"tea": 1})
    session["cart"]["tea"] = 2
    session.written(session.delta(), b"version2", [])
    assert not session.delta()
    session["cart"]["tea"] = 3
    assert changes(session)[b"d:cart"].loaded == b"version2"


def test_a_merge_keeps_the_containers_that_a_view_may_hold():
    session = fields(cart={"lines": {"tea": 1}, "notes": ["a"]})
    lines, notes = session["cart"]["lines"], session["cart"]["notes"]
    lines["milk"] = 1
    notes.append("mine")
    theirs = {"lines": {"tea": 1, "rice": 1}, "notes": ["a", "theirs"]}
    session.rebase({b"d:cart": b"version2s" + json.dumps(theirs).encode()})
    assert lines is session["cart"]["lines"] and lines == {"tea": 1, "rice": 1, "milk": 1}
    assert notes is session["cart"]["notes"] and notes == ["a", "theirs", "mine"]
    assert changes(session)[b"d:cart"].loaded == b"version2"


def test_a_list_under_two_keys_is_not_merged_into_for_both():
    session = fields(seen=[], bought=[])
    session["seen"] = session["bought"] = ["mine"]
    session.rebase({b"d:seen": b'version2s["theirs"]'})
    assert session["seen"] == ["theirs", "mine"]
    assert session["bought"] == ["mine"]


def test_a_merge_compares_what_a_reader_would_find():
    session = fields(cart={"1": ["a"]})
    session["cart"] = {1: ("a", "mine")}
    session.rebase({b"d:cart": b'version2s{"1":["a","theirs"]}'})
    assert session["cart"] == {"1": ["a", "theirs", "mine"]}


def test_a_value_that_others_removed_and_i_did_not_change_is_theirs():
    session = fields(a=1)
    del session["a"]
    session.rebase({b"d:a": b""})
    assert not session.delta()
