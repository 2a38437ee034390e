"""What a logged-in session takes in the store, indexes included."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from . import project
from .engines import Engine
from .scenarios import LOGGED_IN

#: The least that a logged-in session has, and the one that the other scenarios use.
BARE, WITH_CART = "logged in", "logged in, with a cart"


def measure(engines: Sequence[Engine], server: Any, sessions: int) -> dict[str, dict[str, float]]:
    """Return bytes per session by content and engine, each measured on the store emptied."""
    names = {"_auth_user_id", "_auth_user_backend", "_auth_user_hash"}
    contents = {
        BARE: {name: value for name, value in LOGGED_IN.items() if name in names},
        WITH_CART: LOGGED_IN,
    }
    with project.store_at(f"{server.url}/0"), server.client() as store:
        return {
            what: {
                engine.name: _bytes_per_session(engine, content, store, sessions)
                for engine in engines
            }
            for what, content in contents.items()
        }


def _bytes_per_session(engine: Engine, content: Any, store: Any, sessions: int) -> float:
    engine.use()
    engine.save(content)
    store.execute_command("FLUSHALL", "SYNC")
    before = used(store)
    for number in range(sessions):
        own = {"_auth_user_id": str(number), "_auth_user_hash": os.urandom(32).hex()}
        engine.save({**content, **own})
    return (used(store) - before) / sessions


def used(store: Any) -> int:
    """Return the bytes that a store uses, less those of the buffers of its connections."""
    figures = store.info("memory")
    return int(figures["used_memory"] - figures["mem_clients_normal"])
