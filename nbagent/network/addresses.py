# SPDX-License-Identifier: BSD-3-Clause
"""The slots' addresses, and the ranges that no slot may reach. Pure, except `forwards_ipv6`.

Each slot has a veth pair of its own with one IPv4 address and, on a host that forwards IPv6, one IPv6 address. Both
have the same number in their ranges. Number 1 of each range is the host, for every slot.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Container
from pathlib import Path

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

PREFIX = "nb-"
# The label of the resolver's address on lo.
LABEL = "lo:nbagent"
GATEWAY = 1
FIRST = 2
# Global unicast is 2000::/3. All other IPv6 addresses are local, reserved, or embed an IPv4 address.
REFUSED6 = (
    "::/3",
    "2001::/23",  # protocol assignments: Teredo, benchmarks, ORCHID
    "2001:db8::/32",  # documentation
    "2002::/16",  # 6to4: embeds any IPv4 address
    "3fff::/20",  # documentation
    "4000::/2",
    "8000::/1",  # includes fc00::/7 (metadata services of clouds), fe80::/10 and ff00::/8
)
# The ranges that IANA's special-purpose registry does not list as globally reachable, multicast, and reserved.
REFUSED4 = (
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",  # carrier-grade NAT; 100.100.100.200 is Alibaba's metadata service
    "127.0.0.0/8",
    "168.63.129.16/32",  # Azure's metadata service, in a public range
    "169.254.0.0/16",  # link-local; 169.254.169.254 is the metadata service of the other clouds
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/3",  # multicast, reserved, broadcast
)


def interface(slot_id: str) -> str:
    """The name of the host's end of a slot's interface: 15 characters, the most that IFNAMSIZ allows."""
    return PREFIX + slot_id.rpartition("-")[2]


def gateway(network: Network) -> str:
    """The host's address in a range of slots."""
    return str(network[GATEWAY])


def next_number(last: int, taken: Container[str], range4: Network) -> int:
    """The next number after `last` whose address is not taken, starting again from the first at the end of the range.

    The order is circular so that an address is unused for as long as possible before another slot has it, because
    late packets of its former connections must not reach that slot. Raises LookupError when no address is free.
    """
    count = range4.num_addresses - 1 - FIRST  # the last is the broadcast address of the range
    for step in range(count):
        number = FIRST + (last + 1 - FIRST + step) % count
        if str(range4[number]) not in taken:
            return number
    raise LookupError(f"no address is free in {range4}")


def ipv6_uplink(root: Path = Path("/")) -> str:
    """The interface of the host's default route of IPv6; empty without one."""
    try:
        routes = (root / "proc/net/ipv6_route").read_text().splitlines()
    except OSError:
        return ""
    columns = (line.split() for line in routes)
    # Columns: destination, its prefix length, source, …, device. Unreachable default routes are on lo.
    found = (line[-1] for line in columns if set(line[0]) == {"0"} and line[1] == "00" and line[-1] != "lo")
    return next(found, "")


def forwards_ipv6(root: Path = Path("/")) -> bool:
    """Whether the host forwards IPv6 and has a default route.

    The operator enables IPv6 forwarding, because a host that enables it drops the routes that it learned from router
    advertisements. IPv4 forwarding is a setting of each interface, which the network service changes itself.
    """
    try:
        if (root / "proc/sys/net/ipv6/conf/all/forwarding").read_text().strip() == "0":
            return False
    except OSError:
        return False
    return bool(ipv6_uplink(root))
