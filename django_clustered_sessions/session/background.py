"""Work of this process that is no request's: in rounds, by a thread or by a task of an event loop.

One thread has what was given to it synchronously, one task of each event loop the rest. Each starts
with the first work and ends when there was none for a while. A forked process has none.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from typing import ClassVar, Final, Generic, TypeVar

from django_clustered_sessions.protocol.effects import Flow
from django_clustered_sessions.store import runner

logger = logging.getLogger("django_clustered_sessions")

#: Thread and task end after so many seconds without work.
IDLE_S: Final = 10.0


class Background(ABC):
    """Work in rounds, by a thread, or by a task of the event loop ``loop``.

    It reads no setting between two rounds. A round that fails is logged, and the next one comes all
    the same: nobody else would do the rest of the work.
    """

    #: Name of the thread and of the task.
    name: ClassVar[str]
    #: Seconds between two rounds.
    interval_s: float

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        #: Guards the work, and the decision to end without any.
        self.lock = threading.Lock()
        self._loop = loop
        self._worker: threading.Thread | asyncio.Task[None] | None = None
        self._has_failed = False

    @property
    def is_running(self) -> bool:
        """True while the rounds are under way."""
        worker = self._worker
        # Asked of the thread itself: a signal's exception may break off its start.
        if isinstance(worker, threading.Thread):
            return worker.is_alive()
        return worker is not None and not worker.done()

    @property
    @abstractmethod
    def has_work(self) -> bool:
        """True if there is something to look after."""

    @abstractmethod
    def round(self) -> Flow[None]:
        """Do what is due."""

    @abstractmethod
    def stopped(self) -> None:
        """Leave the work of an event loop that has ended to the threads, or give it up."""

    def start(self) -> None:
        """Begin with the rounds, unless they are under way; to be called when there is work."""
        with self.lock:
            if self.is_running:
                return
            if self._loop is not None:
                # In an empty context: the task outlives the request that started it. Not by an
                # argument, which a site's own task factory may not take.
                self._worker = Context().run(self._loop.create_task, self._awork())
                self._worker.set_name(self.name)
                return
            self._worker = threading.Thread(target=self._work, name=self.name, daemon=True)
            try:
                self._worker.start()
            except RuntimeError as error:
                # There is no thread to be had, or the process ends; the next work tries again.
                logger.debug("%s cannot start: %s", self.name, error)

    def _work(self) -> None:
        for pause_s in self._pauses():
            time.sleep(pause_s)
            if self.has_work:
                with self._failures_logged():
                    runner.run(self.round())

    async def _awork(self) -> None:
        try:
            for pause_s in self._pauses():
                await asyncio.sleep(pause_s)
                if self.has_work:
                    with self._failures_logged():
                        await runner.arun(self.round())
        except BaseException:
            # The loop has ended, as one does with each request under ``async_to_sync``.
            self.stopped()
            raise

    def _pauses(self) -> Iterator[float]:
        """Yield the seconds until each round, as long as there is work."""
        idle_s = 0.0
        while idle_s < IDLE_S or not self._ends():
            pause_s = self.interval_s
            yield pause_s
            idle_s = 0.0 if self.has_work else idle_s + pause_s

    def _ends(self) -> bool:
        """End, unless work has come since the last look."""
        with self.lock:
            if self.has_work:
                return False
            self._worker = None
            return True

    @contextmanager
    def _failures_logged(self) -> Iterator[None]:
        """Log what a round raises, the first of several in a row."""
        try:
            yield
        except Exception:
            level = logging.DEBUG if self._has_failed else logging.ERROR
            self._has_failed = True
            logger.log(level, "%s: a round failed; the next tries again", self.name, exc_info=True)
        else:
            self._has_failed = False


B = TypeVar("B", bound=Background)


class Worlds(Generic[B]):
    """The work of one kind in this process: one for its threads, one for each event loop."""

    def __init__(self, kind: Callable[[asyncio.AbstractEventLoop | None], B]) -> None:
        self._kind = kind
        self.start_anew()
        os.register_at_fork(after_in_child=self.start_anew)

    def start_anew(self) -> None:
        """Leave to the parent of a forked process what it has begun."""
        self.sync = self._kind(None)
        self._async: dict[asyncio.AbstractEventLoop, B] = {}

    def here(self) -> B:
        """Return the one of the running event loop, or of the threads."""
        # Not get_running_loop(): off a loop, an exception on each call.
        loop = asyncio._get_running_loop()
        if loop is None:
            return self.sync
        if loop not in self._async:
            # Other threads, each with a loop of its own, do the same meanwhile.
            for ended in [one for one in list(self._async) if one.is_closed()]:
                if its := self._async.pop(ended, None):
                    its.stopped()
            self._async[loop] = self._kind(loop)
        return self._async[loop]

    def all(self) -> Sequence[B]:
        """Return each of them."""
        return [self.sync, *self._async.values()]
