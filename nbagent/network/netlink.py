# SPDX-License-Identifier: BSD-3-Clause
"""The host's side of the slots' network: interfaces, addresses, routes, and the nftables table `inet nbagent`.

The kernel holds all state, so the network service can be restarted between any two calls, and every method can be
repeated. The alias of an interface (`ip link`) holds its state and the slot's addresses. The sets of the table are
filled from the aliases again after another program flushed the host's ruleset.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import socket
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any  # pyroute2 has no types

from nftables import Nftables
from pyroute2 import IPRoute, NetlinkError

from nbagent.linux import rtnetlink
from nbagent.network.addresses import LABEL, PREFIX, gateway
from nbagent.network.rules import COUNTED, FIXED, GUARDED, PER_SLOT, TABLE, Rules, render
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
# strerror(3) of ENOENT and EEXIST, which nft prints; this process sets no locale.
MISSING, PRESENT = "No such file or directory", "File exists"


class NftFailed(OSError):
    """nftables refused a command."""


class HostNetwork:
    """The network of one host. Needs CAP_NET_ADMIN. Every method raises OSError or NetlinkError."""

    def __init__(self) -> None:
        self._nft = Nftables()
        self._ip: Any = IPRoute()
        # A copy of the set `guarded`, to restore it after another program flushed the host's ruleset.
        self._guarded = {name for name, in self._elements(GUARDED)}
        self._rules: Rules | None = None
        # The table without the elements of slots, as `apply` has left it.
        self._applied = ""
        # Whether the deletion of an element of a slot failed, so that `repair` deletes it.
        self.has_stale = False
        # Interfaces of slots on which the host's settings disable IPv6.
        self._without_ipv6: set[int] = set()

    def close(self) -> None:
        """Closes the netlink socket."""
        self._ip.close()

    # -- common to all slots -------------------------------------------------------------------

    def apply(self, rules: Rules) -> None:
        """Creates or updates the nftables table, the resolver's address, and IPv4 forwarding of uplinks."""
        self._rules, script = rules, render(rules)
        try:
            self._command(script)
        except NftFailed:
            # Another program or version has made a chain or set of the same name and of another kind.
            self._command(f"table {TABLE}\ndelete table {TABLE}\n{script}")
        for name in self._guarded:
            self._guard(name)
        for _, name, state, addresses in self._interfaces():
            if state == OPEN:
                self._add_slot(name, addresses)
        self._set_resolver_address(gateway(rules.range4))
        self._enable_forwarding(self._uplinks())
        self._applied = self._listed()

    def is_intact(self) -> bool:
        """Whether the rules and the elements that are the same for all slots are as `apply` has left them."""
        try:
            guarded = {name for name, in self._elements(GUARDED)}
            return self._listed() == self._applied and guarded == self._guarded
        except NftFailed:  # the table or a set of `FIXED` is missing
            return False

    def _exists(self) -> bool:
        return f"table {TABLE}\n" in self._command("list tables inet")

    def _listed(self) -> str:
        """The table without elements, and the elements of the sets that are the same for all slots."""
        self._nft.set_stateless_output(True)
        self._nft.set_terse_output(True)
        try:
            found = [self._command(f"list table {TABLE}")]
            self._nft.set_terse_output(False)
            found += [self._command(f"list set {TABLE} {name}") for name in FIXED]
            # As a comment, nftables after 1.1.3 prints the number of elements of a set.
            return re.sub(r"\s*# count \d+", "", "".join(found))
        finally:
            self._nft.set_terse_output(False)
            self._nft.set_stateless_output(False)

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
            found += [f"element of {name}" for name in self._delete_stale()]
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
                    added = [address for address in addresses if state == OPEN and self._restore_element(name, address)]
                    found += [f"element {address} of {name}" for address in added]
        return found

    def _restore_element(self, name: str, address: str) -> bool:
        """Adds a slot's address to its set; returns whether it was missing."""
        try:
            self._command(f"create {_element(name, address)}")
        except NftFailed as error:
            if PRESENT in str(error):
                return False
            raise
        return True

    def _delete_stale(self) -> set[str]:
        """Deletes the elements of interfaces that do not exist; returns the names. Raises NftFailed."""
        existing, found = {name for _, name in socket.if_nameindex()}, set()
        self.has_stale = False
        for set_name in PER_SLOT:
            for element in self._elements(set_name):
                if element[0] not in existing:
                    self._delete_element(set_name, *element)
                    found.add(element[0])
        if self.has_stale:
            raise NftFailed(f"elements of {', '.join(sorted(found)[:3])} were not deleted")
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
            for name in self._guarded:
                self._delete_element(GUARDED, name)
            self._guarded.clear()
            return []
        changed = []
        for index in uplinks:
            name = _name_of(index)
            setting = SYSCTL / "ipv4/conf" / name / "forwarding"
            if name not in ("", "lo") and setting.read_text().strip() == "0":
                # The guard comes first, so that the host at no moment forwards packets of others.
                self._guarded.add(name)
                self._guard(name)
                setting.write_text("1")
                changed.append(name)
        return changed

    def remove_all(self) -> None:
        """Removes everything that this service ever made on the host."""
        self.sweep(())
        # If another program made the host a router meanwhile, it relies on the setting of each interface.
        for name in self._guarded if not _is_router() else ():
            with contextlib.suppress(OSError):
                (SYSCTL / "ipv4/conf" / name / "forwarding").write_text("0")
        if self._exists():
            self._command(f"delete table {TABLE}")
        self._set_resolver_address(None)

    # -- one slot ------------------------------------------------------------------------------

    def attach(self, name: str, inner: str, netns_fd: int, addresses: Collection[str], rate: int) -> None:
        """Makes a slot's veth pair, in state closed; its end `inner` is in the network namespace `netns_fd`.

        `rate` limits what the slot receives, in bytes a second.
        """
        if name in (existing for _, existing in socket.if_nameindex()):
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
                self._add_slot(name, addresses)

    def remove(self, name: str, addresses: Collection[str]) -> None:
        """Deletes a slot's interface and its elements in all sets; any of them may be missing.

        The interface comes first, because its packets add elements to the counted sets.
        """
        with contextlib.suppress(OSError, NetlinkError):
            self._ip.link("del", index=socket.if_nametoindex(name))
        for address in addresses:
            self._delete_element(_set_of(address), name, address)
        for set_name in COUNTED:
            self._delete_element(set_name, name)

    def sweep(self, keep: Collection[str]) -> None:
        """Removes every interface of ours, and every element of one, that is not among `keep`."""
        for index, name in socket.if_nameindex():
            if name.startswith(PREFIX) and name not in keep:
                with contextlib.suppress(NetlinkError):  # the kernel removed it with its network namespace
                    self._ip.link("del", index=index)
        for set_name in PER_SLOT:
            for element in self._elements(set_name):
                if element[0] not in keep:
                    self._delete_element(set_name, *element)

    # -- helpers -------------------------------------------------------------------------------

    def _add_slot(self, name: str, addresses: Iterable[str]) -> None:
        for address in addresses:
            self._command(f"add {_element(name, address)}")

    def _guard(self, name: str) -> None:
        self._command(f'add element {TABLE} {GUARDED} {{ "{name}" }}')

    def _delete_element(self, set_name: str, name: str, *rest: str) -> None:
        """Deletes an element of a set, if there is one. Sets `has_stale` when that fails."""
        key = " . ".join((f'"{name}"', *rest))
        try:
            self._command(f"delete element {TABLE} {set_name} {{ {key} }}")
        except NftFailed as error:
            self.has_stale = self.has_stale or MISSING not in str(error)

    def _elements(self, set_name: str) -> list[tuple[str, ...]]:
        """The elements of a set, each as the tuple of its concatenated fields; none if the set is missing."""
        self._nft.set_json_output(True)
        try:
            response = json.loads(self._command(f"list set {TABLE} {set_name}"))
        except NftFailed as error:
            if MISSING in str(error):
                return []
            raise
        finally:
            self._nft.set_json_output(False)
        found = []
        for part in response["nftables"]:
            for element in part.get("set", {}).get("elem", ()):
                # {"elem": {"val": …}} with a counter or limit; {"concat": […]} with several fields.
                value = element.get("elem", element) if isinstance(element, dict) else element
                value = value.get("val", value) if isinstance(value, dict) else value
                found.append(tuple(value["concat"]) if isinstance(value, dict) else (str(value),))
        return found

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

    def _command(self, script: str) -> str:
        status, output, error = self._nft.cmd(script)
        if status:
            # The message and the command; a longer script has one of each for every line.
            raise NftFailed(f"nft: {' '.join(str(error).splitlines()[:2])[:300]}")
        return str(output)


def _set_of(address: str) -> str:
    return "slots6" if ":" in address else "slots4"


def _element(name: str, address: str) -> str:
    """The element of a slot's address, in nft's words."""
    return f'element {TABLE} {_set_of(address)} {{ "{name}" . {address} }}'


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
