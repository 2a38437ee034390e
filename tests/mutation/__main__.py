"""Break the package in many small ways, one at a time, and count how many the tests notice.

    python -m tests.mutation --sample 100 -- tests -m "not slow"

What is behind ``--`` chooses the suite, as pytest's arguments. A sample is the same for the same
seed as long as the package is the same, whatever the suite.

A mutant is ``killed`` by a test that fails, ``hung`` by one that does not end; it ``survived`` all
tests that execute its line, or was ``capped``, where only the fastest of these have run; or it is
``unreached``, as no test executes it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from fnmatch import fnmatch
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from . import lua, python, running
from .mutants import Mutant
from .selection import Selection, record

PACKAGE: Final = "django_clustered_sessions"

#: The files that are mutated.
FILES: Final = ("protocol/*.py", "session/*.py", "protocol/lua/*.lua")

#: How many tests run in a first fork and in a second one: most mutants need few, and a fork
#: imports the modules of all its tests.
_FIRST: Final = (20, 300)


def judge(
    mutant: Mutant, tests: Sequence[str], usual_s: Mapping[str, float], folder: Path
) -> dict[str, Any]:
    """Run tests against a mutant until one fails, twice; return what became of it."""
    copy = running.own_copy(folder)
    started = time.monotonic()
    verdict, by = "survived" if tests else "unreached", ""
    sizes = iter(_FIRST)
    with running.applied(mutant, copy):
        while tests and not by:
            part = tests[: next(sizes, None)]
            failure = running.first_failure(copy, part, usual_s)
            if failure is None:
                tests = tests[len(part) :]
            elif "hung" in failure:
                verdict, by = "hung", failure["hung"]
            elif running.first_failure(copy, [failure["ended"]], usual_s):
                verdict, by = "killed", failure["ended"]
            else:
                # It failed by chance.
                tests = tests[tests.index(failure["ended"]) + 1 :]
    return {"verdict": verdict, "by": by, "seconds": round(time.monotonic() - started, 2)}


def all_mutants(root: Path, only: Sequence[str]) -> Iterator[Mutant]:
    """Yield every mutant of the files that match a pattern of ``only``."""
    for pattern in FILES:
        for path in sorted((root / PACKAGE).glob(pattern)):
            file = str(path.relative_to(root))
            if not only or any(fnmatch(file, f"*{pattern}") for pattern in only):
                make = lua if path.suffix == ".lua" else python
                yield from make.mutants(file, path.read_text())


def listed(report: Path, verdicts: Sequence[str]) -> list[Mutant]:
    """Return the mutants of a report; with ``verdicts``, those that it has these of."""
    fields = Mutant.__dataclass_fields__
    return [
        Mutant(**{name: row[name] for name in fields})
        for row in json.loads(report.read_text())["mutants"]
        if not verdicts or row["verdict"] in verdicts
    ]


def parsed() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="chooses the sample")
    parser.add_argument("--sample", type=int, help="how many mutants; all without it")
    parser.add_argument("--only", action="append", default=[], help="a file, or a pattern of some")
    parser.add_argument("--mutants", type=Path, help="a report whose mutants to run, not a sample")
    parser.add_argument("--verdicts", default="", help="only those of --mutants: survived,capped")
    parser.add_argument("--output", type=Path, default=Path("mutation.json"), help="the report")
    parser.add_argument("--selection", type=Path, help="what tests execute; recorded where missing")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[2], help="the checkout")
    parser.add_argument(
        "--cap", type=float, default=120.0, help="usual seconds of a mutant's tests"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("suite", nargs="*", default=["tests"], help="pytest's arguments")
    return parser.parse_args()


def main() -> None:
    """Run, and write the report."""
    options = parsed()
    root = options.root.resolve()
    if options.mutants:
        chosen = listed(options.mutants, options.verdicts.split(",") if options.verdicts else [])
    else:
        found = sorted(set(all_mutants(root, options.only)), key=lambda one: one.rank(options.seed))
        chosen = found[: options.sample]
        print(f"seed {options.seed}: {len(chosen)} of {len(found)} mutants")
    with (
        # A short path: that of a unix socket has at most 107 bytes.
        TemporaryDirectory(prefix="mutation-") as name,
        ProcessPoolExecutor(
            options.workers, get_context("fork"), running.begin, (root, Path(name))
        ) as workers,
    ):
        folder = Path(name)
        if options.selection and options.selection.exists():
            selection = Selection.load(options.selection)
        else:
            selection = record(folder, options.suite, workers)
            if options.selection:
                selection.save(options.selection)
        print(f"{len(selection.seconds)} tests, {sum(selection.seconds.values()):.0f} s in all")
        for test in selection.failed:
            print(f"left out, as it fails on the package as it is: {test}")
        jobs: dict[Future[dict[str, Any]], dict[str, Any]] = {}
        for mutant in chosen:
            tests = selection.of(mutant, root)
            usual_s = {test: selection.seconds[test] for test in tests}
            within = [
                test
                for test, sum_s in zip(tests, accumulate(usual_s.values()), strict=True)
                if sum_s <= options.cap
            ]
            row = asdict(mutant) | {"selected": len(tests), "run": len(within)}
            jobs[workers.submit(judge, mutant, within, usual_s, folder)] = row
        for done, job in enumerate(as_completed(jobs), 1):
            row = jobs[job]
            row |= job.result()
            if row["verdict"] == "survived" and row["run"] < row["selected"]:
                row["verdict"] = "capped"
            place = f"{row['file']}:{row['line']} {row['kind']}"
            print(f"{done}/{len(jobs)} {row['verdict']} {place} {row['seconds']} s", flush=True)
    rows = list(jobs.values())
    rows.sort(key=lambda row: (row["file"], row["line"], row["mutated"]))
    report = {"seed": options.seed, "suite": options.suite, "mutants": rows}
    options.output.write_text(json.dumps(report, indent=1))
    for row in rows:
        if row["verdict"] not in {"killed", "hung"}:
            print(f"{row['verdict']}: {row['file']}:{row['line']} {row['kind']}")
            print(f"- {row['original']}\n+ {row['mutated']}")
    print(dict(Counter(row["verdict"] for row in rows)))


if __name__ == "__main__":
    main()
