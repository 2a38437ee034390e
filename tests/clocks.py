"""Clocks of tests: libfaketime's, wrong for a process, and one of ages that a test moves on."""

from __future__ import annotations

from pathlib import Path

import pytest

from django_clustered_sessions.store import clock, tracking
from tests.conftest import require
from tests.gateways import place


def libfaketime() -> Path:
    """Return the path of the library; its folder depends on the distribution."""
    folders = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/opt/homebrew/lib")
    patterns = ("faketime/libfaketime.so.1", "*/faketime/libfaketime.so.1")
    found = [path for folder in folders for each in patterns for path in Path(folder).glob(each)]
    return require(found[0] if found else None, "libfaketime")


class Ages:
    """The clock of ages, which stands still until a test moves it on.

    However long the machine stands still, a copy of a session gets no older by it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = clock.now_s()
        monkeypatch.setattr(clock, "now_s", lambda: self.now_s)

    def go_on(self, seconds: float) -> None:
        """Let all that is known be so much older."""
        self.now_s += seconds


def is_answered(key: str) -> bool:
    """Return whether this thread's tracked connection waits for no answer, or there is none."""
    pool, channels = tracking.here()
    channel = channels.usable(pool, place(key).record)
    if channel is None:
        return True
    channel.drain()
    return not channel._questions
