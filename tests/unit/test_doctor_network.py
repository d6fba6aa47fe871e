# SPDX-License-Identifier: BSD-3-Clause
"""The checks of the network, the firewall and the proxy by `nbagent doctor`."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from host_files import host

from nbagent.config import host_config
from nbagent.core.proxies import HttpProxy
from nbagent.doctor import network, system
from nbagent.doctor.finding import Finding

SETTINGS = host_config.HostConfig()
ROUTE_HEAD = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"


def test_the_resolver_of_slots_must_respond() -> None:
    assert "not in use" in network.check_resolver("192.0.2.1").found
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))

        def respond() -> None:
            question, client = server.recvfrom(512)
            server.sendto(question, client)

        thread = threading.Thread(target=respond)
        thread.start()
        assert network.check_resolver("127.0.0.1", server.getsockname()[1]).status == "ok"
        thread.join()
        port = server.getsockname()[1]
    finding = network.check_resolver("127.0.0.1", port)
    assert finding.status == "fail" and finding.mend.startswith("systemctl restart nbagent-dns")


def test_host_names_of_slots_must_resolve() -> None:
    names = []

    def resolve(name: str) -> list[str]:
        names.append(name)
        if len(names) > 1:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return ["192.0.2.7", "2001:db8::7"]

    good = network.check_wildcard("nb.example.org", resolve)
    assert (good.status, good.found) == ("ok", "*.nb.example.org resolves to 192.0.2.7, 2001:db8::7")
    bad = network.check_wildcard("nb.example.org", resolve)
    assert bad.status == "fail" and "Name or service not known" in bad.found and "*.nb.example.org" in bad.mend
    assert len(set(names)) == 2 and all(name.endswith(".nb.example.org") for name in names)


def test_addresses_come_from_the_systems_resolver() -> None:
    assert system.addresses_of("127.0.0.1") == ["127.0.0.1"]
    with pytest.raises(OSError):
        system.addresses_of("not a name")


def test_a_network_without_a_default_route_is_a_warning(tmp_path: Path) -> None:
    assert network.check_network(tmp_path, SETTINGS).found == "slots have no network"
    opened = host_config.parse({"network": {"allow": ["none", "internet"]}})
    assert network.check_network(tmp_path, opened).status == "warn"
    host(tmp_path, {"proc/net/route": ROUTE_HEAD + "eth0\t00000000\t02050505\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"})
    found = network.check_network(tmp_path, opened)
    assert found.status == "ok" and "IPv6 would require" in found.found


NOTHING = "0" * 32
ROUTE6 = f"{NOTHING} 00 {NOTHING} 00 {'2a' + '0' * 30} 00000400 00000003 00000000 00000003     eth6\n"
FORWARDING6 = "proc/sys/net/ipv6/conf/all/forwarding"


def test_a_host_with_ipv6_only_has_a_network_if_it_forwards(tmp_path: Path) -> None:
    opened = host_config.parse({"network": {"allow": ["none", "internet"]}})
    host(tmp_path, {"proc/net/route": ROUTE_HEAD, "proc/net/ipv6_route": ROUTE6, FORWARDING6: "0\n"})
    found = network.check_network(tmp_path, opened)
    assert found.status == "warn" and "does not forward IPv6" in found.found
    assert found.mend.startswith("sysctl -w net.ipv6.conf.eth6.accept_ra=2 net.ipv6.conf.all.forwarding=1")
    host(tmp_path, {FORWARDING6: "1\n"})
    found = network.check_network(tmp_path, opened)
    assert (found.status, found.mend) == ("ok", "") and "over IPv6 only" in found.found
    # A firewall that drops IPv4, which the host does not have, is no fault, but the resolver of slots has IPv4.
    assert firewall(tmp_path, rules(chain("ip", "filter", "f", **FORWARD, policy="drop"))).status == "ok"
    drops6 = rules(chain("ip6", "filter", "f", **FORWARD, policy="drop"))
    assert "IPv6 connections" in firewall(tmp_path, drops6).found
    closed = rules(chain("ip", "filter", "i", type="filter", hook="input", prio=0, policy="drop"))
    assert "queries of slots" in firewall(tmp_path, closed).found


PROXIED = {"network": {"allow": ["none", "internet"], "proxy": "10.1.0.8:3128"}}


def test_a_host_whose_only_way_out_is_a_proxy_has_a_network(tmp_path: Path) -> None:
    settings = host_config.parse(PROXIED)
    to_proxy = "eth1\t0000010A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n"
    host(tmp_path, {"proc/net/route": ROUTE_HEAD + to_proxy})
    found = network.check_network(tmp_path, settings)
    assert (found.status, found.found) == ("ok", "slots may reach the internet by the proxy 10.1.0.8:3128 only")
    closed = chain("inet", "filter", "f", **FORWARD, policy="drop")
    assert network.check_firewall(tmp_path, settings.network, rules(closed)).status == "warn"
    accepts = [
        rule("inet", "filter", "f", match(IIF, "nb-*"), match(field("ip", "daddr"), "10.1.0.8"),
             match(field("tcp", "dport"), 3128), match({"meta": {"key": "oifname"}}, "eth1"), ACCEPT),
        rule("inet", "filter", "f", match({"ct": {"key": "state"}}, ["established", "related"], "in"), ACCEPT),
    ]
    assert network.check_firewall(tmp_path, settings.network, rules(closed, *accepts)).status == "ok"


@pytest.mark.parametrize(("response", "archives", "status", "text"), [
    (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", [], "ok", "status 503 for http://nbagent.invalid/"),
    (b"HTTP/1.1 403 Forbidden\r\n\r\n", [], "ok", "status 403"),
    (b"HTTP/1.1 403 Forbidden\r\n\r\n", ["http://data.example/a/"], "warn", "refuse http://data.example/a/"),
    (b"HTTP/1.1 200 OK\r\n\r\n", ["http://data.example/a/"], "ok", "status 200 for http://data.example/a/"),
    (b"HTTP/1.1 407 Who\r\n\r\n", [], "fail", "requires a login"),
    (b"HTTP/1.1 403 Filtered\r\n\r\n", ["https://data.example/a/"], "fail", "Tunnel connection failed: 403 Filtered"),
    (b"SSH-2.0-OpenSSH\r\n", [], "fail", "no response"),
])
def test_the_proxy_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, response: bytes, archives: list[str], status: str, text: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        def respond() -> None:
            with server.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(response)

        thread = threading.Thread(target=respond)
        thread.start()
        settings = host_config.parse(PROXIED | {"claims": {"archives": archives}})
        proxy = HttpProxy("127.0.0.1", server.getsockname()[1])
        assert network.check_proxy(tmp_path, settings, proxy).found.endswith("which slots do not reach")
        monkeypatch.setattr(network, "_is_own", lambda *_: False)
        found = network.check_proxy(tmp_path, settings, proxy)
        thread.join()
    assert found.status == status and text in found.found, found
    assert bool(found.mend) == (status != "ok")


def test_a_proxy_that_slots_or_the_host_do_not_reach_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = host_config.parse(PROXIED)
    assert "does not forward IPv6" in network.check_proxy(tmp_path, settings, HttpProxy("2001:db8::8", 3128)).found
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(network, "_is_own", lambda *_: False)
    found = network.check_proxy(tmp_path, settings, HttpProxy("127.0.0.1", port))
    assert found.status == "fail" and "Connection refused" in found.found


def rules(*items: dict[str, Any], text: str = "") -> Callable[[], tuple[str, str]]:
    """A ruleset with our table and `items`."""
    document = [{"table": {"family": "inet", "name": "nbagent"}}, *items]
    return lambda: (json.dumps({"nftables": document}), text)


def chain(family: str, table: str, name: str, **more: Any) -> dict[str, Any]:
    return {"chain": {"family": family, "table": table, "name": name, **more}}


def rule(family: str, table: str, name: str, *statements: dict[str, Any]) -> dict[str, Any]:
    return {"rule": {"family": family, "table": table, "chain": name, "handle": 1, "expr": list(statements)}}


def match(left: dict[str, Any], right: object, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


def field(protocol: str, name: str) -> dict[str, Any]:
    return {"payload": {"protocol": protocol, "field": name}}


def firewall(root: Path, found: Callable[[], tuple[str, str]]) -> Finding:
    if not (root / "proc/net/route").exists():
        host(root, {"proc/net/route": ROUTE_HEAD + "eth0\t00000000\t02050505\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"})
    return network.check_firewall(root, host_config.NetworkSettings(), found)


IIF, OIF = {"meta": {"key": "iifname"}}, {"meta": {"key": "oifname"}}
FORWARD: dict[str, Any] = {"type": "filter", "hook": "forward", "prio": 0}
INPUT: dict[str, Any] = {"type": "filter", "hook": "input", "prio": 0}
ACCEPT: dict[str, Any] = {"accept": None}
DROP: dict[str, Any] = {"drop": None}
REJECT: dict[str, Any] = {"reject": None}
F, G = ("inet", "fw", "f"), ("inet", "fw", "g")
STATES = {"key": {"ct": {"key": "state"}}, "data": {"set": [["established", ACCEPT], ["invalid", DROP]]}}
ESTABLISHED = rule(*F, {"vmap": STATES})
OPEN, CLOSED = chain(*F, **FORWARD, policy="accept"), chain(*F, **FORWARD, policy="drop")


@pytest.mark.parametrize(
    ("items", "status", "mend"),
    [
        ([chain("ip", "filter", "FORWARD", **FORWARD, policy="accept")], "ok", ""),
        ([chain("ip", "filter", "FORWARD", **FORWARD, policy="drop")], "warn",
         'nft insert rule ip filter FORWARD iifname "nb-*" accept'),
        ([chain("inet", "fw", "in", **INPUT, policy="drop")], "warn",
         'nft insert rule inet fw in iifname "nb-*" udp dport 53 accept'),
        # The last rule rejects, and the policy accepts, as in firewalld.
        ([OPEN, rule(*F, REJECT)], "warn", "nft insert rule inet fw f"),
        # A rule that names the interfaces of slots, but rejects their packets.
        ([OPEN, rule(*F, match(IIF, "nb-*"), REJECT)], "warn", "nft insert"),
        ([CLOSED, chain(*G), rule(*F, match(IIF, "nb-*"), {"jump": {"target": "g"}}), rule(*G, ACCEPT), ESTABLISHED],
         "ok", ""),
        ([CLOSED, chain(*G), rule(*F, {"jump": {"target": "g"}}), rule(*G, {"return": None}), ESTABLISHED], "warn", ""),
        # One direction, and both.
        ([CLOSED, rule(*F, match(IIF, "nb-*"), ACCEPT)], "warn", ""),
        ([CLOSED, rule(*F, match(OIF, "nb-*"), ACCEPT), rule(*F, match(IIF, {"set": ["eth1", "nb-*"]}), ACCEPT)],
         "ok", ""),
        # A rate is not decided.
        ([CLOSED, ESTABLISHED, rule(*F, {"limit": {"rate": 3, "per": "minute"}}, ACCEPT)], "warn", ""),
        # Ports, ranges, other protocols and other interfaces.
        ([CLOSED, ESTABLISHED, rule(*F, match(field("tcp", "dport"), {"set": [80, {"range": [440, 450]}]}),
                                    match(IIF, "eth0", "!="), ACCEPT)], "ok", ""),
        ([CLOSED, ESTABLISHED, rule(*F, match(field("udp", "dport"), 443), ACCEPT)], "warn", ""),
        ([OPEN, rule(*F, match(field("ip", "saddr"), {"prefix": {"addr": "198.18.0.0", "len": 15}}), DROP)],
         "warn", ""),
        ([OPEN, rule(*F, match(field("ip6", "saddr"), "fd00::1"), DROP), rule(*F, match(IIF, "eth1"), DROP),
          rule(*F, match({"meta": {"key": "l4proto"}}, "icmp"), DROP)], "ok", ""),
        ([chain("inet", "nbagent", "f", **FORWARD, policy="drop")], "ok", ""),
    ],
)
def test_a_table_that_drops_packets_of_slots_is_a_warning(
    tmp_path: Path, items: list[dict[str, Any]], status: str, mend: str
) -> None:
    finding = firewall(tmp_path, rules(*items))
    assert finding.status == status, finding
    assert finding.mend.startswith(mend)


def test_a_host_without_our_table_fails(tmp_path: Path) -> None:
    assert firewall(tmp_path, lambda: ('{"nftables": []}', "")).status == "fail"


@pytest.mark.parametrize(("program", "queries", "ipv6", "mend"), [
    ("firewalld", True, True, "firewall-cmd --permanent --zone=trusted --add-interface=nb-+ && firewall-cmd --reload"),
    ("ufw", True, True, "ufw route allow in on nb-+ && ufw allow in on nb-+ to any port 53"),
    # Docker has no rules for IPv6 in this version, and accepts packets to the host.
    ("docker", False, False,
     "iptables -I DOCKER-USER -i nb-+ -j ACCEPT; iptables -I DOCKER-USER -o nb-+ -m conntrack "),
    # Both policies accept and the last rules reject, as in the rules of iptables-services and of cloud images.
    ("iptables", True, False, "iptables -t filter -I FORWARD -i nb-+ -j ACCEPT; iptables -t filter -I FORWARD -o nb-+"),
])
def test_rulesets_of_firewalls_are_judged_before_and_after_the_remedy(
    tmp_path: Path, program: str, queries: bool, ipv6: bool, mend: str
) -> None:
    """The rulesets are those of Debian 12's packages, before and after the commands were run."""
    host(tmp_path, {
        "proc/sys/net/ipv6/conf/all/forwarding": "1\n", "proc/net/ipv6_route": f"{'0' * 32} 00 x x x x x x x eth0\n",
    })
    before, after = (firewall(tmp_path, captured(name)) for name in (program, f"{program}-mended"))
    assert before.status == "warn" and "IPv4 connections of slots" in before.found
    assert ("queries" in before.found, "IPv6" in before.found) == (queries, ipv6)
    assert before.mend.startswith(mend)
    assert after.status == "ok", after


@pytest.mark.parametrize(("extensions", "text", "verdict", "status"), [
    (["comment"], " counter packets 0 bytes 0 drop", DROP, "warn"),
    ([], "counter packets 0 bytes 0 reject with tcp reset", {"xt": {"type": "target", "name": "REJECT"}}, "warn"),
    (["multiport"], "meta l4proto tcp tcp dport { 80, 400-500 } drop", DROP, "warn"),
    (["multiport"], "meta l4proto tcp tcp dport { 80, 8000-8010 } drop", DROP, "ok"),
    (["multiport"], "meta l4proto tcp tcp dport != { 80, 8000-8010 } drop", DROP, "warn"),
    (["comment", "conntrack"], " ct state new drop", DROP, "warn"),
    (["state"], "ct state invalid,untracked drop", DROP, "ok"),
    (["addrtype", "conntrack"], "fib daddr type local ct state new drop", DROP, "ok"),
    # Not decided.
    (["conntrack", "conntrack"], "ct status dnat ct state new drop", DROP, "ok"),
    (["physdev"], "xt match physdev drop", DROP, "ok"),
])
def test_extensions_of_iptables_are_judged(
    tmp_path: Path, extensions: list[str], text: str, verdict: dict[str, Any], status: str
) -> None:
    table = ("ip", "filter", "FORWARD")
    expressions = [{"xt": {"type": "match", "name": name}} for name in extensions]
    items = [chain(*table, **FORWARD, policy="accept"), rule(*table, *expressions, {"counter": {}}, verdict)]
    listing = f"table ip filter {{\n\tchain FORWARD {{\n\t\t{text} # handle 1\n\t}}\n}}\n"
    finding = firewall(tmp_path, rules(*items, text=listing))
    assert finding.status == status, finding
    if finding.mend:
        assert finding.mend.startswith("iptables -t filter -I FORWARD -i nb-+ -j ACCEPT; ")


def captured(name: str) -> Callable[[], tuple[str, str]]:
    below = Path(__file__).parent / "rulesets"
    return rules(*json.loads((below / f"{name}.json").read_text()), text=(below / f"{name}.nft").read_text())
