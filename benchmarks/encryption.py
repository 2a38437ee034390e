"""Measure what encryption adds to a request.

    pip install -e .[benchmark,encryption]
    python -m benchmarks.encryption
    python -m benchmarks.encryption --rounds 40

Requests through Django's WSGI handler, on the bundled store, in one process: the same ones without
keys and with a key, by turns, so that a busy machine slows both down. Each pair of blocks has a
ratio; the table has their median and their quartiles. Memory is what the store says of the record.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any, Final

from . import project
from .engines import OURS, Engine, bundled_store, engines
from .hops import answer
from .report import table
from .scenarios import (
    CHANGE,
    LARGE_CHANGE,
    LARGE_READ,
    LOGGED_IN,
    READ,
    Scenario,
)

KEY: Final = "01" * 32
BLOCK: Final = 50
_WITHOUT_AND_WITH: Final[Sequence[tuple[str, ...]]] = ((), (KEY,))

KINDS: Final = (
    ("/read", READ),
    ("/change", CHANGE),
    ("/read", LARGE_READ),
    ("/change", LARGE_CHANGE),
)


def encrypt(*keys: str) -> None:
    """Let this process have these keys."""
    project.change({"CLUSTERED_SESSIONS_ENCRYPTION_KEYS": keys})


def ratios(engine: Engine, path: str, scenario: Scenario, rounds: int) -> list[float]:
    """Return the time with a key as a ratio to the time without one, a ratio for each round."""
    from django.core.handlers.wsgi import WSGIHandler

    engine.use(scenario)
    application = WSGIHandler()
    session_keys: dict[tuple[str, ...], str] = {}
    for keys in _WITHOUT_AND_WITH:
        encrypt(*keys)
        session_keys[keys] = engine.save(scenario.before)
    found = []
    for _ in range(rounds + 1):
        spent_s = {}
        for keys, session_key in session_keys.items():
            encrypt(*keys)
            answer(application, path, session_key)
            began = time.perf_counter()
            for _ in range(BLOCK):
                answer(application, path, session_key)
            spent_s[keys] = time.perf_counter() - began
        found.append(spent_s[(KEY,)] / spent_s[()])
    # The first round warms up.
    return found[1:]


def memory(engine: Engine, client: Any) -> list[int]:
    """Return the bytes that a logged-in session takes in the store, without a key and with one."""
    from django_clustered_sessions.protocol.record import SessionKeys

    found = []
    for keys in _WITHOUT_AND_WITH:
        encrypt(*keys)
        record = SessionKeys.of("session", engine.save(LOGGED_IN)).record
        found.append(client.memory_usage(record))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description="Measure what encryption adds to a request.")
    parser.add_argument("--rounds", type=int, default=20, help="pairs of blocks (default: 20)")
    given = parser.parse_args(arguments)
    from tests.servers import StoreServer

    rows = [["request", "time with a key, as a ratio to none", "quartiles"]]
    with StoreServer(binary=bundled_store()) as server:
        project.configure(f"{server.url}/0", ":memory:")
        (ours,) = (engine for engine in engines()[0] if engine.name == OURS)
        project.change({"MIDDLEWARE": [ours.middleware]})
        for path, scenario in KINDS:
            found = ratios(ours, path, scenario, given.rounds)
            low, middle, high = statistics.quantiles(found, n=4)
            rows.append([scenario.name, f"{middle:.2f}", f"{low:.2f} to {high:.2f}"])
        with server.client() as client:
            plain, encrypted = memory(ours, client)
    print(table(rows))
    print(f"\nA logged-in session: {plain} bytes in the store, {encrypted} encrypted.")


if __name__ == "__main__":
    main()
