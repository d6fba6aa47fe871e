# SPDX-License-Identifier: BSD-3-Clause
"""A network between hosts: a bridge in a namespace of its own, with an address for each host that is plugged in.

    with Lan("f1") as lan:
        lan.plug(host, "10.77.0.11")
        lan.connect("10.77.0.11", 80, source="10.77.0.201")

The machine's own network is not part of it. A host that ends removes its interface; `remove` removes the network.
Only hosts of the nspawn driver can be connected, because a virtual machine has its network from QEMU.
"""

from __future__ import annotations

import ipaddress
import socket
from types import TracebackType

from testhost_driver import ending, netns
from testhost_driver.errors import BadArgument
from testhost_driver.host import Host

BRIDGE, PLUG = "br0", "lan0"
PREFIX_LENGTH = 24


class Lan:
    """The network `name`, made when it is not there yet."""

    def __init__(self, name: str, gateway: str = "10.77.0.254") -> None:
        self.name, self.address = f"lan-{name}", gateway
        if netns.path_of(self.name).exists():
            return
        ending.made(f"network {self.name}", self.remove)
        netns.create(self.name)
        netns.ip("-n", netns.name_of(self.name), "link", "add", BRIDGE, "type", "bridge")
        netns.ip("-n", netns.name_of(self.name), "link", "set", BRIDGE, "up")
        self.take(gateway)

    def take(self, address: str) -> None:
        """One more address of the bridge itself, to connect from."""
        where = f"{address}/{PREFIX_LENGTH}" if ipaddress.ip_address(address).version == 4 else f"{address}/64"
        more = [] if ":" not in address else ["nodad"]
        netns.ip("-n", netns.name_of(self.name), "address", "replace", where, "dev", BRIDGE, *more)

    def plug(self, host: Host, address: str) -> None:
        """Gives the host an interface in the network, when it has none yet."""
        if host.driver != "nspawn":
            raise BadArgument("only nspawn hosts can be connected to a test network")
        inside, outside = netns.name_of(host.name), netns.name_of(self.name)
        if PLUG in netns.ip("-n", inside, "-br", "link"):
            return
        port = host.name[:15]
        netns.ip("-n", outside, "link", "add", port, "type", "veth", "peer", "name", PLUG, "netns", inside)
        netns.ip("-n", outside, "link", "set", port, "master", BRIDGE, "up")
        netns.ip("-n", inside, "address", "add", f"{address}/{PREFIX_LENGTH}", "dev", PLUG)
        netns.ip("-n", inside, "link", "set", PLUG, "up")

    def connect(self, address: str, port: int, source: str = "", timeout: float = 10) -> socket.socket:
        """A TCP connection from the bridge, by one of its addresses, to a host."""
        return netns.connect(self.name, port, timeout, address, source)

    def remove(self) -> None:
        """Removes the network. May be called twice."""
        netns.remove(self.name)
        ending.gone(f"network {self.name}")

    def keep(self) -> None:
        """Lets the network outlive this process, as `Host.keep`."""
        ending.keep(f"network {self.name}", f"ip netns del {netns.name_of(self.name)}")

    @staticmethod
    def remove_named(name: str) -> None:
        """Removes the network `name`, if it exists."""
        netns.remove(f"lan-{name}")

    def __enter__(self) -> Lan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
