"""Exceptions of this package.

ClusteredSessionError
+-- SessionStoreUnavailable     the store did not answer, or answered that it cannot
+-- SessionConflict             two requests changed one session key, and ON_CONFLICT is "error"
+-- SessionTooLarge             the session would exceed CLUSTERED_SESSIONS_MAX_BYTES
+-- SessionLockTimeout          another request kept the session's lock for too long
|   +-- SessionLockRefused      too many requests wait for the lock already
+-- SessionLockLost             the lock went to another request before this one wrote
+-- SessionNotReplicated        a write was applied, and too few replicas acknowledged it
+-- SessionReadOnly             a view marked session_read_only has changed its session
+-- SessionLimitReached         the user has the allowed number of sessions already
+-- SessionIdAmbiguous          several sessions have ids that begin with what was asked for

Django's own stay Django's: ``CreateError`` (the key exists), ``UpdateError`` (the session was
ended), ``SessionInterrupted`` (the response to an ``UpdateError``).
"""

from __future__ import annotations

from collections.abc import Sequence


class ClusteredSessionError(Exception):
    """Root of the errors that this package raises.

    ``is_answered``: the log has the response that the error led to.
    """

    is_answered: bool = False


class SessionStoreUnavailable(ClusteredSessionError):
    """The session store cannot be used now; the session and its cookie are untouched.

    ``is_away``: True if the store was unreachable, silent or not ready, False if it refused, None
    if it was not asked. ``is_told``: the log has the outage already.
    """

    is_away: bool | None = None
    is_told: bool = False


class SessionConflict(ClusteredSessionError):
    """Another request changed the same session keys; nothing of this save was written.

    ``keys`` are the names of these keys.
    """

    def __init__(self, session_id: str, keys: Sequence[str]) -> None:
        self.keys = tuple(keys)
        super().__init__(
            f"session {session_id[:12]}: another request changed {', '.join(map(repr, self.keys))} "
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
            f"session {session_id[:12]}: {size} bytes exceed CLUSTERED_SESSIONS_MAX_BYTES, which "
            f"is {limit}; the stored session stays as it was. Keep large data elsewhere and a "
            "reference to it in the session, or raise the limit."
        )


class SessionLockTimeout(ClusteredSessionError):
    """Another request held the session's lock for longer than this one was to wait.

    ``holder`` is that request's node and route, ``held_s`` the time that it has held the lock, by
    the store's clock.
    """

    def __init__(self, session_id: str, holder: str, held_s: float, why: str, advice: str) -> None:
        self.holder = holder
        self.held_s = held_s
        super().__init__(
            f"session {session_id[:12]}: {why}. Its lock is held by {holder or 'another request'}, "
            f"for {held_s:.1f} s now. {advice}"
        )


class SessionLockRefused(SessionLockTimeout):
    """Too many requests wait for the session's lock already."""


class SessionLockLost(ClusteredSessionError):
    """The session's lock went to another request; nothing of this write is stored.

    ``holder`` is the node and route that hold the lock now, empty if the lock is free.
    """

    def __init__(self, session_id: str, holder: str) -> None:
        self.holder = holder
        super().__init__(
            f"session {session_id[:12]}: this request was silent for longer than its lease, and "
            f"{holder or 'another request'} got the lock; nothing of this write has landed. Load "
            "the session again and repeat the change, or raise CLUSTERED_SESSIONS_LOCK_LEASE."
        )


class SessionNotReplicated(ClusteredSessionError):
    """A write was applied, but fewer replicas acknowledged it than the settings ask for.

    The session object is as after any other write. ``acknowledged`` of ``asked`` replicas have
    the write, with CLUSTERED_SESSIONS_SYNC_FSYNC on disk.
    """

    def __init__(self, session_id: str, acknowledged: int, asked: int, why: str) -> None:
        self.acknowledged = acknowledged
        self.asked = asked
        super().__init__(
            f"session {session_id[:12]}: {why}. The write was applied; whether it would outlast "
            "its primary is not known. Do not repeat the change: save() once more asks again. See "
            "to the replicas, or to CLUSTERED_SESSIONS_SYNC_REPLICAS, SYNC_FSYNC and "
            "STORE_TIMEOUT."
        )


class SessionReadOnly(ClusteredSessionError):
    """A view marked ``session_read_only`` has changed its session; nothing was written."""

    def __init__(self, route: str) -> None:
        super().__init__(
            f"the view of {route or 'this request'} is marked session_read_only and has changed "
            "its session; nothing was written. Take the mark away, or the change."
        )


class SessionLimitReached(ClusteredSessionError):
    """The user has the allowed number of sessions already; the login was refused.

    ``limit`` is the allowed number.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(
            "the login is refused: this user has as many sessions as "
            f"CLUSTERED_SESSIONS_MAX_SESSIONS_PER_USER allows, {limit}. Log out of one, or end one "
            "by registry.end_session()."
        )


class SessionIdAmbiguous(ClusteredSessionError, ValueError):
    """Several sessions have public ids that begin with what was asked for; ``ids`` are theirs."""

    def __init__(self, start: str, ids: Sequence[str]) -> None:
        self.ids = tuple(ids)
        shown = ", ".join(one[: max(12, len(start) + 4)] for one in self.ids[:5])
        more = f" and {len(self.ids) - 5} more" if len(self.ids) > 5 else ""
        super().__init__(
            f"{len(self.ids)} sessions have ids that begin with {start!r}: {shown}{more}. Give "
            "more characters."
        )
