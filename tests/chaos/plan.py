"""Plan of a run: its seed, its sessions, its faults, and the settings of all workers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

#: Seconds.
LOCK_LEASE: Final = 1.0
LOCK_WAIT: Final = 5.0
STORE_TIMEOUT: Final = 1.0

SETTINGS: Final[dict[str, Any]] = {
    "CLUSTERED_SESSIONS_LOCKING": "all",
    "CLUSTERED_SESSIONS_LOCK_LEASE": LOCK_LEASE,
    "CLUSTERED_SESSIONS_LOCK_WAIT": LOCK_WAIT,
    "CLUSTERED_SESSIONS_LOCK_MAX_WAITERS": 12,
    "CLUSTERED_SESSIONS_STORE_TIMEOUT": STORE_TIMEOUT,
}

#: Timeouts of a mutant's run in seconds. Its faults need no short ones, and its operations have to
#: reach the store however slow the machine is.
PATIENT: Final[Mapping[str, Any]] = {"CLUSTERED_SESSIONS_STORE_TIMEOUT": 10.0}

#: Stores of a run: one store behind a proxy that cuts; a failing primary whose replica takes over;
#: a cluster whose slots move; a cluster whose primaries fail, with a replica each.
Topology = Literal["single", "sentinel", "cluster", "failing-cluster"]

#: A write is acknowledged once a replica has it.
SYNCHRONOUS: Final[Mapping[str, Any]] = {"CLUSTERED_SESSIONS_SYNC_REPLICAS": 1}

#: Seconds after which the work goes on with new sessions, so that none becomes large.
ERA_S: Final = 5.0

#: Sessions of an era; half of the work uses the first one.
SESSIONS: Final = 4

WORKERS: Final = 4
THREADS: Final = 2
TASKS: Final = 2


@dataclass(frozen=True)
class Faults:
    """Frequencies of faults.

    ``stop`` and ``kill`` are the chances that a holder is stopped for longer than its lease, or
    killed; ``cut`` is the chance that a reply is cut; ``pause_s`` is the mean number of seconds
    between two faults from outside, None for no such faults.
    """

    stop: float = 0.003
    kill: float = 0.001
    cut: float = 0.004
    pause_s: float | None = 1.5


@dataclass(frozen=True)
class Mutant:
    """Defect that the checker must find: in the named script, ``new`` replaces ``old``.

    ``operations`` is the number of operations of each actor that reach the store, also on a busy
    machine.
    """

    script: str
    old: bytes
    new: bytes
    faults: Faults
    operations: int


#: Mutants that the checker has to find, each with the faults that reveal it.
MUTANTS: Final[Mapping[str, Mutant]] = {
    # A commit does not compare the fencing token.
    "fence": Mutant(
        "commit",
        b"if refusal then",
        b'if refusal and fence == "" then',
        Faults(stop=0.05, kill=0, cut=0, pause_s=None),
        operations=30,
    ),
    # The lock is handed off to the last waiter instead of the first.
    "queue": Mutant(
        "lock",
        b"table.remove(queue, 1)",
        b"table.remove(queue)",
        Faults(stop=0, kill=0, cut=0, pause_s=None),
        operations=20,
    ),
    # A repeated write is executed again.
    "replay": Mutant(
        "commit",
        b"if first_answer then",
        b"if false then",
        Faults(stop=0, kill=0, cut=0.05, pause_s=None),
        operations=30,
    ),
}


@dataclass(frozen=True)
class Plan:
    """Plan of a run: its length (of a mutant: at most), and all that follows from its seed."""

    seed: int
    seconds: float
    mutant: str | None = None
    topology: Topology = "single"

    @property
    def may_lose(self) -> bool:
        """True if unacknowledged writes may be lost, because primaries fail."""
        return self.topology in ("sentinel", "failing-cluster")

    @property
    def empty_log(self) -> dict[str, int] | list[str]:
        """The initial log of operations in a session.

        A write without the lock may be based on data of a lost primary. A merge with the data
        of the new primary keeps an addition to a dict; a list is replaced by the last writer's.
        """
        return {} if self.may_lose else []

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that all workers share."""
        settings = SETTINGS | (SYNCHRONOUS if self.may_lose else {})
        return settings | (PATIENT if self.mutant else {})

    @property
    def faults(self) -> Faults:
        """The frequencies of faults."""
        return MUTANTS[self.mutant].faults if self.mutant else Faults()

    @property
    def operations(self) -> float:
        """The number of operations reaching the store after which an actor ends before the time."""
        return MUTANTS[self.mutant].operations if self.mutant else math.inf

    @property
    def eras(self) -> int:
        """The number of eras, each with new sessions."""
        return int(self.seconds // ERA_S) + 1

    @property
    def sessions(self) -> list[str]:
        """The session keys of all eras."""
        return [self.key(era, number) for era in range(self.eras) for number in range(SESSIONS)]

    def key(self, era: int, number: int) -> str:
        """Return the session key of one of the sessions of an era."""
        return hashlib.sha256(f"{self.seed} {era} {number}".encode()).hexdigest()[:32]
