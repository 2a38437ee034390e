"""View decorators: lock or read only, count as a use or not, go on without the store or not.

Beside these marks there is ``recent_login``, which may answer in place of the view.

A decorator marks the view, so the mark is found by the first code that touches the session, even a
middleware. It is applied once more when the view is called, because another decorator, or a
framework such as Django REST framework or Django Ninja, may hide the mark. A decorator that
cannot have an effect raises TypeError.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from enum import StrEnum
from functools import partial, wraps
from inspect import isawaitable
from typing import Any, Final, NamedTuple, TypeVar, cast, get_args

from asgiref.sync import iscoroutinefunction
from django.http import HttpRequest, HttpResponse
from django.utils.decorators import method_decorator

from .conf import Nonstop
from .recent_logins import RecentLogin, count_logins

View = TypeVar("View", bound=Callable[..., Any])

#: Stands for the view that ``@session_locked()`` lacks, which is an error that says so.
_NO_VIEW: Any = None

#: Prefix of the view attributes that hold the marks. Each mark has its own attribute, so that
#: ``method_decorator`` combines the marks of several decorators.
_MARK: Final = "clustered_session_"


class Access(StrEnum):
    """Use that a view makes of its session."""

    LOCKED = "locked"
    READ_ONLY = "read only"
    UNLOCKED = "unlocked"


class Marks(NamedTuple):
    """Marks of a view; ``access`` and ``nonstop`` are None if the setting decides."""

    access: Access | None = None
    touches: bool = True
    nonstop: Nonstop | None = None
    is_fresh: bool = False


NO_MARKS: Final = Marks()


def session_locked(view: View = _NO_VIEW) -> View:
    """Lock the session for the view, whatever CLUSTERED_SESSIONS_LOCKING says.

    For functions, classes and methods; sync and async. This and the other decorators raise
    TypeError for a class without ``dispatch()``, above a decorator of Django Ninja's ``api``, and
    at the first call that passes no Django request.
    """
    return _marked(view, access=Access.LOCKED)


def session_read_only(view: View = _NO_VIEW) -> View:
    """Let a view read its session without a lock and never write it.

    A change raises SessionReadOnly under DEBUG; otherwise it is dropped and logged.
    """
    return _marked(view, access=Access.READ_ONLY)


def session_unlocked(view: View = _NO_VIEW) -> View:
    """Run a view without the lock; its changes are merged when the session is saved."""
    return _marked(view, access=Access.UNLOCKED)


def session_no_touch(view: View = _NO_VIEW) -> View:
    """Keep a view from renewing the session and its cookie: it does not count as a use."""
    return _marked(view, touches=False)


def session_fresh(view: View = _NO_VIEW) -> View:
    """Have a view's session read from the store, whatever CLUSTERED_SESSIONS_NEAR_READS says.

    For a view that must not act on a session of half a second ago.
    """
    return _marked(view, is_fresh=True)


def session_nonstop(behaviour: Nonstop = _NO_VIEW) -> Callable[[View], View]:
    """Set what a view does during a store outage, whatever CLUSTERED_SESSIONS_NONSTOP says.

    Raises ValueError for anything but a value of that setting.
    """
    if behaviour not in get_args(Nonstop):
        raise ValueError(
            f"session_nonstop(behaviour): {behaviour!r} is none of "
            f"{', '.join(map(repr, get_args(Nonstop)))}{_parentheses(behaviour)}"
        )
    return lambda view: _marked(view, nonstop=behaviour)


def recent_login(
    minutes: float = 10, *, confirm_url: str = "clustered_sessions:confirm"
) -> Callable[[View], View]:
    """Let a view be used only soon after a login, or after the user has confirmed it.

    Others are sent to the page ``confirm_url``, a URL or the name of one, and come back; a client
    that prefers JSON, or is htmx, gets a 401 that says why and names the page. If nobody is logged
    in, that is LOGIN_URL. For the same views as the other decorators.

    Raises ValueError for no number above 0; ImproperlyConfigured, when the view is called, with
    another session engine and for a name that is no page's.
    """
    if not isinstance(minutes, int | float) or not minutes > 0:
        raise ValueError(
            f"recent_login(minutes) takes a number above 0, not {minutes!r}{_parentheses(minutes)}"
        )

    needed = RecentLogin(minutes * 60, confirm_url)

    def decorate(view: View) -> View:
        if isinstance(view, type):
            return cast(View, _on_dispatch(view, decorate))
        # A copy would not know yet that the session was ended elsewhere.
        return session_fresh(_preceded(view, needed.answer, needed.aanswer))

    count_logins()
    return decorate


def _parentheses(argument: object) -> str:
    """Return what to add to an error about an argument that is the view."""
    return ". This decorator needs parentheses" if callable(argument) else ""


def marks_of(view: Any) -> Marks:
    """Return the marks of a view."""
    return Marks(
        getattr(view, f"{_MARK}access", None),
        getattr(view, f"{_MARK}touches", True),
        getattr(view, f"{_MARK}nonstop", None),
        getattr(view, f"{_MARK}is_fresh", False),
    )


def _marked(view: View, **changed: Any) -> View:
    if isinstance(view, type):
        return cast(View, _on_dispatch(view, partial(_marked, **changed)))
    marks = marks_of(view)._replace(**changed)

    def apply(request: HttpRequest, session: Any) -> None:
        if hasattr(session, "apply_marks"):
            session.apply_marks(marks)

    async def apply_async(request: HttpRequest, session: Any) -> None:
        if hasattr(session, "aapply_marks"):
            await session.aapply_marks(marks)

    return _preceded(view, apply, apply_async, **changed)


def _on_dispatch(view: type, decorate: Callable[[Any], Any]) -> type:
    """Decorate the ``dispatch`` of a class of views. Raises TypeError if it has none."""
    if not hasattr(view, "dispatch"):
        raise TypeError(
            f"{_name(view)} has no dispatch() that a session decorator could mark. Decorate "
            "its method that takes the request."
        )
    return method_decorator(decorate, name="dispatch")(view)


def _preceded(
    view: View,
    act: Callable[[HttpRequest, Any], HttpResponse | None],
    aact: Callable[[HttpRequest, Any], Awaitable[HttpResponse | None]],
    **marked: Any,
) -> View:
    """Return a view before which ``act``, or ``aact`` if it is async, is done, and may answer.

    Both are given the request and its session. ``marked`` are the marks of the view.
    """
    if not callable(view):
        raise TypeError(_why_not(view))
    if hasattr(view, "_ninja_operation"):
        # Ninja calls the function that it was given; a wrapper made later is never called.
        raise TypeError(
            f"{_name(view)} is an operation of Django Ninja already, so a session decorator has no "
            "effect on it. Put it below the decorator of the API, or into decorate_view()."
        )

    if iscoroutinefunction(view) or _is_dispatch_of_async(view):

        @wraps(view)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            request = _request(view, (*args, *kwargs.values()))
            if answer := await aact(request, getattr(request, "session", None)):
                return answer
            response = view(*args, **kwargs)
            return await response if isawaitable(response) else response

    else:

        @wraps(view)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            request = _request(view, (*args, *kwargs.values()))
            if answer := act(request, getattr(request, "session", None)):
                return answer
            return view(*args, **kwargs)

    for name, mark in marked.items():
        setattr(wrapper, _MARK + name, mark)
    return cast(View, wrapper)


def _why_not(view: object) -> str:
    """Return the error for what is no view, and what to do."""
    if hasattr(view, "__get__"):
        return (
            f"A session decorator was given a {type(view).__name__} in place of a view. Put it "
            "below that, onto the function."
        )
    return (
        f"A session decorator was given {view!r} in place of a view. Write it without "
        "parentheses, as in @session_locked; session_nonstop and recent_login alone have them."
    )


def _is_dispatch_of_async(view: Any) -> bool:
    """Return whether a view is the ``dispatch`` of a class whose methods are async.

    It is a plain function and returns what they do. ``method_decorator`` gives it bound, in a
    partial.
    """
    method = getattr(view, "func", view)
    is_dispatch = getattr(method, "__name__", "") == "dispatch"
    return is_dispatch and getattr(getattr(method, "__self__", None), "view_is_async", False)


def _request(view: Any, arguments: Iterable[Any]) -> HttpRequest:
    """Return the request among a view's arguments. Raises TypeError if none is one."""
    for argument in arguments:
        # The first argument of a decorated method is its instance. The request of Django REST
        # framework does not derive from Django's; it holds one in ``_request``.
        for request in (argument, getattr(argument, "_request", None)):
            if isinstance(request, HttpRequest):
                return request
    raise TypeError(
        f"{_name(view)} was called without a Django request, so its session decorator has no "
        "effect. Decorate the view, or its method that takes the request."
    )


def _name(view: Any) -> str:
    return f"{view.__module__}.{getattr(view, '__qualname__', type(view).__name__)}"
