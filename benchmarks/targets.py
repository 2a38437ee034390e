"""What the package promises to cost, and whether it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from .delay import DELAYS_MS
from .engines import BASE, FLOOR, LOCKED, OURS, TRACKED
from .measuring import Ratio, Times, ratio
from .report import code_ratio
from .scenarios import CHANGE, LARGE_CHANGE, LARGE_READ, LOGIN, READ, SLIDING
from .traffic import Traffic

#: Servers by what they are started with: the largest value of a compact hash, in bytes.
DEFAULTS, COMPACT = "64", "256"

#: Round trips by scenario: unlocked, locked, and with tracked reads.
TRIPS: Final[Mapping[str, tuple[int, int, int]]] = {
    "no cookie": (0, 0, 0),
    "untouched": (0, 0, 0),
    "untouched, every request saves": (1, 1, 1),
    "read": (1, 2, 0),
    "sliding read": (1, 2, 0),
    "change": (2, 2, 1),
    "first write": (1, 1, 1),
    "login": (3, 3, 2),
    "logout": (2, 2, 1),
}
#: Engines in the order of those.
_OURS: Final = {OURS: "", LOCKED: ", locked", TRACKED: ", tracked"}


@dataclass
class Results:
    """Everything that was measured: by scenario, then by engine."""

    near: dict[str, dict[str, Times]] = field(default_factory=dict)
    #: By ms there and back, then as ``near``.
    far: dict[float, dict[str, dict[str, Times]]] = field(default_factory=dict)
    #: By scenario and how many requests at once.
    at_once: dict[tuple[str, int], dict[str, Times]] = field(default_factory=dict)
    traffic: dict[str, dict[str, Traffic]] = field(default_factory=dict)
    #: Bytes per session by server, content and engine.
    memory: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)


class Target(NamedTuple):
    """A figure that is to be at most ``limit``."""

    name: str
    limit: float
    measured: Ratio | float

    @property
    def value(self) -> float:
        """The figure, of a ratio the median."""
        return self.measured.median if isinstance(self.measured, Ratio) else self.measured

    @property
    def is_reached(self) -> bool:
        """Whether it is."""
        return self.value <= self.limit


def targets(found: Results) -> Iterator[Target]:
    """Return every target with what was measured for it."""
    for scenario, engine, limit in (
        (READ, OURS, 0.90),
        (READ, TRACKED, 0.30),
        (SLIDING, OURS, 0.35),
        (SLIDING, TRACKED, 0.15),
        (CHANGE, OURS, 0.80),
        (CHANGE, LOCKED, 0.95),
        (CHANGE, TRACKED, 0.55),
        (LARGE_READ, OURS, 0.70),
        (LARGE_READ, TRACKED, 0.12),
        (LARGE_CHANGE, OURS, 0.65),
        (LARGE_CHANGE, TRACKED, 0.50),
        (LOGIN, OURS, 0.60),
        (LOGIN, TRACKED, 0.50),
    ):
        name = f"{scenario.name}{_OURS[engine]}"
        yield Target(name, limit, code_ratio(found.near[scenario.name], engine, BASE))
    for scenario, limit in ((READ, 0.08), (CHANGE, 0.40)):
        if scenario.name in (far := found.far.get(DELAYS_MS[0], {})):
            ratio_far = code_ratio(far[scenario.name], TRACKED, BASE)
            yield Target(f"{scenario.name}, tracked, half a millisecond away", limit, ratio_far)
    for (name, at_once), times in found.at_once.items():
        measured = code_ratio(times, OURS, BASE, "cpu")
        yield Target(f"{name}, ASGI, {at_once} at once: client CPU", 0.35, measured)
    change, read = found.near[CHANGE.name], found.near[READ.name]
    yield Target("locked change beside unlocked", 1.10, code_ratio(change, LOCKED, OURS))
    store_cpu = ratio(read[OURS].store_cpu, read[FLOOR].store_cpu)
    yield Target("read: CPU of the store beside a GET", 2.0, store_cpu)
    for server, limit in ((DEFAULTS, 2.0), (COMPACT, 1.5)):
        for what, each in found.memory[server].items():
            named = f"memory, {what}, hash-max-listpack-value {server}"
            yield Target(named, limit, each[OURS] / each[BASE])
    large = found.traffic[LARGE_READ.name][OURS]
    yield Target("bytes of the answer, 64 kB unchanged", 199, large.bytes_received)
    for name, limits in TRIPS.items():
        for (engine, suffix), trips in zip(_OURS.items(), limits, strict=True):
            yield Target(f"round trips: {name}{suffix}", trips, found.traffic[name][engine].trips)
