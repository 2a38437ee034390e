"""Blocks of ``with`` and of ``async with``: each tells of the other where it was meant.

Python's own error names neither a method nor the way out, and its advice, the other kind of
``with``, is the wrong one on an event loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import _AsyncGeneratorContextManager, _GeneratorContextManager
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

P = ParamSpec("P")
T_co = TypeVar("T_co", covariant=True)


def block(function: Callable[P, Iterator[T_co]]) -> Callable[P, _GeneratorContextManager[T_co]]:
    """Make a context manager of a method, as ``contextlib.contextmanager``.

    Its twin has the same name behind an "a".
    """

    @wraps(function)
    def begin(*args: P.args, **kwargs: P.kwargs) -> _GeneratorContextManager[T_co]:
        return _Block(cast(Any, function), args, kwargs)

    return begin


def ablock(
    function: Callable[P, AsyncIterator[T_co]],
) -> Callable[P, _AsyncGeneratorContextManager[T_co]]:
    """Make an asynchronous context manager of a method. See block()."""

    @wraps(function)
    def begin(*args: P.args, **kwargs: P.kwargs) -> _AsyncGeneratorContextManager[T_co]:
        return _AsyncBlock(cast(Any, function), args, kwargs)

    return begin


# Annotated as their bases, so that type checkers refuse the wrong kind as well.


class _Block(_GeneratorContextManager[T_co]):
    func: Any

    def __aenter__(self) -> NoReturn:
        name = self.func.__name__
        raise TypeError(f"{name}() is for `with`. Use `async with` and a{name}() in its place.")

    __aexit__ = __aenter__


class _AsyncBlock(_AsyncGeneratorContextManager[T_co]):
    func: Any

    def __enter__(self) -> NoReturn:
        name = self.func.__name__
        raise TypeError(f"{name}() is for `async with`. Use `with` and {name[1:]}() in its place.")

    __exit__ = __enter__
