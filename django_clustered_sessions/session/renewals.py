"""Renew sliding sessions in batches, so that their reads take no trip: see ``near_reads``.

A renewal leaves within a second: from a thread of the process, from a task of the event loop, or at
the process's end. Until then the request goes by the deadline that the store will set.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.protocol.commands import records
from django_clustered_sessions.protocol.effects import Flow, batches
from django_clustered_sessions.protocol.options import WriteOptions
from django_clustered_sessions.protocol.record import (
    Loaded,
    NewerFormat,
    SessionKeys,
    step_ms,
)
from django_clustered_sessions.protocol.results import Gone
from django_clustered_sessions.store import runner
from django_clustered_sessions.store.budget import Budget

from . import near_reads
from .background import Background, Worlds
from .near_cache import near_cache
from .state import SessionState

logger = logging.getLogger("django_clustered_sessions")

#: Seconds between two batches.
INTERVAL_S: Final = 0.5
#: A batch that is so late, in seconds, does not come: there are no threads, or the store is away.
_LATE_S: Final = 2.0
#: A session that has less to live, in ms, is renewed at once.
_BRINK_MS: Final = 5000
#: Renewals on one trip.
_AT_ONCE: Final = 100
#: Seconds that a process gives the store at its end.
_LAST_BUDGET_S: Final = 0.5

_Due = tuple[SessionKeys, WriteOptions]


def renew_later(
    state: SessionState, keys: SessionKeys, loaded: Loaded, options: WriteOptions
) -> bool:
    """Renew a session that was read within a second; return False where that may be too late."""
    now_ms, before_ms = state.lifetime.seen_ms, loaded.meta.deadline_ms
    deadline_ms = loaded.meta.renewed_ms(now_ms, options.ages)
    if 0 <= deadline_ms - before_ms < step_ms(deadline_ms - now_ms):
        # The store takes it for none.
        deadline_ms = before_ms
    batch = _batches.here()
    if before_ms - now_ms < _BRINK_MS or deadline_ms < before_ms or batch.is_late:
        return False
    batch.add(keys, options)
    state.lifetime.see(now_ms, deadline_ms, loaded.meta.mode)
    state.lifetime.renewed(loaded.meta, options.ages)
    return True


class Batch(Background):
    """The renewals of one world that have yet to leave."""

    name = "session-renewals"
    interval_s = INTERVAL_S

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        super().__init__(loop)
        self._due: dict[SessionKeys, WriteOptions] = {}
        self._since_s = 0.0

    @property
    def has_work(self) -> bool:
        """See Background.has_work."""
        return bool(self._due)

    @property
    def is_late(self) -> bool:
        """True if the renewals do not leave in time."""
        return bool(self._due) and time.monotonic() - self._since_s > _LATE_S

    def add(self, keys: SessionKeys, options: WriteOptions) -> None:
        """Renew a session with the next batch."""
        with self.lock:
            if not self._due:
                self._since_s = time.monotonic()
            self._due[keys] = options
        self.start()

    def round(self) -> Flow[None]:
        """Renew what is due; what cannot be, or is broken off, stays due."""
        with self.lock:
            due = list(self._due.items())
        for some in batches(due, _AT_ONCE):
            try:
                yield from _renewing(some)
            except SessionStoreUnavailable as error:
                logger.debug("%d sessions could not be renewed yet: %s", len(due), error)
                return
            with self.lock:
                self._since_s = time.monotonic()
                for keys, options in some:
                    # Not what has come meanwhile.
                    if self._due.get(keys) is options:
                        del self._due[keys]

    def stopped(self) -> None:
        """Leave to the threads' batch what is due."""
        with self.lock:
            due, self._due = self._due, {}
        for keys, options in due.items():
            _batches.sync.add(keys, options)


def _renewing(due: Sequence[_Due]) -> Flow[None]:
    replies = yield tuple(records.touch(keys, options) for keys, options in due)
    alive = []
    for (keys, _), reply in zip(due, replies, strict=True):
        with suppress(NewerFormat):
            if isinstance(records.parse_touch(reply), Gone):
                near_cache.drop(keys.record)
            else:
                alive.append(keys)
    yield from near_reads.track_again(alive)


def renew_the_rest() -> None:
    """Send what is due; a store that is away then does without."""
    for batch in _batches.all():
        try:
            runner.run(batch.round(), Budget(_LAST_BUDGET_S))
        except Exception as error:
            logger.debug("the last renewals of this process are lost: %s", error)


_batches = Worlds(Batch)
atexit.register(renew_the_rest)
