"""Command line of `tests.chaos`."""

from __future__ import annotations

import argparse
import os
import random
import sys
from contextlib import ExitStack
from typing import get_args

import django

from tests.clusters import IMPATIENT_MS, ClusterServers
from tests.servers import StoreServer
from tests.topologies import Replicated

from .driver import Driver
from .plan import MUTANTS, Plan, Topology
from .stores import Failing, FailingNodes, Moving, Single, Stores


def main() -> int:
    """Run chaos by the command line; the exit status is 1 if there is a violation."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the work lasts (60)")
    parser.add_argument("--seed", type=int, help="repeat the run with that seed (a new one)")
    parser.add_argument("--mutant", choices=MUTANTS, help="take that out of the scripts")
    parser.add_argument(
        "--topology", choices=get_args(Topology), default="single", help="what the stores are"
    )
    parser.add_argument("--tracked", action="store_true", help="read without trips")
    options = parser.parse_args()
    seed = random.randrange(10**9) if options.seed is None else options.seed
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
    django.setup()
    plan = Plan(seed, options.seconds, options.mutant, options.topology, options.tracked)
    with ExitStack() as started:
        stores: Stores
        if plan.topology == "failing-cluster":
            servers = ClusterServers(replicas=3, node_timeout_ms=IMPATIENT_MS)
            stores = FailingNodes(plan, started.enter_context(servers))
        elif plan.topology == "cluster":
            stores = Moving(plan, started.enter_context(ClusterServers()))
        elif plan.topology == "sentinel":
            stores = Failing(plan, started.enter_context(Replicated(replicas=1, sentinels=3)))
        else:
            stores = Single(plan, started.enter_context(StoreServer()).port)
        outcome = Driver(plan, stores).run()
    print(outcome)
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())
