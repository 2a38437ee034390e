"""Faults of every kind at once, and a history that is checked: see `tests.chaos`.

The checker has to find fault with three mutants, each without one of the things that the promises
rest on. A run prints its seed; ``make chaos SECONDS=600`` goes on for longer.
"""

from __future__ import annotations

import secrets

import pytest
import redis

from tests.chaos.driver import Driver, Outcome
from tests.chaos.plan import MUTANTS, Plan
from tests.chaos.stores import Failing, FailingNodes, Moving, Single
from tests.clusters import ClusterServers
from tests.conftest import store_binary
from tests.servers import StoreServer
from tests.topologies import Replicated

pytestmark = pytest.mark.full

SECONDS = 22.0

#: Where the stores change as well.
CHANGING_SECONDS = 16.0

#: Of a mutant, much less shows it. It runs again until so many operations have gone well: on a
#: machine that is very busy there are few of them in each run.
MUTANT_SECONDS, OPERATIONS, MOST_RUNS = 5.0, 3000, 20

#: What a mutant's history shows.
SIGNS = {
    "fence": "not alone",
    "queue": "overtaken",
    "replay": "'lost' and yet written",
}


def test_nothing_is_lost_doubled_or_overtaken(
    store: redis.Redis, store_server: StoreServer
) -> None:
    plan = Plan(secrets.randbelow(10**9), SECONDS)
    outcome = Driver(plan, Single(plan, store_server.port)).run()
    assert not outcome.violations, str(outcome)
    for what in ("ok", "waited", "stops", "kills", "cuts"):
        assert outcome.counts[what] > 0, f"no {what}: {outcome}"


def test_nothing_acknowledged_is_lost_by_failovers() -> None:
    plan = Plan(secrets.randbelow(10**9), CHANGING_SECONDS, topology="sentinel")
    with Replicated(replicas=1, sentinels=3) as topology:
        outcome = Driver(plan, Failing(plan, topology)).run()
    assert not outcome.violations, str(outcome)
    for what in ("ok", "failovers", "cut off", "stops"):
        assert outcome.counts[what] > 0, f"no {what}: {outcome}"


def test_nothing_is_lost_doubled_or_overtaken_while_slots_move() -> None:
    plan = Plan(secrets.randbelow(10**9), CHANGING_SECONDS, topology="cluster")
    with ClusterServers() as servers:
        outcome = Driver(plan, Moving(plan, servers)).run()
    assert not outcome.violations, str(outcome)
    for what in ("ok", "waited", "moves", "stops"):
        assert outcome.counts[what] > 0, f"no {what}: {outcome}"


def test_nothing_acknowledged_is_lost_by_a_cluster_whose_primaries_die() -> None:
    plan = Plan(secrets.randbelow(10**9), CHANGING_SECONDS, topology="failing-cluster")
    with ClusterServers(replicas=3) as servers:
        outcome = Driver(plan, FailingNodes(plan, servers)).run()
    assert not outcome.violations, str(outcome)
    for what in ("ok", "failovers", "stops"):
        assert outcome.counts[what] > 0, f"no {what}: {outcome}"


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_checker_notices_a_mutant(mutant: str) -> None:
    outcomes: list[str] = []
    gone_well = 0
    with StoreServer(binary=store_binary("valkey")) as server:
        while gone_well < OPERATIONS and len(outcomes) < MOST_RUNS:
            plan = Plan(len(outcomes) + 1, MUTANT_SECONDS, mutant)
            outcome = Driver(plan, Single(plan, server.port)).run()
            outcome.forget()
            if any(SIGNS[mutant] in violation for violation in outcome.violations):
                return
            outcomes.append(str(outcome))
            gone_well += outcome.counts["ok"]
    pytest.fail("\n".join(outcomes))


def test_a_failure_tells_how_to_see_it_again() -> None:
    outcome = Outcome(Plan(7, 3.0, "fence"), ["something happened"], {"ok": 1})
    assert "--seconds 3 --seed 7 --mutant fence" in str(outcome)
    assert "something happened" in str(outcome)
