# SPDX-License-Identifier: BSD-3-Clause
"""Hosts that publish their records in BIND, and a gateway that finds them there, on test hosts: `make test-dns`.

The tests run in this order on the same hosts; the last ones remove the package from one and shut the other down.
"""

from __future__ import annotations

import base64
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import HOST_KEY, KEY, ZONE, DnsProgram, running

import product
from fleet import HTTP_PORT, Fleet, host_address
from notebook import Notebook
from product import Api

LABELS = ("a", "b")
SECRET = base64.b64encode(os.urandom(32)).decode()
UNIT = "nbagent-dns-update.service"
DEAD_AFTER_S = 10
SETTINGS = "[slots]\ncapacity = 6\nmemory = \"512M\"\n[pool]\nwarm = 1\n"


class Site:
    """The fleet, the DNS server in its network, and the gateway."""

    def __init__(self, fleet: Fleet, server: DnsProgram) -> None:
        self.fleet, self.server, self.gateway = fleet, server, fleet.gateways[0]
        self.api = Api(self.gateway, HTTP_PORT, timeout=30)

    def dns(self) -> str:
        return f'[dns]\nserver = "{self.server.address}"\nzone = "{ZONE}"\n'

    def offers(self) -> set[str]:
        """The labels of the hosts that have an SRV record."""
        return {offer.split()[3].partition(".")[0] for offer in self.server.records("_nbagent._tcp", "SRV")}

    def spawn(self) -> Notebook:
        answer = self.api.post("/api/spawn")
        assert answer.status == 200, answer.body
        found = re.search(r"/user/([^/]+)/.*token=([^&]+)", answer.json()["url"])
        return Notebook(self.gateway, {"slot": found[1], "token": found[2]}, HTTP_PORT)

    def up(self) -> set[str]:
        """The labels of the hosts that the gateway uses."""
        hosts = self.api.get("/api/stats").json()["hosts"].items()
        return {name.removeprefix("http://") for name, host in hosts if not host.get("down")}


def wait(what: Callable[[], Any], for_what: str, timeout_s: float) -> float:
    """The seconds until `what()` is true."""
    began_s = time.monotonic()
    found = None
    while time.monotonic() < began_s + timeout_s:
        if found := what():
            return time.monotonic() - began_s
        time.sleep(0.1)
    raise AssertionError(f"no {for_what} within {timeout_s} s: {found}")


def journal(host, unit: str = UNIT) -> str:
    return host.run(["journalctl", "-o", "cat", "--no-pager", "-u", unit]).stdout


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The package python3-dnspython, which test hosts do not have."""
    directory = tmp_path_factory.mktemp("library")
    subprocess.run(["apt-get", "-q", "download", "python3-dnspython"], check=True, cwd=directory, capture_output=True)
    return next(directory.glob("*.deb"))


@pytest.fixture(scope="module")
def site(library: Path) -> Iterator[Site]:
    fleet = Fleet(f"d{os.getpid() % 100000}", LABELS)
    try:
        fleet.up(product.say, SETTINGS)
        with running("bind", {KEY: SECRET, HOST_KEY: SECRET}, fleet.lan) as server:
            found = Site(fleet, server)
            for machine in (found.gateway, *fleet.hosts.values()):
                machine.copy_in(library, "/root/")
                machine.run(["dpkg", "-i", f"/root/{library.name}"])
                machine.run(["install", "-m", "0600", "/dev/stdin", "/etc/nbagent/dns-key"],
                            input=f"hmac-sha256:{KEY}:{SECRET}\n")
            for label, host in fleet.hosts.items():
                address = host_address(LABELS.index(label))
                host.run(["tee", "/etc/nbagent/conf.d/60-dns.toml"], input=f'{found.dns()}addresses = ["{address}"]\n')
            found.gateway.run(["tee", "/etc/nbagent/gateway.d/50-fleet.toml"], input=(
                f'[fleet]\nsrv = "_nbagent._tcp.{ZONE}"\nresolvers = ["{server.address}:53"]\n'
                f"[landing]\nrate = 1000\n{found.dns()}dead_after = \"{DEAD_AFTER_S}s\"\n"))
            found.gateway.run(["nbagent", "gateway", "apply"])
            yield found
    finally:
        fleet.down()


def test_the_service_is_disabled_until_it_is_set_up(site):
    for host in site.fleet.hosts.values():
        assert host.run(["systemctl", "is-enabled", UNIT], check=False).stdout.strip() == "disabled"
    assert site.gateway.run(["systemctl", "is-enabled", "nbagent-gateway-dns"], check=False).stdout == "disabled\n"
    assert site.offers() == set() and site.up() == set()


def test_hosts_that_publish_are_found_by_the_gateway_within_seconds(site):
    for host in site.fleet.hosts.values():
        found = host.run(["nbagent", "dns", "check"]).stdout
        assert "the host is ready: systemctl enable --now nbagent-dns-update" in found
        host.run(["systemctl", "enable", "--now", UNIT])
    published_s = wait(lambda: site.offers() == set(LABELS), "SRV records", 20)
    followed_s = wait(lambda: site.up() == set(LABELS), "hosts on the gateway", 20)
    print(f"published after {published_s:.1f} s, known to the gateway {followed_s:.1f} s later")
    notebooks = [site.spawn() for _ in range(6)]
    assert {notebook.slot[0] for notebook in notebooks} == set(LABELS)
    assert notebooks[0].run("6 * 7").text == "42"
    for host in site.fleet.hosts.values():
        assert "warn" not in host.run(["nbagent", "dns", "check"]).stdout
        assert "ok    DNS records" in host.run(["nbagent", "doctor"], check=False).stdout
    for notebook in notebooks:
        site.fleet.hosts[notebook.slot[0]].run(["nbagent", "release", notebook.slot])


def test_a_drain_withdraws_the_srv_record_and_users_stay(site):
    notebook = next(made for made in iter(site.spawn, None) if made.slot[0] == "a")
    host = site.fleet.hosts["a"]
    host.run(["nbagent", "drain"])
    took_s = wait(lambda: site.offers() == {"b"}, "withdrawal", 10)
    print(f"withdrawn {took_s:.1f} s after the drain")
    assert site.server.records("a", "A") == {host_address(0)}
    assert {site.spawn().slot[0] for _ in range(3)} == {"b"}
    time.sleep(6)  # longer than HAProxy keeps a response
    assert notebook.run("1 + 1").text == "2"
    host.run(["nbagent", "drain", "--off"])
    wait(lambda: site.offers() == set(LABELS), "SRV records", 10)
    wait(lambda: site.up() == set(LABELS), "hosts on the gateway", 20)
    for label in LABELS:
        claimed = Api(site.fleet.hosts[label]).get("/slots").json()
        for slot in (slot["slot"] for slot in claimed if slot["state"] == "claimed"):
            site.fleet.hosts[label].run(["nbagent", "release", slot])


def test_a_restart_and_an_upgrade_leave_the_records_as_they_are(site):
    host, serial = site.fleet.hosts["a"], site.server.serial()
    before = host.run(["systemctl", "show", "-P", "MainPID", UNIT]).stdout
    host.run(["systemctl", "restart", UNIT])
    again = host.run(["systemctl", "show", "-P", "MainPID", UNIT]).stdout
    assert again != before
    packages = [str(path) for path in host.run(["sh", "-c", "ls /root/*nbagent_*_all.deb"]).stdout.split()]
    host.run(["apt-get", "-q", "install", "-y", "--reinstall", *packages], timeout=300)
    assert host.run(["systemctl", "show", "-P", "MainPID", UNIT]).stdout not in (before, again, "0\n")
    product.wait_warm(host)
    time.sleep(3)
    found = {label: journal(machine) for label, machine in site.fleet.hosts.items()}
    assert site.server.serial() == serial, found
    assert "withdrawn" not in journal(host).partition("Started")[2].rpartition("Started")[2]


def test_a_host_that_was_killed_is_removed_by_the_gateway_and_comes_back_by_itself(site):
    """Without its network, the host is dead to the gateway and to the DNS server."""
    site.gateway.run(["nbagent", "dns", "check", "--gateway"])
    site.gateway.run(["systemctl", "enable", "--now", "nbagent-gateway-dns"])
    host = site.fleet.hosts["b"]
    host.run(["ip", "link", "set", "lan0", "down"])
    took_s = wait(lambda: site.offers() == {"a"}, "removal", DEAD_AFTER_S + 40)
    print(f"removed after {took_s:.1f} s, with dead_after = {DEAD_AFTER_S} s")
    assert site.server.records("b", "A") == site.server.records("b", "TXT") == set()
    assert "records of b.hosts.test removed: no response from the host" in journal(site.gateway, "nbagent-gateway-dns")
    wait(lambda: site.spawn().slot[0] == "a", "a claim", 5)
    host.run(["ip", "link", "set", "lan0", "up"])
    took_s = wait(lambda: site.offers() == set(LABELS), "records", 60)
    print(f"published again {took_s:.1f} s after the network was back")
    assert "published again" in journal(host)


def test_the_last_host_is_not_removed(site):
    """Its gateway cannot know that it is not the one that has lost its network."""
    site.gateway.run(["ip", "link", "set", "lan0", "down"])
    try:
        text = "fewer than half of the hosts respond"
        wait(lambda: text in journal(site.gateway, "nbagent-gateway-dns"), "event", 60)
    finally:
        site.gateway.run(["ip", "link", "set", "lan0", "up"])
    assert site.offers() == set(LABELS)
    wait(lambda: site.up() == set(LABELS), "hosts on the gateway", 30)


def test_a_key_that_is_absent_or_wrong_is_named(site):
    host = site.fleet.hosts["a"]
    good = host.run(["cat", "/etc/nbagent/dns-key"]).stdout
    try:
        host.run(["rm", "/etc/nbagent/dns-key"])
        host.run(["systemctl", "restart", UNIT], check=False)
        wait(lambda: "TSIG key /etc/nbagent/dns-key: empty or absent; expected" in journal(host), "error", 10)
        assert host.run(["systemctl", "show", "-P", "ExecMainStatus", UNIT]).stdout.strip() == "78"
        host.run(["tee", "/etc/nbagent/dns-key"], input=f"hmac-sha256:{KEY}:{base64.b64encode(bytes(32)).decode()}\n")
        checked = host.run(["nbagent", "dns", "check"], check=False)
        assert checked.returncode == 1 and f"has another secret for TSIG key {KEY}" in checked.stdout
    finally:
        host.run(["install", "-m", "0600", "/dev/stdin", "/etc/nbagent/dns-key"], input=good)
        host.run(["systemctl", "restart", UNIT])
    wait(lambda: site.offers() == set(LABELS), "records", 10)


def test_a_stop_withdraws_all_records(site):
    host = site.fleet.hosts["a"]
    host.run(["systemctl", "stop", UNIT])
    assert site.offers() == {"b"} and site.server.records("a", "A") == set()
    assert "records of a.hosts.test withdrawn" in journal(host)
    host.run(["systemctl", "start", UNIT])
    wait(lambda: site.offers() == set(LABELS), "records", 10)
    host.run(["apt-get", "-q", "remove", "-y", "nbagent"], timeout=300)
    assert site.offers() == {"b"} and site.server.records("a", "A") == set()


def test_an_autoscaler_removes_a_host_without_users_and_its_shutdown_withdraws_the_records(site):
    """By the figures of the gateway, with example and hook of packaging/cloud; one host of six slots is left."""
    host = site.fleet.hosts["b"]
    site.gateway.copy_in(product.TOP / "packaging/cloud/scale", "/root/")
    host.copy_in(product.TOP / "packaging/cloud/scale-in", "/root/")
    decide = ["/root/scale", f"http://127.0.0.1:{HTTP_PORT}", "out", "in", "--hosts", "1:3", "--once"]

    def decides(decision: str) -> Callable[[], bool]:
        return lambda: site.gateway.run(decide).stdout.strip() == decision

    wait(lambda: site.up() == {"b"}, "gateway without host a", 60)
    wait(decides("none"), "a decision for the last host", 10)
    slots = [site.spawn().slot for _ in range(5)]
    wait(decides("out"), "another host", 10)
    assert host.run(["/root/scale-in", "2s"], check=False).returncode == 75
    assert not Api(host).get("/stats").json()["draining"]
    host.run(["nbagent", "release", *slots])
    assert host.run(["/root/scale-in", "30s"]).returncode == 0
    # The drain withdraws the SRV record, and the shutdown the addresses.
    wait(lambda: site.server.records("b", "A") == set(), "withdrawal", 30)
    assert site.offers() == set()
