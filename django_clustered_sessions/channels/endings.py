"""Watch sessions for their end, for objects that live as long as a session, such as websockets.

The store publishes nothing: a message lost with its connection would leave a socket open for good.
One task for each event loop polls all watched sessions together, while there are any.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable, Sequence
from typing import Final

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.conf import conf
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.protocol import flows
from django_clustered_sessions.protocol.record import EndReason, SessionKeys
from django_clustered_sessions.store import connections, runner

logger = logging.getLogger("django_clustered_sessions")

#: Seconds between two polls, so that an end is noticed within a second.
INTERVAL_S: Final = 0.5
#: Sessions polled on one round trip, so that it blocks the event loop for a few ms only.
BATCH: Final = 500


class Watch:
    """Watch of one session; calls ``on_end`` once with the reason for its end, in its event loop.

    Watching begins once the session is known to exist. A key that ``session`` itself cycles, as by
    a login there, is no end.
    """

    def __init__(self, session: SessionStore, on_end: Callable[[EndReason], None]) -> None:
        self._session, self.on_end = session, on_end
        self._key = session.session_key
        self._place: SessionKeys | None = None
        self._is_known = self._is_loaded
        self._has_moved = False

    @property
    def _is_loaded(self) -> bool:
        # The key is unproven until a load: a session that does not exist loses its key.
        return hasattr(self._session, "_session_cache") and self._session.session_key is not None

    def keys(self) -> SessionKeys | None:
        """Return the session's keys, None if there is nothing to poll."""
        if not self._is_known:
            key, ended = self._session.session_key, self._session.state.ended
            # A key dropped without a reason: this very object ended the session.
            if key is None and (ended is EndReason.ROTATED or (self._key and ended is None)):
                self.end(ended or EndReason.FLUSHED)
            self._turn_to(key)
        if self._place is None and self._key is not None:
            self._place = SessionKeys.of(conf.key_prefix, self._key)
        return self._place

    def learn(self, keys: SessionKeys, reason: EndReason | None) -> None:
        """Note the store's answer: the reason why there is no session, None if there is one."""
        if self._place is None or keys.record != self._place.record:
            return
        if reason is None:
            self._is_known, self._has_moved = True, False
        elif reason is EndReason.ROTATED:
            key = self._session.session_key
            if key not in (None, self._key):
                self._turn_to(key)
            elif self._has_moved:
                self.end(reason)
            # Perhaps ``session`` itself is cycling its key, and has no reply yet.
            self._has_moved = True
        elif self._is_known or self._is_loaded:
            self.end(reason)

    def end(self, reason: EndReason) -> None:
        stop(self)
        self.on_end(reason)

    def _turn_to(self, key: str | None) -> None:
        if key != self._key:
            self._key, self._place, self._has_moved = key, None, False


class Watcher:
    """Poller of the watches of one event loop."""

    def __init__(self) -> None:
        self.watches: set[Watch] = set()
        # In an empty context: the task outlives the socket that started it.
        loop, context = asyncio.get_running_loop(), contextvars.Context()
        self.task = loop.create_task(self._run(), name="session-ends", context=context)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                await self.look()
            except Exception:
                # Without this task no socket here would ever be closed.
                logger.exception("cannot poll for ended sessions; the next poll tries again")

    async def look(self) -> None:
        watched: dict[str, tuple[SessionKeys, list[Watch]]] = {}
        for watch in list(self.watches):
            if keys := watch.keys():
                watched.setdefault(keys.record, (keys, []))[1].append(watch)
        # Node by node in parallel, so that an unreachable cluster node delays no other.
        nodes: dict[object, list[tuple[SessionKeys, list[Watch]]]] = {}
        for record, found in watched.items():
            nodes.setdefault(connections.node(record), []).append(found)
        await asyncio.gather(*map(self._ask, nodes.values()))

    async def _ask(self, watched: Sequence[tuple[SessionKeys, Sequence[Watch]]]) -> None:
        for first in range(0, len(watched), BATCH):
            batch = watched[first : first + BATCH]
            try:
                reasons = await runner.arun(flows.ends([keys for keys, _ in batch]))
            except SessionStoreUnavailable:
                # An outage ends no session, and the failing requests log it.
                return
            for (keys, watches), reason in zip(batch, reasons, strict=True):
                for watch in watches:
                    if watch in self.watches:
                        watch.learn(keys, reason)


watchers: dict[asyncio.AbstractEventLoop, Watcher] = {}


def start(watch: Watch) -> None:
    """Watch in the running event loop, until the end is reported or the watch is removed."""
    loop = asyncio.get_running_loop()
    watcher = watchers.get(loop)
    if watcher is None:
        for other in [other for other in watchers if other.is_closed()]:
            watchers.pop(other, None)
        watcher = watchers[loop] = Watcher()
    watcher.watches.add(watch)


def stop(watch: Watch) -> None:
    """Remove a watch; without watches the store is not polled."""
    loop = asyncio.get_running_loop()
    if watcher := watchers.get(loop):
        watcher.watches.discard(watch)
        if not watcher.watches:
            del watchers[loop]
            watcher.task.cancel()
