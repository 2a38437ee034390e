"""The figures as Prometheus and OpenTelemetry read them, by their own libraries."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import pytest
import redis
from django.core.management import CommandError, call_command
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.monitoring import collect, metrics
from django_clustered_sessions.monitoring.counters import AGES, MAXIMA, MINIMA, NAMES, WAITS
from django_clustered_sessions.opentelemetry import instrument
from django_clustered_sessions.prometheus import SessionCollector
from django_clustered_sessions.store import runner
from tests.conftest import use_store
from tests.servers import CountingProxy, StoreServer

#: name and labels -> number.
Numbers = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def busy(store: redis.Redis) -> list[SessionStore]:
    """Let two nodes have counted something different of each, and have some sessions."""
    for number, node in enumerate(("web-1", "web-2"), 1):
        counts = [number * 1000 + place for place in range(len(NAMES))]
        known: dict[str, int] = {}
        for durations in (WAITS, AGES):
            classes = {name: number * at for at, name in enumerate(durations.classes, 1)}
            known |= classes | {durations.number: sum(classes.values()) + 2}
        counts = [known.get(name, n) for name, n in zip(NAMES, counts, strict=True)]
        line = " ".join(map(str, (1_700_000_000_000 + number, -2500 * number, *counts)))
        store.hset("session:{000}:figures", node, line)
    store.hset("session:{000}:figures", "", "900 0 77")
    made = []
    for user in ("4711", "4711", None):
        session = SessionStore()
        session["n"] = 1
        if user:
            session["_auth_user_id"] = user
        session.save()
        made.append(session)
    return made


def parsed(text: str) -> Numbers:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def printed(**options: Any) -> str:
    stdout = io.StringIO()
    call_command("sessionstats", stdout=stdout, **options)
    return stdout.getvalue()


def test_each_counter_is_told_as_the_store_has_it(busy: list[SessionStore]) -> None:
    found = parsed(printed(format="prometheus"))
    told = json.loads(printed(format="json"))
    assert [node["name"] for node in told["nodes"]] == ["web-1", "web-2"]
    histograms = {"lock_wait_seconds": WAITS, "near_age_seconds": AGES}
    in_histogram = {"lock_waits", "lock_wait_ms", *WAITS.classes, "near_age_ms", *AGES.classes}
    for node in told["nodes"]:
        label = (("node", node["name"]),)
        for name, count in node["counters"].items():
            if name in in_histogram:
                continue
            is_time, is_extreme = name.endswith("_ms"), name in MAXIMA | MINIMA
            shown = f"clustered_sessions_{name.removesuffix('_ms')}{'_seconds' * is_time}"
            number = found.pop((shown if is_extreme else f"{shown}_total", label))
            assert number == (count / 1000 if is_time else count), name
        for short, durations in histograms.items():
            shown, below = f"clustered_sessions_{short}", 0
            for name, bound_ms in zip(durations.classes, durations.bounds_ms, strict=True):
                below += node["counters"][name]
                at = (("le", str(bound_ms / 1000)), *label)
                assert found.pop((f"{shown}_bucket", at)) == below
            number = node["counters"][durations.number]
            assert number == below + 2
            assert found.pop((f"{shown}_bucket", (("le", "+Inf"), *label))) == number
            assert found.pop((f"{shown}_count", label)) == number
            total_ms = node["counters"][durations.total_ms]
            assert found.pop((f"{shown}_sum", label)) == total_ms / 1000
        reported = found.pop(("clustered_sessions_node_reported_timestamp_seconds", label))
        assert reported == node["reported_ms"] / 1000
        offset = found.pop(("clustered_sessions_node_clock_offset_seconds", label))
        assert offset == node["clock_offset_ms"] / 1000
    assert found.pop(("clustered_sessions_store_memory_bytes", ())) > 100_000
    memory = told["memory_bytes"]
    assert found == {
        ("clustered_sessions_store_up", ()): 1,
        ("clustered_sessions_store_replicas", ()): 0,
        ("clustered_sessions_sessions", (("kind", "logged_in"),)): 2,
        ("clustered_sessions_sessions", (("kind", "anonymous"),)): 1,
        ("clustered_sessions_memory_bytes", (("of", "indexes"),)): memory["indexes"],
        ("clustered_sessions_memory_bytes", (("of", "records"),)): memory["records"],
    }


def test_the_collector_tells_what_the_command_prints(busy: list[SessionStore]) -> None:
    registry = CollectorRegistry()
    registry.register(SessionCollector())
    found, expected = (
        parsed(generate_latest(registry).decode()),
        parsed(printed(format="prometheus")),
    )
    memory = ("clustered_sessions_store_memory_bytes", ())
    assert found.pop(memory) > 0 < expected.pop(memory)
    assert found == expected


def test_metrics_have_names_help_and_units(busy: list[SessionStore]) -> None:
    families = list(text_string_to_metric_families(printed(format="prometheus")))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert family.name.startswith("clustered_sessions_")
        assert family.documentation.endswith(".")
        assert family.type in ("counter", "gauge", "histogram")
        assert not family.name.endswith("_ms")


def test_no_label_has_an_id(busy: list[SessionStore]) -> None:
    text = printed(format="prometheus")
    families = list(text_string_to_metric_families(text))
    labels = {name for family in families for sample in family.samples for name in sample.labels}
    assert labels == {"node", "kind", "of", "le"}
    nodes = {sample.labels.get("node") for family in families for sample in family.samples}
    assert nodes == {"web-1", "web-2", None}
    assert "4711" not in text
    for session in busy:
        assert session.session_key and session.session_key not in text


def test_a_former_node_is_no_series(busy: list[SessionStore]) -> None:
    found = parsed(printed(format="prometheus"))
    requests = [n for (name, _), n in found.items() if name == "clustered_sessions_requests_total"]
    assert sorted(requests) == [1000, 2000]


def test_odd_names_of_nodes_are_escaped(store: redis.Redis) -> None:
    name = 'web "1"\\ é\n{}'
    store.hset("session:{000}:figures", name, "1000 0 5")
    found = parsed(printed(format="prometheus"))
    assert found["clustered_sessions_requests_total", (("node", name),)] == 5


def test_a_store_that_is_away_is_told_and_no_error() -> None:
    registry = CollectorRegistry()
    registry.register(SessionCollector())
    assert parsed(generate_latest(registry).decode()) == {("clustered_sessions_store_up", ()): 0}
    with pytest.raises(CommandError, match="refused"):
        printed(format="prometheus")


def test_the_collector_comes_back_with_its_store(store_server: StoreServer, settings: Any) -> None:
    registry = CollectorRegistry()
    with StoreServer(binary=store_server.binary) as server:
        use_store(settings, f"{server.url}/1")
        registry.register(SessionCollector())
        up = ("clustered_sessions_store_up", ())
        assert parsed(generate_latest(registry).decode())[up] == 1
    assert parsed(generate_latest(registry).decode()) == {up: 0}


def test_a_scrape_is_cheap_and_a_registration_free(
    proxy: CountingProxy, busy: list[SessionStore]
) -> None:
    collect.figures(100)
    proxy.reset()
    registry = CollectorRegistry(auto_describe=True)
    registry.register(SessionCollector())
    assert proxy.round_trips == 0
    list(registry.collect())
    assert 0 < proxy.round_trips < 40


WITHOUT = """
import sys
sys.modules[{missing!r}] = None
import os
os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
from django.core.management import execute_from_command_line
execute_from_command_line(["manage.py", "sessionstats", "--format", {format!r}])
"""


@pytest.mark.full
def test_without_the_extra_the_error_names_it() -> None:
    code = WITHOUT.format(missing="prometheus_client", format="prometheus")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert 'pip install "django-clustered-sessions[prometheus]"' in ran.stderr


def test_opentelemetry_reads_the_same_numbers(busy: list[SessionStore]) -> None:
    reader = InMemoryMetricReader()
    instrument(MeterProvider([reader]))
    data = reader.get_metrics_data()
    assert data is not None
    (resource,) = data.resource_metrics
    (scope,) = resource.scope_metrics
    assert scope.scope.name == "django_clustered_sessions"
    found: Any = {
        (metric.name, tuple(sorted((point.attributes or {}).items()))): point.value  # type: ignore[union-attr]
        for metric in scope.metrics
        for point in metric.data.data_points
    }
    memory = ("clustered_sessions.store_memory", ())
    assert found.pop(memory) > 100_000
    expected = {}
    for (name, labels), number in parsed(printed(format="prometheus")).items():
        short = name.replace("clustered_sessions_", "clustered_sessions.").removesuffix("_total")
        if "lock_wait_seconds" in short or "near_age_seconds" in short:
            if short.endswith("_bucket"):
                continue
            short = short.replace("_seconds_", ".")
        expected[short.removesuffix("_seconds").removesuffix("_bytes"), labels] = number
    expected.pop(("clustered_sessions.store_memory", ()))
    assert found == expected
    units = {metric.name: metric.unit for metric in scope.metrics}
    assert units["clustered_sessions.lifetime"] == "s"
    assert units["clustered_sessions.requests"] == "1"
    assert units["clustered_sessions.memory"] == "By"
    assert units["clustered_sessions.lock_wait.count"] == "1"
    assert units["clustered_sessions.lock_wait.sum"] == "s"
    labels = {name for _, labels in found for name, _ in labels}
    assert labels == {"node", "kind", "of"}


def test_opentelemetry_asks_once_for_all_and_tells_of_an_outage(
    proxy: CountingProxy, busy: list[SessionStore], settings: Any
) -> None:
    collect.figures(100)
    reader = InMemoryMetricReader()
    instrument(MeterProvider([reader]))
    proxy.reset()
    reader.collect()
    assert 0 < proxy.round_trips < 40
    use_store(settings, "redis://127.0.0.1:1/0")
    other = InMemoryMetricReader()
    instrument(MeterProvider([other]))
    data = other.get_metrics_data()
    assert data is not None
    told = [
        (metric.name, [point.value for point in metric.data.data_points])  # type: ignore[union-attr]
        for scope in data.resource_metrics[0].scope_metrics
        for metric in scope.metrics
        if metric.data.data_points
    ]
    assert told == [("clustered_sessions.store_up", [0])]


def test_every_counter_has_a_metric_or_a_place_in_the_histogram() -> None:
    told = {family.name for family in metrics.families()}
    for name in NAMES:
        if not name.startswith(("lock_wait_", "lock_waits", "near_ages_")):
            shown = f"{name.removesuffix('_ms')}_seconds" if name.endswith("_ms") else name
            assert f"clustered_sessions_{shown}" in told


@pytest.mark.usefixtures("figures")
def test_what_is_reported_now_is_in_the_next_scrape(store: redis.Redis, settings: Any) -> None:
    settings.CLUSTERED_SESSIONS_NODE_NAME = "web-9"
    SessionStore().save()
    runner.report_the_rest()
    found = parsed(printed(format="prometheus"))
    assert found["clustered_sessions_created_total", (("node", "web-9"),)] == 1
