"""The firewall of slots, as nft(8) reads it. Pure: settings in, text out.

One table is ours, `inet nbagent`, and nothing in another's is touched. What differs from slot to
slot is in its sets, so the rules are written once. A set's elements live as long as the slot:

    slots4, slots6          the addresses of each open interface: who is not in here gets nothing through
    connections, rates,     what is counted for each interface, filled by the rules themselves
    questions
    answers4, answers6      addresses that allowed names have led to, filled by the resolver
    guarded                 interfaces of the host that forward for us only, and for nobody else

A verdict of ours accepts nothing that another table of the host drops.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nbagent.core import paths
from nbagent.network.addresses import PREFIX, REFUSED4, REFUSED6, Network, gateway

TABLE = "inet nbagent"
# Written by the supervisor, whose settings these are; read by the service, whenever it starts too.
RULES_PATH = paths.NETWORK_RULES
# Sets whose elements begin with the name of a slot's interface.
COUNTED = ("connections", "rates", "questions")
PER_SLOT = ("slots4", "slots6", *COUNTED)
# A name's address is remembered a day longer than it was asked for.
ANSWER_LIFE = "1d"
# Questions to the resolver: a connection needs two, and a program that asks more often is in a loop.
QUESTION_RATE = 200


@dataclass(frozen=True)
class Rules:
    """What the rules depend on.

    `named` are ranges that are reached whatever they are; with `closed`, besides these only the
    addresses of allowed names.
    """

    range4: ipaddress.IPv4Network
    range6: ipaddress.IPv6Network
    named: tuple[Network, ...]
    closed: bool
    connections: int
    connection_rate: int

    def save(self) -> dict[str, Any]:
        """The rules' settings as JSON."""
        return {
            "range4": str(self.range4), "range6": str(self.range6), "named": [str(n) for n in self.named],
            "closed": self.closed, "connections": self.connections, "connection_rate": self.connection_rate,
        }

    @classmethod
    def restore(cls, saved: Mapping[str, Any]) -> Rules:
        """The same out of JSON. Raises KeyError, TypeError or ValueError when it is not that."""
        return cls(
            ipaddress.IPv4Network(saved["range4"]), ipaddress.IPv6Network(saved["range6"]),
            tuple(ipaddress.ip_network(text) for text in saved["named"]),
            bool(saved["closed"]), int(saved["connections"]), int(saved["connection_rate"]),
        )


def render(rules: Rules) -> str:
    """A script that makes the table, or brings it up to date at one moment; elements of slots stay."""
    refused4 = [*map(ipaddress.IPv4Network, REFUSED4), rules.range4]
    refused6 = [*map(ipaddress.IPv6Network, REFUSED6), rules.range6]
    return (
        _SETS
        + f"flush table {TABLE}\n"
        + _filled("refused4", refused4)
        + _filled("refused6", refused6)
        + _filled("named4", [n for n in rules.named if n.version == 4])
        + _filled("named6", [n for n in rules.named if n.version == 6])
        + _CHAINS % {
            "slots": f'"{PREFIX}*"',
            "resolver": gateway(rules.range4),
            "connections": rules.connections,
            "rate": f"{rules.connection_rate}/second burst {2 * rules.connection_rate}",
            "questions": f"{QUESTION_RATE}/second burst {2 * QUESTION_RATE}",
            "rest": _CLOSED if rules.closed else "goto counted",
        }
    )


def _filled(name: str, networks: Iterable[Any]) -> str:
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
    set guarded {{ type ifname; }}
}}
"""

_CLOSED = """ip daddr @answers4 goto counted
        ip6 daddr @answers6 goto counted
        goto refused"""

_CHAINS = """\
table inet nbagent {
    # Before anything else, and before a connection is remembered: a packet that does not come from the address
    # of its interface, or whose interface nobody opened, was never there.
    chain arrival {
        type filter hook prerouting priority raw; policy accept;
        iifname %(slots)s goto source
    }
    chain source {
        iifname . ip saddr @slots4 accept
        iifname . ip6 saddr @slots6 accept
        drop
    }

    chain forward {
        type filter hook forward priority filter; policy accept;
        oifname %(slots)s goto inward
        iifname %(slots)s goto outward
        # This interface of the host forwards since slots need it; that does not make the host a router for others.
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
        # What the host hands on to somewhere else, such as a container's port, is the host's.
        ct status dnat goto refused
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
    # At once, not by silence. A reset is not rationed as the kernel rations other refusals.
    chain refused {
        meta l4proto tcp reject with tcp reset
        reject with icmpx admin-prohibited
    }

    # The host is no place to go, but for its resolver.
    chain input {
        type filter hook input priority filter; policy accept;
        iifname %(slots)s goto host
        # The resolver's address is on lo, where by the kernel's custom every interface leads.
        iifname != "lo" ip daddr %(resolver)s drop
    }
    chain host {
        ip daddr %(resolver)s udp dport 53 goto question
        ip daddr %(resolver)s tcp dport 53 goto question
        goto refused
    }
    chain question {
        ct state established accept
        update @questions { iifname limit rate over %(questions)s packets } goto refused
        accept
    }
    # Nor does the host begin a conversation with a slot, not even by discovery or multicast.
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
