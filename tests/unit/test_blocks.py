"""The wrong kind of ``with`` for a block of a session's lock."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from django_clustered_sessions.backend import SessionStore


def test_async_with_lock_names_alock() -> None:
    session: Any = SessionStore()

    async def enter() -> None:
        async with session.lock():
            pytest.fail("it was entered")

    with pytest.raises(TypeError, match=r"`async with` and alock\(\)"):
        asyncio.run(enter())


def test_with_alock_names_lock() -> None:
    session: Any = SessionStore()
    with pytest.raises(TypeError, match=r"`with` and lock\(\)"), session.alock():
        pytest.fail("it was entered")
