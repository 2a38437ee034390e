"""The watcher of a process, with Sentinels that answer as they are told to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import redis
from redis.sentinel import MasterNotFoundError

from django_clustered_sessions.store import sentinel as watching
from django_clustered_sessions.store.sentinel import SentinelWatcher
from tests.servers import wait_for

#: Generous: what is waited for is the condition.
BOUND_S = 30.0


class Sentinel:
    """Sentinel that the watcher asks; ``state`` is an address with its epoch, or an error."""

    def __init__(self, port: int, epoch: int = 0, *, is_down: bool = False) -> None:
        self.state: Any = None
        self.asked = 0
        self.says(port, epoch, is_down=is_down)

    #: What happens before it answers.
    waits_for: threading.Event | None = None

    def says(self, port: int, epoch: int, *, is_down: bool = False) -> None:
        self.state = {
            "ip": "127.0.0.1",
            "port": port,
            "config-epoch": epoch,
            "is_master": True,
            "is_sdown": is_down,
            "is_odown": False,
        }

    def execute_command(self, command: str, service: str) -> Any:
        self.asked += 1
        if self.waits_for is not None:
            self.waits_for.wait(BOUND_S)
        if isinstance(self.state, Exception):
            raise self.state
        return self.state

    def close(self) -> None:
        pass


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SentinelWatcher]]:
    """Give a watcher of Sentinels; its thread only looks when it is asked."""
    monkeypatch.setattr(watching, "INTERVAL_S", 3600.0)
    started = []

    def start(*sentinels: Sentinel) -> SentinelWatcher:
        watcher = SentinelWatcher("main", [], {})
        monkeypatch.setattr(watcher, "clients", lambda: list(sentinels))
        started.append(watcher)
        return watcher

    yield start
    for watcher in started:
        watcher.close()
    wait_for(lambda: not any(watcher.is_running for watcher in started), "the threads end")


def port(asked: Future[tuple[str, int]]) -> int:
    return asked.result(BOUND_S)[1]


def test_latest_failover_counts(watch: Callable[..., SentinelWatcher]) -> None:
    stale, informed = Sentinel(1, 4), Sentinel(2, 5)
    watcher = watch(stale, informed)
    port(watcher.answer())
    wait_for(lambda: watcher.names("127.0.0.1", 2), "the second one is heard")
    informed.state = redis.ConnectionError("gone")
    assert port(watcher.answer()) == 2
    assert not watcher.names("127.0.0.1", 1)


def test_sentinels_set_up_anew_are_believed(
    watch: Callable[..., SentinelWatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "REST_S", 0.1)
    sentinels = [Sentinel(1, 9) for _ in range(3)]
    watcher = watch(*sentinels)
    assert port(watcher.answer()) == 1
    sentinels[0].says(2, 0)
    for lost in sentinels[1:]:
        lost.state = redis.ConnectionError("gone")
    assert port(watcher.answer()) == 1
    assert port(watcher.answer()) == 1
    for other in sentinels[1:]:
        other.says(2, 0)
    # Those that did not answer are left alone for a while.
    wait_for(lambda: port(watcher.answer()) == 2, "all are asked again", timeout_s=BOUND_S)


def test_last_answer_stands_without_any_sentinel(watch: Callable[..., SentinelWatcher]) -> None:
    sentinel = Sentinel(1)
    watcher = watch(sentinel)
    sentinel.state = redis.ConnectionError("gone away")
    with pytest.raises(MasterNotFoundError, match="gone away"):
        port(watcher.answer())
    sentinel.says(1, 0)
    assert port(watcher.answer()) == 1
    sentinel.state = redis.ConnectionError("gone away")
    assert port(watcher.answer()) == 1


def test_silent_sentinels_hold_nobody_up(watch: Callable[..., SentinelWatcher]) -> None:
    silence = threading.Event()
    sentinel = Sentinel(1)
    watcher = watch(sentinel)
    assert port(watcher.answer()) == 1
    sentinel.state = redis.TimeoutError("no answer")
    assert port(watcher.answer()) == 1
    # The next look takes for ever, and nobody waits for it.
    sentinel.waits_for = silence
    try:
        assert [watcher.answer().done() for _ in range(3)] == [True] * 3
        assert port(watcher.answer()) == 1
    finally:
        sentinel.waits_for = None
        silence.set()
    sentinel.says(2, 1)
    wait_for(lambda: port(watcher.answer()) == 2, "what a Sentinel says counts again")


def test_caller_in_mid_round_is_told_at_its_silent_end(
    watch: Callable[..., SentinelWatcher],
) -> None:
    sentinel = Sentinel(1)
    watcher = watch(sentinel)
    assert port(watcher.answer()) == 1
    sentinel.waits_for = threading.Event()
    asked = sentinel.asked
    first = watcher.answer()
    wait_for(lambda: sentinel.asked > asked, "the Sentinel is being asked")
    second = watcher.answer()
    sentinel.state = redis.TimeoutError("no answer")
    sentinel.waits_for.set()
    assert (port(first), port(second)) == (1, 1)


def test_primary_that_is_down_is_told_at_once(watch: Callable[..., SentinelWatcher]) -> None:
    sentinel = Sentinel(1)
    watcher = watch(sentinel)
    assert port(watcher.answer()) == 1
    sentinel.says(1, 0, is_down=True)
    with pytest.raises(MasterNotFoundError, match="down"):
        port(watcher.answer())


def test_silent_sentinel_is_left_alone_for_a_while(watch: Callable[..., SentinelWatcher]) -> None:
    silent, well = Sentinel(1), Sentinel(1)
    silent.state = redis.TimeoutError("no answer")
    watcher = watch(silent, well)
    for _ in range(20):
        assert port(watcher.answer()) == 1
    assert silent.asked <= 2
    assert well.asked >= 10


def test_old_word_is_not_believed(
    watch: Callable[..., SentinelWatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was stopped knows nothing newer, until its thread has asked again."""
    sentinel = Sentinel(1)
    watcher = watch(sentinel)
    assert port(watcher.answer()) == 1
    assert watcher.names("127.0.0.1", 1)
    with monkeypatch.context() as patch:
        patch.setattr(watching, "INTERVAL_S", 0.001)
        wait_for(lambda: not watcher.names("127.0.0.1", 1), "it is too old")
    sentinel.says(2, 1)
    assert port(watcher.answer()) == 2
    assert watcher.names("127.0.0.1", 2)


def test_old_word_stands_while_no_sentinel_answers(
    watch: Callable[..., SentinelWatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    sentinel = Sentinel(1)
    watcher = watch(sentinel)
    assert port(watcher.answer()) == 1
    sentinel.state = redis.ConnectionError("gone")
    assert port(watcher.answer()) == 1
    monkeypatch.setattr(watching, "BELIEVED_INTERVALS", 0)
    assert watcher.names("127.0.0.1", 1)


def test_sentinel_that_was_silent_is_asked_last(
    watch: Callable[..., SentinelWatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be so again, and what another one says is not to wait for that."""
    monkeypatch.setattr(watching, "REST_S", 0.0)
    silent, well = Sentinel(1), Sentinel(1)
    silent.state = redis.TimeoutError("no answer")
    watcher = watch(silent, well)
    assert port(watcher.answer()) == 1
    silent.waits_for = threading.Event()
    try:
        assert port(watcher.answer()) == 1
    finally:
        silent.waits_for.set()


def test_watcher_ends_when_nothing_is_lent(
    watch: Callable[..., SentinelWatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "INTERVAL_S", 0.001)
    monkeypatch.setattr(watching, "IDLE_INTERVALS", 3)
    watcher = watch(Sentinel(1))
    for _ in range(2):
        assert port(watcher.answer()) == 1
        wait_for(lambda: not watcher.is_running, "it ends")
        # What it knew is old by the time that somebody comes again.
        assert not watcher.names("127.0.0.1", 1)


def test_watcher_survives_a_nonsensical_answer(watch: Callable[..., SentinelWatcher]) -> None:
    """A thread that ended with it would let everybody wait for ever."""
    strange = Sentinel(1)
    strange.state = {"ip": "127.0.0.1"}
    watcher = watch(strange)
    with pytest.raises(MasterNotFoundError, match="KeyError"):
        port(watcher.answer())
    strange.says(1, 0)
    assert port(watcher.answer()) == 1


def test_thread_that_cannot_start_fails_one_request(
    watch: Callable[..., SentinelWatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Since Python 3.12 none starts while the interpreter ends."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    watcher = watch(Sentinel(1))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(MasterNotFoundError, match="shutdown"):
            port(watcher.answer())
    assert port(watcher.answer()) == 1


def test_change_of_primary_is_logged_once(
    watch: Callable[..., SentinelWatcher], caplog: pytest.LogCaptureFixture
) -> None:
    sentinels = [Sentinel(1, 4) for _ in range(3)]
    watcher = watch(*sentinels)
    for _ in range(3):
        port(watcher.answer())
    assert caplog.messages == []
    for sentinel in sentinels:
        sentinel.says(2, 5)
    for _ in range(3):
        port(watcher.answer())
    assert caplog.messages == ["the primary of main was 127.0.0.1:1 and is now 127.0.0.1:2"]


def test_cancelled_question_harms_no_other(watch: Callable[..., SentinelWatcher]) -> None:
    watcher = watch(Sentinel(1))
    asked = watcher.answer()
    asked.cancel()
    assert port(watcher.answer()) == 1


def test_start_that_was_broken_off_is_made_up_for(
    watch: Callable[..., SentinelWatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal's exception may come at any line, that of the start included."""
    watcher = watch(Sentinel(1))

    def interrupted(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "start", interrupted)
        watcher.answer()
    assert port(watcher.answer()) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_thread_that_died_is_replaced(
    watch: Callable[..., SentinelWatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = watch(Sentinel(1))

    def nothing() -> list[redis.Redis]:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(watcher, "clients", nothing)
        watcher.answer()
        wait_for(lambda: not watcher.is_running, "it is dead")
    assert port(watcher.answer()) == 1
