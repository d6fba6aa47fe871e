"""Who has which address, and which addresses nobody in a slot may reach. Pure but for `forwards_ipv6`.

A slot is a point: one address of IPv4 and perhaps one of IPv6, both with the same number in their
ranges, on an interface that nobody shares. Number 1 is the host, for every slot the same.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Container
from pathlib import Path

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

PREFIX = "nb-"
GATEWAY = 1
FIRST = 2
# The public part of IPv6 is 2000::/3; everything outside is local, reserved, or a way to write an IPv4 address.
REFUSED6 = (
    "::/3",
    "2001::/23",  # protocol assignments: Teredo, benchmarks, ORCHID
    "2001:db8::/32",  # documentation
    "2002::/16",  # 6to4: leads to any IPv4 address
    "3fff::/20",  # documentation
    "4000::/2",
    "8000::/1",  # fc00::/7 with clouds' metadata, fe80::/10, ff00::/8 among it
)
# What IANA's registry of special addresses does not call globally reachable, and multicast and reserved.
REFUSED4 = (
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",  # carriers' NAT; 100.100.100.200 is Alibaba's metadata
    "127.0.0.0/8",
    "168.63.129.16/32",  # Azure's metadata, public to look at
    "169.254.0.0/16",  # link-local; 169.254.169.254 is the other clouds' metadata
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
    """The host's end of a slot's interface: 15 characters, as many as the kernel allows."""
    return PREFIX + slot_id.rpartition("-")[2]


def gateway(network: Network) -> str:
    """The host's address in a range."""
    return str(network[GATEWAY])


def next_number(last: int, taken: Container[str], range4: Network) -> int:
    """The number after `last` whose address is not taken; after the last of the range the first.

    In a circle, so that an address rests as long as possible before another slot has it: what was
    sent to the one before is then not delivered to the next. Raises LookupError when none is free.
    """
    count = range4.num_addresses - 1 - FIRST  # without the last, a broadcast address to old programs
    for step in range(count):
        number = FIRST + (last + 1 - FIRST + step) % count
        if str(range4[number]) not in taken:
            return number
    raise LookupError(f"no address is free in {range4}")


def forwards_ipv6(root: Path = Path("/")) -> bool:
    """Whether the host forwards IPv6 and has a way to the internet.

    The operator decides that: a host that begins to forward IPv6 drops the routes that it learned
    from router advertisements. IPv4 knows forwarding interface by interface, and is ours to set.
    """
    try:
        if (root / "proc/sys/net/ipv6/conf/all/forwarding").read_text().strip() == "0":
            return False
        routes = (root / "proc/net/ipv6_route").read_text().splitlines()
    except OSError:
        return False
    columns = (line.split() for line in routes)
    # Destination, its prefix, then source; the last is the device. Unreachable defaults are on lo.
    return any(set(line[0]) == {"0"} and line[1] == "00" and line[-1] != "lo" for line in columns)
