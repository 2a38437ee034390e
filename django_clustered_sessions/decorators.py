"""What a view says about its session: whether it locks, writes, counts as a use, can do without.

A decorator marks the view, so that whoever touches the session first, a middleware before the
view was resolved included, finds the mark; and it is applied once more when the view is called,
for where another decorator hides the mark.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, Final, TypeVar, cast, get_args

from django.http import HttpRequest

from .conf import Nonstop

View = TypeVar("View", bound=Callable[..., Any])

_MARKS: Final = "clustered_session"


class Access(StrEnum):
    """How a view uses its session."""

    LOCKED = "locked"
    READ_ONLY = "read only"
    UNLOCKED = "unlocked"


@dataclass(frozen=True, slots=True)
class Marks:
    """What a view's decorators say; ``access``, ``nonstop`` None: nothing, the setting decides."""

    access: Access | None = None
    touches: bool = True
    nonstop: Nonstop | None = None


NO_MARKS: Final = Marks()


def session_locked(view: View) -> View:
    """Let a view have its session to itself, whatever CLUSTERED_SESSIONS_LOCKING says.

    For function views and, through ``method_decorator(..., name="dispatch")``, for classes; sync
    and async.
    """
    return _marked(view, access=Access.LOCKED)


def session_read_only(view: View) -> View:
    """Let a view read its session without a lock and never write it.

    A change raises SessionReadOnly, or is dropped and logged, by the setting ON_READ_ONLY_CHANGE.
    """
    return _marked(view, access=Access.READ_ONLY)


def session_unlocked(view: View) -> View:
    """Let a view go without the lock; what it changes is merged when it is saved."""
    return _marked(view, access=Access.UNLOCKED)


def session_no_touch(view: View) -> View:
    """Keep a view from counting as a use of the session: it renews neither it nor its cookie."""
    return _marked(view, touches=False)


def session_nonstop(behaviour: Nonstop) -> Callable[[View], View]:
    """Say what a view does while the store is away, whatever CLUSTERED_SESSIONS_NONSTOP says.

    Raises ValueError for what is no value of that setting.
    """
    if behaviour not in get_args(Nonstop):
        raise ValueError(f"{behaviour!r} is none of {', '.join(map(repr, get_args(Nonstop)))}")
    return lambda view: _marked(view, nonstop=behaviour)


def marks_of(view: Any) -> Marks:
    """Return what a view's decorators say."""
    marks: Marks = getattr(view, _MARKS, NO_MARKS)
    return marks


def _marked(view: View, **changed: Any) -> View:
    marks = replace(marks_of(view), **changed)

    if iscoroutinefunction(view):

        @wraps(view)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            if (session := _session(args)) is not None:
                await session.aobey(marks)
            return await view(*args, **kwargs)

    else:

        @wraps(view)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if (session := _session(args)) is not None:
                session.obey(marks)
            return view(*args, **kwargs)

    setattr(wrapper, _MARKS, marks)
    return cast(View, wrapper)


def _session(arguments: tuple[Any, ...]) -> Any:
    """Return the session of a view's request, None where another engine is in use."""
    # A method that is decorated itself has its instance first.
    request = next((one for one in arguments[:2] if isinstance(one, HttpRequest)), None)
    session = getattr(request, "session", None)
    return session if hasattr(session, "obey") else None
