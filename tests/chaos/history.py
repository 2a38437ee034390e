"""What the workers write down, line by line, so that a kill -9 loses nothing of it.

Times are those of CLOCK_MONOTONIC, in seconds: on one machine, all processes share it.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Seen:
    """What an operation found: a list's length and digest, and the two counters beside it."""

    length: int
    digest: str
    n: int
    hits: int


@dataclass
class Operation:
    """One use of a session.

    ``answer`` is what became of it: "ok"; "lost", "refused", "timeout", "away" or "dropped":
    nothing is written; "unknown"; or empty where the worker died before.
    """

    id: str
    kind: str
    session: str
    actor: str
    began_s: float
    queued_s: float | None = None
    took_s: float | None = None
    sent_s: float | None = None
    done_s: float | None = None
    token: str = ""
    seen: Seen | None = None
    answer: str = ""

    @property
    def worker(self) -> str:
        """The process that did it."""
        return self.actor.partition("/")[0]

    @property
    def is_locked(self) -> bool:
        """Whether it had the session to itself."""
        return self.kind in ("lock", "drop", "look")

    @property
    def log(self) -> str:
        """The session key of the list that it works on."""
        return f"own {self.actor}" if self.kind == "own" else "log"


@dataclass
class Stall:
    """A time in which a process did not run, stopped or starved."""

    began_s: float
    ended_s: float

    def meets(self, began_s: float, ended_s: float) -> bool:
        """Return whether it has a moment in common with that time."""
        return self.began_s <= ended_s and began_s <= self.ended_s


@dataclass
class History:
    """All that was done, and what the store has in the end: ``final`` by session."""

    operations: dict[str, Operation] = field(default_factory=dict)
    stalls: dict[str, list[Stall]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    final: dict[str, dict[str, Any]] = field(default_factory=dict)

    def read(self, path: Path) -> None:
        """Add what a worker has written down."""
        worker = path.stem
        for line in path.read_text().splitlines():
            event = json.loads(line)
            kind = event.pop("event")
            if kind == "stall":
                self.stalls.setdefault(worker, []).append(Stall(**event))
            elif kind == "error":
                self.errors.append(event["text"])
            else:
                if event["seen"]:
                    event["seen"] = Seen(**event["seen"])
                self.operations[event["id"]] = Operation(**event)


class Notebook:
    """Append events to a file: each of them is there, whole, once `note` has returned."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._lock = threading.Lock()

    def note(self, event: str, **what: Any) -> None:
        """Write down an event."""
        line = json.dumps({"event": event, **what}).encode() + b"\n"
        with self._lock:
            os.write(self._file, line)


def digest(ids: Sequence[str]) -> str:
    """Return what stands for a list of ids in a history."""
    return hashlib.sha1("".join(f"{one}\n" for one in ids).encode()).hexdigest()
