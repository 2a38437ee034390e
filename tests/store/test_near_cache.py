"""The near cache: never stale, never shared, bounded; what has not changed is not sent again."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.resources import files
from typing import Any

import pytest
import redis
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.middleware import ClusteredSessionMiddleware
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol import record
from django_clustered_sessions.protocol.record import CachedSession, Meta, Mode
from django_clustered_sessions.session import near_cache
from django_clustered_sessions.session.lifetime import Lifetime
from django_clustered_sessions.session.near_cache import Life, NearCache, Renewal, memory
from tests.children import forked
from tests.clocks import Ages
from tests.gateways import load_scripts, place
from tests.locking import now_ms
from tests.pairs import pairwise
from tests.servers import CountingProxy

LARGE = {f"k{i}": "x" * 1000 for i in range(64)}


@pytest.fixture(autouse=True)
def empty(store: redis.Redis) -> None:
    near_cache.near_cache.clear()
    load_scripts(store)


@pytest.fixture
def other_node(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Return a context in which this process is another node, with a near cache of its own."""
    cache = NearCache()

    @contextmanager
    def other() -> Iterator[None]:
        with monkeypatch.context() as patch:
            for module in ("end", "load", "outage", "rotate", "state"):
                name = f"django_clustered_sessions.session.{module}.near_cache"
                patch.setattr(name, cache)
            yield

    return other


def stored(values: dict[str, Any]) -> str:
    session = SessionStore()
    session.update(values)
    session.create()
    return session.session_key or ""


def visit(key: str, view: Callable[[HttpRequest], HttpResponse]) -> HttpResponse:
    request = RequestFactory().get("/")
    request.COOKIES = {"sessionid": key}
    return ClusteredSessionMiddleware(view)(request)


def read(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(request.session.get("n")))


def change(request: HttpRequest) -> HttpResponse:
    request.session["n"] = request.session["n"] + 1
    return read(request)


def nothing(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


def hits() -> int:
    return counters.counts["near_hits"]


@pairwise(large=[False, True], sliding=[False, True], locking=["off", "all"])
def test_unchanged_session_costs_one_trip_and_is_not_sent_if_large(
    proxy: CountingProxy, settings: Any, large: bool, sliding: bool, locking: str
) -> None:
    settings.SESSION_SAVE_EVERY_REQUEST = sliding
    settings.CLUSTERED_SESSIONS_LOCKING = locking
    key = stored({"n": 1} | (LARGE if large else {}))
    visit(key, read)
    counters.drain(now=True)
    proxy.reset()

    def view(request: HttpRequest) -> HttpResponse:
        response = read(request)
        assert (proxy.round_trips, proxy.connections) == (1, 0)
        assert proxy.bytes_received < (200 if large else 600)
        return response

    assert visit(key, view).content == b"1"


def test_without_the_near_cache_everything_is_sent(proxy: CountingProxy, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_NEAR_CACHE_BYTES = 0
    key = stored(LARGE)
    visit(key, read)
    proxy.reset()
    visit(key, read)
    assert proxy.bytes_received > 64_000
    assert near_cache.near_cache.bytes == 0


def test_what_another_node_wrote_is_seen(store: redis.Redis, other_node: Callable[[], Any]) -> None:
    key = stored({"n": 1, "m": 1})
    assert SessionStore(key)["n"] == 1
    with other_node():
        other = SessionStore(key)
        other["n"] = 2
        other.save()
    assert SessionStore(key)["n"] == 2


def test_own_write_is_at_hand(store: redis.Redis) -> None:
    key = stored({"n": 1} | LARGE)
    for n in range(2, 5):
        before = hits()
        session = SessionStore(key)
        session["n"] = n
        session.save()
        assert SessionStore(key).load() == {"n": n} | LARGE
        assert hits() == before + 2


def test_hit_is_a_load_with_a_lock_too(store: redis.Redis) -> None:
    key = stored({"n": 1} | LARGE)
    before = Counter(counters.counts)
    with SessionStore(key).lock():
        pass
    session = SessionStore(key)
    session.get("n")
    with session.lock():
        pass
    counted = Counter(counters.counts) - before
    assert (counted["loads"], counted["near_hits"]) == (3, 3)


def test_own_write_on_top_of_anothers_is_not_taken_for_all(
    store: redis.Redis, other_node: Callable[[], Any]
) -> None:
    key = stored({"n": 1, "m": 1})
    session = SessionStore(key)
    session["n"] = 2
    with other_node():
        other = SessionStore(key)
        other["m"] = 2
        other.save()
    session.save()
    assert SessionStore(key).load() == {"n": 2, "m": 2}


def test_second_write_of_one_object_keeps_anothers(
    store: redis.Redis, other_node: Callable[[], Any]
) -> None:
    key = stored({"n": 1, "m": 1})
    session = SessionStore(key)
    session["n"] = 2
    session.save()
    with other_node():
        other = SessionStore(key)
        other["m"] = 2
        other.save()
    session["n"] = 3
    session.save()
    session["n"] = 4
    session.save()
    assert SessionStore(key).load() == {"n": 4, "m": 2}


def test_counters_and_clear_are_kept_right(store: redis.Redis) -> None:
    key = stored({"n": 1, "m": 1})
    session = SessionStore(key)
    session.increment("hits", 3)
    session.save()
    assert SessionStore(key).load() == {"n": 1, "m": 1, "hits": 3}
    session = SessionStore(key)
    session.clear()
    session["only"] = 1
    session.save()
    assert SessionStore(key).load() == {"only": 1}


def test_no_value_is_shared_between_two_requests(store: redis.Redis) -> None:
    key = stored({"cart": {"tea": 1}})
    one, other = SessionStore(key), SessionStore(key)
    one["cart"]["tea"] = 2
    assert other["cart"] == {"tea": 1}
    assert SessionStore(key)["cart"] == {"tea": 1}


def test_session_that_is_gone_is_not_kept(
    store: redis.Redis, other_node: Callable[[], Any]
) -> None:
    def gone_by(act: Callable[[str], Any]) -> None:
        key = stored({"n": 1})
        assert SessionStore(key)["n"] == 1
        with other_node():
            act(key)
        session = SessionStore(key)
        assert session.load() == {}
        assert session.session_key is None
        assert near_cache.near_cache.get(place(key).record) is None

    gone_by(lambda key: SessionStore().delete(key))
    gone_by(lambda key: SessionStore(key).cycle_key())
    gone_by(lambda key: store.flushall())


def test_rotated_session_is_read_under_its_new_key(store: redis.Redis) -> None:
    session = SessionStore(stored({"n": 1}))
    session.cycle_key()
    assert SessionStore(session.session_key).load() == {"n": 1}


def test_store_that_came_back_older_is_believed(store: redis.Redis) -> None:
    """As after a failover to a replica that had not got the last write."""
    key = stored({"n": 1})
    record = place(key).record
    older = store.dump(record)
    session = SessionStore(key)
    session["n"] = 2
    session.save()
    store.restore(record, 0, older, replace=True)
    session = SessionStore(key)
    assert session["n"] == 1
    session["m"] = 1
    session.save()
    assert SessionStore(key).load() == {"n": 1, "m": 1}


def test_expiry_is_the_stores(store: redis.Redis, other_node: Callable[[], Any]) -> None:
    key = stored({"n": 1})
    session = SessionStore(key)
    session.load()
    with other_node():
        other = SessionStore(key)
        other.set_expiry(100)
        other.save()
    assert 90 < SessionStore(key).get_expiry_age() <= 100


def test_values_set_aside_stay(store: redis.Redis) -> None:
    key = stored({"n": 1})
    store.hset(place(key).record, "d:odd", b"12345678?later")
    near_cache.near_cache.clear()
    for n in (2, 3):
        session = SessionStore(key)
        assert session.load().keys() == {"n"}
        session["n"] = n
        session.save()
    assert store.hget(place(key).record, "d:odd") == b"12345678?later"


# The cache by itself.


def known(size: int) -> CachedSession:
    return CachedSession.of(b"12345678", {b"d:a": b"x" * size})


def test_what_was_used_longest_ago_goes_first() -> None:
    cache, limit = NearCache(), 3 * memory(known(1000))
    for name in "abc":
        cache.put(name, known(1000), limit)
    assert cache.get("a") is not None
    cache.put("d", known(1000), limit)
    assert [name for name in "abcd" if cache.get(name)] == ["a", "c", "d"]


def test_session_beyond_the_limit_is_not_kept() -> None:
    cache, limit = NearCache(), 3 * memory(known(1000))
    cache.put("a", known(1000), limit)
    cache.put("b", known(10_000), limit)
    assert cache.get("a") is not None
    assert cache.get("b") is None
    # Neither is what it was before.
    cache.put("a", known(10_000), limit)
    assert cache.get("a") is None
    assert cache.bytes == 0


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 3000) | st.none()), max_size=60)
)
def test_bytes_are_those_of_what_is_kept(steps: list[tuple[str, int | None]]) -> None:
    cache, limit = NearCache(), 5000
    for name, size in steps:
        if size is None:
            cache.drop(name)
        else:
            cache.put(name, known(size), limit)
        kept = [found for name in "abcdef" if (found := cache.get(name))]
        assert cache.bytes == sum(map(memory, kept)) <= limit


def test_cache_stands_many_threads() -> None:
    cache, limit = NearCache(), 10 * memory(known(100))
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(2000):
                name = str((number * 7 + step) % 25)
                if step % 3 == 0:
                    cache.put(name, known(step % 200), limit)
                elif step % 3 == 1:
                    cache.get(name)
                else:
                    cache.drop(name)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    kept = [found for name in range(25) if (found := cache.get(str(name)))]
    assert cache.bytes == sum(map(memory, kept)) <= limit


def test_forked_process_starts_with_an_empty_one(store: redis.Redis) -> None:
    key = stored({"n": 1})
    assert near_cache.near_cache.bytes > 0
    # Held by another thread in the moment of the fork, the lock would stay so in the child.
    with near_cache.near_cache._lock:
        told = forked(lambda: b"%d %d" % (near_cache.near_cache.bytes, SessionStore(key)["n"]))
    assert told == b"0 1"


def renewals(store: redis.Redis) -> int:
    """Return how many scripts that may write the store has run."""
    stats = store.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {"calls": 0})["calls"])


def test_a_page_with_many_requests_sends_one_renewal(
    store: redis.Redis, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough for the slowest machine: what it is by default is the script's business.
    monkeypatch.setattr(record, "RENEWED_EACH_MS", 60_000)
    # The cookie's age is in whole seconds.
    Ages(monkeypatch)
    settings.SESSION_SAVE_EVERY_REQUEST = True
    key = stored({"n": 1})
    visit(key, read)
    before = renewals(store)
    for _ in range(3):
        response = visit(key, read)
        assert response.cookies["sessionid"]["max-age"] == settings.SESSION_COOKIE_AGE
    assert renewals(store) == before
    settings.SESSION_COOKIE_AGE += 100
    response = visit(key, read)
    assert renewals(store) == before + 1
    assert response.cookies["sessionid"]["max-age"] == settings.SESSION_COOKIE_AGE


@pytest.mark.parametrize("age", ["SESSION_COOKIE_AGE", "CLUSTERED_SESSIONS_IDLE_TIMEOUT"])
def test_a_session_whose_life_somebody_shortened_is_renewed(
    store: redis.Redis,
    settings: Any,
    other_node: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
    age: str,
) -> None:
    monkeypatch.setattr(record, "RENEWED_EACH_MS", 60_000)
    settings.SESSION_SAVE_EVERY_REQUEST = age == "SESSION_COOKIE_AGE"
    setattr(settings, age, 9000)
    key = stored({"n": 1})
    visit(key, read)
    with other_node():
        setattr(settings, age, 4000)
        visit(key, read)
        setattr(settings, age, 9000)
    response = visit(key, read)
    assert 8990 < response.cookies["sessionid"]["max-age"] <= 9000
    assert store.pttl(place(key).record) > 8990_000


def test_renewal_counts_for_a_second_on_the_same_terms() -> None:
    life = Life(100.0, 5000, 10**9, None, Renewal(4800, "terms"))
    assert life.is_renewed(100.0, "terms")
    assert life.is_renewed(100.7, "terms")
    assert not life.is_renewed(100.9, "terms")
    assert not life.is_renewed(100.0, "other terms")
    assert not life._replace(renewal=None).is_renewed(100.0, "terms")
    script = files("django_clustered_sessions.protocol").joinpath("lua", "write.lua").read_text()
    assert f"local step = math.min({record.RENEWED_EACH_MS}, (deadline - now) / 100)" in script


def test_renewal_counts_for_a_share_of_a_short_life() -> None:
    life = Life(100.0, 5000, 7000, None, Renewal(5000, "terms"))
    assert life.is_renewed(100.019, "terms")
    assert not life.is_renewed(100.021, "terms")


def test_renewal_that_moved_no_deadline_counts_from_the_one_that_did() -> None:
    """As of a change just after another node's read, or the next use may come too late."""
    ages = (10**9, 200_000, 0)
    meta = Meta(Mode.DEFAULT, b"version!", 0, 1_200_000, 0, 10, 1_000_000, bytes(8))
    lifetime = Lifetime()
    lifetime.see(1_000_900, 1_200_000)
    lifetime.renewed(meta, ages)
    assert lifetime.life is not None
    assert lifetime.life.is_renewed(lifetime.life.seen_at_s + 0.05, ages)
    assert not lifetime.life.is_renewed(lifetime.life.seen_at_s + 0.15, ages)


#: What a request does with a session, each of which is a use.
USES: dict[str, Any] = {"read": read, "change": change, "nothing": nothing}


@pytest.mark.parametrize("near_reads", ["checked", "tracked"])
@pytest.mark.parametrize("span", ["idle", "sliding"])
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(uses=st.lists(st.tuples(st.sampled_from(list(USES)), st.booleans()), max_size=40))
def test_short_life_lasts_from_the_last_use(
    store: redis.Redis,
    settings: Any,
    other_node: Callable[[], Any],
    span: str,
    near_reads: str,
    uses: Any,
) -> None:
    """Whichever node the use is of, and whatever it knows of uses of the other one."""
    settings.CLUSTERED_SESSIONS_NEAR_READS = near_reads
    settings.SESSION_SAVE_EVERY_REQUEST = True
    settings.CLUSTERED_SESSIONS_IDLE_TIMEOUT = 4 if span == "idle" else None
    session = SessionStore()
    session["n"] = 1
    if span == "sliding":
        session.set_expiry(4)
    session.save()
    key = str(session.session_key)
    record = place(key).record
    slowest_ms = 0
    for use, is_elsewhere in uses:
        before_ms = now_ms(store)
        with other_node() if is_elsewhere and near_reads == "checked" else nullcontext():
            response = visit(key, USES[use])
        deadline_ms = Meta.parse(store.hget(record, "m:") or b"").deadline_ms
        after_ms = now_ms(store)
        # A process takes a renewal for as young as its reply is, by whole ms.
        assert before_ms + 4000 - 40 - 2 - slowest_ms <= deadline_ms <= after_ms + 4000
        slowest_ms = max(slowest_ms, after_ms - before_ms)
        assert response.cookies["sessionid"]["max-age"] <= 4
