"""The registry against the truth, which is what the records say, under whatever may happen.

Requests come and go at random, some begin long before they save, and a process may die before or
after any of its trips to the store, or lose a reply. After every step the records have to be what
the model expects, every bucket's index and its counts of users what the records are, and the
registry's answers for each user and for all the same once more.

A failure prints the steps, and the command that replays them.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import pytest
import redis
from django.contrib.auth import login
from django.contrib.auth.models import User
from django.contrib.sessions.backends.base import UpdateError
from django.http import HttpRequest
from hypothesis import Phase
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from django_clustered_sessions import registry
from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionLimitReached
from django_clustered_sessions.protocol import all_sessions, user_index
from django_clustered_sessions.protocol.record import (
    ID_LENGTH,
    META,
    NEXT,
    NOBODY,
    USER_FIELD,
    HiddenKey,
    Meta,
    SessionKeys,
    bucket_tag,
    session_id,
    user_tag,
)
from django_clustered_sessions.session.near_cache import near_cache
from django_clustered_sessions.session.state import SessionState
from django_clustered_sessions.store import drivers
from django_clustered_sessions.store import exchange as exchanging
from tests import machines
from tests.clusters import ClusterServers
from tests.conftest import DATABASE, use_store
from tests.servers import StoreServer, wait_for

#: All sessions are in so many buckets, so that they meet.
BUCKETS = 4
BACKEND = "django.contrib.auth.backends.ModelBackend"
USERS = {pk: User(pk=pk, username=f"user{pk}") for pk in ("1", "2")}

#: The user of each session that there is, by public id; None for nobody.
Truth = dict[str, str | None]


class Killed(BaseException):
    """This process is no more."""


@dataclass
class Fault:
    """A fault on one of the next trips, after ``trips`` that go well."""

    kind: str = ""
    trips: int = 0

    def happens(self, *kinds: str) -> bool:
        """Return whether it is of these kinds, and happens now; a trip is counted if not."""
        if self.kind not in kinds:
            return False
        self.trips -= 1
        if self.trips >= 0:
            return False
        self.kind = ""
        return True


fault = Fault()


@dataclass(eq=False)
class Request:
    """A request that has loaded its session, and whom it found logged in there."""

    session: SessionStore
    user: str | None

    @property
    def id(self) -> str:
        """The public id of its session, empty where that has no key."""
        return self.session.public_id or ""


class Keys:
    """The session keys of the few buckets, the same for each run, and which id is whose."""

    def __init__(self) -> None:
        self._known: list[str] = []
        self._number = 0
        self.restart()

    def restart(self) -> None:
        """Begin with the first key again."""
        self.by_id: dict[str, str] = {}

    def draw(self, session: SessionStore | None = None) -> str:
        """Return the next key."""
        while len(self._known) <= len(self.by_id):
            self._number += 1
            key = f"{self._number:032x}"
            if int(SessionKeys.of("session", key).index.split("{")[1][:3], 16) < BUCKETS:
                self._known.append(key)
        key = self._known[len(self.by_id)]
        self.by_id[session_id(key)] = key
        return key


users = st.sampled_from(sorted(USERS))
numbers = st.integers(0, 20)
faults = st.one_of(
    st.just(("", 0)),
    st.tuples(
        st.sampled_from(["killed before", "killed after", "request lost", "reply lost"]),
        st.integers(0, 4),
    ),
)


class RegistryAndTruth(RuleBasedStateMachine):
    """Requests on sessions of two users, and of nobody."""

    clients: ClassVar[list[redis.Redis]]
    most: ClassVar[int | None]
    keys: ClassVar[Keys]

    def __init__(self) -> None:
        super().__init__()
        for client in self.clients:
            client.flushdb()
        self.expected: Truth = {}
        self.requests: list[Request] = []
        self.evicted: set[str] = set()
        #: Sessions too many: on a cluster, a move that was killed halfway leaves a copy.
        self.halves: Counter[str | None] = Counter()
        fault.kind = ""
        self.keys.restart()
        near_cache.clear()

    # The store, past everything that is tested.

    def truth(self) -> Truth:
        """Return what the records say."""
        found: Truth = {}
        for client in self.clients:
            for key in client.scan_iter("session:*", count=1000):
                public_id = key.decode().rpartition(":")[2]
                if len(public_id) != ID_LENGTH:
                    continue
                packed, user = client.hmget(key, META, USER_FIELD)
                if packed is None:
                    continue
                found[public_id] = user[9:].strip(b'"').decode() if user else None
                assert Meta.parse(packed).user == (tag(found[public_id]) or NOBODY)
        return found

    @invariant()
    def records_indexes_counts_and_registry_agree(self) -> None:
        truth = self.truth()
        assert truth == self.expected
        listed = {bucket for client in self.clients for bucket in self.check_buckets(client, truth)}
        assert {SessionKeys.of_id("session", public_id).index for public_id in truth} <= listed
        self.evicted.clear()
        everyone = list(registry.matching())
        assert {entry.id: entry.user_id for entry in everyone} == truth
        in_order = sorted(everyone, key=lambda entry: (entry.expires, entry.id), reverse=True)
        assert list(registry.page(len(truth) + 1).sessions) == in_order
        for pk, user in USERS.items():
            entries = registry.sessions_of(user)
            assert len(entries) == registry.count_of(user)
            mine = {public_id for public_id, owner in truth.items() if owner == pk}
            assert {entry.id for entry in entries} == mine
            assert {entry.user_id for entry in entries} <= {pk}
            assert self.most is None or len(mine) <= self.most + self.halves[pk]

    def check_buckets(self, client: redis.Redis, truth: Truth) -> Iterator[str]:
        """Compare the indexes of one server, and what they count, with the records."""
        for number in range(BUCKETS):
            index = f"{bucket_tag('session', number)}:index"
            try:
                members = client.zrange(index, 0, -1, withscores=True)
            except redis.ResponseError:
                # Another node's.
                continue
            if not members:
                continue
            yield index
            seconds, microseconds = client.time()
            now_ms = seconds * 1000 + microseconds // 1000
            listed: dict[str, bytes] = {}
            counted: Counter[bytes] = Counter()
            for member, score in members:
                public_id, user = member[:ID_LENGTH].decode(), member[ID_LENGTH:]
                assert (score > 0) == bool(user)
                if user:
                    counted.update((user, b""))
                if abs(score) > now_ms and public_id not in self.evicted:
                    assert public_id not in listed, "listed twice"
                    listed[public_id] = user
            assert listed == {
                public_id: tag(user)
                for public_id, user in truth.items()
                if SessionKeys.of_id("session", public_id).index == index
            }
            counts = client.hgetall(index.replace(":index", ":users"))
            assert {name: int(count) for name, count in counts.items()} == counted

    # What requests do.

    def do(
        self,
        broken: tuple[str, int],
        act: Callable[[], Any],
        expect: Callable[[Truth], Any],
        request: Request | None = None,
        user: str | None = None,
    ) -> None:
        """Do what may break, and expect what came of it; ``expect`` changes what is there.

        ``user`` is the user who logs in by it, or all of whose sessions it ends.
        """
        old, before = self.home(request) if request else "", dict(self.expected)
        fault.kind, fault.trips = broken
        try:
            act()
        except Killed:
            self.adopt(before, old, request, user)
            return
        except SessionLimitReached:
            # Where there were logins by other users in the same sessions lately.
            assert self.most and user
            self.adopt(before, old, request, user)
            return
        except UpdateError:
            # Only for what is no more, is ended by another's login meanwhile, or another's.
            assert old not in before or request and request.user not in (None, before[old])
            if self.most and user:
                # One may have made room for it before that was known.
                self.adopt(before, old, request, user)
            return
        finally:
            fault.kind = ""
        expect(self.expected)
        if self.most and user:
            here = {
                public_id: owner
                for public_id, owner in self.expected.items()
                if public_id in (old, request and request.id)
                or before[public_id] not in (user, None)
            }
            self.adopt(before, old, request, user)
            assert here.items() <= self.expected.items()

    def adopt(self, before: Truth, old: str, request: Request | None, user: str | None) -> None:
        """Take what there is now, where nobody can know; all else has to be as before."""
        truth = self.truth()
        for public_id, owner in before.items():
            if public_id not in truth:
                # Also a login that was killed on its way in, where it left a session of nobody.
                assert public_id == old or owner == user or (self.most and owner is None)
            elif public_id != old:
                assert truth[public_id] == owner
        new = truth.keys() - before.keys()
        assert len(new) <= 1
        found = request.user if request else None
        for public_id in new:
            if truth[public_id] not in {None, user, before.get(old)} or old in truth:
                assert len(self.clients) > 1 and truth[public_id] in {found, before.get(old)}
                self.halves[truth[public_id]] += 1
        self.expected = truth

    def one(self, number: int, only: Callable[[str], Any] = bool) -> str:
        """Return the id of one of the sessions that there are and pass."""
        # In an order that is the same in each run.
        ids = [one for one in self.keys.by_id if one in self.expected and only(one)]
        return ids[number % len(ids)]

    def begun(self, number: int) -> Request:
        """Return a request that has loaded one of the sessions, or begins a new one."""
        place = number % (len(self.expected) + 1)
        key = self.keys.by_id[self.one(place)] if place < len(self.expected) else None
        session = SessionStore(key)
        request = Request(session, session.get("_auth_user_id"))
        assert request.user == self.expected.get(request.id)
        return request

    def home(self, request: Request) -> str:
        """Return under which id a request goes on: a user's session may have moved meanwhile."""
        place: str | None = request.id
        while place and place not in self.expected:
            place = self.successor(place)
        goes_on = place and request.user and self.expected[place] == request.user
        return place if place and goes_on else request.id

    def successor(self, public_id: str) -> str | None:
        """Return what the tombstone says, wherever that is."""
        for client in self.clients:
            with suppress(redis.ResponseError):
                if found := client.hget(SessionKeys.of_id("session", public_id).record, NEXT):
                    return str(found.decode())
        return None

    def take(self, number: int) -> Request:
        """Return a request that saves now: one that has begun long before, or a new one."""
        waiting = len(self.requests)
        return self.requests.pop(number) if number < waiting else self.begun(number - waiting)

    @initialize()
    def start(self) -> None:
        for user in ("1", "1", "2", None):
            session = SessionStore()
            session.update(logged_in(user) if user else {"x": 1})
            session.save()
            self.expected[session_id(session.session_key or "")] = user

    @precondition(lambda self: len(self.requests) < 4)
    @rule(number=numbers)
    def begin(self, number: int) -> None:
        self.requests.append(self.begun(number))

    @rule(number=numbers, broken=faults)
    def write(self, number: int, broken: tuple[str, int]) -> None:
        request = self.take(number)
        session, is_new = request.session, request.session.session_key is None

        def act() -> None:
            session["x"] = secrets.token_hex(4)
            session.save()

        def expect(truth: Truth) -> None:
            assert is_new or request.id in truth, "it came back"
            truth.setdefault(request.id, None)

        self.do(broken, act, expect, request)

    @rule(number=numbers, user=users, broken=faults)
    def log_in(self, number: int, user: str, broken: tuple[str, int]) -> None:
        request = self.take(number)
        session, old = request.session, self.home(request)

        def act() -> None:
            http = HttpRequest()
            http.session = session
            login(http, USERS[user], backend=BACKEND)
            session.save()

        def expect(truth: Truth) -> None:
            if request.user == user and request.id == old:
                # In already, as far as it knew: it writes nothing.
                assert old in truth
                return
            truth.pop(old, None)
            assert request.id not in truth
            truth[request.id] = user

        self.do(broken, act, expect, request, user)

    @rule(number=numbers, user=users, broken=faults)
    def set_user(self, number: int, user: str, broken: tuple[str, int]) -> None:
        request = self.take(number)
        session, is_new = request.session, request.session.session_key is None

        def act() -> None:
            session.update(logged_in(user))
            session.save()

        def expect(truth: Truth) -> None:
            assert is_new or request.id in truth, "it came back"
            if request.user != user:
                truth[request.id] = user

        self.do(broken, act, expect, request, user)

    @rule(number=numbers, clears=st.booleans(), broken=faults)
    def take_user_out(self, number: int, clears: bool, broken: tuple[str, int]) -> None:
        request = self.take(number)
        session, is_new = request.session, request.session.session_key is None

        def act() -> None:
            if clears:
                session.clear()
            session.pop("_auth_user_id", None)
            session["x"] = 1
            session.save()

        def expect(truth: Truth) -> None:
            assert is_new or request.id in truth, "it came back"
            if is_new or clears or request.user:
                truth[request.id] = None

        self.do(broken, act, expect, request)

    @rule(number=numbers, broken=faults)
    def move(self, number: int, broken: tuple[str, int]) -> None:
        request = self.take(number)
        old = self.home(request)

        def expect(truth: Truth) -> None:
            if request.session.state.has_moved_on:
                # Others have moved it, and that is as good.
                assert request.id == old
                return
            assert request.id not in truth
            truth[request.id] = truth.pop(old, None)

        self.do(broken, request.session.cycle_key, expect, request)

    @rule(number=numbers, broken=faults)
    def log_out(self, number: int, broken: tuple[str, int]) -> None:
        request = self.take(number)
        old = self.home(request)
        self.do(broken, request.session.flush, lambda truth: truth.pop(old, None), request)

    @rule(
        how=st.sampled_from(["expired", "evicted", "ended", "all ended"]),
        number=numbers,
        user=users,
        milliseconds=st.sampled_from([-5, 0, 20]),
        broken=faults,
    )
    def lose(
        self, how: str, number: int, user: str, milliseconds: int, broken: tuple[str, int]
    ) -> None:
        match how:
            case "expired":
                self.expire(number, milliseconds)
            case "evicted" if any(self.expected.values()):
                self.evict(number)
            case "ended":
                self.end(number, broken)
            case "all ended":
                self.end_all(user, number, broken)

    def expire(self, number: int, milliseconds: int) -> None:
        request = self.take(number)
        session, old = request.session, self.home(request)
        session.set_expiry(timedelta(milliseconds=milliseconds))
        try:
            session.save()
        except UpdateError:
            assert old not in self.expected or request.user not in (None, self.expected[old])
            return
        self.expected.pop(request.id, None)
        wait_for(lambda: self.truth() == self.expected, "the session to expire", timeout_s=30)

    def evict(self, number: int) -> None:
        public_id = self.one(number, self.expected.get)
        record = SessionKeys.of_id("session", public_id).record
        for client in self.clients:
            with suppress(redis.ResponseError):
                client.delete(record)
        del self.expected[public_id]
        self.evicted.add(public_id)

    def end(self, number: int, broken: tuple[str, int]) -> None:
        # Every third is gone already.
        ids = list(self.keys.by_id)
        public_id = self.one(number) if number % 3 and self.expected else ids[number % len(ids)]
        ended = public_id in self.expected
        told: list[bool] = []

        def expect(truth: Truth) -> None:
            truth.pop(public_id, None)
            # The answer to a repeated end is that it was gone.
            assert told == [ended] or broken[0] == "reply lost"

        request = Request(SessionStore(self.keys.by_id[public_id]), None)
        self.do(broken, lambda: told.append(registry.end_session(public_id)), expect, request)

    def end_all(self, user: str, number: int, broken: tuple[str, int]) -> None:
        keep = self.one(number) if self.expected else None

        def expect(truth: Truth) -> None:
            for public_id in [one for one, owner in truth.items() if owner == user]:
                if public_id != keep:
                    del truth[public_id]

        self.do(broken, lambda: registry.end_sessions_of(user, keep), expect, None, user)


def logged_in(user: str) -> dict[str, str]:
    """Return what a login leaves in a session."""
    return {"_auth_user_id": user, "_auth_user_hash": USERS[user].get_session_auth_hash()}


def tag(user: str | None) -> bytes:
    return user_tag(user) if user else b""


def run(
    clients: list[redis.Redis],
    monkeypatch: Any,
    settings: Any,
    most: int | None,
    examples: int,
    name: str,
) -> None:
    """Let the machine run, with a store that these raw clients see."""
    perform, exchange, keys = drivers.perform, exchanging.exchange, Keys()

    def perform_or_die(trip: Any, pool: Any, seconds: float) -> Any:
        if fault.happens("killed before"):
            raise Killed
        replies = perform(trip, pool, seconds)
        if fault.happens("killed after"):
            raise Killed
        return replies

    def exchange_or_lose(connection: Any, *arguments: Any) -> Any:
        if fault.happens("request lost"):
            connection.disconnect()
            raise redis.ConnectionError("cut before the store saw it")
        replies = exchange(connection, *arguments)
        if fault.happens("reply lost"):
            connection.disconnect()
            raise redis.ConnectionError("cut after the store has done it")
        return replies

    monkeypatch.setattr(drivers, "perform", perform_or_die)
    monkeypatch.setattr(exchanging, "exchange", exchange_or_lose)
    monkeypatch.setattr(SessionState, "new_key", lambda state: HiddenKey(keys.draw()))
    for module in (all_sessions, user_index):
        monkeypatch.setattr(module, "BUCKETS", BUCKETS)
    monkeypatch.setattr(User, "save", lambda self, **kwargs: None)
    settings.CLUSTERED_SESSIONS_MAX_SESSIONS_PER_USER = most

    class Machine(RegistryAndTruth):
        pass

    Machine.clients, Machine.most, Machine.keys = clients, most, keys
    # To find the shortest way takes minutes.
    machines.run(Machine, name, max_examples=examples, phases=[Phase.generate])


@pytest.mark.parametrize(
    ("most", "examples"),
    [
        pytest.param(None, 8, id="None-short"),
        pytest.param(2, 8, id="2-short"),
        pytest.param(None, 40, id="None-long", marks=pytest.mark.full),
        pytest.param(2, 40, id="2-long", marks=pytest.mark.full),
    ],
)
def test_registry_tells_the_truth(
    store: redis.Redis,
    store_server: StoreServer,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    most: int | None,
    examples: int,
) -> None:
    use_store(settings, f"{store_server.unix_url}?db={DATABASE}")
    length = "long" if examples > 20 else "short"
    run([store], monkeypatch, settings, most, examples, f"{most} and {length}")


@pytest.mark.full
@pytest.mark.parametrize("most", [None, 2])
def test_registry_tells_the_truth_of_a_cluster(
    store_server: StoreServer, settings: Any, monkeypatch: pytest.MonkeyPatch, most: int | None
) -> None:
    with ClusterServers(binary=store_server.binary) as servers:
        servers.use(settings)
        clients = [server.client() for server in servers.primaries]
        run(clients, monkeypatch, settings, most, 8, f"cluster and {most}")
