"""The replication of one session object's writes, as far as the settings ask for it."""

from __future__ import annotations

import logging
from typing import Final, TypeVar

from django_clustered_sessions.conf import conf
from django_clustered_sessions.exceptions import SessionNotReplicated
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol import riders
from django_clustered_sessions.protocol.effects import Flow
from django_clustered_sessions.protocol.options import SyncOptions
from django_clustered_sessions.protocol.record import SessionKeys
from django_clustered_sessions.protocol.results import Acknowledged
from django_clustered_sessions.store.budget import Budget

T = TypeVar("T")

logger = logging.getLogger("django_clustered_sessions")

#: The part of what is left of STORE_TIMEOUT that a write may wait for replicas. A trip's first
#: attempt has half, and a wait that outlasted it would be taken for a store that is away.
SHARE: Final = 0.4


def wanted(budget: Budget | None = None) -> SyncOptions | None:
    """Return what the settings want a write to wait for, None for nothing.

    ``budget`` is the store's time for it, STORE_TIMEOUT where there is none.
    """
    if not conf.sync_replicas and not conf.sync_fsync:
        return None
    left_s = budget.left if budget else conf.store_timeout
    timeout_ms = int(SHARE * left_s * 1000)
    # 0 would be for ever.
    return SyncOptions(conf.sync_replicas, conf.sync_fsync, max(timeout_ms, 1))


class Replication:
    """The outcome of waiting for the replicas of one session object's writes."""

    #: The error of the last write that landed, where too few acknowledged it.
    shortfall: SessionNotReplicated | None = None
    #: Time in ms from the last write until its replicas had been waited for, by the store's clock.
    after_ms: int = 0

    def awaited(self, keys: SessionKeys, flow: Flow[T], sync: SyncOptions | None) -> Flow[T]:
        """Return a flow whose writes are acknowledged as ``sync`` says."""
        self.after_ms = 0
        return flow if sync is None else self._awaited(keys, flow, sync)

    def _awaited(self, keys: SessionKeys, flow: Flow[T], sync: SyncOptions) -> Flow[T]:
        heard: list[Acknowledged] = []
        try:
            return (yield from riders.acknowledged(flow, sync, heard.append))
        finally:
            if heard:
                self._take(keys, sync, heard)

    def answer(self) -> None:
        """Say so if too few have acknowledged the last write.

        Raises SessionNotReplicated, if that is the setting.
        """
        if self.shortfall is None:
            return
        if conf.on_sync_shortfall == "error":
            raise self.shortfall
        logger.warning("%s", self.shortfall)
        self.shortfall = None

    def _take(self, keys: SessionKeys, sync: SyncOptions, heard: list[Acknowledged]) -> None:
        """Count, and remember the worst of the writes; a move to another node is two."""
        self.after_ms = max(heard[-1].after_ms, 0)
        short = [one for one in heard if not _is_enough(one, sync)]
        counters.add(
            sync_waits=len(heard),
            sync_shortfalls=len(short),
            sync_wait_ms=sum(max(one.after_ms, 0) for one in heard if one not in short),
        )
        self.shortfall = _error(keys, sync, short[0]) if short else None


def _is_enough(found: Acknowledged, sync: SyncOptions) -> bool:
    has_all = found.replicas >= sync.replicas and (found.is_on_disk or not sync.fsync)
    return has_all and not found.problem


def _error(keys: SessionKeys, sync: SyncOptions, found: Acknowledged) -> SessionNotReplicated:
    if found.problem:
        why = f"the store does not tell whether it is replicated: {found.problem}"
    else:
        have = "have it on disk" if sync.fsync else "have it"
        why = (
            f"{found.replicas} of {sync.replicas} replicas said within {sync.timeout_ms} ms that "
            f"they {have}"
        )
        if sync.fsync and not found.is_on_disk:
            why += ", and the primary did not say so"
    return SessionNotReplicated(keys.id, found.replicas, sync.replicas, why)
