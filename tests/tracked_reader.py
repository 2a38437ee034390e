"""Process that reads sessions all the time, and logs what it found and when.

Run by `reading`: ``python -m tests.tracked_reader CONFIGURATION``, a line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import django
from django.conf import settings

from tests.children import line, python
from tests.variants import Variant

#: Threads and tasks of a reader.
THREADS: Final = 8
TASKS: Final = 8
#: Seconds between two reads of one of them.
PAUSE_S: Final = 0.002


class Found(NamedTuple):
    """One read: its beginning and end by CLOCK_MONOTONIC, its session, and the value there.

    The value is None where there was no session. A read that failed is left out.
    """

    began_s: float
    ended_s: float
    key: str
    value: int | None


class Written(NamedTuple):
    """A write, or an end, that was acknowledged at a time by CLOCK_MONOTONIC."""

    done_s: float
    key: str
    value: int | None


def too_old(reads: Sequence[Found], writes: Sequence[Written], max_age_s: float) -> list[str]:
    """Return the reads that found what was the store's at no moment of the last ``max_age_s``.

    Each write of a session has a larger value than the one before it.
    """
    violations = []
    for key in {write.key for write in writes}:
        history = [write for write in writes if write.key == key]
        for found in (one for one in reads if one.key == key):
            later = [write for write in history if is_later(write.value, found.value)]
            if later and later[0].done_s < found.began_s - max_age_s:
                late_ms = round((found.began_s - later[0].done_s) * 1000)
                violations.append(f"{found} was replaced {late_ms} ms before, by {later[0]}")
    return violations


def is_later(value: int | None, than: int | None) -> bool:
    """Return whether a value replaced another; None is the end."""
    return than is not None and (value is None or value > than)


class Reader:
    """A reader that runs."""

    def __init__(self, process: subprocess.Popen[str], path: Path) -> None:
        self.process, self._path = process, path

    @property
    def found(self) -> Sequence[Found]:
        """All reads so far."""
        whole = self._path.read_text().rpartition("\n")[0]
        return [Found(*json.loads(text)) for text in whole.splitlines()]


@contextmanager
def reading(
    folder: Path,
    url: str,
    keys: Sequence[str],
    *,
    options: Mapping[str, Any] | None = None,
    busy_threads: int = 0,
    variant: Variant | None = None,
    **given: Any,
) -> Iterator[Reader]:
    """Run a process that reads sessions of the store at ``url``; ``given`` are settings.

    ``options`` are the OPTIONS of the entry of CACHES; ``busy_threads`` compute all the time.
    """
    path = folder / "reads.jsonl"
    path.touch()
    told = json.dumps([url, list(keys), str(path), options or {}, busy_threads, variant, given])
    with python("-W", "error", "-m", __name__, told, life_s=250.0) as process:
        assert line(process) == "reading\n"
        yield Reader(process, path)


def main() -> None:
    """Read until the process is killed."""
    url, keys, path, options, busy_threads, variant, given = json.loads(sys.argv[1])
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
    entry = {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": url, "OPTIONS": options}
    settings.CACHES = settings.CACHES | {"sessions": entry}
    for name, value in {"NEAR_READS": "tracked", **given}.items():
        setattr(settings, f"CLUSTERED_SESSIONS_{name}", value)
    django.setup()
    if variant:
        Variant(*variant).apply()
    from django_clustered_sessions.backend import SessionStore  # noqa: PLC0415
    from django_clustered_sessions.exceptions import SessionStoreUnavailable  # noqa: PLC0415

    log = os.open(path, os.O_WRONLY | os.O_APPEND)

    def note(began_s: float, key: str, value: Any) -> None:
        found = Found(began_s, time.monotonic(), key, value)
        os.write(log, json.dumps(found).encode() + b"\n")

    def work(number: int) -> None:
        for turn in range(10**9):
            key = keys[(number + turn) % len(keys)]
            began_s = time.monotonic()
            with suppress(SessionStoreUnavailable):
                note(began_s, key, SessionStore(key).get("n"))
            # The time between two visits, not synchronisation.
            time.sleep(PAUSE_S)

    async def awork(number: int) -> None:
        for turn in range(10**9):
            key = keys[(number + turn) % len(keys)]
            began_s = time.monotonic()
            with suppress(SessionStoreUnavailable):
                note(began_s, key, await SessionStore(key).aget("n"))
            await asyncio.sleep(PAUSE_S)

    async def tasks() -> None:
        await asyncio.gather(*(awork(number) for number in range(TASKS)))

    def compute() -> None:
        while True:
            pass

    for _ in range(busy_threads):
        threading.Thread(target=compute, daemon=True).start()
    for number in range(THREADS):
        threading.Thread(target=work, args=(number,)).start()
    print("reading", flush=True)
    asyncio.run(tasks())


if __name__ == "__main__":
    main()
