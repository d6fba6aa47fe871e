# SPDX-License-Identifier: BSD-3-Clause
"""The slots' network: address allocation, refused ranges, firewall rules, the resolver's configuration, settings."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import re
from pathlib import Path

import pytest

from nbagent.config import host_config
from nbagent.core import proxies
from nbagent.core.errors import ConfigError, InvalidField
from nbagent.core.model import CLAIM_FIELDS, Bounds, Slot, parse_options
from nbagent.network import addresses, resolver, rules
from nbagent.sandbox.plan import plan
from nbagent.sandbox.spec import SandboxSpec, Uplink
from nbagent.supervisor import network

SETTINGS = host_config.NetworkSettings()
RANGE4 = ipaddress.IPv4Network("198.18.0.0/29")


def rendered(**changes: object) -> str:
    return rules.render(network.rules(dataclasses.replace(SETTINGS, **changes)))


def test_addresses_are_allocated_in_circular_order() -> None:
    numbers = []
    for _ in range(5):
        numbers.append(addresses.next_number(numbers[-1] if numbers else addresses.GATEWAY, (), RANGE4))
    # Not 0 (the network), 1 (the host) and 7 (broadcast).
    assert numbers == [2, 3, 4, 5, 6]
    assert addresses.next_number(6, (), RANGE4) == 2
    assert addresses.next_number(6, {"198.18.0.2", "198.18.0.3", "198.18.0.5"}, RANGE4) == 4
    assert addresses.next_number(999_999, {"198.18.0.2"}, RANGE4) in (3, 4, 5, 6)
    with pytest.raises(LookupError, match="no address is free"):
        addresses.next_number(2, {f"198.18.0.{number}" for number in range(2, 7)}, RANGE4)


def test_interface_names_fit_the_kernels_limit() -> None:
    assert addresses.interface("c07-x8q2m4k9w1ze") == "nb-x8q2m4k9w1ze"
    assert len(addresses.interface("a" * 16 + "-" + "0" * 12)) == 15


@pytest.mark.parametrize("address", [
    "0.0.0.0", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "168.63.129.16", "169.254.169.254",
    "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.168.1.1", "198.18.0.1", "198.19.0.1",
    "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::ffff:10.0.0.1", "::10.0.0.1", "64:ff9b::a00:1", "100::1", "2001::1", "2001:db8::1", "2002:a00:1::",
    "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fd20:ce::254", "fe80::1", "fec0::1", "ff02::1",
])
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    assert any(refuses(address))


@pytest.mark.parametrize("address", [
    "1.1.1.1", "9.255.255.255", "11.0.0.1", "100.63.255.255", "100.128.0.1", "151.101.0.223", "172.15.255.255",
    "172.32.0.1", "192.167.255.255", "198.17.255.255", "198.20.0.1", "223.255.255.255",
    "2001:4860:4860::8888", "2606:4700::1111", "2a04:4e42::223", "2003::1", "2400:cb00::1",
])
def test_public_addresses_are_not_refused(address: str) -> None:
    assert not any(refuses(address))


def refuses(address: str) -> list[bool]:
    """For each element of the rendered set, whether it contains the address."""
    parsed = ipaddress.ip_address(address)
    (elements,) = re.findall(rf"add element inet nbagent refused{parsed.version} \{{ (.*) \}}", rendered())
    return [parsed in ipaddress.ip_network(element) for element in elements.split(", ")]


def test_named_ranges_take_precedence_over_refused_ones() -> None:
    text = rendered(also=(ipaddress.ip_network("10.1.2.0/24"), ipaddress.ip_network("fd00:1::/64")))
    assert "add element inet nbagent named4 { 10.1.2.0/24 }" in text
    assert "add element inet nbagent named6 { fd00:1::/64 }" in text
    outward = text[text.index("chain outward"):]
    assert outward.index("@named4") < outward.index("@refused4") < outward.index("goto counted\n    }")
    assert "answers4 goto" not in text


def test_an_allow_list_refuses_all_other_addresses() -> None:
    text = rendered(
        only=("pip.example", ipaddress.ip_network("203.0.113.0/24"), ipaddress.ip_network("203.0.113.7/32"))
    )
    assert "add element inet nbagent named4 { 203.0.113.0/24 }" in text
    outward = text[text.index("chain outward"):text.index("chain counted")]
    assert outward.index("@refused4") < outward.index("@answers4 goto counted")
    assert outward.rstrip(" }\n").endswith("goto refused")


@pytest.mark.parametrize(("proxy", "rule"), [
    ("10.1.0.8:3128", "ip daddr 10.1.0.8 tcp dport 3128 goto counted"),
    ("[2001:db8::8]:80", "ip6 daddr 2001:db8::8 tcp dport 80 goto counted"),
])
def test_only_the_port_of_a_proxy_is_reachable_before_private_ranges_are_refused(proxy: str, rule: str) -> None:
    text = rendered(proxy=proxies.parse(proxy))
    outward = text[text.index("chain outward"):text.index("chain counted")]
    assert outward.count(rule) == 1 and outward.index(rule) < outward.index("@refused4 goto refused")
    assert outward.index("ct status dnat goto refused") < outward.index(rule)
    assert rule not in rendered()


def test_refusals_come_before_the_tables_of_other_firewalls() -> None:
    """tests/integration/test_firewalls.py has the effect with ufw, which drops at priority filter."""
    hooks = dict(re.findall(r"hook (forward|input) priority (.+?);", rendered()))
    assert hooks == {"forward": "filter - 5", "input": "filter - 5"}


def test_rules_survive_serialization() -> None:
    expected = network.rules(dataclasses.replace(SETTINGS, only=("pip.example", ipaddress.ip_network("10.0.0.0/8"))))
    assert expected.closed and rules.Rules.restore(expected.save()) == expected
    by_proxy = network.rules(dataclasses.replace(SETTINGS, proxy=proxies.parse("10.1.0.8:3128")))
    assert rules.Rules.restore(json.loads(json.dumps(by_proxy.save()))) == by_proxy
    former = {name: value for name, value in expected.save().items() if name != "proxy"}
    assert rules.Rules.restore(former) == expected


def test_a_slot_with_an_interface_has_the_variables_of_the_proxy() -> None:
    settings = dataclasses.replace(
        SETTINGS, proxy=proxies.parse("http://10.1.0.8:3128/"), also=(ipaddress.ip_network("10.2.0.0/16"),)
    )
    with_interface = Slot.__new__(Slot)
    object.__setattr__(with_interface, "addresses", ("198.18.0.2",))
    object.__setattr__(with_interface, "id", "c07-x8q2m4k9w1ze")
    without = Slot.__new__(Slot)
    object.__setattr__(without, "addresses", ())
    url = "http://10.1.0.8:3128"
    assert network.variables(settings, with_interface) == {
        "http_proxy": url, "https_proxy": url,
        "no_proxy": "localhost,127.0.0.1,::1,c07-x8q2m4k9w1ze,198.18.0.2,10.2.0.0/16",
    }
    assert network.variables(settings, without) == network.variables(SETTINGS, with_interface) == {}


@pytest.mark.parametrize("text", [
    "", "none", "10.1.0.8", "10.1.0.8:", "10.1.0.8:0", "10.1.0.8:65536", "10.1.0:3128", "proxy.example:3128",
    "http://proxy.example:3128", "https://10.1.0.8:3128", "http://user:pw@10.1.0.8:3128", "10.1.0.8:3128/path",
    "2001:db8::8:3128", "[10.1.0.8]:3128x", "[fe80::1%eth0]:3128", "127.0.0.1:3128", "[::1]:3128", "0.0.0.0:3128",
    "169.254.169.254:80", "224.0.0.1:80", "[::ffff:127.0.0.1]:3128", "10.1.0.8:3128\n", " 10.1.0.8:3128",
])
def test_a_proxy_is_an_address_of_another_machine_with_a_port(text: str) -> None:
    with pytest.raises(ValueError, match="IP address and the port"):
        proxies.parse(text)


def test_the_proxy_serves_all_hosts_but_the_slot_itself_and_networks_that_slots_reach() -> None:
    proxy = proxies.parse("[2001:DB8::8]:3128")
    assert str(proxy) == "[2001:db8::8]:3128" and proxy.version == 6
    direct = ["10.2.0.0/16", "fd00::/64"]
    served = {host: proxy.serves(host, direct) for host in (
        "data.example.org", "10.3.0.1", "10.2.0.1", "fd00::1", "fd01::1", "127.0.0.1", "127.9.9.9", "::1", "localhost",
    )}
    assert [host for host, by_proxy in served.items() if by_proxy] == ["data.example.org", "10.3.0.1", "fd01::1"]


def test_the_resolver_serves_only_allowed_names_and_no_private_address() -> None:
    everything = resolver.render("198.18.0.1", [], ["10.0.0.1"], private=False)
    # Without an allow-list dnsmasq reads the host's resolv.conf itself.
    assert "stop-dns-rebind" in everything and "10.0.0.1" not in everything and "/#/" not in everything
    text = "# DHCP\nsearch lan\nnameserver 10.0.0.1\nnameserver 2001:db8::53\nnameserver\noptions edns0\n"
    some = resolver.render("198.18.0.1", ["pip.example"], resolver.upstreams(text), private=True).splitlines()
    assert {"address=/#/", "no-resolv", "server=/pip.example/10.0.0.1", "server=/pip.example/2001:db8::53"} <= set(some)
    assert "stop-dns-rebind" not in some
    assert "nftset=/pip.example/4#inet#nbagent#answers4,6#inet#nbagent#answers6" in some
    # A cached response would not add its addresses to the sets.
    assert "cache-size=0" in some


def test_ipv6_is_used_where_the_host_forwards_it_and_has_a_route(tmp_path: Path) -> None:
    assert not addresses.forwards_ipv6(tmp_path)
    forwarding, routes = tmp_path / "proc/sys/net/ipv6/conf/all/forwarding", tmp_path / "proc/net/ipv6_route"
    forwarding.parent.mkdir(parents=True)
    routes.parent.mkdir(parents=True)
    nothing, by = "0" * 32, "2a000001000000000000000000000002"
    unreachable = f"{nothing} 00 {nothing} 00 {nothing} ffffffff 00000001 00000000 00200200       lo\n"
    route = f"{nothing} 00 {nothing} 00 {by} 00000400 00000003 00000000 00000003     eth0\n"
    routes.write_text(unreachable)
    forwarding.write_text("1\n")
    assert not addresses.forwards_ipv6(tmp_path)
    routes.write_text(unreachable + route)
    assert addresses.forwards_ipv6(tmp_path)
    forwarding.write_text("0\n")
    assert not addresses.forwards_ipv6(tmp_path)


@pytest.mark.parametrize(("table", "key"), [
    ({"network": {"allow": []}}, "network.allow"),
    ({"network": {"allow": ["internet", "internet"]}}, "network.allow"),
    ({"network": {"allow": ["host"]}}, "network.allow"),
    ({"network": {"only": ["https://pip.example"]}}, "network.only"),
    ({"network": {"only": ["*.pip.example"]}}, "network.only"),
    ({"network": {"only": ["pip.example/x\nserver=1.2.3.4"]}}, "network.only"),
    ({"network": {"also": ["intranet.example"]}}, "network.also"),
    ({"network": {"proxy": "proxy.example:3128"}}, "network.proxy"),
    ({"network": {"proxy": 3128}}, "network.proxy"),
    ({"network": {"proxy": "10.1.0.8:3128", "only": ["pip.example"]}}, "network.only"),
    ({"network": {"up": "100"}}, "network.up"),
    ({"network": {"down": "1kbit"}}, "network.down"),
    ({"network": {"connections": 0}}, "network.connections"),
    ({"network": {"range4": "fd00::/64"}}, "network.range4"),
    ({"network": {"range4": "198.18.0.0/30"}}, "network.range4"),
    ({"network": {"range6": "2001:db8::1/64"}}, "network.range6"),
    ({"images": {"lab": {"network": "internet"}}}, "images.lab.network"),
])
def test_an_invalid_setting_is_named_in_the_error(table: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        host_config.parse(table)
    assert caught.value.details["key"] == key


def test_settings_are_parsed() -> None:
    parsed = host_config.parse({
        "network": {"allow": ["none", "internet"], "only": ["pip.example", "203.0.113.0/24", "2001:db8::/32"],
                    "up": "500kbit", "down": "1.5Gbit", "range4": "10.9.0.0/16"},
        "images": {"lab": {"network": "internet"}},
    })
    ranges = (ipaddress.ip_network("203.0.113.0/24"), ipaddress.ip_network("2001:db8::/32"))
    assert parsed.network.only == ("pip.example", *ranges)
    assert (parsed.network.up, parsed.network.down) == (62_500, 187_500_000)
    assert (parsed.network_mode("lab"), parsed.network_mode("minimal")) == ("internet", "none")


def test_a_claim_for_a_network_that_is_not_allowed_is_refused() -> None:
    closed = Bounds(memory_max_bytes=1 << 30, ttl_max_s=60, cpus=1, networks=("none",))
    with pytest.raises(InvalidField) as caught:
        parse_options({"network": "internet"}, CLAIM_FIELDS, closed)
    assert caught.value.details["field"] == "network" and caught.value.details["expected"].startswith('"none", from')
    opened = dataclasses.replace(closed, networks=("none", "internet"))
    assert parse_options({"network": "internet"}, CLAIM_FIELDS, opened).network == "internet"
    for wrong in ("host", "", 1, None):
        with pytest.raises(InvalidField):
            parse_options({"network": wrong}, CLAIM_FIELDS, opened)


def test_a_slot_saved_by_an_older_version_has_no_addresses() -> None:
    saved = {
        "id": "c07-x8q2m4k9w1ze", "image": "minimal", "digest": "d", "id_base": 1, "uid": 2, "state": "claimed",
        "limits": {"memory_bytes": 1, "cpu_weight": 1, "cpu_quota": None, "tasks": 1}, "token": "t", "created_s": 0.0,
    }
    slot = Slot.restore(saved)
    assert (slot.addresses, slot.network) == ((), "none")
    with_some = dataclasses.replace(slot, addresses=("198.18.0.2", "fd00::2"), network="internet")
    assert Slot.restore(with_some.save()) == with_some


def test_only_a_slot_with_an_uplink_has_the_steps_for_one() -> None:
    spec = SandboxSpec(
        slot="c07-x8q2m4k9w1ze", root="/r", id_base=1 << 30, uid=2001, user="jovyan", home="/home/jovyan",
        storage_bytes=64 << 20, command=["/usr/bin/python3"], environment={}, code="/c", mountpoint="/m",
        syscall_filter="AAAAAAAAAAA=", system="/s", directory="/home/jovyan", port=0, listen_timeout_s=60.0,
    )
    assert plan(spec).connected == ()
    connected = spec._replace(uplink=Uplink(["198.18.0.2", "fd00::2"], ["198.18.0.1", "fd00::1"], 1000))
    assert SandboxSpec.restore(connected.save()) == connected
    assert [type(step).__name__ for step in plan(connected).connected] == ["Interface", "Resolver", "ReadOnlyRoot"]
    described = [line.step for line in plan(connected).lines() if line.part == "connected"]
    assert "198.18.0.2, fd00::2 via 198.18.0.1, fd00::1" in described[0] and "by 198.18.0.1" in described[1]
