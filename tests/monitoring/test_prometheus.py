# SPDX-License-Identifier: BSD-3-Clause
"""The alert rules and the dashboard with Debian's promtool and Prometheus: `make test-monitoring`.

The package is unpacked into the cache and not installed, because it would start a service. It takes 96 MB, so that
these tests are not in `make test`; tests/unit/test_monitoring.py compares the names of metrics there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import nbagent
import product
from fleet import HTTP_PORT, Fleet, gateway_address, host_address
from notebook import Notebook
from testhost_driver import Host

TOP = Path(__file__).resolve().parents[2]
MONITORING = TOP / "packaging/monitoring"
PORT = 9090
# Faults are caused on host a; b is there because one alert compares hosts.
LABELS = ("a", "b")
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
    cache = product.CACHE
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
        # An alert fires when its condition holds, without the minutes of its "for". Two seconds are a minute of the
        # past, so that alerts about the past end.
        rules = re.sub(r"for: \w+", "for: 0s", (MONITORING / "nbagent.rules.yml").read_text())
        rules = re.sub(r"\[(\d+)m\]", lambda found: f"[{2 * int(found[1])}s]", rules.replace("[1h]", "[60m]"))
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

    def wait(self, what: Any, for_what: str, timeout_s: float = 180) -> None:
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


def test_a_file_system_that_fills_up_is_an_alert_before_it_is_full(prometheus: Prometheus, fleet: Fleet) -> None:
    host = fleet.hosts["a"]
    before, used = host.run(["df", "-B1", "--output=size,used", "/run"]).stdout.split()[-2:]
    # There is room for the records of several slots.
    host.run(["mount", "-o", f"remount,size={round(int(used) / 0.97)}", "/run"])
    try:
        prometheus.wait_firing(("NbagentResourceLow", "a"))
        assert product.Api(host).get("/readyz").status == 200
    finally:
        host.run(["mount", "-o", f"remount,size={before}", "/run"])
    prometheus.wait_quiet()


def test_an_api_that_does_not_respond_is_an_alert(prometheus: Prometheus, fleet: Fleet) -> None:
    # The gateway's check connects to the landing page's socket, which starts the service.
    api = ("nbagent-landing.socket", "nbagent-api.socket", "nbagent-api.service")
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


@pytest.fixture
def settings(prometheus: Prometheus, fleet: Fleet) -> Iterator[Callable[[str], None]]:
    """A function that changes settings of host a until the end of the test, which waits for the end of all alerts."""
    host, path = fleet.hosts["a"], "/etc/nbagent/conf.d/90-one-test.toml"

    def change(text: str) -> None:
        host.run(["tee", path], input=text)
        host.run(["systemctl", "reload", "nbagent.service"])

    try:
        yield change
    finally:
        host.run(["rm", "-f", path])
        host.run(["systemctl", "reload", "nbagent.service"])
        release_all(host)
    prometheus.wait_quiet()


def release_all(host: Host) -> None:
    api = product.Api(host)
    for slot in api.get("/slots").json():
        if slot["state"] == "claimed":
            api.delete(f"/slots/{slot['slot']}")


# Of all generations, because a quick zygote precedes a complete one.
ZYGOTES = "nbagent-zygote@*"


def test_slots_that_do_not_start_are_alerts(
    prometheus: Prometheus, fleet: Fleet, settings: Callable[[str], None]
) -> None:
    settings('[slots]\nstart_timeout = "1ms"\n')
    product.Api(fleet.hosts["a"]).claim()  # the warm slot
    prometheus.wait_firing(("NbagentNotReady", "a"), ("NbagentStartsFail", "a"), ("NbagentPoolEmpty", "a"))


def test_an_image_whose_zygote_has_too_little_memory_is_an_alert(
    prometheus: Prometheus, fleet: Fleet, settings: Callable[[str], None]
) -> None:
    settings('[pool]\nzygote_memory = "16M"\n')
    fleet.hosts["a"].run(["systemctl", "kill", "-s", "KILL", ZYGOTES])
    prometheus.wait_firing(("NbagentNoZygote", "a"))


def test_slots_that_end_by_themselves_are_an_alert(
    prometheus: Prometheus, fleet: Fleet, settings: Callable[[str], None]
) -> None:
    slots = [product.Api(fleet.hosts["a"]).claim()["slot"] for _ in range(5)]
    fleet.hosts["a"].run(["systemctl", "kill", "-s", "KILL", *(f"nbagent-{slot}.scope" for slot in slots)])
    prometheus.wait_firing(("NbagentSlotsDie", "a"))


def test_claims_that_wait_for_a_slow_start_are_an_alert(
    prometheus: Prometheus, fleet: Fleet, settings: Callable[[str], None]
) -> None:
    host = fleet.hosts["a"]
    host.run(["systemctl", "kill", "-s", "STOP", ZYGOTES])
    try:
        product.Api(host).claim()  # the warm slot
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(product.Api(host).claim)
            # The time is the cause: a claim that takes longer than the two seconds of the alert.
            time.sleep(4)
            host.run(["systemctl", "kill", "-s", "CONT", ZYGOTES], check=False)
            waiting.result()
    finally:
        host.run(["systemctl", "kill", "-s", "CONT", ZYGOTES], check=False)
    prometheus.wait_firing(("NbagentClaimsSlow", "a"))


def test_a_supervisor_that_restarts_often_is_an_alert(prometheus: Prometheus, fleet: Fleet) -> None:
    def resets() -> int:
        return int(prometheus.query("resets(nbagent_uptime_seconds{instance='a'}[30m])")[0]["value"][1])

    for _ in range(3):
        # A restart is seen only when a sample before it is larger than one after it.
        prometheus.wait(lambda: prometheus.query("nbagent_uptime_seconds{instance='a'} >= 5"), "some seconds of uptime")
        before = resets()
        fleet.hosts["a"].run(["systemctl", "restart", "nbagent.service"])
        prometheus.wait(lambda before=before: resets() > before, "sample of the new process")
    prometheus.wait_firing(("NbagentSupervisorRestarts", "a"))
    prometheus.wait_quiet()


def test_a_fleet_that_fills_up_is_an_alert_before_and_when_it_is_full(
    prometheus: Prometheus, fleet: Fleet, settings: Callable[[str], None]
) -> None:
    api = product.Api(fleet.hosts["a"])
    settings("[slots]\ncapacity = 11\n")
    fleet.hosts["b"].run(["nbagent", "drain"])
    try:
        for _ in range(10):
            api.claim()
        prometheus.wait_firing(("NbagentFleetNearlyFull", ""))
        api.claim()
        prometheus.wait_firing(("NbagentFleetFull", ""))
        prometheus.wait(
            lambda: api.post("/claim").status == 503 and ("NbagentClaimsRefused", "") in prometheus.firing(),
            "alert about refused claims",
        )
    finally:
        fleet.hosts["b"].run(["nbagent", "drain", "--off"])


def test_an_upgrade_that_was_not_completed_is_an_alert(prometheus: Prometheus, fleet: Fleet) -> None:
    module, units = "/usr/lib/python3/dist-packages/nbagent/__init__.py", ("nbagent.service", "nbagent-api.service")
    change = "import sys,pathlib; p = pathlib.Path(sys.argv[1]); p.write_text(p.read_text().replace(*sys.argv[2:]))"
    version = nbagent.__version__
    fleet.hosts["b"].run(["python3", "-c", change, module, f'"{version}"', f'"{version}.1"'])
    try:
        fleet.hosts["b"].run(["systemctl", "restart", *units])
        prometheus.wait_firing(("NbagentVersionsDiffer", ""))
    finally:
        fleet.hosts["b"].run(["python3", "-c", change, module, f'"{version}.1"', f'"{version}"'])
        fleet.hosts["b"].run(["systemctl", "restart", *units])
    prometheus.wait_quiet()


def test_a_gateway_that_stops_is_an_alert(prometheus: Prometheus, fleet: Fleet) -> None:
    fleet.gateways[0].run(["systemctl", "stop", "nbagent-gateway.service"])
    try:
        prometheus.wait_firing(("NbagentGatewayDown", "g"))
    finally:
        fleet.gateways[0].run(["systemctl", "start", "nbagent-gateway.service"])
    prometheus.wait_quiet()


def test_requests_of_users_that_fail_are_an_alert(prometheus: Prometheus, fleet: Fleet) -> None:
    slot = product.Api(fleet.hosts["a"]).claim()["slot"]
    router = ("nbagent-router.socket", "nbagent-router.service")
    fleet.hosts["a"].run(["systemctl", "stop", *router])
    gateway = product.Api(fleet.gateways[0], HTTP_PORT)
    try:
        prometheus.wait(
            lambda: gateway.get(f"/user/{slot}/api").status >= 500
            and ("NbagentGatewayErrors", "g") in prometheus.firing(),
            "alert about failing requests",
        )
    finally:
        fleet.hosts["a"].run(["systemctl", "start", *router])
        release_all(fleet.hosts["a"])
    prometheus.wait_quiet()


def test_connections_near_their_limit_are_an_alert(prometheus: Prometheus, fleet: Fleet) -> None:
    gateway, path = fleet.gateways[0], "/etc/nbagent/gateway.d/90-one-test.toml"
    gateway.run(["tee", path], input="[listen]\nconnections = 100\n")
    gateway.run(["systemctl", "reload", "nbagent-gateway.service"])
    with contextlib.ExitStack() as opened:
        def enough() -> bool:
            # The gateway closes connections without a request after a while.
            for _ in range(20):
                opened.enter_context(gateway.connect(HTTP_PORT))
            return ("NbagentGatewayConnections", "g") in prometheus.firing()

        try:
            prometheus.wait(enough, "alert about connections")
        finally:
            gateway.run(["rm", path])
            gateway.run(["systemctl", "reload", "nbagent-gateway.service"])
    prometheus.wait_quiet()


def test_kernels_that_run_out_of_memory_are_an_alert(
    prometheus: Prometheus, fleet: Fleet, settings: Callable[[str], None]
) -> None:
    host = fleet.hosts["a"]
    notebook = Notebook(host, product.Api(host).claim(memory="256M"))
    for _ in range(6):
        with notebook.kernel() as kernel:
            kernel.send("b'x' * (1 << 30)")
            kernel.receive("stream", name="stderr")
    prometheus.wait_firing(("NbagentOutOfMemory", "a"))


def test_each_alert_is_caused_by_a_test() -> None:
    text = Path(__file__).read_text()
    alerts = set(re.findall(r"alert: (\w+)", (MONITORING / "nbagent.rules.yml").read_text()))
    assert {alert for alert in alerts if f'"{alert}"' not in text} == set()
