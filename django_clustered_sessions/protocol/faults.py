"""Tell an exception that a value causes from one that a signal raises. Pure."""

from __future__ import annotations

from collections.abc import Callable


def fault_of(call: Callable[[], object], error: Exception) -> Exception:
    """Return the exception that a value causes in ``call``, which has raised ``error`` before.

    A signal's exception, such as Celery's soft time limit, may come before any line, so ``call`` is
    made once more. An exception that comes each time is the value's fault.

    Raises ``error`` where the second call succeeds.
    """
    try:
        call()
    except Exception as again:
        return again
    raise error
