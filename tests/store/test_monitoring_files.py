"""The alert rules and the dashboard of ``docs/monitoring``, by Prometheus itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import redis
import yaml
from prometheus_client import CollectorRegistry, start_http_server

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.monitoring.counters import NAMES
from django_clustered_sessions.prometheus import SessionCollector
from tests.children import bound
from tests.conftest import require
from tests.pages import DOCS, page
from tests.servers import free_port, wait_for

RULES: Final = DOCS / "monitoring" / "alerts.yml"
DASHBOARD: Final = DOCS / "monitoring" / "dashboard.json"

#: Figures of a site in order, a value each minute, in promtool's words: first+step x times.
HEALTHY: Final = {
    "store_up": "1x60",
    'sessions{kind="logged_in"}': "1000+1x60",
    'sessions{kind="anonymous"}': "1000+1x60",
    "store_memory_bytes": "50x60",
    "store_memory_limit_bytes": "100x60",
    "store_replicas": "2x60",
    'requests_total{node="web-1"}': "0+600x60",
    'store_errors_total{node="web-1"}': "3x60",
    'breaker_opened_total{node="web-1"}': "1x60",
    'lock_refusals_total{node="web-1"}': "0+1x60",
    'lock_timeouts_total{node="web-1"}': "4x60",
    'locks_lost_total{node="web-1"}': "2x60",
    'sync_shortfalls_total{node="web-1"}': "0x60",
    'lock_wait_seconds_bucket{node="web-1", le="1.0"}': "0+60x60",
    'lock_wait_seconds_bucket{node="web-1", le="+Inf"}': "0+60x60",
    'node_clock_offset_seconds{node="web-1"}': "0.2x60",
    'node_reported_timestamp_seconds{node="web-1"}': "0+60x60",
}

#: What is different -> the alert that fires at the end of the hour, its severity and its node.
CASES: Final[list[tuple[dict[str, str] | None, tuple[str, ...]]]] = [
    ({}, ()),
    (None, ("SessionFiguresMissing", "warning")),
    ({"store_up": "1x30 0x30"}, ("SessionStoreAway", "critical")),
    ({'sessions{kind="logged_in"}': "1000x54 300x6"}, ("SessionsGone", "critical")),
    ({'sessions{kind="logged_in"}': "40x54 3x6"}, ()),
    ({"store_memory_bytes": "50x30 90x30"}, ("SessionStoreFull", "critical")),
    (
        {'store_errors_total{node="web-1"}': "0x30 0+10x30"},
        ("SessionStoreErrors", "critical", "web-1"),
    ),
    ({'breaker_opened_total{node="web-1"}': "1x55 2x5"}, ("SessionStoreWasAway", "warning")),
    ({"store_replicas": "2x40 1x20"}, ("SessionStoreLostReplica", "warning")),
    (
        {'sync_shortfalls_total{node="web-1"}': "0x57 3x3"},
        ("SessionWritesNotReplicated", "warning"),
    ),
    ({'lock_refusals_total{node="web-1"}': "0+10x60"}, ("SessionLocksRefused", "warning")),
    ({'lock_timeouts_total{node="web-1"}': "0+3x60"}, ("SessionLockTimeouts", "warning")),
    ({'locks_lost_total{node="web-1"}': "2x55 3x5"}, ("SessionLocksLost", "warning")),
    (
        {
            'lock_wait_seconds_bucket{node="web-1", le="1.0"}': "0+30x60",
            'lock_wait_seconds_bucket{node="web-1", le="5.0"}': "0+60x60",
        },
        ("SessionLocksSlow", "warning"),
    ),
    (
        {'node_clock_offset_seconds{node="web-1"}': "-3x60"},
        ("SessionClockWrong", "warning", "web-1"),
    ),
    (
        {'node_reported_timestamp_seconds{node="web-1"}': "0+60x30 1800x30"},
        ("SessionNodeSilent", "warning", "web-1"),
    ),
    # At night nobody comes, so no node has anything to report.
    (
        {
            'node_reported_timestamp_seconds{node="web-1"}': "0+60x30 1800x30",
            'requests_total{node="web-1"}': "600x60",
        },
        (),
    ),
]


def rules() -> list[dict[str, Any]]:
    return [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]


def queries() -> list[str]:
    """Return what the dashboard asks, as Grafana sends it."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    return [query.replace("$__rate_interval", "10s") for query in asked]


def promtool(*arguments: str | Path) -> None:
    program = require(shutil.which("promtool"), "prometheus")
    command = bound([program, *arguments])
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alert_rules_are_valid() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)


@pytest.mark.parametrize(
    ("changes", "fired"), CASES, ids=[fired[0] if fired else "none" for _, fired in CASES]
)
def test_alert_is_raised_alone(
    changes: dict[str, str] | None, fired: tuple[str, ...], tmp_path: Path
) -> None:
    series = {} if changes is None else HEALTHY | changes
    samples = []
    if fired:
        labels = dict(zip(("alertname", "severity", "node"), fired, strict=False))
        text = ",".join(f'{name}="{value}"' for name, value in labels.items())
        samples = [{"labels": f'ALERTS{{alertstate="firing",{text}}}', "value": 1}]
    test = {
        "interval": "1m",
        "input_series": [
            {"series": f"clustered_sessions_{name}", "values": values}
            for name, values in series.items()
        ],
        "promql_expr_test": [
            {"expr": 'ALERTS{alertstate="firing"}', "eval_time": "59m", "exp_samples": samples}
        ],
    }
    document = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]}
    # JSON is YAML.
    (tmp_path / "test.yml").write_text(json.dumps(document))
    promtool("test", "rules", tmp_path / "test.yml")


def test_each_alert_has_a_case_and_an_entry_of_the_runbook() -> None:
    headings = re.findall(r"^## (.*)$", page("runbook.md"), re.MULTILINE)
    found = {rule["alert"]: rule["annotations"]["runbook"] for rule in rules()}
    assert sorted(found) == sorted(fired[0] for _, fired in CASES if fired)
    assert set(found.values()) <= set(headings)


@pytest.fixture
def exporter(store: redis.Redis) -> Iterator[int]:
    """Export the figures of two nodes and a store with a limit; give the port."""
    store.config_set("maxmemory", "100mb")
    for number, node in enumerate(("web-1", "web-2"), 1):
        line = " ".join(map(str, (1_700_000_000_000, -2500, *([number] * len(NAMES)))))
        store.hset("session:{000}:figures", node, line)
    session = SessionStore()
    session["n"] = 1
    session.save()
    registry = CollectorRegistry()
    registry.register(SessionCollector())
    port = free_port()
    server, thread = start_http_server(port, "127.0.0.1", registry)
    yield port
    server.shutdown()
    server.server_close()
    thread.join()
    store.config_set("maxmemory", "0")


@pytest.fixture
def prometheus(exporter: int, tmp_path: Path) -> Iterator[httpx.Client]:
    """Run a Prometheus that scrapes the exporter and has the rules; give a client of its API."""
    program = require(shutil.which("prometheus"), "prometheus")
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {"job_name": "sessions", "static_configs": [{"targets": [f"127.0.0.1:{exporter}"]}]}
        ],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    port = free_port()
    command = [
        program,
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(bound(command), stdout=log, stderr=log, cwd=tmp_path)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1/") as client:

            def is_ready() -> bool:
                with suppress(httpx.TransportError):
                    return client.get(f"http://127.0.0.1:{port}/-/ready").is_success
                return False

            wait_for(is_ready, "Prometheus is ready", timeout_s=60)
            yield client
    finally:
        process.terminate()
        process.wait(30)


def result(prometheus: httpx.Client, query: str) -> list[Any]:
    """Return the series that a query gives now; an error of Prometheus' fails the test."""
    response = prometheus.get("query", params={"query": query})
    assert response.status_code == 200, response.text
    return list(response.json()["data"]["result"])


@pytest.mark.full
def test_dashboard_and_rules_ask_for_what_is_exported(prometheus: httpx.Client) -> None:
    # A rate needs two scrapes.
    scraped = "count_over_time(clustered_sessions_store_up[1m]) >= 3"
    wait_for(lambda: result(prometheus, scraped), "three scrapes", timeout_s=60)
    for query in queries():
        # None is answered where a scrape was late, until the next one.
        wait_for(lambda: result(prometheus, query), query, timeout_s=60)  # noqa: B023
    names = set(prometheus.get("label/__name__/values").json()["data"])
    asked = {
        name for rule in rules() for name in re.findall(r"\bclustered_sessions_\w+", rule["expr"])
    }
    assert asked and asked <= names

    def evaluated() -> list[dict[str, Any]]:
        groups = prometheus.get("rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    wait_for(lambda: all(r["health"] != "unknown" for r in evaluated()), "each rule is evaluated")
    assert {rule["name"]: rule["health"] for rule in evaluated()} == {
        rule["alert"]: "ok" for rule in rules()
    }
