"""History of a run, written by the workers line by line, so that a kill -9 loses nothing of it.

Times are by CLOCK_MONOTONIC in seconds, which all processes of a machine share.
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
    """Values that an operation read: length and digest of a list, and the two counters there.

    ``ids`` is the list itself where stores may lose writes, so that it need be no prefix.
    """

    length: int
    digest: str
    n: int
    hits: int
    ids: Sequence[str] = ()


@dataclass
class Operation:
    """Use of a session.

    ``answer`` is its outcome: "ok"; "lost", "refused", "timeout", "away" or "dropped" if nothing
    was written; "short" if the primary has written it, and too few replicas; "unknown"; or empty if
    the worker died before.
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
        """The worker that did it."""
        return self.actor.partition("/")[0]

    @property
    def is_locked(self) -> bool:
        """True if the operation held the session's lock."""
        return self.kind in ("lock", "drop", "look")

    @property
    def log(self) -> str:
        """The session key of the operation's list."""
        return f"own {self.actor}" if self.kind == "own" else "log"


@dataclass
class Stall:
    """Span of time in which a process did not run, because it was stopped or starved."""

    began_s: float
    ended_s: float

    def meets(self, began_s: float, ended_s: float) -> bool:
        """Return whether it overlaps the span."""
        return self.began_s <= ended_s and began_s <= self.ended_s


@dataclass
class History:
    """All operations, and the final values in the store: ``final`` by session."""

    operations: dict[str, Operation] = field(default_factory=dict)
    stalls: dict[str, list[Stall]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    final: dict[str, dict[str, Any]] = field(default_factory=dict)

    def read(self, path: Path) -> None:
        """Add the log of a worker."""
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
    """Log of a worker: each event is wholly in the file once `note` has returned."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._lock = threading.Lock()

    def note(self, event: str, **what: Any) -> None:
        """Append an event."""
        line = json.dumps({"event": event, **what}).encode() + b"\n"
        with self._lock:
            os.write(self._file, line)


def digest(ids: Sequence[str]) -> str:
    """Return the digest of a list of ids."""
    return hashlib.sha1("".join(f"{one}\n" for one in ids).encode()).hexdigest()
