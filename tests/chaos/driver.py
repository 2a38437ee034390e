"""Driver: start the workers, stop and kill them, and check their history against the store.

Workers stop or kill themselves at points chosen by their seed, while they hold a lock. The driver
adds faults at any moment, which also hit waiters.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from shutil import rmtree
from typing import Any

import pytest
from django.test import override_settings

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionLockTimeout, SessionStoreUnavailable
from django_clustered_sessions.store.entries import django_redis
from tests.children import ROOT, bound
from tests.clocks import libfaketime
from tests.servers import wait_for

from . import checker, plan
from .history import History, Notebook
from .plan import LOCK_LEASE, LOCK_WAIT, STORE_TIMEOUT, Plan
from .stores import Stores

#: Seconds between two checks of the workers, and the delay of one that counts as a stall.
BEAT_S, STALL_S = 0.01, 0.25

#: Length of a stop in seconds: longer than a lease, or than the time in which writes are repeated.
STOP_S = (LOCK_LEASE * 1.2, STORE_TIMEOUT * 2 + 0.8)

#: Seconds that workers have to start, and to end after the run.
START_S, END_S = 180.0, LOCK_WAIT + STORE_TIMEOUT + 15.0

#: Faults from outside.
FAULTS = ("stop", "stop", "stop", "kill", "cut")


@dataclass
class Outcome:
    """Outcome of a run: its violations, and counts of what happened."""

    plan: Plan
    violations: list[str]
    counts: Mapping[str, int]
    folder: Path | None = None

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))
        lines = [f"chaos: seed {self.plan.seed}: {counts}"]
        if self.violations:
            more = f" --mutant {self.plan.mutant}" if self.plan.mutant else ""
            more += " --tracked" if self.plan.is_tracked else ""
            more += f" --topology {self.plan.topology}" if self.plan.topology != "single" else ""
            lines += [
                f"{len(self.violations)} violations; history in {self.folder}; again: "
                f"python -m tests.chaos --seconds {self.plan.seconds:g} --seed {self.plan.seed}"
                + more,
                *self.violations[:20],
            ]
        return "\n".join(lines)

    def forget(self) -> None:
        """Delete the history."""
        if self.folder is not None:
            rmtree(self.folder)
            self.folder = None


@dataclass
class Worker:
    """Process of a worker; its replacement has the next ``life``."""

    number: int
    environment: Mapping[str, str]
    life: int = 0
    process: subprocess.Popen[bytes] | None = None
    resumes_s: float | None = None

    @property
    def name(self) -> str:
        return f"w{self.number}-{self.life}"

    def start(self, told: dict[str, Any], folder: Path) -> None:
        """Start the process, with its errors in a file."""
        configuration = json.dumps(told | {"name": self.name})
        with (folder / f"{self.name}.err").open("wb") as errors:
            self.process = subprocess.Popen(
                bound([sys.executable, "-m", "tests.chaos.worker", configuration]),
                cwd=ROOT,
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
            )

    def send(self, number: signal.Signals) -> None:
        """Send the process a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    @property
    def has_stopped(self) -> bool:
        """Return whether the process was stopped since the last call."""
        assert self.process is not None
        options = os.WSTOPPED | os.WNOHANG
        try:
            return os.waitid(os.P_PID, self.process.pid, options) is not None
        except ChildProcessError:
            return False


def clock(offset_s: int) -> Mapping[str, str]:
    """Return the environment that gives a process a wrong clock, if libfaketime is installed."""
    if not offset_s:
        return {}
    try:
        library = libfaketime()
    except pytest.skip.Exception:
        return {}
    # The monotonic clock stays right, for timeouts and comparable times in histories.
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME": f"{offset_s:+d}s",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


@dataclass
class Driver:
    """Run of a plan against some stores."""

    plan: Plan
    stores: Stores

    def run(self) -> Outcome:
        """Run the plan and check its history; keep the history if there is a violation."""
        print(f"chaos: seed {self.plan.seed}", flush=True)
        self.folder = Path(tempfile.mkdtemp(prefix="dcs-chaos-"))
        self.dice = Random(f"{self.plan.seed} driver")
        self.counts: Counter[str] = Counter()
        self.history = History()
        caches = {"sessions": {"BACKEND": django_redis.BACKEND, **self.stores.entry()}}
        # What the driver itself asks has no short timeout: a machine that stalls is no violation.
        its = self.plan.settings | plan.PATIENT
        with override_settings(CACHES=caches, SESSION_CACHE_ALIAS="sessions", **its):
            for key in self.plan.sessions:
                session: Any = SessionStore(key)
                session._session_cache = {"log": self.plan.empty_log, "n": 0, "hits": 0, "blind": 0}
                session.save(must_create=True)
            # Without debug mode, which would slow the proxy in this loop, and so the store.
            asyncio.run(self.drive(), debug=False)
            wait_for(self.is_back, "the store is back", timeout_s=END_S)
            for key in self.plan.sessions:
                self.close(key)
        for path in sorted(self.folder.glob("*.jsonl")):
            self.history.read(path)
        violations = checker.check(
            self.history,
            may_lose=self.plan.may_lose,
            max_age_s=self.plan.max_age_s,
            role_s=self.plan.role_s,
        )
        self.counts += self.stores.counts
        for operation in self.history.operations.values():
            self.counts[operation.answer or "died"] += 1
            self.counts["waited"] += operation.queued_s is not None
        outcome = Outcome(self.plan, violations, self.counts, self.folder)
        if not violations:
            outcome.forget()
        return outcome

    def is_back(self) -> bool:
        """Return whether the store answers; after a failover, the new primary."""
        try:
            SessionStore(self.plan.sessions[0]).load()
        except SessionStoreUnavailable:
            return False
        return True

    def close(self, key: str) -> None:
        """Read a session's final values under its lock, which all kills must leave available."""
        session = SessionStore(key)
        try:
            with session.lock():
                pass
        except SessionLockTimeout as error:
            self.history.errors.append(f"session {key[:8]} stays locked: {error}")
        data = SessionStore(key).load()
        self.history.final[key] = data | {"log": list(data["log"])}

    async def drive(self) -> None:
        """Let the workers work, and cause the faults."""
        self.told = {
            "plan": asdict(self.plan),
            "sessions": await self.stores.start(),
            "folder": str(self.folder),
        }
        clocks = (clock(0), clock(3600), clock(-3600))
        self.workers = [
            Worker(number, clocks[number % len(clocks)]) for number in range(plan.WORKERS)
        ]
        torments: list[asyncio.Task[None]] = []
        try:
            await self.start()
            torments = [
                asyncio.create_task(self.torment()),
                asyncio.create_task(self.stores.torment()),
            ]
            await self.look_after()
        finally:
            for torment in torments:
                torment.cancel()
            for worker in self.workers:
                if worker.process and worker.process.poll() is None:
                    worker.process.kill()
                    worker.process.wait()
            if torments:
                await asyncio.wait(torments)
            await self.stores.close()

    async def start(self) -> None:
        """Start the workers, and let them begin together once all are up."""
        for worker in self.workers:
            worker.start(self.told, self.folder)
        async with asyncio.timeout(START_S):
            while not all(map(self.is_running, self.workers)):
                for worker in self.workers:
                    assert worker.process and worker.process.poll() is None, self.errors_of(worker)
                await asyncio.sleep(BEAT_S)
        self.began_s = time.monotonic()
        began = self.folder / "began.new"
        began.write_text(repr(self.began_s))
        began.rename(self.folder / "began")

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.began_s + self.plan.seconds

    async def look_after(self) -> None:
        """Resume stopped workers and replace killed ones, until all have ended."""
        notebook = Notebook(self.folder / "driver.jsonl")
        at_work, seen_s = set(range(plan.WORKERS)), time.monotonic()
        while at_work:
            await asyncio.sleep(BEAT_S)
            now_s = time.monotonic()
            if now_s - seen_s > STALL_S:
                notebook.note("stall", began_s=seen_s, ended_s=now_s)
            seen_s = now_s
            for number in list(at_work):
                if not self.is_at_work(self.workers[number], now_s):
                    at_work.remove(number)
            if now_s > self.began_s + self.plan.seconds + END_S:
                for number in at_work:
                    self.workers[number].send(signal.SIGUSR1)
                # Time to write the stacks; a hanging process gives no sign when it has.
                await asyncio.sleep(0.5)
                stacks = [self.errors_of(self.workers[number]) for number in at_work]
                self.history.errors.append("\n".join(["workers hang:", *stacks]))
                return

    def is_at_work(self, worker: Worker, now_s: float) -> bool:
        """Resume or replace a worker if it is time; return whether its work goes on."""
        assert worker.process is not None
        code = worker.process.poll()
        if code is None:
            if worker.resumes_s is None and worker.has_stopped:
                self.counts["stops"] += 1
                worker.resumes_s = now_s + self.dice.uniform(*STOP_S)
                if self.plan.faults.cut and self.dice.random() < 0.3:
                    self.stores.cut()
            elif worker.resumes_s is not None and now_s >= worker.resumes_s:
                worker.resumes_s = None
                worker.send(signal.SIGCONT)
            return True
        if code == -signal.SIGKILL:
            self.counts["kills"] += 1
            if not self.is_over:
                worker.life += 1
                worker.resumes_s = None
                worker.start(self.told, self.folder)
                return True
        elif code:
            self.history.errors.append(f"{worker.name} failed:\n{self.errors_of(worker)}")
        return False

    def errors_of(self, worker: Worker) -> str:
        return (self.folder / f"{worker.name}.err").read_text()[-4000:]

    async def torment(self) -> None:
        """Stop or kill a worker, or cut all connections, from time to time."""
        pause_s, faults = self.plan.faults.pause_s, list[str]()
        while pause_s is not None and not self.is_over:
            await asyncio.sleep(self.dice.uniform(0.5, 1.5) * pause_s)
            # Each fault once in random order, so that short runs have all.
            faults = faults or self.dice.sample(FAULTS, len(FAULTS))
            fault = faults.pop()
            running = [worker for worker in self.workers if self.is_running(worker)]
            if fault == "cut":
                self.stores.cut()
            elif running:
                worker = self.dice.choice(running)
                worker.send(signal.SIGSTOP if fault == "stop" else signal.SIGKILL)

    def is_running(self, worker: Worker) -> bool:
        """Return whether a worker has begun its work and is not stopped."""
        return worker.resumes_s is None and (self.folder / f"{worker.name}.jsonl").exists()
