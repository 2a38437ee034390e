"""Routing to the nodes of a cluster, reply by reply: see `store.nodes`."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from redis.crc import key_slot
from redis.exceptions import AskError, MovedError

from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.protocol.effects import Call, Pause
from django_clustered_sessions.store.cluster import NodeAddress, Nodes, SlotMap

NODES = [NodeAddress("a", 1), NodeAddress("b", 2), NodeAddress("c", 3)]


class Money:
    left = 2.0

    def spend(self, seconds: float) -> None:
        self.left -= seconds


def routed(*keys: str) -> tuple[Any, Money]:
    """Return the flow that asks for keys on nodes that are known, and its first step."""
    money = Money()
    trip = tuple(Call(None, (key,) if key else (), ("GET",)) for key in keys)
    return Nodes(known(), lambda node: node).asking(trip, money), money


def known() -> SlotMap:
    """Return a map in which each node has a third of the slots."""
    slots = SlotMap(NODES)
    thirds = [[n * 5462, min(n * 5462 + 5461, 16383), [b"%c" % (97 + n), n + 1]] for n in range(3)]
    learning = slots.refreshing(Money())
    next(learning)
    with pytest.raises(StopIteration):
        learning.send([thirds])
    return slots


def asked(step: Any) -> Any:
    if isinstance(step, Pause):
        return "pause"
    words = [" ".join([str(call.arguments[0]), *call.keys]) for call in step]
    return step.node.host, *words


def cut() -> SessionStoreUnavailable:
    error = SessionStoreUnavailable("cut")
    error.__cause__ = redis.ConnectionError("cut")
    return error


#: Keys whose slots are on the first, the second and the third node.
A, B, C = "x{3}", "x{1}", "x{0}"


def test_each_node_is_asked_for_its_own() -> None:
    flow, _ = routed(A, B, "", A, C)
    assert asked(next(flow)) == ("a", f"GET {A}", "GET", f"GET {A}")
    assert asked(flow.send([1, 2, 3])) == ("b", f"GET {B}")
    assert asked(flow.send([4])) == ("c", f"GET {C}")
    with pytest.raises(StopIteration) as stop:
        flow.send([5])
    assert stop.value.value == [1, 4, 2, 3, 5]


def test_lost_node_holds_up_no_other() -> None:
    """Leases on the others are renewed all the same; and nobody spins where two are lost."""
    flow, money = routed(A, B, C)
    first = next(flow)
    assert (asked(first), first.seconds) == (("a", f"GET {A}"), pytest.approx(2 / 3))
    refresh = flow.throw(cut())
    assert asked(refresh)[1] == "CLUSTER SLOTS"
    assert refresh.node != NODES[0]
    steps = []
    step = flow.throw(cut())
    for _ in range(40):
        steps.append(asked(step))
        if steps[-1] == "pause":
            break
        step = flow.send([2]) if steps[-1] == ("c", f"GET {C}") else flow.throw(cut())
    assert ("c", f"GET {C}") in steps
    assert steps[-1] == "pause"
    money.left = 0.0
    with pytest.raises(SessionStoreUnavailable, match="cut"):
        while True:
            flow.throw(cut())


def test_refusal_is_not_asked_again() -> None:
    flow, _ = routed(A)
    next(flow)
    with pytest.raises(SessionStoreUnavailable, match="wrong password"):
        flow.throw(SessionStoreUnavailable("wrong password"))


def test_calls_before_a_redirection_are_not_sent_again() -> None:
    flow, _ = routed(A, "", A)
    next(flow)
    step = flow.send([1, AskError("1 b:2"), 3])
    assert asked(step) == ("b", "ASKING", "GET", "ASKING", f"GET {A}")
    step = flow.send([b"OK", 2, b"OK", MovedError("5 c:3")])
    assert asked(step)[1] == "CLUSTER SLOTS"


class Replaced(dict[int, NodeAddress]):
    """A map of slots in whose place another thread puts one without slots as it is read."""

    def __init__(self, slots: SlotMap) -> None:
        super().__init__(slots.slot_map)
        self._slots = slots

    def __iter__(self) -> Any:
        self._slots.slot_map = {}
        return super().__iter__()

    def items(self) -> Any:
        self._slots.slot_map = {}
        return super().items()


@pytest.mark.parametrize("what", ["primaries", "ranges"])
def test_map_may_be_replaced_while_it_is_read(what: str) -> None:
    """As where a failover leaves slots without a node, and another thread has asked for the map."""
    slots = known()
    slots.slot_map = Replaced(slots)
    assert list(getattr(slots, what)) == NODES


def test_map_that_is_being_read_does_not_change() -> None:
    slots = SlotMap(NODES)
    slots.moved(5, NODES[1])
    reading = iter(slots.slot_map.items())
    slots.moved(6, NODES[2])
    assert list(reading) == [(5, NODES[1])]
    assert slots.primaries == NODES[1:]


def test_nodes_that_disagree_are_given_time() -> None:
    flow, money = routed(A)
    steps = [next(flow)]
    for _ in range(20):
        last = steps[-1]
        refresh = isinstance(last, tuple) and "SLOTS" in asked(last)[1]
        steps.append(flow.send([[]] if refresh else [MovedError(f"{key_slot(A.encode())} b:2")]))
        if isinstance(steps[-1], Pause):
            break
    assert isinstance(steps[-1], Pause)
    assert money.left < 2.0
