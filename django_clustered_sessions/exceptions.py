"""What can go wrong with a session.

ClusteredSessionError
+-- SessionStoreUnavailable     the store did not answer, or answered that it cannot
+-- SessionConflict             two requests changed one key, and the policy is to say so
+-- SessionTooLarge             the session would exceed CLUSTERED_SESSIONS_MAX_BYTES

Django's own stay Django's: ``CreateError`` (the key exists), ``UpdateError`` (the session was
ended), ``SessionInterrupted`` (the response to an ``UpdateError``).
"""

from __future__ import annotations

from collections.abc import Sequence


class ClusteredSessionError(Exception):
    """Root of the errors that this package raises."""


class SessionStoreUnavailable(ClusteredSessionError):
    """The session store cannot be used now; the session and its cookie are untouched."""


class SessionConflict(ClusteredSessionError):
    """Another request changed the same session keys; nothing of this save was written.

    ``keys`` are the session keys in question.
    """

    def __init__(self, session_id: str, keys: Sequence[str]) -> None:
        self.keys = tuple(keys)
        super().__init__(
            f"session {session_id}: another request changed {', '.join(map(repr, self.keys))} "
            "since this one loaded it; nothing of this save was written. Load the session again "
            "and repeat the change."
        )


class SessionTooLarge(ClusteredSessionError):
    """The session would be larger than allowed; the stored one stays as it was.

    ``size`` and ``limit`` are stored bytes.
    """

    def __init__(self, session_id: str, size: int, limit: int) -> None:
        self.size = size
        self.limit = limit
        super().__init__(
            f"session {session_id}: {size} bytes exceed CLUSTERED_SESSIONS_MAX_BYTES = {limit}; "
            "the stored session stays as it was. Keep large data elsewhere and a reference to it "
            "in the session, or raise the limit."
        )
