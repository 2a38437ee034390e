"""Links that end one login of a user, whoever opens them.

A link names the user and the time of the login, which the record has to the millisecond. Both move
along when the session gets a new key, and a later login has another time. The session key is not in
it, nor anything that leads to it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final, NamedTuple, Self

from django.contrib.sites.shortcuts import get_current_site
from django.core import signing
from django.http import HttpRequest
from django.urls import reverse

from django_clustered_sessions import registry
from django_clustered_sessions.protocol.record import milliseconds_of
from django_clustered_sessions.registry import SessionInfo

#: Time for which a link is good.
LIFE: Final = timedelta(days=7)

_SALT: Final = "django_clustered_sessions.sign_in"

#: Looks at a user's sessions until one counts as ended: a look may miss one that moves meanwhile.
_LOOKS: Final = 2


class Login(NamedTuple):
    """A login: the user's primary key as a string, and its time in ms by the store's clock."""

    user_id: str
    at_ms: int

    @classmethod
    def of(cls, session: SessionInfo) -> Self:
        """Return the login of a session in which a user is logged in."""
        return cls(str(session.user_id), milliseconds_of(session.created))

    @classmethod
    def read(cls, link: str) -> Self:
        """Return the login that ``sign`` has signed.

        Raises signing.SignatureExpired, a BadSignature, after LIFE; BadSignature for another text.
        """
        user_id, at_ms = signing.loads(link, salt=_SALT, max_age=LIFE)
        return cls(user_id, at_ms)

    def sign(self) -> str:
        """Return this signed, with the time of now."""
        return signing.dumps(self, salt=_SALT)

    def session(self, current: Any = None) -> SessionInfo | None:
        """Return the session of this login, None if it is over; ``current`` as in the registry.

        Raises SessionStoreUnavailable.
        """
        for _ in range(_LOOKS):
            for session in registry.sessions_of(self.user_id, current=current):
                if Login.of(session) == self:
                    return session
        return None

    def end(self) -> bool:
        """End the session of this login; return whether it was this call that did so.

        Raises SessionStoreUnavailable; SessionNotReplicated, once it is ended.
        """
        while session := self.session():
            # Otherwise it has got a new key meanwhile, or is over.
            if registry.end_session(session.id):
                return True
        return False


def url_of(request: HttpRequest, session: SessionInfo) -> str:
    """Return the address of the page that ends a session, on the site of the request.

    It serves once, for LIFE, and for whoever has it.

    Raises NoReverseMatch where ``django_clustered_sessions.urls`` is not included.
    """
    path = reverse("clustered_sessions:end_sign_in", args=[Login.of(session).sign()])
    return f"{request.scheme}://{get_current_site(request).domain}{path}"
