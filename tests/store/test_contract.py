"""Promises beyond Django's own tests of engines: each once sync, once async."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
from django.contrib.sessions.backends.base import CreateError, SessionBase, UpdateError
from django.utils import timezone

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionConflict
from django_clustered_sessions.monitoring import counters as counters_module
from django_clustered_sessions.monitoring.counters import NAMES, counters
from tests.gateways import place, records
from tests.locking import now_ms

pytestmark = pytest.mark.each_server


class Driven:
    """Call a session's methods by their synchronous names, in either form."""

    def __init__(self, run: Callable[[Any], Any] | None, session: SessionStore) -> None:
        self._run = run
        self.session = session

    def __getattr__(self, name: str) -> Any:
        if self._run is None or not hasattr(SessionStore, f"a{name}"):
            return getattr(self.session, name)
        run, method = self._run, getattr(self.session, f"a{name}")

        def call(*args: Any, **kwargs: Any) -> Any:
            async def await_it() -> Any:
                return await method(*args, **kwargs)

            return run(await_it())

        return call

    def __getitem__(self, key: Any) -> Any:
        if not self.has_key(key):
            raise KeyError(key)
        return self.get(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.set(key, value)

    def set(self, key: Any, value: Any) -> None:
        if self._run is None:
            self.session[key] = value
        else:
            self._run(self.session.aset(key, value))


New = Callable[..., Driven]


@pytest.fixture(params=["sync", "async"])
def new(request: pytest.FixtureRequest, store: redis.Redis) -> Any:
    """Give ``new(session_key)``, and ``new(values)`` for one that is stored."""
    runner = asyncio.Runner()
    run = runner.run if request.param == "async" else None

    def make(what: str | dict[Any, Any] | None = None) -> Driven:
        if not isinstance(what, dict):
            return Driven(run, SessionStore(what))
        session = Driven(run, SessionStore())
        session.update(what)
        session.create()
        return Driven(run, SessionStore(session.session_key))

    with runner:
        yield make


def again(new: New, session: Driven) -> Driven:
    return new(session.session_key)


def test_every_method_has_its_twin() -> None:
    for name in dir(SessionBase):
        if name.startswith("a") and name[1:] in dir(SessionBase):
            for form in (name, name[1:]):
                assert hasattr(SessionStore, form)
            assert inspect.iscoroutinefunction(getattr(SessionStore, name)), name


# Expiry.


def test_expiry_follows_the_store(new: New, store: redis.Redis) -> None:
    session = new({"n": 1})
    record = place(session.session_key).record
    meta = store.hget(record, "m:")
    deadline_ms = int.from_bytes(meta[16:22]) - 500_000
    store.hset(record, "m:", meta[:16] + deadline_ms.to_bytes(6) + meta[22:])
    most_ms = deadline_ms - now_ms(store)
    age = session.get_expiry_age()
    least_ms = deadline_ms - now_ms(store)
    assert least_ms <= age * 1000 < most_ms + 1000
    date = session.get_expiry_date()
    assert date == datetime.fromtimestamp(deadline_ms / 1000, UTC)


#: The kinds are told apart in code that both halves share.
@pytest.mark.parametrize(
    ("new", "how"),
    [
        ("sync", "seconds"),
        ("async", "seconds"),
        ("sync", "timedelta"),
        ("async", "datetime"),
        ("sync", "naive"),
        ("async", "default"),
    ],
    indirect=["new"],
)
def test_expiry_of_each_kind_is_kept(new: New, store: redis.Redis, settings: Any, how: str) -> None:
    settings.SESSION_COOKIE_AGE = 300
    settings.USE_TZ = how != "naive"
    session = new({"n": 1})
    value = {
        "seconds": 300,
        "timedelta": timedelta(seconds=300),
        "datetime": timezone.now() + timedelta(seconds=300),
        "naive": timezone.now() + timedelta(seconds=300),
        "default": None,
    }[how]
    session.set_expiry(value)
    session.save()
    # The store's clock is read in whole ms, so a date may be a moment further off.
    assert 290 < session.get_expiry_age() <= 301
    assert 290_000 < store.pttl(place(session.session_key).record) <= 301_000
    session = again(new, session)
    assert 290 < session.get_expiry_age() <= 301
    assert timezone.is_aware(session.get_expiry_date()) is (how != "naive")
    assert abs((session.get_expiry_date() - timezone.now()).total_seconds() - 300) < 10


@pytest.mark.parametrize("has_zones", [True, False])
def test_date_of_expiry_keeps_its_microseconds(new: New, settings: Any, has_zones: bool) -> None:
    settings.USE_TZ = has_zones
    session = new({"n": 1})
    date = (timezone.now() + timedelta(hours=1)).replace(microsecond=123_456)
    session.set_expiry(date)
    assert session.get_expiry_date() == date
    session.save()
    assert session.get_expiry_date() == again(new, session).get_expiry_date() == date
    settings.CLUSTERED_SESSIONS_ABSOLUTE_TIMEOUT = 60
    assert session.get_expiry_date() == date
    assert again(new, session).get_expiry_date() < date


@pytest.mark.parametrize("how", ["seconds", "timedelta"])
def test_seconds_slide_and_a_timedelta_does_not(new: New, store: redis.Redis, how: str) -> None:
    session = new({"n": 1})
    record = place(session.session_key).record
    session.set_expiry(300 if how == "seconds" else timedelta(seconds=300))
    session.save()
    assert store.hget(record, "m:")[1:2] == (b"s" if how == "seconds" else b"a")
    before = store.pexpiretime(record)
    session = again(new, session)
    session["n"] = 2
    session.save()
    moved = store.pexpiretime(record) - before
    assert moved == 0 if how == "timedelta" else 0 <= moved < 10_000
    session = again(new, session)
    session.set_expiry(None)
    session.save()
    assert store.pttl(record) > 300_000
    assert session.get_expire_at_browser_close() is False


def test_expiry_arithmetic_of_django_without_a_load(new: New) -> None:
    session = new("x" * 32)
    now = timezone.now()
    assert session.get_expiry_age(modification=now, expiry=5) == 5
    later = now + timedelta(seconds=7)
    assert session.get_expiry_age(modification=now, expiry=later) == 7
    assert session.get_expiry_date(modification=now, expiry=5) == now + timedelta(seconds=5)


def test_age_before_anything_is_stored(new: New, settings: Any) -> None:
    settings.SESSION_COOKIE_AGE = 77
    assert new().get_expiry_age() == 77


# What a save writes, and what it does not.


def test_changes_of_different_keys_both_land(new: New) -> None:
    one = new({"a": 1, "b": 1, "c": 1})
    two = again(new, one)
    one["a"], two["b"] = 2, 2
    two.pop("c")
    one.save()
    two.save()
    assert again(new, one).load() == {"a": 2, "b": 2}


def test_changes_within_one_key_are_merged(new: New) -> None:
    one = new({"cart": {"tea": 1}})
    two = again(new, one)
    one["cart"]["cup"] = 1
    two["cart"]["pot"] = 1
    assert one.modified is True
    one.save()
    two.save()
    assert two["cart"] == {"tea": 1, "cup": 1, "pot": 1}
    assert again(new, one).load() == {"cart": {"tea": 1, "cup": 1, "pot": 1}}


def test_later_change_wins_where_that_is_the_policy(new: New, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_ON_CONFLICT = "overwrite"
    one = new({"cart": {"tea": 1}, "other": 1})
    two = again(new, one)
    one["cart"]["cup"] = 1
    one["other"] = 2
    two["cart"]["pot"] = 1
    one.save()
    two.save()
    assert again(new, one).load() == {"cart": {"tea": 1, "pot": 1}, "other": 2}


def test_conflict_is_an_error_where_that_is_the_policy(new: New, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_ON_CONFLICT = "error"
    one = new({"cart": {"tea": 1}, "other": 1})
    two = again(new, one)
    one["cart"]["cup"] = 1
    two["cart"]["pot"] = 1
    two["other"] = 2
    one.save()
    with pytest.raises(SessionConflict) as caught:
        two.save()
    assert caught.value.keys == ("cart",)
    assert one.session_key not in str(caught.value)
    stored = {"cart": {"tea": 1, "cup": 1}, "other": 1}
    assert again(new, one).load() == stored
    with pytest.raises(SessionConflict):
        two.cycle_key()
    assert again(new, one).load() == stored


def test_value_that_was_only_read_is_not_written(new: New, store: redis.Redis) -> None:
    session = new({"a": [1], "b": {}, "c": 1})
    record = place(session.session_key).record
    before = store.hgetall(record)
    dict(session.items())
    assert session.modified is False
    session["c"] = 2
    session.save()
    after = store.hgetall(record)
    assert {k for k in before if before[k] != after[k]} <= {b"d:c", b"m:"}


def test_clear_wipes_what_others_have_added(new: New, store: redis.Redis) -> None:
    one = new({"a": 1})
    store.hset(place(one.session_key).record, "d:unreadable", b"?")
    two = again(new, one)
    two["b"] = 2
    two.save()
    one.clear()
    one["c"] = 3
    one.save()
    assert again(new, one).load() == {"c": 3}
    assert not store.hexists(place(one.session_key).record, "d:unreadable")


def test_clear_of_a_session_that_was_never_loaded(new: New) -> None:
    session = new({"a": 1})
    session.clear()
    session.save()
    assert again(new, session).load() == {}
    assert session.exists(session.session_key) is True


# ``modified``, as its users know it.


@pytest.mark.parametrize(
    ("new", "said"), [("sync", None), ("async", False), ("sync", True)], indirect=["new"]
)
def test_saying_modified_never_loses_a_change(new: New, said: bool | None) -> None:
    session = new({"cart": {"tea": 1}, "n": 1})
    session["cart"]["cup"] = 1
    assert session.modified is True
    if said is not None:
        session.session.modified = said
        assert session.modified is said
    session["cart"]["pot"] = 1
    assert session.modified is True
    session.save()
    assert again(new, session)["cart"] == {"tea": 1, "cup": 1, "pot": 1}


def test_saying_not_modified_holds_until_the_next_change(new: New) -> None:
    session = new({"cart": {}, "n": 1})
    session["n"] = 2
    session.session.modified = False
    assert session.modified is False
    session.pop("n")
    session.session.modified = False
    assert session.modified is False
    session["cart"]["cup"] = 1
    assert session.modified is True
    session.save()
    assert again(new, session).load() == {"cart": {"cup": 1}}


def test_modified_is_plain(new: New) -> None:
    session = new({"n": 1}).session
    assert session.modified is False
    session.modified = True
    assert session.modified is True
    session.modified = 0  # type: ignore[assignment]
    assert session.modified is False


def test_modified_and_accessed_as_django_has_them(new: New) -> None:
    session = new({"n": 1})
    assert (session.accessed, session.modified) == (False, False)
    assert session.pop("absent", None) is None
    assert (session.accessed, session.modified) == (True, False)
    assert session.setdefault("n", 2) == 1
    assert session.modified is False
    assert session.setdefault("m", 2) == 2
    assert session.modified is True
    session = again(new, session)
    with pytest.raises(KeyError):
        session.pop("absent")
    assert session.modified is False
    assert session.pop("n") == 1
    assert session.modified is True


@pytest.mark.parametrize("method", ["save", "create", "cycle_key"])
def test_session_that_is_made_was_accessed(new: New, method: str) -> None:
    """Its response varies by the cookie, whatever became of the session."""
    session = new()
    getattr(session, method)()
    assert session.accessed is True


def test_session_that_is_made_by_a_lock_was_accessed(store: redis.Redis) -> None:
    session = SessionStore()
    with session.lock():
        assert session.accessed is True


def test_all_that_djangos_base_class_sets_is_there() -> None:
    """Ours does not call the constructor of Django's; a new Django may set something more."""
    session = SessionStore()
    for name in vars(SessionBase()):
        assert hasattr(session, name.removeprefix("_SessionBase_")), name


# Keys.


def test_exists_is_a_bool(new: New) -> None:
    session = new({"n": 1})
    assert session.exists(session.session_key) is True
    for key in ("x" * 32, "short", "", None):
        assert session.exists(key) is False


def test_delete_of_another_session_leaves_this_one(new: New, store: redis.Redis) -> None:
    mine, other = new({"n": 1}), new({"n": 2})
    mine.delete(other.session_key)
    assert mine["n"] == 1
    mine["n"] = 3
    mine.save()
    assert again(new, other).load() == {}
    assert records(store) == [place(mine.session_key).record.encode()]
    mine.delete("x" * 32)
    new().delete()
    new().delete(None)


def test_ended_session_stays_ended(new: New, store: redis.Redis) -> None:
    session = new({"n": 1})
    late = again(new, session)
    assert late["n"] == 1
    session.flush()
    assert session.session_key is None
    late["n"] = 2
    for operation in (late.save, late.cycle_key):
        with pytest.raises(UpdateError):
            operation()
    late = new(late.session_key)
    with pytest.raises(UpdateError):
        late.save()
    assert records(store) == []


def taken(new: New, key: str) -> Driven:
    """Return a session whose key another one has."""
    first = new(key)
    first["n"] = 1
    first.session._session_key = key
    first.session.state.data = first.session.state.new_data()
    first.save(must_create=True)
    second = new()
    second["n"] = 2
    second.session._session_key = key
    return second


def test_save_under_a_taken_key_is_refused(new: New, store: redis.Redis) -> None:
    session = taken(new, "y" * 32)
    with pytest.raises(CreateError):
        session.save(must_create=True)
    assert len(records(store)) == 1


def test_save_under_an_ended_sessions_key_is_refused(new: New, store: redis.Redis) -> None:
    session = new({"n": 1})
    key = session.session_key
    session.flush()
    late = new()
    late["n"] = 2
    late.session._session_key = key
    with pytest.raises(CreateError):
        late.save(must_create=True)
    assert records(store) == []


def test_new_key_has_everything_and_the_old_one_nothing(new: New, store: redis.Redis) -> None:
    session = new({"n": 1, "cart": {}})
    before = session.session_key
    raw = b"8 bytes.?of a later release"
    store.hset(place(before).record, mapping={"d:later": raw, "k:later": raw})
    session["cart"]["tea"] = 1
    session.cycle_key()
    assert session.session_key not in (None, before)
    record = store.hgetall(place(session.session_key).record)
    assert record[b"d:later"] == record[b"k:later"] == raw
    assert again(new, session).load() == {"n": 1, "cart": {"tea": 1}}
    assert new(before).load() == {}
    session["n"] = 2
    session.save()
    assert again(new, session).load() == {"n": 2, "cart": {"tea": 1}}


def test_new_key_has_what_others_wrote_meanwhile(new: New) -> None:
    session = new({"n": 1})
    assert session["n"] == 1
    other = again(new, session)
    other["m"] = 2
    other.save()
    session.cycle_key()
    assert again(new, session).load() == {"n": 1, "m": 2}


# Counters.


def test_increments_of_many_add_up(new: New) -> None:
    session = new({"n": 1})
    many = [again(new, session) for _ in range(5)]
    for by, each in enumerate(many):
        assert each.increment("n") == 2
        each.increment("n", by)
    for each in many:
        each.save()
    assert many[-1]["n"] == 1 + 5 + 10
    assert again(new, session).load() == {"n": 16}


def test_increment_counts_in_a_new_session(new: New) -> None:
    session = new()
    assert session.increment("n", 3) == 3
    session.save()
    session.increment("n", -5)
    session.save()
    assert again(new, session).load() == {"n": -2}


def test_increment_before_and_after_other_changes(new: New) -> None:
    session = new({"n": 1})
    other = again(new, session)
    other.increment("n", 10)
    other.save()
    session.increment("n")
    session["n"] = 5
    session.increment("n")
    session.save()
    # A value that was set is a value, and this one was set last.
    assert again(new, session)["n"] == 6
    session = again(new, session)
    session.increment("n")
    session.pop("n")
    session.save()
    assert again(new, session).load() == {}


def test_increment_after_clear_begins_at_nothing(new: New) -> None:
    session = new({"n": 5})
    session.clear()
    session.increment("n")
    session.save()
    assert again(new, session).load() == {"n": 1}


@pytest.mark.parametrize(
    ("new", "policy"),
    [("sync", "merge"), ("async", "merge"), ("async", "overwrite"), ("sync", "error")],
    indirect=["new"],
)
def test_increment_of_what_is_no_integer_any_more_is_an_error(
    new: New, settings: Any, policy: str
) -> None:
    settings.CLUSTERED_SESSIONS_ON_CONFLICT = policy
    session = new({"n": 5})
    session.increment("n")
    other = again(new, session)
    other["n"] = "text"
    other.save()
    with pytest.raises(TypeError, match="'n'"):
        session.save()
    assert again(new, session).load() == {"n": "text"}


# One clock. `tests.request.test_clocks` has whole processes whose clocks are wrong.


@pytest.mark.parametrize("drift_s", [-3600, 3600], ids=["behind", "ahead"])
def test_node_with_a_wrong_clock_agrees_about_the_end(
    new: New, store: redis.Redis, monkeypatch: pytest.MonkeyPatch, drift_s: int
) -> None:
    session = new({"n": 1, "_session_expiry": 60})
    right_time, right_now = time.time, timezone.now
    monkeypatch.setattr(time, "time", lambda: right_time() + drift_s)
    monkeypatch.setattr(timezone, "now", lambda: right_now() + timedelta(seconds=drift_s))
    other = again(new, session)
    assert other["n"] == 1
    assert 30 < other.get_expiry_age() <= 60
    other["n"] = 2
    other.save()
    assert 30_000 < store.pttl(place(other.session_key or "").record) <= 60_000


# Figures.


@pytest.mark.usefixtures("figures")
def test_loads_commits_and_fields_are_counted(new: New, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters_module, "INTERVAL_S", float("inf"))
    counters.add(requests=1)
    counters.drain(now=True)
    session = new({"cart": {"tea": 1}, "n": 1})
    other = again(new, session)
    other["cart"]["cup"] = 1
    session["cart"]["pot"] = 1
    other.save()
    session.save()
    session.flush()
    counted = dict(zip(NAMES, counters.drain(now=True), strict=True))
    expected = {
        "requests": 0,
        "loads": 2,
        "commits": 3,
        "fields_written": 4,
        "fields_held": 6,
        "conflicts_merged": 1,
        "created": 1,
        "ended": 1,
        "store_errors": 0,
    }
    assert counted | expected == counted
