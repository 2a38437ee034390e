"""The benchmarks run; what they measure is nobody's business here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.children import ROOT, bound

#: Seconds for a benchmark on a machine that has much else to do.
PATIENCE_S = 500

pytestmark = [pytest.mark.full, pytest.mark.timeout(PATIENCE_S + 60)]


def run(*arguments: str) -> str:
    """Return what a benchmark prints; it fails if the benchmark does."""
    done = subprocess.run(
        bound([sys.executable, "-m", *arguments]),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_benchmark_compares_engines(tmp_path: Path) -> None:
    output = tmp_path / "report.md"
    tiny = ("--rounds=2", "--block=1", "--sessions=6", "--at-once=1,3")
    report = run("benchmarks", "--quick", *tiny, f"--output={output}")
    assert output.read_text() == report
    rows = {
        name: (limit, measured)
        for name, limit, measured in re.findall(
            r"^\| ([^|]+) \| ([\d.]+) \| ([^|]+) \| (?:yes|\*\*no\*\*) \|$", report, re.MULTILINE
        )
    }
    assert {"read", "64 kB read, tracked", "change, ASGI, 3 at once: client CPU"} <= set(rows)
    # What is counted does not depend on the machine.
    assert {
        n: row for n, row in rows.items() if n.startswith("round trips") and row[0] != row[1]
    } == {}
    assert "| 48 additions by 8 threads leave |" in report
    assert "### read, 2 ms there and back" in report
    assert re.search(r"^\| store away, visitor logged in \|.* 503, cookie kept \|", report, re.M)


def test_benchmark_compares_a_trip_with_bare_sockets() -> None:
    assert "| asyncio, protocol |" in run("benchmarks.trip", "--rounds=2")


def test_benchmark_weighs_the_table_of_tracked_reads() -> None:
    report = run("benchmarks.tracking_table", "--sessions=300", "--processes=2")
    # Fewer than the table may hold, so none was dropped.
    assert re.findall(r"^\| (\d) \| 300 \|", report, re.MULTILINE) == ["1", "2"]


def test_benchmark_compares_sizes_of_stores() -> None:
    report = run("benchmarks.scale", "--sessions=10,300", "--rounds=2", "--block=1")
    assert "| sessionstats counted | 10 | 300 |" in report


def test_benchmark_compares_primaries() -> None:
    assert "| change, locked |" in run("benchmarks.capacity", "--rounds=2", "--block=1")


def test_benchmark_compares_the_stores_cpu() -> None:
    report = run("benchmarks.store_cpu", "--rounds=2", "--block=2", "--sessions=4")
    assert report.count("| change, locked |") == 2


def test_benchmark_counts_what_is_lost_with_a_primary() -> None:
    report = run(
        "benchmarks.sync_writes", "--rounds=1", "--kills=1", "--seconds=0.05", "--distances=0"
    )
    assert re.search(r"^\| 0 ms \| 1 \| [\d,]+ \| 0 \| [\d,]+ \| 0 \|$", report, re.MULTILINE)


def test_benchmark_compares_encrypted_sessions() -> None:
    assert "| 64 kB change |" in run("benchmarks.encryption", "--rounds=2")


def test_hops_are_counted_for_four_kinds_of_request() -> None:
    report = run("benchmarks.hops")
    rows = {
        name: tuple(map(int, figures.split(" | ")))
        for name, figures in re.findall(r"^\| ([a-z ]+) \| ([\d |]+) \|$", report, re.MULTILINE)
    }
    assert list(rows) == ["read", "sliding read", "change", "locked change"]
    for calls, functions, modules, depth in rows.values():
        assert calls > functions > modules > 1
        assert functions > depth > 1
    assert rows["read"] < rows["sliding read"] < rows["change"] < rows["locked change"]
    # A few more than docs/internals-requests.md has: with each version of Python they differ a bit.
    most = {"read": 62, "sliding read": 93, "change": 143, "locked change": 174}
    assert {name: calls for name, (calls, *_) in rows.items() if calls > most[name]} == {}


def test_hops_can_be_listed_in_order() -> None:
    calls = run("benchmarks.hops", "--list=sliding read").splitlines()
    assert calls[0] == "middleware.py:ClusteredSessionMiddleware.__call__"
    assert "  middleware.py:ClusteredSessionMiddleware.process_request" in calls
    flows = [call.strip() for call in calls if call.endswith("protocol/flows.py:load")]
    assert flows == ["protocol/flows.py:load"], "a flow that is resumed is one call"
    # The store renews once a second at most, and this request is one of them.
    assert any(re.fullmatch(r" +protocol/commands\b.*:touch", call) for call in calls)
