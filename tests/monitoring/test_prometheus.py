# SPDX-License-Identifier: BSD-3-Clause
"""The alert rules and the dashboard with Debian's promtool and Prometheus: `make test-monitoring`.

The package is unpacked into the cache and not installed, because it would start a service. It takes 96 MB, so that
these tests are not in `make test`; tests/unit/test_monitoring.py compares the names of metrics there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import product
from fleet import Fleet, gateway_address, host_address
from testhost_driver import Host

TOP = Path(__file__).resolve().parents[2]
MONITORING = TOP / "packaging/monitoring"
PORT = 9090
# One host, because the zygotes of several compete for the processors of a small machine.
LABELS = ("a",)
SETTINGS = f"""
[pool]
warm = 1
[api]
trusted_networks = ["127.0.0.0/8", "{gateway_address(0)}/32"]
"""
# Every second, so that the tests need no patience; the targets have the names of hosts as instances.
TARGETS = {
    "nbagent": {label: f"{host_address(number)}:{product.API_PORT}" for number, label in enumerate(LABELS)},
    "nbagent-gateway": {"g": "127.0.0.1:8405"},
}


@pytest.fixture(scope="session")
def programs() -> Path:
    """The directory with promtool and prometheus."""
    names = ["apt-get", "download", "--print-uris", "prometheus"]
    uri = subprocess.run(names, check=True, stdout=subprocess.PIPE, text=True)
    cache = product.DIST.parent
    kept = cache / uri.stdout.split()[1].removesuffix(".deb")
    if not kept.is_dir():
        with tempfile.TemporaryDirectory(prefix=".prometheus-", dir=cache) as directory:
            subprocess.run(["apt-get", "-q", "download", "prometheus"], check=True, cwd=directory, capture_output=True)
            package = next(Path(directory).glob("*.deb"))
            subprocess.run(["dpkg-deb", "-x", str(package), f"{directory}/tree"], check=True)
            Path(directory, "tree/usr/bin").rename(kept)
    return kept


@pytest.fixture(scope="module")
def fleet(programs: Path) -> Iterator[Fleet]:
    made = Fleet(f"m{os.getpid()}", LABELS)
    try:
        made.up(product.say, SETTINGS)
        yield made
    finally:
        made.down()


class Prometheus:
    """Prometheus on the gateway of a fleet, with the rules of this checkout."""

    def __init__(self, host: Host, programs: Path, directory: Path) -> None:
        self.host, self.api = host, product.Api(host, PORT)
        # An alert fires when its condition holds, without the minutes of its "for".
        rules = re.sub(r"for: \w+", "for: 0s", (MONITORING / "nbagent.rules.yml").read_text())
        (directory / "nbagent.rules.yml").write_text(rules)
        (directory / "prometheus.yml").write_text(json.dumps({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["nbagent.rules.yml"],
            "scrape_configs": [
                {"job_name": job, "static_configs": [
                    {"targets": [address], "labels": {"instance": name}} for name, address in targets.items()
                ]} for job, targets in TARGETS.items()
            ],
        }))
        host.run(["mkdir", "-p", "/root/prometheus"])
        host.copy_in([programs / "prometheus", *directory.iterdir()], "/root/prometheus/")
        command = ["/root/prometheus/prometheus", "--config.file=/root/prometheus/prometheus.yml",
                   "--storage.tsdb.path=/root/prometheus/data", f"--web.listen-address=127.0.0.1:{PORT}"]
        self.process = host.popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def get(self, path: str) -> Any:
        answer = self.api.get(path)
        assert answer.status == 200, answer.body
        return answer.json()["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return list(self.get(f"/api/v1/query?query={quote(expression)}")["result"])

    def firing(self) -> set[tuple[str, str]]:
        """Alerts that fire, as (alert, instance)."""
        return {(alert["labels"]["alertname"], alert["labels"].get("instance", ""))
                for alert in self.get("/api/v1/alerts")["alerts"] if alert["state"] == "firing"}

    def wait(self, what: Any, for_what: str, timeout_s: float = 60) -> None:
        deadline_s, found = time.monotonic() + timeout_s, None
        while time.monotonic() < deadline_s:
            try:
                if found := what():
                    return
            except OSError as error:
                found = error
            time.sleep(0.5)
        raise AssertionError(f"no {for_what} within {timeout_s} s: {found}; firing: {self.firing()}")

    def wait_firing(self, *alerts: tuple[str, str]) -> None:
        self.wait(lambda: set(alerts) <= self.firing(), f"{alerts}")

    def wait_quiet(self) -> None:
        self.wait(lambda: not self.firing(), "end of all alerts")


@pytest.fixture(scope="module")
def prometheus(fleet: Fleet, programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    running = Prometheus(fleet.gateways[0], programs, tmp_path_factory.mktemp("prometheus"))
    try:
        running.wait(lambda: len(running.query("up == 1")) == 1 + len(LABELS), "scrape of all targets")
        yield running
    finally:
        running.process.terminate()
        running.process.wait(20)


def promtool(programs: Path, *arguments: str) -> None:
    done = subprocess.run([programs / "promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_rules_and_the_scrape_jobs(programs: Path, tmp_path: Path) -> None:
    promtool(programs, "check", "rules", "--lint=all", "--lint-fatal", str(MONITORING / "nbagent.rules.yml"))
    shutil.copytree(MONITORING, tmp_path / "etc")
    (tmp_path / "etc/nbagent-token").write_text("x")
    promtool(programs, "check", "config", str(tmp_path / "etc/prometheus.yml"))


def test_each_alert_fires_when_it_should_and_only_then(programs: Path) -> None:
    promtool(programs, "test", "rules", str(Path(__file__).with_name("rules.test.yml")))


def test_a_fleet_in_normal_use_has_no_alert(prometheus: Prometheus, fleet: Fleet) -> None:
    for label in LABELS:
        product.Api(fleet.hosts[label]).claim()
    prometheus.wait_quiet()
    health = [rule["health"] for group in prometheus.get("/api/v1/rules")["groups"] for rule in group["rules"]]
    assert set(health) == {"ok"}


def test_every_panel_of_the_dashboard_shows_values(prometheus: Prometheus) -> None:
    panels = json.loads((MONITORING / "nbagent.dashboard.json").read_text())["panels"]
    expressions = [target["expr"].replace("$instance", ".*") for panel in panels for target in panel.get("targets", [])]
    # rate() needs two scrapes.
    prometheus.wait(lambda: all(map(prometheus.query, expressions)), "values for all panels")


def test_a_router_that_fails_is_an_alert_of_its_host_and_of_the_gateway(prometheus: Prometheus, fleet: Fleet) -> None:
    router = ("nbagent-router.socket", "nbagent-router.service")
    fleet.hosts["a"].run(["systemctl", "stop", *router])
    try:
        prometheus.wait_firing(("NbagentPartFails", "a"), ("NbagentGatewayHostDown", "g"))
    finally:
        fleet.hosts["a"].run(["systemctl", "start", *router])
    prometheus.wait_quiet()


def test_an_api_that_does_not_respond_is_an_alert(prometheus: Prometheus, fleet: Fleet) -> None:
    api = ("nbagent-api.socket", "nbagent-api.service")
    fleet.hosts["a"].run(["systemctl", "stop", *api])
    try:
        prometheus.wait_firing(("NbagentHostDown", "a"))
    finally:
        fleet.hosts["a"].run(["systemctl", "start", *api])
    prometheus.wait_quiet()


def test_a_fleet_that_drains_is_full_and_its_gateway_has_no_host(prometheus: Prometheus, fleet: Fleet) -> None:
    for host in fleet.hosts.values():
        host.run(["nbagent", "drain"])
    try:
        alerts = (("NbagentFleetFull", ""), ("NbagentGatewayHasNoHost", "g"), ("NbagentDrainForgotten", "a"))
        prometheus.wait_firing(*alerts)
    finally:
        for host in fleet.hosts.values():
            host.run(["nbagent", "drain", "--off"])
    prometheus.wait_quiet()
