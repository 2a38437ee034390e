"""View decorators: lock or read only, count as a use or not, go on without the store or not.

A decorator marks the view, so the mark is found by the first code that touches the session, even a
middleware. It is applied once more when the view is called, because another decorator, or a
framework such as Django REST framework or Django Ninja, may hide the mark. A decorator that
cannot have an effect raises TypeError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial, wraps
from inspect import iscoroutinefunction
from typing import Any, Final, TypeVar, cast, get_args

from django.http import HttpRequest
from django.utils.decorators import method_decorator

from .conf import Nonstop

View = TypeVar("View", bound=Callable[..., Any])

#: Prefix of the view attributes that hold the marks. Each mark has its own attribute, so that
#: ``method_decorator`` combines the marks of several decorators.
_MARK: Final = "clustered_session_"


class Access(StrEnum):
    """Use that a view makes of its session."""

    LOCKED = "locked"
    READ_ONLY = "read only"
    UNLOCKED = "unlocked"


@dataclass(frozen=True, slots=True)
class Marks:
    """Marks of a view; ``access`` and ``nonstop`` are None if the setting decides."""

    access: Access | None = None
    touches: bool = True
    nonstop: Nonstop | None = None


NO_MARKS: Final = Marks()


def session_locked(view: View) -> View:
    """Lock the session for the view, whatever CLUSTERED_SESSIONS_LOCKING says.

    For functions, classes and methods; sync and async. This and the other decorators raise
    TypeError for a class without ``dispatch()``, above a decorator of Django Ninja's ``api``, and
    at the first call that passes no Django request.
    """
    return _marked(view, access=Access.LOCKED)


def session_read_only(view: View) -> View:
    """Let a view read its session without a lock and never write it.

    A change raises SessionReadOnly under DEBUG; otherwise it is dropped and logged.
    """
    return _marked(view, access=Access.READ_ONLY)


def session_unlocked(view: View) -> View:
    """Run a view without the lock; its changes are merged when the session is saved."""
    return _marked(view, access=Access.UNLOCKED)


def session_no_touch(view: View) -> View:
    """Keep a view from renewing the session and its cookie: it does not count as a use."""
    return _marked(view, touches=False)


def session_nonstop(behaviour: Nonstop) -> Callable[[View], View]:
    """Set what a view does during a store outage, whatever CLUSTERED_SESSIONS_NONSTOP says.

    Raises ValueError for anything but a value of that setting.
    """
    if behaviour not in get_args(Nonstop):
        raise ValueError(f"{behaviour!r} is none of {', '.join(map(repr, get_args(Nonstop)))}")
    return lambda view: _marked(view, nonstop=behaviour)


def marks_of(view: Any) -> Marks:
    """Return the marks of a view."""
    return Marks(
        getattr(view, f"{_MARK}access", None),
        getattr(view, f"{_MARK}touches", True),
        getattr(view, f"{_MARK}nonstop", None),
    )


def _marked(view: View, **changed: Any) -> View:
    if isinstance(view, type):
        if not hasattr(view, "dispatch"):
            raise TypeError(
                f"{_name(view)} has no dispatch() that a session decorator could mark. Decorate "
                "its method that takes the request."
            )
        return cast(View, method_decorator(partial(_marked, **changed), name="dispatch")(view))
    if hasattr(view, "_ninja_operation"):
        # Ninja calls the function that it was given; a wrapper made later is never called.
        raise TypeError(
            f"{_name(view)} is an operation of Django Ninja already, so a session decorator has no "
            "effect on it. Put it below the decorator of the API, or into decorate_view()."
        )
    marks = replace(marks_of(view), **changed)

    if iscoroutinefunction(view):

        @wraps(view)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            if (session := _session(view, (*args, *kwargs.values()))) is not None:
                await session.aapply_marks(marks)
            return await view(*args, **kwargs)

    else:

        @wraps(view)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if (session := _session(view, (*args, *kwargs.values()))) is not None:
                session.apply_marks(marks)
            return view(*args, **kwargs)

    for name, mark in changed.items():
        setattr(wrapper, _MARK + name, mark)
    return cast(View, wrapper)


def _session(view: Any, arguments: Iterable[Any]) -> Any:
    """Return the session of a view's request, None if another engine is in use.

    Raises TypeError if no argument is a request.
    """
    for argument in arguments:
        # The first argument of a decorated method is its instance. The request of Django REST
        # framework does not derive from Django's; it holds one in ``_request``.
        for request in (argument, getattr(argument, "_request", None)):
            if isinstance(request, HttpRequest):
                session = getattr(request, "session", None)
                return session if hasattr(session, "apply_marks") else None
    raise TypeError(
        f"{_name(view)} was called without a Django request, so its session decorator has no "
        "effect. Decorate the view, or its method that takes the request."
    )


def _name(view: Any) -> str:
    return f"{view.__module__}.{getattr(view, '__qualname__', type(view).__name__)}"
