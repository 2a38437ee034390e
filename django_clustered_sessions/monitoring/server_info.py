"""Facts about the store's servers: INFO, clocks, replicas, Sentinels. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.protocol.commands.script_calls import CLOCK, milliseconds
from django_clustered_sessions.protocol.effects import Everywhere, Flow, Trip, plain

#: Greatest difference of clocks that is not reported, in ms.
CLOCK_TOLERANCE_MS: Final = 1000

#: Names of the replicas in INFO.
_REPLICA: Final = re.compile(r"slave\d+")


@dataclass(frozen=True, slots=True)
class Refused:
    """Refusal of a command by the store, with the reason as text."""

    why: str


@dataclass(frozen=True, slots=True)
class Clock:
    """Clock of a store host: its time, this node's clock less it, and the error of that, in ms."""

    now_ms: int
    offset_ms: int
    error_ms: int

    def ahead_of(self, other: Clock) -> tuple[int, int]:
        """Return the ms that it is ahead of another host's clock, and the error of that in ms."""
        return other.offset_ms - self.offset_ms, self.error_ms + other.error_ms


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """Facts about the store: its clock in ms, INFO, and parts of CONFIG.

    ``info`` is that of the first primary of a cluster, ``others`` are those of the other primaries.
    ``clock_offset_ms`` is this node's clock less the store's, exact to ``clock_error_ms``. If the
    store refuses, ``info`` is empty, or ``save`` and ``min_replicas`` are None, and ``why_no_info``
    or ``why_no_config`` has the reason.
    """

    now_ms: int
    clock_offset_ms: int
    clock_error_ms: int
    info: Mapping[str, str]
    save: str | None
    why_no_info: str = "INFO does not tell"
    why_no_config: str = ""
    others: Sequence[Mapping[str, str]] = ()
    min_replicas: int | None = None

    @property
    def clock(self) -> Clock:
        """The store's clock compared to this node's."""
        return Clock(self.now_ms, self.clock_offset_ms, self.clock_error_ms)

    @property
    def product(self) -> str:
        """The product: ``"valkey"``, or ``"redis"`` for Redis and compatible servers."""
        return "valkey" if "valkey_version" in self.info else "redis"

    @property
    def version(self) -> str | None:
        """The server's version."""
        return self.info.get(f"{self.product}_version")

    @property
    def role(self) -> str | None:
        """The server's role: ``"primary"`` or ``"replica"``, None if unknown."""
        roles = {"master": "primary", "slave": "replica"}
        return roles.get(self.info.get("role", ""))

    @property
    def appendonly(self) -> bool | None:
        """True if the store writes an append-only file, None if unknown."""
        enabled = self.info.get("aof_enabled")
        return None if enabled is None else enabled == "1"

    def number(self, name: str) -> int | None:
        """Return a whole number out of INFO, summed over all primaries."""
        found = [info.get(name, "") for info in (self.info, *self.others)]
        return sum(map(int, found)) if all(map(str.isdigit, found)) else None

    @property
    def fewest_replicas(self) -> int:
        """The smallest number of replicas of any primary; 0 if one does not report it."""
        told = (info.get("connected_slaves", "") for info in (self.info, *self.others))
        return min(int(text) if text.isdigit() else 0 for text in told)

    @property
    def primaries(self) -> int | None:
        """The number of primaries that share the sessions, None if unknown."""
        return 1 + len(self.others) if self.info else None


@dataclass(slots=True)
class Replica:
    """Replica as its primary reports it; ``lag_s``: seconds since its last acknowledgement.

    ``clock`` is None if the replica was unreachable.
    """

    host: str
    port: int
    state: str
    lag_bytes: int
    lag_s: int
    clock: Clock | None = None

    @property
    def address(self) -> str:
        """The replica's host and port."""
        return f"{self.host}:{self.port}"


@dataclass(slots=True)
class Primary:
    """Server that holds sessions, and its replicas; None if it does not report them.

    ``slots`` are the slot ranges of a primary in a cluster, both ends included.
    """

    address: str
    role: str | None
    clock: Clock
    replicas: Sequence[Replica] | None
    slots: Sequence[tuple[int, int]] | None = None


@dataclass(frozen=True, slots=True)
class Sentinels:
    """Sentinels: the number that the entry names, the number of these that answer, and their facts.

    ``known`` is the number of Sentinels that they report, ``quorum`` the number that has to find
    the primary down; None if none answers.
    """

    service: str
    named: int
    answering: int
    known: int | None
    quorum: int | None


def clock(node: Callable[[], float]) -> Flow[Clock]:
    """Ask a server for its time; ``node`` gives this node's in seconds.

    Raises SessionStoreUnavailable.
    """
    yield (CLOCK,)
    # The second reply is timed, because the first may include the time to connect.
    sent_s = node()
    (time,) = yield (CLOCK,)
    received_s = node()
    now_ms = milliseconds(time)
    return Clock(
        now_ms,
        round((sent_s + received_s) * 500) - now_ms,
        math.ceil(abs(received_s - sent_s) * 500),
    )


def store_facts(node: Callable[[], float]) -> Flow[StoreFacts]:
    """Ask the store about itself; ``node`` gives this node's time in seconds.

    Raises SessionStoreUnavailable if the store does not even report its time.
    """
    time = yield from clock(node)
    facts: dict[str, Any] = {"info": {}, "save": None}
    match (yield from unless_refused(Everywhere((plain("INFO"),)))):
        case Refused(why):
            facts["why_no_info"] = why
        case [bytes() as first, *others]:
            facts["info"], facts["others"] = _parse_info(first), list(map(_parse_info, others))
    asked = plain("CONFIG", "GET", "save", "min-replicas-to-write")
    match (yield from unless_refused((asked,))):
        case Refused(why):
            facts["why_no_config"] = why
        case [reply]:
            words = iter(reply)
            told = {name.decode(): value.decode() for name, value in zip(words, words, strict=True)}
            facts["save"] = told.get("save")
            least = told.get("min-replicas-to-write", "")
            facts["min_replicas"] = int(least) if least.isdigit() else None
            facts["why_no_config"] = "" if told else "CONFIG GET does not tell"
    return StoreFacts(time.now_ms, time.offset_ms, time.error_ms, **facts)


def lacking(words: Sequence[str]) -> Flow[Collection[str] | Refused]:
    """Ask the store which of some commands it does not have.

    Raises SessionStoreUnavailable.
    """
    told = yield from unless_refused((plain("COMMAND", "INFO", *words),))
    if isinstance(told, Refused):
        return told
    return {word for word, found in zip(words, told[0], strict=True) if not found}


def primary(address: str, facts: StoreFacts) -> Primary:
    """Return a server with the replicas that its INFO lists."""
    replicas = None
    sent = facts.number("master_repl_offset")
    if sent is not None:
        lines = (value for name, value in facts.info.items() if _REPLICA.fullmatch(name))
        replicas = [_replica(line, sent) for line in lines]
    return Primary(address, facts.role, facts.clock, replicas)


def sentinels(service: str, states: Sequence[Mapping[str, Any] | None]) -> Sentinels:
    """Sum up the states of a service from each Sentinel; a state is None if it did not answer."""
    told = [state for state in states if state is not None]
    known = max((state["num-other-sentinels"] + 1 for state in told), default=None)
    quorum = told[0]["quorum"] if told else None
    return Sentinels(service, len(states), len(told), known, quorum)


def _replica(line: str, sent: int) -> Replica:
    """Parse INFO's line of a replica; ``sent`` is the primary's own replication offset."""
    told = dict(word.partition("=")[::2] for word in line.split(","))
    behind, lag_s = sent - int(told["offset"]), int(told["lag"])
    return Replica(told["ip"], int(told["port"]), told["state"], max(behind, 0), lag_s)


def unless_refused(trip: Trip) -> Flow[Any]:
    """Make a trip; return its replies, or Refused if the store refuses."""
    try:
        return (yield trip)
    except SessionStoreUnavailable as error:
        return Refused(str(error))


def _parse_info(reply: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in reply.decode("utf-8", "replace").splitlines())
    return {name: value for name, colon, value in lines if colon}
