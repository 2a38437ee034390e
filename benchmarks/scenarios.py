"""The kinds of request that are measured, and the session that each one finds."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

from . import views

_random = Random(4)

ANONYMOUS: Final[Mapping[str, Any]] = {"n": 0, "cart": {"tea": 2, "milk": 1}}
LOGGED_IN: Final[Mapping[str, Any]] = {
    "_auth_user_id": "17",
    "_auth_user_backend": views.BACKEND,
    "_auth_user_hash": _random.randbytes(32).hex(),
    **ANONYMOUS,
}
#: 64 keys of 1 kB that does not compress well.
LARGE: Final[Mapping[str, Any]] = {
    **LOGGED_IN,
    **{f"key{number}": base64.b64encode(_random.randbytes(750)).decode() for number in range(64)},
}


@dataclass(frozen=True)
class Scenario:
    """One kind of request.

    ``before`` is the session that it finds, None for a request without a cookie. ``floor`` are the
    commands that the same number of bare round trips is made of. ``consumes``: each request needs
    a session of its own, with which the visitor has been on another page of this process.
    ``cold``: this process has not seen the sessions.
    """

    name: str
    view: Callable[..., Any]
    aview: Callable[..., Any]
    before: Mapping[str, Any] | None
    floor: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    consumes: bool = False
    cold: bool = False

    @property
    def is_large(self) -> bool:
        """Whether the session is the one of 64 kB."""
        return self.before is LARGE


_SLIDING: Final = {"SESSION_SAVE_EVERY_REQUEST": True}
_READ, _CHANGE = (views.read, views.aread), (views.change, views.achange)
_NOTHING = (views.untouched, views.auntouched)

READ = Scenario("read", *_READ, LOGGED_IN, ("GET",))
SLIDING = Scenario("sliding read", *_READ, LOGGED_IN, ("GET",), _SLIDING)
CHANGE = Scenario("change", *_CHANGE, LOGGED_IN, ("GET", "SETEX"))
LOGIN = Scenario(
    "login", views.log_in, views.alog_in, ANONYMOUS, ("GET", "SETEX", "SETEX"), consumes=True
)
LARGE_READ = Scenario("64 kB read", *_READ, LARGE, ("GET",))
LARGE_COLD = Scenario("64 kB read, cold", *_READ, LARGE, ("GET",), cold=True)
LARGE_CHANGE = Scenario("64 kB change", *_CHANGE, LARGE, ("GET", "SETEX"))

ALL: Final = (
    Scenario("no cookie", *_READ, None, ()),
    Scenario("untouched", *_NOTHING, LOGGED_IN, ()),
    Scenario("untouched, every request saves", *_NOTHING, LOGGED_IN, ("GET",), _SLIDING),
    READ,
    SLIDING,
    CHANGE,
    Scenario("first write", *_CHANGE, None, ("SETEX",), consumes=True),
    LOGIN,
    Scenario("logout", views.log_out, views.alog_out, LOGGED_IN, ("GET", "SETEX"), consumes=True),
    LARGE_READ,
    LARGE_COLD,
    LARGE_CHANGE,
)
FAR: Final = (READ, SLIDING, CHANGE, LOGIN)
ASYNC: Final = (READ, SLIDING, CHANGE)
