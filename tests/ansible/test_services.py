# SPDX-License-Identifier: BSD-3-Clause
"""The roles for DNS and monitoring: a host, a gateway, and a machine with BIND and Prometheus.

The tests run in this order on the same machines. Debian's packages are installed before, because test hosts have no
network.
"""

import base64
import os
import time

import dns.message
import dns.query
import pytest
from test_fleet import PACKAGES, Site

import product
from fleet import HTTP_PORT, gateway_address
from playbooks import Ansible
from product import Api
from testhost_driver import Host
from testhost_driver.lan import Lan

# The gateway is the one that test_fleet.py does not have: Debian 12's.
SUITES = {"a": "trixie", "gw": "bookworm", "sv": "trixie"}
ZONE = "hosts.test"
SERVICES = "10.77.0.5"
KEY = f"hmac-sha256:hosts:{base64.b64encode(os.urandom(32)).decode()}"


class SiteWithServices(Site):
    """One host and one gateway, and a machine for both services."""

    def __init__(self, prefix):
        super().__init__(prefix, ("a",), SUITES)
        self.services = f"{prefix}-sv"

    def boot(self, lan, directory):
        super().boot(lan)
        self.lan = lan
        self.machines[self.services] = Host.up(name=self.services, suite=self.suites["sv"])
        lan.plug(self.machines[self.services], SERVICES)
        for name, packages in {self.services: ("bind9", "prometheus"), self.name("a"): ("python3-dnspython",),
                               self.gateway_name: ("python3-dnspython",)}.items():
            machine = self.machines[name]
            debs = product.debian_packages(machine, packages, directory)
            machine.copy_in(debs, "/root/")
            machine.run(["dpkg", "-i", *(f"/root/{deb.name}" for deb in debs)], timeout=300)

    def inventory(self, ansible, **variables):
        super().inventory(
            ansible, {self.gateway_name: {"nbagent_gateway_address": gateway_address(0),
                                          "nbagent_gateway_metrics": f"{gateway_address(0)}:8405"}},
            {"nbagent_dns_servers": {self.services: {"nbagent_dns_server_address": SERVICES}},
             "nbagent_monitoring": {self.services: {}}},
            nbagent_dns_server=SERVICES, nbagent_dns_zone=ZONE, nbagent_dns_key=KEY,
            nbagent_monitoring_scrape_interval="5s", **variables)

    def offers(self):
        """The targets of the SRV records."""
        query = dns.message.make_query(f"_nbagent._tcp.{ZONE}", "SRV")
        with self.lan.connect(SERVICES, 53) as connection:
            connection.setblocking(False)
            found = dns.query.tcp(query, SERVICES, 5, sock=connection)
        return {rdata.to_text().split()[3] for rrset in found.answer for rdata in rrset}

    def targets(self):
        """The targets of Prometheus as (job, instance), each with the error of its last scrape or ""."""
        answer = Api(self.machines[self.services], 9090).get("/api/v1/targets?state=active")
        found = {(target["labels"]["job"], target["labels"]["instance"]): target["lastError"] or target["health"]
                 for target in answer.json()["data"]["activeTargets"]}
        print(found)
        return {target: "" if state == "up" else state for target, state in found.items()}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    product.build(product.say, PACKAGES)
    found = SiteWithServices(f"as{os.getpid() % 10000}")
    lan = Lan(found.prefix)
    try:
        found.boot(lan, tmp_path_factory.mktemp("debs"))
        yield found
    finally:
        for machine in found.machines.values():
            machine.down(now=True)
        lan.remove()


@pytest.fixture(scope="module")
def ansible(site, tmp_path_factory):
    found = Ansible("debian", tmp_path_factory.mktemp("services"))
    site.inventory(found)
    return found


def wait(what, timeout_s=30):
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.5)


def test_check_mode_passes_before_nbagent_is_installed(site, ansible):
    ansible.must("site", "--check")
    assert site.machines[site.name("a")].run(["ls", "/etc/nbagent"], check=False).returncode


def test_hosts_are_found_by_the_dns_and_watched(site, ansible):
    ansible.must("site")
    wait(lambda: site.offers() == {f"a.{ZONE}."})
    wait(lambda: Api(site.gateway, HTTP_PORT).get("/api/stats").json()["available"] > 0)
    notebook = site.spawn()
    assert notebook.run("print(6 * 7)").stream == "42\n"
    site.release(notebook)
    wait(lambda: site.targets() == {("nbagent", "a"): "", ("nbagent-gateway", site.gateway_name): ""}, 120)
    rules = Api(site.machines[site.services], 9090).get("/api/v1/rules").json()["data"]["groups"]
    assert {rule["health"] for group in rules for rule in group["rules"]} <= {"ok", "unknown"} and rules


def test_a_second_run_with_services_changes_nothing(site, ansible):
    assert not any(ansible.must("site").values())
    assert not any(ansible.must("site", "--check").values())


def test_a_host_that_is_removed_and_added_changes_its_records(site, ansible):
    ansible.must("remove_host", nbagent_target=site.name("a"))
    assert site.offers() == set()
    ansible.must("add_host", nbagent_target=site.name("a"))
    wait(lambda: site.offers() == {f"a.{ZONE}."})
    wait(lambda: Api(site.gateway, HTTP_PORT).get("/api/stats").json()["available"] > 0)


def test_a_dead_host_does_not_prevent_the_monitoring(site, ansible):
    site.machines[site.name("a")].down(now=True)
    ansible.must("site", "--limit", site.services, nbagent_monitoring_scrape_interval="10s")
    prometheus = Api(site.machines[site.services], 9090)
    wait(lambda: site.targets()["nbagent", "a"] and not site.targets()["nbagent-gateway", site.gateway_name], 120)
    assert "scrape_interval: 10s" in prometheus.get("/api/v1/status/config").json()["data"]["yaml"]
