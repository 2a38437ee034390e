"""The command line of `tests.chaos`."""

from __future__ import annotations

import argparse
import os
import random
import sys

import django

from tests.servers import StoreServer

from .driver import Driver
from .plan import MUTANTS, Plan


def main() -> int:
    """Run chaos as the command line asks; the exit status is 1 where it shows a violation."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the work lasts (60)")
    parser.add_argument("--seed", type=int, help="repeat the run with that seed (a new one)")
    parser.add_argument("--mutant", choices=MUTANTS, help="take that out of the scripts")
    options = parser.parse_args()
    seed = random.randrange(10**9) if options.seed is None else options.seed
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
    django.setup()
    with StoreServer() as store:
        outcome = Driver(Plan(seed, options.seconds, options.mutant), store.port).run()
    print(outcome)
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())
