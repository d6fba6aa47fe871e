"""What the network service does to the host: interfaces, addresses, routes, our table in nftables.

The kernel holds all of it, so whoever does the next call may be another process. Every act may be
repeated. What is open is written at the interface itself, as its alias in `ip link`, and from
there the table is filled again when somebody flushed all rules of the host.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from nftables import Nftables
from pyroute2 import IPRoute, NetlinkError

from nbagent.linux import rtnetlink
from nbagent.network.addresses import PREFIX, gateway
from nbagent.network.rules import COUNTED, PER_SLOT, TABLE, Rules, render

# Both ends of a slot's interface have this address, and neither asks for the other's: nobody can answer for another,
# and no table of neighbours fills up. The second bit says that it is locally administered.
MAC = "02:6e:62:61:67:74"
LABEL = "lo:nbagent"
OPEN, CLOSED = "internet", "closed"
MTU = 1500
# Any public address: nothing is sent there, it is looked up in the host's routes.
PUBLIC = "8.8.8.8"
SYSCTL = Path("/proc/sys/net")
_SCOPE_HOST = 254
_NETLINK_NETFILTER = 12
_NFNLGRP_NFTABLES = 7
_NFT_DELTABLE = 10 << 8 | 2


class NftFailed(OSError):
    """nftables refused a command."""


class HostNetwork:
    """The network of one host. Needs CAP_NET_ADMIN. Every method raises OSError or NetlinkError."""

    def __init__(self) -> None:
        self._nft = Nftables()
        self._ip: Any = IPRoute()
        # As in the set of that name, for the moment in which somebody has flushed it.
        self._guarded: set[str] = set()
        if self.is_applied():
            self._guarded = {name for name, in self._elements("guarded")}

    def close(self) -> None:
        """Closes the netlink socket."""
        self._ip.close()

    # -- what all slots share ------------------------------------------------------------------

    def apply(self, rules: Rules) -> None:
        """Makes our table, or brings it up to date; then the resolver's address, and forwarding."""
        self._command(render(rules))
        for name in self._guarded:
            self._guard(name)
        for name, state, addresses in self._ends():
            if state == OPEN:
                self._admit(name, addresses)
        self._put_resolver(gateway(rules.range4))
        routes = self._ip.get_default_routes(family=socket.AF_INET)
        ways = {route.get_attr("RTA_OIF") for route in routes} - {None}
        for network in rules.named:
            ways |= self._ways_to(str(network[0])) if network.version == 4 else set()
        self._forward(ways)

    def is_applied(self) -> bool:
        """Whether our table is there; anybody may flush all rules of the host."""
        return f"table {TABLE}\n" in self._command("list tables inet")

    def _forward(self, ways: Iterable[int]) -> None:
        """Lets the host's ways out forward IPv4, if need be, for slots and for nobody else."""
        if (SYSCTL / "ipv4/ip_forward").read_text().strip() == "1":
            return  # somebody made this host a router; what it does for others is not ours to guard
        for index in ways:
            name = socket.if_indextoname(index)
            setting = SYSCTL / "ipv4/conf" / name / "forwarding"
            if name != "lo" and setting.read_text().strip() == "0":
                # First the guard, then what it guards.
                self._guarded.add(name)
                self._guard(name)
                setting.write_text("1")

    def remove_all(self) -> None:
        """Takes back everything that was ever made here."""
        self.sweep(())
        for name in self._guarded:
            with contextlib.suppress(OSError):
                (SYSCTL / "ipv4/conf" / name / "forwarding").write_text("0")
        if self.is_applied():
            self._command(f"delete table {TABLE}")
        self._put_resolver(None)

    # -- one slot ------------------------------------------------------------------------------

    def attach(self, name: str, inner: str, netns_fd: int, addresses: Collection[str], rate: int) -> None:
        """Makes a slot's interface, closed; its `inner` end is in the network namespace.

        `rate` is what the slot may receive, in bytes a second.
        """
        if name in (known for _, known in socket.if_nameindex()):
            self.remove(name, addresses)  # asked again, as the answer to the first time was lost
        # Asked anew for each, as the host's way out may be another by now; and by one question to the kernel, not by
        # reading all routes, of which each slot is one.
        ways = self._ways_to(PUBLIC)
        self._forward(ways)
        mtu = self._mtu(ways)
        peer = {"ifname": inner, "address": MAC, "mtu": mtu, "net_ns_fd": netns_fd}
        self._ip.link("add", ifname=name, kind="veth", address=MAC, mtu=mtu, peer=peer)
        index = socket.if_nametoindex(name)
        self._ip.link("set", index=index, ifalias=" ".join((CLOSED, *addresses)))
        (SYSCTL / "ipv4/conf" / name / "forwarding").write_text("1")
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            # 1: no link-local address; the host says nothing to a slot on its own.
            (SYSCTL / "ipv6/conf" / name / "addr_gen_mode").write_text("1")
        rtnetlink.shape(index, rate)
        rtnetlink.bring_up(index)
        for address in addresses:
            bits = 128 if ":" in address else 32
            self._ip.route("add", dst=f"{address}/{bits}", oif=index, scope="link" if bits == 32 else "universe")

    def open(self, name: str) -> None:
        """Lets a slot's packets through. Raises OSError when it has no interface."""
        index = socket.if_nametoindex(name)
        for known, _, addresses in self._ends(index):
            if known == name:
                self._ip.link("set", index=index, ifalias=" ".join((OPEN, *addresses)))
                self._admit(name, addresses)

    def remove(self, name: str, addresses: Collection[str]) -> None:
        """Takes a slot's interface away, and all that was remembered of it; none of it need be there."""
        for address in addresses:
            self._forget(f"slots{6 if ':' in address else 4}", name, address)
        for counted in COUNTED:
            self._forget(counted, name)
        with contextlib.suppress(OSError, NetlinkError):
            self._ip.link("del", index=socket.if_nametoindex(name))

    def sweep(self, keep: Collection[str]) -> None:
        """Removes every interface of ours, and every element of one, that is not among `keep`."""
        for chosen in PER_SLOT if self.is_applied() else ():
            for element in self._elements(chosen):
                if element[0] not in keep:
                    self._forget(chosen, *element)
        for index, name in socket.if_nameindex():
            if name.startswith(PREFIX) and name not in keep:
                with contextlib.suppress(NetlinkError):  # gone with its network namespace meanwhile
                    self._ip.link("del", index=index)

    # -- helpers -------------------------------------------------------------------------------

    def _admit(self, name: str, addresses: Iterable[str]) -> None:
        for address in addresses:
            self._command(f'add element {TABLE} slots{6 if ":" in address else 4} {{ "{name}" . {address} }}')

    def _guard(self, name: str) -> None:
        self._command(f'add element {TABLE} guarded {{ "{name}" }}')

    def _forget(self, chosen: str, name: str, *rest: str) -> None:
        """Takes an element out of a set, if it is in it."""
        key = " . ".join((f'"{name}"', *rest))
        self._nft.cmd(f"delete element {TABLE} {chosen} {{ {key} }}")

    def _elements(self, chosen: str) -> list[tuple[str, ...]]:
        """The elements of a set, each as its parts."""
        self._nft.set_json_output(True)
        try:
            answer = json.loads(self._command(f"list set {TABLE} {chosen}"))
        finally:
            self._nft.set_json_output(False)
        found = []
        for part in answer["nftables"]:
            for element in part.get("set", {}).get("elem", ()):
                # {"elem": {"val": ...}} where something is counted beside it; {"concat": [...]} where it has parts.
                value = element.get("elem", element) if isinstance(element, dict) else element
                value = value.get("val", value) if isinstance(value, dict) else value
                found.append(tuple(value["concat"]) if isinstance(value, dict) else (str(value),))
        return found

    def _ends(self, *index: int) -> Iterator[tuple[str, str, list[str]]]:
        """Our interfaces: name, whether open, addresses."""
        for link in self._ip.get_links(*index):
            name, alias = link.get_attr("IFLA_IFNAME"), link.get_attr("IFLA_IFALIAS") or ""
            if name.startswith(PREFIX) and alias.startswith((OPEN, CLOSED)):
                state, *addresses = alias.split()
                yield name, state, addresses

    def _put_resolver(self, wanted: str | None) -> None:
        """Our one address on lo. Of scope host: nothing the host says outside comes from it."""
        index = socket.if_nametoindex("lo")
        held = {
            message.get_attr("IFA_LOCAL"): message["prefixlen"]
            for message in self._ip.get_addr(family=socket.AF_INET, index=index)
            if message.get_attr("IFA_LABEL") == LABEL
        }
        for address, bits in held.items():
            if address != wanted:
                self._ip.addr("del", index=index, address=address, prefixlen=bits, label=LABEL)
        if wanted is not None and wanted not in held:
            self._ip.addr("add", index=index, address=wanted, prefixlen=32, label=LABEL, scope=_SCOPE_HOST)

    def _ways_to(self, address: str) -> set[int]:
        """The interface by which the host sends to an address; none when it has no route there."""
        with contextlib.suppress(NetlinkError, IndexError):
            return {self._ip.route("get", dst=address)[0].get_attr("RTA_OIF")}
        return set()

    def _mtu(self, ways: Iterable[int]) -> int:
        """Of the narrowest way out, so that no packet of a slot is too large for it."""
        return min((link.get_attr("IFLA_MTU") for way in ways for link in self._ip.get_links(way)), default=MTU)

    def _command(self, script: str) -> str:
        status, output, error = self._nft.cmd(script)
        if status:
            raise NftFailed(0, f"nft: {str(error).strip()[:500]}")
        return str(output)


def watch() -> socket.socket:
    """A socket that can be read whenever something in the host's nftables changed."""
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    try:
        events.bind((0, 1 << _NFNLGRP_NFTABLES - 1))
        events.setblocking(False)
    except BaseException:
        events.close()
        raise
    return events


def lost_table(events: socket.socket) -> bool:
    """Reads all events; whether a table may have gone with one of them."""
    lost = False
    while True:
        try:
            packet = events.recv(65536)
        except BlockingIOError:
            return lost
        except OSError:  # ENOBUFS: there were more than fit, and what they said is not known
            lost = True
            continue
        offset = 0
        while offset + 16 <= len(packet):
            length, kind = struct.unpack_from("=IH", packet, offset)
            lost = lost or kind == _NFT_DELTABLE
            offset += max(16, (length + 3) & ~3)
