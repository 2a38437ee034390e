"""The flows, reply by reply, without a store."""

from __future__ import annotations

import pytest
from django.contrib.sessions.serializers import JSONSerializer

from django_clustered_sessions import flows
from django_clustered_sessions.commands import Call, Expiry, Gone, Terms
from django_clustered_sessions.exceptions import (
    SessionConflict,
    SessionStoreUnavailable,
    SessionTooLarge,
)
from django_clustered_sessions.fields import Fields
from django_clustered_sessions.record import EndReason, Loaded, Mode, NewerFormat, Place

PLACE = Place.of("session", "some key")
TERMS = Terms(1000, 0, 100_000, 4000, on_conflict="merge")
TOKEN = b"tokentok"
META = bytes.fromhex("0164" + "0102030405060708" + "000000000001" + "0000000000ff" + "00" * 10)
EXPIRY = Expiry(Mode.DEFAULT, 0)


class Rider:
    """Sends one call along, and remembers that a trip was lost."""

    is_lost = False

    def __init__(self, call):
        self.call = call

    def board(self, trip):
        return self.call

    def lost(self):
        self.is_lost = True


def play(flow, *replies):
    """Feed a flow its replies; return the trips it made and what it returned."""
    trips = [next(flow)]
    for reply in replies[:-1]:
        trips.append(flow.send(reply))
    with pytest.raises(StopIteration) as stop:
        flow.send(replies[-1])
    return trips, stop.value.value


def names(trip):
    return [call.script.name if call.script else call.arguments[0] for call in trip]


def loaded(**values):
    stored = {f"d:{key}".encode(): b"loadedv1s" + value for key, value in values.items()}
    return Fields(JSONSerializer(), stored)


def commit(fields, terms=TERMS):
    return flows.commit(PLACE, fields, lambda fields: EXPIRY, terms, lambda delta: TOKEN)


def test_a_load_is_one_trip_and_does_not_go_through_lua():
    trips, read = play(flows.load(PLACE), [{b"m:": META}, [b"0", b"2000"]])
    assert [names(trip) for trip in trips] == [["HGETALL", "TIME"]]
    assert isinstance(read.found, Loaded)
    assert read.now_ms == 2


def test_a_load_that_renews_is_one_trip():
    trips, _ = play(flows.load(PLACE, TERMS), [[1, 2, 255, b"d"], [b"m:", META], [b"0", b"2000"]])
    assert [names(trip) for trip in trips] == [["touch", "HGETALL", "TIME"]]


def test_what_expired_between_the_two_commands_of_a_load_is_gone():
    _, read = play(flows.load(PLACE), [{b"m:": META}, [b"0", b"255000"]])
    assert read.found is EndReason.UNKNOWN


def test_a_commit_of_nothing_renews():
    fields = loaded(a=b"1")
    assert fields["a"] == 1
    trips, committed = play(commit(fields), [[1, 5, 9, b"d"]])
    assert [names(trip) for trip in trips] == [["touch"]]
    assert committed.alive.deadline_ms == 9


def test_a_commit_sends_only_what_changed():
    fields = loaded(a=b"1", b=b"2")
    fields["a"] = 3
    assert fields["b"] == 2
    trips, committed = play(commit(fields), [[1, 5, 9, 0, b""]])
    assert trips[0][0].arguments[9:] == ("=", b"d:a", b"loadedv1", b"s3")
    assert committed.merged == 0
    assert not fields.delta()


def test_a_conflict_is_merged_and_sent_again_with_the_version_that_is_stored_now():
    fields = loaded(cart=b'{"a":1}')
    fields["cart"]["b"] = 2
    cart = fields["cart"]
    trips, committed = play(
        commit(fields),
        [[-2, 5, b"d:cart", b'othersv1s{"a":1,"c":3}']],
        [[1, 6, 9, 0, b""]],
    )
    operation, field, version, value = trips[1][0].arguments[9:]
    assert (operation, field, version) == ("=", b"d:cart", b"othersv1")
    assert JSONSerializer().loads(value[1:]) == {"a": 1, "b": 2, "c": 3}
    assert committed.merged == 1
    assert cart is fields["cart"], "a view may still hold what was merged into"


def test_a_merge_that_leaves_nothing_to_write_renews():
    fields = loaded(a=b"1")
    fields["a"] = 2
    trips, _ = play(commit(fields), [[-2, 5, b"d:a", b"othersv1s2"]], [[1, 6, 9, b"d"]])
    assert [names(trip) for trip in trips] == [["commit"], ["touch"]]


def test_three_conflicts_in_a_row_are_said():
    fields = loaded(a=b"1")
    fields["a"] = 2
    conflict = [[-2, 5, b"d:a", b"othersv1s3"]]
    flow = commit(fields)
    next(flow)
    flow.send(conflict)
    flow.send(conflict)
    with pytest.raises(SessionConflict) as caught:
        flow.send(conflict)
    assert caught.value.keys == ("a",)
    assert "some key" not in str(caught.value)


def test_a_counter_that_lua_cannot_add_to_is_added_to_here():
    fields = loaded(n=b"%d" % 2**60)
    fields.increment("n", 1)
    stored = b"othersv1s%d" % (2**60 + 5)
    trips, _ = play(commit(fields), [[-2, 5, b"d:n", stored]], [[1, 6, 9, 0, b""]])
    assert trips[0][0].arguments[9:] == ("#", b"d:n", b"loadedv1", b"s%d" % (2**60 + 1))
    assert trips[1][0].arguments[9:] == ("#", b"d:n", b"othersv1", b"s%d" % (2**60 + 6))


def test_a_counter_takes_the_sum_that_the_store_made():
    fields = Fields(JSONSerializer(), {b"d:n": b"loadedv1i1"})
    assert fields.increment("n", 1) == 2
    play(commit(fields), [[1, 6, 9, 0, b"7"]])
    assert fields["n"] == 7
    assert not fields.delta()


def test_gone_is_told_with_its_reason():
    fields = loaded(a=b"1")
    fields["a"] = 2
    _, gone = play(commit(fields), [[0, 5, b"flushed"]])
    assert gone == Gone(5, EndReason.FLUSHED)


def test_too_large_is_refused_before_it_is_sent_or_by_the_store():
    with pytest.raises(SessionTooLarge):
        next(flows.create(PLACE, [(b"d:a", b"s" * 100_000)], EXPIRY, TERMS, TOKEN))
    fields = loaded(a=b"1")
    fields["a"] = 2
    flow = commit(fields)
    next(flow)
    with pytest.raises(SessionTooLarge):
        flow.send([[-3, 5, 100_001]])


def test_a_newer_format_is_an_outage_not_a_logout():
    flow = flows.touch(PLACE, TERMS)
    next(flow)
    with pytest.raises(NewerFormat) as caught:
        flow.send([[-4, 5, b""]])
    assert isinstance(caught.value, SessionStoreUnavailable)


def test_a_passenger_rides_on_the_first_trip_only():
    fields = loaded(a=b"1")
    fields["a"] = 2
    passenger = Call(None, (), ("PING",))
    flow = flows.riding(commit(fields), Rider(passenger))
    trips, committed = play(flow, [b"PONG", [-2, 5, b"d:a", b"othersv1s3"]], [[1, 6, 9, 0, b""]])
    assert [names(trip) for trip in trips] == [["PING", "commit"], ["commit"]]
    assert committed.alive.deadline_ms == 9


def test_an_outage_reaches_the_flow_through_the_ride():
    def flow():
        try:
            yield (Call(None, (), ("TIME",)),)
        except SessionStoreUnavailable:
            return "told"

    rider = Rider(None)
    riding = flows.riding(flow(), rider)
    next(riding)
    with pytest.raises(StopIteration) as stop:
        riding.throw(SessionStoreUnavailable("away"))
    assert stop.value.value == "told"
    assert rider.is_lost
