"""Whose fault an exception is: the value's that was read or written, or a signal's. Pure."""

from __future__ import annotations

from collections.abc import Callable


def fault_of(call: Callable[[], object], error: Exception) -> Exception:
    """Return what is wrong with the value that ``call`` is about, after it raised ``error``.

    A signal's exception, such as Celery's soft time limit, may come before any line, so ``call`` is
    made once more. What raises each time is the value's fault.

    Raises ``error`` where the second call succeeds.
    """
    try:
        call()
    except Exception as again:
        return again
    raise error
