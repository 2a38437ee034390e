"""The flows, reply by reply, without a store."""

from __future__ import annotations

import inspect
from contextlib import contextmanager, nullcontext, suppress

import pytest
from django.contrib.sessions.serializers import JSONSerializer
from redis.exceptions import ResponseError

from django_clustered_sessions import exceptions
from django_clustered_sessions.exceptions import (
    SessionConflict,
    SessionLockLost,
    SessionLockRefused,
    SessionLockTimeout,
    SessionStoreUnavailable,
    SessionTooLarge,
)
from django_clustered_sessions.protocol import flows, riders
from django_clustered_sessions.protocol.effects import Call, Wait
from django_clustered_sessions.protocol.locks import LockRequest, Refusal
from django_clustered_sessions.protocol.options import (
    NO_LOCK,
    Expiry,
    Fence,
    LockOptions,
    SyncOptions,
    WriteOptions,
)
from django_clustered_sessions.protocol.record import (
    NOBODY,
    Ages,
    Damaged,
    EndReason,
    Loaded,
    Mode,
    NewerFormat,
    SessionKeys,
)
from django_clustered_sessions.protocol.results import Acknowledged, Alive, Ended, Exists, Gone
from django_clustered_sessions.protocol.session_data import SessionData

PLACE = SessionKeys.of("session", "some key")
TERMS = WriteOptions(Ages(1000), 100_000, 4000, on_conflict="merge")
TOKEN = b"tokentok"
META = bytes.fromhex("0164" + "0102030405060708" + "000000000001" + "0000000000ff" + "00" * 24)
EXPIRY = Expiry(Mode.DEFAULT, 0)
WRITTEN = [[1, 6, 9, 0, b"", b"versionb"]]

#: 10 s to wait, in slices of one second.
LOCKING = LockOptions(wait_ms=10_000, lease_ms=8000, hold_ms=120_000, most=16, name=b"web-1 GET /")
ASKING = LockRequest("a" * 16, LOCKING, 1000, lambda: None, nullcontext)
MAILBOX = PLACE.mailbox("a" * 16)
MAILBOXES = PLACE.mailbox("w" * 16), PLACE.ended_mailbox
WOKEN, NOT_WOKEN = True, False


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
    """Feed a flow its replies; return the steps it made and what it returned."""
    steps = [next(flow)]
    for reply in replies[:-1]:
        steps.append(flow.send(reply))
    with pytest.raises(StopIteration) as stop:
        flow.send(replies[-1])
    return steps, stop.value.value


def play_to_the_error(error, flow, *replies):
    """Feed a flow its replies; return the steps it made and the error that it ended with."""
    steps = [next(flow)]
    for reply in replies[:-1]:
        steps.append(flow.send(reply))
    with pytest.raises(error) as caught:
        flow.send(replies[-1])
    return steps, caught.value


def names(step):
    """Return the commands of a trip, and for how many seconds a wait is."""
    if isinstance(step, Wait):
        assert step.mailboxes == MAILBOXES
        return step.seconds
    return [call.script.name if call.script else call.arguments[0] for call in step]


def loaded(**values):
    stored = {f"d:{key}".encode(): b"loadedv1s" + value for key, value in values.items()}
    return SessionData(JSONSerializer(), stored)


def changes(trip):
    """Return what a trip's commit is to change: operation, field, version, operand, ..."""
    return trip[0].arguments[3:]


def lock_of(trip):
    """Return under which lock a trip's commit is written, and whether it ends with it."""
    _, fence, packed, *_ = trip[0].arguments
    return fence, packed[len(TERMS.packed)]


def commit(fields, terms=TERMS, fence=NO_LOCK, asks=lambda: ASKING, **options):
    return flows.commit(
        PLACE,
        fields,
        lambda fields: EXPIRY,
        terms,
        lambda delta: TOKEN,
        asks,
        fence,
        **options,
    )


def asks_anew():
    """Return what asks for a lock with tokens of zeros, then of ones."""
    asked = iter([ASKING._replace(token="0" * 16), ASKING._replace(token="1" * 16)])
    return lambda: next(asked)


def taken(now_ms=5):
    return [1, now_ms, now_ms]


def held(now_ms=5, place=1, left_ms=8000, before_ms=8000):
    return [-5, now_ms, 2, b"web-2 POST /pay", left_ms, place, b"w" * 16, before_ms]


def found(now_ms=5):
    """Return the replies to what follows the asking for a lock: a session, and the clock."""
    return [{b"m:": META}, [b"0", b"%d000" % now_ms]]


def test_load_is_one_trip_without_lua():
    trips, read = play(flows.load(PLACE), [{b"m:": META}, [b"0", b"2000"]])
    assert [names(trip) for trip in trips] == [["HGETALL", "TIME"]]
    assert isinstance(read.found, Loaded)
    assert read.now_ms == 2


def test_load_that_renews_is_one_trip():
    trips, _ = play(flows.load(PLACE, TERMS), [[1, 2, 255, b"d"], [b"m:", META], [b"0", b"2000"]])
    assert [names(trip) for trip in trips] == [["touch", "HGETALL", "TIME"]]


def test_session_that_expires_within_a_load_is_gone():
    _, read = play(flows.load(PLACE), [{b"m:": META}, [b"0", b"255000"]])
    assert read.found is EndReason.UNKNOWN


def test_commit_of_nothing_renews():
    fields = loaded(a=b"1")
    assert fields["a"] == 1
    trips, committed = play(commit(fields), [[1, 5, 9, b"d"]])
    assert [names(trip) for trip in trips] == [["touch"]]
    assert committed.alive.deadline_ms == 9


def test_commit_sends_only_what_changed():
    fields = loaded(a=b"1", b=b"2")
    fields["a"] = 3
    assert fields["b"] == 2
    trips, committed = play(commit(fields), [[1, 5, 9, 0, b"", b"versionb"]])
    assert changes(trips[0]) == ("=", b"d:a", b"loadedv1", b"s3")
    assert committed.merged == 0
    assert not fields.changes()


def test_conflict_is_merged_and_sent_with_the_stored_version():
    fields = loaded(cart=b'{"a":1}')
    fields["cart"]["b"] = 2
    cart = fields["cart"]
    trips, committed = play(
        commit(fields),
        [[-2, 5, b"d:cart", b'othersv1s{"a":1,"c":3}']],
        [[1, 6, 9, 0, b"", b"versionb"]],
    )
    operation, field, version, value = changes(trips[1])
    assert (operation, field, version) == ("=", b"d:cart", b"othersv1")
    assert JSONSerializer().loads(value[1:]) == {"a": 1, "b": 2, "c": 3}
    assert committed.merged == 1
    assert cart is fields["cart"], "a view may still hold what was merged into"


def test_merge_that_leaves_nothing_to_write_renews():
    fields = loaded(a=b"1")
    fields["a"] = 2
    trips, _ = play(commit(fields), [[-2, 5, b"d:a", b"othersv1s2"]], [[1, 6, 9, b"d"]])
    assert [names(trip) for trip in trips] == [["commit"], ["touch"]]


CONFLICT = [[-2, 5, b"d:a", b"othersv1s3"]]


def test_three_conflicts_in_a_row_queue_for_the_lock():
    fields = loaded(a=b"1")
    fields["a"] = 2
    steps, committed = play(
        commit(fields), CONFLICT, CONFLICT, CONFLICT, [held()], WOKEN, [taken()], WRITTEN
    )
    assert [names(step) for step in steps] == [
        *[["commit"]] * 3,
        ["acquire"],
        1.0,
        ["acquire"],
        ["commit"],
    ]
    assert [lock_of(step) for step in (steps[2], steps[-1])] == [("", 0), (ASKING.token, 1)]
    assert changes(steps[-1]) == ("=", b"d:a", b"othersv1", b"s2")
    assert committed.merged == 3
    assert committed.turn.handed_on


def test_conflicts_under_a_lock_never_queue_for_it():
    """Others write under it too: those whom its holder let in."""
    fields = loaded(a=b"1")
    fields["a"] = 2
    steps, _ = play(commit(fields, fence=Fence("b" * 16)), *[CONFLICT] * 5, WRITTEN)
    assert [names(step) for step in steps] == [["commit"]] * 6


def test_first_conflict_is_an_error_where_that_is_wanted():
    fields = loaded(a=b"1")
    fields["a"] = 2
    terms = WriteOptions(Ages(1000), 100_000, 4000, on_conflict="error")
    steps, error = play_to_the_error(SessionConflict, commit(fields, terms), CONFLICT)
    assert len(steps) == 1
    assert error.keys == ("a",)
    assert "some key" not in str(error)


def test_counter_too_large_for_lua_is_added_to_here():
    fields = loaded(n=b"%d" % 2**60)
    fields.increment("n", 1)
    stored = b"othersv1s%d" % (2**60 + 5)
    trips, _ = play(commit(fields), [[-2, 5, b"d:n", stored]], [[1, 6, 9, 0, b"", b"versionb"]])
    assert changes(trips[0]) == ("#", b"d:n", b"loadedv1", b"s%d" % (2**60 + 1))
    assert changes(trips[1]) == ("#", b"d:n", b"othersv1", b"s%d" % (2**60 + 6))


def test_counter_takes_the_sum_that_the_store_made():
    fields = SessionData(JSONSerializer(), {b"d:n": b"loadedv1i1"})
    assert fields.increment("n", 1) == 2
    play(commit(fields), [[1, 6, 9, 0, b"7", b"versionb"]])
    assert fields["n"] == 7
    assert not fields.changes()


def test_commit_to_a_session_that_is_gone_tells_the_reason():
    fields = loaded(a=b"1")
    fields["a"] = 2
    _, gone = play(commit(fields), [[0, 5, b"flushed"]])
    assert gone == Gone(5, EndReason.FLUSHED)


def test_each_error_names_a_session_by_twelve_characters():
    """A whole id is what ``registry.end_session()`` takes; who has the log has not."""
    arguments = {
        "session_id": PLACE.id,
        "keys": ["a"],
        **dict.fromkeys(("size", "limit", "acknowledged", "asked"), 1),
        **dict.fromkeys(("holder", "why", "advice"), "-"),
        "held_s": 1.0,
    }
    named = 0
    for error in vars(exceptions).values():
        if not isinstance(error, type) or not issubclass(error, exceptions.ClusteredSessionError):
            continue
        taken = inspect.signature(error.__init__).parameters.keys() - {"self"}
        if "session_id" in taken:
            text = str(error(**{name: arguments[name] for name in taken}))
            assert f"session {PLACE.id[:12]}:" in text
            assert PLACE.id[:13] not in text
            named += 1
    assert named >= 6


def test_too_large_session_is_refused_here_or_by_the_store():
    with pytest.raises(SessionTooLarge):
        next(flows.create(PLACE, [(b"d:a", b"s" * 100_000)], EXPIRY, TERMS, TOKEN, NOBODY))
    fields = loaded(a=b"1")
    fields["a"] = 2
    flow = commit(fields)
    next(flow)
    with pytest.raises(SessionTooLarge):
        flow.send([[-3, 5, 100_001]])


def test_newer_format_is_an_outage_and_no_logout():
    flow = flows.touch(PLACE, TERMS)
    next(flow)
    with pytest.raises(NewerFormat) as caught:
        flow.send([[-4, 5, b""]])
    assert isinstance(caught.value, SessionStoreUnavailable)


def test_passenger_rides_on_the_first_trip_only():
    fields = loaded(a=b"1")
    fields["a"] = 2
    passenger = Call(None, (), ("PING",))
    flow = riders.riding(commit(fields), Rider(passenger))
    trips, committed = play(flow, [b"PONG", [-2, 5, b"d:a", b"othersv1s3"]], WRITTEN)
    assert [names(trip) for trip in trips] == [["PING", "commit"], ["commit"]]
    assert committed.alive.deadline_ms == 9


def test_passenger_that_has_arrived_is_not_lost_later():
    def flow():
        yield (Call(None, (), ("TIME",)),)
        with suppress(SessionStoreUnavailable):
            yield (Call(None, (), ("TIME",)),)

    rider = Rider(Call(None, (), ("PING",)))
    riding = riders.riding(flow(), rider)
    next(riding)
    assert riding.send([b"PONG", b"time"]) == (Call(None, (), ("TIME",)),)
    with pytest.raises(StopIteration):
        riding.throw(SessionStoreUnavailable("away"))
    assert not rider.is_lost


def test_refused_passenger_is_lost_and_the_others_go_on():
    rider = Rider(Call(None, (), ("PING",)))
    flow = riders.riding(flows.end(PLACE, EndReason.FLUSHED, 0), rider)
    assert play(flow, [ResponseError("no"), [1, 5, 2, b"1"]])[1] == Ended(3, b"1")
    assert rider.is_lost


SYNC = SyncOptions(2, False, 500)
CLOCK = [b"1", b"500000"]


def acknowledged(flow):
    heard = []
    return riders.acknowledged(flow, SYNC, heard.append), heard


def test_only_writes_that_landed_are_acknowledged():
    fields = loaded(a=b"1")
    fields["a"] = 2
    flow, heard = acknowledged(commit(fields))
    conflict = [[-2, 5, b"d:a", b"othersv1s3"], 0, CLOCK]
    trips, committed = play(flow, conflict, [*WRITTEN, 2, CLOCK])
    assert [names(trip) for trip in trips] == [["commit", "WAIT", "TIME"]] * 2
    assert trips[0][1].arguments == ("WAIT", 2, 500)
    assert committed.alive.deadline_ms == 9
    assert heard == [Acknowledged(2, False, 1500 - WRITTEN[0][1])]


def test_write_counts_where_the_store_cannot_acknowledge():
    flow, heard = acknowledged(flows.end(PLACE, EndReason.FLUSHED, 0))
    _, ended = play(flow, [[1, 1500, 500, b"1"], ResponseError("no such command"), CLOCK])
    assert (ended, heard) == (Ended(1000, b"1"), [Acknowledged(0, False, 0, "no such command")])


@pytest.mark.parametrize(("reason", "counts"), [(b"flushed", 1), (b"", 0)])
def test_second_end_is_acknowledged_if_a_tombstone_is_left(reason, counts):
    flow, heard = acknowledged(flows.end(PLACE, EndReason.FLUSHED, 0))
    _, ended = play(flow, [[0, 5, reason], 2, CLOCK])
    assert (ended, len(heard)) == (None, counts)


def test_touch_asks_no_replica():
    flow, heard = acknowledged(flows.touch(PLACE, TERMS))
    trips, _ = play(flow, [[1, 5, 9, b"d"]])
    assert [names(trip) for trip in trips] == [["touch"]]
    assert heard == []


def test_outage_reaches_the_flow_through_its_passenger():
    def flow():
        try:
            yield (Call(None, (), ("TIME",)),)
        except SessionStoreUnavailable:
            return "told"

    rider = Rider(None)
    riding = riders.riding(flow(), rider)
    next(riding)
    with pytest.raises(StopIteration) as stop:
        riding.throw(SessionStoreUnavailable("away"))
    assert stop.value.value == "told"
    assert rider.is_lost


# A lock.


def test_free_lock_is_taken_on_the_trip_of_the_load():
    trips, read = play(flows.load(PLACE, None, ASKING), [taken(), *found()])
    assert [names(trip) for trip in trips] == [["acquire", "HGETALL", "TIME"]]
    assert isinstance(read.found, Loaded)
    assert (read.turn.waited_ms, read.turn.handed_on) == (None, False)


def test_free_lock_is_taken_before_the_renewal_in_one_trip():
    trips, _ = play(flows.load(PLACE, TERMS, ASKING), [taken(), [1, 5, 255, b"d"], *found()])
    assert [names(trip) for trip in trips] == [["acquire", "touch", "HGETALL", "TIME"]]


def test_session_that_is_gone_has_no_lock():
    trips, read = play(flows.load(PLACE, None, ASKING), [[0, 5, b""], {}, [b"0", b"5000"]])
    assert [names(trip) for trip in trips] == [["acquire", "HGETALL", "TIME"]]
    assert read.found is EndReason.UNKNOWN
    assert isinstance(read.turn.found, Gone)


def test_woken_waiter_takes_the_lock_and_loads_in_one_trip():
    steps, read = play(
        flows.load(PLACE, None, ASKING), [held(5), *found()], WOKEN, [taken(305), *found(205)]
    )
    load = ["acquire", "HGETALL", "TIME"]
    assert [names(step) for step in steps] == [load, 1.0, load]
    assert read.now_ms == 205, "what was loaded before the wait is of no use"
    assert (read.turn.waited_ms, read.turn.handed_on) == (300, True)


def test_lost_wake_up_costs_one_question():
    """It is asked alone: whoever was not woken does not hold the lock, as a rule."""
    steps, read = play(
        flows.load(PLACE, None, ASKING),
        [held(5), *found()],
        *(NOT_WOKEN, [held(1005)]),
        *(NOT_WOKEN, [taken(2005)]),
        found(205),
    )
    load = ["HGETALL", "TIME"]
    assert [names(step) for step in steps] == [
        *(["acquire", *load], 1.0, ["acquire"], 1.0, ["acquire"]),
        load,
    ]
    assert (read.turn.waited_ms, read.turn.handed_on) == (2000, False)


def test_woken_waiter_that_gets_no_lock_waits_on():
    """A lock that it was too slow to take; its place is that of a newcomer."""
    steps, read = play(
        flows.load(PLACE, None, ASKING),
        [held(5, place=1), *found()],
        *(WOKEN, [held(300, place=2), *found()]),
        *(WOKEN, [taken(400), *found()]),
    )
    assert [names(step) for step in steps[1::2]] == [1.0, 1.0]
    assert read.turn.waited_ms == 395


def test_woken_waiter_is_told_that_the_session_has_ended():
    _, read = play(
        flows.load(PLACE, None, ASKING),
        [held(), *found()],
        WOKEN,
        [[0, 300, b"flushed"], {b"m:end": b"flushed"}, [b"0", b"300000"]],
    )
    assert read.found is EndReason.FLUSHED
    assert read.turn.found == Gone(300, EndReason.FLUSHED)


@pytest.mark.parametrize(
    ("reply", "seconds"),
    [
        # A slice; the rest of the lease, and a bit for each place; no less than the bit.
        (held(place=1, left_ms=8000), 1.0),
        (held(place=1, left_ms=300), 0.32),
        (held(place=5, left_ms=300), 0.4),
        (held(place=1, left_ms=-700), 0.02),
        # No longer than the one before it waits.
        (held(place=2, left_ms=8000, before_ms=300), 0.3),
    ],
)
def test_waiter_sleeps_until_the_lock_may_be_its(reply, seconds):
    flow = flows.load(PLACE, None, ASKING)
    next(flow)
    assert names(flow.send([reply, *found()])) == seconds


def wait_ms(trip):
    """Return for how long a request for a lock would wait."""
    return int.from_bytes(trip[0].arguments[3][:8])


def waits(*, store_ms):
    """Play a wait in vain in which the store's clock goes on by so much a second."""
    flow = flows.load(PLACE, None, ASKING)
    steps, now_ms = [next(flow)], 100_000
    step = flow.send([held(now_ms), *found()])
    while True:
        steps.append(step)
        if isinstance(step, Wait):
            now_ms += store_ms
            step = flow.send(NOT_WOKEN)
        elif names(step) == ["release"]:
            break
        else:
            step = flow.send([held(now_ms)])
    with pytest.raises(SessionLockTimeout) as caught:
        flow.send([[0, now_ms, b""]])
    return steps, caught.value


def test_wait_in_vain_ends_in_time_and_gives_up_the_place():
    steps, error = waits(store_ms=1000)
    assert [names(step) for step in steps[1:]] == [*[1.0, ["acquire"]] * 10, ["release"]]
    assert steps[-1][0].keys == (PLACE.record, PLACE.locks, MAILBOX)
    # How much longer it is ready to wait.
    asked = [wait_ms(step) for step in steps[:-1] if not isinstance(step, Wait)]
    assert asked == list(range(10_000, -1, -1000))
    assert not isinstance(error, SessionLockRefused)
    assert error.holder == "web-2 POST /pay"
    assert error.held_s == 109.998
    assert "10.0 s" in str(error) and "lock_headers()" in str(error)


def test_clock_that_is_set_back_makes_no_wait_longer():
    for store_ms in (0, -1000, -3_600_000):
        steps, _ = waits(store_ms=store_ms)
        assert sum(names(step) for step in steps if isinstance(step, Wait)) == 10.0


def test_wait_with_late_mail_ends_by_the_stores_clock():
    steps, _ = waits(store_ms=4000)
    assert [names(step) for step in steps if isinstance(step, Wait)] == [1.0, 1.0, 1.0]


def test_last_slice_is_as_short_as_what_is_left():
    asking = LockRequest("a" * 16, LOCKING, 6000, lambda: None, nullcontext)
    steps, _ = play(
        flows.load(PLACE, None, asking),
        [held(5), *found()],
        *(NOT_WOKEN, [held(6005)]),
        *(NOT_WOKEN, [taken(9000)]),
        found(),
    )
    assert [names(step) for step in steps if isinstance(step, Wait)] == [6.0, 4.0]


FULL = [-6, 5, 2, b"web-2 POST /pay", 16]


def test_waiter_beyond_the_limit_is_refused_at_once():
    steps, error = play_to_the_error(
        SessionLockRefused, flows.load(PLACE, None, ASKING), [FULL, *found()]
    )
    assert len(steps) == 1, "it has no place to give up"
    assert "16 requests" in str(error)
    assert (error.holder, error.held_s) == ("web-2 POST /pay", 0.003)


def test_waiter_that_lost_its_place_and_finds_none_gives_up():
    steps, _ = play_to_the_error(
        SessionLockRefused,
        flows.load(PLACE, None, ASKING),
        [held(), *found()],
        *(NOT_WOKEN, [FULL]),
        [[0, 6, b""]],
    )
    assert names(steps[-1]) == ["release"]


@pytest.mark.parametrize("error", [SessionLockTimeout, SessionLockRefused])
def test_hopeless_waiter_asks_for_no_place(error):
    refusal = Refusal(error, "this thread holds it itself", "Do not.")
    asking = LockRequest("a" * 16, LOCKING, 1000, lambda: refusal, nullcontext)
    steps, raised = play_to_the_error(error, flows.load(PLACE, None, asking), [FULL, *found()])
    assert len(steps) == 1
    assert wait_ms(steps[0]) == 0, "for how long it would wait"
    assert type(raised) is error
    assert "this thread holds it itself" in str(raised) and "Do not." in str(raised)


def test_hopeless_waiter_takes_a_free_lock():
    refusal = Refusal(SessionLockRefused, "too many wait", "Wait for them.")
    asking = LockRequest("a" * 16, LOCKING, 1000, lambda: refusal, nullcontext)
    _, read = play(flows.load(PLACE, None, asking), [taken(), *found()])
    assert isinstance(read.found, Loaded)


def test_full_waiting_room_gives_up_the_place():
    refusal = Refusal(SessionLockRefused, "2 requests of this process wait", "See there.")
    asking = LockRequest("a" * 16, LOCKING, 1000, lambda: None, lambda: nullcontext(refusal))
    steps, _ = play_to_the_error(
        SessionLockRefused, flows.load(PLACE, None, asking), [held(), *found()], [[0, 6, b""]]
    )
    assert [names(step) for step in steps] == [["acquire", "HGETALL", "TIME"], ["release"]]


def test_waiter_enters_the_waiting_room_and_leaves_it():
    present = []

    @contextmanager
    def waiting():
        present.append(1)
        try:
            yield None
        finally:
            present.pop()

    def load():
        flow = flows.load(PLACE, None, LockRequest("a" * 16, LOCKING, 1000, lambda: None, waiting))
        next(flow)
        assert present == []
        flow.send([held(), *found()])
        assert present == [1]
        return flow

    with pytest.raises(StopIteration):
        flow = load()
        flow.send(WOKEN)
        flow.send([taken(), *found()])
    assert present == []
    flow = load()
    flow.send(WOKEN)
    with pytest.raises(SessionStoreUnavailable):
        flow.throw(SessionStoreUnavailable("away"))
    assert present == []
    load().close()
    assert present == []


def test_timeout_is_told_though_the_store_goes_away():
    flow = flows.load(PLACE, None, ASKING)
    next(flow)
    flow.send([held(5), *found()])
    flow.send(NOT_WOKEN)
    assert names(flow.send([held(20_005)])) == ["release"]
    with pytest.raises(SessionLockTimeout):
        flow.throw(SessionStoreUnavailable("away"))


def test_passenger_rides_on_no_wait():
    flow = riders.riding(flows.load(PLACE, None, ASKING), Rider(Call(None, (), ("PING",))))
    steps, _ = play(flow, [b"PONG", held(), *found()], WOKEN, [taken(), *found()])
    assert names(steps[0]) == ["PING", "acquire", "HGETALL", "TIME"]
    assert [names(step) for step in steps[1:]] == [1.0, ["acquire", "HGETALL", "TIME"]]


def test_lock_of_an_outer_request_is_said_to_be_its():
    asking = LockRequest("a" * 16, LOCKING, 1000, lambda: None, nullcontext, inside="b" * 16)
    trips, read = play(flows.load(PLACE, None, asking), [[2, 5, 2], *found()])
    assert trips[0][0].arguments[2] == "b" * 16
    assert read.turn.found.inside


# Writes, under a lock and past it.

HELD = [[-5, 5, 2, b"web-2 POST /pay"]]
LOST = [[-7, 5, 2, b"web-2 POST /pay"]]


def changed():
    fields = loaded(a=b"1")
    fields["a"] = 2
    return fields


def test_commit_under_a_lock_names_and_ends_it():
    trips, committed = play(commit(changed(), fence=Fence("b" * 16, release=True)), WRITTEN)
    assert [lock_of(trip) for trip in trips] == [("b" * 16, 1)]
    assert committed.turn is None


def test_commit_of_nothing_ends_its_lock_in_the_same_trip():
    trips, committed = play(
        commit(loaded(a=b"1"), fence=Fence("b" * 16, release=True)), [[1, 5, 9, b"d"], [1, 5, 2]]
    )
    assert [names(trip) for trip in trips] == [["touch", "release"]]
    assert trips[0][1].keys[-1] == PLACE.mailbox("b" * 16)
    assert committed.alive.deadline_ms == 9


def test_commit_of_nothing_keeps_a_lock_that_is_to_stay():
    trips, _ = play(commit(loaded(a=b"1"), fence=Fence("b" * 16)), [[1, 5, 9, b"d"]])
    assert [names(trip) for trip in trips] == [["touch"]]


def test_unlocked_commit_queues_while_another_holds_the_lock():
    steps, committed = play(commit(changed()), HELD, [held()], WOKEN, [taken()], WRITTEN)
    assert [names(step) for step in steps] == [
        *(["commit"], ["acquire"], 1.0, ["acquire"]),
        ["commit"],
    ]
    assert [lock_of(steps[0]), lock_of(steps[-1])] == [("", 0), (ASKING.token, 1)]
    assert changes(steps[0]) == changes(steps[-1])
    assert committed.turn.handed_on


def test_queued_commit_merges_what_the_holder_wrote():
    fields = loaded(cart=b'{"a":1}')
    fields["cart"]["b"] = 2
    conflict = [[-2, 5, b"d:cart", b'othersv1s{"a":1,"c":3}']]
    steps, committed = play(commit(fields), HELD, [taken()], conflict, WRITTEN)
    assert [lock_of(step) for step in steps[2:]] == [(ASKING.token, 1)] * 2
    assert fields["cart"] == {"a": 1, "b": 2, "c": 3}
    assert committed.merged == 1


def test_queued_commit_with_nothing_left_ends_its_lock():
    steps, committed = play(
        commit(changed()),
        *(HELD, [taken()], [[-2, 5, b"d:a", b"othersv1s2"]]),
        [[1, 6, 9, b"d"], [1, 6, 5]],
    )
    assert names(steps[-1]) == ["touch", "release"]
    assert steps[-1][1].keys[-1] == MAILBOX
    assert committed.alive.deadline_ms == 9


def test_queued_commit_is_told_that_the_session_has_ended():
    _, gone = play(commit(changed()), HELD, [held()], WOKEN, [[0, 6, b"flushed"]])
    assert gone == Gone(6, EndReason.FLUSHED)


def test_queued_commit_that_times_out_gives_up_the_place():
    steps, _ = play_to_the_error(
        SessionLockTimeout,
        commit(changed()),
        *(HELD, [held(5)], NOT_WOKEN, [held(20_005)]),
        [[0, 6, b""]],
    )
    assert names(steps[-1]) == ["release"]


def test_queued_commit_that_is_refused_gives_up_its_lock():
    fields = loaded(n=b"1")
    fields.increment("n", 1)
    text = [[-2, 5, b"d:n", b'othersv1s"text"']]
    steps, _ = play_to_the_error(TypeError, commit(fields), HELD, [taken()], text, [[1, 6, 5]])
    assert names(steps[-1]) == ["release"]
    assert steps[-1][0].keys[-1] == MAILBOX


def test_queued_commit_that_lost_its_lock_queues_anew():
    steps, _ = play(commit(changed(), asks=asks_anew()), HELD, [taken()], LOST, [taken()], WRITTEN)
    assert [names(step) for step in steps] == [*[["commit"], ["acquire"]] * 2, ["commit"]]
    assert [step[0].arguments[0] for step in steps[1::2]] == ["0" * 16, "1" * 16]
    assert [lock_of(step) for step in steps[::2]] == [("", 0), ("0" * 16, 1), ("1" * 16, 1)]


def test_commit_under_a_lost_lock_is_refused():
    steps, error = play_to_the_error(
        SessionLockLost, commit(changed(), fence=Fence("b" * 16, release=True)), LOST
    )
    assert len(steps) == 1
    assert error.holder == "web-2 POST /pay"
    assert "some key" not in str(error)


def rotate(fence=NO_LOCK, asks=lambda: ASKING):
    new = SessionKeys.of("session", "new key")
    return flows.rotate(PLACE, new, TERMS, lambda: TOKEN, asks, fence)


def test_new_key_queues_while_another_holds_the_lock():
    steps, alive = play(rotate(), HELD, [held()], WOKEN, [taken()], [[1, 6, 9]])
    assert [names(step) for step in steps] == [
        *(["rotate"], ["acquire"], 1.0, ["acquire"]),
        ["rotate"],
    ]
    assert [step[0].arguments[3:5] for step in (steps[0], steps[-1])] == [
        ("", 0),
        (ASKING.token, 1),
    ]
    assert isinstance(alive, Alive)


def test_queued_new_key_that_lost_its_lock_queues_anew():
    steps, _ = play(rotate(asks=asks_anew()), HELD, [taken()], LOST, [taken()], [[1, 6, 9]])
    assert [step[0].arguments[0] for step in steps[1::2]] == ["0" * 16, "1" * 16]
    assert [step[0].arguments[3] for step in steps[::2]] == ["", "0" * 16, "1" * 16]


def test_new_key_that_is_taken_gives_up_its_own_lock_only():
    steps, exists = play(rotate(), HELD, [taken()], [[-1, 6]], [[1, 6, 5]])
    assert names(steps[-1]) == ["release"]
    assert exists == Exists(6)
    steps, _ = play(rotate(Fence("b" * 16)), [[-1, 6]])
    assert [names(step) for step in steps] == [["rotate"]]


def test_new_key_under_a_lost_lock_is_refused():
    _, error = play_to_the_error(SessionLockLost, rotate(Fence("b" * 16)), LOST)
    assert error.holder == "web-2 POST /pay"


def test_queued_new_key_is_told_that_the_session_has_ended():
    _, gone = play(rotate(), HELD, [held()], WOKEN, [[0, 6, b"rotated"]])
    assert gone == Gone(6, EndReason.ROTATED)


def test_release_tells_how_long_the_lock_was_held():
    trips, held_ms = play(flows.release(PLACE, ASKING.token), [[1, 500, 100]])
    assert [names(trip) for trip in trips] == [["release"]]
    assert held_ms == 400
    assert play(flows.release(PLACE, ASKING.token), [[0, 500, b""]])[1] is None


def follow():
    return flows.follow(PLACE, "p", b"usertag8")


def test_session_is_followed_over_eight_places():
    there = SessionKeys.of("p", "another key")
    steps, found = play(follow(), *[[[None, there.id.encode(), None]]] * 8)
    assert (found, len(steps)) == (None, 8)
    assert [step[0].keys for step in steps[:2]] == [(PLACE.record,), (there.record,)]


@pytest.mark.parametrize(
    "reply",
    [
        [None, None, None],
        [None, b"no id", None],
        [b"\1garbage", None, None],
        Damaged("no hash"),
    ],
    ids=str,
)
def test_session_is_not_followed_into_damage(reply):
    _, found = play(follow(), [reply])
    assert found is None
