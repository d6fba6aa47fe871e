# SPDX-License-Identifier: BSD-3-Clause
"""rtnetlink(7) for the slot's end of its interface: state, address, route, and the token bucket of both ends.

Written by hand because it runs in a slot's network namespace under an image's own Python, where pyroute2 is not
installed; `network.netlink` uses pyroute2 on the host. Standard library only; Python 3.9 and up. Every function
that sends a request raises OSError with the errno of the kernel's acknowledgement.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Dict, Tuple

NLM_F_REQUEST, NLM_F_ACK, NLM_F_REPLACE, NLM_F_CREATE = 0x1, 0x4, 0x100, 0x400
NLMSG_ERROR = 2
RTM_NEWLINK, RTM_NEWADDR, RTM_NEWROUTE, RTM_NEWQDISC = 16, 20, 24, 36
IFF_UP, IFF_NOARP = 0x1, 0x80
LOOPBACK_INDEX = 1
IFA_ADDRESS, IFA_LOCAL = 1, 2
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY = 1, 4, 5, 6
RT_TABLE_MAIN, RT_TABLE_LOCAL, RTPROT_STATIC, RTN_UNICAST, RTNH_F_ONLINK = 254, 255, 4, 1, 4
TCA_KIND, TCA_OPTIONS = 1, 2
TCA_TBF_PARMS, TCA_TBF_BURST = 1, 6
TC_H_ROOT = 0xFFFFFFFF
TC_LINKLAYER_ETHERNET = 1
NLA_F_NESTED = 0x8000
_RESPONSE_BYTES = 65536


def bring_up_loopback() -> None:
    """Brings up `lo` of this network namespace, whose interface index is always 1."""
    _request(RTM_NEWLINK, 0, struct.pack("=BxHiII", socket.AF_UNSPEC, 0, LOOPBACK_INDEX, IFF_UP, IFF_UP))


def bring_up(index: int) -> None:
    """Brings an interface up with IFF_NOARP, because both ends of a slot's veth pair have the same MAC address."""
    flags = IFF_UP | IFF_NOARP
    _request(RTM_NEWLINK, 0, struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, flags, flags))


def add_address(index: int, address: str) -> None:
    """Adds an IPv4 or IPv6 address as a host address (/32 or /128), so that no network route comes with it."""
    family, packed = _packed(address)
    body = struct.pack("=BBBBI", family, 8 * len(packed), 0, 0, index)
    _request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, body, {IFA_LOCAL: packed, IFA_ADDRESS: packed})


def add_route(index: int, destination: str, gateway: str, table: int = RT_TABLE_MAIN) -> None:
    """Adds a route to `destination`, ADDRESS/BITS; RTNH_F_ONLINK, because `gateway` is in no network of the interface.

    With metric 1 it precedes the routes that the kernel makes for IPv6, whose metric is 256.
    """
    network, _, bits = destination.partition("/")
    family, packed = _packed(gateway)
    body = struct.pack(
        "=BBBBBBBBI", family, int(bits), 0, 0, table, RTPROT_STATIC, 0, RTN_UNICAST, RTNH_F_ONLINK
    )
    attributes = {RTA_DST: _packed(network)[1], RTA_GATEWAY: packed, RTA_OIF: struct.pack("=I", index),
                  RTA_PRIORITY: struct.pack("=I", 1)}
    _request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, body, attributes)


def token_bucket(rate: int) -> Tuple[int, int]:
    """`burst` and `limit` in bytes of a tc-tbf(8) queue that sends `rate` bytes a second.

    The bucket holds 10 ms of traffic, but at least 64 KiB: tbf cannot send a GSO packet larger than its bucket in one
    piece. The queue behind it holds 100 ms; tbf drops the packets beyond that, so that TCP slows down.
    """
    burst = max(65536, rate // 100)
    return burst, burst + max(65536, rate // 10)


def shape(index: int, rate: int) -> None:
    """Limits an interface to sending `rate` bytes a second, by a tbf queueing discipline at its root."""
    burst, limit = token_bucket(rate)
    ratespec = struct.pack("=BBHhHI", 0, TC_LINKLAYER_ETHERNET, 0, -1, 0, rate)
    parameters = ratespec + bytes(12) + struct.pack("=III", limit, 0, 0)
    options = _attribute(TCA_TBF_PARMS, parameters) + _attribute(TCA_TBF_BURST, struct.pack("=I", burst))
    body = struct.pack("=BxxxiIII", socket.AF_UNSPEC, index, 0x10000, TC_H_ROOT, 0)
    attributes = {TCA_KIND: b"tbf\0", TCA_OPTIONS | NLA_F_NESTED: options}
    _request(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, body, attributes)


def _request(kind: int, flags: int, body: bytes, attributes: Dict[int, bytes] = {}) -> None:  # noqa: B006  read only
    payload = body + b"".join(_attribute(*attribute) for attribute in attributes.items())
    header = struct.pack("=IHHII", 16 + len(payload), kind, flags | NLM_F_REQUEST | NLM_F_ACK, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.send(header + payload)
        response = netlink.recv(_RESPONSE_BYTES)
    _, response_kind = struct.unpack_from("=IH", response)
    (error,) = struct.unpack_from("=i", response, 16)
    if response_kind != NLMSG_ERROR or error:
        raise OSError(-error, os.strerror(-error))


def _attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + bytes(-length % 4)


def _packed(address: str) -> Tuple[int, bytes]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return int(family), socket.inet_pton(family, address)
