"""Rounds in which everything that is compared has its turn, so that noise hits all alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

#: Requests at the start of a block that only warm up what the one before made cold.
UNCOUNTED: Final = 4


class Subject(Protocol):
    """Something that is measured."""

    name: str

    def prepare(self, count: int) -> list[Any]:
        """Return what a block of requests needs; this is not timed."""

    def run(self, request: Any) -> None:
        """Do one of them; this is timed."""


class Ratio(NamedTuple):
    """The median of the rounds' ratios, and between what half of them were."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


@dataclass
class Times:
    """What was measured of one subject: times in us.

    ``requests`` has the wall time of each request; the others a mean for each round.
    """

    requests: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    store_cpu: list[float] = field(default_factory=list)

    @property
    def p99(self) -> float:
        """The 99th percentile of the requests' wall times."""
        return statistics.quantiles(self.requests, n=100, method="inclusive")[98]


def store_clock(pids: Sequence[int]) -> Callable[[], float]:
    """Return a function that tells how much CPU time some stores have used, in us."""
    paths = [Path(f"/proc/{pid}/schedstat") for pid in pids]
    if not all(path.exists() for path in paths):
        return lambda: float("nan")
    return lambda: sum(int(path.read_text().split()[0]) for path in paths) / 1000


def measure(
    subjects: Sequence[Subject], store_cpu: Callable[[], float], *, rounds: int, block: int
) -> dict[str, Times]:
    """Run blocks of requests of each subject in turn; the first two rounds are for warming up.

    The order is another one in each round, so that nobody always has the same one before it. So
    that what was before does not matter much, a block's first requests are not counted.
    """
    found = {subject.name: Times() for subject in subjects}
    with no_garbage() as collect:
        for number in range(-2, rounds):
            for subject in random.sample(subjects, len(subjects)):
                requests = subject.prepare(UNCOUNTED + block)
                for _ in range(UNCOUNTED):
                    subject.run(requests.pop())
                times = Times() if number < 0 else found[subject.name]
                _time_block(subject.run, requests, times, store_cpu)
            collect()
    return found


def _time_block(
    run: Callable[[Any], None],
    requests: list[Any],
    times: Times,
    store_cpu: Callable[[], float],
) -> None:
    clock = time.perf_counter_ns
    each = []
    store_before, cpu_before = store_cpu(), time.process_time_ns()
    for request in requests:
        before = clock()
        run(request)
        each.append(clock() - before)
    cpu = time.process_time_ns() - cpu_before
    times.store_cpu.append((store_cpu() - store_before) / len(each))
    times.cpu.append(cpu / len(each) / 1000)
    times.wall.append(sum(each) / len(each) / 1000)
    times.requests += [ns / 1000 for ns in each]


@contextmanager
def no_garbage() -> Iterator[Callable[[], Any]]:
    """Collect no garbage but when the function that this gives is called."""
    gc.collect()
    # What is there already stays there: looking through it each time would take long.
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.enable()
        gc.unfreeze()


def net(ours: Sequence[float], frame: Sequence[float]) -> list[float]:
    """Return each round's figure less that of the same round without a session."""
    return [a - b for a, b in zip(ours, frame, strict=True)]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Return how many times theirs ours is, round by round."""
    ratios = [a / b if b > 0 else float("inf") for a, b in zip(ours, theirs, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)
