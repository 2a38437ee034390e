"""The use that a request makes of its session, by its view's decorators, method and headers."""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from typing import Any, Final
from weakref import ref

from django.core import signing
from django.http import HttpRequest
from django.urls import Resolver404, ResolverMatch, resolve

from django_clustered_sessions.conf import Nonstop, conf
from django_clustered_sessions.decorators import NO_MARKS, Access, Marks, marks_of

from .client_info import Client

#: The header by which a request that a view makes to its own site runs under the view's lock.
HEADER: Final = "X-Session-Lock"

_META: Final = f"HTTP_{HEADER.upper().replace('-', '_')}"
_SALT: Final = "django_clustered_sessions.lock"
_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})


class Policy:
    """The policy outside a request: no lock, except by ``session.lock()``."""

    access: Access = Access.UNLOCKED
    #: True if this counts as a use, which renews the session.
    touches: bool = True
    #: True if the session has to be read from the store.
    is_fresh: bool = False
    #: The behaviour while the store is away.
    nonstop: Nonstop = "exception"
    #: True if a lock that is asked for without the view's saying so may be done without.
    lock_is_optional: bool = False
    #: The pattern of the request's route; never its path, which may hold secrets.
    route: str = ""
    #: From where the session is used, packed; empty where that is not known.
    client: bytes = b""
    #: The request, None outside of one.
    request: HttpRequest | None = None
    #: The header that says under which lock the request runs, as it came; empty if there is none.
    lock_header: str = ""

    def apply(self, marks: Marks) -> bool:
        """Take what a view's decorators say, once the view is called.

        Return whether none has said before how the view uses the session.
        """
        return False


class RequestPolicy(Policy):
    """The policy of a request.

    The path is resolved here where a middleware touches the session before Django has done it.
    """

    def __init__(self, request: HttpRequest) -> None:
        # The request has the session: one that kept its request would keep it, and what was
        # uploaded with it, until Python looks for cycles.
        self._request = ref(request)
        self._headers = request.META
        self.lock_header = request.META.get(_META, "")

    @property
    def request(self) -> HttpRequest | None:  # type: ignore[override]
        """The request, None once it is over."""
        return self._request()

    @cached_property
    def _marks(self) -> Marks:
        request = self._request()
        match = request and (request.resolver_match or _match(request))
        return marks_of(match.func) if match else NO_MARKS

    @cached_property
    def access(self) -> Access:  # type: ignore[override]
        """The view's use of the session: by its decorator, or by CLUSTERED_SESSIONS_LOCKING."""
        if self._marks.access:
            return self._marks.access
        locking, request = conf.locking, self._request()
        is_safe = request is not None and request.method in _SAFE_METHODS
        locks = locking == "all" or (locking == "write" and not is_safe)
        return Access.LOCKED if locks else Access.UNLOCKED

    @cached_property
    def touches(self) -> bool:  # type: ignore[override]
        """True if this counts as a use, which renews the session."""
        return self._marks.touches

    @property
    def is_fresh(self) -> bool:  # type: ignore[override]
        """True if the session has to be read from the store."""
        return self._marks.is_fresh

    @property
    def nonstop(self) -> Nonstop:  # type: ignore[override]
        """The behaviour while the store is away: the view's, or CLUSTERED_SESSIONS_NONSTOP."""
        return self._marks.nonstop or conf.nonstop

    @property
    def lock_is_optional(self) -> bool:  # type: ignore[override]
        """True if only the setting asks for the lock, and the view says what it does without."""
        return self._marks.nonstop is not None and self._marks.access is None

    @property
    def route(self) -> str:  # type: ignore[override]
        """The pattern of the request's route."""
        if (request := self._request()) is None:
            return ""
        match = request.resolver_match or _match(request)
        return f"{request.method} /{match.route}" if match else ""

    @cached_property
    def client(self) -> bytes:  # type: ignore[override]
        """From where the session is used, packed."""
        return Client.of(self._headers).pack()

    def apply(self, marks: Marks) -> bool:
        """Add what a view's decorators say, once the view is called. See Policy.apply()."""
        before = self._marks
        access, touches = marks.access or before.access, marks.touches and before.touches
        is_fresh = marks.is_fresh or before.is_fresh
        self._marks = Marks(access, touches, marks.nonstop or before.nonstop, is_fresh)
        for name in ("access", "touches"):
            vars(self).pop(name, None)
        return before.access is None


def _match(request: HttpRequest) -> ResolverMatch | None:
    """Return the match of a request that Django has not resolved yet, None if its path is none."""
    with suppress(Resolver404):
        return resolve(request.path_info, getattr(request, "urlconf", None))
    return None


def write_header(session_id: str, token: str) -> dict[str, str]:
    """Return the header that lets a request run under a lock: signed, and for this lock only."""
    return {HEADER: signing.dumps([session_id, token], salt=_SALT)}


def read_header(header: str, session_id: str) -> str:
    """Return the token in a header, empty if it is forged or another session's."""
    try:
        found: Any = signing.loads(header, salt=_SALT)
        its_session, token = found
    except (signing.BadSignature, ValueError, TypeError):
        return ""
    return str(token) if its_session == session_id else ""
