# SPDX-License-Identifier: BSD-3-Clause
"""Netlink notifications as a list of checks: only states that no working slot has lead to one."""

from __future__ import annotations

import socket
import struct

import pytest

from nbagent.network.addresses import LABEL
from nbagent.network.watch import FLAGS, Changes, add, add_rules

NEWLINK, DELADDR, NEWROUTE, DELROUTE, NEWNETCONF = 16, 21, 24, 25, 80
NEWTABLE, DELTABLE, DELCHAIN, NEWRULE, DELRULE, DELSET, NEWSETELEM, DELSETELEM, NEWGEN = 0, 2, 5, 6, 8, 11, 12, 14, 15
IPV4, IPV6 = int(socket.AF_INET), int(socket.AF_INET6)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def netconf(index: int, forwarding: int) -> bytes:
    values = {1: index, 2: forwarding}
    return bytes([IPV4, 0, 0, 0]) + b"".join(attribute(kind, struct.pack("=i", one)) for kind, one in values.items())


def link(name: str, flags: int, alias: str = "") -> bytes:
    header = struct.pack("=BxHiII", 0, 1, 7, flags, 0xFFFFFFFF)
    return header + attribute(3, name.encode() + b"\0") + (attribute(20, alias.encode() + b"\0") if alias else b"")


def route(family: int, bits: int, route_type: int = 1) -> bytes:
    return struct.pack("=BBBBBBBBI", family, bits, 0, 0, 254, 4, 0, route_type, 0) + attribute(4, struct.pack("=i", 7))


def deleted(label: str) -> bytes:
    return struct.pack("=BBBBi", IPV4, 32, 0, 254, 1) + attribute(3, label.encode() + b"\0")


@pytest.mark.parametrize(("kind", "body", "expected"), [
    (NEWNETCONF, netconf(7, 0), Changes(forwarding={7})),
    (NEWNETCONF, netconf(7, 1), Changes()),
    (NEWNETCONF, netconf(-2, 0), Changes()),  # of interfaces that are made later
    (NEWNETCONF, netconf(-1, 0), Changes(uplinks=True)),
    (NEWNETCONF, netconf(-1, 1), Changes(uplinks=True)),
    (NEWLINK, link("nb-x8q2m4k9w1ze", 0x1, "internet 198.18.0.2"), Changes(links={7})),
    (NEWLINK, link("nb-x8q2m4k9w1ze", FLAGS | 0x10000, "internet 198.18.0.2"), Changes()),
    (NEWLINK, link("nb-x8q2m4k9w1ze", 0), Changes()),  # without an alias: about to be made
    (NEWLINK, link("eth0", 0, "internet"), Changes()),
    (DELADDR, deleted(LABEL), Changes(resolver=True)),
    (DELADDR, deleted("lo"), Changes()),
    (DELROUTE, route(IPV4, 32), Changes(links={7})),
    (DELROUTE, route(IPV6, 128), Changes(links={7})),
    (DELROUTE, route(IPV4, 0), Changes()),
    (NEWROUTE, route(IPV4, 0), Changes(uplinks=True)),
    (NEWROUTE, route(IPV4, 32), Changes()),  # of a slot that starts
    (NEWROUTE, route(IPV6, 8, 5), Changes(ipv6={7})),
    (NEWROUTE, route(IPV6, 128), Changes()),
])
def test_a_notification_leads_to_a_check_of_the_state_that_it_reports(
    kind: int, body: bytes, expected: Changes
) -> None:
    changes = Changes()
    add(changes, kind, body)
    assert changes == expected
    assert bool(changes) == (expected != Changes())


def about(table: str, family: int = 1, **attributes: bytes) -> bytes:
    """The body of a message of nftables about an object of a table."""
    return bytes([family, 0, 0, 0]) + attribute(1, table.encode() + b"\0") + b"".join(attributes.values())


def elements(set_name: str, *names: str) -> bytes:
    """The body of a message about elements that begin with the names of interfaces."""
    keys = (attribute(0x8001, attribute(0x8001, attribute(1, name.encode().ljust(16, b"\0") + b"\xc6\x12\0\2")))
            for name in names)
    return about("nbagent", set=attribute(2, set_name.encode() + b"\0"), list=attribute(0x8003, b"".join(keys)))


@pytest.mark.parametrize(("kind", "body", "expected"), [
    *((kind, about("nbagent"), Changes(table=True)) for kind in (
        NEWTABLE, DELTABLE, DELCHAIN, NEWRULE, DELRULE, DELSET)),
    (DELTABLE, about("filter"), Changes()),
    (DELTABLE, about("nbagent", family=2), Changes()),
    (DELTABLE, about("nbagent-other"), Changes()),
    (NEWGEN, bytes([0, 0, 0, 0]), Changes()),
    (DELSETELEM, elements("slots4", "nb-x8q2m4k9w1ze", "nb-y8q2m4k9w1ze"),
     Changes(elements={"nb-x8q2m4k9w1ze", "nb-y8q2m4k9w1ze"})),
    (NEWSETELEM, elements("slots4", "nb-x8q2m4k9w1ze"), Changes()),  # of a slot that opens
    (DELSETELEM, elements("connections", "nb-x8q2m4k9w1ze"), Changes()),  # of a slot that ends
    (NEWSETELEM, elements("named4", "x"), Changes(table=True)),
    (DELSETELEM, elements("refused6", "x"), Changes(table=True)),
    (DELSETELEM, elements("guarded", "eth0"), Changes(table=True)),
    (NEWSETELEM, elements("answers4", "x"), Changes()),  # by the resolver
])
def test_a_change_of_the_table_leads_to_a_check_unless_slots_make_it(
    kind: int, body: bytes, expected: Changes
) -> None:
    changes = Changes()
    add_rules(changes, 10 << 8 | kind, body)
    assert changes == expected and bool(changes) == (expected != Changes())
