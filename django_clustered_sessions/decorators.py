"""What a view says about its session: whether it locks, writes, counts as a use, can do without.

A decorator marks the view, so that whoever touches the session first, a middleware before the
view was resolved included, finds the mark; and it is applied once more when the view is called,
for where another decorator, or a framework such as Django REST framework or Django Ninja, hides the
mark. A decorator that cannot have an effect says so: it raises TypeError.
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

#: Begins the names of a view's attributes that are its marks. Each mark is one of its own, so that
#: ``method_decorator`` adds up those of several decorators.
_MARK: Final = "clustered_session_"


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

    For functions, classes and methods; sync and async. This and the other decorators raise
    TypeError for a class without ``dispatch()`` and above a decorator of Django Ninja's ``api``,
    and at the first call that passes no Django request.
    """
    return _marked(view, access=Access.LOCKED)


def session_read_only(view: View) -> View:
    """Let a view read its session without a lock and never write it.

    A change raises SessionReadOnly under DEBUG; otherwise it is dropped and logged.
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
        # Ninja calls the function that it was given, and never what is made of it afterwards.
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
    """Return the session of a view's request, None where another engine is in use.

    Raises TypeError where no argument is a request.
    """
    for argument in arguments:
        # A method that is decorated itself has its instance first. The request of Django REST
        # framework is not derived from Django's, and has it inside.
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
