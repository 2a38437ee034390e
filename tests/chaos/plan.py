"""Plan of a run: its seed, its sessions, its faults, and the settings of all workers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from django_clustered_sessions.store.sentinel import BELIEVED_INTERVALS, INTERVAL_S

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

#: Tracked reads: one that is served without a trip was the store's within so many seconds.
NEAR_MAX_AGE: Final = 0.4
TRACKED: Final[Mapping[str, Any]] = {
    "CLUSTERED_SESSIONS_NEAR_READS": "tracked",
    "CLUSTERED_SESSIONS_NEAR_MAX_AGE": NEAR_MAX_AGE,
}

#: A primary is taken for one for so many seconds after it was another's turn, and checked reads are
#: as old: the word of the Sentinels, which a cluster's map of slots does not come up to.
ROLE_S: Final = BELIEVED_INTERVALS * INTERVAL_S

#: Seconds for which a cut-off primary keeps its clients beside the new primary: clients ask the
#: Sentinels each second. With tracked reads, longer than any of these may be believed.
RIVALRY_S: Final = 2.0
TRACKED_RIVALRY_S: Final = 8.0
#: A mutant has to be seen to believe it, also on a machine where little happens in the time.
MUTANT_RIVALRY_S: Final = 15.0

#: Timeouts in seconds of the driver, and of a mutant's run that ends after so many operations. They
#: need no short ones, and what they ask has to reach the store however slow the machine is.
PATIENT: Final[Mapping[str, Any]] = {"CLUSTERED_SESSIONS_STORE_TIMEOUT": 10.0}

#: Stores of a run: one store behind a proxy that cuts; a failing primary whose replica takes over;
#: a cluster whose slots move; a cluster whose primaries fail, with a replica each.
Topology = Literal["single", "sentinel", "cluster", "failing-cluster"]

#: A write is acknowledged once a replica has it.
SYNCHRONOUS: Final[Mapping[str, Any]] = {"CLUSTERED_SESSIONS_SYNC_REPLICAS": 1}

#: Seconds after which the work goes on with new sessions, so that none becomes large; and where a
#: read that is too old has to be of the same time, which is older than `ROLE_S`.
ERA_S: Final = 5.0
LONG_ERA_S: Final = 12.0

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
    between two faults from outside, None for no such faults; ``of_primary`` are the ends of a
    primary under Sentinels, in random order.
    """

    stop: float = 0.003
    kill: float = 0.001
    cut: float = 0.004
    pause_s: float | None = 1.5
    of_primary: Sequence[str] = ("kill", "stop", "cut off")


@dataclass(frozen=True)
class Mutant:
    """Defect that the checker must find: in the named script or module, ``new`` replaces ``old``.

    ``operations`` is the number of operations of each actor that reach the store, also on a busy
    machine, within ``seconds``.
    """

    where: str
    old: str
    new: str
    faults: Faults
    operations: float
    seconds: float = 60.0
    topology: Topology = "single"
    is_tracked: bool = False


#: Mutants that the checker has to find, each with the faults that reveal it.
MUTANTS: Final[Mapping[str, Mutant]] = {
    # A commit does not compare the fencing token.
    "fence": Mutant(
        "commit",
        "if refusal then",
        'if refusal and fence == "" then',
        Faults(stop=0.05, kill=0, cut=0, pause_s=None),
        operations=30,
    ),
    # The lock is handed off to the last waiter instead of the first.
    "queue": Mutant(
        "queue",
        "table.remove(queue, 1)",
        "table.remove(queue)",
        Faults(stop=0, kill=0, cut=0, pause_s=None),
        operations=20,
    ),
    # A repeated write is executed again.
    "replay": Mutant(
        "commit",
        "if first_answer then",
        "if false then",
        Faults(stop=0, kill=0, cut=0.05, pause_s=None),
        operations=30,
    ),
    # Copies are kept when the Sentinels name another primary.
    "primary": Mutant(
        "store.tracking",
        "return is_at_primary is None or is_at_primary()",
        "return True",
        Faults(stop=0, kill=0, cut=0, pause_s=None, of_primary=["cut off"]),
        operations=math.inf,
        seconds=25.0,
        topology="sentinel",
        is_tracked=True,
    ),
}


@dataclass(frozen=True)
class Plan:
    """Plan of a run: its length (of a mutant: at most), and all that follows from its seed."""

    seed: int
    seconds: float
    mutant: str | None = None
    topology: Topology = "single"
    is_tracked: bool = False

    @property
    def max_age_s(self) -> float:
        """The age in seconds of a read without a lock at most, at its beginning."""
        return NEAR_MAX_AGE if self.is_tracked else 0.0

    @property
    def role_s(self) -> float:
        """The seconds for which a server may be read that is no primary any more."""
        return ROLE_S if self.may_lose else 0.0

    @property
    def rivalry_s(self) -> float:
        """The seconds for which a cut-off primary keeps its clients."""
        if self.mutant:
            return MUTANT_RIVALRY_S
        return TRACKED_RIVALRY_S if self.is_tracked else RIVALRY_S

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
        settings |= TRACKED if self.is_tracked else {}
        return settings | (PATIENT if math.isfinite(self.operations) else {})

    @property
    def faults(self) -> Faults:
        """The frequencies of faults."""
        return MUTANTS[self.mutant].faults if self.mutant else Faults()

    @property
    def operations(self) -> float:
        """The number of operations reaching the store after which an actor ends before the time."""
        return MUTANTS[self.mutant].operations if self.mutant else math.inf

    @property
    def era_s(self) -> float:
        """The seconds of an era."""
        return LONG_ERA_S if self.may_lose and self.is_tracked else ERA_S

    @property
    def eras(self) -> int:
        """The number of eras, each with new sessions."""
        return int(self.seconds // self.era_s) + 1

    @property
    def sessions(self) -> list[str]:
        """The session keys of all eras."""
        return [self.key(era, number) for era in range(self.eras) for number in range(SESSIONS)]

    def key(self, era: int, number: int) -> str:
        """Return the session key of one of the sessions of an era."""
        return hashlib.sha256(f"{self.seed} {era} {number}".encode()).hexdigest()[:32]
