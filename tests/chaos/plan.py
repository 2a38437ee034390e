"""What a run is: its seed, its sessions, its faults, and the settings that all workers share."""

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

#: A mutant's run has no fault from outside that a timeout has to end, and its operations are to
#: reach the store however slow the machine is. Seconds.
PATIENT: Final[Mapping[str, Any]] = {"CLUSTERED_SESSIONS_STORE_TIMEOUT": 10.0}

#: What the sessions are in: one store behind a proxy that cuts; a primary that fails and a replica
#: that takes over; a cluster whose slots move; one whose primaries fail, with a replica each.
Topology = Literal["single", "sentinel", "cluster", "failing-cluster"]

#: A write is acknowledged once a replica has it.
SYNCHRONOUS: Final[Mapping[str, Any]] = {"CLUSTERED_SESSIONS_SYNC_REPLICAS": 1}

#: Each so many seconds the work goes on with new sessions, so that none becomes large.
ERA_S: Final = 5.0

#: Sessions of an era. Half of the work is on the first one.
SESSIONS: Final = 4

WORKERS: Final = 4
THREADS: Final = 2
TASKS: Final = 2


@dataclass(frozen=True)
class Faults:
    """How often what goes wrong.

    ``stop`` and ``kill`` are chances that a holder is stopped for longer than its lease, or
    killed; ``cut`` is the chance of a reply to be cut; ``pause_s``, about so many seconds pass
    between two faults from outside, None for none.
    """

    stop: float = 0.003
    kill: float = 0.001
    cut: float = 0.004
    pause_s: float | None = 1.5


@dataclass(frozen=True)
class Mutant:
    """A defect to find: in the script of that name, ``old`` becomes ``new``.

    So many ``operations`` of each actor reach the store, also on a busy machine.
    """

    script: str
    old: bytes
    new: bytes
    faults: Faults
    operations: int


#: What the checker has to notice, each under the faults that bring it to light.
MUTANTS: Final[Mapping[str, Mutant]] = {
    # A commit no longer compares the lock that it is written under.
    "fence": Mutant(
        "commit",
        b"if refusal then",
        b'if refusal and fence == "" then',
        Faults(stop=0.05, kill=0, cut=0, pause_s=None),
        operations=30,
    ),
    # The lock is handed to whoever came last.
    "queue": Mutant(
        "lock",
        b"table.remove(queue, 1)",
        b"table.remove(queue)",
        Faults(stop=0, kill=0, cut=0, pause_s=None),
        operations=20,
    ),
    # A write that comes again is written again.
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
    """A run of so many seconds (of a mutant: at most), and what follows from its seed."""

    seed: int
    seconds: float
    mutant: str | None = None
    topology: Topology = "single"

    @property
    def may_lose(self) -> bool:
        """Whether what nobody acknowledged may be lost: primaries fail."""
        return self.topology in ("sentinel", "failing-cluster")

    @property
    def empty_log(self) -> dict[str, int] | list[str]:
        """What a session's log of operations is in the beginning.

        A write without the lock may be based on what a lost primary had. Merged with what is there
        instead, an addition to a dict is an addition; a list is the last writer's.
        """
        return {} if self.may_lose else []

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that all workers share."""
        settings = SETTINGS | (SYNCHRONOUS if self.may_lose else {})
        return settings | (PATIENT if self.mutant else {})

    @property
    def faults(self) -> Faults:
        """How often what goes wrong."""
        return MUTANTS[self.mutant].faults if self.mutant else Faults()

    @property
    def operations(self) -> float:
        """After how many operations that reach the store an actor ends, if it is not late."""
        return MUTANTS[self.mutant].operations if self.mutant else math.inf

    @property
    def eras(self) -> int:
        """How many times there are new sessions."""
        return int(self.seconds // ERA_S) + 1

    @property
    def sessions(self) -> list[str]:
        """The keys of all sessions."""
        return [self.key(era, number) for era in range(self.eras) for number in range(SESSIONS)]

    def key(self, era: int, number: int) -> str:
        """Return the key of one of the sessions of an era."""
        return hashlib.sha256(f"{self.seed} {era} {number}".encode()).hexdigest()[:32]
