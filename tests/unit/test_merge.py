from __future__ import annotations

import json
import sys
from collections import OrderedDict
from copy import deepcopy
from itertools import product
from typing import Any

import pytest
from django.contrib.messages import constants
from django.contrib.messages.storage.base import Message
from django.contrib.messages.storage.cookie import MessageDecoder, MessageEncoder
from hypothesis import given
from hypothesis import strategies as st

from django_clustered_sessions.protocol.merge import MESSAGES_KEY, MISSING, merge
from tests.serializers import Array

NAN = float("nan")


def exact(value: Any) -> str:
    """Write a JSON value so that equal text means equal types and values, dict order apart."""
    return "missing" if value is MISSING else json.dumps(value, sort_keys=True)


def messages(*texts: str) -> str:
    """Write the messages as Django's session storage does."""
    return MessageEncoder().encode([Message(constants.INFO, text) for text in texts])


def containers(value: Any) -> dict[int, Any]:
    """Return every mutable container in the value, by its id."""
    found = {}
    if isinstance(value, (dict, list)):
        found[id(value)] = value
        for item in value.values() if isinstance(value, dict) else value:
            found |= containers(item)
    return found


CASES: dict[str, tuple[Any, Any, Any, Any]] = {
    # name: (base, mine, theirs, merged)
    # Dicts, key by key.
    "dict: both added": ({"a": 1}, {"a": 1, "m": 1}, {"a": 1, "t": 1}, {"a": 1, "t": 1, "m": 1}),
    "dict: both created it": (MISSING, {"m": 1}, {"t": 1}, {"t": 1, "m": 1}),
    "dict: I changed, they added": ({"a": 1}, {"a": 2}, {"a": 1, "t": 1}, {"a": 2, "t": 1}),
    "dict: I removed, they changed": ({"a": 1, "b": 1}, {"b": 1}, {"a": 1, "b": 2}, {"b": 2}),
    "dict: each removed one": ({"a": 1, "b": 1}, {"a": 1}, {"b": 1}, {}),
    "dict: both changed a scalar": ({"a": 1}, {"a": 2}, {"a": 3}, {"a": 2}),
    "dict: both changed it alike": ({"a": 1}, {"a": 2}, {"a": 2, "t": 1}, {"a": 2, "t": 1}),
    "dict: I removed the scalar that they changed": (
        {"a": 1, "b": 1},
        {"b": 1},
        {"a": 2, "b": 1},
        {"b": 1},
    ),
    "dict: they removed the scalar that I changed": (
        {"a": 1, "b": 1},
        {"a": 2, "b": 1},
        {"b": 1},
        {"a": 2, "b": 1},
    ),
    "dict: nested": (
        {"lines": {"tea": {"qty": 1, "gift": False}}},
        {"lines": {"tea": {"qty": 2, "gift": False}}},
        {"lines": {"tea": {"qty": 1, "gift": True}, "pot": {"qty": 1}}},
        {"lines": {"tea": {"qty": 2, "gift": True}, "pot": {"qty": 1}}},
    ),
    "dict: list inside": (
        {"seen": [1]},
        {"seen": [1, 2], "n": 1},
        {"seen": [1, 3]},
        {"seen": [1, 3, 2], "n": 1},
    ),
    "dict: None is a value": ({"a": None}, {"a": None, "m": None}, {}, {"m": None}),
    # Lists.
    "list: both appended": ([1], [1, 2, 3], [1, 4, 5], [1, 4, 5, 2, 3]),
    "list: both created it": (MISSING, [1], [2], [2, 1]),
    "list: both started from empty": ([], [1], [2], [2, 1]),
    "list: one addition is alike": ([], [1], [1, 2], [1, 2, 1]),
    "list: the same appended": ([1], [1, 2], [1, 2], [1, 2]),
    "list: I emptied, they appended": ([1, 2], [], [1, 2, 3], [3]),
    "list: they emptied, I appended": ([1, 2], [1, 2, 3], [], [3]),
    "list: both emptied": ([1, 2], [], [], []),
    "list: I cut off its head": ([1, 2], [2, 3], [1, 2, 4], [2, 3]),
    "list: they cut off its head": ([1, 2], [1, 2, 3], [2, 4], [1, 2, 3]),
    "list: I changed an item": ([{"q": 1}], [{"q": 2}], [{"q": 1}, {"q": 9}], [{"q": 2}]),
    "list: they rewrote it, I emptied it": ([1, 2], [], [2, 3], []),
    "list: I rewrote it, they emptied it": ([1, 2], [2, 3], [], [2, 3]),
    "list: I rewrote it, they did nothing": ([1, 2], [3], [1, 2], [3]),
    "list: they rewrote it, I did nothing": ([1, 2], [1, 2], [3], [3]),
    # A container deleted or emptied against a change.
    "emptied: I deleted, they added": ({"a": 1}, MISSING, {"a": 1, "t": 1}, {"t": 1}),
    "emptied: they deleted, I added": ({"a": 1}, {"a": 1, "m": 1}, MISSING, {"m": 1}),
    "emptied: I deleted, they changed": ({"a": 1}, MISSING, {"a": 2}, MISSING),
    "emptied: they deleted, I changed": ({"a": 1}, {"a": 2}, MISSING, MISSING),
    "emptied: I cleared, they changed": ({"a": 1}, {}, {"a": 2}, {}),
    "emptied: they cleared, I changed": ({"a": 1}, {"a": 2}, {}, {}),
    "emptied: they cleared, I added": ({"a": 1}, {"a": 2, "m": 1}, {}, {"m": 1}),
    "emptied: I deleted, they removed": ({"a": 1, "b": 1}, MISSING, {"a": 1}, MISSING),
    "emptied: I deleted, they cleared": ({"a": 1}, MISSING, {}, MISSING),
    "emptied: both deleted": ({"a": 1}, MISSING, MISSING, MISSING),
    "emptied: they deleted, I added deep": (
        {"lines": {"tea": {"qty": 1}}, "n": 1},
        {"lines": {"tea": {"qty": 2, "gift": True}}, "n": 2},
        MISSING,
        {"lines": {"tea": {"gift": True}}},
    ),
    "emptied: I deleted, they added deep": (
        {"lines": {"tea": {"qty": 1}}, "n": 1},
        MISSING,
        {"lines": {"tea": {"qty": 2, "gift": True}}, "n": 2},
        {"lines": {"tea": {"gift": True}}},
    ),
    "emptied: they cleared, I changed deep": ({"tea": {"qty": 1}}, {"tea": {"qty": 2}}, {}, {}),
    "emptied: they cleared, I rewrote a list in it": ({"l": [1, 2]}, {"l": [2]}, {}, {}),
    "emptied: nested, I deleted": (
        {"tea": {"qty": 1}, "n": 1},
        {"n": 1},
        {"tea": {"qty": 2, "gift": True}, "n": 1},
        {"tea": {"gift": True}, "n": 1},
    ),
    "emptied: nested, nothing added": (
        {"tea": {"qty": 1}, "n": 1},
        {"tea": {"qty": 2}, "n": 1},
        {"n": 1},
        {"n": 1},
    ),
    "emptied: list deleted, they appended": ([1], MISSING, [1, 2], [2]),
    "emptied: list deleted, I appended": ([1], [1, 2], MISSING, [2]),
    "emptied: list deleted, they cleared it": ([1], MISSING, [], MISSING),
    "emptied: list deleted, they rewrote it": ([1, 2], MISSING, [2], MISSING),
    "emptied: an empty dict deleted": ({}, MISSING, {}, MISSING),
    "emptied: an empty dict deleted by them": ({}, {}, MISSING, MISSING),
    "emptied: an empty dict created": (MISSING, {}, MISSING, {}),
    "emptied: an empty list created by them": (MISSING, MISSING, [], []),
    # All else: the last write, which is mine.
    "scalar: both changed": (1, 2, 3, 2),
    "scalar: I changed, they deleted": (1, 2, MISSING, 2),
    "scalar: I deleted, they changed": (1, MISSING, 2, MISSING),
    "scalar: they deleted, I did nothing": (1, 1, MISSING, MISSING),
    "scalar: both created it": (MISSING, 1, 2, 1),
    "type: dict to list": ({"a": 1}, [1], {"a": 1, "t": 1}, [1]),
    "type: dict to list by them": ({"a": 1}, {"a": 1, "m": 1}, ["a"], {"a": 1, "m": 1}),
    "type: scalar to dict": (None, {"m": 1}, {"t": 1}, {"m": 1}),
    "type: dict to scalar": ({"a": 1}, None, {"a": 2}, None),
    "type: nested": ({"a": {"b": 1}}, {"a": [1]}, {"a": {"b": 2}, "t": 1}, {"a": [1], "t": 1}),
    "type: I did nothing": ({"a": 1}, {"a": 1}, [1], [1]),
    "text is no list": ("ab", "abc", "abd", "abc"),
    # True == 1 == 1.0, and NaN != NaN: neither may hide a change or make one up.
    "equality: I made True of 1": ({"a": 1}, {"a": True}, {"a": 1}, {"a": True}),
    "equality: they made True of 1": ({"a": 1}, {"a": 1}, {"a": True}, {"a": True}),
    "equality: they made 1.0 of 1": (1, 1, 1.0, 1.0),
    "equality: they made -0.0 of 0.0": (0.0, 0.0, -0.0, -0.0),
    "equality: within a list": ([[1]], [[1]], [[True]], [[True]]),
    "equality: within a dict in a list": ([{"a": 1}], [{"a": True}], [{"a": 1}], [{"a": True}]),
    "equality: I changed a list's head to True": ([1], [True, 2], [1, 3], [True, 2]),
    "equality: I left NaN alone": (NAN, float("nan"), 1, 1),
    "equality: NaN heads both lists": ([NAN], [float("nan"), 1], [float("nan"), 2], [NAN, 2, 1]),
    "equality: dicts in a list": (
        [{"a": [1]}],
        [{"a": [1]}, {"m": 1}],
        [{"a": [1]}, {"t": 1}],
        [{"a": [1]}, {"t": 1}, {"m": 1}],
    ),
    "equality: a list's dict lost a key": ([{"a": 1, "b": 1}], [{"a": 1}], [], [{"a": 1}]),
}


@pytest.mark.parametrize(("base", "mine", "theirs", "merged"), CASES.values(), ids=CASES.keys())
def test_values_merge_by_the_table(base: Any, mine: Any, theirs: Any, merged: Any) -> None:
    assert exact(merge("cart", base, mine, theirs)) == exact(merged)


def test_new_keys_follow_theirs_then_mine() -> None:
    merged = merge("cart", {"a": 1}, {"m": 1, "a": 2}, {"a": 1, "t": 1})
    assert list(merged) == ["a", "t", "m"]
    assert list(merge("cart", {}, {"m": 1}, {"t": 1})) == ["t", "m"]


@pytest.mark.parametrize("kind", [tuple, OrderedDict.fromkeys])
def test_values_that_only_pickle_carries_are_mine(kind: Any) -> None:
    base, mine, theirs = kind([1]), kind([1, 2]), kind([1, 3])
    assert merge("cart", base, mine, theirs) == mine
    assert type(merge("cart", base, mine, theirs)) is type(mine)
    assert merge("cart", base, kind([1]), theirs) == theirs
    assert merge("cart", {"k": base}, {"k": mine}, {"k": theirs, "t": 1}) == {"k": mine, "t": 1}


class Quarrelsome(Array):
    """Value whose ``==`` raises."""

    def __eq__(self, other: object) -> Any:
        raise ZeroDivisionError

    __hash__ = None  # type: ignore[assignment]


class Unpicklable(Array):
    """Value that can be neither compared nor pickled."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("no pickle")

    def __deepcopy__(self, memo: Any) -> Unpicklable:
        return Unpicklable(*self.numbers)


class Uncopyable(Array):
    """Value that cannot be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError


ODD = [Array, Quarrelsome, Unpicklable, Uncopyable]
WRAPS: dict[str, Any] = {
    "plain": lambda value: value,
    "in a dict": lambda value: {"chart": value},
    "in a list": lambda value: ["chart", value],
    "in a tuple": lambda value: ("chart", value),
    "deeper": lambda value: {"page": [{"chart": (value,)}]},
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("key", ["v", MESSAGES_KEY])
def test_values_without_a_truth_of_equality_are_mine(kind: Any, wrap: Any, key: str) -> None:
    base, mine, theirs = (wrap(kind(n, n)) for n in (1, 2, 3))
    assert repr(merge(key, base, mine, theirs)) == repr(mine)
    # By the rules of the containers, where it is in one.
    for versions in product((base, MISSING), (mine, MISSING), (theirs, MISSING)):
        merge(key, *versions)


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("kind", [Array, Quarrelsome])
def test_array_that_i_left_alone_takes_the_change(kind: Any, wrap: Any) -> None:
    base, mine, theirs = (wrap(kind(n, n)) for n in (1, 1, 3))
    assert repr(merge("v", base, mine, theirs)) == repr(theirs)
    both = merge("v", {"a": base, "b": 1}, {"a": mine, "b": 2}, {"a": theirs, "b": 1})
    assert repr(both) == repr({"a": theirs, "b": 2})


def test_arrays_of_other_shapes_are_a_change() -> None:
    # Element by element these are equal as far as there are any.
    for theirs in (Array(), Array(1)):
        assert merge("v", Array(1, 1), Array(1, 1), theirs) is not MISSING
        assert repr(merge("v", Array(1, 1), Array(1, 1), theirs)) == repr(theirs)


def test_tuple_knows_true_from_one() -> None:
    assert merge("cart", (1,), (True,), (1,))[0] is True


MESSAGE_CASES: dict[str, tuple[Any, Any, Any, Any]] = {
    "both added": (messages("a"), messages("a", "m"), messages("a", "t"), messages("a", "t", "m")),
    "both added the first": (MISSING, messages("m"), messages("t"), messages("t", "m")),
    "both added the same": (MISSING, messages("x"), messages("x"), messages("x")),
    "I consumed, they added": (messages("a"), MISSING, messages("a", "t"), messages("t")),
    "they consumed, I added": (messages("a"), messages("a", "m"), MISSING, messages("m")),
    "I left an empty list": (messages("a"), "[]", messages("a", "t"), messages("t")),
    "I left an empty list, they did nothing": (messages("a"), "[]", messages("a"), "[]"),
    "I consumed and added": (
        messages("a"),
        messages("m"),
        messages("a", "t"),
        messages("t", "m"),
    ),
    "they consumed and added": (
        messages("a"),
        messages("a", "m"),
        messages("t"),
        messages("t", "m"),
    ),
    "both consumed and added": (messages("a"), messages("m"), messages("t"), messages("t", "m")),
    "I consumed, they did nothing": (messages("a"), MISSING, messages("a"), MISSING),
    "both consumed": (messages("a"), MISSING, "[]", MISSING),
    "not ASCII": (MISSING, messages("ö"), messages("\u2713"), messages("\u2713", "ö")),
    "mine is no JSON": (messages("a"), "[", messages("a", "t"), "["),
    "theirs is no JSON": (messages("a"), messages("a", "m"), "", messages("a", "m")),
    "base is no JSON": ("[", messages("m"), messages("t"), messages("m")),
    "no list": (messages("a"), '{"m": 1}', messages("a", "t"), '{"m": 1}'),
    "nor text": (messages("a"), None, messages("a", "t"), None),
    "a list that another storage keeps": (["a"], ["a", "m"], ["a", "t"], ["a", "t", "m"]),
    "text and list": (messages("a"), ["m"], messages("a", "t"), ["m"]),
    "nested too deeply for JSON": ("[]", "[1]", "[" * 100_000 + "]" * 100_000, "[1]"),
    "a number too long for Python": ("[]", "[1]", f"[{'1' * 10_000}]", "[1]"),
}


@pytest.mark.parametrize(
    ("base", "mine", "theirs", "merged"), MESSAGE_CASES.values(), ids=MESSAGE_CASES.keys()
)
def test_messages_merge_by_the_table(base: Any, mine: Any, theirs: Any, merged: Any) -> None:
    assert merge(MESSAGES_KEY, base, mine, theirs) == merged


def test_merged_messages_are_messages_to_django() -> None:
    merged = merge(MESSAGES_KEY, messages("a"), messages("a", "m"), messages("a", "t"))
    decoded = json.loads(merged, cls=MessageDecoder)
    assert decoded == [Message(constants.INFO, text) for text in ("a", "t", "m")]


def test_only_the_messages_key_holds_messages() -> None:
    assert merge("cart", "[1]", "[1, 2]", "[1, 3]") == "[1, 2]"


def nest(leaf: Any, depth: int, kind: type) -> Any:
    for _ in range(depth):
        leaf = {"k": leaf} if kind is dict else [leaf]
    return leaf


@pytest.mark.parametrize("kind", [dict, list])
def test_values_nested_too_deeply_are_mine_as_a_whole(kind: type) -> None:
    depth = sys.getrecursionlimit() * 2
    base, mine, theirs = (nest(leaf, depth, kind) for leaf in (["b"], ["b", "m"], ["b", "t"]))
    assert merge("cart", base, mine, theirs) is mine


def test_hundred_levels_are_not_too_deep() -> None:
    base, mine, theirs = (nest(leaf, 100, dict) for leaf in (["b"], ["b", "m"], ["b", "t"]))
    assert merge("cart", base, mine, theirs) == nest(["b", "t", "m"], 100, dict)


# Few keys and few leaves, so that the sides often meet; the leaves are the traps of equality.
leaves = st.sampled_from([None, True, False, 0, 1, 0.0, -0.0, 1.0, NAN, "", "a", "[]", "[1]", "{"])
keys = st.sampled_from(["a", "b", "c"])
json_values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def edits(draw: st.DrawFn, value: Any) -> Any:
    """Draw what a request may make of the value: nothing, parts changed, deleted, another one."""
    if isinstance(value, dict) and draw(st.booleans()):
        edited = {key: draw(edits(item)) for key, item in value.items()}
        kept = {key: item for key, item in edited.items() if item is not MISSING}
        return kept | draw(st.dictionaries(keys, json_values, max_size=1))
    if isinstance(value, list) and draw(st.booleans()):
        return deepcopy(value) + draw(st.lists(json_values, max_size=2))
    return draw(st.just(value).map(deepcopy) | st.just(MISSING) | json_values)


versions = (json_values | st.just(MISSING)).flatmap(
    lambda base: st.tuples(st.just(base), edits(base), edits(base))
)
session_keys = st.sampled_from(["cart", MESSAGES_KEY])


@given(session_keys, versions)
def test_side_that_changed_nothing_takes_the_change(key: str, sides: tuple[Any, ...]) -> None:
    base, side, _ = sides
    assert exact(merge(key, base, deepcopy(base), side)) == exact(side)
    assert exact(merge(key, base, side, deepcopy(base))) == exact(side)


@given(session_keys, versions)
def test_same_change_twice_is_one_change(key: str, sides: tuple[Any, ...]) -> None:
    base, side, _ = sides
    assert exact(merge(key, base, side, deepcopy(side))) == exact(side)


@given(session_keys, versions)
def test_merge_leaves_its_arguments_as_they_are(key: str, sides: tuple[Any, ...]) -> None:
    before = [exact(side) for side in sides]
    merge(key, *sides)
    assert [exact(side) for side in sides] == before


@given(session_keys, versions)
def test_result_shares_no_container_with_base_or_theirs(key: str, sides: tuple[Any, ...]) -> None:
    base, mine, theirs = deepcopy(sides[0]), deepcopy(sides[1]), deepcopy(sides[2])
    merged = containers(merge(key, base, mine, theirs))
    assert not merged.keys() & (containers(base) | containers(theirs)).keys()


@given(
    base=st.dictionaries(keys, leaves),
    mine=st.dictionaries(st.sampled_from(["m1", "m2"]), json_values, min_size=1),
    theirs=st.dictionaries(st.sampled_from(["t1", "t2"]), json_values, min_size=1),
    path=st.lists(keys, max_size=6),
)
def test_changes_of_different_keys_survive_at_any_depth(
    base: dict[str, Any], mine: dict[str, Any], theirs: dict[str, Any], path: list[str]
) -> None:
    def at_path(value: Any) -> Any:
        for key in path:
            value = {"beside": 1, key: value}
        return value

    merged = merge("cart", at_path(base), at_path(base | mine), at_path(base | theirs))
    assert exact(merged) == exact(at_path(base | theirs | mine))


@given(
    base=st.dictionaries(keys, json_values, min_size=1),
    added=st.dictionaries(st.sampled_from(["n1", "n2"]), json_values, min_size=1),
    emptied=st.sampled_from([MISSING, {}]),
)
def test_additions_survive_an_emptying(
    base: dict[str, Any], added: dict[str, Any], emptied: Any
) -> None:
    assert exact(merge("cart", base, emptied, base | added)) == exact(added)
    assert exact(merge("cart", base, base | added, emptied)) == exact(added)


@given(session_keys, *[st.lists(json_values, max_size=4)] * 3)
def test_additions_to_a_list_survive_in_order(
    key: str, base: list[Any], mine: list[Any], theirs: list[Any]
) -> None:
    def stored(items: list[Any]) -> Any:
        return json.dumps(items) if key == MESSAGES_KEY else items

    merged = merge(key, stored(base), stored(base + mine), stored(base + theirs))
    expected = base + mine if exact(mine) == exact(theirs) else base + theirs + mine
    assert exact(merged) == exact(stored(expected))


anything = json_values | st.just(MISSING)


@given(session_keys, anything, anything, anything)
def test_merge_never_raises(key: str, base: Any, mine: Any, theirs: Any) -> None:
    exact(merge(key, base, mine, theirs))
