"""The working copy of a session: what it decodes, and what it says has changed."""

from __future__ import annotations

import json
import pickle
from copy import deepcopy

import pytest
from django.contrib.sessions.serializers import JSONSerializer
from hypothesis import given
from hypothesis import strategies as st

from django_clustered_sessions.protocol.changes import Change, Operation
from django_clustered_sessions.protocol.merge import same
from django_clustered_sessions.protocol.session_data import SessionData
from tests.serializers import PickleSerializer, SaltedSerializer

VERSION = b"loadedv1"
NOTHING = object()


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
    return SessionData(serializer or JSONSerializer(), stored(values, serializer))


def changes(fields):
    return {change.field: change for change in fields.changes().fields}


def test_only_values_asked_for_are_decoded():
    serializer = Counting()
    session = SessionData(serializer, stored({"a": 1, "b": [2], "c": 3}))
    assert session["b"] == [2]
    assert serializer.read == [b"[2]"]


def test_whole_session_has_values_and_nothing_raw():
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


def test_reading_is_no_change():
    session = fields(a=1, b={"x": [1]}, c="s")
    assert session.copy()
    assert not session.changes()
    assert not session.changed_in_place()


def test_immutable_values_are_not_serialised_again():
    serializer = Counting()
    session = SessionData(serializer, stored({"n": 1, "s": "text", "l": [1]}))
    session.copy()
    session.changes()
    assert serializer.written == [[1]]


def test_change_in_place_is_found():
    session = fields(cart={"tea": [1]}, other=1)
    session["cart"]["tea"].append(2)
    assert session.changed_in_place()
    assert session.changes().fields == (
        Change(Operation.SET, b"d:cart", VERSION, b's{"tea":[1,2]}'),
    )


def test_change_and_change_back_are_no_change():
    session = fields(cart={"tea": 1})
    session["cart"]["tea"] = 2
    session["cart"]["tea"] = 1
    session["new"] = 1
    del session["new"]
    assert not session.changes()


def test_same_value_of_another_type_is_a_change():
    session = fields(a=1)
    session["a"] = True
    assert changes(session)[b"d:a"].operand == b"strue"


def test_new_and_removed_keys_are_changes():
    session = fields(a=1, b=2)
    session["c"] = 3
    del session["a"]
    assert changes(session) == {
        b"d:a": Change(Operation.REMOVE, b"d:a", VERSION, b""),
        b"d:c": Change(Operation.SET, b"d:c", b"", b"s3"),
    }


def test_unstable_bytes_are_compared_as_values():
    serializer = Unstable()
    session = SessionData(serializer, stored({"a": [1], "b": [2]}, serializer))
    session.copy()
    assert not session.changes()
    session["b"].append(3)
    assert set(changes(session)) == {b"d:b"}


@pytest.mark.parametrize("value", [("a", ("b",)), {"a": ("b",)}, {1: 2}, ["a"]])
def test_value_that_reads_differently_is_no_change(value):
    session = SessionData(SaltedSerializer())
    session["v"] = value
    for version in (b"version1", b"version2"):
        session.written(session.changes(), version, [])
        assert not session.changes()
        assert not session.changed_in_place()
        assert session.as_stored("v")
    session.settle()
    assert not session.changed_in_place()
    session["v"] = [value]
    assert session.changed_in_place()
    assert set(changes(session)) == {b"d:v"}


def test_keys_that_json_writes_alike_are_one_field():
    session = fields(**{"1": "stored"})
    session[1] = "mine"
    assert changes(session) == {b"d:1": Change(Operation.SET, b"d:1", VERSION, b's"mine"')}


class Key(str):
    """A string of another type, as Django's SafeString and members of a StrEnum are."""


def test_key_of_a_string_subclass_is_the_same_key():
    session = fields(cart=1, other=2, gone=3)
    assert session[Key("cart")] == 1
    assert Key("other") in session
    session[Key("other")] = 4
    del session[Key("gone")]
    assert changes(session).keys() == {b"d:other", b"d:gone"}


def test_value_that_is_written_alike_is_no_change():
    session = fields(name="ada", n=1)
    assert (session["name"], session["n"]) == ("ada", 1)
    session["name"] = Key("ada")
    assert not session.changed_in_place()
    assert changes(session) == {}
    session["n"] = True
    assert set(changes(session)) == {b"d:n"}


@pytest.mark.parametrize("same", [1, 1.0, True])
def test_equal_keys_that_are_no_strings_are_the_same_key(same):
    values = {b"k:" + pickle.dumps(1): "one", b"d:two": 2}
    packed = {field: VERSION + b"s" + pickle.dumps(value) for field, value in values.items()}
    session = SessionData(PickleSerializer(), packed)
    assert session[same] == "one"
    assert same in session
    session[same] = "other"
    assert session.copy() == {1: "other", "two": 2}
    del session[same]
    assert session.copy() == {"two": 2}
    assert fields(**{"1": "one"}).get(same) is None


def test_clear_forgets_all_that_is_stored():
    session = SessionData(JSONSerializer(), cleared=True)
    session["a"] = 1
    delta = session.changes()
    assert delta.cleared and delta.expiry_changed
    assert [change.field for change in delta.fields] == [b"d:a"]


def test_settled_changes_are_kept_and_no_longer_in_place():
    session = fields(cart={"tea": 1}, other=[1])
    session["cart"]["tea"] = 2
    session.settle()
    assert not session.changed_in_place()
    assert set(changes(session)) == {b"d:cart"}
    session["other"].append(2)
    assert session.changed_in_place()
    assert set(changes(session)) == {b"d:cart", b"d:other"}


def test_removed_key_counts_as_changed_until_settled():
    session = fields(a=1)
    del session["a"]
    assert session.changed_in_place()
    session.settle()
    assert not session.changed_in_place()
    assert session.changes()


def test_only_a_save_names_the_value_that_is_refused():
    session = fields(cart={})
    session["cart"]["x"] = object()
    assert session.changed_in_place()
    session.settle()
    with pytest.raises(TypeError, match="'cart'.*JSONSerializer"):
        session.changes()
    with pytest.raises(TypeError, match="'cart'"):
        session.everything()


class TestUnreadable:
    """A value that cannot be read is set aside."""

    def session(self):
        told = []
        values = stored({"good": 1}) | {b"d:bad": VERSION + b"snot json", b"d:odd": VERSION + b"?"}
        session = SessionData(
            JSONSerializer(), values, on_unreadable=lambda key, error: told.append(key)
        )
        return session, told

    def test_unreadable_value_is_missing_and_others_are_there(self):
        session, told = self.session()
        assert dict(session) == {"good": 1}
        assert "bad" not in session and session.get("odd") is None
        assert sorted(told) == ["bad", "odd"]

    def test_unreadable_value_is_neither_written_nor_removed(self):
        session, _ = self.session()
        session["good"] = 2
        assert session.copy() == {"good": 2}
        assert set(changes(session)) == {b"d:good"}
        assert not SessionData(JSONSerializer(), {b"d:bad": VERSION + b"?"}).changes()

    def test_unreadable_value_moves_along_raw(self):
        session, _ = self.session()
        session.copy()
        assert dict(session.everything())[b"d:bad"] == b"snot json"

    def test_unreadable_value_gives_way_to_a_new_one(self):
        session, _ = self.session()
        assert "bad" not in session
        session["bad"] = 1
        assert changes(session)[b"d:bad"] == Change(Operation.SET, b"d:bad", VERSION, b"s1")


class TestIncrement:
    """An integer that the store adds to."""

    def test_increment_of_a_counter_is_an_addition(self):
        session = SessionData(JSONSerializer(), {b"d:n": VERSION + b"i5"})
        assert session.increment("n", 2) == 7
        assert session.increment("n", 1) == 8
        assert session.changes().fields == (Change(Operation.ADD, b"d:n", b"", b"3"),)

    def test_increment_makes_a_counter_of_a_written_integer(self):
        session = fields(n=5)
        session.increment("n", 2)
        delta = session.changes()
        assert delta.fields == (Change(Operation.SET_COUNTER, b"d:n", VERSION, b"i7"),)
        assert delta.sums == {b"d:n"}

    def test_increment_adds_where_others_made_the_counter(self):
        session = fields(n=5)
        session.increment("n", 2)
        session.rebase({b"d:n": b"version2i6"})
        assert session["n"] == 8
        assert session.changes().fields == (Change(Operation.ADD, b"d:n", b"", b"2"),)

    def test_increment_beyond_what_lua_counts_is_a_value(self):
        session = fields(n=2**60)
        session.increment("n", 2)
        assert changes(session)[b"d:n"].operand == b"s%d" % (2**60 + 2)

    def test_increment_starts_at_zero(self):
        session = fields()
        assert session.increment("n", -1) == -1
        assert session.changes().fields == (Change(Operation.ADD, b"d:n", b"", b"-1"),)

    def test_increment_by_nothing_is_no_change(self):
        session = fields(n=5)
        session.increment("n", 0)
        assert not session.changes()

    def test_increment_of_a_value_set_here_is_a_value(self):
        session = fields(n=5)
        session["n"] = 10
        session.increment("n", 1)
        assert changes(session)[b"d:n"].operand == b"s11"

    def test_setting_after_an_increment_is_a_value(self):
        session = fields(n=5)
        session.increment("n", 1)
        session["n"] = 50
        assert changes(session)[b"d:n"].operand == b"s50"

    def test_removal_after_an_increment_is_a_removal(self):
        session = fields(n=5)
        session.increment("n", 1)
        del session["n"]
        assert changes(session)[b"d:n"].operation is Operation.REMOVE

    @pytest.mark.parametrize("value", ["1", 1.5, True, None, [1]])
    def test_increment_needs_integers(self, value):
        session = fields(n=value)
        with pytest.raises(TypeError, match="'n'"):
            session.increment("n", 1)
        with pytest.raises(TypeError, match="'m'"):
            session.increment("m", value)

    def test_written_increment_leaves_the_counter_known(self):
        session = SessionData(JSONSerializer(), {b"d:n": VERSION + b"i5"})
        session.increment("n", 1)
        session.written(session.changes(), b"version2", [9])
        assert session["n"] == 9
        assert not session.changes()
        session.increment("n", 1)
        assert session.changes().fields[0].operand == b"1"


def test_only_new_changes_count_after_a_write():
    session = fields(cart={"tea": 1})
    session["cart"]["tea"] = 2
    session.written(session.changes(), b"version2", [])
    assert not session.changes()
    session["cart"]["tea"] = 3
    assert changes(session)[b"d:cart"].loaded == b"version2"


def test_merge_keeps_the_containers_that_a_view_may_hold():
    session = fields(cart={"lines": {"tea": 1}, "notes": ["a"]})
    lines, notes = session["cart"]["lines"], session["cart"]["notes"]
    lines["milk"] = 1
    notes.append("mine")
    theirs = {"lines": {"tea": 1, "rice": 1}, "notes": ["a", "theirs"]}
    session.rebase({b"d:cart": b"version2s" + json.dumps(theirs).encode()})
    assert lines is session["cart"]["lines"] and lines == {"tea": 1, "rice": 1, "milk": 1}
    assert notes is session["cart"]["notes"] and notes == ["a", "theirs", "mine"]
    assert changes(session)[b"d:cart"].loaded == b"version2"


def test_list_under_two_keys_is_merged_for_one_only():
    session = fields(seen=[], bought=[])
    session["seen"] = session["bought"] = ["mine"]
    session.rebase({b"d:seen": b'version2s["theirs"]'})
    assert session["seen"] == ["theirs", "mine"]
    assert session["bought"] == ["mine"]


def test_merge_compares_what_a_reader_would_find():
    session = fields(cart={"1": ["a"]})
    session["cart"] = {1: ("a", "mine")}
    session.rebase({b"d:cart": b'version2s{"1":["a","theirs"]}'})
    assert session["cart"] == {"1": ["a", "theirs", "mine"]}


def test_removal_on_both_sides_is_no_change():
    session = fields(a=1)
    del session["a"]
    session.rebase({b"d:a": b""})
    assert not session.changes()


# What the lock needs: to load afresh under changes, and to forget changes.


def now_stored(version=b"version2", **values):
    """Return what the store holds now; counters are given as bytes."""
    return {
        f"d:{key}".encode(): version
        + (b"i" + value if type(value) is bytes else b"s" + JSONSerializer().dumps(value))
        for key, value in values.items()
    }


class TestRefresh:
    """Refreshing takes the store's values, with the changes made here on top."""

    def test_refresh_without_changes_gives_what_is_stored(self):
        session = fields(read=[1], waiting=1, gone=1, also_gone=1)
        assert (session["read"], session["gone"]) == ([1], 1)
        session.refresh(now_stored(read=[2], waiting=2, new=3))
        assert session.copy() == {"read": [2], "waiting": 2, "new": 3}
        assert not session.changes() and not session.changed_in_place()

    def test_change_stays_on_top(self):
        session = fields(a=1, b=1)
        session["a"] = 2
        session.refresh(stored({"a": 1}) | now_stored(b=5))
        assert session.copy() == {"a": 2, "b": 5}
        assert changes(session) == {b"d:a": Change(Operation.SET, b"d:a", VERSION, b"s2")}

    def test_new_key_stays_on_top(self):
        session = fields(a=1)
        session["new"] = 1
        session.refresh(now_stored(a=5))
        assert session.copy() == {"a": 5, "new": 1}
        assert changes(session) == {b"d:new": Change(Operation.SET, b"d:new", b"", b"s1")}

    def test_changed_value_that_others_removed_is_mine(self):
        session = fields(a=1)
        session["a"] = 2
        session.refresh({})
        assert changes(session) == {b"d:a": Change(Operation.SET, b"d:a", b"", b"s2")}

    def test_removal_stays_on_top(self):
        session = fields(a=1, b=1, c={"x": 1})
        del session["a"], session["b"], session["c"]
        session.refresh(stored({"a": 1}) | now_stored(c={"x": 1, "theirs": 2}))
        assert session.copy() == {"c": {"theirs": 2}}, "an addition survives a removal"
        assert changes(session) == {
            b"d:a": Change(Operation.REMOVE, b"d:a", VERSION, b""),
            b"d:c": Change(Operation.SET, b"d:c", b"version2", b's{"theirs":2}'),
        }

    def test_change_in_place_is_merged_into_what_others_wrote(self):
        session = fields(cart={"tea": 1, "lines": [1]})
        cart = session["cart"]
        cart["lines"].append(2)
        session.refresh(now_stored(cart={"tea": 5, "lines": [1, 3]}))
        assert cart is session["cart"], "a view may still hold it"
        assert cart == {"tea": 5, "lines": [1, 3, 2]}
        assert changes(session)[b"d:cart"].loaded == b"version2"

    def test_merge_that_leaves_nothing_to_write_is_no_change(self):
        session = fields(a=1)
        session["a"] = 2
        session.refresh(now_stored(a=2))
        assert not session.changes()

    def test_counter_is_added_to_what_the_store_holds(self):
        session = SessionData(JSONSerializer(), {b"d:n": VERSION + b"i5", b"d:m": VERSION + b"i5"})
        session.increment("n", 2)
        session.increment("m", 2)
        session.increment("new", 2)
        session.refresh({b"d:n": VERSION + b"i5"} | now_stored(m=b"10", new=b"1"))
        assert session.copy() == {"n": 7, "m": 12, "new": 3}
        assert {change.operand for change in session.changes().fields} == {b"2"}
        assert session.increment("m", 1) == 13
        assert changes(session)[b"d:m"] == Change(Operation.ADD, b"d:m", b"", b"3")

    def test_counter_that_is_no_integer_any_more_is_refused(self):
        session = fields(n=5)
        session.increment("n", 1)
        with pytest.raises(TypeError, match="'n'"):
            session.refresh(now_stored(n="text"))

    def test_counter_that_others_made_of_an_integer_is_known(self):
        session = fields(n=5)
        assert session["n"] == 5
        session.refresh(now_stored(n=b"6"))
        assert session.increment("n", 1) == 7
        assert changes(session) == {b"d:n": Change(Operation.ADD, b"d:n", b"", b"1")}

    def test_cleared_copy_stays_cleared_by_a_refresh(self):
        session = SessionData(JSONSerializer(), cleared=True)
        session["a"] = 1
        session.refresh(now_stored(a=2, b=2))
        assert session.copy() == {"a": 1}
        assert session.changes().cleared

    def test_refresh_reads_unreadable_values_anew(self):
        told = []
        session = SessionData(
            JSONSerializer(),
            {b"d:a": VERSION + b"?", b"d:b": VERSION + b"s1", b"d:c": VERSION + b"?"},
            on_unreadable=lambda key, error: told.append(key),
        )
        assert session.copy() == {"b": 1}
        session.refresh(now_stored(a=2) | {b"d:b": b"version2?", b"d:c": VERSION + b"?"})
        assert session.copy() == {"a": 2}
        assert told == ["a", "c", "b"]
        assert not session.changes()
        assert dict(session.everything())[b"d:c"] == b"?"

    def test_new_value_of_an_unreadable_one_stays_on_top(self):
        session = SessionData(JSONSerializer(), {b"d:a": VERSION + b"?"})
        session["a"] = 1
        session.refresh({b"d:a": b"version2?"})
        assert changes(session) == {b"d:a": Change(Operation.SET, b"d:a", b"version2", b"s1")}

    def test_unreadable_key_is_set_aside(self):
        odd = {b"k:not json": VERSION + b"s1"}
        session = SessionData(JSONSerializer(), stored({"a": 1}) | odd)
        session.refresh(
            now_stored(a=2) | {b"k:not json": b"version2s1", b"k:nor this": b"12345678s1"}
        )
        assert session.copy() == {"a": 2}
        assert not session.changes()
        assert {b"k:not json", b"k:nor this"} < dict(session.everything()).keys()
        session.refresh(now_stored(a=2))
        assert dict(session.everything()).keys() == {b"d:a"}

    def test_settled_value_is_known_anew(self):
        session = fields(cart={"tea": 1})
        assert session["cart"]
        session.settle()
        session.refresh(now_stored(cart={"tea": 2}))
        assert session["cart"] == {"tea": 2}
        assert not session.changed_in_place()

    def test_value_that_cannot_be_written_is_named(self):
        session = fields(a=1)
        session["a"] = object()
        with pytest.raises(TypeError, match="'a'"):
            session.refresh(now_stored(a=2))


class TestRestore:
    """Restoring forgets the changes since a snapshot, and nothing else."""

    def restored(self, session, change):
        before, delta = deepcopy(session.copy()), session.changes()
        snapshot = session.snapshot()
        change(session)
        session.restore(snapshot)
        assert session.copy() == before
        assert session.changes() == delta
        return session

    def test_each_kind_of_change_is_forgotten(self):
        def change(session):
            session["a"] = 2
            session["new"] = 1
            session["cart"]["tea"].append(2)
            del session["b"]
            session.increment("n", 3)

        session = fields(a=1, b=1, cart={"tea": [1]}, n=1)
        assert not self.restored(session, change).changes()

    def test_each_kind_of_change_from_before_is_kept(self):
        session = SessionData(
            JSONSerializer(),
            stored({"a": 1, "b": 1, "cart": {"tea": [1]}, "n": 1}) | {b"d:m": VERSION + b"i1"},
        )
        session["a"] = 2
        session["new"] = {"x": 1}
        session["cart"]["tea"].append(2)
        del session["b"]
        session.increment("n", 3)
        session.increment("m", 3)

        def change(session):
            session["a"] = 3
            session["new"]["x"] = 2
            session["cart"].clear()
            session["b"] = 5
            session.increment("n", 1)
            session.increment("m", 1)
            session["other"] = 1

        session = self.restored(session, change)
        assert session.increment("n", 1) == session.increment("m", 1) == 5
        assert changes(session)[b"d:m"] == Change(Operation.ADD, b"d:m", b"", b"4")

    def test_removal_is_undone_and_redone(self):
        session = fields(a=1, b=1)
        del session["a"]

        def change(session):
            session["a"] = 1
            del session["b"]

        assert self.restored(session, change).copy() == {"b": 1}

    def test_counter_whose_sum_is_nothing_stays_one(self):
        session = SessionData(JSONSerializer(), {b"d:n": VERSION + b"i5"})
        session.increment("n", 1)
        session.increment("n", -1)
        self.restored(session, lambda session: session.increment("n", 7))
        session.increment("n", 1)
        assert session.changes().fields == (Change(Operation.ADD, b"d:n", b"", b"1"),)

    def test_cleared_copy_stays_cleared_by_a_restore(self):
        session = SessionData(JSONSerializer(), cleared=True)
        session["a"] = 1

        def change(session):
            session["a"] = 2
            session["b"] = 1

        assert self.restored(session, change).changes().cleared

    def test_unreadable_value_stays_set_aside(self):
        told = []
        values = stored({"a": 1}) | {b"d:bad": VERSION + b"?", b"d:odd": VERSION + b"?"}
        session = SessionData(
            JSONSerializer(), values, on_unreadable=lambda *what: told.append(what)
        )
        session["odd"] = 1

        def change(session):
            session["bad"] = 1
            session["odd"] = 2

        session = self.restored(session, change)
        assert session.copy() == {"a": 1, "odd": 1}
        assert [key for key, _ in told] == ["bad"], "told once"
        assert dict(session.everything())[b"d:bad"] == b"?"

    def test_writes_of_others_before_the_snapshot_are_kept(self):
        session = fields(cart={"tea": 1}, other=1)
        session["cart"]["milk"] = 1
        session.refresh(now_stored(cart={"tea": 1, "rice": 1}, other=2))

        def change(session):
            session["cart"].clear()
            session["other"] = 3

        session = self.restored(session, change)
        assert session.copy() == {"cart": {"tea": 1, "rice": 1, "milk": 1}, "other": 2}

    def test_value_that_became_readable_is_not_set_aside_again(self):
        session = SessionData(JSONSerializer(), {b"d:a": VERSION + b"?"})
        session["a"] = {"mine": 1}
        session.refresh(now_stored(a={"theirs": 1}))
        self.restored(session, lambda session: session["a"].clear())

    def test_restore_leaves_no_change_in_place(self):
        session = fields(cart={"tea": 1})
        snapshot = session.snapshot()
        session["cart"]["tea"] = 2
        session.settle()
        session.restore(snapshot)
        assert not session.changed_in_place()


# The same at random.

some_keys = st.sampled_from("abc")
some_values = st.recursive(
    st.sampled_from([0, 1, "x", True, None]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("xy"), inner, max_size=2)
    ),
    max_leaves=4,
)
records = st.dictionaries(some_keys, some_values)
actions = st.lists(
    st.tuples(some_keys, st.sampled_from(["set", "remove", "edit", "count", "read"]), some_values)
)


def act(session, steps):
    for key, action, value in steps:
        present = session.get(key)
        if action == "set":
            session[key] = deepcopy(value)
        elif action == "remove":
            session.pop(key, None)
        elif action == "edit" and isinstance(present, dict):
            present["x"] = deepcopy(value)
        elif action == "edit" and isinstance(present, list):
            present.append(deepcopy(value))
        elif action == "count" and type(session.get(key, 0)) is int:
            session.increment(key, 2)


def applied(values, delta):
    """Return what the store holds after a write, by the meaning of each operation."""
    result = {} if delta.cleared else dict(values)
    for change in delta.fields:
        before = result.pop(change.field, b"")
        if change.operation is Operation.ADD:
            assert not before or before[8:9] == b"i", "the store would refuse it"
            result[change.field] = b"version3i%d" % (int(before[9:] or 0) + int(change.operand))
            continue
        assert change.loaded == before[:8] or delta.cleared, "the store would refuse it"
        if change.operation is not Operation.REMOVE:
            result[change.field] = b"version3" + change.operand
    return result


def as_json(values):
    return json.loads(json.dumps(dict(values), sort_keys=True))


def stored_with_counters(values, version):
    return {
        f"d:{key}".encode(): version
        + (b"i%d" % value if type(value) is int else b"s" + json.dumps(value).encode())
        for key, value in values.items()
    }


@given(records, records, st.sets(some_keys), actions)
def test_refreshed_copy_is_written_as_it_reads(before, after, moved, steps):
    loaded = stored_with_counters(before, VERSION)
    session = SessionData(JSONSerializer(), loaded)
    act(session, steps)
    changed = {key for key in "abc" if f"d:{key}".encode() in changes(session)}
    mine = as_json(session)
    now = {field: value for field, value in loaded.items() if field[2:].decode() not in moved}
    now |= {
        field: value
        for field, value in stored_with_counters(after, b"version2").items()
        if field[2:].decode() in moved
    }
    try:
        session.refresh(now)
    except TypeError as error:
        assert "cannot be incremented" in str(error)
        return
    delta = session.changes()
    written = SessionData(JSONSerializer(), applied(now, delta))
    assert as_json(session) == as_json(written)
    for key in "abc":
        if key not in changed:
            theirs = SessionData(JSONSerializer(), now)
            assert same(session.get(key, NOTHING), theirs.get(key, NOTHING))
        elif key not in moved:
            assert same(session.get(key, NOTHING), mine.get(key, NOTHING))


@given(records, actions, actions, st.booleans())
def test_restored_copy_is_what_it_was(before, earlier, later, cleared):
    values = None if cleared else stored_with_counters(before, VERSION)
    session = SessionData(JSONSerializer(), values, cleared=cleared)
    act(session, earlier)
    was, delta, snapshot = as_json(session), session.changes(), session.snapshot()
    act(session, later)
    session.restore(snapshot)
    assert as_json(session) == was
    assert sorted(session.changes().fields, key=repr) == sorted(delta.fields, key=repr)
    assert session.changes().sums == delta.sums
