"""Django signals about sessions, sent in the process that creates or ends the session.

``docs/events.md`` lists their arguments. The same events go to a stream in the store, where one
process of the whole cluster handles each: ``manage.py sessionevents``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from django.dispatch import Signal

from .events import reason_of
from .protocol.record import EndReason, SessionKeys

#: Sent after the store has stored a new session; with ``session_id``, ``user_id`` and ``client``.
session_created: Final = Signal()
#: Sent after the store has stored that a user has logged in to a session; with ``session_id``,
#: ``user_id``, ``client`` and ``request``.
session_login: Final = Signal()
#: Sent after the store has ended a session; with ``session_id``, ``user_id``, ``reason`` and
#: ``replaced_by``.
session_ended: Final = Signal()
#: Sent for a session that has expired; with ``session_id``, ``user_id`` and ``event``. Sent by
#: ``manage.py sessionevents`` alone, because only its sweep finds expired sessions.
session_expired: Final = Signal()


class PendingSignals(list[tuple[Signal, dict[str, Any]]]):
    """Signals that are noted during an operation and sent after it.

    Django logs a receiver's error; it does not affect the operation or other receivers.
    """

    def created(self, keys: SessionKeys, user_id: str | None, client: object) -> None:
        """Note that a session was created, from a ``client_info.Client`` or None."""
        about = {"session_id": keys.id, "user_id": user_id, "client": client}
        self.append((session_created, about))

    def logged_in(
        self, keys: SessionKeys, user_id: str | None, client: object, request: object
    ) -> None:
        """Note that a user has logged in; see created(). ``request`` is None outside of one."""
        about = {"session_id": keys.id, "user_id": user_id, "client": client, "request": request}
        self.append((session_login, about))

    def moved(self, old: SessionKeys, new: SessionKeys) -> None:
        """Note that a session has moved before it was told that a user has logged in to it."""
        for signal, about in self:
            if signal is session_login and about["session_id"] == old.id:
                about["session_id"] = new.id

    def ended(
        self,
        keys: SessionKeys,
        user_id: str | None,
        reason: EndReason,
        successor: SessionKeys | None = None,
    ) -> None:
        """Note that a session was ended; ``successor`` names the session that replaces it."""
        about = {
            "session_id": keys.id,
            "user_id": user_id,
            "reason": reason_of(reason.value),
            "replaced_by": successor.id if successor else None,
        }
        self.append((session_ended, about))

    def send(self, sender: type) -> None:
        """Send the noted signals; ``sender`` is the class of the sessions."""
        for signal, about in self._told():
            signal.send_robust(sender, **about)

    async def asend(self, sender: type) -> None:
        """See send()."""
        for signal, about in self._told():
            await signal.asend_robust(sender, **about)

    def _told(self) -> Iterator[tuple[Signal, dict[str, Any]]]:
        # One by one, because a receiver may use sessions, which may note more.
        while self:
            yield self.pop(0)
