"""Django signals about sessions, sent in the process where it happens.

``docs/events.md`` lists what each one brings along. A stream in the store has the same, for one
process of the whole cluster to handle: ``manage.py sessionevents``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from django.dispatch import Signal

from .events import reason_of
from .protocol.record import EndReason, SessionKeys

session_created: Final = Signal()
session_ended: Final = Signal()
#: Sent by ``manage.py sessionevents`` alone, which finds what has expired.
session_expired: Final = Signal()


class PendingSignals(list[tuple[Signal, dict[str, Any]]]):
    """What has happened to sessions and nobody in this process has been told yet.

    A receiver's error is logged by Django, and concerns nobody else.
    """

    def created(self, keys: SessionKeys, user_id: str | None) -> None:
        """Note that a session was created."""
        self.append((session_created, {"session_id": keys.id, "user_id": user_id}))

    def ended(
        self,
        keys: SessionKeys,
        user_id: str | None,
        reason: EndReason,
        successor: SessionKeys | None = None,
    ) -> None:
        """Note that a session was ended; ``successor`` is where it lives on."""
        about = {
            "session_id": keys.id,
            "user_id": user_id,
            "reason": reason_of(reason.value),
            "replaced_by": successor.id if successor else None,
        }
        self.append((session_ended, about))

    def send(self, sender: type) -> None:
        """Tell who wants to know; ``sender`` is the class of the sessions."""
        for signal, about in self._told():
            signal.send_robust(sender, **about)

    async def asend(self, sender: type) -> None:
        """See send()."""
        for signal, about in self._told():
            await signal.asend_robust(sender, **about)

    def _told(self) -> Iterator[tuple[Signal, dict[str, Any]]]:
        # One by one: a receiver may use sessions itself.
        while self:
            yield self.pop(0)
