"""Tests that can notice a mutant: those that execute its line.

One case of each test comes first, and of these the fastest.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path

from . import recorder, running
from .mutants import Mutant


@dataclass
class Selection:
    """Result of a run of the suite on the unchanged package.

    ``seconds`` has each test that passes; ``hits`` the tests of each line, as places in it: file ->
    line -> places. A Lua script has one line, 0.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    hits: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> Selection:
        """Read what `save` has written."""
        return cls(**json.loads(path.read_text()))

    def save(self, path: Path) -> None:
        """Write it for other runs with the same suite."""
        path.write_text(json.dumps(asdict(self)))

    @cached_property
    def tests(self) -> list[str]:
        """The tests in the order of ``hits``."""
        return list(self.seconds)

    def of(self, mutant: Mutant, root: Path) -> list[str]:
        """Return the tests that execute a mutant's line.

        Those of a line that runs at import are the tests of the lines that name what it binds.
        """
        found: set[int] = set()
        if mutant.file.endswith(".lua"):
            for script in _scripts_with(root / mutant.file):
                found |= self._at(f"{mutant.file.rpartition('/')[0]}/{script}.lua", [0])
        elif mutant.binds:
            name = re.compile(rf"\b{mutant.binds}\b")
            for file in self.hits:
                if file.endswith(".py"):
                    lines = (root / file).read_text().splitlines()
                    found |= self._at(
                        file, (n for n, text in enumerate(lines, 1) if name.search(text))
                    )
            if not found:
                found = self._at(mutant.file, map(int, self.hits.get(mutant.file, ())))
        else:
            found = self._at(mutant.file, range(mutant.first, mutant.last + 1))
        cases: Counter[str] = Counter()

        def order(place: int) -> tuple[bool, int, int]:
            test = self.tests[place]
            function = test.partition("[")[0]
            cases[function] += 1
            # What takes about as long stays together with what else its module has.
            return cases[function] > 1, round(math.log2(self.seconds[test] + 0.01)), place

        return [self.tests[place] for place in sorted(sorted(found), key=order)]

    def _at(self, file: str, lines: Iterable[int]) -> set[int]:
        hits = self.hits.get(file, {})
        return {place for line in lines for place in hits.get(str(line), ())}


def _scripts_with(path: Path) -> list[str]:
    """Return the names of the scripts whose source has the text of a file."""
    including = re.compile(rf"^ *-- Includes: {path.stem}$", re.MULTILINE)
    return [path.stem] + [
        other.stem for other in path.parent.glob("*.lua") if including.search(other.read_text())
    ]


def record(folder: Path, suite: Sequence[str], workers: Executor) -> Selection:
    """Run the suite once, file by file, and return what each test executes."""
    tests = workers.submit(_collect, folder, suite).result()
    selection = Selection()
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    records = folder / "records"
    records.mkdir()
    parts = [
        list(part) for _, part in groupby(sorted(tests, key=running.module_of), running.module_of)
    ]
    # The longest first, so that no worker is left with one at the end.
    parts.sort(key=len, reverse=True)
    jobs = [workers.submit(_record, folder, part, records) for part in parts]
    for done, job in enumerate(as_completed(jobs), 1):
        seconds, failed = job.result()
        selection.seconds |= seconds
        selection.failed += failed
        print(f"\rrecorded {done} of {len(jobs)} files", end="", flush=True)
    print()
    for path in records.iterdir():
        test = ""
        for line in path.read_text().splitlines():
            if line.startswith("# "):
                test = line[2:]
            elif test in selection.seconds:
                file, _, number = line.partition("\t")
                found[file][number].add(test)
    places = {test: place for place, test in enumerate(selection.seconds)}
    selection.hits = {
        file: {line: sorted(places[test] for test in hit) for line, hit in lines.items()}
        for file, lines in found.items()
    }
    return selection


def _collect(folder: Path, suite: Sequence[str]) -> list[str]:
    copy = running.own_copy(folder)
    for event in running.run(copy, [*suite, "--collect-only"]):
        if "collected" in event:
            return event["collected"]  # type: ignore[no-any-return]
    raise RuntimeError((copy / "mutation.log").read_text())


def _record(
    folder: Path, tests: Sequence[str], records: Path
) -> tuple[dict[str, float], list[str]]:
    """Run tests of one file; return how long each took that passed, and those that failed."""
    copy = running.own_copy(folder)
    shutil.copy(recorder.__file__, copy / "sitecustomize.py")
    seconds: dict[str, float] = {}
    failed: list[str] = []
    started = 0.0
    for event in running.run(copy, [running.module_of(tests[0])], tests, records=records):
        if "started" in event:
            started = event["at"]
        elif event.get("failed") or "hung" in event:
            failed.append(event.get("ended") or event["hung"])
        elif "ended" in event:
            seconds[event["ended"]] = round(event["at"] - started, 4)
    (copy / "sitecustomize.py").unlink()
    return seconds, failed
