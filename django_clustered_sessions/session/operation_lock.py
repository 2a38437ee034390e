"""One operation of a session object at a time, though threads and tasks share the object."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Final

#: Seconds between two looks of a task while a thread has the turn, whose end wakes no task.
_LOOK_S: Final = 0.005

_unfinished: set[asyncio.Task[Any]] = set()


class OperationLock:
    """The turn of a thread or task. Threads enter ``lock``; tasks use ``aenter()`` and ``leave()``.

    Not a class with ``__enter__``: a signal's exception between its lines would leave the lock
    behind. A copy of it is another one.
    """

    #: True if a task has ``lock``, which its thread could enter once more.
    _has_task: bool = False

    def __init__(self) -> None:
        # A flow may ask its session what would begin another one.
        self.lock = threading.RLock()
        #: For the values themselves, which threads change without a trip.
        self.values = threading.RLock()
        self._sleepers: list[asyncio.Future[None]] = []

    def __reduce__(self) -> tuple[type[OperationLock], tuple[()]]:
        return type(self), ()

    async def aenter(self) -> None:
        """Wait for this task's turn."""
        while self._has_task or not self.lock.acquire(blocking=False):
            sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._sleepers.append(sleeper)
            await asyncio.wait([sleeper], timeout=_LOOK_S)
        self._has_task = True

    def leave(self) -> None:
        """End this task's turn, and wake those that wait."""
        self._has_task = False
        self.lock.release()
        if self._sleepers:
            sleepers, self._sleepers = self._sleepers, []
            for sleeper in sleepers:
                # Its loop may have ended.
                with suppress(RuntimeError):
                    sleeper.get_loop().call_soon_threadsafe(_wake, sleeper)


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)


async def to_its_end(work: Coroutine[Any, Any, Any]) -> None:
    """Await ``work``, which goes on where the waiting task is cancelled, as often as it may be."""
    task = asyncio.get_running_loop().create_task(work)
    _unfinished.add(task)
    task.add_done_callback(_unfinished.discard)
    await asyncio.shield(task)
