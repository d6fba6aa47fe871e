# SPDX-License-Identifier: BSD-3-Clause
"""The slots' firewall as an nft(8) script. Pure: settings in, text out.

All rules are in one table, `inet nbagent`; tables of others are not changed. The rules are the same for all slots;
what differs between slots is in sets, whose elements are deleted with the slot:

    slots4, slots6          interface and address of every open slot; packets with any other source are dropped
    connections, rates,     counters and limits of each interface, added by the rules themselves
    questions, asking, streams
    answers4, answers6      addresses that allowed names resolved to, added by the resolver
    guarded                 interfaces of the host on which this service enabled forwarding, for slots only

An accept in this table does not override a drop in another table of the host.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from nbagent.core import paths
from nbagent.core.proxies import HttpProxy
from nbagent.network.addresses import PREFIX, REFUSED4, REFUSED6, Network, gateway

_OneFamily = TypeVar("_OneFamily", ipaddress.IPv4Network, ipaddress.IPv6Network)

TABLE = "inet nbagent"
# Written by the supervisor from its settings; read by the network service on request and at its start.
RULES_PATH = paths.NETWORK_RULES
# Sets whose elements begin with the name of a slot's interface. The rules themselves fill the counted ones.
COUNTED = ("connections", "rates", "questions", "asking", "streams")
OF_SLOTS = ("slots4", "slots6")
PER_SLOT = (*OF_SLOTS, *COUNTED)
# Sets whose elements are the same for all slots.
FIXED = ("refused4", "refused6", "named4", "named6")
GUARDED = "guarded"
# An address that an allowed name resolved to stays reachable for this long after the last query.
ANSWER_LIFE = "1d"
# Queries to the resolver, a second and slot. A connection needs two (A and AAAA).
QUESTION_RATE = 100
# Source ports of a slot's queries that are in the host's connection tracking, where UDP stays for 30 s. The rate alone
# would permit 3,000, so that twenty slots could fill the table of a host with 65,536 entries.
ASKING = 1000
# TCP connections of a slot to the resolver, because dnsmasq serves 20 at a time (MAX_PROCS).
STREAMS = 2


@dataclass(frozen=True)
class Rules:
    """The settings that the rules depend on.

    `named` are ranges that slots reach even when they are private. With `closed`, slots reach only these and the
    addresses of allowed names. `proxy` is the address and the port of an HTTP proxy, which slots reach as well.
    """

    range4: ipaddress.IPv4Network
    range6: ipaddress.IPv6Network
    named: tuple[Network, ...]
    closed: bool
    connections: int
    connection_rate: int
    proxy: HttpProxy | None = None

    def save(self) -> dict[str, object]:
        """The fields as a JSON object."""
        return {
            "range4": str(self.range4), "range6": str(self.range6), "named": [str(n) for n in self.named],
            "closed": self.closed, "connections": self.connections, "connection_rate": self.connection_rate,
            "proxy": self.proxy,
        }

    @classmethod
    def restore(cls, saved: Mapping[str, Any]) -> Rules:
        """The inverse of `save`. Raises KeyError, TypeError or ValueError for malformed values."""
        return cls(
            ipaddress.IPv4Network(saved["range4"]), ipaddress.IPv6Network(saved["range6"]),
            tuple(ipaddress.ip_network(text) for text in saved["named"]),
            bool(saved["closed"]), int(saved["connections"]), int(saved["connection_rate"]),
            # Not in the file of a former version.
            HttpProxy(*saved["proxy"]) if saved.get("proxy") else None,
        )


def render(rules: Rules) -> str:
    """A script that creates or updates the table in one transaction and keeps the slots' elements."""
    refused4 = [*map(ipaddress.IPv4Network, REFUSED4), rules.range4]
    refused6 = [*map(ipaddress.IPv6Network, REFUSED6), rules.range6]
    return (
        _SETS
        + f"flush table {TABLE}\n"
        + _filled("refused4", refused4)
        + _filled("refused6", refused6)
        + _filled("named4", [n for n in rules.named if isinstance(n, ipaddress.IPv4Network)])
        + _filled("named6", [n for n in rules.named if isinstance(n, ipaddress.IPv6Network)])
        + _CHAINS % {
            "slots": f'"{PREFIX}*"',
            "resolver": gateway(rules.range4),
            "connections": rules.connections,
            "rate": f"{rules.connection_rate}/second burst {2 * rules.connection_rate}",
            "asking": ASKING,
            "streams": STREAMS,
            "questions": f"{QUESTION_RATE}/second burst {2 * QUESTION_RATE}",
            "proxy": _proxy_rule(rules.proxy),
            "rest": _CLOSED if rules.closed else "goto counted",
        }
    )


def _proxy_rule(proxy: HttpProxy | None) -> str:
    if proxy is None:
        return "# no proxy"
    return f"ip{'' if proxy.version == 4 else 6} daddr {proxy.address} tcp dport {int(proxy.port)} goto counted"


def _filled(name: str, networks: Iterable[_OneFamily]) -> str:
    elements = ", ".join(str(network) for network in ipaddress.collapse_addresses(networks))
    fill = f"add element {TABLE} {name} {{ {elements} }}\n" if elements else ""
    return f"flush set {TABLE} {name}\n{fill}"


_SETS = f"""\
table {TABLE} {{
    set slots4 {{ type ifname . ipv4_addr; }}
    set slots6 {{ type ifname . ipv6_addr; }}
    set refused4 {{ type ipv4_addr; flags interval; }}
    set refused6 {{ type ipv6_addr; flags interval; }}
    set named4 {{ type ipv4_addr; flags interval; }}
    set named6 {{ type ipv6_addr; flags interval; }}
    set answers4 {{ type ipv4_addr; size 65536; timeout {ANSWER_LIFE}; }}
    set answers6 {{ type ipv6_addr; size 65536; timeout {ANSWER_LIFE}; }}
    set connections {{ type ifname; size 65536; flags dynamic; }}
    set rates {{ type ifname; size 65536; flags dynamic; }}
    set questions {{ type ifname; size 65536; flags dynamic; }}
    set asking {{ type ifname; size 65536; flags dynamic; }}
    set streams {{ type ifname; size 65536; flags dynamic; }}
    set guarded {{ type ifname; }}
}}
"""

_CLOSED = """ip daddr @answers4 goto counted
        ip6 daddr @answers6 goto counted
        goto refused"""

_CHAINS = """\
table inet nbagent {
    # Connection tracking (priority -200) reassembles fragments first, at priority -400, in one memory for all senders
    # (net.ipv4.ipfrag_high_thresh, 4 MiB). So fragments of slots are dropped before that.
    chain fragments {
        type filter hook prerouting priority -450; policy accept;
        iifname %(slots)s ip frag-off & 0x3fff != 0 drop
        iifname %(slots)s exthdr frag exists drop
    }

    # Priority raw comes before connection tracking, so that a packet with a forged source address, or from an
    # interface that is not open, creates no conntrack entry.
    chain arrival {
        type filter hook prerouting priority raw; policy accept;
        iifname %(slots)s goto source
    }
    chain source {
        iifname . ip saddr @slots4 accept
        iifname . ip6 saddr @slots6 accept
        drop
    }

    # Before tables at priority filter, such as those of iptables and ufw, which would drop without a response what is
    # refused here at once. The other tables see the packets that are accepted here.
    chain forward {
        type filter hook forward priority filter - 5; policy accept;
        oifname %(slots)s goto inward
        iifname %(slots)s goto outward
        # Forwarding was enabled on these interfaces for slots only; the host does not become a router for others.
        meta nfproto ipv4 iifname @guarded drop
    }
    chain inward {
        ct state established,related accept
        iifname %(slots)s goto refused
        drop
    }
    chain outward {
        ct state established,related accept
        ct state invalid drop
        # A destination that another table rewrote, such as a published port of a container, is part of the host.
        ct status dnat goto refused
        %(proxy)s
        ip daddr @named4 goto counted
        ip6 daddr @named6 goto counted
        ip daddr @refused4 goto refused
        ip6 daddr @refused6 goto refused
        %(rest)s
    }
    chain counted {
        meta l4proto != { tcp, udp, icmp, ipv6-icmp } goto refused
        add @connections { iifname ct count over %(connections)d } goto refused
        update @rates { iifname limit rate over %(rate)s packets } goto refused
        accept
    }
    # Refuse instead of drop, so that programs fail at once. TCP gets a reset, because the kernel limits the rate of
    # ICMP errors but not of resets.
    chain refused {
        meta l4proto tcp reject with tcp reset
        reject with icmpx admin-prohibited
    }

    # Slots reach no address of the host except its resolver.
    chain input {
        type filter hook input priority filter - 5; policy accept;
        iifname %(slots)s goto host
        # The kernel accepts packets to an address of lo on every interface (weak host model).
        iifname != "lo" ip daddr %(resolver)s drop
    }
    chain host {
        ip daddr %(resolver)s udp dport 53 goto question
        ip daddr %(resolver)s tcp dport 53 goto stream
        goto refused
    }
    chain question {
        # Every packet counts, because one source port can carry any number of queries.
        update @questions { iifname limit rate over %(questions)s packets } goto refused
        ct state established accept
        add @asking { iifname ct count over %(asking)d } goto refused
        accept
    }
    chain stream {
        ct state established accept
        add @streams { iifname ct count over %(streams)d } goto refused
        accept
    }
    # The host opens no connection to a slot, and sends no multicast or discovery packets to it.
    chain output {
        type filter hook output priority filter; policy accept;
        oifname %(slots)s ct state established,related accept
        oifname %(slots)s drop
    }

    chain departure {
        type nat hook postrouting priority srcnat; policy accept;
        iifname %(slots)s masquerade
    }
}
"""
