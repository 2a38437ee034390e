"""The time since the user of a session proved who it is, by a login or a confirmation of it.

The record has the time of the login. That of a confirmation is one of the session's values, signed
for its user: it moves with the key, ends with the session and is no other user's, and no value that
a view takes from a request is one.
"""

from __future__ import annotations

from typing import Final

from django.contrib.auth import SESSION_KEY as USER
from django.contrib.sessions.backends.base import UpdateError
from django.core.signing import BadSignature, Signer

from django_clustered_sessions.protocol import flows
from django_clustered_sessions.protocol.effects import Flow
from django_clustered_sessions.protocol.session_data import SessionData

from .load import fill
from .rotate import rotate
from .state import SessionState

#: The session key of a confirmation.
CONFIRMED: Final = "_login_confirmed"

_SALT: Final = "django_clustered_sessions.login_confirmed"


def age_s(state: SessionState) -> Flow[float | None]:
    """Return the seconds since the login or its confirmation, None if nobody is logged in.

    Raises UpdateError if the session was ended.
    """
    data = yield from fill(state)
    if data.user_id is None:
        return None
    if not data.as_stored(USER):
        # This request logs the user in.
        return 0.0
    if state.found is not None and not state.is_local:
        created_ms, now_ms = state.found.meta.created_ms, state.lifetime.now_ms
    else:
        created_ms, now_ms = yield from _ask(state)
    # A request with the key from before a confirmation gains nothing by it, in flight or not.
    confirmed_ms = 0 if state.has_moved_on else _confirmed_ms(data)
    # A clock that was set back must not keep a login recent, so its future is as far as its past.
    return min(abs(now_ms - at_ms) for at_ms in (created_ms, confirmed_ms)) / 1000


def confirm(state: SessionState) -> Flow[None]:
    """Move the session to a new key, and note there that the user has confirmed the login.

    The note is saved with the session, and the old key never has it: somebody else may hold that.
    If others have moved the session meanwhile, they have its new key, and nothing is noted.

    Raises ValueError if nobody is logged in, UpdateError if the session was ended.
    """
    data = yield from fill(state)
    if data.user_id is None:
        raise ValueError("nobody is logged in to this session, so there is no login to confirm")
    if not data.as_stored(USER):
        # This request logs the user in, which is as good.
        return
    yield from rotate(state)
    if state.has_moved_on:
        return
    now_ms = state.lifetime.now_ms if state.lifetime.life else (yield from _ask(state))[1]
    # Seconds in hexadecimal keep the value within the 64 bytes of a compact hash.
    data[CONFIRMED] = _signer(data.user_id).sign(f"{now_ms // 1000:x}")
    state.is_marked_modified = True


def _ask(state: SessionState) -> Flow[tuple[int, int]]:
    """Return the time of the login and the store's clock, in ms."""
    meta, now_ms = None, 0
    if state.keys is not None:
        meta, now_ms = yield from flows.look(state.keys)
    if meta is None:
        raise UpdateError("the session is gone")
    return meta.created_ms, now_ms


def _confirmed_ms(data: SessionData) -> int:
    """Return the time of the confirmation in ms, 0 for none that is this user's."""
    try:
        return int(_signer(str(data.user_id)).unsign(str(data.get(CONFIRMED))), 16) * 1000
    except (BadSignature, ValueError):
        return 0


def _signer(user_id: str) -> Signer:
    return Signer(salt=f"{_SALT}.{user_id}")
