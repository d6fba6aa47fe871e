# SPDX-License-Identifier: BSD-3-Clause
"""The host's other firewall rules: whether they drop packets of slots that the table `inet nbagent` accepts. Pure.

nftables drops a packet if any base chain does. Here the packets of a slot pass the rules of all other tables, as
`nft --json list ruleset` prints them. It omits the arguments of the matches that iptables made; those of connection
states, address types and lists of ports are read from the text that `nft --handle list ruleset` prints. Rules whose
conditions cannot be decided (a rate, a mark, the time) count as not matching, so a result is right for rules that
depend on interfaces, addresses, protocols, ports and connection states. Rules of iptables-legacy are not in the ruleset
of nftables.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any  # the documents of nft(8)

from nbagent.network.addresses import PREFIX
from nbagent.network.rules import TABLE

Key = tuple[str, str]
_SLOT = PREFIX + "000000000000"
_FAMILIES = {4: ("ip", "inet"), 6: ("ip6", "inet")}
_PUBLIC = {4: "8.8.8.8", 6: "2001:4860:4860::8888"}
_DROPS = ("drop", "reject")
_ENDS = ("accept", "drop", "reject", "return", "jump", "goto", "queue")
# Extensions of iptables, by the names that JSON has, and the condition in the text for those that are one.
_CONDITIONS = {
    "conntrack": re.compile(r"ct state (?P<not>!= )?(?P<values>[a-z,]+)"),
    "addrtype": re.compile(r"fib daddr type (?P<not>!= )?(?P<values>[a-z]+)"),
    "multiport": re.compile(r"(?P<protocol>tcp|udp) (?P<field>[sd]port) (?P<not>!= )?\{ (?P<values>[0-9, -]+) \}"),
}
_SAME_CONDITION = {"state": "conntrack"}
_WITHOUT_EFFECT = ("comment", "LOG", "NFLOG")
# A rule may jump to a chain that jumps; nftables permits 16 levels.
_DEPTH_MAX = 16


@dataclass(frozen=True)
class Packet:
    """A packet of a slot: the hooks that it passes, and the fields that rules compare."""

    what: str
    version: int
    hooks: tuple[str, ...]
    fields: Mapping[Key, str | int]


@dataclass(frozen=True)
class Chain:
    """A base chain that drops a packet of slots."""

    family: str
    table: str
    name: str
    hook: str
    packet: Packet
    chains: tuple[str, ...]  # the names of all chains of the table
    of_iptables: bool

    def __str__(self) -> str:
        return f"{self.family} {self.table} {self.name} drops {self.packet.what}"


def packets(
    version: int, uplink: str, slot: str, resolver: str, to: tuple[str, int] | None = None
) -> list[Packet]:
    """The packets of a connection of a slot by `uplink`, if there is one, to the address and port `to`, and of a query
    to the host's resolver, which has an IPv4 address only.
    """
    through = ("prerouting", "forward", "postrouting")
    peer, port = to or (_PUBLIC[version], 443)
    tcp, udp = ("tcp", 6), ("udp", 17)
    found = [
        Packet(f"IPv{version} connections of slots", version, through,
               _fields(version, tcp, (_SLOT, uplink), (slot, peer), (40000, port), "new")),
        Packet(f"IPv{version} responses to slots", version, through,
               _fields(version, tcp, (uplink, _SLOT), (peer, slot), (port, 40000), "established")),
    ] if uplink else []
    if version == 4:
        found += [
            Packet("queries of slots to the host's resolver", 4, ("prerouting", "input"),
                   _fields(4, udp, (_SLOT, ""), (slot, resolver), (40000, 53), "new")),
            Packet("responses of the host's resolver", 4, ("output", "postrouting"),
                   _fields(4, udp, ("", _SLOT), (resolver, slot), (53, 40000), "established")),
        ]
    return found


def _fields(
    version: int, protocol: tuple[str, int], interfaces: tuple[str, str], addresses: tuple[str, str],
    ports: tuple[int, int], state: str,
) -> dict[Key, str | int]:
    name, number = protocol
    ip = "ip" if version == 4 else "ip6"
    return {
        ("meta", "iifname"): interfaces[0], ("meta", "iif"): interfaces[0],
        ("meta", "oifname"): interfaces[1], ("meta", "oif"): interfaces[1],
        ("meta", "nfproto"): f"ipv{version}", ("meta", "protocol"): ip, ("meta", "l4proto"): name,
        (ip, "saddr"): addresses[0], (ip, "daddr"): addresses[1],
        ("ip", "protocol"): name if version == 4 else "", ("ip6", "nexthdr"): name if version == 6 else "",
        (name, "sport"): ports[0], (name, "dport"): ports[1], ("th", "sport"): ports[0], ("th", "dport"): ports[1],
        ("ct", "state"): state, ("ct", "status"): "confirmed",
        ("ct", "direction"): "original" if state == "new" else "reply",
        ("fib", "type"): "unicast" if interfaces[1] else "local",
        ("meta", "l4number"): number,
    }


class Ruleset:
    """The outputs of `nft --json list ruleset` and `nft --handle list ruleset`.

    Raises ValueError, KeyError or TypeError for another document.
    """

    def __init__(self, document: Mapping[str, Any], text: str) -> None:
        texts = dict(_texts(text))
        self._chains: dict[tuple[str, str, str], dict[str, Any]] = {}
        self._rules: dict[tuple[str, str, str], list[list[dict[str, Any]]]] = {}
        self._sets: dict[tuple[str, str, str], list[Any]] = {}
        self.tables: set[str] = set()
        # By the extensions in their rules, which nft cannot create.
        self._of_iptables: set[tuple[str, str]] = set()
        for item in document["nftables"]:
            for kind, found in item.items():
                if kind == "table":
                    self.tables.add(f"{found['family']} {found['name']}")
                elif kind == "chain":
                    self._chains[found["family"], found["table"], found["name"]] = found
                elif kind == "rule":
                    key = found["family"], found["table"], found["chain"]
                    text = texts.get((found["family"], found["table"], found["handle"]), "")
                    self._rules.setdefault(key, []).append(_translated(found["expr"], text))
                    if any("xt" in statement for statement in found["expr"]):
                        self._of_iptables.add((found["family"], found["table"]))
                elif kind in ("set", "map"):
                    self._sets[found["family"], found["table"], found["name"]] = found.get("elem", [])

    def dropping(self, packets: Sequence[Packet]) -> Iterator[Chain]:
        """The base chains of other tables that drop one of the packets, at most one chain for each packet."""
        for packet in packets:
            for (family, table, name), chain in sorted(self._chains.items(), key=lambda item: item[1].get("prio", 0)):
                if f"{family} {table}" == TABLE or family not in _FAMILIES[packet.version]:
                    continue
                if chain.get("hook") not in packet.hooks or chain.get("type") == "nat":
                    continue
                verdict = self._verdict(packet, (family, table), name, 0) or chain.get("policy", "accept")
                if verdict in _DROPS:
                    names = tuple(known for f, t, known in self._chains if (f, t) == (family, table))
                    of_iptables = (family, table) in self._of_iptables
                    yield Chain(family, table, name, chain["hook"], packet, names, of_iptables)
                    break

    def _verdict(self, packet: Packet, table: tuple[str, str], chain: str, depth: int) -> str:
        """"accept", "drop" or "reject"; "" at the end of the chain."""
        for statements in self._rules.get((*table, chain), []) if depth <= _DEPTH_MAX else []:
            for kind, argument in self._reached(packet, table, statements):
                if kind in ("jump", "goto"):
                    verdict = self._verdict(packet, table, argument["target"], depth + 1)
                    if verdict or kind == "goto":
                        return verdict
                elif kind == "return":
                    return ""
                else:
                    return "accept" if kind == "queue" else kind
        return ""

    def _reached(
        self, packet: Packet, table: tuple[str, str], statements: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[str, Any]]:
        """The verdict of a rule, if the packet reaches it."""
        for statement in statements:
            for kind, argument in statement.items():
                if kind == "match":
                    holds = self._holds(packet, table, argument["left"], argument["right"])
                    if holds is None or holds == (argument["op"] == "!="):
                        return
                    if argument["op"] not in ("==", "!=", "in"):
                        return
                elif kind == "vmap":
                    yield from self._mapped(packet, table, argument)
                elif kind in _ENDS:
                    yield kind, argument
                elif kind not in ("counter", "log", "comment", "notrack", "mangle"):
                    return  # for example a limit, or a match of iptables

    def _mapped(
        self, packet: Packet, table: tuple[str, str], argument: Mapping[str, Any]
    ) -> Iterator[tuple[str, Any]]:
        data = argument["data"]
        pairs = self._sets.get((*table, data[1:]), []) if isinstance(data, str) else data["set"]
        for key, verdict in pairs:
            if self._holds(packet, table, argument["key"], key):
                yield from verdict.items()
                return

    def _holds(self, packet: Packet, table: tuple[str, str], left: Any, right: Any) -> bool | None:
        """Whether a field of the packet is equal to `right` or is in it; None when this cannot be decided."""
        if not isinstance(left, dict) or len(left) != 1:
            return None
        ((kind, argument),) = left.items()
        if kind == "payload" and "protocol" in argument:
            key = argument["protocol"], argument["field"]
            if key[0] in ("ip", "ip6", "tcp", "udp", "th", "icmp", "icmpv6", "sctp", "dccp") and not any(
                known == key[0] for known, _ in packet.fields
            ):
                return False  # a packet of another protocol
        elif kind in ("meta", "ct") and isinstance(argument, dict):
            key = kind, argument["key"]
        elif kind == "fib" and argument.get("result") == "type" and "daddr" in argument.get("flags", ()):
            key = "fib", "type"
        else:
            return None
        value = packet.fields.get(key)
        return None if value is None else self._contains(table, right, value, packet)

    def _contains(self, table: tuple[str, str], right: Any, value: str | int, packet: Packet) -> bool | None:
        if isinstance(right, str) and right.startswith("@"):
            right = self._sets.get((*table, right[1:]))
        if isinstance(right, dict):
            if "set" in right:
                right = right["set"]
            elif "range" in right:
                low, high = map(_ordered, right["range"])
                return low <= _ordered(value) <= high if type(low) is type(_ordered(value)) else False
            elif "prefix" in right:
                network = ipaddress.ip_network(f"{right['prefix']['addr']}/{right['prefix']['len']}", strict=False)
                return ipaddress.ip_address(value) in network
            elif "elem" in right:
                right = right["elem"]["val"]
            else:
                return None
        if isinstance(right, list):
            found = [self._contains(table, one, value, packet) for one in right]
            return True if True in found else None if None in found else False
        if right is None:
            return None
        if isinstance(right, str) and right.endswith("*"):
            return str(value).startswith(right[:-1])
        return right in (value, packet.fields["meta", "l4number"] if value in ("tcp", "udp") else value)


def _texts(text: str) -> Iterator[tuple[tuple[str, str, int], str]]:
    """The text of each rule by family, table and handle."""
    table = ("", "")
    for line in text.splitlines():
        if found := re.match(r"table (\S+) (\S+) \{", line):
            table = found[1], found[2]
        elif found := re.search(r"^\t\t(.*) # handle (\d+)$", line):
            yield (*table, int(found[2])), found[1]


def _translated(statements: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The statements of a rule, with the extensions of iptables as statements of nft where these are known."""
    found = []
    names = [_extension(statement) for statement in statements]
    conditions = {kind: list(pattern.finditer(text)) for kind, pattern in _CONDITIONS.items()}
    for name, statement in zip(names, statements, strict=True):
        if name == "REJECT":
            found.append({"reject": None})
        elif name in conditions and len(conditions[name]) == names.count(name):
            found.append(_condition(name, conditions[name][names[: len(found)].count(name)]))
        elif name not in _WITHOUT_EFFECT:
            found.append(statement)
        else:
            found.append({"comment": None})
    return found


def _extension(statement: Mapping[str, Any]) -> str:
    """The name of the extension of iptables that a statement stands for; "" for a statement of nft."""
    name = str((statement.get("xt") or {}).get("name", ""))
    return _SAME_CONDITION.get(name, name)


def _condition(name: str, found: re.Match[str]) -> dict[str, Any]:
    left: dict[str, Any]
    values: list[Any] = found["values"].split(",")
    if name == "conntrack":
        left = {"ct": {"key": "state"}}
    elif name == "addrtype":
        left = {"fib": {"result": "type", "flags": ["daddr"]}}
    else:
        left = {"payload": {"protocol": found["protocol"], "field": found["field"]}}
        ranges = [[int(port) for port in value.split("-")] for value in values]
        values = [{"range": [ports[0], ports[-1]]} for ports in ranges]
    return {"match": {"op": "!=" if found["not"] else "in", "left": left, "right": values}}


def _ordered(value: Any) -> Any:
    """A port or an address, so that it can be compared."""
    return value if isinstance(value, int) else ipaddress.ip_address(value)


def remedy(chain: Chain) -> str:
    """The commands that let packets of slots pass, for the program that made the chain."""
    interfaces = PREFIX + "+"
    if chain.table == "firewalld":
        return f"firewall-cmd --permanent --zone=trusted --add-interface={interfaces} && firewall-cmd --reload"
    if any(name.startswith(("ufw-", "ufw6-")) for name in chain.chains):
        return f"ufw route allow in on {interfaces} && ufw allow in on {interfaces} to any port 53"
    iptables = "iptables" if chain.family == "ip" else "ip6tables"
    accept = "-j ACCEPT"
    established = f"-o {interfaces} -m conntrack --ctstate ESTABLISHED,RELATED {accept}"
    if "DOCKER-USER" in chain.chains and chain.hook == "forward":
        commands = f"{iptables} -I DOCKER-USER -i {interfaces} {accept}; {iptables} -I DOCKER-USER {established}"
        return f"{commands}; and the same by ExecStartPost= in a drop-in of docker.service, for the next boot"
    if chain.of_iptables:
        # A rule of nft in its table would make iptables fail.
        insert = f"{iptables} -t {chain.table} -I {chain.name}"
        rules = {
            "input": [f"-i {interfaces} -p udp --dport 53 {accept}"], "output": [f"-o {interfaces} {accept}"],
        }.get(chain.hook, [f"-i {interfaces} {accept}", established])
    else:
        insert = f"nft insert rule {chain.family} {chain.table} {chain.name}"
        rules = {
            "input": [f'iifname "{PREFIX}*" udp dport 53 accept'], "output": [f'oifname "{PREFIX}*" accept'],
        }.get(chain.hook, [
            f'iifname "{PREFIX}*" accept', f'oifname "{PREFIX}*" ct state established,related accept',
        ])
    commands = "; ".join(f"{insert} {rule}" for rule in rules)
    return f"{commands}; and add the same rules to the file that creates this table"
