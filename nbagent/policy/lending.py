# SPDX-License-Identifier: BSD-3-Clause
"""Whether a slot is lent to a visitor of the landing page, whose browser loads the notebook before the click. Pure.

A lent slot costs what a claimed one does, and most visitors do not click. So the host lends only what it has plenty of,
and a visitor's claim never waits for a slot that is lent to another one.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from nbagent.policy import admission
from nbagent.policy.admission import Host

# How long a slot is lent. A page of JupyterLab loads in 2 to 6 s.
LENT_S = 60.0
# Most lent slots at a time: of the host's capacity, and of one client.
SHARE_MAX, CLIENT_MAX = 1 / 10, 4
# The part of the host's capacity that is in use, from which on nothing is lent.
FULL = 1 / 2


@dataclass(frozen=True)
class Stock:
    """The warm slots of an image, the number that its pool wants, and the lent slots: all, and those of one client."""

    warm: int
    wanted: int
    lent: int
    lent_to_client: int


def obstacle(host: Host, stock: Stock) -> str | None:
    """The reason why no slot is lent now, None if one may be."""
    if host.draining:
        return "the host is draining"
    if host.live >= host.capacity * FULL:
        return f"{host.live} of {host.capacity} slots are in use"
    if host.memory_available_bytes <= host.memory_reserve_bytes:
        return "the host's memory is low"
    # Pressure on processors needs no rule, because it slows the pool, so that few slots are warm.
    if admission.is_short(host.pressure, host.memory_available_bytes, host.kept_bytes):
        return "processes of the host wait for memory"
    if stock.warm <= stock.wanted // 2:
        return f"only {stock.warm} of {stock.wanted} warm slots are left"
    if stock.lent >= max(1, int(host.capacity * SHARE_MAX)):
        return f"{stock.lent} slots are lent"
    if stock.lent_to_client >= CLIENT_MAX:
        return f"{stock.lent_to_client} slots are lent to this client"
    return None


def client_network(client: str) -> str:
    """The network that counts as one client: an IPv4 address, or the /64 of an IPv6 address."""
    try:
        address = ipaddress.ip_address(client.partition("%")[0])
    except ValueError:
        return client
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
