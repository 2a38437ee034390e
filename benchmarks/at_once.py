"""Asynchronous requests, many at once: what a session adds to the CPU time of each."""

from __future__ import annotations

import asyncio
import contextvars
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from asgiref.sync import ThreadSensitiveContext

from .measuring import UNCOUNTED, Times, no_garbage


class AsyncSubject(Protocol):
    """Something that is measured."""

    name: str

    def prepare(self, count: int) -> list[Any]:
        """Return what a block of requests needs; this is not timed."""

    async def arun(self, request: Any) -> None:
        """Do one of them; this is timed."""


def measure(
    subjects: Sequence[AsyncSubject],
    store_cpu: Callable[[], float],
    *,
    rounds: int,
    block: int,
    at_once: int,
    sessions: int,
) -> dict[str, Times]:
    """Run blocks of requests of each subject in turn, ``at_once`` at a time, in one event loop.

    Each request is a task with a thread of its own for synchronous code, as Django's ASGI handler
    runs it. The first two rounds are for warming up, with a request on each of the ``sessions``.
    """
    # What is kept by context, such as Django's caches, is to be each request's own, as it is in a
    # server; so the loop must not inherit what this thread has.
    measuring = _measure(subjects, store_cpu, rounds, block, at_once, sessions)
    return contextvars.Context().run(asyncio.run, measuring)


async def _measure(
    subjects: Sequence[AsyncSubject],
    store_cpu: Callable[[], float],
    rounds: int,
    block: int,
    at_once: int,
    sessions: int,
) -> dict[str, Times]:
    found = {subject.name: Times() for subject in subjects}
    with no_garbage() as collect:
        for number in range(-2, rounds):
            for subject in random.sample(subjects, len(subjects)):
                requests = subject.prepare(UNCOUNTED + (sessions if number == -2 else block))
                for _ in range(UNCOUNTED):
                    await _serve(subject, requests.pop())
                times = Times() if number < 0 else found[subject.name]
                await _time_block(subject, requests, times, store_cpu, at_once)
            collect()
    return found


async def _time_block(
    subject: AsyncSubject,
    requests: list[Any],
    times: Times,
    store_cpu: Callable[[], float],
    at_once: int,
) -> None:
    each: list[float] = []
    store_before, cpu_before = store_cpu(), time.process_time_ns()
    wall_before = time.perf_counter_ns()
    left = iter(requests)
    await asyncio.gather(*(_in_turn(subject, left, each) for _ in range(at_once)))
    times.wall.append((time.perf_counter_ns() - wall_before) / len(each) / 1000)
    times.cpu.append((time.process_time_ns() - cpu_before) / len(each) / 1000)
    times.store_cpu.append((store_cpu() - store_before) / len(each))
    times.requests += each


async def _in_turn(subject: AsyncSubject, left: Iterator[Any], each: list[float]) -> None:
    for request in left:
        before = time.perf_counter_ns()
        await asyncio.create_task(_serve(subject, request))
        each.append((time.perf_counter_ns() - before) / 1000)


async def _serve(subject: AsyncSubject, request: Any) -> None:
    async with ThreadSensitiveContext():
        await subject.arun(request)
