"""Faults of every kind at once, and a history that is checked: see `tests.chaos`.

The checker has to find fault with some mutants, each without one of the things that the promises
rest on. A run prints its seed; ``make chaos SECONDS=600`` goes on for longer.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable

import pytest
import redis

from tests.chaos.driver import Driver, Outcome
from tests.chaos.plan import MUTANTS, Plan, Topology
from tests.chaos.stores import Failing, FailingNodes, Moving, Single
from tests.clusters import IMPATIENT_MS, ClusterServers
from tests.servers import StoreServer
from tests.topologies import Replicated

# A machine that is very busy takes a minute to start the workers of a run.
pytestmark = pytest.mark.timeout(600)

SECONDS = 12.0

#: A run in which not everything went wrong that should is followed by another one, so often at
#: most: on a machine that is very busy little happens in the time.
MOST_RUNS = 3

#: A mutant's run has so many operations that nearly each one shows it, whatever the machine does
#: meanwhile: ten of ten did with each mutant, on two cores with twenty processes that wanted one.
#: So many that do not show it are no chance.
MOST_RUNS_OF_A_MUTANT = 5

#: What a mutant's history shows.
SIGNS = {
    "fence": "not alone",
    "queue": "overtaken",
    "replay": "'lost' and yet written",
    "primary": "too old",
}


def run(
    topology: Topology,
    drive: Callable[[Plan], Outcome],
    *expected: str,
    is_tracked: bool = False,
    seconds: float = SECONDS,
) -> None:
    """Run plans that nothing may violate until all of what is expected has happened."""
    counts = Counter[str]()
    for _ in range(MOST_RUNS):
        seed = secrets.randbelow(10**9)
        outcome = drive(Plan(seed, seconds, topology=topology, is_tracked=is_tracked))
        assert not outcome.violations, str(outcome)
        counts.update(outcome.counts)
        if all(counts[what] for what in expected):
            return
    pytest.fail(f"not all of {expected}: {counts}")


READS = pytest.mark.parametrize("is_tracked", [False, True], ids=["checked", "tracked"])


@READS
def test_nothing_is_lost_doubled_overtaken_or_too_old(
    store: redis.Redis, store_server: StoreServer, is_tracked: bool
) -> None:
    def drive(plan: Plan) -> Outcome:
        return Driver(plan, Single(plan, store_server.port)).run()

    run("single", drive, "ok", "waited", "stops", "kills", "cuts", is_tracked=is_tracked)


def fail_over(plan: Plan) -> Outcome:
    with Replicated(replicas=1, sentinels=3) as topology:
        return Driver(plan, Failing(plan, topology)).run()


def test_failovers_lose_nothing_acknowledged() -> None:
    run("sentinel", fail_over, "ok", "failovers", "cut off", "stops")


def test_reads_without_trips_are_not_too_old_over_failovers() -> None:
    expected = ("ok", "failovers", "cut off", "stops")
    run("sentinel", fail_over, *expected, is_tracked=True, seconds=25.0)


@READS
def test_moving_slots_lose_double_or_reorder_nothing(is_tracked: bool) -> None:
    def drive(plan: Plan) -> Outcome:
        with ClusterServers() as servers:
            return Driver(plan, Moving(plan, servers)).run()

    run("cluster", drive, "ok", "waited", "moves", "stops", is_tracked=is_tracked)


@READS
def test_dying_primaries_of_a_cluster_lose_nothing_acknowledged(is_tracked: bool) -> None:
    def drive(plan: Plan) -> Outcome:
        with ClusterServers(replicas=3, node_timeout_ms=IMPATIENT_MS) as servers:
            return Driver(plan, FailingNodes(plan, servers)).run()

    run("failing-cluster", drive, "ok", "failovers", "stops", is_tracked=is_tracked)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_checker_notices_a_mutant(
    store: redis.Redis, store_server: StoreServer, mutant: str
) -> None:
    outcomes: list[str] = []
    its = MUTANTS[mutant]
    for seed in range(1, MOST_RUNS_OF_A_MUTANT + 1):
        plan = Plan(seed, its.seconds, mutant, its.topology, its.is_tracked)
        if its.topology == "sentinel":
            outcome = fail_over(plan)
        else:
            outcome = Driver(plan, Single(plan, store_server.port)).run()
        outcome.forget()
        if any(SIGNS[mutant] in violation for violation in outcome.violations):
            return
        outcomes.append(str(outcome))
    pytest.fail("\n".join(outcomes))


def test_failure_tells_how_to_see_it_again() -> None:
    outcome = Outcome(Plan(7, 3.0, "fence"), ["something happened"], {"ok": 1})
    assert "--seconds 3 --seed 7 --mutant fence" in str(outcome)
    assert "something happened" in str(outcome)
