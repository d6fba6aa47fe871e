# SPDX-License-Identifier: BSD-3-Clause
"""The alert rules and the dashboard in packaging/monitoring use metrics that hosts and gateways have.

The series of a host are those of a supervisor's figures, and those of a gateway are HAProxy's own. `make
test-monitoring` evaluates the rules and scrapes a real host.
"""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_supervisor import FakeSupervisor
from prometheus_client.parser import text_string_to_metric_families
from test_gateway_claims import FakeHost, Gateway

from nbagent.api import metrics
from nbagent.core.documents import ZygoteStats
from nbagent.linux.resources import Kernel
from nbagent.supervisor.resources import read as read_resources
from nbagent.wire.control import ControlClient
from nbagent.wire.operations import STATS

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "packaging/monitoring"
RULES = [rule for group in yaml.safe_load((MONITORING / "nbagent.rules.yml").read_text())["groups"]
         for rule in group["rules"]]
ALERTS = {rule["alert"] for rule in RULES}
TESTS = yaml.safe_load((ROOT / "tests/monitoring/rules.test.yml").read_text())["tests"]
DASHBOARD = json.loads((MONITORING / "nbagent.dashboard.json").read_text())
OPERATIONS = (ROOT / "packaging/docs/operations.md").read_text()
SELECTOR = re.compile(r"\b((?:nbagent|haproxy)_\w+|up)\b(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)(=~|!=|=)"([^"]*)"')
# Prometheus itself adds these labels, and `up`.
ADDED = {"instance", "job"}
JOBS = {"nbagent", "nbagent-gateway"}

Series = dict[str, list[dict[str, str]]]


def parsed(text: str) -> Series:
    series: Series = {"up": [{"job": job} for job in JOBS]}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series.setdefault(sample.name, []).append(sample.labels)
    return series


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Series:
    """The series of a host's /metrics, and of the exporter of a gateway's HAProxy."""
    directory = tmp_path_factory.mktemp("real")
    with FakeSupervisor(directory / "control.sock"):
        stats = ControlClient(directory / "control.sock", 5).call(STATS)
    stats["zygotes"] = {"minimal": ZygoteStats(state="ready", replacing=False, failures=0, forks=3, age_s=60.0)}
    with Kernel() as kernel:
        stats["resources"] = {resource.name: resource.free_percent for resource in read_resources(kernel)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    host = FakeHost("a", 1)
    gateway = Gateway(directory / "gateway", [host], listen={"metrics": f"127.0.0.1:{port}"})
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            exported = response.read()
    finally:
        gateway.close()
        host.router.server_close()
        host.check.server_close()
    return parsed(metrics.render(stats).decode()) | parsed(exported.decode())


def absent(expression: str, real: Series) -> list[str]:
    """The selectors of an expression that select no real series. A value that Grafana replaces is not compared."""
    found = []
    for name, matchers in SELECTOR.findall(expression):
        wanted = [match for match in MATCHER.findall(matchers) if match[0] not in ADDED]
        if not any(
            all(key in labels and (operator != "=" or labels[key] == value) for key, operator, value in wanted)
            for labels in real.get(name, [])
        ):
            found.append(f"{name}{{{matchers}}}")
    return found


def grouped_by(expression: str) -> set[str]:
    """The labels of by (…) and on (…)."""
    return {label.strip() for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression) for label in group.split(",")}


def test_a_selector_of_absent_series_is_found(real: Series) -> None:
    assert absent('sum(nbagent_slots{state="warm"}) / nbagent_capacity', real) == []
    assert absent('nbagent_slots{state="hot"} + nbagent_size', real) == ['nbagent_slots{state="hot"}', "nbagent_size{}"]
    assert absent('rate(nbagent_claims[5m])', real) == ["nbagent_claims{}"]  # the series is nbagent_claims_total


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alerts_select_real_series(rule: dict[str, Any], real: Series) -> None:
    assert absent(rule["expr"], real) == []
    names = {name for name, _ in SELECTOR.findall(rule["expr"])}
    labels = {label for name in names for labels in real[name] for label in labels} | ADDED
    used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
    assert names and used <= labels and grouped_by(rule["expr"]) <= labels
    assert rule["labels"]["severity"] in ("page", "ticket")


def test_alerts_and_the_scrape_jobs_have_the_same_names() -> None:
    scraped = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    assert {job["job_name"] for job in scraped["scrape_configs"]} == JOBS
    assert {job for rule in RULES for job in re.findall(r'job="([^"]*)"', rule["expr"])} == JOBS
    assert scraped["rule_files"] == ["nbagent.rules.yml"]


def test_every_alert_has_a_test_that_fires_and_one_that_does_not() -> None:
    fires, quiet = set(), set()
    for one in (one for test in TESTS for one in test["alert_rule_test"]):
        (fires if one["exp_alerts"] else quiet).add(one["alertname"])
    assert len(ALERTS) == len(RULES) and fires == quiet == ALERTS


def test_the_tests_of_alerts_have_real_series(real: Series) -> None:
    for series in (entry["series"] for test in TESTS for entry in test["input_series"]):
        # Labels of hosts and images are those of the test.
        own = re.sub(r'(server|image|label|version|le)="[^"]*"', r'\1=~""', series)
        assert absent(own, real) == [], series


def test_the_page_for_operators_has_every_alert() -> None:
    assert set(re.findall(r"^### (Nbagent\w+)$", OPERATIONS, re.MULTILINE)) == ALERTS


def test_the_dashboard_selects_real_series(real: Series) -> None:
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(expressions) >= len(panels) > 15
    assert [lost for expression in expressions for lost in absent(expression, real)] == []
    for target in (target for panel in panels for target in panel["targets"]):
        names = {name for name, _ in SELECTOR.findall(target["expr"])}
        labels = {label for name in names for labels in real[name] for label in labels} | ADDED
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels, target["expr"]


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    cells = [(x, y) for panel in DASHBOARD["panels"] for where in [panel["gridPos"]]
             for x in range(where["x"], where["x"] + where["w"]) for y in range(where["y"], where["y"] + where["h"])]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_collection_has_the_same_rules() -> None:
    """A copy, because ansible-core 2.19 installs a link that leads out of a collection as it is."""
    copy = ROOT / "packaging/ansible/roles/nbagent_monitoring/files/nbagent.rules.yml"
    assert copy.read_bytes() == (MONITORING / copy.name).read_bytes(), f"copy {MONITORING / copy.name} to {copy}"
