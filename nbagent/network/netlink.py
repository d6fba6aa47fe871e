# SPDX-License-Identifier: BSD-3-Clause
"""The host's side of the slots' network: interfaces, addresses, routes and forwarding. `table` has the firewall.

The kernel holds all state, so the network service can be restarted between any two calls, and every method can be
repeated. The alias of an interface (`ip link`) holds its state and the slot's addresses. The sets of the table are
filled from the aliases again after another program flushed the host's ruleset.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any  # pyroute2 has no types

from pyroute2 import IPRoute, NetlinkError

from nbagent.linux import rtnetlink
from nbagent.network.addresses import LABEL, PREFIX, gateway
from nbagent.network.rules import Rules, render
from nbagent.network.table import Table
from nbagent.network.watch import FLAGS, Changes

# The MAC address of both ends of every veth pair. With it and IFF_NOARP no end resolves its neighbour, so that no slot
# can send a forged ARP reply and the host's neighbour table does not fill up. Bit 0x02 means locally administered.
MAC = "02:6e:62:61:67:74"
OPEN, CLOSED = "internet", "closed"
MTU = 1500
# Any public address, to look up the host's default route; no packet is sent to it.
PUBLIC = "8.8.8.8"
SYSCTL = Path("/proc/sys/net")
_SCOPE_HOST = 254


class HostNetwork:
    """The network of one host. Needs CAP_NET_ADMIN. Every method raises OSError or NetlinkError."""

    def __init__(self) -> None:
        self._table = Table()
        self._ip: Any = IPRoute()
        self._rules: Rules | None = None
        # Interfaces of slots on which the host's settings disable IPv6.
        self._without_ipv6: set[int] = set()

    def close(self) -> None:
        """Closes the netlink socket."""
        self._ip.close()

    # -- common to all slots -------------------------------------------------------------------

    def apply(self, rules: Rules) -> None:
        """Creates or updates the nftables table, the resolver's address, and IPv4 forwarding of uplinks."""
        self._rules = rules
        self._table.apply(render(rules))
        for _, name, state, addresses in self._interfaces():
            if state == OPEN:
                self._table.add_slot(name, addresses)
        self._set_resolver_address(gateway(rules.range4))
        self._enable_forwarding(self._uplinks())
        self._table.note_applied()

    def is_intact(self) -> bool:
        """Whether the rules and the elements that are the same for all slots are as `apply` has left them."""
        return self._table.is_intact()

    def check(self) -> None:
        """Tries what the next slot needs of the firewall, once there are rules. Raises OSError."""
        if self._rules is not None:
            self._table.check()

    @property
    def has_stale(self) -> bool:
        """Whether the deletion of an element of a slot failed, so that `repair` deletes it."""
        return self._table.has_stale

    def repair(self, changes: Changes) -> list[str]:
        """Restores what another program changed; returns the texts of what was wrong."""
        if self._rules is None:
            return []
        found = []
        if changes.resolver or changes.everything:
            address = gateway(self._rules.range4)
            found += [f"address {address} of lo"] if self._set_resolver_address(address) else []
        names = {name for index in changes.forwarding if (name := _name_of(index))}
        if changes.uplinks or changes.everything or any(not name.startswith(PREFIX) for name in names):
            found += [f"forwarding of {name}" for name in self._enable_forwarding(self._uplinks())]
        for name in sorted(names):
            if name.startswith(PREFIX) and _forward(name):
                found.append(f"forwarding of {name}")
        if self.has_stale or changes.everything:
            found += [f"element of {name}" for name in self._table.delete_stale(_names())]
        emptied = {index for name in changes.elements if (index := _index_of(name))}
        indexes = changes.links | emptied | (changes.ipv6 & self._without_ipv6)
        links = {index for index in indexes if _name_of(index).startswith(PREFIX)}
        for selected in [()] if changes.everything else [(index,) for index in links]:
            found += self._repair_links(*selected)
        return found

    def _repair_links(self, *index: int) -> list[str]:
        """Restores forwarding, flags, routes and elements of one interface of a slot, or of all."""
        found = []
        with _missing_ignored():
            for link, name, state, addresses in self._interfaces(*index):
                with _missing_ignored():
                    found += [f"forwarding of {name}"] if _forward(name) else []
                    if link["flags"] & FLAGS != FLAGS:
                        self._ip.link("set", index=link["index"], flags=FLAGS, change=FLAGS)
                        found.append(f"flags of {name}")
                    routed = [address for address in addresses if self._restore_route(link["index"], address)]
                    found += [f"route to {address} on {name}" for address in routed]
                    opened = addresses if state == OPEN else []
                    added = [address for address in opened if self._table.restore_address(name, address)]
                    found += [f"element {address} of {name}" for address in added]
        return found

    def _restore_route(self, index: int, address: str) -> bool:
        """Adds the route to a slot's address; returns whether it was missing and could be added."""
        try:
            self._add_route(index, address)
        except NetlinkError as error:
            if error.code == errno.EEXIST:
                return False
            if ":" in address and _disables_ipv6(_name_of(index)):
                self._without_ipv6.add(index)
                return False
            raise
        self._without_ipv6.discard(index)
        return True

    def _uplinks(self) -> set[int]:
        """The interfaces of the default routes and of the routes to ranges that the operator named."""
        routes = self._ip.get_default_routes(family=socket.AF_INET)
        found = {route.get_attr("RTA_OIF") for route in routes} - {None}
        for network in self._rules.named if self._rules else ():
            found |= self._uplinks_to(str(network[0])) if network.version == 4 else set()
        return found | self._uplinks_to_proxy()

    def _uplinks_to_proxy(self) -> set[int]:
        """The interface by which the host sends to the HTTP proxy, which may be in a network of its own."""
        proxy = self._rules.proxy if self._rules else None
        return self._uplinks_to(proxy.address) if proxy is not None and proxy.version == 4 else set()

    def _enable_forwarding(self, uplinks: Iterable[int]) -> list[str]:
        """Enables IPv4 forwarding on the host's uplinks, for the slots' packets only; returns the changed ones."""
        if _is_router():
            # Another program made this host a router, so its packets for others must not be dropped.
            self._table.unguard()
            return []
        changed = []
        for index in uplinks:
            name = _name_of(index)
            setting = SYSCTL / "ipv4/conf" / name / "forwarding"
            if name not in ("", "lo") and setting.read_text().strip() == "0":
                # The guard comes first, so that the host at no moment forwards packets of others.
                self._table.guard(name)
                setting.write_text("1")
                changed.append(name)
        return changed

    def remove_all(self) -> None:
        """Removes everything that this service ever made on the host."""
        self.sweep(())
        # If another program made the host a router meanwhile, it relies on the setting of each interface.
        for name in self._table.guarded if not _is_router() else ():
            with contextlib.suppress(OSError):
                (SYSCTL / "ipv4/conf" / name / "forwarding").write_text("0")
        self._table.delete()
        self._set_resolver_address(None)

    # -- one slot ------------------------------------------------------------------------------

    def attach(self, name: str, inner: str, netns_fd: int, addresses: Collection[str], rate: int) -> None:
        """Makes a slot's veth pair, in state closed; its end `inner` is in the network namespace `netns_fd`.

        `rate` limits what the slot receives, in bytes a second.
        """
        if name in _names():
            self.remove(name, addresses)  # a repeated request, whose first response was lost
        # Looked up for every slot, because the host's uplink can change. One RTM_GETROUTE for one address, not a dump
        # of all routes, because each slot adds a route.
        uplinks = self._uplinks_to(PUBLIC) | self._uplinks_to_proxy()
        self._enable_forwarding(uplinks)
        mtu = self._mtu(uplinks)
        peer = {"ifname": inner, "address": MAC, "mtu": mtu, "net_ns_fd": netns_fd}
        self._ip.link("add", ifname=name, kind="veth", address=MAC, mtu=mtu, peer=peer)
        index = socket.if_nametoindex(name)
        _forward(name)
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            # 1 (IN6_ADDR_GEN_MODE_NONE): no link-local address, from which the host would send packets to the slot.
            (SYSCTL / "ipv6/conf" / name / "addr_gen_mode").write_text("1")
        burst, limit = rtnetlink.token_bucket(rate)
        self._ip.tc("add", "tbf", index, rate=rate, burst=burst, limit=limit)
        self._ip.link("set", index=index, ifalias=" ".join((CLOSED, *addresses)), flags=FLAGS, change=FLAGS)
        for address in addresses:
            self._add_route(index, address)

    def open(self, name: str) -> None:
        """Adds a slot's addresses to the sets, so that its packets pass. Raises OSError when it has no interface."""
        index = socket.if_nametoindex(name)
        for _, found, _, addresses in self._interfaces(index):
            if found == name:
                self._ip.link("set", index=index, ifalias=" ".join((OPEN, *addresses)))
                self._table.add_slot(name, addresses)

    def remove(self, name: str, addresses: Collection[str]) -> None:
        """Deletes a slot's interface and its elements in all sets; any of them may be missing.

        The interface comes first, because its packets add elements to the counted sets.
        """
        with contextlib.suppress(OSError, NetlinkError):
            self._ip.link("del", index=socket.if_nametoindex(name))
        self._table.delete_slot(name, addresses)

    def sweep(self, keep: Collection[str]) -> None:
        """Removes every interface of ours, and every element of one, that is not among `keep`."""
        for index, name in socket.if_nameindex():
            if name.startswith(PREFIX) and name not in keep:
                with contextlib.suppress(NetlinkError):  # the kernel removed it with its network namespace
                    self._ip.link("del", index=index)
        self._table.delete_others(keep)

    # -- helpers -------------------------------------------------------------------------------

    def _interfaces(self, *index: int) -> Iterator[tuple[Any, str, str, list[str]]]:
        """The slots' interfaces: message of the kernel, name, state (OPEN or CLOSED), addresses."""
        for link in self._ip.get_links(*index):
            name, alias = link.get_attr("IFLA_IFNAME"), link.get_attr("IFLA_IFALIAS") or ""
            if name.startswith(PREFIX) and alias.startswith((OPEN, CLOSED)):
                state, *addresses = alias.split()
                yield link, name, state, addresses

    def _set_resolver_address(self, wanted: str | None) -> bool:
        """Makes `wanted` the only address on lo with our label; returns whether it was missing.

        Its scope is host, so that the kernel never selects it as the source address of packets to other hosts.
        """
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
            return True
        return False

    def _add_route(self, index: int, address: str) -> None:
        bits = 128 if ":" in address else 32
        self._ip.route("add", dst=f"{address}/{bits}", oif=index, scope="link" if bits == 32 else "universe")

    def _uplinks_to(self, address: str) -> set[int]:
        """The interface by which the host sends to an address; empty when it has no route there."""
        with contextlib.suppress(NetlinkError, IndexError):
            return {self._ip.route("get", dst=address)[0].get_attr("RTA_OIF")}
        return set()

    def _mtu(self, uplinks: Iterable[int]) -> int:
        """The smallest MTU of the uplinks, so that the host need not fragment or refuse a slot's packets."""
        return min((link.get_attr("IFLA_MTU") for index in uplinks for link in self._ip.get_links(index)), default=MTU)


def _names() -> set[str]:
    """The names of all interfaces of the host."""
    return {name for _, name in socket.if_nameindex()}


def _index_of(name: str) -> int:
    """The index of an interface; 0 when it was removed."""
    with contextlib.suppress(OSError):
        return socket.if_nametoindex(name)
    return 0


def _name_of(index: int) -> str:
    """The name of an interface; empty when it was removed."""
    with contextlib.suppress(OSError):
        return socket.if_indextoname(index)
    return ""


@contextlib.contextmanager
def _missing_ignored() -> Iterator[None]:
    """Ignores the errors about an interface that was removed meanwhile."""
    try:
        yield
    except FileNotFoundError:
        pass
    except NetlinkError as error:
        if error.code != errno.ENODEV:
            raise


def _is_router() -> bool:
    return (SYSCTL / "ipv4/ip_forward").read_text().strip() == "1"


def _disables_ipv6(name: str) -> bool:
    return (SYSCTL / "ipv6/conf" / name / "disable_ipv6").read_text().strip() == "1"


def _forward(name: str) -> bool:
    """Enables IPv4 forwarding on an interface of a slot; returns whether it was disabled."""
    setting = SYSCTL / "ipv4/conf" / name / "forwarding"
    if setting.read_text().strip() == "1":
        return False
    setting.write_text("1")
    return True
