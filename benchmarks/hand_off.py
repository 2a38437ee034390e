"""Measure how fast a contended lock changes hands, here and with other locks on the same store.

    pip install -e '.[embedded]' --group benchmark
    python -m benchmarks.hand_off

Prints the table of ``docs/locking-operation.md``. A hand-off begins before the holder's call that
releases, and ends when the next one, in another process, runs with its session loaded; for the
other locks, with a value of the same size read and decoded. A stampede is 20 who wait, in four
processes; it ends when the last one runs. All locks are measured in one run, in turns, on one
store.

``--rounds N`` hand-offs are measured of each lock, and a tenth of that in stampedes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import django
from django.conf import settings

LEASE_S = 8
WAITERS, PROCESSES = 20, 4
WARM_UP = 5
#: How many parts of the run each give a ratio: their spread says how sure it is.
PARTS = 10
SESSION = {
    "_auth_user_id": "12345",
    "_auth_user_backend": "django.contrib.auth.backends.ModelBackend",
    "_auth_user_hash": "8f" * 32,
    "cart": {"tea": 2, "milk": 1, "sugar": 3},
    "visits": 12,
}
OURS = "clustered"

#: Gives the context in which a lock is held and the session is loaded.
Hold = Callable[[], AbstractContextManager[None]]


def configure(location: str) -> None:
    """Set Django up with the store at ``location``, and let as many wait as there are."""
    settings.configure(
        SECRET_KEY="for a benchmark",
        USE_TZ=True,
        INSTALLED_APPS=["django_clustered_sessions"],
        CACHES={"default": {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": location}},
        CLUSTERED_SESSIONS_LOCK_LEASE=LEASE_S,
        # An eighth of them may wait in this process.
        CLUSTERED_SESSIONS_LOCK_MAX_WAITERS=8 * WAITERS,
    )
    django.setup()


def locks(location: str, key: str) -> dict[str, Hold]:
    """Return the locks that are measured; ``key`` is the session's."""
    import redis
    import redis_lock

    from django_clustered_sessions.backend import SessionStore

    client = redis.Redis.from_url(location)

    def value() -> Any:
        return json.loads(client.get("value"))["cart"]

    @contextmanager
    def clustered() -> Iterator[None]:
        session = SessionStore(key)
        with session.lock():
            session["cart"]
            yield

    @contextmanager
    def python_redis_lock() -> Iterator[None]:
        with redis_lock.Lock(client, "a", expire=LEASE_S):
            value()
            yield

    @contextmanager
    def redis_py() -> Iterator[None]:
        with client.lock("b", timeout=LEASE_S):
            value()
            yield

    return {OURS: clustered, "python-redis-lock": python_redis_lock, "redis-py's Lock": redis_py}


def wait_in_turns(pipe: Any, location: str, key: str) -> None:
    """Ask for a lock as often at once as is ordered, and tell when each one had it (ns)."""
    configure(location)
    holds = locks(location, key)
    with ThreadPoolExecutor(WAITERS) as pool:

        def take(hold: Hold) -> int:
            with hold():
                return time.monotonic_ns()

        pipe.send("ready")
        while order := pipe.recv():
            name, count = order
            asked = [pool.submit(take, holds[name]) for _ in range(count)]
            pipe.send("asking")
            pipe.send([each.result() for each in asked])


def until_all_have_had_it(name: str, hold: Hold, pipes: list[Any], each: int) -> float:
    """Release a lock that ``each`` of every process wait for; return how long that took, in ms."""
    with hold():
        for pipe in pipes:
            pipe.send((name, each))
        for pipe in pipes:
            pipe.recv()
        # Time to queue up; and no poll of a lock that polls is always as far away.
        time.sleep(0.02 * each + random.uniform(0.0, 0.1))
        released_ns = time.monotonic_ns()
    return (max(ns for pipe in pipes for ns in pipe.recv()) - released_ns) / 1e6


def measure(
    holds: dict[str, Hold], pipes: list[Any], store: Any, rounds: int
) -> dict[str, dict[str, Any]]:
    """Return for each lock its hand-offs and stampedes, in ms, and the commands of a stampede."""
    found: dict[str, dict[str, Any]] = {
        name: {"hand-offs": [], "stampedes": [], "commands": []} for name in holds
    }
    for number in range(-WARM_UP, rounds):
        for name in random.sample(list(holds), len(holds)):
            took_ms = until_all_have_had_it(name, holds[name], pipes[:1], 1)
            if number >= 0:
                found[name]["hand-offs"].append(took_ms)
    for number in range(-1, max(rounds // 10, PARTS)):
        for name in random.sample(list(holds), len(holds)):
            before = store.info("stats")["total_commands_processed"]
            took_ms = until_all_have_had_it(name, holds[name], pipes, WAITERS // PROCESSES)
            commands = store.info("stats")["total_commands_processed"] - before
            if number >= 0:
                found[name]["stampedes"].append(took_ms)
                found[name]["commands"].append(commands)
    return found


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Return how many times their median ours is, and between what that was in parts of the run."""
    size = len(ours) // PARTS
    parts = [
        statistics.median(ours[at : at + size]) / statistics.median(theirs[at : at + size])
        for at in range(0, size * PARTS, size)
    ]
    whole = statistics.median(ours) / statistics.median(theirs)
    return f"{whole:.3g} ({min(parts):.3g} to {max(parts):.3g})"


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table, a lock a column."""
    rows: dict[str, list[str]] = {"": list(found)}
    for what, heading in (("hand-offs", "hand-off"), ("stampedes", f"stampede of {WAITERS}")):
        times = [figures[what] for figures in found.values()]
        rows[f"{heading}, median (ms)"] = [f"{statistics.median(each):.3g}" for each in times]
        rows[f"{heading}, p99 (ms)"] = [
            f"{statistics.quantiles(each, n=100, method='inclusive')[98]:.3g}" for each in times
        ]
        rows[f"{heading}, ours beside it"] = [
            "1" if name == OURS else ratio(found[OURS][what], figures[what])
            for name, figures in found.items()
        ]
    rows["commands to the store in a stampede"] = [
        f"{statistics.median(figures['commands']):.0f}" for figures in found.values()
    ]
    lines = [f"| {what} | {' | '.join(cells)} |" for what, cells in rows.items()]
    return "\n".join([lines[0], "|---" * (len(found) + 1) + "|", *lines[1:]])


def main() -> None:
    """Start a store and those who wait, measure every lock in turns, print the table."""
    from django_clustered_sessions.embedded import bundled_binary
    from tests.servers import StoreServer

    parser = argparse.ArgumentParser(description="Measure how fast a contended lock changes hands.")
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    binary = bundled_binary()
    if binary is None:
        raise SystemExit("The benchmark needs the extra 'benchmark'.")
    with StoreServer(binary=binary) as server, server.client() as store:
        location = f"{server.url}/0"
        configure(location)
        from django_clustered_sessions.backend import SessionStore

        session = SessionStore()
        session.update(SESSION)
        session.save()
        key = str(session.session_key)
        store.set("value", json.dumps(SESSION))
        spawn = multiprocessing.get_context("spawn")
        pipes = []
        for _ in range(PROCESSES):
            pipe, end = spawn.Pipe()
            spawn.Process(target=wait_in_turns, args=(end, location, key), daemon=True).start()
            pipes.append(pipe)
        for pipe in pipes:
            pipe.recv()
        print(table(measure(locks(location, key), pipes, store, rounds)))
        for pipe in pipes:
            pipe.send(None)


if __name__ == "__main__":
    main()
