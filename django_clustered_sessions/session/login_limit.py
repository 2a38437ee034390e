"""One session object's part in its user's number of sessions, where that is limited."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from django_clustered_sessions.conf import conf
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.monitoring.counters import counters
from django_clustered_sessions.protocol import flows, login_limit
from django_clustered_sessions.protocol.effects import Flow
from django_clustered_sessions.protocol.login_limit import Limit
from django_clustered_sessions.protocol.options import SyncOptions
from django_clustered_sessions.protocol.record import NOBODY, EndReason, SessionKeys
from django_clustered_sessions.signals import PendingSignals

from .near_cache import near_cache
from .replication import Replication


@dataclass(frozen=True, slots=True)
class Claim:
    """A session's claim to be a user's, and when it was made, in seconds."""

    keys: SessionKeys
    user: str
    made_s: float


class LoginLimit:
    """The claim of a login that this object has not written yet."""

    #: The claim, None where there is none.
    claim: Claim | None = None
    _may_be_written: bool = False

    def claiming(
        self, keys: SessionKeys, user: str, sync: SyncOptions | None, signals: PendingSignals
    ) -> Flow[None]:
        """Claim that the session at ``keys`` may become a user's, unless that was done just now.

        Raises SessionLimitReached.
        """
        if (limit := _limit()) is None:
            return
        claim, now_s = self.claim, time.monotonic()
        if claim and (claim.keys, claim.user) == (keys, user):
            if now_s - claim.made_s < login_limit.FRESH_S:
                return
        else:
            yield from self.giving_back()

        def end(all_keys: Sequence[SessionKeys]) -> Flow[None]:
            return _ending(all_keys, user, sync, signals)

        yield from login_limit.claim(keys, conf.key_prefix, user, limit, end, time.monotonic)
        self.claim, self._may_be_written = Claim(keys, user, now_s), False

    def writing(self) -> None:
        """Take note that the login is about to be written."""
        self._may_be_written = True

    def moving(self, new: SessionKeys, user: bytes) -> Flow[None]:
        """Have the session counted while it moves to a new place; ``user`` is the user's tag."""
        if (limit := _limit()) and user != NOBODY:
            yield from login_limit.keep(new, conf.key_prefix, user, limit)

    def giving_back(self) -> Flow[None]:
        """Give up the claim of a login that was not written.

        One that may have been is kept: a count may have been made before it was.
        """
        claim, self.claim = self.claim, None
        if claim and not self._may_be_written:
            with suppress(SessionStoreUnavailable):
                yield from login_limit.give_back(claim.keys, conf.key_prefix, claim.user)


def _ending(
    all_keys: Sequence[SessionKeys], user: str, sync: SyncOptions | None, signals: PendingSignals
) -> Flow[None]:
    for keys in all_keys:
        replication = Replication()
        ending = flows.end(keys, EndReason.LIMIT, conf.events_kept)
        ended = yield from replication.awaited(keys, ending, sync)
        near_cache.end(keys.record)
        if ended:
            counters.ended([ended.lifetime_ms])
            # A login that was not written yet has no user.
            signals.ended(keys, user if ended.user else None, EndReason.LIMIT)
        replication.answer()


def _limit() -> Limit | None:
    most = conf.max_sessions_per_user
    if most is None:
        return None
    lapse_ms = login_limit.lapse_ms(conf.lock_wait, conf.store_timeout)
    ends_oldest = conf.on_session_limit == "end_oldest"
    return Limit(most, ends_oldest, lapse_ms, conf.events_kept)
