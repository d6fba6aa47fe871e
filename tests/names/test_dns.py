# SPDX-License-Identifier: BSD-3-Clause
"""The records of hosts with Debian's BIND and Knot, on loopback: `make test-dns`."""

from __future__ import annotations

import base64
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from servers import HOST_KEY, KEY, OTHER_KEY, ZONE, DnsProgram, programs, running

from nbagent.config import host_config
from nbagent.core.events import Event
from nbagent.dns import check, key, removal
from nbagent.dns.publisher import Publisher, Registry
from nbagent.dns.records import Agent, Place
from nbagent.dns.server import DnsFailed
from nbagent.gateway import settings as gateway_settings
from nbagent.gateway.runtime import HaproxyServer

SECRETS = {name: base64.b64encode(os.urandom(32)).decode() for name in (KEY, HOST_KEY, OTHER_KEY)}
OFFER = f"0 0 8000 c07.{ZONE}."


@pytest.fixture(scope="module", params=["bind", "knot"])
def server(request) -> Iterator[DnsProgram]:
    with running(request.param, SECRETS) as made:
        yield made


@dataclass
class HostOfTest:
    """A host with a publisher, whose time and agent are those of the test."""

    server: DnsProgram
    label: str = "c07"
    address: str = "10.1.0.7"
    machine: str = "0" * 32
    key: str = KEY
    secret: str = SECRETS[KEY]
    zone: str = ZONE
    more: dict[str, Any] = field(default_factory=dict)
    agent: Agent = Agent.READY

    def __post_init__(self) -> None:
        self.events: list[tuple[Event, dict[str, Any]]] = []
        self.now_s = 1000.0
        self.config = host_config.parse({
            "host": {"label": self.label},
            "dns": {"server": f"127.0.0.1:{self.server.port}", "zone": self.zone, "addresses": [self.address],
                    **self.more},
        })
        self.text = f"hmac-sha256:{self.key}:{self.secret}"
        registry = Registry(self.config, key.parse(self.text, "test"), self.machine)
        self.publisher = Publisher(
            registry, lambda: self.agent, lambda event, **fields: self.events.append((event, fields))
        )

    def step(self, after_s: float = 1.0) -> HostOfTest:
        self.now_s += after_s
        self.publisher.step(self.now_s)
        return self

    def stop(self) -> None:
        self.publisher.stop(True, self.now_s)

    def names(self) -> list[str]:
        return [event.name for event, _ in self.events]

    def text_of(self, event: Event) -> str:
        return next(str(fields["text"]) for found, fields in reversed(self.events) if found is event)


@pytest.fixture
def host(server: DnsProgram) -> Iterator[HostOfTest]:
    made = HostOfTest(server)
    yield made
    made.agent = Agent.READY
    removal.remove_host(made.publisher._registry.server, Place(ZONE, ZONE, "c07"))


def all_records(server: DnsProgram, label: str = "c07") -> tuple[set[str], set[str], int]:
    offers = {offer for offer in server.records("_nbagent._tcp", "SRV") if offer == f"0 0 8000 {label}.{ZONE}."}
    return offers, server.records(label, "A") | server.records(label, "AAAA"), len(server.records(label, "TXT"))


def test_a_host_is_published_when_ready_and_withdrawn_when_it_drains_and_stops(server, host):
    assert all_records(server) == (set(), set(), 0)
    host.step()
    assert all_records(server) == ({OFFER}, {"10.1.0.7"}, 1)
    host.agent = Agent.DRAINING
    host.step()
    assert all_records(server) == (set(), {"10.1.0.7"}, 1)  # its users stay
    host.agent = Agent.READY
    host.step()
    assert all_records(server) == ({OFFER}, {"10.1.0.7"}, 1)
    host.stop()
    assert all_records(server) == (set(), set(), 0)
    assert host.names() == ["DNS_PUBLISHED", "DNS_WITHDRAWN", "DNS_PUBLISHED", "DNS_WITHDRAWN"]


def test_a_failing_agent_loses_its_srv_record_after_the_time_of_a_restart(server, host):
    host.step()
    host.agent = Agent.FAILING
    host.step()
    host.step(8)
    assert OFFER in server.records("_nbagent._tcp", "SRV")
    host.step(3)
    assert all_records(server) == (set(), {"10.1.0.7"}, 1)


def test_hosts_share_the_srv_name_and_may_have_two_families(server, host):
    other = HostOfTest(server, "c08", "2001:db8::8", "1" * 32).step()
    host.step()
    assert server.records("_nbagent._tcp", "SRV") == {OFFER, f"0 0 8000 c08.{ZONE}."}
    assert server.records("c08", "AAAA") == {"2001:db8::8"}
    other.stop()
    assert server.records("_nbagent._tcp", "SRV") == {OFFER}
    assert server.records("static", "A") == {"192.0.2.99"}


def test_an_address_that_changes_is_replaced(server, host):
    host.step()
    HostOfTest(server, address="10.1.0.70").step()
    assert all_records(server) == ({OFFER}, {"10.1.0.70"}, 1)


def test_records_that_another_program_removed_come_back(server, host):
    host.step()
    removal.remove_host(host.publisher._registry.server, Place(ZONE, ZONE, "c07"))
    host.step()
    assert all_records(server) == (set(), set(), 0)
    host.step(10)
    assert all_records(server) == ({OFFER}, {"10.1.0.7"}, 1)
    assert host.names() == ["DNS_PUBLISHED", "DNS_RESTORED"]


def test_the_second_host_with_a_label_is_refused_and_follows_when_the_first_is_gone(server, host):
    host.step()
    second = HostOfTest(server, address="10.1.0.8", machine="1" * 32).step()
    assert all_records(server) == ({OFFER}, {"10.1.0.7"}, 1)
    text = second.text_of(Event.DNS_FAILED)
    assert "c07.hosts.test (10.1.0.7) belongs to another machine" in text and "host.label" in text
    for _ in range(5):
        second.step(40)
    assert second.names() == ["DNS_FAILED"]  # once for each cause
    second.stop()
    assert all_records(server) == ({OFFER}, {"10.1.0.7"}, 1)
    host.stop()
    second.step(40)
    assert all_records(server) == ({OFFER}, {"10.1.0.8"}, 1)
    removal.remove_host(second.publisher._registry.server, Place(ZONE, ZONE, "c07"))


def test_of_hosts_that_publish_one_label_at_the_same_time_one_gets_it(server, host):
    hosts = [HostOfTest(server, address=f"10.1.0.{number}", machine=f"{number:032}") for number in range(20, 26)]
    start = threading.Barrier(len(hosts))

    def publish(one: HostOfTest) -> None:
        start.wait()
        one.step()

    threads = [threading.Thread(target=publish, args=(one,)) for one in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    published = [one for one in hosts if one.names() == ["DNS_PUBLISHED"]]
    assert [one.address for one in published] == list(server.records("c07", "A"))
    assert len(server.records("c07", "TXT")) == 1


def test_a_copy_of_a_machine_is_reported_and_not_fought_with(server, host):
    host.step()
    HostOfTest(server, address="10.1.0.9").step()  # the same machine-id
    host.step(10)
    assert "another machine with the same /etc/machine-id" in host.text_of(Event.DNS_FAILED)
    host.stop()
    assert all_records(server) == ({OFFER}, {"10.1.0.9"}, 1)


def test_a_machine_that_was_installed_again_takes_its_name_over(server, host):
    host.step()
    again = HostOfTest(server, machine="2" * 32).step()
    assert again.names() == ["DNS_PUBLISHED"]


def test_records_of_the_zones_owner_are_not_changed(server):
    host = HostOfTest(server, "static", "10.1.0.7").step()
    assert "was not published by nbagent" in host.text_of(Event.DNS_FAILED)
    assert server.records("static", "A") == {"192.0.2.99"}
    with pytest.raises(DnsFailed, match="not published by nbagent"):
        removal.remove_host(host.publisher._registry.server, Place(ZONE, ZONE, "static"))


@pytest.mark.parametrize(("wrong", "expected"), [
    ({"secret": base64.b64encode(b"x" * 32).decode()}, "has another secret for TSIG key hosts"),
    ({"key": "unknown"}, "has no TSIG key unknown with hmac-sha256 for zone hosts.test"),
    ({"key": OTHER_KEY, "secret": SECRETS[OTHER_KEY]}, "other"),
    ({"zone": "closed.test"}, "closed.test"),
    ({"zone": "absent.test"}, "absent.test"),
], ids=["secret", "unknown key", "key without permission", "zone without updates", "zone of another server"])
def test_a_refusal_names_its_cause_and_changes_nothing(server, wrong, expected):
    host = HostOfTest(server, **wrong).step()
    assert host.names() == ["DNS_FAILED"]
    text = host.text_of(Event.DNS_FAILED)
    assert expected in text and str(server.port) in text
    assert all_records(server) == (set(), set(), 0)


def test_a_key_of_one_host_publishes_that_host_only(server, host):
    own = HostOfTest(server, key=HOST_KEY, secret=SECRETS[HOST_KEY]).step()
    assert all_records(server) == ({OFFER}, {"10.1.0.7"}, 1)
    other = HostOfTest(server, "c08", "10.1.0.8", key=HOST_KEY, secret=SECRETS[HOST_KEY]).step()
    assert other.names() == ["DNS_FAILED"] and all_records(server, "c08") == (set(), set(), 0)
    own.stop()
    assert all_records(server) == (set(), set(), 0)


def test_a_clock_that_is_wrong_is_named(server, host, monkeypatch):
    present = time.time
    monkeypatch.setattr(time, "time", lambda: present() - 3600)
    host.step()
    assert "the clocks of this host and of DNS server" in host.text_of(Event.DNS_FAILED)
    monkeypatch.undo()
    host.step(2)
    assert all_records(server) == ({OFFER}, {"10.1.0.7"}, 1)
    assert host.names() == ["DNS_FAILED", "DNS_PUBLISHED"]


def test_a_server_that_is_down_is_retried_until_it_is_back(server, host):
    host.step()
    server.stop()
    try:
        host.agent = Agent.DRAINING
        host.step()
        assert "check that it runs and listens on TCP" in host.text_of(Event.DNS_FAILED)
        for _ in range(8):
            host.step(5)
    finally:
        server.start()
    host.step(30)
    assert all_records(server) == (set(), {"10.1.0.7"}, 1)
    assert host.names() == ["DNS_PUBLISHED", "DNS_FAILED", "DNS_WITHDRAWN"]


def test_check_reports_each_step(server, host, tmp_path):
    file = tmp_path / "key"
    file.write_text(host.text)

    def found(agent: Agent = Agent.READY) -> list[tuple[str, str]]:
        return [result[:2] for result in check.check_host(host.config, lambda: agent, file)]

    before = [("settings", "ok"), ("server", "ok"), ("permission", "ok")]
    assert found() == [*before, ("records", "warn")]
    host.step()
    if check.MACHINE_ID.exists():  # the owner is this machine
        host.stop()
        host.machine = check.MACHINE_ID.read_text()
        host.__post_init__()
        host.step()
    assert found() == [*before, ("records", "ok")]
    assert found(Agent.DRAINING) == [*before, ("records", "warn")]
    file.write_text(f"hmac-sha256:{OTHER_KEY}:{SECRETS[OTHER_KEY]}")
    assert found() == [("settings", "ok"), ("server", "ok"), ("server", "fail")]


def test_a_gateway_removes_the_records_of_a_dead_host_only(server, host):
    host.step()
    living = [HostOfTest(server, label, f"10.1.0.{number}", f"{number:032}").step()
              for number, label in enumerate(("c08", "c09"), 8)]
    found = gateway_settings.parse({
        "fleet": {"srv": f"_nbagent._tcp.{ZONE}"},
        "dns": {"server": f"127.0.0.1:{server.port}", "zone": ZONE, "dead_after": "5min"},
    })
    states = {"c07": True, "c08": False, "c09": True}
    events = []
    gateway = removal.Removal(
        found, key.parse(host.text, "test"),
        lambda: [HaproxyServer("h", "10.0.0.1", 8000, f"{label}.{ZONE}", down) for label, down in states.items()],
        lambda event, **fields: events.append((event.name, fields)),
    )
    for now_s in (0.0, 301.0):
        gateway.step(now_s)
    assert [name for name, _ in events] == ["DNS_HOSTS_KEPT"]  # more than half of the hosts are down
    states["c09"] = False
    gateway.step(302.0)
    assert all_records(server) == (set(), set(), 0)
    assert server.records("_nbagent._tcp", "SRV") == {f"0 0 8000 {label}.{ZONE}." for label in ("c08", "c09")}
    assert events[-1] == ("DNS_HOST_REMOVED", {"name": f"c07.{ZONE}", "wait_s": 300})
    gateway.step(1000.0)
    assert len(events) == 2
    for one in living:
        one.stop()


@pytest.mark.parametrize("command", [["tsig-keygen", KEY], ["keymgr", "-t", KEY]], ids=["bind", "knot"])
def test_keys_of_both_tools_are_read(command):
    import subprocess

    tree = programs()
    environment = {**os.environ, "LD_LIBRARY_PATH": str(next((tree / "usr/lib").glob("*-linux-gnu")))}
    made = subprocess.run([tree / "usr/sbin" / command[0], *command[1:]], env=environment, check=True,
                          stdout=subprocess.PIPE, text=True).stdout
    found = key.parse(made, "test")
    assert (found.name, found.algorithm, len(found.secret)) == (KEY, "hmac-sha256", 32)
    assert base64.b64encode(found.secret).decode() in made and "secret" not in repr(found)
