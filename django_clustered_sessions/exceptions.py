"""What can go wrong with a session.

ClusteredSessionError
+-- SessionStoreUnavailable     the store did not answer, or answered that it cannot
+-- SessionConflict             two requests changed one key, and the policy is to say so
+-- SessionTooLarge             the session would exceed CLUSTERED_SESSIONS_MAX_BYTES
+-- SessionLockTimeout          another request kept the session's lock for too long
|   +-- SessionLockRefused      too many wait for it already
+-- SessionLockLost             the lock went to another request before this one wrote
+-- SessionNotReplicated        a write was applied, and too few replicas acknowledged it
+-- SessionReadOnly             a view that said it only reads has changed its session
+-- SessionLimitReached         a user is logged in as often as is allowed

Django's own stay Django's: ``CreateError`` (the key exists), ``UpdateError`` (the session was
ended), ``SessionInterrupted`` (the response to an ``UpdateError``).
"""

from __future__ import annotations

from collections.abc import Sequence


class ClusteredSessionError(Exception):
    """Root of the errors that this package raises.

    ``is_answered``: the log has what a request was answered because of it.
    """

    is_answered: bool = False


class SessionStoreUnavailable(ClusteredSessionError):
    """The session store cannot be used now; the session and its cookie are untouched.

    ``is_away``: it was gone, silent or not ready; False: it has answered that it will not; None:
    it was not asked. ``is_told``: the log tells of its absence already.
    """

    is_away: bool | None = None
    is_told: bool = False


class SessionConflict(ClusteredSessionError):
    """Another request changed the same session keys; nothing of this save was written.

    ``keys`` are the session keys in question.
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
    """Another request kept the session's lock for longer than this one was ready to wait.

    ``holder`` is that request's node and route, ``held_s`` how long it has had the lock, by the
    store's clock.
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
    """The session's lock went to another request; not one byte of this write has landed.

    ``holder`` is who has the lock now, empty where nobody has it any more.
    """

    def __init__(self, session_id: str, holder: str) -> None:
        self.holder = holder
        super().__init__(
            f"session {session_id[:12]}: this request was silent for longer than its lease, and "
            f"{holder or 'another request'} got the lock; nothing of this write has landed. Load "
            "the session again and repeat the change, or raise CLUSTERED_SESSIONS_LOCK_LEASE."
        )


class SessionNotReplicated(ClusteredSessionError):
    """A write was applied, and it is not known to be as safe as the settings ask for.

    The session object is as after any other write. ``acknowledged`` of ``asked`` replicas have
    it, with CLUSTERED_SESSIONS_SYNC_FSYNC on disk.
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
    """A user who logs in has as many sessions as are allowed; nobody is logged in by this.

    ``limit`` is how many those are.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(
            "this user cannot log in once more: CLUSTERED_SESSIONS_MAX_SESSIONS_PER_USER is "
            f"{limit}, and there are as many sessions. Log out of one, or end one by registry."
            "end_session()."
        )
