# SPDX-License-Identifier: BSD-3-Clause
"""The figures of a fleet, the state of HAProxy's servers, and adding and removing hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from werkzeug.test import Client

from nbagent.config.host_config import LandingSettings
from nbagent.core.errors import ConfigError, Full
from nbagent.gateway.__main__ import silent_hosts
from nbagent.gateway.fleet import FleetBackend, total
from nbagent.gateway.membership import Fleet, NotChanged
from nbagent.gateway.runtime import GatewayDown, HaproxyServer, Runtime, parse_servers
from nbagent.gateway.settings import FleetHostSettings, load
from nbagent.landing.app import create_app

PAGES = Path(__file__).resolve().parents[2] / "packaging/gateway/pages"
A = {
    "label": "a", "available": 3, "capacity": 10, "in_use": 7, "warm": 2, "starting": 1, "claims": 100,
    "draining": False, "ready": True, "next_end_s": 90, "uptime_s": 500, "idle_s": 3600.0, "life_s": 43200.0,
    "memory_bytes": 1 << 30, "internet": True, "container_image": "minimal", "version": "0.3.0",
    "claim_ms": {"p50": 3.0, "p99": 20.0},
}
B = {**A, "label": "b", "available": 0, "capacity": 30, "in_use": 30, "next_end_s": 30, "life_s": 7200.0,
     "internet": False, "draining": True, "claim_ms": {"p50": 4.0, "p99": 9.0}}
DOWN = {"available": 0, "capacity": 0, "down": True}
STATE = """1
# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_fqdn srv_port srvrecord
4 users 1 a 10.1.0.1 2 0 - 8000 -
4 users 2 b 2001:db8::2 0 0 - 8001 -
4 users 3 h1 10.1.0.3 2 0 c07.hosts.example.org 8000 _n._tcp.hosts.example.org
4 users 4 h2 - 0 32 - 0 -
4 users 5 _status - 2 0 - 0 -
"""


def backend(hosts: dict[str, dict[str, Any] | None], down: tuple[str, ...] = ()) -> FleetBackend:
    servers = [HaproxyServer(label, "10.1.0.1", 8000, None, label in down) for label in hosts]
    return FleetBackend(lambda: servers, lambda server: hosts[server.label])


def test_servers_of_haproxy_are_parsed_into_hosts() -> None:
    assert [(server.label, server.address, server.port, server.is_down) for server in parse_servers(STATE)] == [
        ("a", "10.1.0.1", 8000, False), ("b", "2001:db8::2", 8001, True), ("c07", "10.1.0.3", 8000, False)]


def test_figures_of_a_fleet_are_sums_and_minima_of_its_hosts() -> None:
    figures = total({"http://a": A, "http://b": B, "http://c": DOWN})
    sums = {name: figures[name] for name in ("available", "capacity", "in_use", "warm", "starting", "claims")}
    assert sums == {"available": 3, "capacity": 40, "in_use": 37, "warm": 4, "starting": 2, "claims": 200}
    assert figures["hosts"] == {"http://a": A, "http://b": B, "http://c": DOWN}
    assert (figures["next_end_s"], figures["life_s"], figures["internet"]) == (30, 7200.0, False)
    assert (figures["draining"], figures["free_percent"], figures["container_image"]) == (False, 8, "minimal")
    assert figures["claim_ms"] == {"p50": 4.0, "p99": 20.0}


def test_a_fleet_with_two_images_has_the_address_of_most_hosts() -> None:
    hosts = {f"http://{number}": {**A, "assets": f"/assets/{digest}"} for number, digest in enumerate("xyy")}
    assert total(hosts)["assets"] == "/assets/y"
    assert total({"http://a": A, "http://b": {**A, "assets": 5}})["assets"] is None


def test_a_fleet_without_a_host_that_is_up_has_figures() -> None:
    figures = total({"http://a": DOWN})
    assert (figures["available"], figures["capacity"], figures["next_end_s"]) == (0, 0, None)
    assert figures["claim_ms"] == {"p50": None, "p99": None} and figures["draining"] is False


def test_hosts_that_are_down_or_do_not_respond_are_listed_and_not_counted() -> None:
    figures = backend({"a": A, "b": None, "c": A}, down=("c",)).stats()
    assert figures["capacity"] == 10
    assert figures["hosts"] == {"http://a": A, "http://b": DOWN, "http://c": DOWN}


def test_a_refused_claim_has_the_slots_in_use_and_retry_after() -> None:
    with pytest.raises(Full, match="37 of 40 slots of the fleet are in use") as caught:
        backend({"a": A, "b": B}).claim({}, None, "192.0.2.1", "")
    assert caught.value.details["retry_after_s"] == 30


@pytest.mark.parametrize("hosts", [{"a": A, "b": B}, {}, {"a": None}])
def test_the_landing_page_of_a_fleet_has_every_page(hosts: dict[str, dict[str, Any] | None]) -> None:
    landing = Client(create_app(LandingSettings(), backend(hosts), lambda _: True))
    for path in ("/", "/info", "/lab/tree/x.ipynb?a=b"):
        assert landing.get(path).status_code == 200, path
    full = landing.get("/spawn/lab/tree/x.ipynb", headers={"Accept": "text/html"})
    assert full.status_code == 503 and int(full.headers["Retry-After"]) >= 2
    assert ("37 of 40" in full.text) == ("b" in hosts)
    assert landing.post("/spawn", data={"key": "k"}).status_code == 503
    refused = landing.post("/api/spawn")
    assert refused.status_code == 429 and refused.json == {"status": "full"}
    assert landing.get("/user/zz-0123456789ab/lab").status_code == 404
    for path in ("/api/stats", "/stats", "/stats/"):
        figures = landing.get(path)
        assert set(figures.json["hosts"]) == {f"http://{label}" for label in hosts}
        assert figures.headers["Access-Control-Allow-Origin"] == "*"


def test_slots_of_a_host_that_does_not_respond_get_503_and_not_404() -> None:
    fleet = backend({"a": A})
    landing = Client(silent_hosts(create_app(LandingSettings(), fleet, lambda _: True), fleet.knows, PAGES))
    lost = landing.get("/user/a-0123456789ab/lab", headers={"Accept": "text/html"})
    assert lost.status_code == 503 and "does not respond" in lost.text and lost.headers["Retry-After"] == "5"
    problem = landing.get("/user/a-0123456789ab/api/kernels")
    assert problem.status_code == 503 and problem.content_type == "application/problem+json"
    assert landing.get("/user/b-0123456789ab/lab").status_code == 404
    assert landing.get("/user/a/lab").status_code == 404


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    (tmp_path / "gateway.toml").write_text('[hosts.a]\naddress = "10.1.0.1"\n')
    return Fleet(tmp_path / "gateway.toml", Runtime(tmp_path / "absent.sock"))


def test_hosts_are_changed_in_files_while_the_gateway_is_not_running(fleet: Fleet) -> None:
    host = FleetHostSettings(address="10.1.0.2", port=8001)
    assert fleet.add("b", host) == "host b added; the gateway is not running and reads this when it starts"
    assert load(fleet.path).hosts["b"] == host
    fleet.drain("b", True)
    fleet.drain("a", True)
    assert [host.drain for host in load(fleet.path).hosts.values()] == [True, True]
    fleet.drain("a", False)
    fleet.remove("b", force=True)
    hosts = load(fleet.path).hosts
    assert set(hosts) == {"a"} and not hosts["a"].drain


def test_a_refused_change_changes_nothing(fleet: Fleet) -> None:
    before = fleet.path.read_text()
    for change, message in (
        (lambda: fleet.add("a", FleetHostSettings(address="10.1.0.9")), "host a not added: it is in the fleet already"),
        (lambda: fleet.drain("z", True), "unknown host z; known hosts: a"),
        (lambda: fleet.remove("z", False), "unknown host z"),
        (lambda: fleet.remove("a", True), "remove it from the file that does"),
    ):
        with pytest.raises(NotChanged, match=message):
            change()
    fleet.add("b", FleetHostSettings(address="10.1.0.2"))
    with pytest.raises(NotChanged, match="drain it first, or use --force"):
        fleet.remove("b", False)
    assert fleet.path.read_text() == before and set(load(fleet.path).hosts) == {"a", "b"}


def test_a_file_with_a_wrong_setting_is_removed_again(fleet: Fleet) -> None:
    with pytest.raises(ConfigError):
        fleet.add("UPPER", FleetHostSettings(address="10.1.0.2"))
    assert not fleet.file("UPPER").exists() and set(load(fleet.path).hosts) == {"a"}


def test_a_gateway_that_is_not_running_raises_gateway_down(tmp_path: Path) -> None:
    with pytest.raises(GatewayDown, match=r"absent\.sock: No such file.*is nbagent-gateway\.service active\?"):
        Runtime(tmp_path / "absent.sock").servers("users")
