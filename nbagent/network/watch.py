# SPDX-License-Identifier: BSD-3-Clause
"""Changes by other programs to state of the host that slots need: netlink notifications as a list of checks.

An administrator's command, sysctl(8), systemd-networkd, Docker and `nft flush ruleset` change state that the network
service sets once for a slot. Most notifications are about changes of this service itself, once or more for each slot
that starts or ends. So a notification leads to a check only if it reports a state that a working slot never has, or a
change of the table's rules, which this service makes only when it applies settings.
"""

from __future__ import annotations

import enum
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from nbagent.network.addresses import LABEL, PREFIX
from nbagent.network.rules import FIXED, GUARDED, OF_SLOTS, TABLE

# IFF_UP and IFF_NOARP
FLAGS = 0x1 | 0x80
_NETLINK_NETFILTER = 12
_NFNLGRP_NFTABLES = 7
_NFNL_SUBSYS_NFTABLES = 10
_NFPROTO_INET = 1
# Numbers of linux/netfilter/nf_tables.h. The name of the table is attribute 1 in messages about any object.
_NFTA_TABLE, _NFTA_SET_ELEM_LIST_SET, _NFTA_SET_ELEM_LIST_ELEMENTS = 1, 2, 3
_NFTA_SET_ELEM_KEY, _NFTA_DATA_VALUE = 1, 1
_IFNAMSIZ = 16
# The flags of nested attributes and of byte order (linux/netlink.h).
_NLA_TYPE_MASK = 0x3FFF
# Numbers of linux/rtnetlink.h, linux/if_link.h and linux/netconf.h.
_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_ROUTE, _IPV4_NETCONF = 1, 5, 7, 11, 24
_IFLA_IFNAME, _IFLA_IFALIAS = 3, 20
_IFA_LABEL = 3
_RTA_OIF, _RTN_MULTICAST = 4, 5
_NETCONFA_IFINDEX, _NETCONFA_FORWARDING, _NETCONFA_IFINDEX_ALL = 1, 2, -1


class _Kind(enum.IntEnum):
    """Types of rtnetlink's messages."""

    NEWLINK = 16
    DELADDR = 21
    NEWROUTE = 24
    DELROUTE = 25
    NEWNETCONF = 80


class _Rules(enum.IntEnum):
    """Types of nftables' messages, without those of requests for objects."""

    NEWTABLE = 0
    DELTABLE = 2
    NEWCHAIN = 3
    DELCHAIN = 5
    NEWRULE = 6
    DELRULE = 8
    NEWSET = 9
    DELSET = 11
    NEWSETELEM = 12
    DELSETELEM = 14


@dataclass
class Changes:
    """A list of checks. Interfaces are given by index; most of them are not of slots."""

    table: bool = False  # the nftables table may be missing, or its rules changed
    elements: set[str] = field(default_factory=set)  # names of interfaces whose elements were deleted from sets
    everything: bool = False  # notifications were lost
    uplinks: bool = False
    resolver: bool = False
    forwarding: set[int] = field(default_factory=set)
    links: set[int] = field(default_factory=set)
    # Interfaces on which IPv6 was enabled. disable_ipv6=1 deletes the routes, and none can be added until it is 0.
    ipv6: set[int] = field(default_factory=set)

    def __bool__(self) -> bool:
        sets = self.elements or self.forwarding or self.links or self.ipv6
        return bool(self.table or self.everything or self.uplinks or self.resolver or sets)


def rules_socket() -> socket.socket:
    """A non-blocking netlink socket that becomes readable when the host's nftables ruleset changes."""
    return _subscribed(_NETLINK_NETFILTER, _NFNLGRP_NFTABLES)


def state_socket() -> socket.socket:
    """A non-blocking netlink socket for changes of interfaces, addresses, routes and forwarding."""
    return _subscribed(socket.NETLINK_ROUTE, _LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_ROUTE, _IPV4_NETCONF)


def read(events: socket.socket, changes: Changes) -> None:
    """Reads all pending notifications of a socket and adds to `changes`."""
    netfilter = events.proto == _NETLINK_NETFILTER
    while True:
        try:
            packet = events.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:  # ENOBUFS: the socket's buffer overflowed and notifications are lost
            changes.table = changes.table or netfilter
            changes.everything = True
            continue
        for kind, body in _messages(packet):
            if netfilter:
                add_rules(changes, kind, body)
            else:
                add(changes, kind, body)


def add_rules(changes: Changes, kind: int, body: bytes) -> None:
    """Adds what to check after one message about nftables objects; `body` begins after its netlink header."""
    found = _attributes(body, 4)
    table = found.get(_NFTA_TABLE, b"").rstrip(b"\0").decode(errors="replace")
    if kind >> 8 != _NFNL_SUBSYS_NFTABLES or body[:1] != bytes([_NFPROTO_INET]) or f"inet {table}" != TABLE:
        return
    match kind & 0xFF:
        case (
            _Rules.NEWTABLE | _Rules.DELTABLE | _Rules.NEWCHAIN | _Rules.DELCHAIN | _Rules.NEWRULE | _Rules.DELRULE
            | _Rules.NEWSET | _Rules.DELSET
        ):
            changes.table = True
        case _Rules.NEWSETELEM | _Rules.DELSETELEM as change:
            name = found.get(_NFTA_SET_ELEM_LIST_SET, b"").rstrip(b"\0").decode(errors="replace")
            changes.table = changes.table or name in (*FIXED, GUARDED)
            if change == _Rules.DELSETELEM and name in OF_SLOTS:
                changes.elements.update(_interfaces(found.get(_NFTA_SET_ELEM_LIST_ELEMENTS, b"")))


def _interfaces(elements: bytes) -> Iterator[str]:
    """The names of interfaces with which the keys of a list of set elements begin."""
    for _, element in _each_attribute(elements, 0):
        key = _attributes(_attributes(element, 0).get(_NFTA_SET_ELEM_KEY, b""), 0).get(_NFTA_DATA_VALUE, b"")
        yield key[:_IFNAMSIZ].rstrip(b"\0").decode(errors="replace")


def add(changes: Changes, kind: int, body: bytes) -> None:
    """Adds what to check after one message of rtnetlink(7); `body` begins after its header."""
    match kind:
        case _Kind.NEWNETCONF:
            _add_netconf(changes, _attributes(body, 4))
        case _Kind.NEWLINK:
            index, flags = struct.unpack_from("=iI", body, 4)
            found = _attributes(body, 16)
            ours = found.get(_IFLA_IFNAME, b"").startswith(PREFIX.encode())
            # The alias and the flags are set by one request, so that an interface without an alias is not complete.
            if ours and found.get(_IFLA_IFALIAS) and flags & FLAGS != FLAGS:
                changes.links.add(index)
        case _Kind.DELADDR:
            if _attributes(body, 8).get(_IFA_LABEL, b"").rstrip(b"\0") == LABEL.encode():
                changes.resolver = True
        case _Kind.NEWROUTE | _Kind.DELROUTE:
            _add_route(changes, kind, body)


def _add_netconf(changes: Changes, found: dict[int, bytes]) -> None:
    if _NETCONFA_FORWARDING not in found or _NETCONFA_IFINDEX not in found:
        return
    index, enabled = _integer(found[_NETCONFA_IFINDEX]), _integer(found[_NETCONFA_FORWARDING])
    if index == _NETCONFA_IFINDEX_ALL:
        changes.uplinks = True
    elif index > 0 and not enabled:
        changes.forwarding.add(index)


def _add_route(changes: Changes, kind: int, body: bytes) -> None:
    family, bits = struct.unpack_from("=BB", body)
    (route_type,) = struct.unpack_from("=B", body, 7)
    index = _integer(_attributes(body, 12).get(_RTA_OIF, bytes(4)))
    if kind == _Kind.DELROUTE and bits == (32 if family == socket.AF_INET else 128):
        changes.links.add(index)
    elif kind == _Kind.NEWROUTE and family == socket.AF_INET and bits < 32:
        changes.uplinks = True
    elif kind == _Kind.NEWROUTE and family == socket.AF_INET6 and route_type == _RTN_MULTICAST:
        # The kernel adds the route to ff00::/8 of an interface when it enables IPv6 there.
        changes.ipv6.add(index)


def _subscribed(protocol: int, *groups: int) -> socket.socket:
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
    try:
        events.bind((0, sum(1 << group - 1 for group in groups)))
        events.setblocking(False)
    except BaseException:
        events.close()
        raise
    return events


def _messages(packet: bytes) -> Iterator[tuple[int, bytes]]:
    """The type and the body of each netlink message of a packet."""
    offset = 0
    while offset + 16 <= len(packet):
        length, kind = struct.unpack_from("=IH", packet, offset)
        yield kind, packet[offset + 16:offset + length]
        offset += max(16, (length + 3) & ~3)


def _attributes(body: bytes, offset: int) -> dict[int, bytes]:
    """The attributes of a message by type, from `offset`, where its fixed part ends."""
    return dict(_each_attribute(body, offset))


def _each_attribute(body: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    while offset + 4 <= len(body):
        length, kind = struct.unpack_from("=HH", body, offset)
        yield kind & _NLA_TYPE_MASK, body[offset + 4:offset + length]
        offset += max(4, (length + 3) & ~3)


def _integer(value: bytes) -> int:
    return int(struct.unpack_from("=i", value)[0])
